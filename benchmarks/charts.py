"""Pictures of tables as SVG: the same table gives the same picture, to the byte."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from tables import Cells

INK, SOFT, GRID = "#1f2933", "#52606d", "#e4e7eb"
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2",
           "#7f7f7f", "#bcbd22")  # fmt: skip
FONT = 'font-family="system-ui, sans-serif"'
LINE_HEIGHT, PLOT, HIGH = 20, 420, 280


@dataclass(frozen=True)
class Chart:
    """What a picture shows of a table.

    Attributes:
        value: title of the column of numbers.
        series: title of the column that colours stand for.
        along: titles of the columns that say where a value stands: of text, one line each; or one
            of numbers, and values of a series are joined over it.
        panel: title of the column that has a plot of its own for each of its values.
        mark: a number at which a line is drawn.
        shows: rows of the table that are drawn.
    """

    value: str
    series: str
    along: tuple[str, ...]
    panel: str | None = None
    mark: float | None = None
    shows: Callable[[Cells], bool] = lambda cells: True


@dataclass(frozen=True)
class Point:
    """Where a value stands, with its spread over the runs."""

    panel: str
    series: str
    at: str | float
    values: tuple[float, ...]

    @property
    def middle(self) -> float:
        """The median."""
        return statistics.median(self.values)


def draw(chart: Chart, rows: Sequence[Sequence[Cells]], title: str) -> str | None:
    """Return a picture, or None if the table has nothing to show."""
    points = [point for cells in rows if (point := _point(chart, cells)) is not None]
    if not points:
        return None
    series = list(dict.fromkeys(point.series for point in points))
    colours = dict(zip(series, itertools.cycle(COLOURS), strict=False))
    joined = all(isinstance(point.at, float) for point in points)
    parts, x, height = [], 0.0, 0.0
    for panel in dict.fromkeys(point.panel for point in points):
        own = [point for point in points if point.panel == panel]
        drawn, wide, high = (_lines if joined else _dots)(chart, own, colours)
        parts.append(f'<g transform="translate({x:g},58)">{_text(wide / 2, -8, panel)}{drawn}</g>')
        x, height = x + wide, max(height, high)
    parts.append(_legend(colours, x, 58 + height))
    total = 58 + height + LINE_HEIGHT * len(_legend_rows(list(colours), x)) + 10
    head = _text(x / 2, 26, title, bold=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {x:g} {total:g}" '
        f'width="{x:g}" {FONT}>\n<rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join([head, *parts])
        + "\n</svg>\n"
    )


def _point(chart: Chart, cells: Sequence[Cells]) -> Point | None:
    last = cells[-1]
    found = [float(each.get(chart.value, math.nan)) for each in cells]
    values = tuple(value for value in found if math.isfinite(value))
    if not values or not chart.shows(last):
        return None
    at = [last[title] for title in chart.along]
    numeric = len(at) == 1 and not isinstance(at[0], str)
    words = " ".join(f"{each:.2g}" if isinstance(each, float) else str(each) for each in at)
    panel = str(last[chart.panel]) if chart.panel else ""
    return Point(panel, str(last[chart.series]), float(at[0]) if numeric else words, values)


def _ticks(low: float, high: float) -> list[float]:
    """Return some four round numbers that enclose both."""
    rough = max(high - low, 1e-9) / 4
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(size * scale for size in (1, 2, 2.5, 5, 10) if size * scale >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _dots(
    chart: Chart, points: Sequence[Point], colours: dict[str, str]
) -> tuple[str, float, float]:
    """Return one line of dots a place, with its width and height."""
    places = list(dict.fromkeys(point.at for point in points))
    every = [value for point in points for value in point.values]
    marks = [] if chart.mark is None else [chart.mark]
    ticks = _ticks(min(0.0, *every, *marks), max(*every, *marks))
    left = 16 + 7 * max(len(str(place)) for place in places)
    bottom = 14.0 + LINE_HEIGHT * len(places)

    def at(value: float) -> float:
        return left + PLOT * (value - ticks[0]) / (ticks[-1] - ticks[0])

    parts = [_rule(at(tick), 0, at(tick), bottom, GRID) for tick in ticks]
    parts += [_text(at(tick), bottom + 16, f"{tick:g}", colour=SOFT) for tick in ticks]
    parts += [_rule(at(mark), 0, at(mark), bottom, INK) for mark in marks]
    for index, place in enumerate(places):
        y = 16 + LINE_HEIGHT * index
        parts.append(_text(left - 8, y + 4, str(place), anchor="end"))
        for point in (point for point in points if point.at == place):
            colour = colours[point.series]
            low, high = at(min(point.values)), at(max(point.values))
            parts.append(_rule(low, y, high, y, colour, 2))
            parts.append(f'<circle cx="{at(point.middle):.1f}" cy="{y}" r="4" fill="{colour}"/>')
    parts.append(_text(left + PLOT / 2, bottom + 36, chart.value, colour=SOFT))
    return "".join(parts), left + PLOT + 24, bottom + 48


def _lines(
    chart: Chart, points: Sequence[Point], colours: dict[str, str]
) -> tuple[str, float, float]:
    """Return a line for each series, with width and height of the plot."""
    every = [value for point in points for value in point.values]
    places = [float(point.at) for point in points]
    x_ticks, y_ticks = _ticks(min(places), max(places)), _ticks(min(every), max(every))
    left = 60.0

    def x(value: float) -> float:
        return left + PLOT * (value - x_ticks[0]) / max(x_ticks[-1] - x_ticks[0], 1e-9)

    def y(value: float) -> float:
        return HIGH - HIGH * (value - y_ticks[0]) / max(y_ticks[-1] - y_ticks[0], 1e-9)

    parts = [_rule(x(tick), 0, x(tick), HIGH, GRID) for tick in x_ticks]
    parts += [_rule(left, y(tick), left + PLOT, y(tick), GRID) for tick in y_ticks]
    parts += [_text(x(tick), HIGH + 16, f"{tick:g}", colour=SOFT) for tick in x_ticks]
    parts += [
        _text(left - 8, y(tick) + 4, f"{tick:g}", anchor="end", colour=SOFT) for tick in y_ticks
    ]
    for name, colour in colours.items():
        own = sorted((p for p in points if p.series == name), key=lambda p: float(p.at))
        path = " ".join(f"{x(float(p.at)):.1f},{y(p.middle):.1f}" for p in own)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for point in own:
            middle = x(float(point.at))
            parts.append(
                _rule(middle, y(min(point.values)), middle, y(max(point.values)), colour, 2)
            )
            parts.append(
                f'<circle cx="{middle:.1f}" cy="{y(point.middle):.1f}" r="3" fill="{colour}"/>'
            )
    axis = f"{chart.value} over {chart.along[0]}"
    parts.append(_text(left + PLOT / 2, HIGH + 36, axis, colour=SOFT))
    return "".join(parts), left + PLOT + 24, HIGH + 48.0


def _legend_rows(names: Sequence[str], width: float) -> list[list[tuple[float, str]]]:
    """Break names into rows, each with where it stands."""
    rows: list[list[tuple[float, str]]] = [[]]
    x = 20.0
    for name in names:
        if rows[-1] and x + 24 + 7 * len(name) > width:
            rows.append([])
            x = 20.0
        rows[-1].append((x, name))
        x += 34 + 7 * len(name)
    return rows


def _legend(colours: dict[str, str], width: float, top: float) -> str:
    parts = []
    for index, row in enumerate(_legend_rows(list(colours), width)):
        y = top + LINE_HEIGHT * index + 6
        for x, name in row:
            parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="5" fill="{colours[name]}"/>')
            parts.append(_text(x + 10, y + 4, name, anchor="start"))
    return "".join(parts)


def _rule(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width:g}"/>'
    )


def _text(
    x: float, y: float, words: str, *, anchor: str = "middle", colour: str = INK, bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="12" fill="{colour}" text-anchor="{anchor}"'
        f"{weight}>{escape(words)}</text>"
    )
