"""What trivet changes in TRL's trainers: batches, checkpoints, microbatches that fit into memory, and stopping.

A checkpoint holds safetensors and JSON only, and everything that later steps depend on, so that a resumed training ends
in the very bytes of one that was never interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer

from pipeline.checkpoint import CheckpointFolder
from pipeline.distributed import World, random_states, restore_random_states
from pipeline.errors import DivergenceError
from pipeline.memory_budget import MemoryBudget
from pipeline.progress import say
from pipeline.run_directory import StageName
from pipeline.sharding import Shards, unknown_to_libraries
from pipeline.tensor_tree import load_tree, save_tensors, save_tree
from stages.interruption import Interrupted, requested
from stages.microbatches import Microbatch
from stages.whole_batches import EXAMPLES, CollatorOfGaps, RowsWithGaps, WholeBatches, with_targets_of_rows

TRAINER_STATE = "trainer_state.json"
"""What transformers reads the steps and the logged figures from."""
_MODEL, _BEST, _OPTIMIZER, _PROCESSES = "model.safetensors", "best.safetensors", "optimizer", "processes"


class StageTrainer(Trainer):  # type: ignore[misc]
    """Put before a trainer of TRL's. `stage`, `cut` and `rows` are the subclass's; `train` gives it its checkpoints.

    Args:
        shards: the model's base where it is shared out among the processes; None where each has all of it.
    """

    stage: StageName
    checkpoints: CheckpointFolder | None = None
    current_gradient_accumulation_steps: float
    train_dataset: Any
    data_collator: Any

    def __init__(self, *args: Any, shards: Shards | None = None, **kwargs: Any) -> None:
        self.world, self.shards = World(), shards
        with unknown_to_libraries():
            super().__init__(*args, **kwargs)
        size = self.args.per_device_train_batch_size
        self._budget = MemoryBudget(f"{self.stage}.microbatch_size", size, self._say, alone=shards is None)
        self._losses: list[Tensor] = []  # of this step's microbatches
        self._loss_sum, self._loss_steps = 0.0, 0  # since the last line of metrics
        self._best: dict[str, Tensor] = {}
        self._after_step: dict[str, Any] = {}
        self._saved_step = -1
        self._step_examples = 0  # rows of this step in all processes
        self._counts = True  # whether the microbatch at hand has rows of its own

    def cut(self, inputs: Microbatch, rows: int) -> Iterable[tuple[Microbatch, float]]:
        """Parts of a microbatch with at most so many rows, and each one's share of the whole's loss."""
        raise NotImplementedError

    def rows(self, inputs: Microbatch) -> int:
        """How many rows a microbatch has, counted as `sft.microbatch_size` and `reward.microbatch_size` are."""
        raise NotImplementedError

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: checkpoints are working files, which nobody publishes."""

    def learning(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    # -- batches

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This process's microbatches of an epoch, as many as the others have; see `stages.whole_batches`."""
        rows, collate = self.train_dataset, self.data_collator
        self.train_dataset, self.data_collator = RowsWithGaps(rows), CollatorOfGaps(collate, rows)
        try:
            return cast("DataLoader[Any]", super().get_train_dataloader())
        finally:
            self.train_dataset, self.data_collator = rows, collate

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler[Any]:
        order: Sampler[Any] = super()._get_train_sampler(*args, **kwargs)
        if getattr(self.args, "train_sampling_strategy", None) == "batch_rebalance":
            return order  # which makes each process's microbatches itself, without gaps
        step = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.world.size
        return WholeBatches(order, step, seed=self.args.data_seed, drop_last=self.args.dataloader_drop_last)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Microbatch], Any]:
        """A step's microbatches, and the tokens that the loss is over, where it is over tokens."""
        batches, targets = super().get_batch_samples(*args, **kwargs)
        examples = torch.tensor(sum(batch[EXAMPLES] for batch in batches), dtype=torch.float64)
        self._step_examples = int(self.world.sum(examples))
        return batches, targets

    def _get_num_items_in_batch(self, batches: list[Microbatch], device: torch.device) -> Any:
        return super()._get_num_items_in_batch(with_targets_of_rows(batches), device)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's loss; 0, with slopes of 0, for a microbatch that has no row of its own."""
        loss = super().compute_loss(*args, **kwargs)
        return loss if self._counts else loss * 0.0

    # -- steps

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """The model was loaded where it belongs, which for shares may be main memory."""
        if self.shards is None:
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """The wrapper of data parallelism; where the base is shared out, one that sees the adapters alone.

        Accelerate would refuse to put it around a base in shares. Nor are buffers sent around, which are constants: a
        process without a row of its own makes no pass in which it could take part.
        """
        if self.world.size == 1 or not training or isinstance(model, DistributedDataParallel):
            return cast(nn.Module, super()._wrap_model(model, training, dataloader))
        ignored = [name for name, _ in model.named_buffers()]
        if self.shards is not None:
            ignored += [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        cast(Any, model)._ddp_params_and_buffers_to_ignore = ignored
        if self.shards is not None:
            return DistributedDataParallel(model)
        return cast(nn.Module, super()._wrap_model(model, training, dataloader))

    def training_step(self, model: nn.Module, inputs: Microbatch, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a microbatch, in parts where it does not fit; checks the step's last one.

        Processes that hold the whole model work without each other until the step's gradients are complete, so that
        one of them can run out of memory and try again while the others wait. Where the base is shared out, every
        layer takes all processes, and lack of memory in one ends the stage.

        Raises:
            DivergenceError: a loss or the gradient of the step is not finite.
            OutOfMemoryError: not even one row fits; or a microbatch does not, where the base is shared out.
            Interrupted: the stage was asked to stop between two microbatches; a checkpoint has been written.
        """
        if self.world.size == 1 and requested():
            self._save(self._after_step)
            raise Interrupted
        inputs = dict(inputs)
        examples = inputs.pop(EXAMPLES)
        if not examples and self.shards is None:  # a base in shares takes all processes, whatever they have to do
            model.train()  # by which figures of the training are told from those of an evaluation
            return self._end_microbatch(model, torch.zeros((), device=self.args.device))
        replicated = isinstance(model, DistributedDataParallel)
        learning = list(self.learning().values())
        gradients = [parameter.grad for parameter in learning]
        figures, random, first = self._figures(), random_states(), self._budget.size
        accumulated = self.current_gradient_accumulation_steps
        # Where a loss is a mean over the microbatch, each row of the step is to count the same.
        weight = examples * accumulated * self.world.size / self._step_examples if examples else 1.0
        training_step: Any = super().training_step

        def attempt(rows: int) -> Tensor:
            for parameter in learning:
                parameter.grad = None
            if rows < first:
                self._restore_figures(figures)
                restore_random_states(random)
            losses = []
            for part, share in self._parts(inputs, rows):
                self.current_gradient_accumulation_steps = accumulated / (weight * share)
                losses.append(training_step(model, part, num_items_in_batch))
            return torch.stack(losses).sum()

        with ExitStack() as stack:
            stack.callback(setattr, self, "current_gradient_accumulation_steps", accumulated)
            stack.callback(setattr, self, "_counts", True)
            self._counts = bool(examples)
            if replicated:
                stack.enter_context(cast(DistributedDataParallel, model).no_sync())
                stack.enter_context(_without_gathering(self.accelerator))
            if replicated or self.world.size == 1:
                loss = self._budget.fit(attempt, smallest=1, whole=self.rows(inputs), remedy=self._less_memory(inputs))
            else:
                loss = attempt(self._budget.size)
        for parameter, gradient in zip(learning, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
        if not examples:
            self._restore_figures(figures)
        return self._end_microbatch(model, loss)

    def _end_microbatch(self, model: nn.Module, loss: Tensor) -> Tensor:
        """Keep the loss; after the step's last microbatch, bring the processes' gradients together and check both."""
        self._losses.append(loss)
        if self.accelerator.sync_gradients:
            learning = list(self.learning().values())
            if isinstance(model, DistributedDataParallel):
                self.world.sum_gradients(learning)
                for parameter in learning:
                    cast(Tensor, parameter.grad).div_(self.world.size)
            self._check_step(learning)
        return loss

    def _parts(self, inputs: Microbatch, rows: int) -> Iterable[tuple[Microbatch, float]]:
        """The whole microbatch, as long as it fits."""
        return [(inputs, 1.0)] if rows >= self.rows(inputs) else self.cut(inputs, rows)

    def _check_step(self, learning: Iterable[nn.Parameter]) -> None:
        losses = torch.stack(self._losses).tolist()
        self._losses = []
        self._loss_sum, self._loss_steps = self._loss_sum + sum(losses), self._loss_steps + 1
        # All processes stop where one must: the others would wait for it.
        if self.world.maximum(float(not all(math.isfinite(loss) for loss in losses))):
            raise self._diverged("the loss")
        gradients = [parameter.grad for parameter in learning if parameter.grad is not None]
        if not math.isfinite(float(nn.utils.get_total_norm(gradients))):
            raise self._diverged("the gradient")

    def _diverged(self, quantity: str) -> DivergenceError:
        return DivergenceError(
            f"{quantity} is not finite at step {self.state.global_step + 1}",
            where=self.stage,
            remedy=f"Look at the rows of the step, or lower {self.stage}.learning_rate or {self.stage}.max_grad_norm;"
            " with another setting the stage starts anew.",
        )

    def _less_memory(self, inputs: Microbatch) -> str:
        tokens = inputs["input_ids"].shape[1]
        recompute = "" if self.args.gradient_checkpointing else f"{self.stage}.gradient_checkpointing=true or "
        return (
            f"A single row of up to {tokens} tokens does not fit: set {self.stage}.max_length={max(8, tokens // 2)}"
            f" (longer rows are left out), or {recompute}base.quantization=nf4."
        )

    def _say(self, line: str) -> None:
        print(line if self.world.size == 1 else f"process {self.world.rank}: {line}", flush=True)

    # -- figures

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """TRL's figures and the loss, as means over all steps since the last line, also those before a resume."""
        if "loss" in logs:
            total = float(self.world.sum(torch.tensor(self._loss_sum, dtype=torch.float64)))
            logs["loss"] = total / self.world.size / max(1, self._loss_steps)
            self._loss_sum, self._loss_steps = 0.0, 0
        if self.world.size > 1 and self.model.training:
            self._share_figures()
        super().log(logs, *args, **kwargs)

    def _share_figures(self) -> None:
        """What each process saw in its microbatches becomes the mean of all of them; tokens, their sum."""
        processes = self.world.gather([self._figures()])
        figures = self._metrics["train"]
        for name, values in _pooled(processes).items():
            figures[name] = [sum(values) / len(values)]
        if "num_tokens" in figures:
            figures["num_tokens"] = [sum(each["tokens"] for each in processes)]

    def _figures(self) -> dict[str, Any]:
        figures = {name: list(values) for name, values in self._metrics["train"].items()}
        return {"figures": figures, "tokens": self._total_train_tokens}

    def _restore_figures(self, state: Mapping[str, Any]) -> None:
        self._metrics["train"].clear()
        self._metrics["train"].update({name: list(values) for name, values in state["figures"].items()})
        self._total_train_tokens = state["tokens"]

    # -- checkpoints

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._after_step = self._of_this_process()

    def _of_this_process(self) -> dict[str, Any]:
        """What differs between the processes."""
        return {
            "random": random_states(),
            "loss": (self._loss_sum, self._loss_steps),
            "microbatch_size": self._budget.size,
            **self._figures(),
        }

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._save(self._of_this_process())

    def _save(self, of_this_process: dict[str, Any]) -> None:
        """Write a checkpoint of the step that ended last; writes nothing where there is none yet."""
        if self.checkpoints is None or not of_this_process or self._saved_step == self.state.global_step:
            return
        self.store_flos()
        processes = self.world.gather([of_this_process])

        def write(folder: Path) -> None:
            save_tensors(self.learning(), folder / _MODEL)
            if self._best:
                save_tensors(self._best, folder / _BEST)
            save_tree(folder / _OPTIMIZER, [self.optimizer.state_dict(), self.lr_scheduler.state_dict()])
            save_tree(folder / _PROCESSES, processes)
            self.state.save_to_json(str(folder / TRAINER_STATE))

        if self.world.is_main:
            self.checkpoints.save(self.state.global_step, {}, write)
        self._saved_step = self.state.global_step
        self.world.wait()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self._restore(load_file(folder / _MODEL))
        if (folder / _BEST).exists():
            self._best = load_file(folder / _BEST)
        processes = load_tree(folder / _PROCESSES)
        mine = processes[self.world.rank % len(processes)]
        if len(processes) != self.world.size:
            say(
                f"The checkpoint is of {len(processes)} process(es), this run has {self.world.size}: the same rows"
                " follow, sums are rounded in another way, and dropout, if there is any, is drawn otherwise."
            )
            mine = mine | shared_anew(processes, self.world.rank, self.world.size)
        self._loss_sum, self._loss_steps = mine["loss"]
        if self.shards is None:  # or a process would make more passes than the others
            self._budget.size = min(self._budget.size, mine["microbatch_size"])
        self._restore_figures(mine)
        self._after_step = mine

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            optimizer, scheduler = load_tree(Path(checkpoint) / _OPTIMIZER)
            self.optimizer.load_state_dict(optimizer)
            self.lr_scheduler.load_state_dict(scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_random_states(self._after_step["random"])

    # -- the best adapter, where TRL's options ask for it

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        is_best: bool = super()._determine_best_metric(*args, **kwargs)
        if is_best and self.args.load_best_model_at_end:
            self._best = {name: parameter.detach().cpu().clone() for name, parameter in self.learning().items()}
        return is_best

    def load_best(self) -> None:
        """Go back to the adapter of the best evaluation, if there was one."""
        self._restore(self._best)

    @torch.no_grad()
    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        learning = self.learning()
        for name, tensor in tensors.items():
            learning[name].copy_(tensor)


def shared_anew(processes: Sequence[Mapping[str, Any]], rank: int, size: int) -> dict[str, Any]:
    """What is being summed up for a line of metrics, for one of another number of processes.

    Args:
        processes: what each of those kept that wrote the checkpoint.
        rank: of the one to keep its part.
        size: how many there are now; all parts together make the same means and the same number of tokens.
    """
    figures = {
        name: [sum(values) / len(values)] * max(1, round(len(values) / size))
        for name, values in _pooled(processes).items()
    }
    tokens = int(sum(each["tokens"] for each in processes))
    losses = [each["loss"] for each in processes]
    return {
        "figures": figures,
        "tokens": tokens // size + (rank < tokens % size),
        "loss": (sum(total for total, _ in losses) / len(losses), losses[0][1]),
        "microbatch_size": min(each["microbatch_size"] for each in processes),
    }


def _pooled(processes: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Each figure's values of all microbatches, whichever process had them."""
    pooled: dict[str, list[float]] = {}
    for each in processes:
        for name, values in each["figures"].items():
            pooled.setdefault(name, []).extend(values)
    return {name: values for name, values in pooled.items() if values}


@contextmanager
def _without_gathering(accelerator: Any) -> Iterator[None]:
    """TRL gathers its figures amid a microbatch, where a process that ran out of memory would not come."""
    accelerator.gather = accelerator.gather_for_metrics = lambda value, *_, **__: value
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics
