"""Charts as SVG: small, sharp, and without a drawing library. Colours come from the style sheet around them.

A chart's picture carries its own figures (`data-chart`), from which the report's script shows values under a pointer.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, Literal

from pipeline.metrics import MetricsRow
from pipeline.run_state import read_rows

Points = Sequence[tuple[float, float | None]]
"""Steps and values; None is a gap."""

COLOURS, DASHES = 6, 3
"""Of the style sheet: so many colours, and each of them whole and dashed in two ways."""
WIDTH, HEIGHT = 380, 200
_COLUMNS = 2
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 28, 34
_MOST_POINTS = 400
_LARGEST = 1e300
"""What is beyond cannot be drawn: the range of an axis would not be finite."""

STYLE = (
    "text{font:11px sans-serif;fill:#555}.title{font-weight:bold;fill:#111}.grid{stroke:#ddd}.axis{stroke:#999}"
    ".mark{fill:none;stroke:#2563eb;stroke-width:1.5}.dot{fill:#2563eb;stroke:none}"
)
"""For pictures that stand alone, on white."""


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    `kind`: `line` joins neighbours, `dots` joins nothing, `path` joins in the order of the points, `level` is dashed.
    `ranges` are intervals around the points, drawn as bars. `colour` and `dashes` number those of the style sheet.
    """

    name: str
    points: Points
    kind: Literal["line", "dots", "path", "level"] = "line"
    colour: int = 1
    ranges: Sequence[tuple[float, float]] = ()
    dashes: int = 0

    @property
    def classes(self) -> str:
        """What the style sheet knows it by."""
        return f"{self.kind} c{self.colour}{f' dashes{self.dashes}' if self.dashes else ''}"


@dataclass(frozen=True)
class Chart:
    """Lines on common axes.

    `unit` is that of the values, `x` what the horizontal axis counts. `about` is a sentence for a reader who sees such
    a chart for the first time. `include` are values that the vertical axis must reach. With `log_x` the horizontal one
    is logarithmic, and labelled where the points are.
    """

    title: str
    unit: str
    lines: Sequence[Line]
    x: str = "step"
    about: str = ""
    include: Sequence[float] = ()
    log_x: bool = False


def read_curves(metrics: Path, names: Sequence[str]) -> dict[str, Points]:
    """The named figures of a metrics file by step; none of those that the file has not at least twice."""
    rows = read_rows(metrics, [])
    found = {name: curve(rows, name) for name in names}
    return {name: points for name, points in found.items() if sum(value is not None for _, value in points) > 1}


def curve(rows: Sequence[MetricsRow], name: str) -> Points:
    """A figure by step. Lines that do not have it are left out; where it was not finite there is a gap."""
    return [(float(row["step"] or 0), row[name]) for row in rows if name in row]


def draw(curves: dict[str, Points], include: Sequence[float] = ()) -> str:
    """One picture with a panel a curve, two in a row; as the text of an SVG file that stands alone.

    Args:
        curves: the points of each, by its title.
        include: values that each vertical axis must reach.
    """
    rows = -(-len(curves) // _COLUMNS)
    width, height = _COLUMNS * WIDTH, rows * HEIGHT
    corners = [(index % _COLUMNS * WIDTH, index // _COLUMNS * HEIGHT) for index in range(len(curves))]
    panels = "".join(
        f'<g transform="translate({x},{y})"><text class="title" x="{_LEFT}" y="18">{escape(name)}</text>'
        f"{''.join(_Axes(Chart('', '', [Line(name, points)], x='', include=include)).elements())}</g>"
        for (x, y), (name, points) in zip(corners, curves.items(), strict=True)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="white"/>{panels}</svg>'
    )


def picture(chart: Chart) -> str:
    """A chart as an SVG element inside a page."""
    axes = _Axes(chart)
    data = escape(json.dumps(axes.data(), separators=(",", ":")))
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_in_words(axes.chart))}"'
        f' data-chart="{data}">{"".join(axes.elements())}</svg>'
    )


