"""The commands together, and what becomes of their failures.

Nothing heavy is imported before a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from calibatt_compiler import logs
from calibatt_compiler.cli import build, calibrate, compare, demo, env, inspect, tune
from calibatt_compiler.cli.interruption import exit_code, signals_interrupt
from calibatt_compiler.errors import CalibattError, PlanMismatchError
from calibatt_compiler.printable import printable
from calibatt_compiler.terminal import PlainConsole
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


@contextmanager
def _printable_usage() -> Iterator[None]:
    """Make printable what complaints about arguments quote: a shell gives names of any file."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message"):
            for name, value in vars(error).items():
                if isinstance(value, str):
                    setattr(error, name, printable(value))
        raise


class _Commands(TyperGroup):
    """Turns failures of any command into a message and an exit code."""

    def make_context(self, *arguments: Any, **settings: Any) -> Any:
        with _printable_usage():
            return super().make_context(*arguments, **settings)

    def invoke(self, ctx: Any) -> Any:
        try:
            with signals_interrupt(), _printable_usage():
                return super().invoke(ctx)
        except CalibattError as error:
            console = PlainConsole(stderr=True, soft_wrap=True)
            console.print("calibatt:", style="bold red", end=" ")
            console.print(str(error))
            code = FAILED if isinstance(error, PlanMismatchError) else UNUSABLE
            raise typer.Exit(code) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever read the output has read enough
                raise
            named = "a file" if error.filename is None else error.filename
            console = PlainConsole(stderr=True, soft_wrap=True)
            console.print("calibatt:", style="bold red", end=" ")
            console.print(f"{printable(named)}: {error.strerror or error}")
            raise typer.Exit(UNUSABLE) from error
        except KeyboardInterrupt as error:
            with suppress(OSError):  # after SIGHUP the terminal is gone
                console = PlainConsole(stderr=True, soft_wrap=True)
                console.print("calibatt: interrupted; no half-written file was left")
                for note in getattr(error, "__notes__", ()):
                    console.print(printable(note))
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
        PlainConsole().print(f"calibatt {VERSION}")
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
