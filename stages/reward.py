"""Stage 2: the reward model, from pairs of answers of which one was preferred.

    L = - (1/P) sum_p log sigmoid(r(x_p, chosen_p) - r(x_p, rejected_p) - m_p)        p: the P pairs of a step

Stiennon et al. 2020, "Learning to summarize from human feedback", section 3.4; the margin m is Touvron et al. 2023
(Llama 2), section 3.2.2, and 0 where a row has none. Left out: batching all comparisons of one prompt together
(Ouyang et al. 2022) and ranking more than two answers. r is a float32 linear map of the trunk's state at the last
token, under a LoRA adapter that starts as the SFT policy's. TRL's RewardTrainer drives the loop.

A reward's zero and scale mean nothing, so afterwards the SFT policy answers some prompts, and the gain and bias
that give its scores mean 0 and variance 1 are stored with the adapter. Where `reward.start_from` and
`reward.calibrate_on` are `base`, the bare base answers, and the stage can run beside SFT.

    python -m stages.reward CONFIG                                one process
    accelerate launch --num_processes 8 -m stages.reward CONFIG   eight
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from trl import RewardTrainer

from pipeline.artifacts import Manifest, digest, read_manifest
from pipeline.base_files import load_tokenizer
from pipeline.base_model import Base, base_identity, fingerprint, load_base, require_unchanged
from pipeline.batching import group_by_tokens, pad
from pipeline.chat import ChatFormat
from pipeline.config import PipelineConfig
from pipeline.config_file import LoadedConfig
from pipeline.datasets import load_preferences, load_prompts, prompt_key
from pipeline.distributed import World, seed_everything
from pipeline.engines import require_engine
from pipeline.errors import ArtifactError
from pipeline.generation import derive_seed
from pipeline.memory_budget import MemoryBudget
from pipeline.progress import progress, say
from pipeline.records import Comparison, Text
from pipeline.rewards import Calibration
from pipeline.roles import Roles, reward_model_for_training
from pipeline.run_directory import RunDirectory
from pipeline.scalar_head import trunk_of
from pipeline.scored_pairs import HELD_OUT
from pipeline.scoring import require_finite, score_rewards
from pipeline.sharding import Shards, sharers
from pipeline.trl_options import reward_arguments
from stages.command import stage_main
from stages.experience import Budgets, sampling_settings
from stages.gates import require_fitting_parents, reward_probe
from stages.inputs import stage_inputs
from stages.interruption import deferred
from stages.microbatches import Microbatch, cut_pairs
from stages.pairs import Pair, correlation, held_out_metrics, score_pairs, tokenize, write_scored
from stages.parts import Parts
from stages.result import StageClock, finish
from stages.trl_trainer import StageTrainer
from stages.trl_training import (
    TrainingReport,
    checkpoint_folder,
    open_checkpoints,
    padding_tokenizer,
    quiet_libraries,
    taking_options,
    train,
)

ROUND_TRIP_SEQUENCES = 32
"""Sequences that are scored before saving and after loading."""


def run(loaded: LoadedConfig, run: RunDirectory) -> Manifest:
    """Train the reward adapter, measure it, calibrate it and publish it.

    Returns:
        the finished stage's manifest.

    Raises:
        ConfigError, DataError: before the base's weights are loaded.
        ArtifactError: there is no SFT adapter, or the reward adapter does not survive saving and loading.
        BaseModelError: the base cannot be used, or would have changed.
        DivergenceError: a loss, gradient or score that is not finite.
        OutOfMemoryError: not even one pair fits into memory.
    """
    clock = StageClock()

    # 1. Config
    config, settings = loaded.config, loaded.config.reward
    quiet_libraries()
    arguments = reward_arguments(config, checkpoint_folder("reward", run))
    inputs = stage_inputs("reward", config, run)
    checkpoints = open_checkpoints("reward", loaded, run, digest(inputs))

    # 2. Data, which is checked before the weights are loaded
    chat = ChatFormat(load_tokenizer(config.base))
    split = load_preferences(config.data, chat, settings.max_length)
    train_pairs, held_out_pairs = tokenize(chat, split.train), tokenize(chat, split.held_out)
    prompts = calibration_prompts(config, chat, split.train)

    require_engine(config.ppo.rollout)
    require_fitting_parents("reward", config, run, base_identity(config.base, chat, arguments.device))

    # 3. Adapters
    share_out_to = sharers(World(), config.base)
    base = load_base(config.base, arguments.device, plain_attention=config.prefers_plain_attention)
    base_before = fingerprint(base.model)
    sft = run.stage("sft") if config.reward_needs_sft else None
    seed_everything(config.seed, deterministic=config.deterministic)
    model, _ = reward_model_for_training(base, config.lora, sft if settings.start_from == "sft" else None)
    shards = None if share_out_to is None else Shards(base.model, trunk_of(base.model), share_out_to)
    if shards is not None:
        say(shards.sentence)

    # 4. Optimizer
    with taking_options("reward", loaded):
        trainer = build_trainer(model, chat, arguments, train_pairs, held_out_pairs, shards)

    # 5. Loop
    clock.go_on(run, "reward", digest(inputs))
    train_loss = train(trainer, TrainingReport("reward", loaded, run), checkpoints)

    # 6. Result
    scoring_tokens = settings.microbatch_size * settings.max_length
    sample = [ids for pair in (held_out_pairs or train_pairs) for ids in (pair.chosen, pair.rejected)]
    sample = sample[:ROUND_TRIP_SEQUENCES]
    trained_scores = score_while_training(model, sample, base.device, scoring_tokens)
    roles = as_roles(base, model, sft, run.working("reward") / "adapter", trainer.accelerator, shards)
    require_same_scores(trained_scores, score_rewards(roles, sample, max_tokens=scoring_tokens))
    budgets = Budgets(
        MemoryBudget("reward.microbatch_size * reward.max_length", scoring_tokens, say, alone=shards is None),
        MemoryBudget("ppo.rollout.batch_size", config.ppo.rollout.batch_size, say, alone=shards is None),
    )
    longest = max((len(ids) for pair in held_out_pairs for ids in (pair.chosen, pair.rejected)), default=1)
    scores = budgets.tokens.fit(
        lambda most: score_pairs(roles, held_out_pairs, most),
        smallest=longest,
        whole=longest * 2 * len(held_out_pairs),
        remedy=f"An answer of {longest} tokens does not fit: set reward.max_length={longest // 2}.",
    )
    require_finite(scores, "score of a held-out pair", where="reward")
    parts = Parts(
        run.working("reward") / "parts",
        inputs_digest=digest(inputs),
        world=World(),
        budgets=budgets,
        in_step=shards is not None,
    )
    calibration, calibration_metrics = calibrate(roles, prompts, config, parts)
    probe = reward_probe(roles, sample)
    require_unchanged(base, base_before)

    def save(folder: Path) -> None:
        roles.save("reward", folder)
        write_scored(folder / HELD_OUT, held_out_pairs, scores)

    metrics = {
        "train_loss": train_loss,
        **held_out_metrics(held_out_pairs, scores),
        **calibration_metrics,
        "steps": trainer.state.global_step,
        "pairs": len(train_pairs),
        "held_out_pairs": len(held_out_pairs),
        "tokens": sum(len(pair.chosen) + len(pair.rejected) for pair in train_pairs),
    }
    if trainer.accelerator.is_main_process:
        finish(
            "reward",
            "reward",
            loaded,
            run,
            inputs=inputs,
            base=base.identity,
            clock=clock,
            metrics=metrics,
            save=save,
            calibration=calibration,
            extra={"data": [asdict(report) for report in split.reports], "probe": probe},
        )
    trainer.accelerator.wait_for_everyone()
    return read_manifest(run.stage("reward"))


def as_dataset(pairs: Sequence[Pair]) -> Dataset:
    """Pairs as TRL takes them ready-made. Rows without a margin ask for none, beside rows that have one."""
    columns: dict[str, list[Any]] = {
        "chosen_ids": [list(pair.chosen) for pair in pairs],
        "rejected_ids": [list(pair.rejected) for pair in pairs],
    }
    margins = [pair.comparison.margin for pair in pairs]
    if any(margin is not None for margin in margins):
        columns["margin"] = [margin or 0.0 for margin in margins]
    return Dataset.from_dict(columns)


class PairTrainer(StageTrainer, RewardTrainer):  # type: ignore[misc]
    """TRL's trainer of the reward model."""

    stage = "reward"

    def cut(self, inputs: Microbatch, rows: int) -> Iterable[tuple[Microbatch, float]]:
        """Parts of at most so many pairs."""
        return cut_pairs(inputs, rows)

    def rows(self, inputs: Microbatch) -> int:
        """Pairs."""
        return len(inputs["input_ids"]) // 2


