"""PPO's update: epochs of minibatches over one round's experience.

Minibatches are drawn from the responses of all processes, of which each takes an equal part: steps do not depend on
how many processes there are, except for rounding.

Shape legend: B response, T response token, N response token of any response of a microbatch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import PPOSettings
from pipeline.distributed import World
from pipeline.errors import DivergenceError, OutOfMemoryError, StartupGateError
from pipeline.generation import derive_seed
from pipeline.losses import PolicyLoss, ValueLoss, policy_loss, value_loss
from pipeline.memory import give_back_freed_memory, is_out_of_memory, megabytes
from pipeline.roles import Role, Roles
from pipeline.scoring import batch_episodes, head_values, policy_logprobs
from stages.experience import Budgets, Experience, ratio_tolerance
from stages.interruption import stop_alone, stop_together
from stages.whole_round import WholeRound


@dataclass
class UpdateStatistics:
    """Sums over the tokens of the optimizer steps so far, to be divided by their number; maxima as they are."""

    steps: int = 0
    seconds: float = 0.0
    tokens: float = 0.0
    policy_loss: float = 0.0
    value_loss: float = 0.0
    clipped: float = 0.0
    values_clipped: float = 0.0
    approx_kl: float = 0.0
    entropy: float = 0.0
    ratio_max: float = 0.0
    first_ratio_error: float | None = None
    first_ratio_errors: float = 0.0
    """Of the first step: the largest distance of a ratio from 1, and the sum over its tokens."""
    pad_tokens: float = 0.0
    pass_tokens: float = 0.0
    """Of the forward passes: padding, and all tokens with it."""
    gradient_norms: dict[Role, list[float]] = field(default_factory=dict)

    def add(self, step: UpdateStatistics) -> None:
        """Count a further step in."""
        self.steps += step.steps
        self.seconds += step.seconds
        self.tokens += step.tokens
        self.policy_loss += step.policy_loss
        self.value_loss += step.value_loss
        self.clipped += step.clipped
        self.values_clipped += step.values_clipped
        self.approx_kl += step.approx_kl
        self.entropy += step.entropy
        self.pad_tokens += step.pad_tokens
        self.pass_tokens += step.pass_tokens
        self.ratio_max = max(self.ratio_max, step.ratio_max)
        if self.first_ratio_error is None:
            self.first_ratio_error, self.first_ratio_errors = step.first_ratio_error, step.first_ratio_errors
        for role, norms in step.gradient_norms.items():
            self.gradient_norms.setdefault(role, []).extend(norms)

    def state_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> UpdateStatistics:
        """What `state_dict` gave."""
        return cls(**state)

    def metrics(self, world: World) -> dict[str, float]:
        """Means over all processes' tokens, under the names that are logged."""
        sums = torch.tensor(
            [self.tokens, self.clipped, self.values_clipped, self.approx_kl, self.entropy], dtype=torch.float64
        )
        tokens, clipped, values_clipped, approx_kl, entropy = world.sum(sums).tolist()
        losses = world.sum(torch.tensor([self.policy_loss, self.value_loss], dtype=torch.float64)).tolist()
        steps = max(1, max((len(norms) for norms in self.gradient_norms.values()), default=1))
        metrics = {
            "policy/loss": losses[0] / steps,
            "policy/clip_fraction": clipped / tokens,
            "policy/approx_kl": approx_kl / tokens,
            "policy/entropy": entropy / tokens,
            "policy/ratio_max": world.maximum(self.ratio_max),
            "value/loss": losses[1] / steps,
            "value/clip_fraction": values_clipped / tokens,
            "padding/update": padding_share(torch.tensor([self.pad_tokens, self.pass_tokens]), world),
        }
        if "policy" not in self.gradient_norms:  # in the critic's warm-up nothing of it was measured
            metrics = {name: value for name, value in metrics.items() if not name.startswith("policy/")}
        for role, norms in self.gradient_norms.items():
            metrics[f"{role}/gradient_norm"] = sum(norms) / len(norms)
        return metrics


