"""The table and the page of a plan."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from calibatt_compiler.plan import (
    AnchorRows,
    BlockPattern,
    Plan,
    SitePatterns,
    merge_intervals,
    share_steps,
)
from calibatt_compiler.report import inspect, plan_page


def random_plan(
    *, layers: int = 2, steps: int = 3, heads: int = 2, blocks: int = 5, name: str = "blocks"
) -> Plan:
    """A plan of random masks with the diagonal kept; two steps share one mask."""
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for layer in range(layers):
        mask = torch.rand(steps, heads, blocks, blocks, generator=generator) < 0.3
        mask |= torch.eye(blocks, dtype=torch.bool)
        mask[-1] = mask[-2]
        masks[f"{name}.{layer}.attn1"] = mask
    timesteps = [1000.0 - 100 * step / steps for step in range(steps)]
    return Plan.from_masks(masks, (1, blocks, 16), timesteps, (16, 16))


class Page(HTMLParser):
    """Checks that elements close in order, and collects addresses and the masks."""

    VOID = frozenset({"meta", "img", "input", "br", "link", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.cells: list[dict[str, str | None]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        values = dict(attrs)
        self.addresses += [str(values[key]) for key in ("src", "href") if key in values]
        if values.get("class") == "cell":
            self.cells.append(values)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def masks_of(text: str) -> dict:
    """What the page's script draws from."""
    found = re.search(r'<script type="application/json" id="masks">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])


def test_terminal_table_fits_a_terminal():
    console = Console(width=80, file=io.StringIO())
    plan = random_plan()
    console.print(inspect.terminal(plan))
    text = console.file.getvalue()
    assert "blocks.0.attn1" in text
    assert "blocks.1.attn1" in text
    assert f"{plan.density():.3f}" in text
    assert f"{plan.density('blocks.1.attn1'):.3f}" in text
    assert plan.digest[:12] in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_repetitive_heads_are_shown(tmp_path: Path):
    plain = random_plan()
    copies = AnchorRows(plain.grid, 2)
    sites = {}
    for name, flags in (("blocks.0.attn1", (False, True)), ("blocks.1.attn1", (False, False))):
        by_step = [
            BlockPattern.from_mask(
                plain.block_mask(name, step),
                block=(16, 16),
                repetitive=np.array(flags) & (step > 0),
                copies=copies,
            )
            for step in range(3)
        ]
        sites[name] = SitePatterns.share(by_step)
    plan = plain.with_sites(sites, thresholds={}, quality={})
    shown = dict(inspect.facts(plan))["row-shared heads"]
    assert shown == "16.7%, mean over the steps; compute 2 of the 5 rows of a frame"
    console = Console(width=80, file=io.StringIO())
    console.print(inspect.terminal(plan))
    text = console.file.getvalue()
    assert max(len(line) for line in text.splitlines()) <= 80
    assert re.search(r"blocks\.0\.attn1 +2 +33%", text)
    assert re.search(r"blocks\.1\.attn1 +2 +0%", text)
    assert "heads that copy rows" in " ".join(text.split())
    page = plan_page.write_page(plan, tmp_path / "plan.html").read_text("utf-8")
    Page(page)
    drawn = masks_of(page)["sites"]
    by_step = [drawn["blocks.0.attn1"]["sets"][i] for i in drawn["blocks.0.attn1"]["set"]]
    assert [step["copying"] for step in by_step] == [[], [1], [1]]
    assert "only the queries of its anchor rows" in page


def test_nothing_is_said_of_copies_where_there_are_none(tmp_path: Path):
    console = Console(width=80, file=io.StringIO())
    console.print(inspect.terminal(random_plan()))
    assert "cop" not in console.file.getvalue()
    assert "row-shared heads" not in dict(inspect.facts(random_plan()))
    page = plan_page.write_page(random_plan(), tmp_path / "plan.html").read_text("utf-8")
    assert "anchor rows" not in page


def test_density_that_was_added_is_shown():
    plan = merge_intervals(share_steps(random_plan(blocks=12), 0.3), 0.05)
    quality = plan.metadata.quality
    assert all(quality.values())
    shown = dict(inspect.facts(plan))["density added"]
    assert shown == (
        f"{quality['share_steps_added_density']:.4f} by sharing steps, "
        f"{quality['merge_added_density']:.4f} by merging intervals"
    )
    assert "measured" not in dict(inspect.facts(plan))
    assert "density added" not in dict(inspect.facts(random_plan()))


def test_page_shows_every_mask_of_every_step(tmp_path: Path):
    plan = random_plan()
    path = plan_page.write_page(plan, tmp_path / "new" / "plan.html")
    text = path.read_text("utf-8")
    Page(text)
    data = masks_of(text)
    assert data["steps"] == [0, 1, 2]
    for name in plan.sites:
        site = data["sites"][name]
        assert len(site["sets"]) == 2, "the shared mask is stored once"
        for step in range(plan.steps):
            drawn = site["sets"][site["set"][step]]
            expected = plan.block_mask(name, step).numpy()
            for head, png in enumerate(drawn["png"]):
                image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
                assert ((np.asarray(image)[..., 3] > 0) == expected[head]).all()
                assert drawn["density"][head] == pytest.approx(expected[head].mean(), abs=1e-4)


def test_page_loads_nothing(tmp_path: Path):
    text = plan_page.write_page(random_plan(), tmp_path / "plan.html").read_text("utf-8")
    assert not [a for a in Page(text).addresses if not a.startswith("data:")]
    assert "http" not in text
    assert "@import" not in text


def test_heat_map_has_a_cell_for_each_layer_and_step(tmp_path: Path):
    plan = random_plan(layers=3, steps=4)
    page = Page(plan_page.write_page(plan, tmp_path / "plan.html").read_text("utf-8"))
    by_place = {
        (cell["data-row"], int(cell["data-column"] or 0)): float(cell["fill-opacity"] or 0)
        for cell in page.cells[: 3 * 4]
    }
    assert by_place == {
        (name, step): pytest.approx(plan.density(name, step), abs=6e-4)
        for name in plan.sites
        for step in range(4)
    }


def test_names_are_escaped(tmp_path: Path):
    plan = random_plan(name="</script><b>&")
    text = plan_page.write_page(plan, tmp_path / "plan.html", title="<i>").read_text("utf-8")
    Page(text)
    assert "<b>&" not in text
    assert "</script><b>&.0.attn1" in masks_of(text)["sites"]


def test_large_plans_show_fewer_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    plan = random_plan(layers=2, steps=10, heads=2, blocks=7)
    monkeypatch.setattr(plan_page, "PIXEL_BUDGET", 4 * 2 * 2 * 7 * 7)
    assert plan_page.shown_steps(plan) == [0, 3, 6, 9]
    text = plan_page.write_page(plan, tmp_path / "plan.html").read_text("utf-8")
    assert "Shown at 4 of 10 steps" in text
    monkeypatch.setattr(plan_page, "PIXEL_BUDGET", 1)
    assert plan_page.shown_steps(plan) == [5]


def test_head_density():
    pattern = random_plan().sites["blocks.0.attn1"].at(0)
    expected = pattern.numpy_mask().mean((1, 2))
    assert inspect.head_density(pattern) == pytest.approx(expected)


def test_sparkline():
    assert inspect.sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert len(inspect.sparkline([0.3] * 50)) == 8


def zone_plan() -> Plan:
    """Two sites of zones in two step groups."""
    row, column = torch.arange(6)[:, None], torch.arange(6)
    maps = torch.stack([(row - column).abs(), (row - column).abs() // 2])[:, None].repeat(
        1, 2, 1, 1
    )
    maps[1, 1] = column.expand(6, 6)
    timesteps = [1000.0 - 100 * step for step in range(5)]
    return Plan.from_zones({f"<{i}>": maps for i in range(2)}, (1, 6, 16), timesteps, (16, 16))


def test_zones_are_told_in_facts_table_and_json():
    plan = zone_plan()
    facts = dict(inspect.facts(plan))
    assert facts["zones"].startswith("2 step groups, each step draws its own sample")
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(inspect.terminal(plan))
    assert " zones " in console.export_text()
    for site in plan.sites.values():
        by_step = [inspect.head_density(site.at(step)) for step in range(plan.steps)]
        assert np.allclose(inspect.heads_density(site), np.mean(by_step, axis=0))
    sites = json.loads(json.dumps(inspect.to_dict(plan)))["sites"]
    for found, site in zip(sites, plan.sites.values(), strict=True):
        assert site.zones is not None
        for group, zones in zip(found["step_groups"], site.zones.zones, strict=True):
            octaves = zones.map_octaves()
            for head, shares in enumerate(group["octaves"]):
                assert shares == [round(float((octaves[head] == k).mean()), 6) for k in range(8)]
            assert group["density"] == zones.density
            assert group["numbers"] == zones.numbers.tolist()
    assert "step_groups" not in inspect.to_dict(random_plan())["sites"][0]


def test_a_page_shows_octaves_and_what_a_step_draws(tmp_path: Path):
    plan = zone_plan()
    text = plan_page.write_page(plan, tmp_path / "plan.html").read_text("utf-8")
    Page(text)
    assert "what the step draws" in text
    found = re.search(r'id="masks">(.*?)</script>', text, re.S)
    assert found is not None
    data = json.loads(found.group(1))
    for name, site in data["sites"].items():
        zones = plan.sites[name].zones
        assert zones is not None
        assert site["group"] == [0, 0, 0, 1, 1]
        for step, index in enumerate(site["set"]):
            octaves = zones.zones[zones.groups[step]].map_octaves()
            for head in range(2):
                mask = pixels(site["sets"][index]["png"][head])
                assert ((mask > 127) == plan.block_mask(name, step)[head].numpy()).all()
                shown = pixels(site["octaves"][site["group"][index]][head])
                assert np.abs(shown / 255 - (1 - octaves[head] / 8)).max() < 0.04
    assert "what the step draws" not in plan_page.write_page(
        random_plan(), tmp_path / "masks.html"
    ).read_text("utf-8")


def pixels(png: str) -> np.ndarray:
    """Opacity of a picture, uint8 (height, width)."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
    return np.asarray(picture)[..., 3].astype(np.int64)
