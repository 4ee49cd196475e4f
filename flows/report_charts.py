"""Which curves of a run are worth a look, with their units and what to look for. The definitions: `round_metrics`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from flows.curves import COLOURS, DASHES, Chart, Line, Points, curve
from flows.verdict import as_estimate
from pipeline.learning_curve import LearningCurve
from pipeline.metrics import MetricsRow
from pipeline.run_state import RunState
from pipeline.scored_pairs import Bin, ScoredPair

Named = tuple[str, str]
"""A metric and what the legend calls it."""

_MOST_DOTS = 1500


def charts_of(state: RunState) -> dict[str, list[Chart]]:
    """The charts of each stage that has at least two steps to show."""
    made = {
        "ppo": _ppo(_rows(state, "ppo"), state.config, _gold_against_kl(state)),
        "reward": _reward(_rows(state, "reward")),
        "sft": _sft(_rows(state, "sft")),
    }
    found = {stage: [chart for chart in charts if _has_something(chart)] for stage, charts in made.items()}
    return {stage: charts for stage, charts in found.items() if charts}


def compared(runs: Mapping[str, RunState]) -> list[Chart]:
    """The most telling curves of several runs, which have names here, on common axes."""
    return [chart for chart in map(lambda wanted: _compared(runs, *wanted), _COMPARED) if _has_something(chart)]


_COMPARED = (
    ("ppo", "objective/score", "Score", "reward", "round", "mean of a round's answers"),
    ("ppo", "kl/policy_reference_k1", "KL to SFT", "nats an answer", "round", "distance from the SFT policy"),
    ("ppo", "policy/entropy", "Entropy", "nats a token", "round", "how undecided the policy is"),
    ("ppo", "response/length_mean", "Answer length", "tokens", "round", "mean of a round's answers"),
    ("ppo", "value/explained_variance", "Critic's explained variance", "share", "round", "1 is a perfect critic"),
    ("reward", "accuracy", "Reward model's accuracy", "share of pairs", "step", "on the training pairs of each step"),
    ("sft", "loss", "SFT loss", "nats a token", "step", "on training data"),
)


def _compared(
    runs: Mapping[str, RunState], stage: str, metric: str, title: str, unit: str, x: str, about: str
) -> Chart:
    lines = [
        Line(name, curve(_rows(state, stage), metric), colour=1 + index % COLOURS, dashes=index // COLOURS % DASHES)
        for index, (name, state) in enumerate(runs.items())
    ]
    return Chart(title, unit, [line for line in lines if line.points], x, about)


def _rows(state: RunState, stage: str) -> Sequence[MetricsRow]:
    return next((one.metrics for one in state.stages.values() if one.name == stage), ())


def _has_something(chart: Chart) -> bool:
    return any(sum(value is not None for _, value in line.points) > 1 for line in chart.lines if line.kind != "level")


def _chart(
    rows: Sequence[MetricsRow],
    title: str,
    unit: str,
    about: str,
    *names: Named,
    dots: Sequence[Named] = (),
    level: tuple[str, float | None] | None = None,
    x: str = "round",
    include: Sequence[float] = (),
) -> Chart:
    """A chart of some metrics; `dots` are those that are measured now and then, `level` a constant beside them."""
    lines = [Line(label, curve(rows, name), colour=number) for number, (name, label) in enumerate(names, 1)]
    lines += [
        Line(label, _known(curve(rows, name)), "dots", colour=number)
        for number, (name, label) in enumerate(dots, len(names) + 1)
    ]
    lines = [line for line in lines if line.points]
    if level is not None and level[1] is not None and lines:
        steps = [float(row["step"] or 0) for row in rows]
        ends = [(min(steps), float(level[1])), (max(steps), float(level[1]))]
        lines.append(Line(level[0], ends, "level", colour=6))
    return Chart(title, unit, lines, x, about, include)


def _known(points: Points) -> Points:
    return [(x, y) for x, y in points if y is not None]


def _ppo(rows: Sequence[MetricsRow], config: Mapping[str, Any], gold_against_kl: Chart) -> list[Chart]:
    settings = config.get("ppo")
    ppo: Mapping[str, Any] = settings if isinstance(settings, Mapping) else {}
    kl = ppo.get("kl")
    price: Mapping[str, Any] = kl if isinstance(kl, Mapping) else {}
    target = _number(price.get("target")) if price.get("controller") == "adaptive" else None
    terms = sorted({name for row in rows for name in row if name.startswith("score/")})
    charts = [
        _chart(
            rows,
            "Score and reward",
            "reward; 0 is SFT",
            "Mean of a round's answers. PPO maximizes reward: the score less the price of KL. Both should rise.",
            ("objective/score", "score"),
            ("objective/reward", "reward"),
            dots=(("held_out/score", "score, held out"),),
        ),
        _chart(
            rows,
            "KL to SFT",
            "nats an answer",
            "How far the policy has left SFT. It should rise slowly; a jump means that the policy falls apart.",
            ("kl/policy_reference_k1", "k1"),
            ("kl/policy_reference_k3", "k3"),
            dots=(("held_out/kl", "held out"),),
            level=("target", target),
            include=(0.0,),
        ),
        _score_against_kl(rows),
        gold_against_kl,
        _chart(
            rows,
            "Entropy",
            "nats a token",
            "How undecided the policy is. Near 0 it says the same thing again and again.",
            ("policy/entropy", "entropy"),
            include=(0.0,),
        ),
        _chart(
            rows,
            "Answer length",
            "tokens",
            "If only this grows while the score rises, the reward may be one for length.",
            ("response/length_mean", "mean"),
            ("response/length_p95", "95th percentile"),
            dots=(("held_out/length", "held out"),),
            level=("limit", _number(ppo.get("max_new_tokens"))),
            include=(0.0,),
        ),
        _chart(
            rows,
            "Endings and repetition",
            "share",
            "Answers that end by themselves, and 3-grams said before.",
            ("response/eos_rate", "ended"),
            ("response/repetition", "repeated"),
            include=(0.0, 1.0),
        ),
        _chart(
            rows,
            "Clip fraction",
            "share of tokens",
            "Where clipping held an update back. Above a third the steps are too large.",
            ("policy/clip_fraction", "policy"),
            ("value/clip_fraction", "critic"),
            include=(0.0,),
        ),
        _chart(
            rows,
            "Size of an update",
            "nats a token",
            "KL between the policy before and after a round's update.",
            ("policy/approx_kl", "approximate KL"),
            include=(0.0,),
        ),
        _chart(
            rows,
            "Gradient norm",
            "norm",
            "Before clipping, mean over the round's steps.",
            ("policy/gradient_norm", "policy"),
            ("value/gradient_norm", "critic"),
            level=("clipped at", _number(ppo.get("max_grad_norm"))),
            include=(0.0,),
        ),
        _chart(
            rows,
            "Critic's explained variance",
            "share",
            "1 is a perfect critic, 0 one that knows no more than the mean, below 0 one that misleads.",
            ("value/explained_variance", "explained variance"),
            include=(0.0,),
        ),
        _chart(rows, "Policy loss", "loss", "Near 0 by construction; spikes matter.", ("policy/loss", "policy")),
        _chart(
            rows,
            "Critic's loss",
            "squared reward",
            "Error of the critic's predictions.",
            ("value/loss", "critic"),
            include=(0.0,),
        ),
        _chart(
            rows,
            "Price of KL",
            "reward a nat",
            "The coefficient that the controller sets.",
            ("kl/coefficient", "coefficient"),
            include=(0.0,),
        ),
        _chart(
            rows,
            "Score and length together",
            "correlation",
            "Pearson's r of score and length within a round. Near 1 the reward is mostly one for length.",
            ("response/score_length_correlation", "r"),
            include=(-1.0, 1.0),
        ),
        _chart(
            rows,
            "Sampler against trainer",
            "nats a token",
            "Mean difference of the log-probabilities that both give to the same token.",
            ("sampler/logprob_gap_mean", "mean gap"),
            include=(0.0,),
        ),
        _chart(
            rows,
            "Time of a round",
            "seconds",
            "By phase.",
            ("seconds/rollout", "sampling"),
            ("seconds/score", "scoring"),
            ("seconds/update", "updating"),
            include=(0.0,),
        ),
        _chart(
            rows,
            "Peak memory",
            "MB",
            "So far, of the process that has most.",
            ("memory/peak_mb", "peak"),
            include=(0.0,),
        ),
    ]
    if len({row.get("kl/coefficient") for row in rows}) <= 1:
        charts = [chart for chart in charts if chart.title != "Price of KL"]
    if len(terms) > 1:
        named = [(name, name.removeprefix("score/")) for name in terms[:6]]
        charts.insert(1, _chart(rows, "Terms of the reward", "their own units", "Unweighted means of a round.", *named))
    return charts


def _score_against_kl(rows: Sequence[MetricsRow]) -> Chart:
    lines = [
        Line(name, points, kind, colour=colour)
        for colour, (name, kind, kl, score) in enumerate(_SCORES_AGAINST_KL, 1)
        if (points := [_at_root(row[kl], row[score]) for row in rows if kl in row and score in row])
    ]
    return Chart("Score against KL", "reward", lines, _ROOT_OF_KL, "What distance from SFT buys of the reward itself.")


_ROOT_OF_KL = "square root of the KL to SFT in nats an answer"
_SCORES_AGAINST_KL: tuple[tuple[str, Literal["path", "dots"], str, str], ...] = (
    ("a round", "path", "kl/policy_reference_k1", "objective/score"),
    ("held out", "dots", "held_out/kl", "held_out/score"),
)


def _at_root(kl: float | None, score: float | None) -> tuple[float, float | None]:
    """A point at the square root of an estimated KL, which may fall below 0; a gap where the KL is not known."""
    return (0.0, None) if kl is None else (math.sqrt(max(0.0, kl)), score)


def _gold_against_kl(state: RunState) -> Chart:
    """What the gold measure says, which training does not see: while PPO learned, and of the evaluation's answers."""
    stage = state.stages.get("evaluate")
    figures: Mapping[str, Any] = stage.figures if stage is not None else {}
    learning = figures.get("gold_while_learning")
    rows = learning if isinstance(learning, list) else []
    best = inside(figures, "best_of_n", "n")
    named = (
        ("held out, while it learned", [(inside(row, "kl", "value"), inside(row, "gold")) for row in rows]),
        (
            "SFT and PPO, evaluated",
            [(0.0, _gold(figures, "sft")), (inside(figures, "kl", "value"), _gold(figures, "ppo"))],
        ),
        (f"best of {best} of SFT", [(inside(figures, "best_of_n", "kl"), _gold(figures, "best_of_n"))]),
    )
    lines = []
    for colour, (name, pairs) in enumerate(named, 1):
        known = [
            (math.sqrt(max(0.0, float(kl))), gold)
            for kl, figure in pairs
            if isinstance(kl, (int, float)) and (gold := as_estimate(figure)) is not None
        ]
        if known:
            points = [(x, gold.value) for x, gold in known]
            ranges = [(gold.low, gold.high) for _, gold in known]
            lines.append(Line(name, points, "path" if colour == 1 else "dots", colour=colour, ranges=ranges))
    return Chart(
        "Gold against KL",
        "the gold measure's score",
        lines,
        _ROOT_OF_KL,
        "What training does not see. Where it falls while the reward still rises, the reward is over-optimised.",
    )


