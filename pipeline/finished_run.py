"""A run's results as something to use: which adapters there are, verified, and the base that they fit.

All of it is found out before torch is imported: that the run exists, that the stage is finished, that its files are
those that it wrote, and that the base lies where the config says and is the one it was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from pipeline.artifacts import Manifest, read_manifest
from pipeline.base_source import locate
from pipeline.config import BaseSettings, PipelineConfig
from pipeline.errors import ArtifactError, IncompatibleAdapterError, RunDirectoryError
from pipeline.records import Message, Text
from pipeline.run_directory import RunDirectory, StageName
from pipeline.run_state import RunState, StageState, read_run

Speaker = Literal["base", "sft", "policy"]
"""Who can answer: the bare base, the SFT policy, the PPO policy."""
SPEAKERS: tuple[Speaker, ...] = get_args(Speaker)
STAGE_OF: Mapping[Speaker, StageName] = {"sft": "sft", "policy": "ppo"}
"""Whose adapter a speaker has; the base has none."""

ADAPTER_STAGES: tuple[StageName, ...] = ("sft", "reward", "ppo")
"""The stages whose result is an adapter."""


@dataclass(frozen=True)
class FinishedRun:
    """A run with adapters that can be used.

    `adapters` are the verified manifests of the stages that are finished, `absent` says of the others why not, and
    `base` is the base in the arithmetic that they were trained in, whatever this machine would choose.
    """

    state: RunState
    config: PipelineConfig
    base: BaseSettings
    adapters: Mapping[StageName, Manifest]
    absent: Mapping[StageName, str]

    @property
    def run(self) -> RunDirectory:
        """The run's folder."""
        return RunDirectory(self.state.root)

    @property
    def speakers(self) -> tuple[Speaker, ...]:
        """Who can answer."""
        return tuple(who for who in SPEAKERS if who not in STAGE_OF or STAGE_OF[who] in self.adapters)

    @property
    def cautions(self) -> list[str]:
        """What to keep in mind about the adapters, as sentences."""
        stages = (self.state.stages[name] for name in self.adapters)
        return [f"{stage.name} is outdated: {stage.reason}." for stage in stages if stage.status == "outdated"]

    def require(self, who: Speaker) -> None:
        """Refuse a speaker whose stage is not finished.

        Raises:
            ArtifactError: it is not; says how far it is, and who can answer.
        """
        stage = STAGE_OF.get(who)
        if stage is not None and stage not in self.adapters:
            raise _unfinished(self.state, stage, self.absent.get(stage, ""), self.speakers)


def open_run(folder: str | Path, needed: Sequence[StageName] = ()) -> FinishedRun:
    """Open a run for use.

    Args:
        folder: the run's.
        needed: stages whose adapters must be there. Empty: at least one adapter of a policy.

    Raises:
        RunDirectoryError: there is no run, or its settings cannot be read.
        ArtifactError: a stage that is needed is not finished, or its files are not those that it wrote.
        BaseModelError: the base is not where the config says.
        IncompatibleAdapterError: another base lies there than the one that the adapters were trained on.
    """
    state = read_run(folder)
    config = _settings(state)
    adapters: dict[StageName, Manifest] = {}
    absent: dict[StageName, str] = {}
    for stage in ADAPTER_STAGES:
        try:
            adapters[stage] = read_manifest(state.root / stage)
        except ArtifactError as error:
            absent[stage] = str(error)
    for stage in needed or (() if adapters.keys() & {"sft", "ppo"} else ("sft",)):
        if stage in absent:
            raise _unfinished(state, stage, absent[stage], ())
    base = _as_trained(config.base, next(adapters[stage] for stage in (*needed, "ppo", "sft") if stage in adapters))
    weights = locate(base).weights
    for stage, manifest in adapters.items():
        if manifest.base.weights != weights and (stage in needed or not needed):
            raise IncompatibleAdapterError(
                f"another base lies at base.model than the one that {stage} was trained on: the digest of its weights"
                f" is {weights[:12]}, that one's was {manifest.base.weights[:12]}",
                where=config.base.model,
                remedy="Put the base back that the run was made with, or run the stage again on this one.",
            )
    return FinishedRun(state, config, base, adapters, absent)


def _settings(state: RunState) -> PipelineConfig:
    where = state.root / "config.json"
    remedy = "Start the run again with its config: what is finished is not done again, and the settings return."
    if not state.config:
        raise RunDirectoryError("the run's settings are not there", where=str(where), remedy=remedy)
    try:
        return PipelineConfig.model_validate(state.config)
    except ValidationError as error:
        fault = error.errors()[0]
        raise RunDirectoryError(
            "the run's settings are not those of this version of trivet:"
            f" {'.'.join(map(str, fault['loc']))}: {fault['msg'][0].lower()}{fault['msg'][1:]}",
            where=str(where),
            remedy=remedy,
        ) from None


def _as_trained(base: BaseSettings, manifest: Manifest) -> BaseSettings:
    """The base in the arithmetic that the adapter was trained in: `auto` may mean another on this device."""
    _, named, dtype = manifest.base.quantization.partition("/")
    trained = {"dtype": dtype} if named else {}
    return BaseSettings.model_validate(base.model_dump() | trained | {"quant_storage": "auto"})


def _unfinished(state: RunState, stage: StageName, fault: str, others: Sequence[Speaker]) -> ArtifactError:
    found = state.stages.get(stage) or StageState(stage, "waiting", "the run has no such stage")
    if found.status == "damaged":
        return ArtifactError(f"the adapter cannot be used: {fault}", where=str(state.root / stage))
    how_far = f"{found.status}{f' ({found.reason.splitlines()[0]})' if found.reason else ''}"
    config = state.config_path or "CONFIG"
    instead = f" Until then there is: {', '.join(others)}." if others else ""
    return ArtifactError(
        f"the {stage} stage is not finished; it is {how_far}",
        where=str(state.root / stage),
        remedy=f"trivet run {config} goes on with it; trivet show {state.root} tells how far it is.{instead}",
    )


# ---- what the run has learnt from


def learnt_conversations(found: FinishedRun) -> bool | None:
    """Whether the policy was trained on conversations rather than plain text; None where the run does not tell."""
    for prompt in _prompts_seen(found):
        return not isinstance(prompt, str)
    return None


def prompts_seen(found: FinishedRun, most: int) -> list[Text]:
    """Different prompts that the run was evaluated on, or, before that, sampled from; perhaps none."""
    return list(dict.fromkeys(_prompts_seen(found)))[:most]


def _prompts_seen(found: FinishedRun) -> Iterator[Text]:
    written = [row.get("prompt") for row in [*found.state.answers, *found.state.rounds]]
    for prompt in [*written, *(pair.prompt for pair in found.state.held_out)]:
        text = as_text(prompt)
        if text is not None:
            yield text


def as_text(written: Any) -> Text | None:
    """A text as a run's files hold it; None for what is none."""
    if isinstance(written, str):
        return written or None
    try:
        return tuple(Message(str(turn["role"]), str(turn["content"])) for turn in written) or None
    except (KeyError, TypeError):
        return None