def build_trainer(
    model: PeftModel,
    chat: ChatFormat,
    arguments: Any,
    train_pairs: Sequence[Pair],
    held_out_pairs: Sequence[Pair],
    shards: Shards | None = None,
) -> PairTrainer:
    """The trainer of the reward model, whose adapter and head are in float32; `shards` as in `StageTrainer`."""
    trainer = PairTrainer(
        model=model,
        args=arguments,
        train_dataset=as_dataset(train_pairs),
        eval_dataset=as_dataset(held_out_pairs) if held_out_pairs else None,
        processing_class=padding_tokenizer(chat),
        shards=shards,
    )
    rounded = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.dtype.itemsize < 4]
    assert not rounded, f"trainable parameters in 16 bits: {rounded[:3]}"
    return trainer


def calibration_prompts(config: PipelineConfig, chat: ChatFormat, comparisons: Sequence[Comparison]) -> list[list[int]]:
    """Prompts that are answered for the calibration: some of PPO's, or of the pairs' where it has none."""
    texts: list[Text]
    if config.data.prompts.sources:
        texts = [row.prompt for row in load_prompts(config.data, chat, config.ppo.max_prompt_tokens).train]
    else:
        texts = list({prompt_key(row.prompt): row.prompt for row in comparisons}.values())
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "calibration prompts"))
    order = torch.randperm(len(texts), generator=generator).tolist()
    return [chat.prompt_ids(texts[index]) for index in order[: config.reward.calibration_prompts]]


