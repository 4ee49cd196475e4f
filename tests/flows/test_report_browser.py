"""The report in a real browser: no error on the console, search and switch work, and nothing hostile runs."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Page, browser
from reported_run import hostile_run, whole_run

from flows.report import render, write_report
from pipeline.run_state import Status, read_run

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
    pytest.mark.skipif(importlib.util.find_spec("websockets") is None, reason="websockets is not installed"),
]

CLICK = "document.querySelector({selector!r}).click()"


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    with browser() as page:
        page.size(1200, 900)
        yield page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs beside each other."""
    folder = tmp_path_factory.mktemp("report")
    runs = [
        whole_run(folder / name, name=name, seed=seed).config.run_dir for seed, name in enumerate(("first", "second"))
    ]
    return write_report(runs, folder / "report.html")


@pytest.fixture(autouse=True)
def _nothing_is_wrong(tab: Page) -> Iterator[None]:
    tab.messages.clear()
    tab.requests.clear()
    yield
    assert tab.messages == [], "the console is empty"
    outside = [url for url in tab.requests if not url.startswith(("file:", "data:", "about:"))]
    assert outside == [], "the page asks nobody for anything"


def type_into(tab: Page, selector: str, value: str, event: str = "input") -> None:
    tab.ask(
        f"(() => {{ const one = document.querySelector({selector!r}); one.value = {value!r};"
        f" one.dispatchEvent(new Event({event!r}, {{bubbles: true}})); }})()"
    )


def visible(tab: Page, selector: str) -> list[str]:
    shown = f"[...document.querySelectorAll({selector!r})].filter((one) => one.checkVisibility())"
    script = f"{shown}.map((one) => one.innerText)"
    found: list[str] = tab.ask(script)
    return found


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_run_switch_shows_one_run_at_a_time(tab: Page, report: Path) -> None:
    tab.open(report)
    assert visible(tab, "main.run h1") == ["2 runs"]
    for number, name in enumerate(("first", "second")):
        type_into(tab, "#run-switch", str(number), "change")
        until(lambda number=number: tab.ask("location.hash") == f"#{number}/overview")
        (heading,) = visible(tab, ".page > h1")
        assert heading.startswith(name)
        assert len(visible(tab, "main.run")) == 1
    type_into(tab, "#run-switch", "compare", "change")
    until(lambda: visible(tab, "main.run h1") == ["2 runs"])


