"""Work in parts: the processes share them, and those that are done are kept and not done again.

Each part is always computed alone and with seeds of its own, so that the result depends neither on the number of
processes nor on an interruption. Where the base is shared out, processes compute their parts in step, and those that
have less to do repeat themselves meanwhile; the result then depends on their number by rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from pipeline.artifacts import seal, unseal
from pipeline.distributed import World
from pipeline.engines import generate
from pipeline.generation import SamplingSettings
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
        in_step: whether a part takes all processes, since each holds a share of the base.
    """

    def __init__(
        self, folder: Path, *, inputs_digest: str, world: World, budgets: Budgets, in_step: bool = False
    ) -> None:
        self._folder, self._inputs_digest, self._world, self.budgets = folder, inputs_digest, world, budgets
        self._in_step = in_step

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        """A part as JSON gives it back: from an earlier start if it is whole, else made now."""
        found = self._kept(name)
        return self._write(name, make()) if found is None else found["part"]

    def _kept(self, name: str) -> Mapping[str, Any] | None:
        """What an earlier start has left of a part, with the part itself under `part`."""
        path = self._folder / f"{name}.json"
        try:
            found = unseal(read_json(path), path, "")
            if found["inputs_digest"] == self._inputs_digest:
                if not self._in_step:  # sizes of one process would differ from those of the others
                    self.budgets.lower(found["budgets"])
                return {"part": found["part"]}
        except FileNotFoundError:
            pass  # not made yet
        except (OSError, ValueError, KeyError, TypeError) as error:
            say(f"warning: {path} cannot be used ({error}); that part is made again")
        return None

    def _write(self, name: str, part: Any) -> Any:
        made = seal({"inputs_digest": self._inputs_digest, "budgets": self.budgets.sizes, "part": part})
        write_json(self._folder / f"{name}.json", made)
        return made["part"]

    def _keep_in_step(
        self, name: str, batches: Sequence[Sequence[int]], make: Callable[[Sequence[int]], Sequence[Any]]
    ) -> Any:
        """This process's part of a round, whose `batches` all processes make at once, unless each has its own already.

        Every process makes as many items as the largest batch has, so that they make equally many passes.
        """
        rank = self._world.rank
        own = batches[rank] if rank < len(batches) else []
        found = self._kept(name) if own else None
        if self._world.maximum(float(bool(own) and found is None)):
            items = list(islice(cycle(own or batches[0]), max(map(len, batches))))
            made = list(make(items))[: len(own)]
            if own and found is None:
                return self._write(name, made)
        return [] if found is None else found["part"]

    def compute(
        self,
        name: str,
        batches: Sequence[Sequence[int]],
        make: Callable[[Sequence[int]], Sequence[Any]],
        on_batch: Callable[[int], None],
        *,
        passes: bool = True,
    ) -> list[Any]:
        """Something for every item; all processes get all of it.

        Args:
            name: tells this work from other work of the stage.
            batches: items by their numbers, which are 0 and so on; a batch is a part.
            make: gives something JSON-able for each item of a batch.
            on_batch: told the number of items that all processes have done since it was last called.
            passes: whether `make` passes through the model, which processes that share it do in step.

        Returns:
            what `make` gave, as JSON gives it back, in the order of the items.

        Raises:
            Interrupted: the stage was asked to stop; what is done is kept.
        """
        size = self._world.size
        mine: list[tuple[int, Any]] = []
        for first in range(0, len(batches), size):
            number, together = first + self._world.rank, batches[first : first + size]
            batch = batches[number] if number < len(batches) else []
            part: Sequence[Any] = []
            if self._in_step and passes:
                part = self._keep_in_step(f"{name}-{number:05d}", together, make)
            elif batch:
                part = self.keep(f"{name}-{number:05d}", lambda batch=batch: list(make(batch)))  # type: ignore[misc]
            mine.extend(zip(batch, part, strict=True))
            on_batch(sum(len(batch) for batch in together))
            stop_together(self._world)
        return [thing for _, thing in sorted(self._world.gather(mine), key=lambda pair: pair[0])]

    def answers(
        self,
        roles: Roles,
        role: Role | None,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingSettings,
        *,
        seed: tuple[int | str, ...],
        on_batch: Callable[[int], None],
        name: str | None = None,
    ) -> list[Answer]:
        """One sampled answer a prompt, whatever the budgets; arguments as for `pipeline.engines.generate`.

        `name` tells these answers from others of the role.

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

        found = self.compute(f"answers-{name or role or 'base'}", batches, sample, on_batch)
        return [Answer(tuple(ids), finished) for ids, finished in found]


def batches_of(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Sequences by their numbers, those of like length together, so that little of a batch is padding."""
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    return [order[start : start + size] for start in range(0, len(order), size)]
