"""Commands that are interrupted: exit codes, what is said, what is left on disk."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from calibatt_compiler.cli import interruption

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("number", "expected"),
    [(signal.SIGINT, 130), (signal.SIGHUP, 129)],  # SIGTERM: the test below
)
def test_an_interrupted_calibration_leaves_whole_files_and_says_how_to_go_on(
    tmp_path: Path, tiny_wan_folder: Path, number: int, expected: int
):
    """The finished input stays, to go on from; nothing half-written does."""
    # A job started in the background inherits an ignored SIGINT: restore what a terminal gives.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "signal.signal(signal.SIGHUP, signal.SIG_DFL); "
        "from calibatt_compiler.cli import main; main()"
    )
    arguments = ["calibrate", tiny_wan_folder, "--out", tmp_path / "p.calibatt", "--block", "32"]
    # So many that it is not done before the signal comes.
    arguments += ["--prompt", "a bird"] * 9 + ["--set", "max_sequence_length=16"]
    arguments += ["--height", "112", "--width", "144", "--frames", "9", "--steps", "60"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments), "--device", "cpu"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    folder = tmp_path / "p.calibatt.calibration"
    try:
        while process.poll() is None and not list(folder.glob("input-*")):
            time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == expected, said
    assert "interrupted" in said
    finished = sorted(path.name for path in folder.glob("input-*"))
    assert finished == [f"input-{index:05d}.safetensors" for index in range(len(finished))]
    assert 1 <= len(finished) < 9
    assert f"{len(finished)} of 9 inputs are kept in {folder}; the same command goes on" in said
    assert "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert {path.name for path in folder.iterdir()} == {"run.json", "sums", *finished}


def test_signals_end_a_command_once_and_are_not_lost(monkeypatch: pytest.MonkeyPatch):
    tidied: list[bool] = []
    lost: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    monkeypatch.setattr(interruption, "_AGAIN", 0.2)

    def command() -> None:
        with interruption.signals_interrupt(), interruption.said_if_interrupted(lambda: "kept"):
            signal.raise_signal(signal.SIGHUP)
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGTERM)
                time.sleep(0.5)
                tidied.append(True)

    class Last:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def losing() -> None:
        with interruption.signals_interrupt():
            Last()
            for _ in range(100):
                time.sleep(0.05)
            pytest.fail("the signal was lost")

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            command()
        with pytest.raises(KeyboardInterrupt) as again:
            losing()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert tidied == [True]
    assert len(lost) == 1
    assert [interruption.exit_code(each.value) for each in (caught, again)] == [143, 143]
    assert caught.value.__notes__ == ["kept"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert interruption.exit_code(KeyboardInterrupt()) == 130