def _gold(figures: Mapping[str, Any], who: str) -> Any:
    return inside(figures, "mean_score", "gold", who)


def _trainer(rows: Sequence[MetricsRow], title: str, unit: str, about: str, *names: Named, **more: Any) -> Chart:
    """A chart of a stage whose figures are counted in optimizer steps; beside each that on held-out data."""
    dots = [(f"eval_{name}", "held out") for name, label in names if label == "training"]
    return _chart(rows, title, unit, about, *names, dots=dots, x="step", **more)


def _sft(rows: Sequence[MetricsRow]) -> list[Chart]:
    return [
        _trainer(rows, "Loss", "nats a token", "Cross-entropy on the answers' tokens.", ("loss", "training")),
        _trainer(
            rows,
            "Token accuracy",
            "share",
            "How often the likeliest token is the right one.",
            ("mean_token_accuracy", "training"),
        ),
        _trainer(
            rows, "Entropy", "nats a token", "How undecided the model is.", ("entropy", "entropy"), include=(0.0,)
        ),
        *_of_any_trainer(rows),
    ]


def _reward(rows: Sequence[MetricsRow]) -> list[Chart]:
    return [
        _trainer(
            rows,
            "Loss",
            "nats a pair",
            "-log sigmoid of the margin; 0.69 is a coin's.",
            ("loss", "training"),
            include=(0.0,),
        ),
        _trainer(
            rows,
            "Accuracy",
            "share of pairs",
            "How often the preferred answer scores higher.",
            ("accuracy", "training"),
            include=(0.5, 1.0),
        ),
        _trainer(
            rows,
            "Margin",
            "score",
            "By how much the preferred answer scores higher, in the mean.",
            ("margin", "training"),
            include=(0.0,),
        ),
        _trainer(
            rows,
            "Scores",
            "score",
            "Of all answers of a batch. Their zero means nothing.",
            ("mean_reward", "mean"),
            ("min_reward", "lowest"),
            ("max_reward", "highest"),
        ),
        *_of_any_trainer(rows),
    ]


