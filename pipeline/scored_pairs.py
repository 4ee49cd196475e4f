"""Is a reward model any good? What its scores of pairs say, of which people or a judge preferred one answer.

The model's opinion of a pair is p = sigmoid(r_chosen - r_rejected), the probability that it gives to the preference
that people had (Bradley and Terry 1952). It is right where p > 1/2, and sure of itself by max(p, 1 - p). No torch, so
that reports stay light.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.statistics import Proportion, accuracy_longer_wins, win_rate

HELD_OUT = "held_out.jsonl"
"""File of the finished reward stage: a line a held-out pair, with its scores."""

SCORED = "scored.jsonl"
"""The same of a further file of pairs, in a folder of its own."""

_MOST_SUBSETS = 40
_LENGTH_SLICES = (
    (-1.0, -1 / 3, "over a third shorter"),
    (-1 / 3, -0.1, "shorter"),
    (-0.1, 0.1, "equally long within 10%"),
    (0.1, 1 / 3, "longer"),
    (1 / 3, 1.0, "over a third longer"),
)


@dataclass(frozen=True)
class ScoredPair:
    """A pair with the raw scores of both answers. Texts are None where an older trivet left them out."""

    source: str
    row: int
    score_chosen: float
    score_rejected: float
    characters_chosen: int
    characters_rejected: int
    prompt: Any = None
    chosen: Any = None
    rejected: Any = None
    margin: float | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def lead(self) -> float:
        """By how much the preferred answer scores higher; negative where the model is wrong."""
        return self.score_chosen - self.score_rejected

    @property
    def probability(self) -> float:
        """What the model gives to the preference of the data."""
        return 1.0 / (1.0 + math.exp(-self.lead)) if self.lead >= 0 else 1.0 - 1.0 / (1.0 + math.exp(self.lead))

    @property
    def relative_length(self) -> float:
        """How much longer the preferred answer is, as a share of the longer one: -1..1."""
        longest = max(self.characters_chosen, self.characters_rejected)
        return (self.characters_chosen - self.characters_rejected) / longest if longest else 0.0


@dataclass(frozen=True)
class Slice:
    """Some of the pairs: how often the model is right about them, and how often "the longer answer wins" would be."""

    name: str
    accuracy: Proportion
    longer_wins: Proportion


@dataclass(frozen=True)
class Bin:
    """Pairs of which the model is about equally sure: its mean confidence, and how often it is right."""

    low: float
    high: float
    confidence: float
    accuracy: Proportion


@dataclass(frozen=True)
class Baseline:
    """A rule that knows nothing of meaning.

    `accuracy` is how often it agrees with the data, `agreement` how often with the model. `model_where_right` is the
    model's accuracy on the pairs that the rule gets right, `model_where_wrong` on the others; None without such pairs.
    """

    name: str
    accuracy: Proportion
    agreement: Proportion
    model_where_right: Proportion | None
    model_where_wrong: Proportion | None


def parse_pair(row: Any) -> ScoredPair:
    """A line of the file.

    Raises:
        ValueError: it is not such a line; says what is wrong with it.
    """
    if not isinstance(row, Mapping):
        raise ValueError("not a JSON object")
    found: dict[str, Any] = {name: row.get(name) for name in ("prompt", "chosen", "rejected")}
    for name in ("score_chosen", "score_rejected", "characters_chosen", "characters_rejected", "row"):
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name} is no number")
        found[name] = value
    margin, columns = row.get("margin"), row.get("columns")
    return ScoredPair(
        source=str(row.get("source", "")),
        margin=float(margin) if isinstance(margin, (int, float)) and math.isfinite(margin) else None,
        columns=columns if isinstance(columns, Mapping) else {},
        **found,
    )


def accuracy(pairs: Sequence[ScoredPair]) -> Proportion:
    """How often the preferred answer scores higher; equal scores count half."""
    return _proportion([pair.lead for pair in pairs])


def longer_wins(pairs: Sequence[ScoredPair]) -> Proportion:
    """How often the preferred answer is the longer one, in characters."""
    return accuracy_longer_wins(
        [pair.characters_chosen for pair in pairs], [pair.characters_rejected for pair in pairs]
    )


def log_loss(pairs: Sequence[ScoredPair]) -> float:
    """Mean of -log p in nats: 0.693 is a coin's."""
    return fmean(math.log1p(math.exp(-abs(pair.lead))) + max(0.0, -pair.lead) for pair in pairs)


