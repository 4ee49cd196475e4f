"""Every stage in two processes, with a base in each and with one shared out, ends where one process ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sharded_stages
from process_group import TESTS, run_together
from safetensors.torch import load_file
from sharded_stages import MODULES, QUANTIZATIONS, SETTINGS, STOPPED, WORKS
from tiny_models import tiny_config
from torch.testing import assert_close
from two_shards import require_same_adapters

from pipeline.artifacts import read_manifest
from pipeline.config_file import LoadedConfig
from pipeline.metrics import read_metrics
from pipeline.run_directory import RunDirectory

EVERY = [(kind, stage) for kind, (_, _, stages) in WORKS.items() for stage in stages]


def config(folder: Path) -> LoadedConfig:
    # SGD without clipping: that, and Adam's first steps, would hide a wrong scale of the gradient.
    # The third step has the nine rows that are left of 29, so that a process has one more than the other.
    training: dict[str, Any] = {"batch_size": 10, "microbatch_size": 1, "max_steps": 3, "learning_rate": 0.05}
    training |= {"optimizer": "sgd", "max_length": 40, "log_every": 1, "max_grad_norm": 1e9}
    training |= {"gradient_checkpointing": True}
    # Eleven held-out rows of which each takes a pass of its own: one process has a row less.
    sources = {"instructions": "demonstrations", "preferences": "comparisons", "prompts": "prompts"}
    data = {kind: {"sources": [f"tiny_data.py:{name}"], "held_out": 0.3} for kind, name in sources.items()}
    return tiny_config(folder, *SETTINGS, data=data, sft=training, reward=training | {"calibration_prompts": 9})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process and two leave behind; started once for all tests of this file."""
    folder = tmp_path_factory.mktemp("stages")
    config(folder)
    for quantization in QUANTIZATIONS:
        loaded = sharded_stages.config(folder, quantization, f"one-{quantization}")
        for module in MODULES.values():
            module.run(loaded, RunDirectory.open(loaded))
    for kind, (quantization, _, stages) in WORKS.items():
        for stage in stages:
            sharded_stages.with_parents(folder, quantization, kind, stage)
    for stage in STOPPED:
        sharded_stages.with_parents(folder, "nf4", "stopped", stage)
    run_together(TESTS / "sharded_stages.py", folder, seconds=280)
    return folder


def result_of(folder: Path, kind: str, stage: Any) -> Path:
    return RunDirectory(folder / kind / stage).stage(stage)


def one(folder: Path, kind: str, stage: str) -> Path:
    """The result of one process over the same base."""
    return folder / f"one-{WORKS[kind][0]}" / stage


@pytest.mark.parametrize(("kind", "stage"), [(kind, stage) for kind, stage in EVERY if stage in ("sft", "reward")])
def test_two_processes_train_the_adapter_that_one_trains(folder: Path, kind: str, stage: str) -> None:
    """Sums of float32 in another order, in three steps that moved the weights a thousand times as far."""
    two, wanted = (
        load_file(path / "adapter_model.safetensors")
        for path in (result_of(folder, kind, stage), one(folder, kind, stage))
    )
    assert_close(two, wanted, rtol=1e-4, atol=1e-6)
    assert max(float(tensor.abs().max()) for name, tensor in wanted.items() if "lora_B" in name) > 1e-3


@pytest.mark.parametrize("kind", [kind for kind, (_, _, stages) in WORKS.items() if "ppo" in stages])
def test_two_processes_give_the_policy_and_the_critic_of_one(folder: Path, kind: str) -> None:
    require_same_adapters(one(folder, kind, "ppo"), result_of(folder, kind, "ppo"))


