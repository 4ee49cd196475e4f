"""The KL divergence from samples, and the controllers of its coefficient.

Shape legend: B sequence, T response token.

Per-token estimators of KL(p || q) from tokens drawn from p (Schulman 2020, "Approximating KL Divergence").
Both are unbiased. k1 belongs in the reward, since its gradient through the return is the right one; k3 is
never negative and varies less, so it belongs in logs.

Left out: k2, and the full-vocabulary KL.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config import KL_ERROR_CLIP


def kl_k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """log p - log q of the sampled tokens, in nats; negative where q likes the token better.

    Args:
        logprobs: log p of the tokens, under the distribution they were drawn from; any shape.
        reference_logprobs: log q of the same tokens; the same shape.
    """
    _check_shapes(logprobs, reference_logprobs)
    return logprobs - reference_logprobs


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """(r - 1) - log r with r = q / p of the sampled tokens, in nats; never negative.

    Args:
        logprobs: log p of the tokens, under the distribution they were drawn from; any shape.
        reference_logprobs: log q of the same tokens; the same shape.
    """
    _check_shapes(logprobs, reference_logprobs)
    log_ratio = reference_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


@dataclass
class FixedKL:
    """A KL coefficient that stays what it is.

    Args:
        coefficient: beta, reward units per nat; 0 switches the penalty off.
    """

    coefficient: float

    def __post_init__(self) -> None:
        self.coefficient = _not_negative("the KL coefficient", self.coefficient)

    def update(self, observed_kl: float, samples: int) -> None:
        """Nothing to do: the coefficient does not depend on what was observed."""

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint must hold, as JSON-able data."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over a checkpoint's coefficient. ValueError if it has none or an impossible one."""
        self.coefficient = _saved_coefficient(state)


@dataclass
class AdaptiveKL:
    """A proportional controller of log beta (Ziegler et al. 2019, with the horizon of their code).

    e = clip(KL / target - 1, -clip, clip);  beta <- beta * (1 + e * samples / horizon)

    Args:
        coefficient: beta at the start, reward units per nat; above 0, since a product never leaves 0.
        target: the wanted KL(policy || reference), nats per response.
        horizon: in how many sampled responses an error of 1 would double beta.
        clip: bound of the proportional error.
    """

    coefficient: float
    target: float = 6.0
    horizon: int = 10_000
    clip: float = KL_ERROR_CLIP

    def __post_init__(self) -> None:
        self.coefficient = _positive("the adaptive KL coefficient", self.coefficient)
        for name in ("target", "horizon", "clip"):
            _positive(f"the KL controller's {name}", getattr(self, name))

    def update(self, observed_kl: float, samples: int) -> None:
        """Move the coefficient after one iteration.

        Args:
            observed_kl: the mean over sampled responses of each response's SUM of k1, nats per response
                (not per token); an estimate, so it may be slightly negative.
            samples: over how many responses, on all ranks.

        Raises:
            ValueError: a KL that is not finite, or so many samples that one step could bring the
                coefficient to 0 or below.
        """
        assert samples >= 0, samples
        if not math.isfinite(observed_kl):
            raise ValueError(f"the observed KL must be finite, got {observed_kl}")
        if self.clip * samples >= self.horizon:
            raise ValueError(
                f"{samples} samples in one step with horizon {self.horizon} and clip {self.clip} could turn "
                f"the KL coefficient negative: the horizon must exceed {self.clip * samples:g}"
            )
        error = min(max(observed_kl / self.target - 1, -self.clip), self.clip)
        self.coefficient *= 1 + error * samples / self.horizon

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint must hold, as JSON-able data: target, horizon and clip are configuration."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over a checkpoint's coefficient. ValueError if it has none or an impossible one."""
        self.coefficient = _positive("the adaptive KL coefficient", _saved_coefficient(state))


KLController = FixedKL | AdaptiveKL


def _saved_coefficient(state: Mapping[str, float]) -> float:
    if state.keys() != {"coefficient"}:
        raise ValueError(f"a KL controller's state holds one key, coefficient; got {sorted(state)}")
    return _not_negative("the KL coefficient", state["coefficient"])


def _not_negative(name: str, number: float) -> float:
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {number}")
    return float(number)


def _positive(name: str, number: float) -> float:
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be finite and above 0, got {number}")
    return float(number)


def _check_shapes(logprobs: Tensor, reference_logprobs: Tensor) -> None:
    if logprobs.shape != reference_logprobs.shape:
        raise ValueError(
            f"log-probabilities have shape {tuple(logprobs.shape)}, "
            f"the reference's have {tuple(reference_logprobs.shape)}"
        )
