"""What the report's template shows of a run: the figures ready to print, and texts whose differences are marked.

What is marked as safe here was made of numbers and of escaped texts; the template escapes everything else.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import Any

from markupsafe import Markup, escape

from flows.curves import Chart
from flows.gates import verdicts_on
from flows.pipeline_picture import TITLES, pictures
from flows.report_charts import calibration_chart, charts_of, compared, inside, lead_chart, learning_chart, length_chart
from flows.summary import figures_of
from flows.verdict import Judgement, Verdict, as_estimate, judge_name, score_gap, verdict_of
from pipeline import scored_pairs
from pipeline.finished_run import SPEAKERS
from pipeline.memory import megabytes
from pipeline.progress import duration
from pipeline.run_state import JudgedPairs, RunState, StageState
from pipeline.scored_pairs import Baseline, Bin, ScoredPair, Slice
from pipeline.statistics import Estimate, win_rate
from pipeline.task_scores import TaskScore

_MOST_ANSWERS = 500
_MOST_ROUNDS = 200
_MOST_WORDS = 1500
_WORDS = re.compile(r"(?:\w+|[^\w\s])\s*|\s+")
_NOTHING = "-"


class RunView:
    """A run as the template shows it."""

    def __init__(self, state: RunState, name: str) -> None:
        self.state, self.name = state, name
        self.verdict: Verdict = verdict_of(state)
        self.stages: list[StageState] = list(state.stages.values())
        self.titles = TITLES
        self.status = state.status

    @cached_property
    def picture(self) -> Markup:
        """The pipeline."""
        return Markup(pictures(self.state))

    @cached_property
    def charts(self) -> dict[str, list[Chart]]:
        """By stage, PPO's first."""
        return charts_of(self.state)

    @cached_property
    def judgements(self) -> list[Judgement]:
        """The deciding one first."""
        first = self.verdict.judgement
        return [] if first is None else [first, *self.verdict.others]

    @cached_property
    def yardsticks(self) -> list[Yardstick]:
        """PPO against others than SFT: the base, and the best of n answers of SFT."""
        figures = self.state.stages["evaluate"].figures if "evaluate" in self.state.stages else {}
        return list(_yardsticks(figures))

    @cached_property
    def tasks(self) -> list[TaskRow]:
        """Scores on tasks of lm-evaluation-harness."""
        return task_rows(self.state)

    @property
    def seconds(self) -> float:
        """Of all finished stages together."""
        return sum(stage.manifest.seconds for stage in self.stages if stage.manifest is not None)

    @property
    def peak_memory(self) -> int:
        """Bytes, of the stage that took most."""
        return max((stage.manifest.peak_memory_bytes for stage in self.stages if stage.manifest is not None), default=0)

    @cached_property
    def tiles(self) -> list[tuple[str, str, str]]:
        """The figures beside the verdict: name, value, and what belongs to it."""
        figures = {stage.name: stage.figures for stage in self.stages}
        found: list[tuple[str, str, str]] = []
        first = self.verdict.judgement
        if first is not None and first.before is not None and first.after is not None:
            gap = first.difference
            note = f"{gap.value:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]" if gap is not None else "SFT → PPO"
            found.append((f"Mean score, {first.judge}", f"{first.before.value:.2f} → {first.after.value:.2f}", note))
        if (kl := as_estimate(figures.get("evaluate", {}).get("kl"))) is not None:
            found.append(("KL to SFT", f"{kl.value:.1f}", f"[{kl.low:.1f}, {kl.high:.1f}] nats an answer"))
        if (change := _lengths(figures.get("evaluate", {}))) is not None:
            found.append(("Answer length", change, "tokens, SFT → PPO"))
        if (accuracy := as_estimate(figures.get("reward", {}).get("held_out_accuracy"))) is not None:
            note = f"[{accuracy.low:.2f}, {accuracy.high:.2f}] of {accuracy.n} held-out pairs"
            found.append(("Reward accuracy", f"{accuracy.value:.2f}", note))
        kept, forgotten = (inside(figures.get("evaluate", {}), "perplexity", name) for name in ("sft", "ppo"))
        if isinstance(kept, (int, float)) and isinstance(forgotten, (int, float)):
            found.append(("Perplexity, SFT's data", f"{kept:.2f} → {forgotten:.2f}", "held out; a rise is forgetting"))
        before, after = (figures.get("sft", {}).get(f"held_out_loss_{when}") for when in ("before", "after"))
        if isinstance(before, (int, float)) and isinstance(after, (int, float)):
            found.append(("SFT loss, held out", f"{before:.2f} → {after:.2f}", "nats a token"))
        if self.seconds:
            found.append(("Time and memory", duration(self.seconds), f"at most {megabytes(self.peak_memory)}"))
        return found

    @cached_property
    def gates(self) -> list[tuple[str, bool]]:
        """The config's thresholds and whether they are met."""
        config = self.state.checked_config
        if config is None:
            return []
        found = []
        for stage in self.stages:
            # A result of another version may lack what the thresholds are about.
            with suppress(KeyError, TypeError, AttributeError):
                verdicts = verdicts_on(stage.name, stage.figures, config) if stage.figures else ()
                found += [(verdict.line, verdict.passed) for verdict in verdicts]
        return found

    @cached_property
    def figures(self) -> list[tuple[StageState, list[tuple[str, str]]]]:
        """Every final figure of every stage."""
        return [(stage, list(figures_of(stage.figures))) for stage in self.stages if stage.figures]

    @cached_property
    def reward(self) -> RewardView | None:
        """What the reward page shows; None where nothing was scored."""
        if not self.state.held_out and not self.state.judged and self.state.curve is None:
            return None
        return RewardView(self.state)

    @cached_property
    def answers(self) -> list[AnswerView]:
        """The held-out answers side by side."""
        judge = self.verdict.judgement.judge if self.verdict.judgement else ""
        return [AnswerView(row, judge) for row in self.state.answers[:_MOST_ANSWERS]]

    @property
    def answers_left_out(self) -> int:
        """How many of the evaluation's answers the page does not show."""
        stage = self.state.stages["evaluate"]
        judged = stage.figures.get("n")
        return max(0, int(judged) - len(self.answers)) if isinstance(judged, int) and self.answers else 0

    @cached_property
    def rounds(self) -> list[dict[str, Any]]:
        """What the policy said while it learned, the newest first."""
        rows = [
            {
                "step": row.get("step"),
                "prompt": turns(row.get("prompt")),
                "response": turns(row.get("response")),
                "score": row.get("score"),
            }
            for row in self.state.rounds
        ]
        return rows[-_MOST_ROUNDS:][::-1]

    @cached_property
    def data(self) -> list[DataView]:
        """What each source gave, stage by stage."""
        return [
            DataView(TITLES[stage.name], [row for row in reports if isinstance(row, Mapping)])
            for stage in self.stages
            if stage.manifest is not None and isinstance(reports := stage.manifest.extra.get("data"), list)
        ]

    @cached_property
    def settings(self) -> list[tuple[str, str, str, bool]]:
        """Key, value, origin, and whether somebody chose it."""
        return [
            (key, json.dumps(value, ensure_ascii=False), origin or "", origin not in (None, "default"))
            for key, value, origin in self.state.settings
        ]

    @property
    def has_origins(self) -> bool:
        """Whether it is known where settings came from."""
        return any(origin for _, _, origin, _ in self.settings)

    @cached_property
    def lineage(self) -> list[dict[str, Any]]:
        """What each result was made from, by digest."""
        digests = {stage.name: stage.manifest.digest for stage in self.stages if stage.manifest is not None}
        rows = []
        for stage in self.stages:
            if (manifest := stage.manifest) is None:
                continue
            parents = [(name, wanted, digests.get(name) == wanted) for name, wanted in manifest.parents.items()]  # type: ignore[call-overload]
            data = manifest.inputs.get("data", {})
            kinds = [(kind, text) for kind, text in data.items() if isinstance(text, str) and len(text) == 64]
            rows.append({"stage": stage, "manifest": manifest, "parents": parents, "data": kinds})
        return rows

    @property
    def versions(self) -> Mapping[str, Any]:
        """Of the libraries that the run used."""
        found = self.state.summary.get("versions")
        return found if isinstance(found, Mapping) else {}

    @property
    def machine(self) -> Mapping[str, Any]:
        """Where it ran."""
        found = self.state.summary.get("machine")
        return found if isinstance(found, Mapping) else {}

    @property
    def times(self) -> list[tuple[str, str]]:
        """When the run began and ended, as far as is known."""
        return [(name, str(self.state.summary[name])) for name in ("started", "finished") if name in self.state.summary]

    @property
    def probe(self) -> list[tuple[str, str]]:
        """PPO's start-up checks, as they were measured."""
        manifest = self.state.stages["ppo"].manifest
        gates = manifest.extra.get("gates") if manifest is not None else None
        return list(figures_of(gates)) if isinstance(gates, Mapping) else []


