"""What a stage's result depends on, and whether the finished one is still current. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pipeline
from pipeline.artifacts import Manifest, digest, read_manifest, reward_folder
from pipeline.base_source import locate, read_template
from pipeline.config import PipelineConfig
from pipeline.config_file import LoadedConfig
from pipeline.datasets import fingerprint
from pipeline.errors import ArtifactError, ConfigError, ForeignResultError
from pipeline.functions import function_digest
from pipeline.model_shape import context_length
from pipeline.run_directory import STAGES, RunDirectory, StageName

_NOT_IN_THE_RESULT = {"log_every", "checkpoint_every", "keep_last", "ratio_tolerance"}
"""Settings that change what a stage prints or keeps on the way, not what comes out."""


def stages_of(config: PipelineConfig) -> tuple[StageName, ...]:
    """The stages that a whole run of this config has, in order."""
    return tuple(stage for stage in STAGES if stage != "reward" or config.trains_reward_model)


def parents_of(stage: StageName, config: PipelineConfig) -> tuple[StageName, ...]:
    """The stages whose results this one starts from."""
    if stage == "sft":
        return ()
    if stage == "reward":
        return ("sft",) if config.reward_needs_sft else ()
    if stage == "ppo":
        return ("sft", "reward") if config.needs_reward_model else ("sft",)
    return ("sft", "reward", "ppo") if config.trains_reward_model else ("sft", "ppo")


def stage_inputs(stage: StageName, config: PipelineConfig, run: RunDirectory) -> dict[str, Any]:
    """All that the stage's result follows from, as JSON-able data whose digest is its identity.

    Paths are left out where the content they name is in: a checkout may move.

    Raises:
        ArtifactError: a parent stage has no verified result.
        BaseModelError, DataError: the base or a data file is not there.
    """
    left_out = {"model", "cache_dir", "chat_template", "trust_remote_code", "quant_storage"}
    base = config.base.model_dump(mode="json", exclude=left_out)
    inputs: dict[str, Any] = {
        "stage": stage,
        "code_version": pipeline.__version__,
        "seed": config.seed,
        "deterministic": config.deterministic,
        "base": base | {"weights": locate(config.base).weights, "chat_template": _text(config.base.chat_template)},
        "settings": _settings(stage, config),
        "data": _data(stage, config),
        "parents": {parent: read_manifest(run.stage(parent)).digest for parent in parents_of(stage, config)},
    }
    return inputs


def find_current(
    stage: StageName, loaded: LoadedConfig, run: RunDirectory, *, force: bool = False
) -> tuple[Manifest | None, str]:
    """The stage's finished result if it still follows from the same inputs, and the reason for the verdict.

    Args:
        force: whether what lies there may be replaced, whosever it is.

    Raises:
        ForeignResultError: what lies there is not ours to replace.
    """
    if not run.stage(stage).exists():
        return None, "not run yet"
    try:
        manifest = read_manifest(run.stage(stage))
    except ArtifactError as error:
        if isinstance(error, ForeignResultError) and not force:
            raise
        return None, f"its result cannot be used: {error.problem}"
    try:
        inputs = stage_inputs(stage, loaded.config, run)
    except ArtifactError:
        return None, "a stage before it has no result"
    if digest(inputs) == manifest.inputs_digest:
        return manifest, "unchanged: base, data, settings, parents and code are those of the finished result"
    changed = sorted(key for key in inputs if inputs[key] != manifest.inputs.get(key))
    return None, f"changed since the last run: {', '.join(changed) or 'inputs'}"


def require_lengths_that_fit(config: PipelineConfig, stages: Sequence[str]) -> None:
    """Refuse sequences longer than what the base reads, on which it fails or answers nonsense.

    Raises:
        ConfigError: the stages' settings allow such; says which ones.
        BaseModelError: the base's config cannot be read.
    """
    window = context_length(config.base)
    if window is None:
        return
    for stage in stages:
        for setting, tokens in _longest(stage, config).items():
            if tokens > window:
                raise ConfigError(
                    f"{setting} is {tokens} tokens, more than the {window} that the base reads",
                    where=setting,
                    remedy=f"Lower it to {window} at the most, or choose a base that reads more.",
                )


def _longest(stage: str, config: PipelineConfig) -> dict[str, int]:
    """The longest sequences that a stage may meet, by the settings that bound them."""
    ppo, evaluate = config.ppo, config.evaluate
    answered = {"ppo.max_prompt_tokens + ppo.max_new_tokens": ppo.max_prompt_tokens + ppo.max_new_tokens}
    if stage == "sft":
        return {"sft.max_length": config.sft.max_length}
    if stage == "reward":
        return {"reward.max_length": config.reward.max_length} | answered
    if stage == "evaluate" and evaluate.max_new_tokens is not None:
        return {"ppo.max_prompt_tokens + evaluate.max_new_tokens": ppo.max_prompt_tokens + evaluate.max_new_tokens}
    return answered


def _settings(stage: StageName, config: PipelineConfig) -> dict[str, Any]:
    sections: dict[str, Any] = {stage: getattr(config, stage).model_dump(mode="json", exclude=_NOT_IN_THE_RESULT)}
    if stage in ("sft", "reward"):
        sections["lora"] = config.lora.model_dump(mode="json")
    if stage in ("reward", "evaluate"):
        keys = ["max_new_tokens", "temperature", "top_k", "top_p", "max_prompt_tokens"]
        sections["sampling"] = {key: getattr(config.ppo, key) for key in keys}
        # The evaluation has a batch size of its own. Where a server is does not matter.
        left_out = {"server", "batch_size"} if stage == "evaluate" else {"server"}
        rollout = config.ppo.rollout.model_dump(mode="json", exclude=left_out)
        sections["sampling"]["rollout"] = rollout
    if stage == "ppo":
        sections["ppo"]["rollout"].pop("server")
        for entry, source in zip(sections["ppo"]["rewards"], config.ppo.rewards, strict=True):
            entry["function"] = source.function and function_digest(source.function)
    if stage == "evaluate":
        gold = config.evaluate.gold
        sections["evaluate"]["gold"] = gold and function_digest(gold)
        for entry, judge in zip(sections["evaluate"]["judges"], config.evaluate.judges, strict=True):
            entry["name"] = judge.label
            if judge.reward_run is not None:
                entry["reward_run"] = read_manifest(reward_folder(judge.reward_run)).digest
            for key in ("api_key_variable", "concurrency", "retries", "timeout"):  # how it is asked, not what
                del entry[key]
    return sections


def _data(stage: StageName, config: PipelineConfig) -> dict[str, str]:
    kinds = {"sft": ["instructions"], "reward": ["preferences", "prompts"], "ppo": ["prompts"], "evaluate": ["prompts"]}
    if config.evaluate.perplexity_rows and config.data.instructions.sources:
        kinds["evaluate"].append("instructions")
    prints = {kind: fingerprint(getattr(config.data, kind)) for kind in kinds[stage]}
    return prints | {"allow_special_tokens": str(config.data.allow_special_tokens)}


def _text(path: str | None) -> str | None:
    return None if path is None else read_template(path)