def length_correlation(pairs: Sequence[ScoredPair]) -> float:
    """Pearson's r of score and length over all answers; 0 where one of the two does not vary."""
    points = answers(pairs)
    mean_length, mean_score = (fmean(values) for values in zip(*points, strict=True))
    centred = [(length - mean_length, score - mean_score) for length, score in points]
    scale = math.sqrt(sum(x * x for x, _ in centred) * sum(y * y for _, y in centred))
    return sum(x * y for x, y in centred) / scale if scale > 0 else 0.0


def answers(pairs: Sequence[ScoredPair]) -> list[tuple[float, float]]:
    """Length in characters and raw score of every answer, chosen and rejected in turn."""
    return [
        point
        for pair in pairs
        for point in (
            (float(pair.characters_chosen), pair.score_chosen),
            (float(pair.characters_rejected), pair.score_rejected),
        )
    ]


def calibration(pairs: Sequence[ScoredPair], bins: int = 5) -> list[Bin]:
    """Pairs by the model's confidence, in bins of equal width from 1/2 to 1. Bins without pairs are left out."""
    width = 0.5 / bins
    members: list[list[ScoredPair]] = [[] for _ in range(bins)]
    for pair in pairs:
        members[min(bins - 1, int((_confidence(pair) - 0.5) / width))].append(pair)
    return [
        Bin(0.5 + index * width, 0.5 + (index + 1) * width, fmean(map(_confidence, inside)), accuracy(inside))
        for index, inside in enumerate(members)
        if inside
    ]


def calibration_error(bins: Sequence[Bin]) -> float:
    """The expected calibration error (Guo et al. 2017): mean distance of confidence and accuracy, by pairs."""
    total = sum(one.accuracy.n for one in bins)
    return sum(one.accuracy.n / total * abs(one.accuracy.value - one.confidence) for one in bins)


def slices(pairs: Sequence[ScoredPair]) -> dict[str, list[Slice]]:
    """The pairs cut in several ways, by title: length, the model's confidence, source, people's margin, and every
    column of the data that has a few values. Empty slices, and cuts into one piece, are left out."""
    cuts: dict[str, list[tuple[str, list[ScoredPair]]]] = {
        "The preferred answer is ...": [
            (name, [pair for pair in pairs if _in_slice(pair.relative_length, low, high)])
            for low, high, name in _LENGTH_SLICES
        ],
        "Difference of the scores": _by_size(pairs, lambda pair: abs(pair.lead)),
        "Source": _by_value(pairs, lambda pair: pair.source),
        "Margin given with the data": _by_size(
            [pair for pair in pairs if pair.margin is not None], lambda pair: abs(pair.margin or 0.0)
        ),
    }
    names = dict.fromkeys(str(name) for pair in pairs for name in pair.columns)
    for name in names:
        cuts[f"Column {name}"] = _by_value(pairs, lambda pair, name=name: _label(pair.columns.get(name)))  # type: ignore[misc]
    found = {title: [_slice(name, inside) for name, inside in cut if inside] for title, cut in cuts.items()}
    return {title: cut for title, cut in found.items() if 1 < len(cut) <= _MOST_SUBSETS}


def subsets(pairs: Sequence[ScoredPair], column: str = "subset") -> list[Slice]:
    """The pairs by a column of their rows, the largest subset first; empty where no row has it."""
    if not any(column in pair.columns for pair in pairs):
        return []
    return [_slice(name, inside) for name, inside in _by_value(pairs, lambda pair: _label(pair.columns.get(column)))]


def baselines(pairs: Sequence[ScoredPair]) -> Iterator[Baseline]:
    """Rules that need no model. What takes the texts is left out where they are not known."""
    yield _baseline("the longer answer wins", pairs, lambda pair: pair.characters_chosen - pair.characters_rejected)
    if all(pair.chosen is not None and pair.rejected is not None for pair in pairs):
        yield _baseline(
            "more lines win",
            pairs,
            lambda pair: len(plain_text(pair.chosen).splitlines()) - len(plain_text(pair.rejected).splitlines()),
        )
        yield _baseline(
            "more of the prompt's words win",
            pairs,
            lambda pair: _echo(pair.prompt, pair.chosen) - _echo(pair.prompt, pair.rejected),
        )


