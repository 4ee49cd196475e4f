"""Further judges of the evaluation (`evaluate.judges`): other reward models on the same base, and endpoints.

A reward model scores each answer by itself. An endpoint is shown two answers and prefers one, or neither; what it could
not be asked is left out, and said.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts import BaseIdentity, read_manifest, require_same_base, reward_folder
from pipeline.config import JudgeSettings, PipelineConfig
from pipeline.endpoint_judge import EndpointJudge
from pipeline.errors import ArtifactError
from pipeline.progress import say
from pipeline.records import Prompt, as_plain
from pipeline.rewards import Calibration
from pipeline.roles import Role, Roles
from pipeline.scoring import Episode, require_finite, score_rewards
from stages.experience import Budgets
from stages.parts import Parts

PAIRS_A_PART = 16
"""Pairs that an endpoint judges between two looks at whether to stop; what it said of them is kept."""


def require_judges(config: PipelineConfig, identity: BaseIdentity) -> None:
    """Refuse judges that cannot judge, before a model is loaded.

    Raises:
        ArtifactError: there is no reward model where one is named.
        IncompatibleAdapterError: it belongs to another base.
        ConfigError: the variable that should hold a key is not set.
    """
    for judge in config.evaluate.judges:
        if judge.reward_run is None:
            EndpointJudge(judge, os.environ)
            continue
        folder = reward_folder(judge.reward_run)
        manifest = read_manifest(folder)
        if manifest.role != "reward":
            raise ArtifactError(
                f"the judge '{judge.label}' is no reward model, but a {manifest.role} adapter",
                where=str(folder),
                remedy="Name the folder of a run whose reward stage has finished, or of its reward stage.",
            )
        require_same_base(manifest, identity, folder)


def raw_scores(
    roles: Roles, episodes: Sequence[Episode], budgets: Budgets, batch: Sequence[int], *, role: Role = "reward"
) -> list[float]:
    """A reward adapter's raw scores of some of the episodes."""
    chosen = [episodes[index].ids for index in batch]
    raw_B = budgets.fit_sequences(
        [len(ids) for ids in chosen], lambda most: score_rewards(roles, chosen, max_tokens=most, role=role)
    )
    numbers: list[float] = require_finite(raw_B, "score of the reward model", where="evaluate").tolist()
    return numbers


def scores_of_another_reward_model(
    parts: Parts,
    roles: Roles,
    judge: JudgeSettings,
    episodes: Mapping[str, Sequence[Episode]],
    batches: Sequence[Sequence[int]],
    on_batch: Callable[[int], None],
) -> dict[str, list[float]]:
    """What another run's reward model says of every contestant's answers, standardised as that run found.

    Raises:
        ArtifactError, IncompatibleAdapterError: see `require_judges`.
        DivergenceError: a score is not finite.
    """
    assert judge.reward_run is not None
    calibration = Calibration.of(roles.add_from("judge", reward_folder(judge.reward_run)))
    roles.set_trainable()
    roles.disable_dropout()
    scores = {}
    for name, found in episodes.items():
        make = partial(raw_scores, roles, found, parts.budgets, role="judge")
        raw = parts.compute(f"judge-{judge.label}-{name}", batches, make, on_batch)
        scores[name] = calibration.apply(torch.tensor(raw)).tolist()
    roles.remove("judge")
    return scores


class Preferences:
    """What an endpoint says of PPO's answers beside an opponent's, prompt by prompt.

    Args:
        points: 1 where PPO wins, 0 where it loses, 0.5 for a tie; None where the judge could not be asked.
        errors: why not, each reason once, with how often.
    """

    def __init__(self, points: Sequence[float | None], errors: Mapping[str, int]) -> None:
        self.points, self.errors = list(points), dict(errors)

    @property
    def figures(self) -> dict[str, Any]:
        """How many were asked about and how many answered, for the manifest."""
        answered = sum(point is not None for point in self.points)
        return {"asked": len(self.points), "answered": answered, "errors": self.errors}


def preferences_of(
    parts: Parts,
    judge: JudgeSettings,
    opponent: str,
    prompts: Sequence[Prompt],
    challenger: Sequence[str],
    incumbent: Sequence[str],
    on_batch: Callable[[int], None],
) -> Preferences:
    """Ask an endpoint about every prompt, or the first `judge.prompts`; the processes share the questions.

    Raises:
        Interrupted: the stage was asked to stop; what was answered is kept.
    """
    endpoint = EndpointJudge(judge, os.environ)
    count = min(len(prompts), judge.prompts or len(prompts))

    def ask(batch: Sequence[int]) -> list[Any]:
        pairs = [(as_plain(prompts[index].prompt), challenger[index], incumbent[index]) for index in batch]
        return [[opinion.score, opinion.error] for opinion in endpoint.compare(pairs)]

    batches = [range(start, min(start + PAIRS_A_PART, count)) for start in range(0, count, PAIRS_A_PART)]
    found = parts.compute(f"endpoint-{judge.label}-{opponent}", batches, ask, on_batch, passes=False)
    errors: dict[str, int] = {}
    for _, error in found:
        if error is not None:
            errors[error] = errors.get(error, 0) + 1
    result = Preferences([point for point, _ in found], errors)
    if errors:
        worst = max(errors, key=lambda reason: errors[reason])
        say(
            f"warning: the judge '{judge.label}' answered {result.figures['answered']} of {count} questions"
            f" ({worst}). Its figures are about those alone; trivet evaluate CONFIG --force asks again."
        )
    return result


def where_of(judge: JudgeSettings) -> dict[str, Any]:
    """Who a judge is, for the manifest."""
    if judge.endpoint is not None:
        return {"endpoint": judge.endpoint, "model": judge.model}
    folder = reward_folder(str(judge.reward_run))
    return {"reward_run": str(Path(folder)), "digest": read_manifest(folder).digest}
