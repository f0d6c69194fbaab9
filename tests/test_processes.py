"""Processes that are started run nothing that happens to lie in the current folder."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from calibatt_compiler.kernels.baked.compiler import KernelCompiler, KernelSpec
from calibatt_compiler.plan import BlockPattern

ROOT = Path(__file__).parent.parent
PLANTED = ("numpy", "torch", "triton", "json", "typing", "calibatt_compiler", "sitecustomize")


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with modules that leave a mark when they are run; returns the mark."""
    folder, mark = tmp_path / "here", tmp_path / "ran"
    for name in PLANTED:
        (folder / name).mkdir(parents=True)
        code = f"open({str(mark)!r}, 'a').write({name!r})\nraise ImportError('planted')\n"
        (folder / name / "__init__.py").write_text(code)
    monkeypatch.setenv("CALIBATT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(folder)
    return mark


@pytest.mark.slow
@pytest.mark.parametrize("first", [(), ("",)])
def test_the_compiling_process_leaves_the_current_folder_alone(
    planted: Path, monkeypatch: pytest.MonkeyPatch, first: tuple[str, ...]
) -> None:
    monkeypatch.setattr(sys, "path", [*first, *sys.path])
    pattern = BlockPattern.from_mask(torch.eye(4, dtype=torch.bool)[None])
    with KernelCompiler(workers=1) as pool:
        report = pool.build([KernelSpec(pattern, torch.bfloat16, 64, 80)])
    assert not planted.exists()
    assert len(report.compiled) == 1, report.failed


@pytest.mark.slow
def test_the_command_as_a_module_leaves_the_current_folder_alone(planted: Path) -> None:
    # What `-m` itself looks for before the package is reached is Python's own affair.
    for name in ("calibatt_compiler", "typing", "sitecustomize"):
        (Path(name) / "__init__.py").unlink()
        Path(name).rmdir()
    done = subprocess.run(
        [sys.executable, "-m", "calibatt_compiler", "inspect", "missing"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert not planted.exists()
    assert done.returncode == 2
    assert "there is no plan file" in done.stderr


def test_every_start_of_a_module_is_on_a_safe_path() -> None:
    """`-m` puts the current folder first unless `-P` stands before it."""
    for folder in ("calibatt_compiler", "passes", "kernels", "examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.List | ast.Tuple):
                    words = [item.value for item in node.elts if isinstance(item, ast.Constant)]
                    assert "-m" not in words or "-P" in words, f"{path}:{node.lineno}"