def _of_any_trainer(rows: Sequence[MetricsRow]) -> list[Chart]:
    return [
        _trainer(rows, "Gradient norm", "norm", "Before clipping.", ("grad_norm", "norm"), include=(0.0,)),
        _trainer(rows, "Learning rate", "rate", "As scheduled.", ("learning_rate", "learning rate"), include=(0.0,)),
        _trainer(
            rows,
            "Speed",
            "tokens/s",
            "Training tokens a second.",
            ("tokens_per_second", "tokens a second"),
            include=(0.0,),
        ),
    ]


def calibration_chart(bins: Sequence[Bin]) -> Chart:
    """Confidence against accuracy; on the dashed line the model is as often right as it believes."""
    return Chart(
        "Calibration",
        "share of pairs it is right about",
        [
            Line("as sure as right", [(0.5, 0.5), (1.0, 1.0)], "level", colour=6),
            Line(
                "accuracy",
                [(one.confidence, one.accuracy.value) for one in bins],
                "dots",
                ranges=[(one.accuracy.low, one.accuracy.high) for one in bins],
            ),
        ],
        "how sure the reward model is",
        "Dots on the dashed line: it is right as often as it is sure. Below the line it is too sure of itself.",
        (0.5, 1.0),
    )


def learning_chart(curve: LearningCurve) -> Chart:
    """Accuracy against the number of pairs that were learnt from; dashed, "the longer answer wins"."""
    points = curve.points
    return Chart(
        "Accuracy by training pairs",
        "share of held-out pairs",
        [
            Line(
                "accuracy",
                [(float(one.pairs), one.accuracy.value) for one in points],
                "path",
                ranges=[(one.accuracy.low, one.accuracy.high) for one in points],
            ),
            Line("the longer answer wins", [(float(one.pairs), one.longer_wins.value) for one in points], "level", 6),
        ],
        "training pairs",
        "Each bar is the 95% interval of one reward model; each distance to the right is a factor. Points are compared"
        " on the same pairs, which tells smaller differences than the bars do.",
        (0.5, 1.0),
        log_x=True,
    )


