"""Two processes over gloo do what one does: the same gradient, the same metrics, one result."""

from __future__ import annotations

import json
import shutil
from itertools import combinations

import pytest
import torch
import two_processes
from process_group import TESTS, run_together
from safetensors.torch import load_file
from tiny_models import tiny_config
from tiny_ppo import publish_reward, publish_sft, sharp_base

from pipeline.artifacts import read_manifest
from pipeline.config_file import load_config
from pipeline.metrics import read_metrics
from pipeline.run_directory import RunDirectory
from stages import evaluate, ppo


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes leave behind; started once for all tests of this file."""
    folder = tmp_path_factory.mktemp("two")
    sharp_base(folder / "step")
    loaded = tiny_config(folder / "stage", *two_processes.SETTINGS)
    publish_reward(loaded, publish_sft(loaded))
    run_together(TESTS / "two_processes.py", folder)
    return folder


@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_the_number_of_processes_does_not_change_gradient_or_step(folder, critic):
    gradients, parameters, metrics = two_processes.one_step(folder / "step", critic)
    both = [folder / f"{critic}-{rank}" for rank in (0, 1)]
    for file, wanted in (("gradients", gradients), ("parameters", parameters)):
        first, second = (load_file(path / f"{file}.safetensors") for path in both)
        assert first.keys() == second.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(first[name], second[name]), name
            # Float32 sums in another order; a mean of the processes' means would be off by tens of percent.
            scale = float(tensor.abs().max())
            assert torch.allclose(first[name], tensor, rtol=1e-3, atol=2e-5 * scale), name
    said = [json.loads((path / "metrics.json").read_text()) for path in both]
    for name, value in metrics.items():
        if not name.startswith(("seconds", "tokens", "memory")):
            assert said[0][name] == said[1][name], name
            if not name.startswith("padding"):  # two processes pad less: each cuts the half of the batch
                assert said[0][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_a_stage_of_two_processes_has_one_result(folder):
    run = RunDirectory(folder / "stage" / "run")
    for stage in ("ppo", "evaluate"):
        digests = {json.loads((folder / f"stages-{rank}.json").read_text())[stage] for rank in (0, 1)}
        assert digests == {read_manifest(run.stage(stage)).digest}
    assert [row["step"] for row in read_metrics(run.metrics("ppo"))] == [1, 2]
    assert [path.name for path in run.root.iterdir() if path.name.startswith(".")] == []


def test_an_evaluation_of_one_process_gives_the_bytes_of_two(folder):
    two = RunDirectory(folder / "stage" / "run")
    shutil.copytree(two.root, folder / "one")
    shutil.rmtree(folder / "one" / "evaluate")
    loaded = load_config(folder / "stage" / "tiny.yaml", [*two_processes.SETTINGS, f"run_dir={folder / 'one'}"])
    one = evaluate.run(loaded, RunDirectory.open(loaded))
    both = read_manifest(two.stage("evaluate"))
    assert dict(one.files) == dict(both.files) and one.metrics == both.metrics and one.metrics["n"] == 7


@pytest.fixture(scope="module")
def alone(folder):
    """The run of the two processes done by one, and what it sampled."""
    settings = [setting for setting in two_processes.SETTINGS if not setting.startswith("launch.")]
    loaded = load_config(folder / "stage" / "tiny.yaml", [*settings, f"run_dir={folder / 'alone'}"])
    for parent in ("sft", "reward"):
        shutil.copytree(folder / "stage" / "run" / parent, folder / "alone" / parent)
    with two_processes.recorded_rounds() as rounds:
        ppo.run(loaded, RunDirectory.open(loaded))
    return RunDirectory.find(loaded), rounds


def test_two_processes_sample_together_what_one_does(folder, alone):
    """A response follows from the seed, the round and its number, not from the process or the batch."""
    first, second = (json.loads((folder / f"rounds-{rank}.json").read_text()) for rank in (0, 1))
    rounds = [first[0], first[1], second[0], second[1]]
    assert all(len(responses) > 1 for responses in rounds)
    assert all(one != other for one, other in combinations(rounds, 2))
    assert alone[1] == [first[0] + second[0], first[1] + second[1]]


def test_a_run_of_two_processes_gives_the_adapters_of_one(folder, alone):
    """They make the same steps on the same minibatches: eight of them here, in two rounds."""
    two, one = RunDirectory(folder / "stage" / "run").stage("ppo"), alone[0].stage("ppo")
    files = [path.relative_to(one) for path in sorted(one.rglob("*.safetensors"))]
    assert len(files) == 3  # the policy's adapter, the critic's adapter and head
    for file in files:
        ours, theirs = load_file(one / file), load_file(two / file)
        assert ours.keys() == theirs.keys()
        for name in ours:
            # Rounding of weights of 0.2 in float32 (measured: 2e-8 at most), while the steps moved them by up to 6e-5.
            assert torch.allclose(ours[name], theirs[name], rtol=0, atol=3e-7), (file, name)


def test_a_run_of_two_processes_measures_what_one_measures(folder, alone):
    """Round by round, and at the end on held-out prompts that two do not share evenly."""
    two, one = (read_metrics(run.metrics("ppo")) for run in (RunDirectory(folder / "stage" / "run"), alone[0]))
    assert [set(row) for row in two] == [set(row) for row in one] and "held_out/score" in one[-1]
    for ours, theirs in zip(two, one, strict=True):
        for name, value in theirs.items():
            # Each process checks some of its own responses; as to padding and tolerance, see the metrics of one step.
            if not name.startswith(("seconds", "tokens", "memory", "time", "padding", "sampler")):
                assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_both_stop_where_one_is_asked_to_and_go_on_to_the_same_result(folder):
    undisturbed = read_manifest(RunDirectory(folder / "stage" / "run").stage("ppo")).digest
    said = [json.loads((folder / f"again-{rank}.json").read_text()) for rank in (0, 1)]
    assert said[0] == said[1] and said[0]["digest"] == undisturbed
    every = [
        f"iteration {iteration}, epoch {epoch}, minibatch {number}"
        for iteration in (1, 2)
        for epoch in (1, 2)
        for number in (1, 2)
    ]
    assert said[0]["steps"] == [*every[:6], "stopped", *every[6:]]


def test_what_is_not_finite_in_one_process_stops_both(folder):
    said = [(folder / f"stopped-{rank}").read_text() for rank in (0, 1)]
    assert said == ["values of this round are not finite"] * 2