def hardest(pairs: Sequence[ScoredPair], count: int = 12) -> list[ScoredPair]:
    """The pairs that the model gets most wrong, the worst first; none of those that it gets right."""
    return sorted((pair for pair in pairs if pair.lead < 0), key=lambda pair: pair.lead)[:count]


def plain_text(text: Any) -> str:
    """What a text or a conversation says, without who says it."""
    if isinstance(text, str):
        return text
    if isinstance(text, (list, tuple)):
        return "\n".join(str(turn.get("content", "")) if isinstance(turn, Mapping) else str(turn) for turn in text)
    return "" if text is None else json.dumps(text, ensure_ascii=False)


def read_scored(path: Path) -> tuple[list[ScoredPair], list[str]]:
    """The pairs of a file, and what is wrong with the lines that are left out. Both empty where there is no file."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        return [], [] if isinstance(error, FileNotFoundError) else [f"{path}: {error.strerror}"]
    pairs, faults = [], []
    for number, line in enumerate(lines, 1):
        try:
            pairs.append(parse_pair(json.loads(line)))
        except (ValueError, RecursionError) as error:
            reason = str(error) if type(error) is ValueError else "not JSON"
            faults.append(f"{path}, line {number}: {reason}; it is left out")
    return pairs, faults


def _proportion(leads: Sequence[float]) -> Proportion:
    wins, ties = sum(lead > 0 for lead in leads), sum(lead == 0 for lead in leads)
    return win_rate(wins, ties, len(leads) - wins - ties)


def _confidence(pair: ScoredPair) -> float:
    return max(pair.probability, 1.0 - pair.probability)


def _slice(name: str, pairs: Sequence[ScoredPair]) -> Slice:
    return Slice(name, accuracy(pairs), longer_wins(pairs))


def _in_slice(value: float, low: float, high: float) -> bool:
    """The middle slice has both of its ends, those beside it the outer one."""
    if low == -high:
        return low <= value <= high
    return low <= value < high if high < 0 else low < value <= high


def _by_size(pairs: Sequence[ScoredPair], size: Callable[[ScoredPair], float]) -> list[tuple[str, list[ScoredPair]]]:
    """Three or four parts of about the same number of pairs, by size; equal sizes stay together."""
    ordered = sorted(pairs, key=size)
    parts = 4 if len(ordered) >= 40 else 3
    edges = sorted({size(ordered[len(ordered) * part // parts]) for part in range(1, parts)} if ordered else set())
    limits = [-math.inf, *edges, math.inf]
    cut = []
    for low, high in pairwise(limits):
        inside = [pair for pair in ordered if low <= size(pair) < high]
        if inside:
            cut.append((f"{size(inside[0]):.2g} to {size(inside[-1]):.2g}", inside))
    return cut


def _by_value(pairs: Sequence[ScoredPair], value: Callable[[ScoredPair], str]) -> list[tuple[str, list[ScoredPair]]]:
    """A part a value, the largest first."""
    groups: dict[str, list[ScoredPair]] = {}
    for pair in pairs:
        groups.setdefault(value(pair), []).append(pair)
    return sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))


def _label(value: Any) -> str:
    return "(none)" if value is None else str(value)


def _baseline(name: str, pairs: Sequence[ScoredPair], rule: Callable[[ScoredPair], float]) -> Baseline:
    leads = [rule(pair) for pair in pairs]
    right = [pair for pair, lead in zip(pairs, leads, strict=True) if lead > 0]
    wrong = [pair for pair, lead in zip(pairs, leads, strict=True) if lead < 0]
    return Baseline(
        name,
        _proportion(leads),
        _proportion([_sign(lead) * _sign(pair.lead) for pair, lead in zip(pairs, leads, strict=True)]),
        accuracy(right) if right else None,
        accuracy(wrong) if wrong else None,
    )


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _echo(prompt: Any, answer: Any) -> float:
    """Share of the prompt's words that the answer says."""
    asked = set(plain_text(prompt).casefold().split())
    return len(asked & set(plain_text(answer).casefold().split())) / len(asked) if asked else 0.0
