"""Stage 1: supervised fine-tuning of the policy on instructions.

    L = - (1/N) sum_i log p(y_i | y_<i, x)        y_i: the N tokens that the assistant says in a step's rows

Ouyang et al. 2022, "Training language models to follow instructions with human feedback", section 3.5. Left out:
their residual dropout of 0.2 (see `lora.dropout`) and their choice of the epoch by reward-model score. The base
is quantized and frozen, and a LoRA adapter learns (Dettmers et al. 2023). TRL's SFTTrainer drives the loop; rows
reach it as token ids, made by the chat format that all stages share.

    python -m stages.sft CONFIG                                one process
    accelerate launch --num_processes 8 -m stages.sft CONFIG   eight
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any, cast

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from trl import SFTTrainer

from pipeline.artifacts import Manifest, digest, read_manifest
from pipeline.base_files import load_tokenizer
from pipeline.base_model import fingerprint, load_base, require_unchanged
from pipeline.chat import ChatFormat
from pipeline.config_file import LoadedConfig
from pipeline.datasets import load_instructions
from pipeline.distributed import World, seed_everything
from pipeline.errors import ConfigError, DivergenceError
from pipeline.memory_budget import MemoryBudget
from pipeline.progress import progress, say
from pipeline.records import Demonstration, TokenizedExample
from pipeline.roles import Role, Roles
from pipeline.run_directory import RunDirectory
from pipeline.scalar_head import trunk_of
from pipeline.scoring import said_logprobs
from pipeline.sharding import sharers
from pipeline.trl_options import sft_arguments
from stages.command import stage_main
from stages.inputs import stage_inputs
from stages.microbatches import Microbatch, cut_rows, cut_sequence
from stages.projection import IGNORED, project_only_targets
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


def run(loaded: LoadedConfig, run: RunDirectory) -> Manifest:
    """Train the policy's adapter and publish it.

    Returns:
        the finished stage's manifest.

    Raises:
        ConfigError, DataError: before the base's weights are loaded.
        BaseModelError: the base cannot be used, or would have changed.
        DivergenceError: a loss or gradient that is not finite.
        OutOfMemoryError: not even one row fits into memory.
    """
    clock = StageClock()

    # 1. Config
    config, settings = loaded.config, loaded.config.sft
    quiet_libraries()
    arguments = sft_arguments(config, checkpoint_folder("sft", run))
    inputs = stage_inputs("sft", config, run)
    checkpoints = open_checkpoints("sft", loaded, run, digest(inputs))

    # 2. Data, which is checked before the weights are loaded
    chat = ChatFormat(load_tokenizer(config.base))
    split = load_instructions(config.data, chat, settings.max_length)
    train_rows, held_out_rows = tokenize(chat, split.train), tokenize(chat, split.held_out)

    # 3. Adapters
    share_out_to = sharers(World(), config.base)
    base = load_base(config.base, arguments.device, plain_attention=config.prefers_plain_attention)
    base_before = fingerprint(base.model)
    seed_everything(config.seed, deterministic=config.deterministic)
    roles = Roles(base, share_out_to=share_out_to)
    roles.add_fresh("policy", config.lora)
    roles.set_trainable("policy")
    if roles.shards is not None:
        say(roles.shards.sentence)

    # 4. Optimizer
    with taking_options("sft", loaded):
        trainer = build_trainer(roles, arguments, train_rows, held_out_rows)
    require_separate_rows(roles, trainer)
    tokens = settings.microbatch_size * settings.max_length
    budget = MemoryBudget("sft.microbatch_size * sft.max_length", tokens, say, alone=roles.shards is None)
    loss_before = held_out_loss(roles, None, held_out_rows, trainer.accelerator, budget)

    # 5. Loop
    clock.go_on(run, "sft", digest(inputs))
    train_loss = train(trainer, TrainingReport("sft", loaded, run), checkpoints)

    # 6. Result
    loss_after = held_out_loss(roles, "policy", held_out_rows, trainer.accelerator, budget)
    require_unchanged(base, base_before)
    metrics = {
        "train_loss": train_loss,
        "held_out_loss_before": loss_before,
        "held_out_loss_after": loss_after,
        "held_out_perplexity_before": perplexity(loss_before),
        "held_out_perplexity_after": perplexity(loss_after),
        "steps": trainer.state.global_step,
        "rows": len(train_rows),
        "held_out_rows": len(held_out_rows),
        "tokens": sum(len(row.ids) for row in train_rows),
        "assistant_tokens": sum(sum(row.loss_mask) for row in train_rows),
    }
    if trainer.accelerator.is_main_process:
        finish(
            "sft",
            "policy",
            loaded,
            run,
            inputs=inputs,
            base=base.identity,
            clock=clock,
            metrics=metrics,
            save=lambda folder: roles.save("policy", folder),
            extra={"data": [asdict(report) for report in split.reports]},
        )
    trainer.accelerator.wait_for_everyone()
    return read_manifest(run.stage("sft"))


def tokenize(chat: ChatFormat, records: Sequence[Demonstration]) -> list[TokenizedExample]:
    """Records -> token ids with the mask of what the assistant says."""
    return [chat.example(record.prompt, record.completion) for record in records]


def as_dataset(rows: Sequence[TokenizedExample]) -> Dataset:
    """Rows as TRL takes them ready-made: `input_ids`, and `labels` that are ignored where nobody is to learn."""
    return Dataset.from_dict(
        {
            "input_ids": [list(row.ids) for row in rows],
            "labels": [
                [token if said else IGNORED for token, said in zip(row.ids, row.loss_mask, strict=True)] for row in rows
            ],
        }
    )


class PolicyTrainer(StageTrainer, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer of the policy.

    Args:
        row_tokens: tokens of a row at the most; with packing, of the sequence that several rows share.
    """

    stage = "sft"

    def __init__(self, *args: Any, row_tokens: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._row_tokens = row_tokens

    def cut(self, inputs: Microbatch, rows: int) -> Iterable[tuple[Microbatch, float]]:
        """Parts of at most so many rows."""
        return cut_sequence(inputs, rows * self._row_tokens) if self.padding_free else cut_rows(inputs, rows)

    def rows(self, inputs: Microbatch) -> int:
        """Rows, or as many as the tokens of a shared sequence make at least."""
        rows, tokens = inputs["input_ids"].shape
        return -(-tokens // self._row_tokens) if self.padding_free else int(rows)


def build_trainer(
    roles: Roles, arguments: Any, train_rows: Sequence[TokenizedExample], held_out_rows: Sequence[TokenizedExample]
) -> PolicyTrainer:
    """The trainer of the policy's adapter, which stays in float32."""
    exact = {name: parameter.data for name, parameter in roles.parameters("policy").items()}
    trainer = PolicyTrainer(
        model=roles.model,
        args=arguments,
        train_dataset=as_dataset(train_rows),
        eval_dataset=as_dataset(held_out_rows) if held_out_rows else None,
        processing_class=padding_tokenizer(roles.base.chat),
        row_tokens=arguments.max_length or max(len(row.ids) for row in train_rows),
        shards=roles.shards,
    )
    # On a quantized base TRL rounds adapters to bfloat16, in which small updates are lost.
    for name, parameter in roles.parameters("policy").items():
        parameter.data = exact[name]
    if roles.device.type == "cpu":
        project_only_targets(roles)
    return trainer


@torch.no_grad()
def require_separate_rows(roles: Roles, trainer: SFTTrainer) -> None:
    """Where rows share a sequence, prove on the loaded model that they do not see each other.

    That depends on the architecture and on the attention kernel: both must heed the restarting positions.

    Raises:
        ConfigError: what stands in the first row changes the second.
    """
    if not trainer.padding_free:
        return
    row = list(trainer.train_dataset[0]["input_ids"])[:16]

    def second_row(first: list[int]) -> torch.Tensor:
        batch = trainer.data_collator([{"input_ids": ids, "labels": ids} for ids in (first, row)])
        inputs = {
            name: value.to(roles.device) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
            if name != "labels"
        }
        hidden_BLD = trunk_of(roles.base.model)(**inputs, use_cache=False).last_hidden_state
        return cast(torch.Tensor, hidden_BLD[0, len(first) :].float())

    roles.inference_mode()
    with roles.active("policy"):
        one, other = second_row(row), second_row([roles.base.chat.eos_token_id] * len(row))
    # The same kernels on the same shapes: what differs is either nothing, or the last bits where an expert's share
    # of the tokens changes the order of a sum.
    tolerance = 1e-5 if roles.base.model.dtype == torch.float32 else 1e-2
    if float((one - other).abs().max()) > tolerance * float(other.abs().max()):
        raise ConfigError(
            f"rows that share a sequence would see each other: {type(roles.base.model).__name__} with the"
            f" '{roles.base.model.config._attn_implementation}' attention does not keep them apart",
            where="sft.packing",
            remedy="Set sft.packing=false, or another base.attention.",
        )


@torch.no_grad()
def held_out_loss(
    roles: Roles, role: Role | None, rows: Sequence[TokenizedExample], accelerator: Accelerator, budget: MemoryBudget
) -> float | None:
    """Mean negative log-likelihood of the assistant's tokens in nats, each token of all rows counting the same.

    Args:
        role: under whose adapter; None is the bare base, which a fresh adapter equals.
        rows: shared by the processes.
        budget: tokens of one forward pass, padding included, as far as memory goes.

    Returns:
        the loss; None where there are no rows.

    Raises:
        DivergenceError: it is not finite.
        OutOfMemoryError: a single row does not fit.
    """
    if not rows:
        return None
    mine = list(rows[accelerator.process_index :: accelerator.num_processes])
    if roles.shards is not None and len(mine) < math.ceil(len(rows) / accelerator.num_processes):
        # As many rows in every process, since they pass in step; this one says nothing that counts.
        mine.append(replace(rows[0], loss_mask=(False,) * len(rows[0].ids)))
    longest = max((len(row.ids) for row in mine), default=1)
    roles.inference_mode()
    with roles.active(role):
        sums = budget.fit(
            lambda most: _sums_of_logprobs(roles, mine, most),
            smallest=longest,
            whole=longest * len(mine),
            remedy=f"A row of {longest} tokens does not fit: set sft.max_length={longest // 2}, base.quantization=nf4.",
        )
    total, count = accelerator.reduce(sums, "sum").tolist()
    if not math.isfinite(total):
        raise DivergenceError(
            "the held-out loss is not finite",
            where="sft",
            remedy="Lower sft.learning_rate, or look at the held-out rows; with 16 bits, try base.dtype=float32.",
        )
    return float(-total / count)


def _sums_of_logprobs(roles: Roles, rows: Sequence[TokenizedExample], max_tokens: int) -> Tensor:
    """Of the assistant's tokens under the active role: the log-probabilities' sum in nats, and their number: [2]."""
    sums = torch.zeros(2, dtype=torch.float64, device=roles.device)
    with progress(len(rows), "sft held-out loss", "rows") as bar:
        for group in roles.microbatches([len(row.ids) for row in rows], max_tokens):
            sums += said_logprobs(roles, [rows[index] for index in group]).sum(dim=0)
            bar.advance(len(group))
    return sums


def perplexity(loss: float | None) -> float | None:
    """exp(loss), kept within what a float can hold."""
    return None if loss is None else math.exp(min(loss, 700.0))


if __name__ == "__main__":
    stage_main("sft", run)
