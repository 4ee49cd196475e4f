"""How much work goes through the model at once, halved where memory runs out.

How a sum over tokens is cut into microbatches does not change it, so that work done again in smaller parts gives the
same result.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from pipeline.errors import OutOfMemoryError
from pipeline.memory import is_out_of_memory

Result = TypeVar("Result")


class MemoryBudget:
    """A size that a setting gives and lack of memory lowers: tokens of a forward pass, responses of a batch.

    Args:
        setting: the key that the size comes from, for messages.
        size: what the key says.
        say: told, as a sentence, when the size is lowered.
        alone: False where other processes wait amid the work, so that it cannot be done again.
    """

    def __init__(self, setting: str, size: int, say: Callable[[str], None], *, alone: bool = True) -> None:
        self.setting, self.size, self._say, self._alone = setting, size, say, alone

    def fit(self, work: Callable[[int], Result], *, smallest: int, whole: int, remedy: str) -> Result:
        """Do the work at the present size; after each lack of memory again at half of it.

        Args:
            work: takes the size, and can be done again from its start.
            smallest: the size below which nothing gets smaller: the longest sequence, or 1 response.
            whole: the size at which the work is done in one part.
            remedy: what to do where even that does not fit.

        Raises:
            OutOfMemoryError: memory ran out at the smallest size.
        """
        while True:
            try:
                return work(self.size)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                said = str(error).partition("\n")[0]
            # Outside of the handler: the error's traceback holds on to what the work had allocated.
            release_memory()
            if self.size <= smallest:
                raise OutOfMemoryError(
                    f"memory runs out even with {self.setting}={self.size} ({said})",
                    where=self.setting,
                    remedy=remedy,
                )
            halved = max(smallest, min(self.size, whole) // 2)
            if not self._alone:
                raise OutOfMemoryError(
                    f"memory runs out with {self.setting}={self.size} ({said}), and what all processes do together"
                    " cannot be done again",
                    where=self.setting,
                    remedy=f"Set {self.setting}={halved}. The stage then starts anew, as after any changed setting.",
                )
            self._say(f"Out of memory with {self.setting}={self.size}; going on with {halved}.")
            self.size = halved


def release_memory() -> None:
    """Give back what nothing refers to any more, the caching allocator's share included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
