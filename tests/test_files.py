"""Files: whole or absent, refused beforehand, and failures of the system as errors of ours."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from calibatt_compiler import files
from calibatt_compiler.calibration.store.energies import EnergyBuffer
from calibatt_compiler.cli.app import run
from calibatt_compiler.errors import CalibattError, FileError
from calibatt_compiler.files import check_folder, check_output, naming, replacing, write_text
from calibatt_compiler.plan import Plan


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    masks = {"blocks.0.attn1": torch.eye(4, dtype=torch.bool).expand(2, 2, 4, 4).clone()}
    path = tmp_path / "small.calibatt"
    Plan.from_masks(masks, (1, 8, 8), [900.0, 100.0], (16, 16)).save(path)
    return path


def no_file(kind: str, tmp_path: Path) -> Path:
    """Something of the kind where a file is to be written."""
    path = tmp_path / "target"
    if kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "link to a file":
        (tmp_path / "elsewhere").write_text("kept")
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(os.fspath(path))
    elif kind == "device":
        return Path("/dev/null")
    elif kind == "folder":
        path.mkdir()
    elif kind == "below a file":
        path.write_text("kept")
        return path / "new"
    elif kind == "long name":
        return tmp_path / ("x" * 300)
    elif kind == "null byte":
        return tmp_path / "a\0b"
    elif kind == "no disk to write to":
        return Path("/proc/new/target")
    return path


KINDS = (
    "link",
    "link to a file",
    "pipe",
    "socket",
    "device",
    "folder",
    "below a file",
    "long name",
    "null byte",
    "no disk to write to",
)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_refused_and_stays(kind: str, tmp_path: Path) -> None:
    path = no_file(kind, tmp_path)
    before = sorted((p.name, p.lstat().st_mode) for p in tmp_path.iterdir())
    with pytest.raises(FileError):
        check_output(path)
    with pytest.raises(FileError):
        write_text(path, "new")
    assert sorted((p.name, p.lstat().st_mode) for p in tmp_path.iterdir()) == before
    if kind == "link to a file":
        assert (tmp_path / "elsewhere").read_text() == "kept"


def command(name: str, path: Path, plan: Path) -> list[str]:
    """A command that is to write `path`."""
    model = ["m", "--prompt", "a", "--out", str(path)]
    return {
        "inspect": ["inspect", str(plan), "--html", str(path)],
        "raise": ["inspect", str(plan), "--validate", "m", "--raise", str(path)],
        "calibrate": ["calibrate", *model],
        "tune": ["tune", *model],
        "compare": ["compare", "m", str(plan), "--prompt", "a", "--out", str(path)],
        "demo": ["demo", "--out", str(path)],
    }[name]


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "null byte"])
@pytest.mark.parametrize("name", ["inspect", "raise", "calibrate", "tune", "compare", "demo"])
def test_every_command_refuses_it_before_it_works(
    name: str, kind: str, tmp_path: Path, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = no_file(kind, tmp_path)
    if name in ("tune", "compare", "demo"):
        if kind == "folder":
            (path / "index.html").mkdir()
            (path / "front.png").mkdir()
        elif kind == "link":
            path.unlink()
            path.symlink_to(plan_file)
    with (
        mock.patch("calibatt_compiler.cli.pipelines.load_pipeline", side_effect=AssertionError),
        mock.patch("calibatt_compiler.report.inspect.terminal", side_effect=AssertionError),
    ):
        assert run(command(name, path, plan_file)) == 2
    said = capsys.readouterr()
    assert path.name in said.err
    assert "Traceback" not in said.err
    assert "remedy:" in said.err


@pytest.mark.parametrize("name", ["inspect", "raise", "prompts", "both"])
@pytest.mark.parametrize("way", ["same", "dots", "hard link", "parent link"])
def test_inputs_are_not_written_over(
    name: str, way: str, tmp_path: Path, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = plan_file.read_bytes()
    given = plan_file
    if way == "dots":
        (tmp_path / "sub").mkdir()
        given = tmp_path / "sub" / ".." / plan_file.name
    elif way == "hard link":
        given = tmp_path / "other"
        given.hardlink_to(plan_file)
    elif way == "parent link":
        (tmp_path / "folder").symlink_to(tmp_path)
        given = tmp_path / "folder" / plan_file.name
    arguments = {
        "inspect": ["inspect", plan_file, "--html", given],
        "raise": ["inspect", plan_file, "--validate", "m", "--raise", given],
        "prompts": ["calibrate", "m", "--prompts", plan_file, "--out", given],
        "both": [
            "inspect",
            tmp_path / "p",
            "--validate",
            "m",
            "--html",
            plan_file,
            "--raise",
            given,
        ],
    }[name]
    assert run([str(argument) for argument in arguments]) == 2
    assert plan_file.read_bytes() == before
    assert "over what is read" in capsys.readouterr().err


def test_outputs_of_compare_are_not_its_plans(tmp_path: Path, plan_file: Path) -> None:
    shutil.copy(plan_file, tmp_path / "index.html")
    plan = str(tmp_path / "index.html")
    assert run(["compare", "m", plan, "--prompt", "a", "--out", str(tmp_path)]) == 2


def test_a_path_that_can_be_written_passes_and_leaves_no_trace(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "folder" / "file", size=10)
    check_folder(tmp_path / "new", ["a", "b"])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old").write_text("old")
    check_output(tmp_path / "old", inputs=[None, tmp_path / "missing", tmp_path])
    assert (tmp_path / "old").read_text() == "old"


def test_no_room_is_found_beforehand(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    for check in (check_output, files.check_space):
        with pytest.raises(FileError, match=r"(?s)no room.*bytes free.*make room"):
            check(tmp_path / "new" / "file", size=2 * free)
    with pytest.raises(FileError, match="no room"), replacing(tmp_path / "x", size=2 * free):
        raise AssertionError
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_write_access_is_refused(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(FileError, match="owner"):
        check_output(tmp_path / "closed" / "file")


def test_long_names_that_are_possible_are_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "狐" * 85, f"{'x' * 200}.{'y' * 54}"):
        write_text(tmp_path / name, "whole")
        assert (tmp_path / name).read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 3


def test_errors_name_the_file_and_are_both_kinds(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="target") as caught, naming(tmp_path / "target"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert isinstance(caught.value, CalibattError)
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == errno.ENOSPC
    assert str(caught.value).splitlines()[1:] == [
        "  got:      No space left on device",
        "  remedy:   make room, or choose a path on another disk",
    ]
    for error in (ValueError("other"), KeyError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)), naming(tmp_path):
            raise error


LIMIT = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
"""
WRITERS = {
    "plan": "import torch\nfrom calibatt_compiler.plan import Plan\n"
    "m = {'a': torch.rand(9, 2, 64, 64) < 0.5}\nm['a'][..., 0] = True\n"
    "p = Plan.from_masks(m, (1, 32, 32), list(range(9)), (16, 16))\n@p.save(sys.argv[1])",
    "page": "import torch\nfrom calibatt_compiler.plan import Plan\n"
    "from calibatt_compiler.report.plan_page import write_page\n"
    "m = {'a': torch.ones(9, 2, 64, 64).bool()}\n"
    "p = Plan.from_masks(m, (1, 32, 32), list(range(9)), (16, 16))\n@write_page(p, sys.argv[1])",
    "text": "from calibatt_compiler.files import write_text\n@write_text(sys.argv[1], 'x' * 10**6)",
    "video": "import numpy as np\nfrom calibatt_compiler.evaluation.video import write_video\n"
    "f = np.random.randint(0, 255, (40, 64, 64, 3), np.uint8)\n@write_video(sys.argv[1], f, 8)",
    "picture": "from matplotlib.figure import Figure\n"
    "from calibatt_compiler.files import replacing\n"
    "f = Figure()\nf.add_subplot()\n@save(f)",
    "energies": "import numpy as np\nfrom pathlib import Path\n"
    "from calibatt_compiler.calibration.store.energies import EnergyBuffer\n"
    "s = EnergyBuffer(Path(sys.argv[1]))\n@s.keep(np.ones((1, 2, 512, 512), np.float32))",
    "more energies": "import numpy as np\nfrom pathlib import Path\n"
    "from calibatt_compiler.calibration.store.energies import EnergyBuffer\n"
    "s = EnergyBuffer(Path(sys.argv[1]))\n@s.put('a', 0, np.ones((1, 2, 512, 512), np.float32))",
    "record": "import numpy as np\nfrom pathlib import Path\n"
    "from calibatt_compiler.files import replacing\nfrom safetensors.numpy import save_file\n"
    "@record()",
}
HELPERS = """
def save(figure):
    with replacing(sys.argv[1]) as path:
        figure.savefig(path)
def record():
    with replacing(sys.argv[1]) as path:
        save_file({"a": np.ones(10**6, np.uint8)}, path)
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", WRITERS)
def test_a_file_that_can_t_be_finished_is_an_error_of_ours(what: str, tmp_path: Path) -> None:
    """The system refuses bytes past a limit, as it does on a full disk."""
    path = tmp_path / {"video": "a.mp4", "picture": "a.png"}.get(what, "a")
    before, _, last = WRITERS[what].partition("@")
    script = (
        f"import sys\n{before}{HELPERS}{LIMIT}"
        "from calibatt_compiler.errors import FileError\n"
        f"try:\n    {last}\nexcept FileError as error:\n    print(error)\n    sys.exit(7)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path), "3000"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7, done.stderr
    assert str(path) in done.stdout
    assert [p for p in tmp_path.iterdir() if p.is_file()] == []


def test_energies_on_a_full_disk_do_not_end_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(FileError, match="No space left"):
        EnergyBuffer(tmp_path / "spool").keep(np.ones((1, 2, 3, 4), np.float32))


def test_failures_of_the_system_end_a_command_with_a_message(
    plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for error in (OSError(errno.EIO, "Input/output error", "some[/]file"), OSError("odd")):
        with mock.patch("calibatt_compiler.report.inspect.terminal", side_effect=error):
            assert run(["inspect", str(plan_file)]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert ("some[/]file: Input/output error" in said) or ("a file: odd" in said)


def test_permissions_follow_the_mask(tmp_path: Path) -> None:
    for mask in (0o022, 0o077, 0o002):
        before = os.umask(mask)
        try:
            assert files.umask() == mask
            write_text(tmp_path / "x", "")
            assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~mask
        finally:
            os.umask(before)


def test_what_a_killed_process_left_is_swept_by_the_next_writer(tmp_path: Path) -> None:
    """A day later, and nothing else is."""
    path = tmp_path / "p.calibatt"
    program = (
        "import os, sys; from calibatt_compiler.files import replacing\n"
        "with replacing(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -9
    (left,) = tmp_path.iterdir()
    write_text(path, "whole")
    assert left.exists(), "another process may be writing it"
    others = [".p-short.tmp.calibatt", ".p-q-abcd_fgh.tmp.calibatt", ".p-abcd_fgh.calibatt",
              ".q-abcd_fgh.tmp.calibatt", "p-abcd_fgh.tmp.calibatt"]  # fmt: skip
    for name in others:
        (tmp_path / name).write_text("kept")
    (tmp_path / ".p-abcd_fgh.tmp.calibatt").mkdir()
    for file in tmp_path.iterdir():
        os.utime(file, (0, 0))
    write_text(path, "whole")
    assert {file.name for file in tmp_path.iterdir()} == {
        *others, ".p-abcd_fgh.tmp.calibatt", path.name
    }  # fmt: skip
