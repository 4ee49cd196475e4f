"""The report: one file that says how a run went, whatever state the run is in, and never runs what it shows."""

from __future__ import annotations

import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from finished_stages import light_config, publish, publish_all
from reported_run import HOSTILE, answers, hostile_run, judged, lines, whole_run, write_metrics, write_samples
from tiny_models import tiny_config
from typer.testing import CliRunner, Result

from flows.cli import app
from flows.report import LiveReport, kept_up, render, write_report
from flows.report_views import differences, turns
from pipeline.config_file import load_config
from pipeline.errors import RunDirectoryError
from pipeline.run_directory import RunDirectory
from pipeline.run_state import read_run


class Seen(HTMLParser):
    """Elements that a browser would make of a page, its texts, and whether all that is opened is closed."""

    VOID = ("meta", "link", "input", "br", "hr", "img")

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def having(self, name: str, value: str | None = None) -> list[dict[str, str]]:
        return [found for _, found in self.elements if name in found and value in (None, found[name])]


def page_of(*folders: str | Path) -> Seen:
    return Seen(render([read_run(folder) for folder in folders]))


def trivet(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# -- a whole run


def test_the_page_says_what_came_out(tmp_path: Path) -> None:
    loaded = whole_run(tmp_path)
    page = page_of(loaded.config.run_dir)
    figures = judged(answers())["win_rate"]["gold"]
    for text in (
        "PPO is better than SFT",
        f"{100 * figures['value']:.0f}% [{100 * figures['low']:.0f}%, {100 * figures['high']:.0f}%]",
        f"{figures['wins']} won",
        f"{figures['losses']} lost",
        "held-out loss 3 → 2.5",
        "accuracy 0.85 [0.74, 0.92]",
        "Score against KL",
        "Gold against KL",
        "Critic's explained variance",
        "Is the reward model any good?".lower(),
        "The preferred answer is ...",
        "Column subset",
        "Question 7 about the bicycle?",
        "5 duplicate",
        "ppo.kl.coefficient",
        read_run(loaded.config.run_dir).stages["ppo"].manifest.digest[:12],  # type: ignore[union-attr]
    ):
        assert text in page.text, text
    assert len(page.having("data-chart")) >= 12
    assert len(page.having("data-outcome")) == 40
    status = [found for _, found in page.elements if "is-finished" in found.get("class", "")]
    assert len(status) >= 4


def test_it_needs_nothing_but_itself(tmp_path: Path) -> None:
    page = page_of(whole_run(tmp_path).config.run_dir)
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "base", "img"), tag
        for name in ("src", "href", "action", "srcset", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")], "handlers belong to the script"
    (policy,) = [found["content"] for found in page.having("http-equiv", "Content-Security-Policy")]
    assert policy.startswith("default-src 'none'")
    style = (Path(__file__).parents[2] / "flows" / "report_page" / "page.css").read_text()
    assert "@import" not in style and "url(" not in style


def test_settings_come_with_their_origins(tmp_path: Path) -> None:
    loaded = load_config(light_config(tmp_path, seed=7), ["ppo.kl.coefficient=0.125"])
    RunDirectory.open(loaded)
    page = page_of(loaded.config.run_dir)
    rows = {found["data-text"].split()[0]: "data-chosen" in found for found in page.having("data-text")}
    assert rows["seed"] and rows["ppo.kl.coefficient"] and not rows["ppo.clip_range"]
    assert "ppo.kl.coefficient 0.125 override" in page.text
    assert "seed 7 file" in page.text
    assert "ppo.critic_learning_rate 1e-05 inherited from ppo.learning_rate" in page.text


def test_gates_are_shown_with_their_thresholds(tmp_path: Path) -> None:
    loaded = whole_run(tmp_path, gates={"min_reward_accuracy": 0.9, "max_kl": 50.0})
    text = page_of(loaded.config.run_dir).text
    assert "missed: lower bound of the accuracy on held-out pairs 0.74, wanted at least 0.9" in text
    assert "passed: upper bound of the KL to SFT on held-out prompts, in nats an answer, 4.5, wanted at most 50" in text


def test_words_that_differ_are_marked() -> None:
    before, after = differences("I like the red door.", "I like the old green door. Yes")
    assert before == "I like the <mark>red</mark> door."
    assert after == "I like the <mark>old green</mark> door. <mark>Yes</mark>"
    assert differences("same", "same") == ("same", "same")
    assert differences("", "new") == ("", "<mark>new</mark>")
    # One word in common between two changes is no island.
    assert differences("a b c the d e f", "u v w the x y z")[0] == "<mark>a b c the d e f</mark>"


@pytest.mark.parametrize("texts", [("a " * 3000, "b " * 3000), ("<b>" * 2000, "")])
def test_long_answers_are_not_compared_word_by_word(texts: tuple[str, str]) -> None:
    started = time.monotonic()
    before, _ = differences(*texts)
    assert time.monotonic() - started < 0.5
    assert "<mark>" not in before and "<b>" not in before


def test_conversations_are_read_turn_by_turn() -> None:
    assert turns([{"role": "user", "content": "Hi"}]) == [("user", "Hi")]
    assert turns("plain") == [("", "plain")]
    assert turns(["odd", {"content": 5}]) == [("", "5")]
    assert turns(None) == [("", "")]


def test_the_learning_curve_is_drawn_told_and_written_out(tmp_path: Path) -> None:
    loaded = whole_run(tmp_path)
    curve = read_run(loaded.config.run_dir).curve
    assert curve is not None
    page = page_of(loaded.config.run_dir)
    for text in ("Would more pairs help?", curve.headline, curve.sentence, "Accuracy by training pairs"):
        assert text in page.text, text
    for one in curve.points:  # the table, for those who do not see the picture
        figures = f"{one.accuracy.value:.2f} [{one.accuracy.low:.2f}, {one.accuracy.high:.2f}]"
        assert re.search(rf"{one.fraction:g} {one.pairs} {re.escape(figures)}.* {one.longer_wins.value:.2f}", page.text)
    charts = [json.loads(found["data-chart"]) for found in page.having("data-chart")]
    (drawn,) = [chart for chart in charts if chart["log"]]
    shown = [[point.pairs, float(f"{point.accuracy.value:.5g}")] for point in curve.points]
    assert drawn["lines"][0]["points"] == shown
    assert drawn["range"][0] == 100 and drawn["range"][1] == 400


def test_a_learning_curve_stands_alone_and_says_what_is_no_part_of_it(tmp_path: Path) -> None:
    """A run whose own reward model has been replaced by an unfinished one."""
    run = RunDirectory(whole_run(tmp_path).config.run_dir)
    path = run.learning_curve / "curve.json"
    points = json.loads(path.read_text())["points"]
    shutil.rmtree(run.stage("reward"))
    path.write_text(json.dumps({"points": points[:2]}))
    text = page_of(run.root).text
    assert "Would more pairs help?" in text and "There are no scores of held-out pairs" not in text
    assert "is the reward model any good?" not in text
    path.write_text(json.dumps({"points": [points[0] | {"reward": "0"}]}))
    page = page_of(run.root)
    assert "Left out: 0.25: another reward model lies there by now." in page.text
    assert not [found for found in page.having("data-chart") if json.loads(found["data-chart"])["log"]]


# -- texts that are not to be obeyed


def test_no_text_becomes_an_element(tmp_path: Path) -> None:
    page = page_of(hostile_run(tmp_path))
    assert [tag for tag, _ in page.elements].count("script") == 1, "the page's own"
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert not page.having("onerror") and not page.having("src")
    assert page.text.count(HOSTILE) > 40, "it is all there to be read"
    for _, attributes in page.elements:
        if "data-chart" in attributes:
            json.loads(attributes["data-chart"])


# -- runs that are not whole


def test_a_run_that_has_begun_shows_what_there_is(tmp_path: Path) -> None:
    loaded = load_config(light_config(tmp_path))
    run = RunDirectory.open(loaded)
    assert "Not judged yet" in page_of(run.root).text
    publish("sft", loaded, run)
    write_metrics(run, "ppo", rounds=6)
    write_samples(run, rounds=6)
    with run.locked("ppo", warn=print):
        page = page_of(run.root)
    for text in ("ppo is at work, 6% done", "It is round 6.", "round 6", "There are no scores of held-out pairs"):
        assert text in page.text, text
    assert page.having("data-going"), "the page looks for news"
    assert page.having("data-chart")
    again = page_of(run.root)
    assert "ppo was interrupted" in again.text and not again.having("data-going")


def test_a_run_without_a_reward_model_says_so(tmp_path: Path) -> None:
    data = {kind: {"sources": f"{kind}.jsonl"} for kind in ("instructions", "prompts")}
    path = light_config(tmp_path, data=data, ppo={"rewards": [{"function": "judge.py:score"}]})
    page = page_of(RunDirectory.open(load_config(path)).root)
    assert "This run has no reward model" in page.text


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = RunDirectory(whole_run(tmp_path).config.run_dir)
    (run.root / "config.json").write_text("{")
    (run.stage("sft") / "adapter.txt").write_text("flipped")
    for path in (run.metrics("ppo"), run.stage("evaluate") / "answers.jsonl"):
        path.write_text("garbage\n" + path.read_text())
    page = page_of(run.root)
    for text in (
        "Not everything could be read",
        "config.json",
        "ppo.jsonl, line 1",
        "answers.jsonl, line 1",
        "adapter.txt",
    ):
        assert text in page.text, text
    assert "PPO is better than SFT" in page.text and "held-out loss 3 → 2.5" in page.text
    assert len(page.having("data-outcome")) == 40


def test_figures_that_are_no_numbers_are_gaps(tmp_path: Path) -> None:
    loaded = load_config(light_config(tmp_path))
    run = RunDirectory.open(loaded)
    nan = float("nan")
    write_metrics(run, "reward", rounds=6, accuracy=[0.5, 0.6, nan, 0.7, 0.8, 0.9])
    page = page_of(run.root)
    charts = [json.loads(found["data-chart"]) for found in page.having("data-chart")]
    accuracy = next(chart for chart in charts if chart["unit"] == "share of pairs")
    assert [value for _, value in accuracy["lines"][0]["points"]] == [0.5, 0.6, None, 0.7, 0.8, 0.9]
    assert "nan" not in page.text.casefold().split()


def test_scores_that_are_no_numbers_break_nothing(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = answers(6)
    rows[0]["scores"] = {"gold": {"sft": float("nan"), "ppo": 1.0}}
    rows[1]["scores"] = None
    rows[2] = {"unexpected": True}
    rows[3] |= {"sft": None, "ppo": ["a", "b"], "prompt": 7}
    loaded = load_config(light_config(tmp_path))
    run = RunDirectory.open(loaded)
    for stage in ("sft", "reward", "ppo"):
        publish(stage, loaded, run)  # type: ignore[arg-type]
    publish("evaluate", loaded, run, metrics=judged(answers(6)), files={"answers.jsonl": lines(rows)})
    assert len(page_of(run.root).having("data-outcome")) == 6


def test_a_run_that_is_not_there_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    whole_run(tmp_path, name="first")
    result = trivet("report", tmp_path / "frist")
    assert result.exit_code == 2
    assert "there is no such folder" in result.stderr and str(tmp_path / "first") in result.stderr
    with pytest.raises(RunDirectoryError, match="no run here"):
        write_report([tmp_path])


def test_a_page_that_cannot_be_written_says_how_to_name_another_place(tmp_path: Path) -> None:
    run = RunDirectory.open(load_config(light_config(tmp_path)))
    (tmp_path / "file").write_text("")
    result = trivet("report", run.root, "-o", tmp_path / "file" / "page.html")
    assert result.exit_code == 2 and "name another place with -o" in result.stderr, result.output
    assert "run_dir" not in result.stderr
    run.report.mkdir()
    assert "run_dir=" in trivet("report", run.root).stderr, "its own page belongs into its folder"


# -- several runs


def test_several_runs_stand_beside_each_other(tmp_path: Path) -> None:
    first = whole_run(tmp_path / "a", name="first", ppo={"kl": {"coefficient": 0.02}})
    second = whole_run(tmp_path / "b", name="second", seed=1)
    result = trivet("report", first.config.run_dir, second.config.run_dir)
    assert result.exit_code == 0, result.output
    target = tmp_path / "comparison.html"
    assert f"The report: {target}" in result.stdout.replace("\n", "")
    page = Seen(target.read_text())
    assert [found["data-run"] for found in page.having("data-run")] == ["compare", "0", "1"]
    assert "first second" in page.text
    assert re.search(r"ppo\.kl\.coefficient 0\.02 0\.05", page.text), "what differs between them"
    assert "ppo.clip_range 0.2 0.2" not in page.text
    overlaid = [json.loads(found["data-chart"]) for found in page.having("data-chart")]
    assert any([line["name"] for line in chart["lines"]] == ["first", "second"] for chart in overlaid)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [whole_run(tmp_path / part, name="run").config.run_dir for part in ("a", "b")]
    text = page_of(*folders).text
    assert "a/run" in text and "b/run" in text
    assert "the same settings" not in text, "their folders differ"


def begun_run(folder: Path, **figures: list[float]) -> Path:
    """A run whose PPO has come a few rounds."""
    run = RunDirectory.open(load_config(light_config(folder, run_dir=str(folder / "exp"))))
    write_metrics(run, "ppo", rounds=6)
    rows = [json.loads(line) for line in run.metrics("ppo").read_text().splitlines()]
    for name, values in figures.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    run.metrics("ppo").write_text(lines(rows))
    return run.root


def charts(page: Seen) -> list[dict[str, Any]]:
    return [json.loads(found["data-chart"]) for found in page.having("data-chart")]


def test_curves_of_runs_of_one_name_are_told_apart_however_deep_the_names_are_common(tmp_path: Path) -> None:
    page = page_of(*[begun_run(tmp_path / part / "p" / "q") for part in ("a", "b")], begun_run(tmp_path / "c"))
    names = ["a/p/q/exp", "b/p/q/exp", "c/exp"]
    assert [line["name"] for line in charts(page)[0]["lines"]] == names
    assert " ".join(names) in page.text, "the legend"


def test_from_the_seventh_run_on_lines_are_dashed(tmp_path: Path) -> None:
    page = page_of(*[begun_run(tmp_path / f"run{number}") for number in range(8)])
    drawn = [found["class"] for found in page.having("points") if found["class"].startswith("mark line")]
    assert drawn[:8] == [f"mark line c{n}" for n in range(1, 7)] + ["mark line c1 dashes1", "mark line c2 dashes1"]
    legend = [found["class"] for tag, found in page.elements if tag == "li"]
    assert legend[6] == "line c1 dashes1"


def test_a_round_without_score_or_kl_is_a_gap_in_score_against_kl(tmp_path: Path) -> None:
    """Not joined over, and with no place of its own under the pointer."""
    nan = float("nan")
    root = begun_run(
        tmp_path,
        **{"objective/score": [0, 1, nan, 3, 4, 5], "kl/policy_reference_k1": [0.01, 0.04, 0.09, 0.16, nan, 0.36]},
    )
    page = page_of(root)
    chart = next(one for one in charts(page) if one["x"] == "square root of the KL to SFT in nats an answer")
    assert chart["lines"][0]["points"] == [[0.1, 0], [0.2, 1], [0.4, 3], [0.6, 5]]
    paths = [found["points"].split() for found in page.having("points") if "path" in found["class"]]
    assert [len(path) for path in paths] == [2], "the other two stand alone"


def test_gold_stands_against_the_square_root_of_kl(tmp_path: Path) -> None:
    """While PPO learned, and of the evaluation's own answers: SFT's at 0."""
    page = page_of(whole_run(tmp_path).config.run_dir)
    chart = next(one for one in charts(page) if one["unit"] == "the gold measure's score")
    learning, evaluated = chart["lines"]
    assert [y for _, y in learning["points"]] == [0.9, 1.1, 0.7]
    assert [x for x, _ in learning["points"]] == pytest.approx([1.2**0.5, 2.4**0.5, 3.6**0.5], abs=1e-3)
    scores = judged(answers())["mean_score"]["gold"]
    assert [x for x, _ in evaluated["points"]] == [0, 2.0]
    assert [y for _, y in evaluated["points"]] == pytest.approx(
        [scores[who]["value"] for who in ("sft", "ppo")], abs=1e-3
    )


def test_extreme_figures_break_nothing(tmp_path: Path) -> None:
    root = begun_run(tmp_path, **{"objective/score": [1e308, -1e308, 1, 2, 3, 1e308]})
    result = trivet("report", root)
    assert result.exit_code == 0, result.output
    assert "1e+308" not in (root / "report.html").read_text()
    assert trivet("show", root).exit_code == 0


def test_a_run_named_twice_is_one(tmp_path: Path) -> None:
    folder = whole_run(tmp_path).config.run_dir
    assert trivet("report", folder, Path(folder) / ".." / Path(folder).name).exit_code == 0
    assert not Seen((Path(folder) / "report.html").read_text()).having("data-run", "compare")


# -- the command, and runs that are going


def test_the_command_takes_a_config_as_well(tmp_path: Path) -> None:
    loaded = whole_run(tmp_path)
    target = tmp_path / "deep" / "page.html"
    result = trivet("report", loaded.path, "--output", target)
    assert result.exit_code == 0, result.output
    assert "PPO is better than SFT" in target.read_text()
    assert not RunDirectory(loaded.config.run_dir).report.exists()


def test_a_stage_command_leaves_a_report(tmp_path: Path) -> None:
    loaded = whole_run(tmp_path)
    result = trivet("evaluate", loaded.path)
    assert result.exit_code == 0, result.output
    report = RunDirectory(loaded.config.run_dir).report
    assert f"The report: {report}" in result.stdout.replace("\n", "")
    assert "torch" in Seen(report.read_text()).text, "the versions of the summary"


def test_a_stage_that_fails_says_so_on_the_page(tmp_path: Path) -> None:
    """The real thing: a stage in processes of its own that ends with an error."""
    (tmp_path / "rows.py").write_text(
        "import os\n"
        "def rows():\n"
        "    if os.environ.get('TRIVET_PROGRESS'): raise ValueError('no rows <b>today</b>')\n"  # as in a stage alone
        "    yield {'prompt': 'p', 'completion': 'c'}\n"
    )
    loaded = tiny_config(tmp_path)
    result = trivet("sft", loaded.path, f"data.instructions.sources={tmp_path}/rows.py:rows")
    assert result.exit_code != 0
    state = read_run(loaded.config.run_dir)
    assert state.stages["sft"].status == "failed", state.stages["sft"]
    page = Seen(RunDirectory(loaded.config.run_dir).report.read_text())
    assert "sft failed" in page.text and "no rows <b>today</b>" in page.text
    assert "sft failed, reward waiting" in trivet("runs", loaded.config.run_dir).stdout


def test_a_report_is_kept_up_while_the_run_goes_on_and_when_it_fails(tmp_path: Path, monkeypatch: Any) -> None:
    loaded = load_config(light_config(tmp_path))
    run = RunDirectory.open(loaded)
    told: list[str] = []
    with pytest.raises(RuntimeError, match="stage"), kept_up(run.root, told.append) as live:
        assert "Not judged yet" in run.report.read_text()
        publish("sft", loaded, run)
        live.look()
        assert "held-out loss 3" not in run.report.read_text(), "the page is young yet"
        monkeypatch.setattr("flows.report._SECONDS_BETWEEN_REPORTS", 0.0)
        live.look()
        assert "held-out loss 3" in run.report.read_text()
        publish("reward", loaded, run)
        raise RuntimeError("stage")
    assert "accuracy 0.75" in run.report.read_text()
    assert told == []


def test_a_report_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    run = RunDirectory.open(load_config(light_config(tmp_path)))
    run.report.mkdir()
    told: list[str] = []
    live = LiveReport(run.root, told.append)
    live.write()
    live.write()
    assert len(told) == 1 and "the run's report cannot be written" in told[0]
    LiveReport(tmp_path / "no-run", told.append).write()
    assert len(told) == 1


def test_the_picture_shows_which_stage_starts_from_which(tmp_path: Path) -> None:
    """Drawn wide and narrow: four arrows each, and three where the reward model takes nothing from SFT."""
    apart = {"start_from": "base", "calibrate_on": "base"}
    for settings, arrows in (({}, 8), ({"reward": apart}, 6)):
        folder = tmp_path / str(arrows)
        publish_all(light_config(folder, **settings))
        assert len(page_of(folder / "run").having("class", "arrow")) == arrows


def test_yardsticks_and_length_controlled_rates_are_shown(tmp_path: Path) -> None:
    loaded = load_config(light_config(tmp_path))
    run = RunDirectory.open(loaded)
    for stage in ("sft", "reward", "ppo"):
        publish(stage, loaded, run)  # type: ignore[arg-type]
    figures = judged(answers())
    fair = {"value": 0.61, "low": 0.52, "high": 0.7, "n": 40}
    against = {"win_rate": {"gold": figures["win_rate"]["gold"]}, "length_controlled_win_rate": {"gold": fair}}
    figures |= {
        "length_controlled_win_rate": {"gold": fair},
        "against_base": against,
        "best_of_n": {"n": 8, "kl": 1.2044, **against},
        "perplexity": {"sft": 5.5, "ppo": 6.25, "rows": 30},
    }
    figures["mean_score"]["gold"]["base"] = figures["mean_score"]["gold"]["sft"]
    publish("evaluate", loaded, run, metrics=figures, files={"answers.jsonl": lines(answers())})
    text = Seen(render([read_run(run.root)])).text
    assert "PPO against" in text and "the base" in text
    assert "the best of 8 answers of SFT (KL at most 1.20 nats)" in text
    assert "5.50 → 6.25" in text and "length-controlled" in text
    assert text.count("0.61 [0.52, 0.70]") == 5, "three tables, and the pipeline drawn wide and narrow"


def test_without_yardsticks_there_is_no_such_table(tmp_path: Path) -> None:
    assert "PPO against" not in Seen(render([read_run(whole_run(tmp_path).config.run_dir)])).text
