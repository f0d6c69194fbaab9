"""The commands together, and what becomes of their failures.

Nothing heavy is imported before a command runs, so that `--help` is quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from calibatt_compiler import logs
from calibatt_compiler.cli import build, calibrate, compare, demo, env, inspect, tune
from calibatt_compiler.cli.interruption import exit_code, signals_interrupt
from calibatt_compiler.errors import CalibattError, PlanMismatchError
from calibatt_compiler.version import VERSION

FAILED, UNUSABLE = 1, 2

_HELP = (
    "Make video diffusion transformers faster by leaving out attention that does not matter.\n\n"
    "A few sample videos show, for each layer, head and diffusion step, which blocks of the "
    "attention map carry weight: that is calibration. The result is a plan, one file. A model "
    "compiled with the plan computes only those blocks.\n\n"
    "To see all of it on a small model: calibatt demo. On your own: calibatt calibrate, then "
    "calibatt compare. Each command explains itself with --help."
)
_EPILOG = (
    "Exit codes: 0 done; 1 failed, or the plan does not fit the model, or the quality asked for "
    "was not reached; 2 wrong arguments or unusable files; 130 interrupted with Ctrl-C, "
    "143 by SIGTERM, 129 by SIGHUP. A command "
    "that ends early leaves no half-written file."
)


class _Commands(TyperGroup):
    """Turns failures of any command into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with signals_interrupt():
                return super().invoke(ctx)
        except CalibattError as error:
            problem, *details = str(error).splitlines()
            console = Console(stderr=True, highlight=False, soft_wrap=True)
            console.print(f"[bold red]calibatt:[/bold red] {_plain(problem)}")
            for line in details:
                console.print(_plain(line))
            code = FAILED if isinstance(error, PlanMismatchError) else UNUSABLE
            raise typer.Exit(code) from error
        except KeyboardInterrupt as error:
            with suppress(OSError):  # after SIGHUP the terminal is gone
                console = Console(stderr=True, highlight=False, soft_wrap=True)
                console.print("calibatt: interrupted; no half-written file was left")
                for note in getattr(error, "__notes__", ()):
                    console.print(_plain(note))
            raise typer.Exit(exit_code(error)) from error


app = typer.Typer(
    cls=_Commands,
    help=_HELP,
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command("demo")(demo.demo)
app.command("calibrate")(calibrate.calibrate)
app.command("inspect")(inspect.inspect)
app.command("compare")(compare.compare)
app.command("tune")(tune.tune)
app.command("build")(build.build)
app.command("env")(env.env)


def _version(asked: bool) -> None:
    if asked:
        Console().print(f"calibatt {VERSION}", highlight=False)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log what is compiled, bound and skipped.")
    ] = False,
) -> None:
    if verbose:
        logs.start("all")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: as on the command line, without the program; default: those of the process.

    Returns:
        The exit code.
    """
    try:
        app(args=None if arguments is None else list(arguments), prog_name="calibatt")
    except KeyboardInterrupt as error:
        return exit_code(error)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else FAILED
    return 0


def _plain(text: str) -> str:
    """Escape what rich would take for markup."""
    return text.replace("[", "\\[")