def length_chart(pairs: Sequence[ScoredPair]) -> Chart:
    """Reward against length, an answer a dot."""
    shown = pairs[:: max(1, -(-2 * len(pairs) // _MOST_DOTS))]
    return Chart(
        "Reward against length",
        "raw score",
        [
            Line("preferred", [(float(one.characters_chosen), one.score_chosen) for one in shown], "dots"),
            Line("other", [(float(one.characters_rejected), one.score_rejected) for one in shown], "dots", colour=2),
        ],
        "characters of the answer",
        "A cloud that climbs to the right is a reward model that pays for length.",
    )


def lead_chart(pairs: Sequence[ScoredPair]) -> Chart:
    """The leads of the preferred answers in order: where the line crosses 0 the model begins to be right."""
    leads = sorted(pair.lead for pair in pairs)
    points = [(100.0 * (index + 0.5) / len(leads), lead) for index, lead in enumerate(leads)]
    return Chart(
        "By how much it is right",
        "score, preferred less other",
        [Line("lead", points), Line("equal", [(0.0, 0.0), (100.0, 0.0)], "level", colour=6)],
        "% of the pairs, the worst first",
        "The pairs by the difference of their scores. Left of the crossing the model is wrong.",
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def inside(tree: Any, *keys: str) -> Any:
    """What lies under these keys, one within the other; None where one is missing."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree
