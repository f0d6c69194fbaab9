"""Documents that are made from the code say what the code says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_picture_of_the_data_flow_is_that_of_the_code():
    spec = importlib.util.spec_from_file_location("dataflow", ROOT / "docs" / "dataflow.py")
    assert spec is not None
    assert spec.loader is not None
    dataflow = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dataflow)
    made = dataflow.draw()
    assert dataflow.PICTURE.read_text("utf-8") == made, "python docs/dataflow.py"
    for each in dataflow.PASSES:
        assert each.__name__.replace("_", " ") in made


def pages() -> list[Path]:
    """Documents of the repository, without those of environments and of examples' weights."""
    folders = ("docs", "benchmarks", "examples")
    found = [page for folder in folders for page in (ROOT / folder).rglob("*.md")]
    return [*ROOT.glob("*.md"), *found]


def anchors(page: Path) -> set[str]:
    """What a link may name in a page: its titles, as GitHub writes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.replace(" ", "-") for title in kept}


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" in link:
            continue
        name, _, title = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not title or title in anchors(target), link


def test_every_decision_is_in_the_index():
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text("utf-8")
    for page in sorted(folder.glob("0*.md")):
        number, title = re.match(r"# (\d+)\. (.*)\n", page.read_text("utf-8")).groups()
        assert page.name.startswith(f"{int(number):04d}-")
        assert f"| [{number}]({page.name}) | {title} |" in index
