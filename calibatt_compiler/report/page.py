"""Parts of the HTML pages: one file each, nothing loaded from a network, light or dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

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
tr:last-child td { border-bottom: 0; }
.number { text-align: right; }
video, .panel > img { width: 100%; border-radius: 6px; display: block; }
figure { margin: 0 0 20px; }
figcaption { color: var(--soft); font-size: 13px; margin-top: 6px; }
svg text { fill: var(--soft); font: 11px system-ui, "DejaVu Sans", sans-serif; }
svg .cell { fill: rgb(var(--accent)); cursor: pointer; }
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
    attributes: Sequence[str] = (),
    width: int = 1060,
) -> str:
    """Return a heat map as SVG: opacity 0 to 1 for values 0 to 1, one row a label.

    Args:
        values: rows of numbers in [0, 1]; a NaN leaves the cell empty.
        row_labels: one a row.
        column_name: what a column is, for tool tips and the axis.
        attributes: for each row, the value of its cells' `data-row` attribute.
        width: of the picture, in CSS pixels.
    """
    columns = max((len(row) for row in values), default=0)
    margin = 8 + 6.4 * max((len(label) for label in row_labels), default=0)
    cell_width = max(3.0, min(40.0, (width - margin) / max(columns, 1)))
    cell_height = max(10.0, min(26.0, 640 / max(len(values), 1)))
    gap = 1 if cell_width > 6 else 0
    bottom = len(values) * cell_height
    size = (margin + columns * cell_width + 8, bottom + 36)
    parts = [
        f'<svg viewBox="0 0 {size[0]:.0f} {size[1]:.0f}" width="{size[0]:.0f}" '
        f'style="display:block;max-width:100%;height:auto" role="img">'
    ]
    label_every = max(1, round(11 / cell_height))
    for index, (label, row) in enumerate(zip(row_labels, values, strict=True)):
        top = index * cell_height
        if index % label_every == 0:
            parts.append(
                f'<text x="{margin - 8:.1f}" y="{top + cell_height / 2 + 4:.1f}" '
                f'text-anchor="end">{escape(label)}</text>'
            )
        parts.append(
            f'<rect class="ground" x="{margin:.1f}" y="{top:.1f}" '
            f'width="{len(row) * cell_width:.1f}" height="{cell_height - gap:.1f}"/>'
        )
        data = f' data-row="{escape(attributes[index])}"' if attributes else ""
        for column, value in enumerate(row):
            if value != value:  # noqa: PLR0124 - NaN
                continue
            parts.append(
                f'<rect class="cell"{data} data-column="{column}" '
                f'x="{margin + column * cell_width:.1f}" y="{top:.1f}" '
                f'width="{cell_width - gap:.1f}" height="{cell_height - gap:.1f}" '
                f'fill-opacity="{value:.3f}">'
                f"<title>{escape(label)}, {escape(column_name)} {column}: {value:.3f}</title></rect>"
            )
            if cell_width >= 24 and cell_height >= 16:
                parts.append(
                    f'<text class="value" x="{margin + (column + 0.5) * cell_width:.1f}" '
                    f'y="{top + cell_height / 2 + 4:.1f}" text-anchor="middle">'
                    f"{100 * value:.0f}</text>"
                )
    every = max(1, -(-columns // max(1, int((width - margin) / 34))))
    parts += [
        f'<text x="{margin + (column + 0.5) * cell_width:.1f}" y="{bottom + 14:.1f}" '
        f'text-anchor="middle">{column}</text>'
        for column in range(0, columns, every)
    ]
    parts.append(
        f'<text x="{margin:.1f}" y="{bottom + 30:.1f}">{escape(column_name)}</text></svg>'
    )
    return "".join(parts) + _legend()


def _legend() -> str:
    cells = "".join(
        f'<rect class="cell" style="cursor:default" x="{30 + 20 * index}" y="0" width="19" '
        f'height="11" fill-opacity="{index / 10:.1f}"/>'
        for index in range(11)
    )
    return (
        '<svg width="300" height="16" role="img" style="display:block"><rect class="ground" x="30" y="0" width="219" '
        f'height="11"/>{cells}<text x="0" y="10">0 %</text><text x="256" y="10">100 %</text></svg>'
    )
