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
CODE_LOADERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


# Whom everybody may import, and who import only one another.
LEAVES = {"arguments", "errors", "files", "logs", "printable", "version"}

# Folders that are one room with those below them: what lies there is of use to nobody else.
WHOLE = ("plan", "calibration.select")

# Every other import between rooms that is allowed. A room is a folder, or a file of a folder that
# has folders below it. An edge that is missing here is a question: does data still flow one way,
# plan -> passes -> kernels -> Inductor? An edge that nobody needs any more is removed.
EDGES: dict[str, str] = {
    "": "api calibration plan report",
    "__main__": "cli",
    "api": "binding model options plan",
    "backend": "binding capture model options passes.pipeline passes.rewrite report runtime",
    "binding": "capture kernels.request model options passes.graph passes.rewrite plan runtime",
    "build": "kernels.baked kernels.dispatch kernels.request plan",
    "calibration": (
        "calibration.config calibration.cost calibration.order_search calibration.pipeline "
        "calibration.run calibration.select calibration.tuning calibration.validation plan"
    ),
    "calibration.config": "calibration.zone_target plan",
    "calibration.cost": (
        "calibration.config calibration.observe calibration.order_search calibration.pipeline "
        "calibration.select calibration.store kernels.common kernels.energy model plan"
    ),
    "calibration.observe": (
        "backend calibration.config calibration.select calibration.store capture kernels.common "
        "kernels.energy model plan runtime"
    ),
    "calibration.order_search": (
        "calibration.config calibration.observe calibration.progress calibration.select "
        "calibration.store kernels.attention kernels.common kernels.energy model plan runtime"
    ),
    "calibration.pipeline": (
        "calibration.config calibration.observe calibration.order_search calibration.progress "
        "calibration.run calibration.store model plan"
    ),
    "calibration.progress": "terminal",
    "calibration.run": (
        "calibration.config calibration.observe calibration.order_search calibration.select "
        "calibration.store model plan"
    ),
    "calibration.select": (
        "calibration.config calibration.store calibration.zone_target kernels.attention "
        "kernels.common plan runtime"
    ),
    "calibration.store": "calibration.config model plan",
    "calibration.tuning": (
        "backend calibration.config calibration.cost calibration.observe calibration.pipeline "
        "calibration.select calibration.store calibration.validation capture evaluation "
        "kernels.common kernels.request model plan runtime"
    ),
    "calibration.validation": (
        "calibration.config calibration.observe calibration.progress calibration.select "
        "calibration.store model plan"
    ),
    "capture": "kernels.common plan",
    "cli": "cli.app",
    "cli.app": (
        "cli.build cli.calibrate cli.compare cli.demo cli.env cli.inspect cli.interruption "
        "cli.tune terminal"
    ),
    "cli.build": (
        "build cli.options cli.pipelines cli.progress kernels.baked kernels.portable plan terminal"
    ),
    "cli.calibrate": (
        "calibration calibration.pipeline calibration.store cli.groups cli.interruption "
        "cli.options cli.ranks cli.tables evaluation report terminal"
    ),
    "cli.compare": (
        "cli.groups cli.interruption cli.options cli.progress evaluation options plan terminal"
    ),
    "cli.demo": (
        "calibration cli.compare cli.groups cli.options cli.pipelines cli.progress evaluation "
        "plan report"
    ),
    "cli.env": "evaluation kernels.hopper options terminal",
    "cli.inspect": "cli.groups cli.options cli.tables cli.validation plan report terminal",
    "cli.options": "cli.groups cli.pipelines evaluation plan",
    "cli.pipelines": "evaluation plan",
    "cli.progress": "terminal",
    "cli.tables": "calibration.cost calibration.tuning calibration.validation",
    "cli.tune": (
        "calibration calibration.store calibration.tuning cli.groups cli.interruption "
        "cli.options cli.progress cli.tables terminal"
    ),
    "cli.validation": "calibration calibration.validation cli.options plan",
    "debug": "options",
    "evaluation": "build kernels.portable options plan report",
    "kernels.attention": (
        "kernels.baked kernels.cpu kernels.dispatch kernels.hopper kernels.portable "
        "kernels.protocol kernels.reference kernels.request kernels.tiered plan"
    ),
    "kernels.baked": (
        "kernels.common kernels.hopper kernels.portable kernels.protocol kernels.request "
        "kernels.tiered options plan"
    ),
    "kernels.common": "kernels.request plan",
    "kernels.cpu": "kernels.common plan",
    "kernels.dispatch": "kernels.hopper kernels.portable kernels.request plan",
    "kernels.energy": "kernels.common kernels.cpu kernels.dispatch kernels.hopper kernels.portable",
    "kernels.gradients": "kernels.common plan",
    "kernels.hopper": "kernels.common kernels.portable kernels.request kernels.tiered plan",
    "kernels.portable": "kernels.common kernels.request plan",
    "kernels.protocol": "kernels.common",
    "kernels.reference": "kernels.common plan",
    "kernels.request": "options plan",
    "kernels.tiered": "kernels.common kernels.protocol plan",
    "kernels.zones": (
        "kernels.baked kernels.common kernels.cpu kernels.dispatch kernels.hopper "
        "kernels.portable kernels.reference kernels.request kernels.tiered plan"
    ),
    "model": "passes.graph plan",
    "options": "plan",
    "passes.bind_sites": "capture passes.rewrite",
    "passes.find_sites": "capture passes.graph passes.masks passes.rewrite passes.writes",
    "passes.find_timestep": "passes.graph passes.rewrite",
    "passes.lower_attention": "passes.graph passes.masks passes.rewrite",
    "passes.masks": "passes.graph passes.writes",
    "passes.pipeline": (
        "debug model passes.bind_sites passes.find_sites passes.find_timestep "
        "passes.lower_attention passes.rewrite passes.token_order runtime"
    ),
    "passes.rewrite": "capture model passes.graph plan",
    "passes.token_order": "passes.graph passes.rewrite passes.writes",
    "passes.writes": "passes.graph",
    "report": "binding model plan runtime",
    "runtime": (
        "capture kernels.attention kernels.common kernels.dispatch kernels.gradients "
        "kernels.protocol kernels.request kernels.zones options plan"
    ),
}