def padding_share(padding: Tensor, world: World) -> float:
    """Padding over all tokens of passes, of all processes: of (padding, all tokens) [2]."""
    pad_tokens, tokens = world.sum(padding.double()).tolist()
    return float(pad_tokens / max(1.0, tokens))


class Updater:
    """Makes the optimizer steps of a round.

    Args:
        roles: with `policy` trainable, and `value` (its adapter only with `critic: adapter`).
        optimizer: over the parameters of both roles.
        ppo: the settings.
        seed: the run's; minibatches follow from (seed, iteration, epoch).
        world: all processes.
        budgets: how much to do at once.
    """

    def __init__(
        self,
        roles: Roles,
        optimizer: torch.optim.Optimizer,
        ppo: PPOSettings,
        *,
        seed: int,
        world: World,
        budgets: Budgets,
    ) -> None:
        self._roles, self._optimizer, self._ppo, self._seed, self._world = roles, optimizer, ppo, seed, world
        self._budgets = budgets
        self._parameters: Mapping[Role, list[nn.Parameter]] = {
            role: list(roles.parameters(role).values()) for role in ("policy", "value")
        }

    def update(
        self, experience: Experience, iteration: int, *, critic_only: bool, statistics: UpdateStatistics | None = None
    ) -> UpdateStatistics:
        """Learn from a round.

        Args:
            iteration: 0-based, for seeds and messages.
            critic_only: True in the critic's warm-up: the policy stands still.
            statistics: the steps made so far, which are not made again; further ones are counted in. None: none.

        Returns:
            the statistics of all steps.

        Raises:
            DivergenceError: a loss or gradient is not finite; no step was made with it.
            OutOfMemoryError: a single sequence does not fit.
            StartupGateError: on the first minibatch the ratio is not 1 within `ppo.ratio_tolerance`.
            Interrupted: the stage was asked to stop; `statistics` tell after how many steps.
        """
        give_back_freed_memory()
        self._roles.training_mode(gradient_checkpointing=self._ppo.gradient_checkpointing)
        statistics = UpdateStatistics() if statistics is None else statistics
        whole = WholeRound.of(experience, self._world)
        minibatches = [
            (epoch, number, rows)
            for epoch in range(self._ppo.epochs)
            for number, rows in enumerate(self._minibatches(len(whole.episodes), iteration, epoch))
        ]
        for epoch, number, rows in minibatches[statistics.steps :]:
            stop_together(self._world)
            where = f"iteration {iteration + 1}, epoch {epoch + 1}, minibatch {number + 1}"
            first = statistics.steps == 0
            statistics.add(self._step(whole, rows, critic_only=critic_only, first=first, where=where))
        self._roles.inference_mode()
        give_back_freed_memory()
        return statistics

    def _minibatches(self, responses: int, iteration: int, epoch: int) -> Iterator[list[int]]:
        """The rows of each minibatch of an epoch, over all processes."""
        # The last part was the process's rank while each shuffled by itself; one process still gives the bytes it gave.
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "minibatches", iteration, epoch, 0))
        order = torch.randperm(responses, generator=generator).tolist()
        for start in range(0, responses, self._ppo.minibatch_size):
            yield order[start : start + self._ppo.minibatch_size]

    def _step(
        self, experience: WholeRound, minibatch: list[int], *, critic_only: bool, first: bool, where: str
    ) -> UpdateStatistics:
        """One optimizer step; returns what it alone counts, in this process."""
        started = time.monotonic()
        normalizer = float(experience.lengths_B[minibatch].sum())
        rows = experience.share(minibatch, self._world)
        self._roles.padding.take()
        step = self._budgets.fit_sequences(
            experience.lengths(rows),
            lambda max_tokens: self._backward(
                experience, rows, normalizer, max_tokens, critic_only=critic_only, first=first
            ),
        )
        self._require_finite(step, where)
        self._check_first_ratio(step, normalizer, where)
        trained: list[Role] = ["value"] if critic_only else ["policy", "value"]
        for role in trained:
            parameters = self._parameters[role]
            self._world.sum_gradients(parameters)
            norm = float(nn.utils.clip_grad_norm_(parameters, self._ppo.max_grad_norm))
            if norm != norm or norm == float("inf"):
                raise _diverged(f"the gradient of the {role} is not finite (norm {norm})", where)
            step.gradient_norms[role] = [norm]
        self._move()
        step.steps, step.seconds = 1, time.monotonic() - started
        step.pad_tokens, step.pass_tokens = self._roles.padding.take()
        return step

    def _move(self) -> None:
        """The optimizer's step. The first one allocates its state.

        Raises:
            OutOfMemoryError: there is no room for it.
        """
        try:
            self._optimizer.step()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            count = sum(parameter.numel() for group in self._optimizer.param_groups for parameter in group["params"])
            raise OutOfMemoryError(
                f"memory runs out for the optimizer's state: two numbers for each of {count:,} that learn,"
                f" {megabytes(8 * count)} in float32",
                where="ppo",
                remedy="Set ppo.optimizer=paged_adamw_8bit, or ppo.critic=head, base.quantization=nf4; or halve"
                " lora.rank, which halves that.",
            ) from None

    def _backward(
        self,
        experience: WholeRound,
        rows: list[int],
        normalizer: float,
        max_tokens: int,
        *,
        critic_only: bool,
        first: bool,
    ) -> UpdateStatistics:
        """The gradients of a minibatch, and what was seen on the way. Can be done again: it starts from none."""
        self._optimizer.zero_grad(set_to_none=True)
        step = UpdateStatistics(tokens=float(experience.lengths_B[rows].sum()))
        groups = self._roles.microbatches(experience.lengths(rows), max_tokens)
        microbatches = [[rows[index] for index in group] for group in groups]
        # One role after the other, each with its backward inside: see PPO on one base in `pipeline.roles`.
        separate_critic = self._ppo.critic == "adapter"
        if not (critic_only and separate_critic):
            with self._roles.active("policy"):
                for microbatch in microbatches:
                    self._policy_backward(
                        experience, microbatch, normalizer, step, critic_only=critic_only, first=first
                    )
                    stop_alone(self._world)
        if separate_critic:
            with self._roles.active("value"):
                for microbatch in microbatches:
                    self._critic_backward(experience, microbatch, normalizer, step)
                    stop_alone(self._world)
        return step

    def _require_finite(self, step: UpdateStatistics, where: str) -> None:
        """All processes stop where one of them must: the others would wait for it."""
        for name, loss in (("policy", step.policy_loss), ("value", step.value_loss)):
            if self._world.maximum(float(not math.isfinite(loss))):
                raise _diverged(f"the {name} loss is not finite", where)

    def _policy_backward(
        self,
        experience: WholeRound,
        rows: list[int],
        normalizer: float,
        statistics: UpdateStatistics,
        *,
        critic_only: bool,
        first: bool,
    ) -> None:
        """Policy loss, and with `critic: head` the value loss on the same trunk, for one microbatch."""
        roles, ppo = self._roles, self._ppo
        batch = batch_episodes([experience.episodes[row] for row in rows], roles.device)
        loss = torch.zeros((), device=roles.device)
        with torch.set_grad_enabled(not critic_only):
            hidden_BLD = roles.hidden_states(batch.ids_BL, batch.mask_BL)
            if not critic_only:
                new = policy_logprobs(roles, hidden_BLD, batch, temperature=ppo.temperature, with_entropy=True)
                assert new.entropy_N is not None
                policy = policy_loss(
                    new.logprobs_N[None],
                    _take(experience.logprobs_BT, experience, rows),
                    _take(experience.advantages_BT, experience, rows),
                    _all_valid(new.logprobs_N),
                    clip_range=ppo.clip_range,
                    normalizer=normalizer,
                )
                _note_policy(statistics, policy, new.entropy_N)
                if first:
                    old_N = _take(experience.logprobs_BT, experience, rows)[0]
                    error_N = (torch.exp(new.logprobs_N.detach() - old_N) - 1).abs()
                    largest = max(statistics.first_ratio_error or 0.0, float(error_N.max()))
                    statistics.first_ratio_error = largest
                    statistics.first_ratio_errors += float(error_N.sum())
                loss = loss + policy.loss
        if ppo.critic == "head":
            values_N = head_values(roles, "value", hidden_BLD.detach() if critic_only else hidden_BLD, batch)
            value = self._value_loss(experience, rows, values_N, normalizer)
            _note_value(statistics, value)
            loss = loss + ppo.value_loss_coefficient * value.loss
        loss.backward()  # type: ignore[no-untyped-call]

    def _critic_backward(
        self, experience: WholeRound, rows: list[int], normalizer: float, statistics: UpdateStatistics
    ) -> None:
        batch = batch_episodes([experience.episodes[row] for row in rows], self._roles.device)
        hidden_BLD = self._roles.hidden_states(batch.ids_BL, batch.mask_BL)
        values_N = head_values(self._roles, "value", hidden_BLD, batch)
        value = self._value_loss(experience, rows, values_N, normalizer)
        _note_value(statistics, value)
        value.loss.backward()  # type: ignore[no-untyped-call]

    def _value_loss(self, experience: WholeRound, rows: list[int], values_N: Tensor, normalizer: float) -> ValueLoss:
        return value_loss(
            values_N[None],
            _take(experience.values_BT, experience, rows),
            _take(experience.returns_BT, experience, rows),
            _all_valid(values_N),
            clip_range=self._ppo.value_clip_range,
            normalizer=normalizer,
        )

    def _check_first_ratio(self, statistics: UpdateStatistics, tokens: float, where: str) -> None:
        """On a round's first minibatch old and new log-probabilities are the same model's."""
        if statistics.first_ratio_error is None:
            return
        # The mean: in 16 bits a token of a long sequence may be off by a third, while what is wrong shifts them all.
        error = float(self._world.sum(torch.tensor(statistics.first_ratio_errors, dtype=torch.float64))) / tokens
        tolerance = ratio_tolerance(self._ppo, self._roles.base.identity.quantization)
        if not error <= tolerance:
            raise StartupGateError(
                f"before any update the probability ratio differs from 1 by {error:.3g} in the mean, which is above"
                f" {tolerance:g}",
                where=where,
                remedy="Old and new log-probabilities come from different arithmetic; if that is only rounding,"
                " raise ppo.ratio_tolerance.",
            )


def _diverged(problem: str, where: str) -> DivergenceError:
    return DivergenceError(
        problem,
        where=where,
        remedy="Lower ppo.learning_rate or raise ppo.kl.coefficient, with which PPO starts anew.",
    )


def _take(values_BT: Tensor, experience: WholeRound, rows: list[int]) -> Tensor:
    """The response tokens of some rows, one after the other: [1, N]."""
    return values_BT[rows][experience.mask_BT[rows]][None]


def _all_valid(values_N: Tensor) -> Tensor:
    return torch.ones_like(values_N, dtype=torch.bool)[None]


def _note_policy(statistics: UpdateStatistics, policy: PolicyLoss, entropy_N: Tensor) -> None:
    statistics.policy_loss += float(policy.loss.detach())
    statistics.clipped += float(policy.clip_fraction_sum)
    statistics.approx_kl += float(policy.approx_kl_k3_sum)
    statistics.entropy += float(entropy_N.detach().sum())
    statistics.ratio_max = max(statistics.ratio_max, float(policy.ratio_max))


def _note_value(statistics: UpdateStatistics, value: ValueLoss) -> None:
    statistics.value_loss += float(value.loss.detach())
    statistics.values_clipped += float(value.clip_fraction_sum)
