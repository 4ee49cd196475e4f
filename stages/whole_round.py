"""A round's responses of all processes, so that each can take its part of any minibatch.

Shape legend: B response of any process, T response token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from pipeline.distributed import World
from pipeline.scoring import Episode
from stages.experience import Experience


@dataclass(frozen=True)
class WholeRound:
    """What the update needs of the responses, in the order of their numbers: the same in every process.

    A response's row is its number, whatever process sampled it.
    """

    episodes: Sequence[Episode]
    lengths_B: Tensor
    mask_BT: Tensor
    logprobs_BT: Tensor
    values_BT: Tensor
    advantages_BT: Tensor
    returns_BT: Tensor

    @classmethod
    def of(cls, experience: Experience, world: World) -> WholeRound:
        """The processes' experience put together. Every process must come here with as many responses.

        These are a few numbers a token, megabytes a round, beside a model of gigabytes.
        """
        size = int(world.maximum(float(experience.mask_BT.shape[1])))

        def whole(rows_BT: Tensor) -> Tensor:
            return world.concatenate(pad(rows_BT, (0, size - rows_BT.shape[1])))

        return cls(
            episodes=world.gather(experience.episodes),
            lengths_B=world.concatenate(experience.lengths_B),
            mask_BT=whole(experience.mask_BT),
            logprobs_BT=whole(experience.logprobs_BT),
            values_BT=whole(experience.values_BT),
            advantages_BT=whole(experience.advantages_BT),
            returns_BT=whole(experience.returns_BT),
        )

    def lengths(self, rows: Sequence[int]) -> list[int]:
        """Tokens of some rows, prompts included."""
        return [len(self.episodes[row].ids) for row in rows]

    def share(self, minibatch: Sequence[int], world: World) -> list[int]:
        """This process's rows of a minibatch: as many as every other's, and of about as many tokens."""
        lengths = self.lengths(minibatch)
        longest_first = sorted(range(len(minibatch)), key=lambda place: -lengths[place])
        return [minibatch[place] for place in longest_first[world.rank :: world.size]]