PASS_LIST = "passes.pipeline"
PASS_HELPERS = {"passes.graph", "passes.masks", "passes.rewrite", "passes.writes"}

# The reference defines what is right: it must not lean on what it is compared with.
REFERENCE_MAY_IMPORT = {
    "kernels.common.operands",
    "kernels.common.padding",
    "kernels.common.pooling",
    "kernels.common.zone_step",
}

# What a user waits for, or may not have: a function may import what stands on one of these.
HEAVY = {"triton", "diffusers", "transformers", "matplotlib", "av", "PIL", "optuna", "rich"}


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
    assert any(link.glob("*/*.py"))
    assert not list((ROOT / name).rglob("__init__.py")), "it would shadow packages of that name"


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
    heavy = HEAVY - {"triton", "rich"}
    assert not uses(set(imports(path, only_at_import=True)), *heavy), "import it where it is used"


def target(name: str) -> str:
    """The module of ours behind an imported name, which may be that of a thing within it."""
    return name if name in MODULES else name.rpartition(".")[0]


def room(module: str) -> str:
    """The folder of a module; a module of its own where folders lie beside it."""
    if whole := next((name for name in WHOLE if f"{module}.".startswith(f"{name}.")), None):
        return whole
    folder = module.rpartition(".")[0]
    if not folder or any(
        other.startswith(f"{folder}.") and other.count(".") > module.count(".") for other in MODULES
    ):
        return module
    return folder


