"""Parts of the HTML pages: one file each, nothing loaded from a network, light or dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from calibatt_compiler.printable import escape

ACCENT = (79, 70, 229)

_STYLE = """
:root { color-scheme: light dark; --ground: #fafafa; --panel: #fff; --ink: #18181b; --soft: #71717a;
  --line: #e4e4e7; --accent: 79 70 229; --track: #f1f1f4; }
@media (prefers-color-scheme: dark) { :root { --ground: #131316; --panel: #1b1b1f; --ink: #ececef;
  --soft: #a1a1aa; --line: #2e2e33; --accent: 129 140 248; --track: #232328; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 40px 0 12px; }
p { margin: 0 0 12px; max-width: 76ch; }
.soft { color: var(--soft); }
.mono { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, monospace; font-size: 13px; }
.panel { background: var(--panel); border: 1px solid var(--line); border-radius: 10px;
  padding: 16px 18px; margin: 0 0 16px; overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 20px 0; }
.tile { background: var(--panel); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 16px; }
.tile b { display: block; font-size: 24px; font-weight: 600; letter-spacing: -0.02em; }
.tile span { color: var(--soft); font-size: 13px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--soft); font-size: 13px; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td, tbody tr:last-child th { border-bottom: 0; }
.number { text-align: right; }
video, .panel > img { width: 100%; border-radius: 6px; display: block; }
figure { margin: 0 0 20px; }
figcaption { color: var(--soft); font-size: 13px; margin-top: 6px; }
svg text { fill: var(--soft); font: 11px system-ui, "DejaVu Sans", sans-serif; }
svg .cell, svg .scale { fill: rgb(var(--accent)); }
svg .cell { cursor: pointer; }
svg .value { fill: var(--ink); opacity: 0.75; pointer-events: none; }
svg .ground { fill: var(--track); }
svg .cell:hover { stroke: var(--ink); stroke-width: 1.5; }
a { color: rgb(var(--accent)); }
"""


def document(title: str, body: Iterable[str], *, script: str = "", style: str = "") -> str:
    """Return a whole page.

    Args:
        title: plain text.
        body: HTML of the page's parts, in order.
        script: JavaScript run after the page is parsed.
        style: further CSS.
    """
    parts = "\n".join(body)
    tail = f"<script>{script}</script>" if script else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n"
        f"<body>\n<main>\n{parts}\n</main>\n{tail}\n</body>\n</html>\n"
    )


def tiles(figures: Iterable[tuple[str, str]]) -> str:
    """Return headline figures, each a value and what it is."""
    cells = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for value, label in figures
    )
    return f'<div class="tiles">{cells}</div>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Return a table of two columns: what, and its value."""
    rows = "".join(
        f'<tr><th scope="row">{escape(label)}</th><td class="mono">{escape(value)}</td></tr>'
        for label, value in pairs
    )
    return f'<div class="panel"><table>{rows}</table></div>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> str:
    """Return a table; columns after the first `text_columns` are aligned as numbers."""

    def cell(tag: str, index: int, value: str) -> str:
        kind = "" if index < text_columns else ' class="number"'
        return f"<{tag}{kind}>{escape(value)}</{tag}>"

    head = "".join(cell("th", index, value) for index, value in enumerate(header))
    lines = "".join(
        "<tr>" + "".join(cell("td", index, value) for index, value in enumerate(row)) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="panel"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def heat_map(
    values: Sequence[Sequence[float]],
    row_labels: Sequence[str],
    *,
    column_name: str,
    width: int = 1060,
) -> str:
    """Return a heat map as SVG: opacity 0 to 1 for values 0 to 1, one row a label.

    Each cell carries its row's label and its column in `data-row` and `data-column`.

    Args:
        values: rows of numbers in [0, 1].
        row_labels: one a row.
        column_name: what a column is, for tool tips and the axis.
        width: of the picture, in CSS pixels.
    """
    columns = max((len(row) for row in values), default=0)
    margin = 8 + 6.4 * max((len(label) for label in row_labels), default=0)
    cell = _Cell(
        left=margin,
        width=max(3.0, min(40.0, (width - margin) / max(columns, 1))),
        height=max(10.0, min(26.0, 640 / max(len(values), 1))),
    )
    bottom = len(values) * cell.height
    wide, high = margin + columns * cell.width + 8, bottom + 36
    parts = [
        f'<svg viewBox="0 0 {wide:.0f} {high:.0f}" width="{wide:.0f}" role="img" '
        'style="display:block;max-width:100%;height:auto">'
    ]
    label_every = max(1, round(11 / cell.height))
    for index, (label, row) in enumerate(zip(row_labels, values, strict=True)):
        middle = (index + 0.5) * cell.height + 4
        if index % label_every == 0:
            parts.append(_text(margin - 8, middle, label, anchor="end"))
        for column, value in enumerate(row):
            tip = f"{label}, {column_name} {column}: {value:.3f}"
            parts.append(cell.draw(index, column, value, label, tip))
    every = max(1, -(-columns // max(1, int((width - margin) / 34))))
    parts += [
        _text(cell.middle(column), bottom + 14, str(column)) for column in range(0, columns, every)
    ]
    parts.append(_text(margin, bottom + 30, column_name, anchor="start") + "</svg>")
    return "".join(parts) + _legend()


@dataclass(frozen=True)
class _Cell:
    left: float
    width: float
    height: float

    def middle(self, column: int) -> float:
        return self.left + (column + 0.5) * self.width

    def draw(self, row: int, column: int, value: float, label: str, tip: str) -> str:
        gap = 1 if self.width > 6 else 0
        x, y = self.left + column * self.width, row * self.height
        place = (
            f'x="{x:.1f}" y="{y:.1f}" width="{self.width - gap:.1f}" '
            f'height="{self.height - gap:.1f}"'
        )
        drawn = (
            f'<rect class="ground" {place}/>'
            f'<rect class="cell" data-row="{escape(label)}" data-column="{column}" {place} '
            f'fill-opacity="{value:.3f}"><title>{escape(tip)}</title></rect>'
        )
        if self.width >= 24 and self.height >= 16:
            middle = y + self.height / 2 + 4
            drawn += _text(self.middle(column), middle, f"{100 * value:.0f}", kind="value")
        return drawn


def _text(x: float, y: float, text: str, *, anchor: str = "middle", kind: str = "axis") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _legend() -> str:
    cells = "".join(
        f'<rect class="ground" x="{30 + 20 * index}" y="0" width="19" height="11"/>'
        f'<rect class="scale" x="{30 + 20 * index}" y="0" width="19" height="11" '
        f'fill-opacity="{index / 10:.1f}"/>'
        for index in range(11)
    )
    ends = _text(0, 10, "0 %", anchor="start") + _text(256, 10, "100 %", anchor="start")
    return f'<svg width="300" height="16" role="img" style="display:block">{cells}{ends}</svg>'
