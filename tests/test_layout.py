"""The shape of the repository: two linked folders, and who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "calibatt_compiler"
LEAVES = {
    "plan",
    "errors",
    "options",
    "debug",
    "files",
    "capture",
    "version",
    "printable",
    "arguments",
}
CODE_LOADERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}

# Passes share helpers, which rewrite nothing; only the list of passes imports the passes.
PASS_HELPERS = {"graph", "rewrite", "token_axis", "token_flow", "token_places", "token_rules"}
PASS_LIST = "pipeline"

# The reference defines what is right: it must not lean on what it is compared with.
REFERENCE_MAY_IMPORT = {"operands", "pooling"}


def modules() -> dict[str, Path]:
    """All modules of the package by dotted name below `calibatt_compiler`, the links followed."""
    found = {}
    for folder in (PACKAGE, PACKAGE / "passes", PACKAGE / "kernels"):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(PACKAGE).with_suffix("").parts
            found[".".join(parts).removesuffix("__init__").rstrip(".")] = path
    return found


MODULES = modules()
KERNELS = sorted(name for name in MODULES if name.startswith("kernels."))
PASSES = sorted(name for name in MODULES if name.startswith("passes."))


def imports(path: Path, *, only_at_import: bool = False) -> Iterator[str]:
    """Dotted names that a file imports; with `only_at_import` those that importing it imports."""
    yield from _imports(ast.parse(path.read_text("utf-8")), only_at_import)


def _imports(node: ast.AST, only_at_import: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative imports hide who imports whom"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif not only_at_import:
            yield from _imports(child, only_at_import)
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            yield from _imports(ast.Module(child.orelse, []), only_at_import)
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _imports(child, only_at_import)


def ours(path: Path) -> set[str]:
    """Names below `calibatt_compiler` that a file imports."""
    prefix = "calibatt_compiler."
    return {name.removeprefix(prefix) for name in imports(path) if name.startswith(prefix)}


def uses(names: Iterator[str] | set[str], *packages: str) -> list[str]:
    """Those names that are of one of the packages."""
    return [name for name in names if any(f"{name}.".startswith(f"{p}.") for p in packages)]


def test_the_walk_sees_what_it_should(tmp_path: Path):
    path = tmp_path / "m.py"
    path.write_text(
        "import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import e\nelse:\n    import f\n"
        "try:\n    import g\nexcept E:\n    pass\nclass C:\n    import h\n    def m(self):\n"
        "        import i\n"
    )
    assert list(imports(path)) == ["a.b", "c.d", "e", "f", "g", "h", "i"]
    assert list(imports(path, only_at_import=True)) == ["a.b", "c.d", "f", "g", "h"]
    assert uses(iter(["a", "a.b", "ab"]), "a") == ["a", "a.b"]


@pytest.mark.parametrize("name", ["passes", "kernels"])
def test_links_and_folders(name: str):
    link = PACKAGE / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert link.resolve() == ROOT / name
    assert any(link.glob("*.py"))
    assert not (ROOT / name / "__init__.py").exists(), "it would shadow packages of that name"


def test_no_package_of_tests():
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not (ROOT / "conftest.py").exists()


def test_typing_marker_is_there():
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_module(name: str):
    path = MODULES[name]
    text = path.read_text("utf-8")
    assert text.count("\n") <= 500, "is it one thing?"
    imported = set(imports(path))
    assert not uses(imported, "passes", "kernels"), "two names would make two module objects"
    assert not uses(imported, *CODE_LOADERS)
    calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)}
    assert not calls & {"torch.load", "torch.save", "eval"}
    at_import = uses(set(imports(path, only_at_import=True)), "triton")
    defines = "@triton.jit" in text or "@gluon.jit" in text
    assert not at_import or defines, "triton is imported where kernels are defined"
    heavy = {"diffusers", "transformers", "matplotlib", "av", "PIL", "optuna"}
    assert not uses(set(imports(path, only_at_import=True)), *heavy), "import it where it is used"


@pytest.mark.parametrize("name", sorted(m for m in MODULES if m.split(".")[0] in LEAVES))
def test_leaves_import_leaves_only(name: str):
    assert {imported.split(".")[0] for imported in ours(MODULES[name])} <= LEAVES


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_know_no_graph(name: str):
    path = MODULES[name]
    assert not uses(set(imports(path)), "torch.fx", "torch._dynamo")
    assert {imported.split(".")[0] for imported in ours(path)} <= LEAVES | {"kernels"}


@pytest.mark.parametrize("name", PASSES)
def test_passes_know_no_kernel_and_no_other_pass(name: str):
    path = MODULES[name]
    assert not uses(set(imports(path)), "triton")
    imported = ours(path)
    assert not uses(imported, "backend", "cli", "kernels", "calibration", "report")
    siblings = {other.split(".")[1] for other in uses(imported, "passes")}
    if name != f"passes.{PASS_LIST}":
        assert siblings <= PASS_HELPERS


def test_reference_and_fast_kernels_are_strangers():
    siblings = {
        other.split(".")[1] for other in uses(ours(MODULES["kernels.reference"]), "kernels")
    }
    assert siblings <= REFERENCE_MAY_IMPORT
    for name in KERNELS:
        text = MODULES[name].read_text("utf-8")
        if "@triton.jit" in text or "@gluon.jit" in text or "flex_attention" in text:
            assert not uses(ours(MODULES[name]), "kernels.reference"), name


def test_importing_the_package_is_light():
    """It needs neither triton nor diffusers nor what only pictures and videos need."""
    heavy = ["triton", "diffusers", "transformers", "matplotlib", "av", "PIL", "optuna"]
    code = (
        "import sys, torch\nbefore = set(sys.modules)\nimport calibatt_compiler\n"
        "import calibatt_compiler.plan\ncalibatt_compiler.Plan\n"
        f"print([m for m in {heavy!r} if m in sys.modules and m not in before])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
