"""The reward of a response: a weighted sum of the reward adapter's score and of Python functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.artifacts import Manifest
from pipeline.config import RewardSource
from pipeline.errors import RewardFunctionError
from pipeline.functions import load_function
from pipeline.records import Prompt, as_plain


@dataclass(frozen=True)
class Calibration:
    """Maps raw reward-model scores to mean 0 and variance 1 on samples of the SFT policy."""

    gain: float = 1.0
    bias: float = 0.0

    def apply(self, raw_B: Tensor) -> Tensor:
        """Raw scores -> standardised scores."""
        return self.gain * raw_B + self.bias

    @classmethod
    def of(cls, reward: Manifest) -> Calibration:
        """The calibration that a finished reward stage stored."""
        assert reward.reward_gain is not None and reward.reward_bias is not None
        return cls(reward.reward_gain, reward.reward_bias)

    @classmethod
    def fit(cls, raw_B: Tensor) -> Calibration:
        """The gain and bias after which these scores have mean 0 and variance 1.

        Scores that do not vary keep gain 1: there is nothing to scale.
        """
        deviation = float(raw_B.double().std(correction=0))
        gain = 1.0 / deviation if deviation > 1e-8 else 1.0
        return cls(gain, -gain * float(raw_B.double().mean()))


class RewardFunction:
    """A user's function as a reward or gold measure, checked at every call.

    It is called with keyword arguments, lists of one entry a response: `prompts` (strings, or lists of
    messages), `completions` (strings), and every other column of the prompt rows. It returns one number each.

    Args:
        reference: `FILE.py:FUNCTION`.
        what: how errors call it.

    Raises:
        RewardFunctionError: it cannot be imported.
    """

    def __init__(self, reference: str, what: str = "reward function") -> None:
        self.reference, self.what = reference, what
        self._function: Callable[..., Any] = load_function(reference, what=what)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """Score the completions of the prompts.

        Raises:
            RewardFunctionError: it raised, or returned a wrong number of values or one that is not finite.
        """
        names = sorted({name for prompt in prompts for name in prompt.columns})
        columns: Mapping[str, list[Any]] = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
        try:
            values = self._function(
                prompts=[as_plain(prompt.prompt) for prompt in prompts], completions=list(completions), **columns
            )
            numbers = [float(value) for value in values]
        # A function that calls sys.exit must not end the stage without a word.
        except (Exception, SystemExit) as error:
            raise RewardFunctionError(
                f"the {self.what} failed: {type(error).__name__}: {error}",
                where=self.reference,
                remedy="It is called with lists prompts=, completions= and the rows' other columns,"
                " and returns a list of numbers.",
            ) from error
        if len(numbers) != len(prompts):
            raise RewardFunctionError(
                f"the {self.what} returned {len(numbers)} numbers for {len(prompts)} responses",
                where=self.reference,
                remedy="Return a list of one number for every response, in their order.",
            )
        for prompt, completion, number in zip(prompts, completions, numbers, strict=True):
            if not math.isfinite(number):
                raise RewardFunctionError(
                    f"the {self.what} returned {number} for the response {completion[:80]!r} to {prompt.origin}",
                    where=self.reference,
                    remedy="Return a finite number for every response.",
                )
        return numbers

    def probe(self, prompts: Sequence[Prompt]) -> None:
        """Call it once on real prompts and short answers, so that a fault shows before a model is loaded."""
        few = list(prompts[:2])
        self(few, ["An answer.", ""][: len(few)])


class RewardSum:
    """PPO's score of a response: the weighted sum of its sources, before penalty and clipping.

    Args:
        sources: the terms, from the config.
        model_scores: standardised scores of the reward adapter for whole sequences; None if no term needs it.

    Raises:
        RewardFunctionError: a function cannot be imported.
    """

    def __init__(
        self, sources: Sequence[RewardSource], model_scores: Callable[[Sequence[Sequence[int]]], Tensor] | None
    ) -> None:
        self._sources = sources
        self._functions = {
            source.name: RewardFunction(source.function) for source in sources if source.function is not None
        }
        self._model_scores = model_scores

    def probe(self, prompts: Sequence[Prompt]) -> None:
        """Call every function once, on real prompts."""
        for function in self._functions.values():
            function.probe(prompts)

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[str], sequences: Sequence[Sequence[int]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Score responses given as text and as whole token sequences.

        Returns:
            the sum [B] and each term by name [B], unweighted; float32 on the CPU.
        """
        terms: dict[str, Tensor] = {}
        for source in self._sources:
            if source.function is None:
                assert self._model_scores is not None, "a model term needs model scores"
                terms[source.name] = self._model_scores(sequences)
            else:
                terms[source.name] = torch.tensor(self._functions[source.name](prompts, completions))
        total_B = torch.stack([source.weight * terms[source.name] for source in self._sources]).sum(dim=0)
        return total_B, terms