class RewardView:
    """Whether the reward model is any good."""

    def __init__(self, state: RunState) -> None:
        self.pairs: Sequence[ScoredPair] = state.held_out
        self.judged = [JudgedView(one) for one in state.judged]
        self.curve = state.curve
        self.curve_chart = None
        if state.curve is not None and len(state.curve.points) > 1:
            self.curve_chart = learning_chart(state.curve)
        if not self.pairs:
            return
        self.accuracy = scored_pairs.accuracy(self.pairs)
        self.longer = scored_pairs.longer_wins(self.pairs)
        self.log_loss = scored_pairs.log_loss(self.pairs)
        self.correlation = scored_pairs.length_correlation(self.pairs)
        self.bins: list[Bin] = scored_pairs.calibration(self.pairs, 10 if len(self.pairs) >= 300 else 5)
        self.calibration_error = scored_pairs.calibration_error(self.bins)
        self.slices: dict[str, list[Slice]] = scored_pairs.slices(self.pairs)
        self.baselines: list[Baseline] = [
            one for one in scored_pairs.baselines(self.pairs) if one.model_where_right or one.model_where_wrong
        ]
        self.hardest = [PairView(pair) for pair in scored_pairs.hardest(self.pairs)]
        self.charts = [calibration_chart(self.bins), length_chart(self.pairs), lead_chart(self.pairs)]
        self.agreement = _agreement(state)

    @property
    def headline(self) -> str:
        """In a few words."""
        if self.accuracy.low <= 0.5:
            return "The reward model cannot be told from a coin"
        if self.accuracy.low > self.longer.high:
            return "The reward model is right far more often than “the longer answer wins”"
        if self.accuracy.value > self.longer.value:
            return "The reward model beats a coin; that it beats length alone is not certain"
        return "The reward model beats a coin, but not “the longer answer wins”"


