"""Draw docs/dataflow.svg from the list of passes and the package's folders.

    python docs/dataflow.py          write the picture

`tests/test_docs.py` holds the picture and the code together.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from calibatt_compiler.passes.pipeline import PASSES

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "dataflow.svg"
INK, SOFT, LINE, PANEL, MARKED = "#1f2933", "#52606d", "#9aa5b1", "#f6f8fa", "#e6f4f1"
COLUMNS, WIDTH, HEIGHT, GAP = (24, 262, 500, 738), 198, 120, 40


def folders(*names: str) -> str:
    """Name folders of the package; they must be there."""
    for name in names:
        assert (ROOT / "calibatt_compiler" / name).is_dir(), name
    return ", ".join(f"{name}/" for name in names)


def rows() -> list[tuple[str, list[tuple[str, list[str], str]]]]:
    """Return (heading, boxes) of each row, a box being title, lines and the folder it lies in."""
    passes = [each.__name__.replace("_", " ") for each in PASSES]
    numbered = [f"{number}. {name}" for number, name in enumerate(passes, 1)]
    kernels = sorted(
        folder.name
        for folder in (ROOT / "kernels").iterdir()
        if any(folder.glob("*.py")) and folder.name not in ("common", "reference")
    )
    return [
        (
            "Offline: from a model to a plan",
            [
                ("Dynamo", ["captures the model", "on calibration prompts"], ""),
                (
                    "observe",
                    ["passes put a recorder", "in place of attention;", "energies of each call"],
                    folders("calibration/observe", "calibration/store"),
                ),
                (
                    "select",
                    ["covering sets, agreement,", "zones; one pattern", "a head and step"],
                    folders("calibration/select"),
                ),
                ("plan", ["one file, one digest"], folders("plan")),
            ],
        ),
        (
            "Online: torch.compile with the plan",
            [
                ("Dynamo", ["one graph, guards on sizes", "and not on the step"], ""),
                ("passes", numbered, ""),
                ("Inductor", ["compiles all the rest;", "our operator is opaque"], ""),
                ("compiled model", ["one graph serves", "every diffusion step"], ""),
            ],
        ),
        (
            "At each call",
            [
                ("timestep", ["read once a forward pass;", "the plan's nearest step"], ""),
                ("site", ["which pattern,", "counts what it serves"], folders("runtime")),
                (
                    "kernel",
                    ["chosen in one place:", ", ".join(kernels)],
                    "kernels/",
                ),
                ("summary", ["sparse by which kernel,", "or dense, and why"], folders("report")),
            ],
        ),
    ]


def text(x: float, y: float, words: str, size: float, colour: str, *, bold: bool = False) -> str:
    """One line of centred text."""
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}" text-anchor="middle"'
        f"{weight}>{escape(words)}</text>"
    )


def draw() -> str:
    """Return the picture."""
    parts: list[str] = []
    for number, (heading, boxes) in enumerate(rows()):
        top = 50 + number * (HEIGHT + GAP + 24)
        parts.append(
            f'<text x="{COLUMNS[0]}" y="{top - 14}" font-size="15" fill="{INK}" '
            f'font-weight="600">{escape(heading)}</text>'
        )
        for left, (title, lines, place) in zip(COLUMNS, boxes, strict=True):
            fill, edge = (MARKED, "#0f766e") if title in ("plan", "kernel") else (PANEL, LINE)
            parts.append(
                f'<rect x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" rx="8" '
                f'fill="{fill}" stroke="{edge}"/>'
            )
            middle = left + WIDTH / 2
            parts.append(text(middle, top + 21, title, 13.5, INK, bold=True))
            for index, line in enumerate(lines):
                parts.append(text(middle, top + 39 + 15.5 * index, line, 11.5, SOFT))
            if place:
                parts.append(text(middle, top + HEIGHT - 8, place, 9.5, SOFT))
        for left in COLUMNS[:-1]:
            start, y = left + WIDTH, top + HEIGHT / 2
            parts.append(arrow(f"M{start} {y:g} H{left + COLUMNS[1] - COLUMNS[0] - 3}"))
    below, above = 50 + HEIGHT, 50 + HEIGHT + GAP + 24
    parts.append(
        arrow(f"M{COLUMNS[3] + 99} {below} V{below + 20} H{COLUMNS[1] + 120} V{above - 3}")
    )
    height = 50 + 3 * HEIGHT + 2 * (GAP + 24) + 24
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 {height}" width="960" '
            f'height="{height}" role="img" aria-labelledby="t d" '
            "font-family=\"system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif\">",
            '<title id="t">How data flows through calibatt</title>',
            '<desc id="d">Offline a recording backend observes the model and its energies become '
            "a plan. Online passes bind the plan to the captured graph and replace attention; "
            "Inductor compiles the rest. At each call a site picks the kernel of its step.</desc>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="{SOFT}"/></marker>'
            "</defs>",
            f'<rect width="960" height="{height}" rx="12" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def arrow(path: str) -> str:
    """A line with a tip."""
    return (
        f'<path d="{path}" stroke="{SOFT}" stroke-width="1.8" fill="none" marker-end="url(#tip)"/>'
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
