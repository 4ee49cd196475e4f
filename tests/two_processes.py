"""What `test_processes.py` runs in one process and in two: a PPO step on given responses, and whole stages.

python two_processes.py FOLDER        with PYTHONPATH, RANK, WORLD_SIZE and the address of rank 0 in the environment
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_ppo import prompts, record_gradients, sharp_base, tiny_round
from torch import Tensor

from pipeline.config_file import load_config
from pipeline.distributed import World
from pipeline.errors import DivergenceError
from pipeline.generation import Response
from pipeline.run_directory import RunDirectory
from stages import evaluate, experience, interruption, ppo
from stages.interruption import Interrupted
from stages.round_metrics import round_metrics
from stages.update import Updater

# Eleven held-out prompts, of which the evaluation takes seven: neither is a multiple of the processes.
SETTINGS = (
    *("base.quantization=none", "launch.processes=2", "ppo.checkpoint_every=1", "data.prompts.held_out=0.3"),
    *("evaluate.prompts=7", "evaluate.batch_size=3"),
)


def given_responses(roles: Any, role: Any, prompt_ids: Any, sampling: Any, **_: Any) -> list[Response]:
    """Responses that follow from the prompt, 1 to 8 tokens long, instead of samples."""
    eos = roles.base.chat.eos_token_id
    found = []
    for ids in prompt_ids:
        length = 1 + sum(ids) % 8
        said = (*((sum(ids) * 7 + 13 * t) % 256 for t in range(length - 1)), eos)
        found.append(Response(said, (-5.0,) * length, True))
    return found


def one_step(folder: Path, critic: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """One optimizer step on eight given responses: gradients, parameters after it, metrics."""
    world = World()
    found = tiny_round(
        sharp_base(folder), critic=critic, minibatch_size=8, epochs=1, whiten_rewards=True, max_grad_norm=1e9
    )
    seen = record_gradients(found)
    own, experience.generate = experience.generate, given_responses
    try:
        collected = found.collect(asked=list(world.share(prompts(8))))
    finally:
        experience.generate = own
    statistics = found.updater.update(collected, 0, critic_only=False)
    metrics = round_metrics(collected, statistics, kl_coefficient=0.05, world=world)
    return seen[0], {**found.parameters("policy"), **found.parameters("value")}, metrics


@contextmanager
def recorded_rounds() -> Iterator[list[list[list[int]]]]:
    """What this process samples in PPO's rounds: a list a round, of the responses' ids."""
    rounds: list[list[list[int]]] = []
    own = ppo.collect

    def collect(*args: Any, **named: Any) -> Any:
        found = own(*args, **named)
        rounds.append([list(episode.response) for episode in found.episodes])
        return found

    ppo.collect = collect
    try:
        yield rounds
    finally:
        ppo.collect = own


def main(folder: Path) -> None:
    world = World()
    torch.set_num_threads(1)
    for critic in ("adapter", "head"):
        gradients, parameters, metrics = one_step(folder / "step", critic)
        target = folder / f"{critic}-{world.rank}"
        target.mkdir(parents=True)
        save_file(gradients, target / "gradients.safetensors")
        save_file(parameters, target / "parameters.safetensors")
        (target / "metrics.json").write_text(json.dumps(metrics))
        world.wait()

    # Whole stages; the parents lie ready.
    loaded = load_config(folder / "stage" / "tiny.yaml", SETTINGS)
    run = RunDirectory.open(loaded)
    with recorded_rounds() as rounds:
        stages = {"ppo": ppo.run(loaded, run).digest, "evaluate": evaluate.run(loaded, run).digest}
    (folder / f"stages-{world.rank}.json").write_text(json.dumps(stages))
    (folder / f"rounds-{world.rank}.json").write_text(json.dumps(rounds))

    # One process is asked to stop in the midst of an iteration: both stop there, and both go on from there.
    again = load_config(folder / "stage" / "tiny.yaml", [*SETTINGS, f"run_dir={folder / 'again'}"])
    if world.is_main:
        for parent in ("sft", "reward"):
            shutil.copytree(run.stage(parent), folder / "again" / parent)
    world.wait()
    step, steps = Updater._step, []

    def asked(*args: Any, **named: Any) -> Any:
        steps.append(named["where"])
        if world.rank == 1 and len(steps) == 6:
            interruption.request()
        return step(*args, **named)

    Updater._step = asked
    for _ in range(2):
        try:
            resumed = ppo.run(again, RunDirectory.find(again))
        except Interrupted:
            steps.append("stopped")
            interruption.withdraw()
    (folder / f"again-{world.rank}.json").write_text(json.dumps({"digest": resumed.digest, "steps": steps}))

    # One process finds what is not finite: both stop.
    found = tiny_round(sharp_base(folder / "step"))
    if world.rank == 1:
        with torch.no_grad():
            found.roles.heads["value"].bias.fill_(float("nan"))
    try:
        found.collect(asked=list(world.share(prompts(8))))
    except DivergenceError as error:
        (folder / f"stopped-{world.rank}").write_text(error.problem)
    world.wait()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    assert os.environ["WORLD_SIZE"] == "2"
    main(Path(sys.argv[1]))