class JudgedView:
    """A further file of pairs."""

    def __init__(self, judged: JudgedPairs) -> None:
        self.name, self.about = judged.name, judged.about
        self.accuracy = scored_pairs.accuracy(judged.pairs)
        self.longer = scored_pairs.longer_wins(judged.pairs)
        self.subsets = scored_pairs.subsets(judged.pairs)
        self.hardest = [PairView(pair) for pair in scored_pairs.hardest(judged.pairs, 4)]
        dropped = judged.about.get("dropped")
        self.dropped = dropped if isinstance(dropped, Mapping) else {}


class PairView:
    """A pair of which the reward model prefers the wrong answer."""

    def __init__(self, pair: ScoredPair) -> None:
        self.pair = pair
        self.prompt = turns(pair.prompt)
        chosen, rejected = scored_pairs.plain_text(pair.chosen), scored_pairs.plain_text(pair.rejected)
        self.has_texts = pair.chosen is not None
        self.rejected, self.chosen = differences(rejected, chosen)
        self.where = f"{_source_name(pair.source)}, row {pair.row}"


class AnswerView:
    """Both answers to a prompt, with their differences marked, and what each judge gave them."""

    def __init__(self, row: Mapping[str, Any], judge: str) -> None:
        sft, ppo = scored_pairs.plain_text(row.get("sft")), scored_pairs.plain_text(row.get("ppo"))
        self.prompt = turns(row.get("prompt"))
        self.sft, self.ppo = differences(sft, ppo)
        self.source = _source_name(str(row.get("source", "")))
        scores = row.get("scores")
        self.scores = [
            (str(name), found.get("sft"), found.get("ppo"))
            for name, found in (scores.items() if isinstance(scores, Mapping) else ())
            if isinstance(found, Mapping)
        ]
        self.gap = score_gap(row, judge)
        self.outcome = "" if self.gap is None else "won" if self.gap > 0 else "lost" if self.gap < 0 else "tied"
        self.found_by = " ".join([scored_pairs.plain_text(row.get("prompt")), sft, ppo]).casefold()
        self.length = len(ppo)


@dataclass(frozen=True)
class Yardstick:
    """What one judge says of PPO against another than SFT; `before` is the other's mean score, `after` PPO's."""

    name: str
    judge: str
    win_rate: Estimate
    length_controlled: Estimate | None
    before: Estimate | None
    after: Estimate | None


@dataclass(frozen=True)
class TaskRow:
    """A metric of a task, with what each speaker scored, or a dash."""

    task: str
    metric: str
    rows: int
    examples: str
    values: Mapping[str, str]
    outdated: Sequence[str]


