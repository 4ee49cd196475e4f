"""Is the policy better than SFT? One answer to that for the report, the list of runs and the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.run_state import RunState, StageState
from pipeline.statistics import Estimate, mean_interval

Outcome = Literal["better", "worse", "unclear", "open"]
"""`unclear`: the interval holds one half. `open`: nothing has been judged yet."""

FEW = 30
"""With fewer judged prompts than this the normal approximation, and a verdict, mean little."""


@dataclass(frozen=True)
class Judgement:
    """What one judge says of the policy against SFT.

    `difference` is the mean of PPO's score less SFT's, prompt by prompt; None where the single scores are not kept.
    `length_controlled` is the win rate that is expected of answers of equal length (`pipeline.length_control`).
    `held_out` says that the config names the judge, whom training does not see.
    """

    judge: str
    win_rate: Estimate
    wins: int | None
    ties: int | None
    losses: int | None
    before: Estimate | None
    after: Estimate | None
    difference: Estimate | None
    length_controlled: Estimate | None = None
    held_out: bool = False

    @property
    def outcome(self) -> Outcome:
        """By the interval of the win rate."""
        if self.win_rate.low > 0.5:
            return "better"
        return "worse" if self.win_rate.high < 0.5 else "unclear"

    @property
    def is_independent(self) -> bool:
        """Whether training did not see it."""
        return self.judge == "gold" or self.held_out

    @property
    def line(self) -> str:
        """`0.82 [0.74, 0.87] of 128 prompts`."""
        rate = self.win_rate
        return f"{rate.value:.2f} [{rate.low:.2f}, {rate.high:.2f}] of {rate.n} prompts"


@dataclass(frozen=True)
class Verdict:
    """The answer, in a few words and in a sentence, with what to keep in mind about it."""

    outcome: Outcome
    headline: str
    sentence: str
    judgement: Judgement | None
    others: Sequence[Judgement]
    cautions: Sequence[str]

    @property
    def line(self) -> str:
        """For a list of runs."""
        if self.judgement is None:
            return self.headline
        return f"{self.outcome}: {self.judgement.line} by {judge_name(self.judgement.judge)}"


def judge_name(judge: str) -> str:
    """What people call a judge."""
    return {"gold": "the gold measure", "reward_model": "the reward model"}.get(judge, judge)


def _capital(judge: str) -> str:
    """Its name at the start of a sentence; one that somebody chose stays as it is."""
    name = judge_name(judge)
    return name if name == judge else f"{name[0].upper()}{name[1:]}"


def verdict_of(state: RunState) -> Verdict:
    """The verdict on a run, from its evaluation."""
    judgements = list(judgements_of(state))
    if not judgements:
        return Verdict("open", *_what_is_missing(state), None, (), ())
    wanted = state.config.get("gates") or {}
    named = wanted.get("judge") if isinstance(wanted, Mapping) else None
    first = next((one for one in judgements if one.judge == named), judgements[0])
    others = [one for one in judgements if one is not first]
    return Verdict(
        first.outcome,
        _HEADLINES[first.outcome],
        _sentence(first),
        first,
        others,
        list(_cautions(state, first, others)),
    )


_HEADLINES = {
    "better": "PPO is better than SFT",
    "worse": "PPO is worse than SFT",
    "unclear": "No difference between PPO and SFT can be told",
}


def judgements_of(state: RunState) -> Iterator[Judgement]:
    """All judges' opinions, the one to trust most first: gold, held-out judges, the reward model, then functions."""
    stage = state.stages.get("evaluate")
    figures: Mapping[str, Any] = stage.figures if stage else {}
    rates, means = _mapping(figures.get("win_rate")), _mapping(figures.get("mean_score"))
    controlled, held_out = _mapping(figures.get("length_controlled_win_rate")), _mapping(figures.get("judges"))
    order = {"gold": 0, **dict.fromkeys(held_out, 1), "reward_model": 2}
    for judge in sorted(rates, key=lambda name: order.get(name, 3)):
        rate = as_estimate(rates[judge])
        if rate is None:
            continue
        counts = [rates[judge].get(name) for name in ("wins", "ties", "losses")]
        wins, ties, losses = (int(count) if isinstance(count, (int, float)) else None for count in counts)
        scores = _mapping(means.get(judge))
        yield Judgement(
            judge,
            rate,
            wins,
            ties,
            losses,
            as_estimate(scores.get("sft")),
            as_estimate(scores.get("ppo")),
            _difference(state, judge),
            as_estimate(controlled.get(judge)),
            judge in held_out,
        )


def as_estimate(figure: Any) -> Estimate | None:
    """A figure of a manifest as an estimate; None where it is none."""
    try:
        found = Estimate(float(figure["value"]), float(figure["low"]), float(figure["high"]), int(figure["n"]))
    except (KeyError, TypeError, ValueError):
        return None
    return found if math.isfinite(found.value) else None


def progress_of(stage: StageState) -> str:
    """`54%` of a stage that is under way or was cut off, where that is known; else nothing."""
    if stage.done is None or stage.status not in ("going", "starting", "interrupted", "failed"):
        return ""
    return f"{100 * stage.done:.0f}%"