@torch.no_grad()
def score_while_training(
    model: PeftModel, sequences: Sequence[Sequence[int]], device: torch.device, max_tokens: int
) -> Tensor:
    """Scores of the model as it was trained, in the batches that `score_rewards` makes: [B] on the CPU."""
    model.eval()
    scores_B = torch.empty(len(sequences), dtype=torch.float32)
    for group in group_by_tokens([len(sequence) for sequence in sequences], max_tokens):
        ids_BL, mask_BL = pad([sequences[index] for index in group], device)
        scores_B[group] = model(input_ids=ids_BL, attention_mask=mask_BL).logits.squeeze(-1).cpu()
    return scores_B


def as_roles(
    base: Base, model: PeftModel, sft: Path | None, folder: Path, accelerator: Accelerator, shards: Shards | None
) -> Roles:
    """Save the trained adapter and head, take them off the base, and load them as PPO will, beside the SFT policy.

    Args:
        sft: folder of the SFT stage. None: the stage does without it.
        folder: where the trained adapter is saved.
        shards: the base, shared out. None: this process has all of it.
    """
    if accelerator.is_main_process:
        model.save_pretrained(str(folder), save_embedding_layers=False)
    accelerator.wait_for_everyone()
    reward_model = model.unload()
    reward_model.disable_input_require_grads()
    reward_model.gradient_checkpointing_disable()
    roles = Roles(base, shards=shards)
    if sft is not None:
        roles.add_from("reference", sft)
    roles.add_weights("reward", folder)
    roles.set_trainable()
    return roles


def require_same_scores(trained_B: Tensor, loaded_B: Tensor) -> None:
    """Refuse a reward adapter that scores otherwise once it is saved and loaded.

    Raises:
        ArtifactError: a score differs, in whatever bit.
    """
    if not torch.equal(trained_B, loaded_B):
        raise ArtifactError(
            f"the reward adapter scores differently after saving and loading (by up to"
            f" {float((trained_B - loaded_B).abs().max()):.3g})",
            where="reward",
            remedy="The adapter is not kept. This is a fault in trivet or in a library below it; please report it.",
        )


def calibrate(
    roles: Roles, prompts: Sequence[Sequence[int]], config: PipelineConfig, parts: Parts
) -> tuple[Calibration, dict[str, float]]:
    """Let the SFT policy or the bare base answer, and find the gain and bias that standardise its answers' scores.

    Args:
        parts: shares the sampling with the other processes, and keeps what is done.

    Raises:
        DivergenceError: a score is not finite.
        Interrupted: the stage was asked to stop; the answers so far are kept.
    """
    sampling = sampling_settings(config.ppo)
    with deferred(), progress(len(prompts), "reward calibration", "answers") as bar:
        responses = parts.answers(
            roles,
            "reference" if config.reward.calibrate_on == "sft" else None,
            prompts,
            sampling,
            seed=(config.seed, "calibration"),
            on_batch=bar.advance,
        )
    sequences = [(*prompt, *response.ids) for prompt, response in zip(prompts, responses, strict=True)]
    raw_B = require_finite(
        parts.budgets.fit_sequences(
            [len(ids) for ids in sequences], lambda most: score_rewards(roles, sequences, max_tokens=most)
        ),
        "score of the calibration",
        where="reward",
    )
    lengths_B = torch.tensor([len(response.ids) for response in responses])
    return Calibration.fit(raw_B), {
        "calibration_prompts": len(prompts),
        "calibration_raw_mean": float(raw_B.mean()),
        "calibration_raw_std": float(raw_B.std(correction=0)),
        "calibration_length_correlation": correlation(raw_B, lengths_B),
        "calibration_eos_rate": sum(response.finished for response in responses) / len(responses),
    }


if __name__ == "__main__":
    stage_main("reward", run)