def task_rows(state: RunState) -> list[TaskRow]:
    """Scores on tasks of lm-evaluation-harness; side by side where they were asked alike.

    A speaker whose adapter has been replaced since is named as outdated.
    """
    digests = {name: stage.manifest.digest for name, stage in state.stages.items() if stage.manifest is not None}
    now = {"base": None, "sft": digests.get("sft"), "policy": digests.get("ppo")}
    found: dict[tuple[object, ...], dict[str, TaskScore]] = {}
    outdated = [one.who for one in state.tasks if one.adapter != now.get(one.who)]
    for speaker in state.tasks:
        for score in speaker.scores:
            found.setdefault(score.setting, {})[speaker.who] = score
    rows = []
    for scores in found.values():
        first = next(iter(scores.values()))
        values: dict[str, str] = {who: _score_text(scores[who]) if who in scores else _NOTHING for who in SPEAKERS}
        examples = first.examples or _NOTHING
        late = [who for who in scores if who in outdated]
        rows.append(TaskRow(first.task, first.metric, first.rows, examples, values, late))
    return sorted(rows, key=lambda row: (row.task, row.metric, row.rows))


def _score_text(score: TaskScore) -> str:
    return f"{score.value:.3f}" if score.error is None else f"{score.value:.3f} ± {score.error:.3f}"


def _yardsticks(figures: Mapping[str, Any]) -> Iterator[Yardstick]:
    n, kl = inside(figures, "best_of_n", "n"), inside(figures, "best_of_n", "kl")
    best = f"the best of {n} answers of SFT"
    if isinstance(kl, (int, float)):
        best += f" (KL at most {kl:.2f} nats)"
    for key, contestant, name in (("against_base", "base", "the base"), ("best_of_n", "best_of_n", best)):
        rates = inside(figures, key, "win_rate")
        for judge, rate in rates.items() if isinstance(rates, Mapping) else ():
            if (found := as_estimate(rate)) is not None:
                scores = [as_estimate(inside(figures, "mean_score", judge, one)) for one in (contestant, "ppo")]
                controlled = as_estimate(inside(figures, key, "length_controlled_win_rate", judge))
                yield Yardstick(name, str(judge), found, controlled, *scores)


class DataView:
    """What the sources of one stage gave."""

    def __init__(self, title: str, reports: Sequence[Mapping[str, Any]]) -> None:
        self.title = title
        self.rows = [
            {
                "source": str(report.get("source", "")),
                "name": _source_name(str(report.get("source", ""))),
                "side": report.get("side", ""),
                "format": report.get("format", ""),
                **{name: _count(report.get(name)) for name in ("read", "kept", "train", "held_out")},
                "dropped": sorted(dict(report.get("dropped") or {}).items(), key=lambda item: -_count(item[1])),
            }
            for report in reports
        ]


@dataclass(frozen=True)
class ComparedFigure:
    """A row of the comparison: a figure in every run, and the runs whose value is best where that is meant."""

    name: str
    unit: str
    values: Sequence[str]


