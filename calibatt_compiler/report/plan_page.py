"""A plan as one HTML file: facts, heat maps, and each head's mask as a picture."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from calibatt_compiler.files import write_text
from calibatt_compiler.plan import BlockPattern, Plan
from calibatt_compiler.plan.zones import ZonePattern
from calibatt_compiler.plan.zones.drawing import OCTAVES
from calibatt_compiler.printable import escape, printable
from calibatt_compiler.report import page
from calibatt_compiler.report.inspect import facts, head_density, heads_density
from calibatt_compiler.report.pictures import data_uri, mask_png

PICTURE_LIMIT = 96
"""Most pixels a side of one head's mask."""

PIXEL_BUDGET = 48_000_000
"""Most mask pixels on a page: about 20 MB of HTML. Steps are left out to stay below it."""


def write_page(plan: Plan, path: str | os.PathLike[str], *, title: str = "Plan") -> Path:
    """Write a plan as one HTML file: facts, heat maps, and each head's mask as a picture.

    Large plans show the masks at some of their steps only, so that the page stays readable.

    Raises:
        FileError: the file can't be written.
    """
    names = list(plan.sites)
    by_step = [[plan.density(name, step) for step in range(plan.steps)] for name in names]
    by_head = [heads_density(site).tolist() for site in plan.sites.values()]
    steps = shown_steps(plan)
    data = {"steps": steps, "timesteps": list(plan.timesteps), "sites": _pictures(plan, steps)}
    density = plan.density()
    body = [
        f"<h1>{escape(title)}</h1>",
        '<p class="soft">Which blocks of each attention map a calibrated model computes.</p>',
        page.tiles(
            [
                (f"{1 - density:.1%}", "sparsity: blocks left out"),
                (f"{density:.3f}", "density: blocks computed"),
                (str(len(names)), "sites (attention calls)"),
                (str(plan.steps), "diffusion steps"),
                (f"{math.prod(plan.grid):,}", "video tokens"),
            ]
        ),
        page.facts(facts(plan)),
        "<h2>Density by layer and step</h2>",
        '<p class="soft">Step 0 is the noisiest. Choose a cell to see its masks below.</p>',
        '<div class="panel" id="by-step">'
        + page.heat_map(by_step, names, column_name="step")
        + "</div>",
        "<h2>Density by layer and head</h2>",
        '<div class="panel">' + page.heat_map(by_head, names, column_name="head") + "</div>",
        "<h2>Masks</h2>",
        f'<p class="soft">A row is a block of queries, a column a block of keys, a filled cell is '
        f"computed.{_zones_note(plan)}{_copying_note(plan)}{_reduction_note(plan)}"
        f"{_steps_note(plan, steps)}</p>",
        _slider(steps),
        *_details(plan),
        f'<script type="application/json" id="masks">{_json(data)}</script>',
    ]
    write_text(path, page.document(f"{title} - calibatt", body, script=_SCRIPT, style=_STYLE))
    return Path(path)


