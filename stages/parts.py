"""Work in parts: the processes share them, and those that are done are kept and not done again.

Each part is always computed alone and with seeds of its own, so that the result depends neither on the number of
processes nor on an interruption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import seal, unseal
from pipeline.distributed import World
from pipeline.generation import SamplingSettings, generate
from pipeline.progress import say
from pipeline.roles import Role, Roles
from pipeline.run_directory import read_json, write_json
from stages.experience import Budgets
from stages.interruption import stop_alone, stop_together


@dataclass(frozen=True)
class Answer:
    """A sampled answer. `ids` end with an EOS if `finished`."""

    ids: tuple[int, ...]
    finished: bool


class Parts:
    """What an unfinished stage has done so far, a checked JSON file a part.

    Args:
        folder: where the parts are kept.
        inputs_digest: identity of what the stage is made from; parts of other inputs do not count.
        world: the processes that share the work.
        budgets: how much goes through the model at once, as far as memory goes; a part keeps what they had come to.
    """

    def __init__(self, folder: Path, *, inputs_digest: str, world: World, budgets: Budgets) -> None:
        self._folder, self._inputs_digest, self._world, self.budgets = folder, inputs_digest, world, budgets

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        """A part as JSON gives it back: from an earlier start if it is whole, else made now."""
        path = self._folder / f"{name}.json"
        try:
            found = unseal(read_json(path), path, "")
            if found["inputs_digest"] == self._inputs_digest:
                self.budgets.lower(found["budgets"])
                return found["part"]
        except FileNotFoundError:
            pass  # not made yet
        except (OSError, ValueError, KeyError, TypeError) as error:
            say(f"warning: {path} cannot be used ({error}); that part is made again")
        part = make()
        made = seal({"inputs_digest": self._inputs_digest, "budgets": self.budgets.sizes, "part": part})
        write_json(path, made)
        return made["part"]

    def compute(
        self,
        name: str,
        batches: Sequence[Sequence[int]],
        make: Callable[[Sequence[int]], Sequence[Any]],
        on_batch: Callable[[int], None],
    ) -> list[Any]:
        """Something for every item; all processes get all of it.

        Args:
            name: tells this work from other work of the stage.
            batches: items by their numbers, which are 0 and so on; a batch is a part.
            make: gives something JSON-able for each item of a batch.
            on_batch: told the number of items that all processes have done since it was last called.

        Returns:
            what `make` gave, as JSON gives it back, in the order of the items.

        Raises:
            Interrupted: the stage was asked to stop; what is done is kept.
        """
        size = self._world.size
        mine: list[tuple[int, Any]] = []
        for first in range(0, len(batches), size):
            number = first + self._world.rank
            if number < len(batches):
                batch = batches[number]
                part = self.keep(f"{name}-{number:05d}", lambda batch=batch: list(make(batch)))  # type: ignore[misc]
                mine.extend(zip(batch, part, strict=True))
            on_batch(sum(len(batch) for batch in batches[first : first + size]))
            stop_together(self._world)
        return [thing for _, thing in sorted(self._world.gather(mine), key=lambda pair: pair[0])]

    def answers(
        self,
        roles: Roles,
        role: Role,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingSettings,
        *,
        seed: tuple[int | str, ...],
        on_batch: Callable[[int], None],
    ) -> list[Answer]:
        """One sampled answer a prompt, whatever the budgets; arguments as for `pipeline.generation.generate`.

        Raises:
            OutOfMemoryError: a single answer does not fit.
        """
        batches = batches_of([len(prompt) for prompt in prompts], sampling.batch_size)

        def sample(batch: Sequence[int]) -> list[Any]:
            chosen = [prompts[index] for index in batch]
            responses = self.budgets.fit_responses(
                sampling,
                len(chosen),
                lambda fitting: generate(
                    roles,
                    role,
                    chosen,
                    fitting,
                    seed=seed,
                    numbers=batch,
                    on_token=lambda: stop_alone(self._world),
                ),
            )
            return [[response.ids, response.finished] for response in responses]

        found = self.compute(f"answers-{role}", batches, sample, on_batch)
        return [Answer(tuple(ids), finished) for ids, finished in found]


def batches_of(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Sequences by their numbers, those of like length together, so that little of a batch is padding."""
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    return [order[start : start + size] for start in range(0, len(order), size)]