def _in_words(chart: Chart) -> str:
    """For readers that do not see: the last values."""
    last = [
        f"{line.name} {short(values[-1])}"
        for line in chart.lines
        if (values := [value for _, value in line.points if value is not None])
    ]
    return f"{chart.title} ({chart.unit}): {', '.join(last)}" if chart.unit else f"{chart.title}: {', '.join(last)}"


class _Axes:
    """Where the values of a chart lie in its picture."""

    def __init__(self, chart: Chart) -> None:
        chart = replace(chart, lines=[replace(line, points=_drawable(line.points)) for line in chart.lines])
        self.chart = chart
        self.lines = [(line, thinned(line.points) if line.kind == "line" else line.points) for line in chart.lines]
        points = [(x, y) for line in chart.lines for x, y in line.points if y is not None]
        ends = [end for line in chart.lines for ends in line.ranges for end in ends]
        xs, ys = [x for x, _ in points] or [0.0, 1.0], [*(y for _, y in points), *ends, *chart.include] or [0.0, 1.0]
        self.first, self.last = min(xs), max(xs)
        low, high = min(ys), max(ys)
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        self.low, self.high = low - margin, high + margin
        self.right, self.bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM

    def x(self, step: float) -> float:
        """In pixels."""
        first, here, last = (math.log(x) if self.chart.log_x else x for x in (self.first, step, self.last))
        return _LEFT + (self.right - _LEFT) * (here - first) / ((last - first) or 1.0)

    def y(self, value: float) -> float:
        """In pixels, downwards."""
        return self.bottom - (self.bottom - _TOP) * (value - self.low) / (self.high - self.low)

    def elements(self) -> Iterator[str]:
        """What is drawn, the lowest layer first."""
        for tick in ticks(self.low, self.high):
            y = self.y(tick)
            yield f'<line class="grid" x1="{_LEFT}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>'
        yield f'<line class="axis" x1="{_LEFT}" x2="{self.right}" y1="{self.bottom}" y2="{self.bottom}"/>'
        for tick, anchor in self._steps():
            x = self.x(tick)
            yield f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{self.bottom}" y2="{self.bottom + 4}"/>'
            yield f'<text x="{x:.1f}" y="{self.bottom + 16}" text-anchor="{anchor}">{short(tick)}</text>'
        if self.chart.unit:
            yield f'<text class="unit" x="{_LEFT - 40}" y="{_TOP - 14}">{escape(self.chart.unit)}</text>'
        if self.chart.x:
            yield (
                f'<text class="unit" x="{self.right}" y="{HEIGHT - 4}" text-anchor="end">{escape(self.chart.x)}</text>'
            )
        for line, points in self.lines:
            yield from self._line(line, points)

    def _steps(self) -> Iterator[tuple[float, str]]:
        """The horizontal axis is labelled at round numbers; whole ones where it counts."""
        if self.last <= self.first:
            yield self.first, "start"
            return
        if self.chart.log_x:
            yield from self._steps_of_points()
            return
        found = ticks(self.first, self.last)
        if all(float(x).is_integer() for line in self.chart.lines for x, _ in line.points):
            found = [tick for tick in found if float(tick).is_integer()]
        for tick in found:
            yield tick, "end" if self.x(tick) > self.right - 12 else "middle"

    def _steps_of_points(self) -> Iterator[tuple[float, str]]:
        """The places of the points, from the right, as far as there is room for their labels."""
        free = math.inf
        for step in sorted({x for line in self.chart.lines for x, y in line.points if y is not None}, reverse=True):
            anchor = "end" if self.x(step) > self.right - 12 else "middle"
            width = 6.5 * len(short(step)) + 6
            if self.x(step) + (0 if anchor == "end" else width / 2) <= free:
                yield step, anchor
                free = self.x(step) - (width if anchor == "end" else width / 2)

    def _line(self, line: Line, points: Points) -> Iterator[str]:
        colour = f"c{line.colour}"
        for (x, _), (low, high) in zip(points, line.ranges, strict=False):
            yield f'<line class="whisker {colour}" x1="{self.x(x):.1f}" x2="{self.x(x):.1f}"'
            yield f' y1="{self.y(low):.1f}" y2="{self.y(high):.1f}"/>'
        for run in _without_gaps(points):
            if line.kind == "dots" or len(run) == 1:
                size = 2 if len(points) > 150 else 3.5
                for x, y in run:
                    yield f'<circle class="dot {colour}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="{size}"/>'
            else:
                path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in run)
                yield f'<polyline class="mark {line.classes}" points="{path}"/>'
                if line.kind == "path":
                    yield from (
                        f'<circle class="dot {colour}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="2.2"/>'
                        for x, y in run
                    )

    def data(self) -> dict[str, Any]:
        """What the script needs to find the values under a pointer."""
        return {
            "unit": self.chart.unit,
            "x": self.chart.x,
            "box": [_LEFT, self.right, _TOP, self.bottom],
            "range": [self.first, self.last, self.low, self.high],
            "log": self.chart.log_x,
            "nearest": "point" if any(line.kind in ("dots", "path") for line in self.chart.lines) else "step",
            "lines": [
                {
                    "name": line.name,
                    "colour": line.colour,
                    "points": [
                        [_rounded(x), _rounded(y)]
                        for x, y in points
                        if y is not None or line.kind != "path"  # whose gaps have no place of their own
                    ],
                }
                for line, points in self.lines
                if line.kind != "level"
            ],
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _drawable(points: Points) -> Points:
    """With a gap for each that is too large to be drawn."""
    return [
        (x, y) if y is not None and max(abs(x), abs(y)) <= _LARGEST else (x if abs(x) <= _LARGEST else 0.0, None)
        for x, y in points
    ]


def _without_gaps(points: Points) -> Iterator[list[tuple[float, float]]]:
    """The stretches in which every value is known."""
    run: list[tuple[float, float]] = []
    for x, y in points:
        if y is None:
            if run:
                yield run
            run = []
        else:
            run.append((x, y))
    if run:
        yield run


def thinned(points: Points) -> Points:
    """At most so many points as can be told apart. Of each stretch its lowest and highest are kept, and its gaps."""
    if len(points) <= _MOST_POINTS:
        return points
    size = -(-2 * len(points) // _MOST_POINTS)
    kept: list[tuple[float, float | None]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        known = [(y, index) for index, (_, y) in enumerate(stretch) if y is not None]
        chosen = {min(known)[1], max(known)[1]} if known else set()
        gap = next((index for index, (_, y) in enumerate(stretch) if y is None), None)
        kept += [stretch[index] for index in sorted(chosen if gap is None else chosen | {gap})]
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two, three to seven of them."""
    third = (high - low) / 3
    unit = 10.0 ** math.floor(math.log10(third))
    step = max(factor * unit for factor in (1, 2, 5) if factor * unit <= third)
    first = math.ceil(low / step)
    return [round(number * step, 12) for number in range(first, math.floor(high / step) + 1)]


def short(value: float) -> str:
    """A number in few characters: `0.25`, `12`, `5e-4`, `12k`."""
    if value and abs(value) < 1e-3:
        digits, _, exponent = f"{value:.1e}".partition("e")
        return f"{digits.removesuffix('.0')}e{int(exponent)}"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k" if abs(value) < 1e6 else f"{value / 1e6:g}M"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float | None], width: int = 40) -> str:
    """Values as a row of bars for a terminal, the lowest and highest of them the shortest and tallest; gaps are blank.

    Args:
        values: the newest last.
        width: characters at the most; each then stands for the mean of its stretch.
    """
    size = max(1, -(-len(values) // width))
    stretches = [values[start : start + size] for start in range(0, len(values), size)]
    known = [[value for value in stretch if value is not None and abs(value) <= _LARGEST] for stretch in stretches]
    means = [sum(stretch) / len(stretch) if stretch else None for stretch in known]
    found = [mean for mean in means if mean is not None]
    if not found:
        return ""
    low, span = min(found), max(found) - min(found)

    def bar(mean: float | None) -> str:
        if mean is None:
            return " "
        return _BARS[round((mean - low) / span * (len(_BARS) - 1))] if span > 0 else _BARS[len(_BARS) // 2]

    return "".join(map(bar, means))


def as_markdown(picture: str, title: str) -> str:
    """An SVG picture inside markdown, which needs no file beside it."""
    return f"![{title}](data:image/svg+xml;base64,{base64.b64encode(picture.encode()).decode()})"
