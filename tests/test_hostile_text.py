"""Text of plans, prompts and paths is shown as it is, by every command: no markup, no escapes."""

from __future__ import annotations

import io
import json
import logging
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import pytest
import torch
from rich.console import Console

import calibatt_compiler
from calibatt_compiler.cli.app import run
from calibatt_compiler.cli.progress import TerminalProgress
from calibatt_compiler.errors import CalibattError
from calibatt_compiler.plan import (
    BlockPattern,
    CalibrationInputs,
    ModelIdentity,
    Plan,
    Sampler,
    SitePatterns,
)
from calibatt_compiler.printable import escape, printable, printable_lines
from calibatt_compiler.report.summary import SiteRow, Summary
from calibatt_compiler.terminal import PlainConsole

ESCAPES = "\x1b]52;c;aGk=\x07\x9b31m\u202eevil\u2066\r\x08"
MARKUP = "[/][bold]x[/bold][link=file:a]:smile:"
HOSTILE = f"{ESCAPES}{MARKUP}$\\frac{{$<script>alert(1)</script>\"'&\nfake: line"
SHOWN = "\\x1b]52;c;aGk=\\x07\\x9b31m\\u202eevil\\u2066\\r\\x08"
NAME = HOSTILE.replace("/", "|")
"""For files: a name in one folder."""

FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
STYLE = re.compile(r"\x1b\[[0-9;]*m")
COMMANDS = ("demo", "env", "calibrate", "inspect", "compare", "tune", "build")


def check(text: str) -> None:
    """Fail unless a terminal may have the text, and hostile text is shown as it is."""
    assert not FORBIDDEN.search(text), repr(FORBIDDEN.findall(text))
    assert "\nfake: line" not in text
    assert "\N{SMILING FACE WITH OPEN MOUTH AND SMILING EYES}" not in text


