"""Responses of PPO that are kept until a checkpoint is made after them: what was sampled is not sampled again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.checkpoint import Checkpoint, CheckpointFolder
from pipeline.config import PipelineConfig
from pipeline.distributed import World
from pipeline.generation import Response
from pipeline.records import Prompt
from pipeline.roles import Roles
from pipeline.scoring import Episode
from pipeline.tensor_tree import save_tensors
from stages.experience import Budgets, Experience, Sampled


class Rounds:
    """This process's responses and scores of the iterations since the last checkpoint; a rollout not judged yet, too.

    Args:
        folder: the stage's working folder.
        config: the run's; as many rounds are kept as lie between two checkpoints.
        inputs_digest: identity of what the run is made from.
        world: all processes; their number is part of a round's identity.
        warn: told of what cannot be read.
    """

    def __init__(
        self, folder: Path, config: PipelineConfig, inputs_digest: str, world: World, warn: Callable[[str], None]
    ) -> None:
        self._world, self._warn = world, warn
        self._folder = CheckpointFolder(
            folder / "rounds" / str(world.rank), inputs_digest=inputs_digest, keep_last=config.ppo.checkpoint_every
        )
        self._sampled = CheckpointFolder(folder / "sampled" / str(world.rank), inputs_digest=inputs_digest, keep_last=1)

    def save(self, iteration: int, sampled_by: str, experience: Experience, budgets: Budgets) -> None:
        """Keep a round (0-based) that a policy of this digest has sampled, and what it has learned of memory."""
        tensors = {f"terms/{name}": term_B for name, term_B in experience.terms.items()}
        for entry in fields(Experience):
            value = getattr(experience, entry.name)
            if isinstance(value, Tensor):
                tensors[entry.name] = value
        tensors["responses"] = torch.tensor([token for row in experience.episodes for token in row.response])
        state = self._state(sampled_by, budgets) | {
            "seconds": dict(experience.seconds),
            "terms": list(experience.terms),
        }
        self._folder.save(iteration, state, lambda folder: save_tensors(tensors, folder / "round.safetensors"))

    def sampled(
        self,
        iteration: int,
        sampled_by: str,
        prompts: Sequence[Prompt],
        roles: Roles,
        budgets: Budgets,
        make: Callable[[], Sampled],
    ) -> Sampled:
        """The responses of a round that is not judged yet: the kept ones, else new ones, which are then kept.

        Args:
            make: samples them; called in every process or in none.
        """
        found = self._find(iteration, sampled_by, self._sampled)
        if self._world.maximum(float(found is None)):
            sampled = make()
            state = self._state(sampled_by, budgets) | {"seconds": sampled.seconds}
            tensors = {
                "lengths": torch.tensor([len(response.ids) for response in sampled.responses]),
                "finished": torch.tensor([response.finished for response in sampled.responses]),
                "ids": torch.tensor([token for response in sampled.responses for token in response.ids]),
                "logprobs": _flat([response.logprobs for response in sampled.responses]),
                "values": _flat([response.values for response in sampled.responses]),
            }
            self._sampled.save(iteration, state, lambda folder: save_tensors(tensors, folder / "sampled.safetensors"))
            return sampled
        assert found is not None
        self._lower(budgets, found, roles)
        tensors = load_file(found.folder / "sampled.safetensors")
        lengths: list[int] = tensors["lengths"].tolist()
        rows = {name: torch.split(tensors[name], lengths) for name in ("ids", "logprobs")}
        without = not len(tensors["values"])
        rows["values"] = (torch.empty(0),) * len(lengths) if without else torch.split(tensors["values"], lengths)
        responses = [
            Response(tuple(ids.tolist()), tuple(logprobs.tolist()), bool(finished), tuple(values.tolist()))
            for ids, logprobs, values, finished in zip(
                rows["ids"], rows["logprobs"], rows["values"], tensors["finished"], strict=True
            )
        ]
        episodes = _episodes(roles, prompts, [response.ids for response in responses])
        return Sampled(episodes, responses, float(found.state["seconds"]))

    def exists(self, iteration: int, sampled_by: str) -> bool:
        """Whether all processes have kept that round."""
        return not self._world.maximum(float(self._find(iteration, sampled_by, self._folder) is None))

    def load(
        self, iteration: int, sampled_by: str, prompts: Sequence[Prompt], roles: Roles, budgets: Budgets
    ) -> Experience | None:
        """The kept round of these prompts; None unless all processes have theirs. Lowers `budgets` as it did then."""
        found = self._find(iteration, sampled_by, self._folder)
        if self._world.maximum(float(found is None)):
            return None
        assert found is not None
        self._lower(budgets, found, roles)
        tensors = load_file(found.folder / "round.safetensors")
        terms = {name: tensors.pop(f"terms/{name}") for name in found.state["terms"]}
        responses = torch.split(tensors.pop("responses"), tensors["lengths_B"].tolist())
        episodes = _episodes(roles, prompts, [tuple(ids.tolist()) for ids in responses])
        return Experience(
            prompts=prompts,
            completions=[roles.base.chat.decode(episode.response) for episode in episodes],
            episodes=episodes,
            terms=terms,
            seconds=found.state["seconds"],
            **{name: tensor if name in _ON_CPU else tensor.to(roles.device) for name, tensor in tensors.items()},
        )

    def _state(self, sampled_by: str, budgets: Budgets) -> dict[str, Any]:
        return {"sampled_by": sampled_by, "processes": self._world.size, "budgets": budgets.sizes}

    def _lower(self, budgets: Budgets, found: Checkpoint, roles: Roles) -> None:
        sizes = [found.state["budgets"]]
        budgets.lower(*(sizes if roles.shards is None else self._world.gather(sizes)))

    def _find(self, iteration: int, sampled_by: str, folder: CheckpointFolder) -> Checkpoint | None:
        found = folder.at(iteration, self._warn)
        if found is None or found.state["sampled_by"] != sampled_by or found.state["processes"] != self._world.size:
            return None
        return found


def _episodes(roles: Roles, prompts: Sequence[Prompt], responses: Sequence[tuple[int, ...]]) -> list[Episode]:
    chat = roles.base.chat
    return [Episode(tuple(chat.prompt_ids(row.prompt)), ids) for row, ids in zip(prompts, responses, strict=True)]


def _flat(rows: Sequence[Sequence[float]]) -> Tensor:
    """Rows one after another, each number as it is."""
    return torch.tensor([number for row in rows for number in row], dtype=torch.float64)


_ON_CPU = {"checked_B", "finished_B", "padding", "raw_scores_B", "scores_B"}
"""Where `collect` leaves them."""
