"""What a built wheel and sdist hold, and what an installed package registers."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from email import message_from_bytes
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, "build_" + sys.argv[1])(sys.argv[2]))
"""


def sources() -> set[str]:
    """Files that belong in the package, by their name in it."""
    here = {
        path.relative_to(ROOT)
        for kind in ("py", "cpp")
        for path in ROOT.glob(f"calibatt_compiler/**/*.{kind}")
    }
    linked = {
        Path("calibatt_compiler") / path.relative_to(ROOT)
        for name in ("passes", "kernels")
        for path in (*ROOT.glob(f"{name}/**/*.py"), *ROOT.glob(f"{name}/**/*.cpp"))
    }
    return {path.as_posix() for path in here | linked} | {"calibatt_compiler/py.typed"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy what a build reads, links as links, so that building leaves no trace here."""
    target = tmp_path_factory.mktemp("checkout")
    names = ["pyproject.toml", "README.md", "LICENSE", "calibatt_compiler", "passes", "kernels"]
    subprocess.run(["cp", "-a", *(ROOT / name for name in names), target], check=True)
    return target


def build(checkout: Path, kind: str, out: Path) -> Path:
    """Build with the setuptools of this environment: nothing is downloaded."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, out],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.strip().splitlines()[-1]


def test_wheel_holds_the_whole_package(checkout: Path, tmp_path: Path):
    with zipfile.ZipFile(build(checkout, "wheel", tmp_path)) as wheel:
        names = set(wheel.namelist())
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = message_from_bytes(wheel.read(f"{info}/METADATA"))
        points = ConfigParser()
        points.read_string(wheel.read(f"{info}/entry_points.txt").decode())
        assert {name for name in names if not name.startswith(info)} == sources()
        assert f"{info}/licenses/LICENSE" in names
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "torch>=2.11" in metadata.get_all("Requires-Dist", [])
    assert points["torch_dynamo_backends"]["calibatt"] == "calibatt_compiler.backend:calibatt"
    assert points["console_scripts"]["calibatt"] == "calibatt_compiler.cli:main"


def test_sdist_holds_what_a_build_needs(checkout: Path, tmp_path: Path):
    with tarfile.open(build(checkout, "sdist", tmp_path)) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert names >= sources() | {"pyproject.toml", "README.md", "LICENSE"}


@pytest.mark.slow
def test_wheel_runs_from_elsewhere(checkout: Path, tmp_path: Path):
    """The links are folders in the wheel: it works without the checkout."""
    site = tmp_path / "site"
    with zipfile.ZipFile(build(checkout, "wheel", tmp_path)) as wheel:
        wheel.extractall(site)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import calibatt_compiler, calibatt_compiler.kernels.reference.attention\n"
        "import calibatt_compiler.passes.graph as graph\n"
        "print(graph.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == str(site / "calibatt_compiler" / "passes" / "graph.py")


def test_backend_is_registered():
    (point,) = entry_points(group="torch_dynamo_backends", name="calibatt")
    assert point.value == "calibatt_compiler.backend:calibatt"
    assert callable(point.load())
