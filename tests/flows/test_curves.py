"""Curves as SVG: what is drawn is what was measured."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from xml.etree import ElementTree

from flows.curves import as_markdown, draw, read_curves, ticks


def polylines(picture: str) -> list[list[tuple[float, float]]]:
    lines = [
        element.get("points", "") for element in ElementTree.fromstring(picture).iter() if "polyline" in element.tag
    ]
    return [[(float(x), float(y)) for x, y in (point.split(",") for point in line.split())] for line in lines]


def test_only_curves_with_something_to_draw(tmp_path: Path) -> None:
    rows = [{"step": 1, "a": 1.0, "b": 2, "c": None}, {"step": 2, "a": 3.0, "d": 1.0}, {"step": 3, "a": None, "b": 4}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert read_curves(path, ("b", "a", "c", "d", "e")) == {"b": [(1, 2), (3, 4)], "a": [(1, 1), (2, 3)]}


def test_the_line_follows_the_values() -> None:
    (line,) = polylines(draw({"loss": [(10.0, 4.0), (20.0, 1.0), (40.0, 2.0)]}))
    (x1, y1), (x2, y2), (x3, y3) = line
    assert abs((x2 - x1) / (x3 - x1) - 1 / 3) < 0.01
    assert y1 < y3 < y2  # downwards in a picture
    assert abs((y3 - y1) / (y2 - y1) - 2 / 3) < 0.01


def test_panels_stand_side_by_side() -> None:
    picture = draw({f"figure <{number}>": [(0.0, 1.0), (1.0, 1.0)] for number in range(3)})
    root = ElementTree.fromstring(picture)
    assert (root.get("width"), root.get("height")) == ("760", "400")
    assert re.findall(r"translate\((\d+),(\d+)\)", picture) == [("0", "0"), ("380", "0"), ("0", "200")]
    assert "figure &lt;2&gt;" in picture


def test_long_curves_are_thinned_and_keep_their_end() -> None:
    (line,) = polylines(draw({"a": [(float(step), float(step)) for step in range(10_001)]}))
    assert len(line) <= 402
    assert line[-1][0] == 368.0


def test_ticks_are_round_numbers() -> None:
    assert ticks(0.03, 0.97) == [0.2, 0.4, 0.6, 0.8]
    assert ticks(-1.2, 3.1) == [-1.0, 0.0, 1.0, 2.0, 3.0]
    assert ticks(0.0, 4.0) == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_the_picture_is_inside_the_text() -> None:
    found = re.fullmatch(r"!\[Curves\]\(data:image/svg\+xml;base64,(.*)\)", as_markdown("<svg/>", "Curves"))
    assert found and base64.b64decode(found[1]) == b"<svg/>"