def shown_steps(plan: Plan) -> list[int]:
    """Return the steps whose masks a page shows: all, or as many as the budget allows."""
    pixels = sum(
        site.heads
        * min(PICTURE_LIMIT, site.size.query_blocks)
        * min(PICTURE_LIMIT, site.size.key_blocks)
        for site in plan.sites.values()
    )
    count = max(1, min(plan.steps, PIXEL_BUDGET // pixels))
    if count == 1:
        return [plan.steps // 2]
    return sorted({round(i * (plan.steps - 1) / (count - 1)) for i in range(count)})


def _pictures(plan: Plan, steps: list[int]) -> dict[str, Any]:
    """For each site: which picture set each shown step uses, and for each set its heads' PNGs."""
    sites: dict[str, Any] = {}
    for name, site in plan.sites.items():
        wanted = sorted({site.steps[step] for step in steps})
        sets = []
        for index in wanted:
            pattern = site.patterns[index]
            sets.append(
                {
                    "density": [round(float(value), 4) for value in head_density(pattern)],
                    "copying": _copying(pattern),
                    "png": list(_head_pngs(pattern)),
                }
            )
        shown: dict[str, Any] = {
            "set": [wanted.index(site.steps[step]) for step in steps],
            "sets": sets,
        }
        if site.zones is not None:
            # The step group of each set, and for each group its heads' octaves.
            groups = sorted({site.zones.groups[step] for step in wanted})
            shown["group"] = [groups.index(site.zones.groups[step]) for step in wanted]
            zones = [site.zones.zones[group] for group in groups]
            shown["octaves"] = [list(_octave_pngs(each)) for each in zones]
        sites[printable(name)] = shown
    return sites


def _copying(pattern: BlockPattern) -> list[int]:
    """Heads that are row-shared."""
    return [] if pattern.repetitive is None else np.flatnonzero(pattern.repetitive).tolist()


def _head_pngs(pattern: BlockPattern) -> Iterator[str]:
    prefix = len(data_uri(b""))
    for bits in pattern.bits:
        mask = np.unpackbits(bits, axis=-1, count=pattern.key_blocks, bitorder="little")
        png = mask_png(mask.astype(np.bool_), limit=PICTURE_LIMIT, colour=page.ACCENT)
        yield data_uri(png)[prefix:]


def _octave_pngs(zones: ZonePattern) -> Iterator[str]:
    """Pictures of the heads' octaves: the lower, the darker."""
    prefix = len(data_uri(b""))
    for octaves in zones.map_octaves():
        png = mask_png(1 - octaves / OCTAVES, limit=PICTURE_LIMIT, colour=page.ACCENT)
        yield data_uri(png)[prefix:]


def _slider(steps: list[int]) -> str:
    return (
        '<div class="panel stick"><label>step <output id="step"></output> '
        f'<input type="range" id="slider" min="0" max="{len(steps) - 1}" '
        f'value="{len(steps) // 2}" step="1">'
        '</label> <button id="all" type="button">open all sites</button></div>'
    )


def _details(plan: Plan) -> Iterator[str]:
    for index, (name, site) in enumerate(plan.sites.items()):
        first = site.size
        kind = "patterns" if site.zones is None else "step groups of zones"
        yield (
            f'<details class="panel" data-site="{escape(name)}"{" open" if index < 2 else ""}>'
            f'<summary><b class="mono">{escape(name)}</b> <span class="soft">{site.heads} heads, '
            f"{first.query_blocks} x {first.key_blocks} blocks, "
            f'{len(site.digests)} {kind}, density <span class="now"></span></span></summary>'
            '<div class="masks"></div></details>'
        )


def _reduction_note(plan: Plan) -> str:
    largest = max(max(site.size.query_blocks, site.size.key_blocks) for site in plan.sites.values())
    if largest <= PICTURE_LIMIT:
        return ""
    side = -(-largest // PICTURE_LIMIT)
    return f" Reduced: a pixel of the largest mask is the mean of {side} x {side} blocks."


def _zones_note(plan: Plan) -> str:
    if all(site.zones is None for site in plan.sites.values()):
        return ""
    return (
        " Of zones the first picture is the octaves of the step's group, from blocks that are kept "
        "for certain (darkest) to one in 128; the second is what the step draws from them."
    )


def _copying_note(plan: Plan) -> str:
    if not any(site.anchor_rows for site in plan.metadata.sites):
        return ""
    return (
        " Of a head that copies rows only the queries of its anchor rows are shown, one block "
        "after the other; the rows below are empty."
    )


def _steps_note(plan: Plan, steps: list[int]) -> str:
    if len(steps) == plan.steps:
        return ""
    return f" Shown at {len(steps)} of {plan.steps} steps, to keep the page small."


def _json(data: dict[str, Any]) -> str:
    # "<" would let a site's name end the script element.
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


_STYLE = """
.stick { position: sticky; top: 0; z-index: 1; display: flex; gap: 20px; align-items: center; }
.stick label { flex: 1; display: flex; gap: 12px; align-items: center; }
#step { min-width: 15ch; } #slider { flex: 1; accent-color: rgb(var(--accent)); }
button { font: inherit; padding: 4px 12px; border-radius: 6px; border: 1px solid var(--line);
  background: var(--track); color: var(--ink); cursor: pointer; }
summary { cursor: pointer; } .masks { display: flex; flex-wrap: wrap; gap: 14px; margin-top: 14px; }
.masks figure { margin: 0; } .masks img { display: inline-block; vertical-align: top;
  margin-right: 2px; image-rendering: pixelated;
  background: var(--track); border: 1px solid var(--line); }
@media (prefers-color-scheme: dark) { .masks img { filter: brightness(1.5); } }
"""
_SCRIPT = """
const data = JSON.parse(document.getElementById("masks").textContent);
const slider = document.getElementById("slider");
const sites = [...document.querySelectorAll("details[data-site]")];
const mean = values => values.reduce((a, b) => a + b, 0) / values.length;
function draw(details) {
  const site = data.sites[details.dataset.site];
  const index = site.set[Number(slider.value)];
  const set = site.sets[index];
  details.querySelector(".now").textContent = mean(set.density).toFixed(3);
  if (!details.open) return;
  const masks = details.querySelector(".masks");
  if (!masks.children.length) {
    set.png.forEach((_, head) => {
      const figure = document.createElement("figure");
      for (const kind of site.octaves ? ["octaves", "mask"] : ["mask"]) {
        const picture = new Image();
        picture.className = kind;
        picture.onload = () => {
          const side = Math.max(picture.naturalWidth, picture.naturalHeight);
          const scale = Math.max(1, Math.floor(220 / side));
          picture.width = picture.naturalWidth * scale;
          picture.height = picture.naturalHeight * scale;
        };
        figure.append(picture);
      }
      figure.append(document.createElement("figcaption"));
      masks.append(figure);
    });
  }
  [...masks.children].forEach((figure, head) => {
    const [mask, octaves] = ["mask", "octaves"].map(kind => figure.querySelector("." + kind));
    mask.src = "data:image/png;base64," + set.png[head];
    if (octaves) {
      octaves.src = "data:image/png;base64," + site.octaves[site.group[index]][head];
      octaves.alt = "octaves of " + details.dataset.site + ", head " + head;
    }
    figure.lastChild.textContent = "head " + head + ": " + set.density[head].toFixed(3) +
      (set.copying.includes(head) ? ", copies rows" : "");
    mask.alt = "mask of " + details.dataset.site + ", head " + head;
  });
}
function show() {
  const step = data.steps[Number(slider.value)];
  document.getElementById("step").textContent = step + " (t = " +
    Number(data.timesteps[step].toPrecision(5)) + ")";
  sites.forEach(draw);
}
slider.addEventListener("input", show);
sites.forEach(details => details.addEventListener("toggle", () => draw(details)));
document.getElementById("all").addEventListener("click",
  () => sites.forEach(details => { details.open = true; }));
document.getElementById("by-step").addEventListener("click", event => {
  const { row, column } = event.target.dataset;
  if (row === undefined) return;
  const distance = data.steps.map(step => Math.abs(step - Number(column)));
  slider.value = distance.indexOf(Math.min(...distance));
  const details = sites.find(item => item.dataset.site === row);
  details.open = true;
  show();
  details.scrollIntoView({ behavior: "smooth", block: "center" });
});
show();
"""