class Scripts(HTMLParser):
    """Finds what a page would run, and all its text."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.handlers: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.inside = tag == "script" and dict(attributes).get("type") is None
        self.handlers += [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts.append(data)

    def handle_endtag(self, tag: str) -> None:
        self.inside = False


def check_page(path: Path) -> None:
    """Fail if a page runs other scripts than its own, or hides what it shows."""
    text = path.read_text("utf-8")
    assert not FORBIDDEN.search(text)
    assert "\\x1b]52" in text
    found = Scripts()
    found.feed(text)
    assert found.handlers == []
    assert all("alert(1)" not in script for script in found.scripts)
    assert len(found.scripts) <= 1


def hostile_plan(sites: tuple[str, ...] = (HOSTILE, "[/]", "[bold]b[/bold]")) -> Plan:
    pattern = BlockPattern.from_mask(torch.eye(4, dtype=torch.bool)[None], block=(16, 16))
    plan = Plan.create(
        {name: SitePatterns.share([pattern] * 2, head_dim=64) for name in sites},
        grid=(1, 8, 8),
        sampler=Sampler(name=HOSTILE, timesteps=(900.0, 100.0)),
        model=ModelIdentity(class_name=HOSTILE, config_digest=HOSTILE),
        inputs=CalibrationInputs(count=1, digest=HOSTILE),
        thresholds={HOSTILE: 1.0, f"raised:{HOSTILE}": 0.1},
        quality={HOSTILE: 1.0, f"order_density:{HOSTILE}": 0.5, f"order_error:{HOSTILE}": 0.5},
    )
    return Plan(plan.metadata.model_copy(update={"producer": HOSTILE}), plan.sites)


@pytest.fixture
def plan_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plan full of hostile text in a file of such a name, in the current folder."""
    monkeypatch.setenv("CALIBATT_CACHE_DIR", str(tmp_path / NAME / "cache"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"{NAME}.calibatt"
    hostile_plan().save(path)
    return path


@pytest.fixture(params=["pipe", "terminal"])
def said(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Run a command; return what it said, checked, on both streams."""
    terminal = request.param == "terminal"
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "300")

    def command(*arguments: object, code: int) -> str:
        assert run([str(argument) for argument in arguments]) == code
        captured = capsys.readouterr()
        text = captured.out + captured.err
        if terminal:
            # The program's own colours, and the cursor of its progress bars.
            text = re.sub(r"\x1b\[(\?25[lh]|\d?[AK]|2K)|\r", "", STYLE.sub("", text))
        check(text)
        return text

    return command


def test_inspect_shows_it(plan_file: Path, said: Callable[..., str]) -> None:
    text = said("inspect", plan_file, "--html", f"{NAME}.html", code=0)
    joined = re.sub(r"\s+", "", text)
    assert SHOWN in joined
    assert "[/][bold]x[/bold][link=file:a]:smile:" in joined
    check_page(Path(f"{NAME}.html"))


def test_inspect_json_holds_it(plan_file: Path, said: Callable[..., str]) -> None:
    data = json.loads(said("inspect", plan_file, "--json", code=0).replace("page written", ""))
    assert data["sites"][0]["name"] == HOSTILE
    assert data["metadata"]["producer"] == HOSTILE


def test_build_shows_it(plan_file: Path, said: Callable[..., str], tmp_path: Path) -> None:
    dense = BlockPattern.dense(1, 64, 64, (16, 16))  # which needs no kernel
    plan = hostile_plan()
    plan.with_sites(
        {HOSTILE: SitePatterns.share([dense] * 2, head_dim=64)}, thresholds={}, quality={}
    ).save(plan_file)
    assert "are ready in" in said("build", plan_file, "--arch", "sm_80", code=0)
    said("build", plan_file, "--arch", HOSTILE, code=2)


@pytest.mark.parametrize("command", COMMANDS)
def test_errors_of_every_command_show_it(
    command: str, plan_file: Path, said: Callable[..., str]
) -> None:
    missing = f"no-{NAME}"
    prompt = ["--prompt", HOSTILE]
    cases: dict[str, list[list[object]]] = {
        "demo": [["--settings", missing], ["--device", HOSTILE], ["--dtype", HOSTILE]],
        "calibrate": [
            [HOSTILE, "--out", "p", *prompt],
            ["m", "--out", "p", "--prompts", missing],
            ["m", "--out", "p", *prompt, "--token-order", HOSTILE],
            ["m", "--out", "p", *prompt, "--device", HOSTILE],
        ],
        "env": [],
        "inspect": [[missing], [plan_file, "--validate", missing, *prompt]],
        "compare": [
            ["m", missing, *prompt],
            [HOSTILE, plan_file, *prompt],
            ["m", plan_file, *prompt, "--dense", HOSTILE],
            ["m", plan_file, *prompt, "--lowering", HOSTILE],
        ],
        "tune": [
            [HOSTILE, "--out", "p", *prompt],
            ["m", "--out", "p", *prompt, "--pooled", HOSTILE],
            ["m", "--out", "p", *prompt, "--gamma", HOSTILE],
        ],
        "build": [[missing, "--arch", "sm_80"]],
    }
    for arguments in cases[command]:
        text = said(command, *arguments, code=2)
        assert "\\x1b]52" in text, arguments
    for usage in ([f"--{HOSTILE}"], ["a", "b", "c", HOSTILE], ["--block", HOSTILE]):
        said(command, *usage, code=2)
    said(f"{command}{HOSTILE}", code=2)
    said(f"--{HOSTILE}", command, code=2)


@pytest.mark.parametrize("content", ["name", "text"])
def test_prompt_files_of_hostile_names_and_content(
    content: str, plan_file: Path, said: Callable[..., str]
) -> None:
    path = Path(f"{NAME}.json")
    path.write_text(json.dumps([[HOSTILE]]) if content == "text" else "{" + HOSTILE)
    said("calibrate", "m", "--out", "p", "--prompts", path, code=2)


@pytest.mark.slow
def test_compare_shows_it(
    plan_file: Path,
    said: Callable[..., str],
    tiny_wan_folder: Path,
    tiny_wan_arguments: dict[str, int],
    tiny_wan_grid: tuple[int, int, int],
) -> None:
    """On the tiny pipeline, with labels and prompts of hostile text, to the pages of results."""
    from calibatt_compiler.cli.pipelines import load_pipeline

    pipe = load_pipeline(str(tiny_wan_folder), torch.device("cpu"), torch.float32)
    steps = tiny_wan_arguments["num_inference_steps"]
    pipe.scheduler.set_timesteps(steps)
    blocks = -(-math.prod(tiny_wan_grid) // 32)
    mask = torch.eye(blocks, dtype=torch.bool).expand(steps, 2, blocks, blocks).clone()
    masks = {f"blocks.{layer}.attn1": mask for layer in range(2)}
    timesteps = pipe.scheduler.timesteps.tolist()
    for name in (plan_file, f"2{NAME}.calibatt"):
        Plan.from_masks(masks, tiny_wan_grid, timesteps, (32, 32)).save(name)
    size = {"height": "height", "width": "width", "num_frames": "frames"}
    options = [w for k, n in size.items() for w in (f"--{n}", tiny_wan_arguments[k])]
    with mock.patch("calibatt_compiler.backend._inductor", lambda gm, *_: gm.forward):
        text = said(
            "compare",
            tiny_wan_folder,
            plan_file,
            f"2{NAME}.calibatt",
            "--prompt",
            HOSTILE,
            "--dense",
            "eager",
            "--out",
            f"out-{NAME}",
            *options,
            code=0,
        )
    assert "\\x1b]52" in text
    check_page(Path(f"out-{NAME}") / "index.html")
    summary = (Path(f"out-{NAME}") / "summary.txt").read_text("utf-8")
    check(summary)


@pytest.mark.slow
def test_calibrate_and_tune_show_it(
    plan_file: Path, said: Callable[..., str], tiny_wan_folder: Path
) -> None:
    out, plan = Path(f"new-{NAME}"), hostile_plan()
    size = ["--height", "32", "--width", "32", "--frames", "5", "--steps", "2"]
    common = [tiny_wan_folder, "--prompt", HOSTILE, "--out", out, *size, "--device", "cpu"]
    with mock.patch("calibatt_compiler.calibration.calibrate", return_value=plan):
        assert "\\x1b]52" in said("calibrate", *common, code=0)
    with (
        mock.patch("calibatt_compiler.calibration.tune", return_value=mock.Mock(chosen=None)),
        mock.patch("calibatt_compiler.calibration.tuning_cost"),
        mock.patch("calibatt_compiler.cli.tables.tuning.cost_table", return_value=SHOWN),
        mock.patch("calibatt_compiler.cli.tables.tuning.front_table", return_value=MARKUP),
    ):
        text = said("tune", *common, "--yes", code=0)
    assert MARKUP in text
    assert "\\x1b]52" in text


def test_env_shows_it(plan_file: Path, said: Callable[..., str]) -> None:
    assert "\\x1b]52" in said("env", code=0)
    said("env", "--json", code=0)


def test_every_console_is_the_plain_one() -> None:
    root = Path(calibatt_compiler.__file__).parent
    made = [
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if re.search(r"(?<!Plain)Console\(|(?<![.\w])print\(|^from html ", path.read_text("utf-8"))
    ]
    # A summary is printable text in any console.
    assert made == ["report/summary.py"]


def test_progress_shows_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for terminal in (False, True):
        if terminal:
            monkeypatch.setenv("FORCE_COLOR", "1")
        with TerminalProgress() as progress:
            progress.start(HOSTILE, 2)
            progress.advance()
        text = capsys.readouterr().err
        assert "]52;c" in text
        assert "\x1b]52" not in text
        assert "\x9b" not in text
        assert "\u202e" not in text
        assert "[bold]x[/bold]" in text


def test_errors_and_logs_show_it(capsys: pytest.CaptureFixture[str]) -> None:
    error = CalibattError(HOSTILE, expected=HOSTILE, got=HOSTILE, remedy=HOSTILE)
    check(str(error))
    assert str(error).count(SHOWN) == 4
    assert error.problem == HOSTILE
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    log = logging.getLogger("calibatt")
    log.addHandler(handler)
    try:
        log.warning("%s and %d", HOSTILE, 3)
    finally:
        log.removeHandler(handler)
    check(stream.getvalue())
    assert f"{SHOWN}{MARKUP}" in stream.getvalue()


def test_a_summary_shows_it_in_any_console() -> None:
    row = SiteRow(HOSTILE, "sparse", 0.5, 0.5, HOSTILE, 1, {f"dense: {HOSTILE}": 2}, {HOSTILE: 1})
    skipped = SiteRow("a", HOSTILE, None, None, "sdpa", 0, {})
    summary = Summary((row, skipped), 1, "0" * 64, (HOSTILE,))
    check(str(summary))
    out = io.StringIO()
    Console(file=out, width=200).print(summary)
    check(out.getvalue())
    assert "[bold]x[/bold]" in out.getvalue()


def test_a_console_of_another_encoding_takes_any_text() -> None:
    console = PlainConsole()
    console.file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console.print(f"\u2581 {HOSTILE} \udc80")
    console.file.flush()
    assert b"\\u2581" in console.file.buffer.getvalue()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, é, 狐, नमस्ते", "plain, é, 狐, नमस्ते"),
        ("\N{FAMILY}\u200d\N{WOMAN}", "\N{FAMILY}\u200d\N{WOMAN}"),
        ("a\u3000b\u00a0c", "a\u3000b\u00a0c"),
        ("\x1b[31m", "\\x1b[31m"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\u202e\u2066\u200f\ufeff", "\\u202e\\u2066\\u200f\\ufeff"),
        ("\udc80", "\\udc80"),
        ("\x7f\x85\u2028", "\\x7f\\x85\\u2028"),
        (7, "7"),
    ],
)
def test_printable(text: object, expected: str) -> None:
    assert printable(text) == expected


def test_every_other_character_is_shown_or_escaped() -> None:
    for code in range(0x110000):
        assert not FORBIDDEN.search(printable(chr(code)))
    assert printable_lines("a\nb\x1b", indent="  ") == "a\n  b\\x1b"
    assert escape('<\x1b">') == "&lt;\\x1b&quot;&gt;"