def edges() -> dict[str, set[str]]:
    """Rooms by room that imports them."""
    found: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        for name in ours(path):
            if room(module) != room(target(name)) and target(name) not in LEAVES:
                found.setdefault(room(module), set()).add(room(target(name)))
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return a circle of a graph, or an empty list."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return path[path.index(node) :]
        if node in done:
            return []
        found = next((c for n in sorted(graph.get(node, ())) if (c := visit(n, [*path, node]))), [])
        done.add(node)
        return found

    return next((c for node in sorted(graph) if (c := visit(node, []))), [])


def test_rooms_import_whom_they_may():
    allowed = {name: set(rooms.split()) for name, rooms in EDGES.items()}
    found = edges()
    assert {name: rooms - allowed.get(name, set()) for name, rooms in found.items()} == {
        name: set() for name in found
    }
    unused = {name: rooms - found.get(name, set()) for name, rooms in allowed.items()}
    assert not any(unused.values()), f"edges that nobody needs: {unused}"


@pytest.mark.parametrize("name", sorted(LEAVES))
def test_leaves_import_leaves_only(name: str):
    assert {target(each) for each in ours(MODULES[name])} <= LEAVES


def test_no_circles():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert not circle(edges())
    assert not circle({m: {target(n) for n in ours(p)} - {m} for m, p in MODULES.items()})


def weight(module: str, seen: set[str]) -> set[str]:
    """Heavy packages that importing a module of ours imports, by others of ours too."""
    if module in seen or module not in MODULES:
        return set()
    seen.add(module)
    names = set(imports(MODULES[module], only_at_import=True))
    found = {name.split(".")[0] for name in names} & HEAVY
    prefix = "calibatt_compiler."
    for name in names:
        if name.startswith(prefix):
            found |= weight(target(name.removeprefix(prefix)), seen)
    return found


@pytest.mark.parametrize("name", sorted(MODULES))
def test_functions_import_ours_only_for_weight(name: str):
    """In the command line torch counts as heavy: `--help` need not wait for it."""
    if name.split(".", maxsplit=1)[0] == "cli":
        return
    late = (
        ours(MODULES[name])
        - {
            each.removeprefix("calibatt_compiler.")
            for each in imports(MODULES[name], only_at_import=True)
        }
        - typing_only(MODULES[name])
    )
    assert not {each for each in late if not weight(target(each), set())}


def typing_only(path: Path) -> set[str]:
    """Names below `calibatt_compiler` that a file imports for the type checker."""
    blocks = [
        node
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
    ]
    names = {name for block in blocks for name in _imports(block, False)}
    return {name.removeprefix("calibatt_compiler.") for name in names}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_know_no_graph(name: str):
    assert not uses(set(imports(MODULES[name])), "torch.fx", "torch._dynamo")


@pytest.mark.parametrize("name", PASSES)
def test_passes_know_no_kernel_and_no_other_pass(name: str):
    assert not uses(set(imports(MODULES[name])), "triton")
    siblings = {target(other) for other in uses(ours(MODULES[name]), "passes")}
    if name != PASS_LIST:
        own = {other for other in siblings if room(other) == room(name)}
        assert siblings - own <= PASS_HELPERS


def test_reference_and_fast_kernels_are_strangers():
    reference = {name for name in KERNELS if name.startswith("kernels.reference.")}
    for name in reference:
        siblings = {target(other) for other in uses(ours(MODULES[name]), "kernels")}
        assert siblings - reference <= REFERENCE_MAY_IMPORT
    for name in KERNELS:
        text = MODULES[name].read_text("utf-8")
        if "@triton.jit" in text or "@gluon.jit" in text or "flex_attention" in text:
            assert not uses(ours(MODULES[name]), "kernels.reference"), name


def test_importing_the_package_is_light():
    """It needs neither triton nor diffusers nor what only pictures and videos need."""
    heavy = sorted(HEAVY - {"rich"})
    code = (
        "import sys, torch\nbefore = set(sys.modules)\nimport calibatt_compiler\n"
        "import calibatt_compiler.plan\ncalibatt_compiler.Plan\n"
        f"print([m for m in {heavy!r} if m in sys.modules and m not in before])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