@pytest.mark.parametrize(("kind", "stage"), [(kind, stage) for kind, stage in EVERY if stage != "evaluate"])
def test_what_two_processes_save_is_made_as_what_one_saves(folder: Path, kind: str, stage: str) -> None:
    """The same files with the same tensors, whole ones, and PEFT's config to the byte."""
    two, wanted = result_of(folder, kind, stage), one(folder, kind, stage)
    names = sorted(path.relative_to(wanted) for path in wanted.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    for name in names:
        if name.suffix == ".safetensors":
            ours, theirs = load_file(two / name), load_file(wanted / name)
            assert {key: (tensor.shape, tensor.dtype) for key, tensor in ours.items()} == {
                key: (tensor.shape, tensor.dtype) for key, tensor in theirs.items()
            }
        elif name.name == "adapter_config.json":
            assert (two / name).read_bytes() == (wanted / name).read_bytes()


@pytest.mark.parametrize(("kind", "stage"), [(kind, stage) for kind, stage in EVERY if stage in ("sft", "reward")])
def test_two_processes_measure_what_one_measures(folder: Path, kind: str, stage: str) -> None:
    two, wanted = (read_manifest(path).metrics for path in (result_of(folder, kind, stage), one(folder, kind, stage)))
    assert set(two) == set(wanted) and wanted["held_out_rows" if stage == "sft" else "held_out_pairs"] == 11
    for name, value in wanted.items():
        assert two[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    ours, theirs = (
        read_metrics(RunDirectory(run).metrics(stage))  # type: ignore[arg-type]
        for run in (folder / kind / stage, folder / f"one-{WORKS[kind][0]}")
    )
    assert [row["step"] for row in theirs] == [1, 2, 3]
    for line, expected in zip(ours, theirs, strict=True):
        for name in expected.keys() - {"tokens_per_second"}:
            assert line[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("kind", [kind for kind, (_, _, stages) in WORKS.items() if "evaluate" in stages])
def test_two_processes_sample_and_judge_the_answers_of_one(folder: Path, kind: str) -> None:
    two, wanted = (
        [json.loads(line) for line in (path / "answers.jsonl").read_text().splitlines()]
        for path in (result_of(folder, kind, "evaluate"), one(folder, kind, "evaluate"))
    )
    assert len(wanted) == 7
    for ours, theirs in zip(two, wanted, strict=True):
        scores, wanted_scores = ours.pop("scores"), theirs.pop("scores")
        assert ours == theirs
        for judge, found in wanted_scores.items():
            assert scores[judge] == pytest.approx(found, rel=1e-3, abs=1e-5), judge
    kl, wanted_kl = (
        read_manifest(path).metrics["kl"]
        for path in (result_of(folder, kind, "evaluate"), one(folder, kind, "evaluate"))
    )
    assert kl == pytest.approx(wanted_kl, rel=1e-3, abs=1e-6)


def held(folder: Path, kind: str, stage: str) -> Iterator[tuple[int, int]]:
    for rank in (0, 1):
        yield from json.loads((folder / f"held-{kind}-{stage}-{rank}.json").read_text())


@pytest.mark.parametrize(("kind", "stage"), EVERY)
def test_the_base_is_shared_out_where_the_launcher_asks_for_it(folder: Path, kind: str, stage: str) -> None:
    """Each process ends with half of the layers' bytes; under DDP with all of them, in no shards.

    Where layers stay gathered after a pass, the last pass, which is one of scoring, leaves all of them.
    """
    found = list(held(folder, kind, stage))
    assert len(found) == (2 if WORKS[kind][1] else 0)
    if kind.startswith("kept"):
        assert all(here == whole for here, whole in found)
    else:
        assert all(0.45 * whole < here < 0.55 * whole for here, whole in found)


@pytest.mark.parametrize("stage", STOPPED)
def test_what_two_processes_began_on_a_shared_out_base_is_ended_by_one(folder: Path, stage: str) -> None:
    assert [(folder / f"stopped-{stage}-{rank}").read_text() for rank in (0, 1)] == ["00000002"] * 2
    shutil.copytree(folder / "stopped" / stage, folder / "ended" / stage)
    loaded = sharded_stages.config(folder, "nf4", f"ended/{stage}")
    MODULES[stage].run(loaded, RunDirectory.find(loaded))
    ended, wanted = (
        load_file(path / "adapter_model.safetensors")
        for path in (result_of(folder, "ended", stage), folder / "one-nf4" / stage)
    )
    assert_close(ended, wanted, rtol=1e-4, atol=1e-6)
    assert [row["step"] for row in read_metrics(RunDirectory(folder / "ended" / stage).metrics(stage))] == [1, 2, 3]


def test_parts_that_take_all_processes_are_made_in_step(folder: Path) -> None:
    """A process that has its part, or none to make, repeats itself while another works."""
    both = [json.loads((folder / f"parts-{rank}.json").read_text()) for rank in (0, 1)]
    assert [each["calls"] for each in both] == [[[0, 1, 2], [5]], [[3, 4, 3], [5]]]
    assert all(each["found"] == [[0, 1, 4, 9, 16, 25]] * 2 for each in both)
