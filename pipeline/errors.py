"""One tree of errors. A message says what is wrong, where, and what to do about it.

Every class also inherits the standard error that it specialises, so that callers who know nothing
of trivet can still catch it. All of them survive pickling (they cross process boundaries).
"""

from __future__ import annotations


class TrivetError(Exception):
    """Base of every error that trivet raises on purpose.

    Args:
        problem: what is wrong, as a sentence without a final full stop.
        where: the file, row, key or setting it was found at; None where there is no such place.
        remedy: what the user can do about it, as an imperative sentence.
    """

    def __init__(self, problem: str, *, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(problem)
        self.problem, self.where, self.remedy = problem, where, remedy

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        advice = f"\n  -> {self.remedy}" if self.remedy else ""
        return f"{place}{self.problem}{advice}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.problem, self.where, self.remedy)


def _rebuild(kind: type[TrivetError], problem: str, where: str | None, remedy: str | None) -> TrivetError:
    return kind(problem, where=where, remedy=remedy)


class ConfigError(TrivetError, ValueError):
    """An unknown key, a value out of range, two settings that contradict each other, a bad override."""


class DataError(TrivetError, ValueError):
    """A missing file, a malformed row, wrong columns, a data set with nothing left in it."""


class BaseModelError(TrivetError, ValueError):
    """The base or its tokenizer cannot be found or used: offline, no chat template, no EOS token."""


class IncompatibleAdapterError(TrivetError, ValueError):
    """An adapter that was trained on another base, revision, quantization, template or tokenizer."""


class ArtifactError(TrivetError, OSError):
    """A finished stage's folder is missing, incomplete, edited by hand or corrupted."""


class ForeignResultError(ArtifactError):
    """A stage's folder holds what this trivet did not write: a newer one's result, or a stray file. It stays."""


class RunDirectoryError(TrivetError, OSError):
    """The run directory belongs to another config, to a newer version, or cannot be written."""


class RewardFunctionError(TrivetError, ValueError):
    """A reward or gold function that cannot be imported, raises, or returns something not finite."""


class StartupGateError(TrivetError, RuntimeError):
    """A start-up check of PPO failed: KL is not 0, the ratio is not 1, the reward does not round-trip."""


class DivergenceError(TrivetError, ArithmeticError):
    """A loss, gradient, reward or log-probability that is not finite, named with its iteration."""


class OutOfMemoryError(TrivetError, MemoryError):
    """Memory ran out although the work was cut as small as it gets; says which setting to lower and by how much."""


class StageFailedError(TrivetError, RuntimeError):
    """A stage's process ended with an error; the message holds the last lines of its log."""


class LostProcessError(TrivetError, RuntimeError):
    """Another process of the stage, here or on another machine, did not come, has ended, or does not take part."""


class StageInterruptedError(StageFailedError):
    """A stage was asked to stop and did, where the same command can go on."""


class GateError(TrivetError, RuntimeError):
    """A stage's figures miss a threshold of the config's `gates`: the run stops before the next stage."""


class DeviceLockError(TrivetError, OSError):
    """The lock of a device that several runs share cannot be opened."""


class RegistryError(TrivetError, OSError):
    """The registry of promoted policies is damaged, or has no such version."""


class OutputError(TrivetError, OSError):
    """A place to write to that is taken or cannot be written, a form that a result does not have, a converter that is
    not installed, a hub that refuses."""
