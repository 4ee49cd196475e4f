"""What `test_sharding.py` runs in two processes that share out the base: its parts, and whole PPO stages.

python two_shards.py FOLDER        with RANK, WORLD_SIZE, the address of rank 0 and ACCELERATE_USE_FSDP set
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import loaded_tiny_base
from tiny_ppo import add_made_up
from torch import Tensor
from two_processes import recorded_rounds

from pipeline import sharding
from pipeline.base_model import fingerprint
from pipeline.config_file import LoadedConfig, load_config
from pipeline.distributed import World
from pipeline.generation import SamplingSettings, generate
from pipeline.roles import Roles
from pipeline.run_directory import RunDirectory
from stages import interruption, ppo
from stages.interruption import Interrupted
from stages.update import Updater

QUANTIZATIONS = ("none", "nf4")
RUNS = {
    "gathered": ("base.quantization=none", "ppo.rollout.weights=adapter", "ppo.gradient_checkpointing=true"),
    "merged": ("base.quantization=nf4", "ppo.rollout.weights=merged"),
    "in_step": ("base.quantization=nf4", "ppo.rollout.weights=adapter", "ppo.critic=head"),
}
"""Ways to sample, as settings; each on a base that two processes share out, and on one process's own."""
VARIABLES = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_VERSION": "2"}
"""What `accelerate launch` sets for FSDP2, of what matters here."""
SETTINGS = ("ppo.checkpoint_every=1", "ppo.microbatch_tokens=60", "data.prompts.held_out=0.3")
"""Eleven held-out prompts: no multiple of the processes."""


def made_up_roles(folder: Path, quantization: str, world: World | None) -> Roles:
    """Two adapters on the tiny base, one of them with a head."""
    roles = Roles(loaded_tiny_base(folder, quantization=quantization), share_out_to=world)
    add_made_up(roles, "policy", seed=1)
    add_made_up(roles, "reward", seed=2, head=True)
    roles.set_trainable("policy")
    roles.disable_dropout()
    return roles


def computed(roles: Roles) -> dict[str, Tensor]:
    """States, gradients with and without recomputation, and logits of a merged copy, on given tokens."""
    ids_BL = torch.arange(2, 26).view(2, 12)
    found = {}
    for recompute in (False, True):
        roles.training_mode(gradient_checkpointing=recompute)
        with roles.active("policy"):
            hidden_BLD = roles.hidden_states(ids_BL, torch.ones_like(ids_BL))
        roles.logits(hidden_BLD).logsumexp(-1).sum().backward()  # type: ignore[no-untyped-call]
        for name, parameter in roles.parameters("policy").items():
            assert parameter.grad is not None
            found[f"{name}/{recompute}"], parameter.grad = parameter.grad, None
        found[f"hidden/{recompute}"] = hidden_BLD.detach()
    roles.inference_mode()
    with torch.no_grad(), roles.sampling_model("policy", "merged") as model:
        found["merged"] = model(input_ids=ids_BL).logits
    return found


def sampled(roles: Roles, world: World) -> list[list[int]]:
    """Responses to prompts that differ from process to process, sampled in step by layers that stay shared out."""
    prompts = [[5 + world.rank, 6, 7], [8, 9]]
    numbers = range(2 * world.rank, 2 * world.rank + 2)
    own, sharding.SHARE_OF_MEMORY = sharding.SHARE_OF_MEMORY, 0.0
    try:
        settings = SamplingSettings(max_new_tokens=4 + 4 * world.rank)
        found = generate(roles, "policy", prompts, settings, seed=(0,), numbers=numbers)
    finally:
        sharding.SHARE_OF_MEMORY = own
    return [list(response.ids) for response in found]


def parts(folder: Path, quantization: str) -> None:
    """What roles on a shared-out base compute and save, and how much each process holds."""
    world = World()
    roles = made_up_roles(folder, quantization, world)
    shards = roles.shards
    assert shards is not None
    before, held = fingerprint(roles.base.model), [shards.bytes_here]
    target = folder / f"{quantization}-{world.rank}"
    target.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in computed(roles).items()}, target / "computed.safetensors")
    held.append(shards.bytes_here)
    with shards.gathered():
        gathered = shards.bytes_here
    held.append(shards.bytes_here)
    responses = sampled(roles, world)
    for role in ("policy", "reward"):
        roles.save(role, target / role)
    held.append(shards.bytes_here)
    said = {
        "fingerprints": [before, fingerprint(roles.base.model)],
        "held": held,
        "gathered": gathered,
        "whole": shards.whole_bytes,
        "responses": responses,
        "in_step": [len(group) for group in shards.in_step([[0, 1, 2, 3]] if world.rank else [[3, 1], [0], [2]])],
    }
    (target / "said.json").write_text(json.dumps(said))


def config(folder: Path, name: str, kind: str) -> LoadedConfig:
    """The config of one of `RUNS`; `kind` names the folder of runs."""
    run_dir = [f"run_dir={folder / kind / name}"] if kind != "shared" else []
    return load_config(folder / name / "tiny.yaml", [*SETTINGS, *RUNS[name], *run_dir])


def stage(folder: Path, name: str, *, stop: bool = False) -> None:
    """A PPO stage whose parents lie ready; with `stop`, process 1 is asked to stop in the second iteration."""
    world = World()
    loaded = config(folder, name, "stopped" if stop else "shared")
    sharding.SHARE_OF_MEMORY = 0.0 if name == "in_step" else 0.5
    step, steps = Updater._step, []

    def counted(*args: Any, **named: Any) -> Any:
        steps.append(named["where"])
        if stop and world.rank == 1 and len(steps) == 6:
            interruption.request()
        return step(*args, **named)

    Updater._step = counted  # type: ignore[method-assign]
    try:
        with recorded_rounds() as rounds:
            ppo.run(loaded, RunDirectory.open(loaded))
        (folder / f"rounds-{name}-{world.rank}.json").write_text(json.dumps(rounds))
    except Interrupted:
        (folder / f"stopped-{world.rank}").touch()
        interruption.withdraw()
    finally:
        Updater._step = step  # type: ignore[method-assign]


def require_same_adapters(one: Path, two: Path) -> None:
    """Fail unless two results of PPO have the same tensors, except for rounding."""
    files = [path.relative_to(one) for path in sorted(one.rglob("*.safetensors"))]
    assert len(files) >= 2
    for file in files:
        ours, theirs = load_file(one / file), load_file(two / file)
        assert ours.keys() == theirs.keys()
        for name in ours:
            # As for two processes with the whole base: see test_processes.py.
            assert torch.allclose(ours[name], theirs[name], rtol=0, atol=3e-7), (file, name)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for quantization in QUANTIZATIONS:
        parts(folder, quantization)
    for name in RUNS:
        stage(folder, name)
    stage(folder, "in_step", stop=True)
    World().wait()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    assert os.environ["WORLD_SIZE"] == "2" and os.environ["ACCELERATE_USE_FSDP"] == "true"
    main(Path(sys.argv[1]))