def _sentence(one: Judgement) -> str:
    rate = one.win_rate
    said = (
        f"{_capital(one.judge)} prefers PPO's answer for {100 * rate.value:.0f}% of {rate.n} held-out prompts"
        f" (95% interval {100 * rate.low:.0f}% to {100 * rate.high:.0f}%)"
    )
    if (fair := one.length_controlled) is not None:
        said += (
            f", and between answers of equal length for {100 * fair.value:.0f}%"
            f" ({100 * fair.low:.0f}% to {100 * fair.high:.0f}%)"
        )
    parts = [said]
    if one.difference is not None and one.before is not None and one.after is not None:
        gap = one.difference
        parts.append(
            f"its mean score goes from {one.before.value:.2f} to {one.after.value:.2f}"
            f" ({gap.value:+.2f}, interval {gap.low:+.2f} to {gap.high:+.2f})"
        )
    return "; ".join(parts) + "."


def _cautions(state: RunState, first: Judgement, others: Sequence[Judgement]) -> Iterator[str]:
    if first.win_rate.n < FEW:
        yield f"Only {first.win_rate.n} prompts were judged: the interval itself is rough."
    yield from _of_other_minds(first, others)
    fair = first.length_controlled
    if fair is not None and first.outcome == "better" and fair.low <= 0.5:
        yield (
            f"Between answers of equal length the win rate would be {fair.value:.2f} [{fair.low:.2f}, {fair.high:.2f}]:"
            " part of the gain may be length."
        )
    yield from _silent_judges(state)
    lengths = [_length(state, name) for name in ("sft", "ppo")]
    if lengths[0] is not None and lengths[1] is not None and lengths[0].value > 0:
        ratio = lengths[1].value / lengths[0].value
        if not 2 / 3 <= ratio <= 1.5:
            yield (
                f"The answers' mean length goes from {lengths[0].value:.0f} to {lengths[1].value:.0f} tokens: see"
                " whether length is what the judge likes."
            )
    stage = state.stages["evaluate"]
    if stage.status not in ("finished", "going"):
        yield f"The evaluation is {stage.status}: {stage.reason}."


def _of_other_minds(first: Judgement, others: Sequence[Judgement]) -> Iterator[str]:
    """What training saw decides, or those that it did not see do not agree."""
    independent = [one for one in (first, *others) if one.is_independent]
    if not first.is_independent:
        more = "" if independent else "; an independent measure (evaluate.gold, evaluate.judges) would tell more"
        yield f"{_capital(first.judge)} is what PPO was trained to please{more}."
    pleased = [one for one in (first, *others) if not one.is_independent and one.outcome == "better"]
    for one in independent:
        if one.outcome == "better":
            continue
        if pleased:
            names = " and ".join(judge_name(own.judge) for own in pleased)
            yield (
                f"PPO wins by {names}, which it was trained to please, and not by {judge_name(one.judge)}"
                f" ({one.line}): the reward may be exploited."
            )
        elif first.outcome == "better":
            yield f"{_capital(one.judge)} does not say better: {one.line}."


def _silent_judges(state: RunState) -> Iterator[str]:
    """Judges that could not be asked about every prompt."""
    for name, judge in _mapping(state.stages["evaluate"].figures.get("judges")).items():
        for about in _mapping(judge).values():
            if not isinstance(about, Mapping) or not (errors := _mapping(about.get("errors"))):
                continue
            yield (
                f"The judge {name} answered only {about.get('answered')} of {about.get('asked')} questions:"
                f" {next(iter(errors))}."
            )


def _length(state: RunState, name: str) -> Estimate | None:
    response = _mapping(state.stages["evaluate"].figures.get("response"))
    return as_estimate(_mapping(response.get(name)).get("length"))


def _difference(state: RunState, judge: str) -> Estimate | None:
    """Of the scores, prompt by prompt, which is sharper than the difference of two means."""
    gaps = [gap for answer in state.answers if (gap := score_gap(answer, judge)) is not None]
    return mean_interval(gaps) if len(gaps) > 1 else None


def score_gap(answer: Mapping[str, Any], judge: str) -> float | None:
    """PPO's score less SFT's by one judge; None where one of the two, or what they make, is not there or not finite."""
    scores = _mapping(_mapping(answer.get("scores")).get(judge))
    pair = [scores.get(name) for name in ("ppo", "sft")]
    if not all(isinstance(score, (int, float)) and math.isfinite(score) for score in pair):
        return None
    gap = float(pair[0]) - float(pair[1])  # type: ignore[arg-type]
    return gap if math.isfinite(gap) else None


def _what_is_missing(state: RunState) -> tuple[str, str]:
    for stage in state.stages.values():
        if stage.status in ("going", "starting"):
            done = progress_of(stage)
            return (
                f"{stage.name} is at work{f', {done} done' if done else ''}",
                "PPO has not been judged against SFT yet; this page shows what there is so far.",
            )
    for stage in state.stages.values():
        if stage.status in ("failed", "interrupted", "damaged"):
            return f"{stage.name} {_PAST[stage.status]}", stage.reason
    return "Not judged yet", "PPO and SFT have not been compared: the evaluation has no result."


_PAST = {"failed": "failed", "interrupted": "was interrupted", "damaged": "cannot be read"}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