class Comparison:
    """Several runs beside each other."""

    def __init__(self, views: Sequence[RunView]) -> None:
        self.views = views
        self.charts = compared({view.name: view.state for view in views})
        self.names = [view.name for view in views]

    @cached_property
    def figures(self) -> list[ComparedFigure]:
        """The figures that say most, a row each."""
        rows: list[ComparedFigure] = []

        def add(name: str, unit: str, values: Sequence[str | None]) -> None:
            if any(values):
                rows.append(ComparedFigure(name, unit, [value or _NOTHING for value in values]))

        stages = [view.state.stages for view in self.views]

        def figure(stage: str, *keys: str) -> list[Any]:
            return [inside(next((s.figures for s in of.values() if s.name == stage), {}), *keys) for of in stages]

        judges = dict.fromkeys(one.judge for view in self.views for one in view.judgements)
        for judge in judges:
            rates = figure("evaluate", "win_rate", judge)
            add(f"PPO over SFT, {judge_name(judge)}", "share of prompts", [_interval(rate) for rate in rates])
            fair = figure("evaluate", "length_controlled_win_rate", judge)
            add(f"... between answers of equal length, {judge_name(judge)}", "", [_interval(rate) for rate in fair])
            for name in ("sft", "ppo"):
                means = figure("evaluate", "mean_score", judge, name)
                add(f"Mean score of {name.upper()}, {judge_name(judge)}", "score", [_interval(one) for one in means])
        add("KL to SFT", "nats an answer", [_interval(one) for one in figure("evaluate", "kl")])
        for name in ("sft", "ppo"):
            found = figure("evaluate", "response", name, "length")
            add(f"Length of {name.upper()}'s answers", "tokens", [_interval(one) for one in found])
        add(
            "Reward model's accuracy",
            "share of pairs",
            [_interval(one) for one in figure("reward", "held_out_accuracy")],
        )
        longer = figure("reward", "held_out_accuracy_longer_wins")
        add("The longer answer wins", "share of pairs", [_interval(one) for one in longer])
        add("SFT loss, held out", "nats a token", [_plain(one) for one in figure("sft", "held_out_loss_after")])
        rounds = [sum(s.name == "ppo" and len(s.metrics) for s in of.values()) for of in stages]
        add("Rounds of PPO", "", [str(count) if count else None for count in rounds])
        add("Time of all stages", "", [duration(view.seconds) if view.seconds else None for view in self.views])
        memory = [megabytes(view.peak_memory) if view.peak_memory else None for view in self.views]
        add("Peak memory", "", memory)
        return rows

    @cached_property
    def settings(self) -> list[tuple[str, list[str]]]:
        """The settings in which the runs differ."""
        trees = [{key: value for key, value, _ in view.state.settings} for view in self.views]
        keys = dict.fromkeys(key for tree in trees for key in tree)
        texts = {
            key: [json.dumps(tree[key], ensure_ascii=False) if key in tree else _NOTHING for tree in trees]
            for key in keys
        }
        return [(key, values) for key, values in texts.items() if len(set(values)) > 1]


def turns(text: Any) -> list[tuple[str, str]]:
    """A text or conversation as (role, words); the role of plain text is empty."""
    if isinstance(text, list):
        return [(str(turn.get("role", "")), str(turn.get("content", ""))) for turn in text if isinstance(turn, Mapping)]
    return [("", scored_pairs.plain_text(text))]


def differences(before: str, after: str) -> tuple[Markup, Markup]:
    """Two texts, escaped, with the words marked that only one of them has."""
    words = [_WORDS.findall(text) for text in (before, after)]
    if max(map(len, words)) > _MOST_WORDS:
        return escape(before), escape(after)
    # Without its spaces a word at the end of a line is the same word.
    bare = [[word.strip() for word in side] for side in words]
    blocks = difflib.SequenceMatcher(None, bare[0], bare[1], autojunk=False).get_matching_blocks()
    parts: tuple[list[Markup], list[Markup]] = ([], [])
    ends = (0, 0)
    for block in blocks:
        starts = (block.a, block.b)
        inside = min(starts) > 0 and starts[0] + block.size < len(words[0]) and starts[1] + block.size < len(words[1])
        if block.size == 1 and inside:
            continue  # One word between two changes has nothing to say.
        for part, side, end, start in zip(parts, words, ends, starts, strict=True):
            part += [_marked("".join(side[end:start])), escape("".join(side[start : start + block.size]))]
        ends = (starts[0] + block.size, starts[1] + block.size)
    return Markup("").join(parts[0]), Markup("").join(parts[1])


def _marked(text: str) -> Markup:
    """A text as different, without the spaces behind it; escaped."""
    said = text.rstrip()
    return Markup("<mark>{}</mark>{}").format(said, text[len(said) :]) if said else escape(text)


def _source_name(source: str) -> str:
    """A source's name without the folders that lead to it; what follows its name stays."""
    return PurePath(source).name if source.startswith(("/", ".", "~")) else source


def _lengths(figures: Mapping[str, Any]) -> str | None:
    found = [as_estimate(inside(figures, "response", name, "length")) for name in ("sft", "ppo")]
    return " → ".join(f"{one.value:.0f}" for one in found if one is not None) if all(found) else None


def _agreement(state: RunState) -> Estimate | None:
    """How often reward model and gold measure prefer the same of two answers; prompts without a difference are out."""
    both = [(score_gap(row, "reward_model"), score_gap(row, "gold")) for row in state.answers]
    decided = [(ours, gold) for ours, gold in both if ours and gold]
    agreed = sum((ours > 0) == (gold > 0) for ours, gold in decided)
    return win_rate(agreed, 0, len(decided) - agreed) if decided else None


def _interval(figure: Any) -> str | None:
    found = as_estimate(figure)
    return None if found is None else f"{_plain(found.value)} [{_plain(found.low)}, {_plain(found.high)}]"


def _plain(value: Any) -> str | None:
    if not isinstance(value, (int, float)):
        return None
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0
