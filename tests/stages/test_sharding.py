"""Two processes that share out the base with FSDP2 compute, save and learn what one with the whole base does."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import two_processes
import two_shards
from process_group import TESTS, run_together
from safetensors.torch import load_file
from tiny_models import tiny_config
from tiny_ppo import publish_reward, publish_sft

from pipeline.artifacts import read_manifest
from pipeline.base_model import fingerprint
from pipeline.config import BaseSettings
from pipeline.distributed import World
from pipeline.errors import ConfigError, OutOfMemoryError
from pipeline.memory_budget import MemoryBudget
from pipeline.run_directory import RunDirectory
from pipeline.sharding import sharers
from stages import evaluate, ppo, reward, sft


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes leave behind; started once for all tests of this file."""
    folder = tmp_path_factory.mktemp("shards")
    for quantization in two_shards.QUANTIZATIONS:
        two_shards.made_up_roles(folder, quantization, None)  # makes the base's folder
    for name, settings in two_shards.RUNS.items():
        loaded = tiny_config(folder / name, *two_shards.SETTINGS, *settings)
        publish_reward(loaded, publish_sft(loaded))
        for kind in ("alone", "stopped"):
            shutil.copytree(loaded.config.run_dir, folder / kind / name)
    run_together(TESTS / "two_shards.py", folder, variables=two_shards.VARIABLES)
    return folder


@pytest.fixture(scope="module", params=list(two_shards.QUANTIZATIONS))
def shared_out(request, folder):
    """The parts on a base of this quantization: roles that have it whole, and what each process said and saved."""
    both = [folder / f"{request.param}-{rank}" for rank in (0, 1)]
    return two_shards.made_up_roles(folder, request.param, None), both


def test_a_process_holds_its_part_of_every_layer(shared_out):
    """Before, between and after the work; and all of each layer in a block that gathers them."""
    for path in shared_out[1]:
        said = json.loads((path / "said.json").read_text())
        assert len(set(said["held"])) == 1 and said["gathered"] == said["whole"]
        assert 0.45 * said["whole"] < said["held"][0] < 0.55 * said["whole"]


def test_states_gradients_and_merged_copies_are_the_very_same(shared_out):
    roles, both = shared_out
    wanted = two_shards.computed(roles)
    for path in both:
        found = load_file(path / "computed.safetensors")
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor), name


def test_the_base_has_the_fingerprint_that_it_has_whole(shared_out):
    roles, both = shared_out
    for path in both:
        assert json.loads((path / "said.json").read_text())["fingerprints"] == [fingerprint(roles.base.model)] * 2


def test_an_adapter_is_saved_as_the_same_bytes(shared_out, tmp_path):
    roles, both = shared_out
    for role in ("policy", "reward"):
        roles.save(role, tmp_path / role)
        for file in (tmp_path / role).iterdir():
            for path in both:
                assert (path / role / file.name).read_bytes() == file.read_bytes()


def test_processes_sample_in_step_though_one_needs_more_tokens(shared_out):
    roles, both = shared_out
    said = [json.loads((path / "said.json").read_text()) for path in both]
    lengths = [max(len(response) for response in each["responses"]) for each in said]
    assert lengths == [4, 8]
    for rank, each in enumerate(said):
        alone = two_shards.sampled(roles, _Rank(rank))
        assert each["responses"] == alone


def test_processes_make_equally_many_passes(shared_out):
    said = [json.loads((path / "said.json").read_text())["in_step"] for path in shared_out[1]]
    assert [len(groups) for groups in said] == [3, 3] and [sum(groups) for groups in said] == [4, 4]


class _Rank:
    def __init__(self, rank: int) -> None:
        self.rank = rank


def alone(folder, name, kind):
    """The stage with the whole base in one process."""
    loaded = two_shards.config(folder, name, kind)
    with two_processes.recorded_rounds() as rounds:
        ppo.run(loaded, RunDirectory.find(loaded))
    return RunDirectory.find(loaded).stage("ppo"), rounds


@pytest.mark.parametrize("name", list(two_shards.RUNS))
def test_a_run_on_a_shared_out_base_gives_the_adapters_of_one_process(folder, name):
    one, rounds = alone(folder, name, "alone")
    first, second = (json.loads((folder / f"rounds-{name}-{rank}.json").read_text()) for rank in (0, 1))
    assert rounds == [first[0] + second[0], first[1] + second[1]]
    two_shards.require_same_adapters(one, folder / name / "run" / "ppo")
    # The last iteration's figures, of which the held-out ones come from prompts that two do not share evenly.
    figures, wanted = (read_manifest(path).metrics for path in (folder / name / "run" / "ppo", one))
    for figure in ("held_out/score", "held_out/kl", "held_out/length", "objective/score", "kl/policy_reference_k1"):
        assert figures[figure] == pytest.approx(wanted[figure], rel=1e-3, abs=1e-4), figure


def test_a_run_that_two_processes_began_is_ended_by_one(folder):
    assert all((folder / f"stopped-{rank}").exists() for rank in (0, 1))
    one, rounds = alone(folder, "in_step", "stopped")
    assert len(rounds) == 1  # the first of two iterations is not done again
    two_shards.require_same_adapters(one, folder / "in_step" / "run" / "ppo")


def test_lack_of_memory_amid_common_work_is_an_error_with_the_size_to_set():
    budget = MemoryBudget("ppo.microbatch_tokens", 4096, pytest.fail, alone=False)

    def work(size):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(OutOfMemoryError, match="cannot be done again") as caught:
        budget.fit(work, smallest=100, whole=3000, remedy="")
    assert "ppo.microbatch_tokens=1500" in caught.value.remedy


def test_integers_are_refused_before_they_are_loaded(monkeypatch, tmp_path):
    """Whatever the launcher was: the stages ask for themselves."""
    int8, packed, floating = (
        BaseSettings.model_validate({"model": str(tmp_path / "nothing-there"), **settings})
        for settings in ({"quantization": "int8"}, {"quant_storage": "uint8"}, {})
    )
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert sharers(World(), int8) is None  # one process
    monkeypatch.setattr(World, "size", 2)
    world = World()
    assert sharers(world, floating) is world
    with pytest.raises(ConfigError, match=r"base\.quantization is 'int8'"):
        sharers(world, int8)
    with pytest.raises(ConfigError, match=r"base\.quant_storage is 'uint8'"):
        sharers(world, packed)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert sharers(world, int8) is None


@pytest.mark.parametrize("stage", [sft, reward, ppo, evaluate])
def test_every_stage_asks_before_it_loads_the_base(monkeypatch, tmp_path, stage):
    def refuse(*_):
        raise ConfigError("asked")

    monkeypatch.setattr(stage, "sharers", refuse)
    monkeypatch.setattr(stage, "load_base", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(stage, "require_fitting_parents", lambda *_: None, raising=False)
    monkeypatch.setattr(stage, "stage_inputs", lambda *_: {})
    loaded = tiny_config(tmp_path)
    with pytest.raises(ConfigError, match="asked"):
        stage.run(loaded, RunDirectory.open(loaded))
