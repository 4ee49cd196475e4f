"""Curves of a stage's metrics as an SVG picture: small, sharp, and without a drawing library."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

Points = Sequence[tuple[float, float]]
"""Steps and values."""

_WIDTH, _HEIGHT, _COLUMNS = 380, 200, 2
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 28, 26
_MOST_POINTS = 400


def read_curves(metrics: Path, names: Sequence[str]) -> dict[str, Points]:
    """The named figures of a metrics file by step; none of those that the file has not at least twice."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines() if line.strip()]
    curves: dict[str, Points] = {}
    for name in names:
        points = [(float(row["step"]), float(row[name])) for row in rows if _is_number(row.get(name))]
        if len(points) > 1:
            curves[name] = points
    return curves


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def draw(curves: dict[str, Points]) -> str:
    """One picture with a panel a curve, two in a row; as the text of an SVG file."""
    rows = -(-len(curves) // _COLUMNS)
    width, height = _COLUMNS * _WIDTH, rows * _HEIGHT
    corners = [(index % _COLUMNS * _WIDTH, index // _COLUMNS * _HEIGHT) for index in range(len(curves))]
    panels = "".join(
        f'<g transform="translate({x},{y})">{_panel(name, points)}</g>'
        for (x, y), (name, points) in zip(corners, curves.items(), strict=True)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        f' font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>{panels}</svg>'
    )


def _panel(name: str, points: Points) -> str:
    thinned = points[:: -(-len(points) // _MOST_POINTS)]
    if thinned[-1] != points[-1]:
        thinned = [*thinned, points[-1]]
    first, last = points[0][0], points[-1][0]
    values = [value for _, value in points]
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def x(step: float) -> float:
        return _LEFT + (right - _LEFT) * (step - first) / ((last - first) or 1.0)

    def y(value: float) -> float:
        return bottom - (bottom - _TOP) * (value - low) / (high - low)

    grid = "".join(
        f'<line x1="{_LEFT}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#ddd"/>'
        f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end" fill="#555">{tick:.4g}</text>'
        for tick in ticks(low, high)
    )
    line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in thinned)
    return (
        f'{grid}<text x="{_LEFT}" y="18" font-weight="bold">{escape(name)}</text>'
        f'<text x="{_LEFT}" y="{_HEIGHT - 8}" fill="#555">{first:g}</text>'
        f'<text x="{right}" y="{_HEIGHT - 8}" text-anchor="end" fill="#555">{last:g}</text>'
        f'<polyline points="{line}" fill="none" stroke="#2563eb" stroke-width="1.5"/>'
    )


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two, three to seven of them."""
    third = (high - low) / 3
    unit = 10.0 ** math.floor(math.log10(third))
    step = max(factor * unit for factor in (1, 2, 5) if factor * unit <= third)
    first = math.ceil(low / step)
    return [round(number * step, 12) for number in range(first, math.floor(high / step) + 1)]


def as_markdown(picture: str, title: str) -> str:
    """An SVG picture inside markdown, which needs no file beside it."""
    return f"![{title}](data:image/svg+xml;base64,{base64.b64encode(picture.encode()).decode()})"
