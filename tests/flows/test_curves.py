"""Charts as SVG: what is drawn is what was measured."""

from __future__ import annotations

import base64
import json
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from flows.curves import (  # fmt: skip
    COLOURS,
    DASHES,
    HEIGHT,
    WIDTH,
    Chart,
    Line,
    Points,
    as_markdown,
    draw,
    picture,
    read_curves,
    short,
    sparkline,
    thinned,
    ticks,
)


def polylines(picture: str) -> list[list[tuple[float, float]]]:
    lines = [
        element.get("points", "") for element in ElementTree.fromstring(picture).iter() if "polyline" in element.tag
    ]
    return [[(float(x), float(y)) for x, y in (point.split(",") for point in line.split())] for line in lines]


def test_only_curves_with_something_to_draw(tmp_path: Path) -> None:
    rows = [{"step": 1, "a": 1.0, "b": 2, "c": None}, {"step": 2, "a": 3.0, "d": 1.0}, {"step": 3, "a": None, "b": 4}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    found = read_curves(path, ("b", "a", "c", "d", "e"))
    assert found == {"b": [(1, 2), (3, 4)], "a": [(1, 1), (2, 3), (3, None)]}


def test_the_line_follows_the_values() -> None:
    (line,) = polylines(draw({"loss": [(10.0, 4.0), (20.0, 1.0), (40.0, 2.0)]}))
    (x1, y1), (x2, y2), (x3, y3) = line
    assert abs((x2 - x1) / (x3 - x1) - 1 / 3) < 0.01
    assert y1 < y3 < y2  # downwards in a picture
    assert abs((y3 - y1) / (y2 - y1) - 2 / 3) < 0.01


def test_a_figure_that_was_not_finite_leaves_a_gap() -> None:
    points: Points = [(1.0, 1.0), (2.0, 2.0), (3.0, None), (4.0, 5.0), (5.0, None), (6.0, 2.0), (7.0, 1.0)]
    chart = Chart("Loss", "nats", [Line("loss", points)])
    drawn = picture(chart)
    assert [len(line) for line in polylines(drawn)] == [2, 2]
    assert len(re.findall("<circle", drawn)) == 1, "the value between two gaps is a dot"
    data = json.loads(ElementTree.fromstring(drawn).get("data-chart", ""))
    assert data["lines"][0]["points"] == [list(point) for point in points]


def test_figures_too_large_to_be_drawn_are_gaps() -> None:
    """The range from -1e308 to 1e308 is no finite number."""
    points: Points = [(1.0, 1.0), (2.0, 2.0), (3.0, 1e308), (4.0, 3.0), (5.0, -1e308), (6.0, 1.7976931348623157e308)]
    drawn = picture(Chart("Score", "reward", [Line("score", points)]))
    assert [len(line) for line in polylines(drawn)] == [2]
    root = ElementTree.fromstring(drawn)
    data = json.loads(root.get("data-chart", ""), parse_constant=pytest.fail)
    assert [value for _, value in data["lines"][0]["points"]] == [1.0, 2.0, None, 3.0, None, None]
    assert root.get("aria-label") == "Score (reward): score 3"
    assert 0 < data["range"][2] < 1 and 3 < data["range"][3] < 4
    far = [(1e308, 1.0), (-1e308, 2.0), (1.0, 3.0), (2.0, 4.0)]
    assert [len(line) for line in polylines(picture(Chart("", "", [Line("a path", far, "path")])))] == [2]
    assert sparkline([0.0, 1e308, -1e308, 7.0]) == "▁  █"


def test_more_runs_than_colours_are_told_apart_by_dashes() -> None:
    looks = {Line("a run", [], colour=1 + n % COLOURS, dashes=n // COLOURS).classes for n in range(COLOURS * DASHES)}
    assert len(looks) == COLOURS * DASHES
    style = (Path(__file__).parents[2] / "flows" / "report_page" / "page.css").read_text()
    for name in [part for look in looks for part in look.split() if part not in ("line", "path")]:
        assert f".plot .{name} {{" in style or f".{name} {{ --colour" in style, name
        assert "dashes" not in name or f".legend .{name}::before" in style, name


def test_a_chart_has_axes_units_and_words_for_those_who_do_not_see() -> None:
    level = Line("limit", [(1.0, 9.0), (3.0, 9.0)], "level", colour=6)
    chart = Chart("Length <b>", "tokens", [Line("mean", [(1.0, 2.0), (3.0, 4.0)]), level], x="round", include=(0.0,))
    root = ElementTree.fromstring(picture(chart))
    texts = [element.text for element in root.iter() if element.tag == "text"]
    assert {"tokens", "round", "0", "8", "1", "3"} <= set(texts)
    assert root.get("aria-label") == "Length <b> (tokens): mean 4, limit 9"
    assert "<b>" not in picture(chart)
    assert "stroke-dasharray" not in picture(chart), "colours and dashes belong to the page's style sheet"
    data = json.loads(root.get("data-chart", ""))
    assert [line["name"] for line in data["lines"]] == ["mean"], "a level has nothing to show under the pointer"
    assert data["range"][2] < 0 < 9 < data["range"][3]


def test_nothing_is_drawn_outside_of_the_picture() -> None:
    lines = [
        Line("a", [(0.0, -3.0), (7.0, 1e7)], "dots", ranges=[(-9.0, 2.0), (0.0, 2e7)]),
        Line("b", [(3.0, 5.0)], "path", colour=2),
    ]
    root = ElementTree.fromstring(picture(Chart("A", "b", lines)))
    for element in root.iter():
        for name in ("x", "x1", "x2", "cx"):
            assert 0 <= float(element.get(name, 0)) <= WIDTH
        for name in ("y", "y1", "y2", "cy"):
            assert 0 <= float(element.get(name, 0)) <= HEIGHT


def test_equal_factors_are_equally_far_apart_where_the_axis_is_logarithmic() -> None:
    points = [(30.0, 1.0), (60.0, 2.0), (120.0, 3.0), (960.0, 4.0)]
    chart = Chart("A", "b", [Line("a", points, "path", ranges=[(y, y + 1) for _, y in points])], log_x=True)
    (line,) = polylines(picture(chart))
    steps = [b[0] - a[0] for a, b in pairwise(line)]
    assert steps[0] == pytest.approx(steps[1], abs=0.2) and steps[2] == pytest.approx(3 * steps[0], abs=0.2)
    root = ElementTree.fromstring(picture(chart))
    texts = [element.text for element in root.iter() if element.get("y") == str(HEIGHT - 34 + 16)]
    assert texts == ["960", "120", "60", "30"], "labelled at the points"
    assert json.loads(root.get("data-chart", ""))["log"] is True
    whiskers = [float(one.get("x1", 0)) for one in root.iter() if "whisker" in one.get("class", "")]
    assert whiskers == [x for x, _ in line]


def test_labels_of_a_logarithmic_axis_do_not_stand_on_each_other() -> None:
    points = [(1000.0 + number, 1.0) for number in range(50)] + [(1.0, 1.0)]
    root = ElementTree.fromstring(picture(Chart("A", "b", [Line("a", points, "dots")], log_x=True)))
    labels = [element for element in root.iter() if element.get("y") == str(HEIGHT - 34 + 16)]
    assert [label.text for label in labels] == ["1049", "1"]


@pytest.mark.parametrize("points", [[], [(1.0, 5.0)], [(1.0, None)], [(1.0, 0.0), (2.0, 0.0)]])
def test_little_or_nothing_is_drawn_as_well(points: Points) -> None:
    ElementTree.fromstring(picture(Chart("A", "b", [Line("a", points)])))


def test_panels_stand_side_by_side() -> None:
    picture = draw({f"figure <{number}>": [(0.0, 1.0), (1.0, 1.0)] for number in range(3)})
    root = ElementTree.fromstring(picture)
    assert (root.get("width"), root.get("height")) == ("760", "400")
    assert re.findall(r"translate\((\d+),(\d+)\)", picture) == [("0", "0"), ("380", "0"), ("0", "200")]
    assert "figure &lt;2&gt;" in picture
    assert "stroke:#2563eb" in picture, "a picture that stands alone brings its colours"


def test_long_curves_are_thinned_and_keep_their_end_and_their_spikes() -> None:
    points = [(float(step), float(step)) for step in range(10_001)]
    points[5003] = (5003.0, 1e6)
    points[7001] = (7001.0, -1e6)
    found = thinned(points)
    assert len(found) <= 402
    assert {points[5003], points[7001], points[-1]} <= set(found)
    assert list(found) == sorted(found, key=lambda point: point[0])
    (line,) = polylines(draw({"a": points}))
    assert line[-1][0] == 368.0


def test_long_curves_keep_their_gaps() -> None:
    points: Points = [(float(step), None if 500 <= step < 520 else 1.0) for step in range(1000)]
    assert any(value is None for _, value in thinned(points))


def test_ticks_are_round_numbers() -> None:
    assert ticks(0.03, 0.97) == [0.2, 0.4, 0.6, 0.8]
    assert ticks(-1.2, 3.1) == [-1.0, 0.0, 1.0, 2.0, 3.0]
    assert ticks(0.0, 4.0) == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_numbers_are_short() -> None:
    texts = {
        0.0: "0",
        0.25: "0.25",
        5e-4: "5e-4",
        -1.2e-5: "-1.2e-5",
        12: "12",
        999.4: "999",
        12_000: "12k",
        3e6: "3M",
    }
    assert {number: short(number) for number in texts} == texts


def test_a_sparkline_has_a_bar_a_value() -> None:
    assert sparkline([0.0, 7.0]) == "▁█"
    assert sparkline([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, None, 3.0]) == "▁ █"
    assert sparkline([2.0, 2.0]) == "▅▅"
    assert sparkline([]) == sparkline([None]) == ""
    assert len(sparkline([float(step) for step in range(1000)], width=40)) == 40


def test_the_picture_is_inside_the_text() -> None:
    found = re.fullmatch(r"!\[Curves\]\(data:image/svg\+xml;base64,(.*)\)", as_markdown("<svg/>", "Curves"))
    assert found and base64.b64decode(found[1]) == b"<svg/>"