def test_every_page_opens(tab: Page, report: Path) -> None:
    tab.open(report, "#0/overview")
    links = visible(tab, ".pages a")
    assert links == ["Overview", "Curves", "Reward model", "Samples", "Data", "Configuration", "Lineage"]
    for number in range(len(links)):
        tab.ask(f"document.querySelectorAll('[data-run=\"0\"] .pages a')[{number}].click()")
        until(lambda number=number: visible(tab, "[aria-current]") == [links[number]])
        assert len(visible(tab, ".page")) == 1
        wide = tab.ask("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide == 0, f"{links[number]} is wider than the window"


@pytest.mark.parametrize("width", [360, 390, 820])
def test_no_page_is_wider_than_a_phone(tab: Page, report: Path, width: int) -> None:
    tab.size(width, 800, phone=True)
    try:
        for page in ("overview", "curves", "reward", "samples", "data", "settings", "lineage"):
            tab.open(report, f"#0/{page}")
            assert tab.ask("document.documentElement.scrollWidth") <= width, page
        tab.open(report, "#compare/overview")
        assert tab.ask("document.documentElement.scrollWidth") <= width
    finally:
        tab.size(1200, 900)


def test_the_search_finds_answers(tab: Page, report: Path) -> None:
    tab.open(report, "#0/samples")
    page = '[data-run="0"] '
    assert len(visible(tab, f"{page}article.answer[data-text]")) == 30
    tab.ask(CLICK.format(selector=f"{page}.more"))
    assert len(visible(tab, f"{page}article.answer[data-text]")) == 40
    type_into(tab, f"{page}.search", "QUESTION 13 bicycle")
    (found,) = visible(tab, f"{page}article.answer[data-text]")
    assert "Question 13 about the bicycle?" in found
    assert visible(tab, f"{page}.found") == ["1 of 40"]
    type_into(tab, f"{page}.search", "nobody said this")
    assert visible(tab, f"{page}.none") == ["Nothing fits."]
    type_into(tab, f"{page}.search", "")
    type_into(tab, f"{page}.outcome", "lost", "change")
    assert set(visible(tab, f"{page}article.answer .badge")) == {"SFT wins"}
    type_into(tab, f"{page}.outcome", "", "change")
    type_into(tab, f"{page}.order", "best", "change")
    gaps = tab.ask(f"[...document.querySelectorAll('{page}article[data-gap]')].map((one) => +one.dataset.gap)")
    assert gaps == sorted(gaps, reverse=True)
    marked = "getComputedStyle(document.querySelector('.ppo mark')).backgroundColor"
    before = tab.ask(marked)
    tab.ask(CLICK.format(selector=f"{page}.marks"))
    assert tab.ask(marked) != before


def test_settings_are_found_and_filtered(tab: Page, report: Path) -> None:
    tab.open(report, "#0/settings")
    rows = '[data-run="0"] .settings tbody tr'
    everything = len(visible(tab, rows))
    tab.ask(CLICK.format(selector='[data-run="0"] .chosen-only'))
    chosen = visible(tab, rows)
    assert 0 < len(chosen) < everything and all("default" not in row.split() for row in chosen)
    tab.ask(CLICK.format(selector='[data-run="0"] .chosen-only'))
    type_into(tab, '[data-run="0"] .search-settings', "kl.coefficient")
    assert len(visible(tab, rows)) == 1


def test_a_pointer_on_a_chart_shows_the_values(tab: Page, report: Path) -> None:
    tab.open(report, "#0/curves")
    box = tab.ask(
        "(() => { const found = document.querySelector('[data-run=\"0\"] .plot').getBoundingClientRect();"
        " return [found.left, found.top, found.width, found.height]; })()"
    )
    left, top, width, height = box
    tab.send("Input.dispatchMouseEvent", type="mouseMoved", x=left + width * 0.96, y=top + height / 2)
    (shown,) = visible(tab, "#tip")
    assert shown.splitlines() == ["round 12", "score 2.485", "reward 2.385"]
    tab.send("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    until(lambda: visible(tab, "#tip") == [])


def test_a_pointer_on_a_logarithmic_chart_finds_the_points_where_they_are_drawn(tab: Page, report: Path) -> None:
    tab.open(report, "#0/reward")
    plot = '[data-run="0"] .page.shown .plot[data-chart*="training pairs"]'
    tab.ask(f"document.querySelector({plot!r}).scrollIntoView({{block: 'center'}})")
    dots = tab.ask(
        f"[...document.querySelectorAll({plot + ' .dot'!r})].map((one) => {{"
        " const box = one.getBoundingClientRect(); return [box.left + box.width / 2, box.top + box.height / 2]; })"
    )
    assert len(dots) == 3
    for (x, y), pairs in zip(dots, (100, 200, 400), strict=True):
        tab.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        until(lambda: visible(tab, "#tip"))
        (shown,) = visible(tab, "#tip")
        assert shown.splitlines()[0] == f"training pairs {pairs}"
        spot = tab.ask(
            f"(() => {{ const box = document.querySelector({plot + ' .spot'!r}).getBoundingClientRect();"
            " return [box.left + box.width / 2, box.top + box.height / 2]; })()"
        )
        assert spot == pytest.approx([x, y], abs=1.5), "the mark is on the dot"


@pytest.mark.parametrize("width", [1200, 390])
def test_texts_of_the_pipeline_do_not_stand_on_each_other(tab: Page, tmp_path: Path, width: int) -> None:
    """Whatever became of the stages, on a wide page and on a phone."""
    state = read_run(whole_run(tmp_path).config.run_dir)
    statuses: tuple[Status, ...] = ("going", "interrupted", "failed", "damaged", "outdated", "waiting", "finished")
    states = [
        replace(state, stages={name: replace(one, status=status, done=1.0) for name, one in state.stages.items()})
        for status in statuses
    ]
    page = tmp_path / "page.html"
    page.write_text(render(states))
    tab.size(width, 900, phone=width < 900)
    try:
        for number, status in enumerate(statuses):
            tab.open(page, f"#{number}/overview")
            texts = "[...document.querySelectorAll('.stage text')].filter((one) => one.checkVisibility())"
            boxes = tab.ask(
                f"{texts}.filter((one) => one.textContent).map((one) => {{ const box = one.getBoundingClientRect();"
                " const card = one.parentNode.querySelector('.card').getBoundingClientRect();"
                " return [one.textContent, box.left, box.right, box.top, box.bottom, card.left, card.right]; })"
            )
            assert len(boxes) >= 16 and status in boxes[1][0]
            for text, left, right, _, _, first, last in boxes:
                assert first < left and right < last, f"{text} leaves its card"
            for one, other in combinations(boxes, 2):
                beside = one[2] + 4 <= other[1] or other[2] + 4 <= one[1]
                # A line's box is a little taller than its letters.
                apart = one[4] <= other[3] + 2 or other[4] <= one[3] + 2
                assert beside or apart, f"{one[0]} and {other[0]}"
    finally:
        tab.size(1200, 900)


def test_light_and_dark_follow_the_device_and_the_button(tab: Page, report: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    tab.open(report)
    light = tab.ask(ground)
    tab.size(1200, 900, dark=True)
    dark = tab.ask(ground)
    assert light != dark
    tab.ask(CLICK.format(selector="#theme"))
    assert tab.ask(ground) == light and "light" in tab.ask("document.getElementById('theme').textContent")
    tab.size(1200, 900)
    tab.ask(CLICK.format(selector="#theme"))
    assert tab.ask(ground) == dark
    tab.ask(CLICK.format(selector="#theme"))
    assert tab.ask(ground) == light


def test_texts_are_readable_on_their_ground(tab: Page, report: Path) -> None:
    """Contrast of at least 4.5 for the page's text colours (WCAG 2, AA), light and dark."""
    script = """
    (() => {
      const shade = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
      const light = (hex) => { const parts = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16) / 255)
        .map((one) => one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]; };
      const contrast = (a, b) => { const [x, y] = [light(shade(a)), light(shade(b))].sort((p, q) => q - p);
        return (x + 0.05) / (y + 0.05); };
      const pairs = [["--text", "--ground"], ["--text", "--card"], ["--soft", "--card"], ["--soft", "--sunk"],
        ["--quiet", "--card"], ["--quiet", "--ground"], ["--quiet", "--sunk"],
        ["--good", "--good-soft"], ["--bad", "--bad-soft"],
        ["--warn", "--warn-soft"], ["--accent", "--accent-soft"], ["--accent", "--card"]];
      return pairs.map(([a, b]) => [a, b, contrast(a, b)]).filter((one) => one[2] < 4.5);
    })()"""
    for dark in (False, True):
        tab.size(1200, 900, dark=dark)
        tab.open(report)
        assert tab.ask(script) == []
    tab.size(1200, 900)


def test_nothing_hostile_runs(tab: Page, tmp_path: Path) -> None:
    page = write_report([hostile_run(tmp_path)], tmp_path / "page.html")
    for part in ("overview", "curves", "reward", "samples", "data", "settings", "lineage"):
        tab.open(page, f"#0/{part}")
        assert tab.ask("typeof window.hacked") == "undefined"
    tab.open(page, "#0/curves")
    event = "new PointerEvent('pointermove', {clientX: 300, clientY: 300})"
    tab.ask(f"document.querySelectorAll('.plot').forEach((one) => one.dispatchEvent({event}))")
    assert tab.ask("typeof window.hacked") == "undefined"
    assert tab.ask("document.querySelectorAll('#tip script, #tip img').length") == 0


def test_without_scripts_everything_is_there(tab: Page, report: Path) -> None:
    tab.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.send("Page.navigate", url=report.resolve().as_uri())
        time.sleep(0.5)
    finally:
        tab.send("Emulation.setScriptExecutionDisabled", value=False)
    assert len(visible(tab, "article.answer[data-text]")) == 80
