"""Trees of values and tensors come back bit for bit, without pickle."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from pipeline.distributed import random_states, restore_random_states
from pipeline.tensor_tree import load_tree, save_tree


def through_files(folder: Path, tree: Any) -> Any:
    save_tree(folder / "state", tree)
    assert {path.name for path in folder.iterdir()} == {"state.json", "state.safetensors"}
    return load_tree(folder / "state")


def test_values_come_back_as_what_they_were(tmp_path: Path) -> None:
    tree = {"a": [1, 0.1 + 0.2, None, True, "text"], 3: (1, (2.5,)), ("x", 1): {}, "big": 2**70, "": -0.0}
    found = through_files(tmp_path, tree)
    assert found == tree and repr(found) == repr(tree)


def test_numbers_that_json_does_not_know_come_back(tmp_path: Path) -> None:
    found = through_files(tmp_path, [math.inf, -math.inf, math.nan, numpy.float32(0.1)])
    assert found[:2] == [math.inf, -math.inf] and math.isnan(found[2]) and found[3] == float(numpy.float32(0.1))


def test_tensors_of_every_kind_come_back(tmp_path: Path) -> None:
    shared = torch.arange(6, dtype=torch.float32).view(2, 3)
    tensors = [shared, shared.T, torch.tensor(3), torch.tensor([], dtype=torch.uint8)]
    tensors += [torch.randn(3).to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)]
    found = through_files(tmp_path, {"list": tensors, 1: shared, "1": shared + 1})
    for one, other in zip(found["list"], tensors, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert torch.equal(found[1], shared) and torch.equal(found["1"], shared + 1)


def test_what_is_no_plain_value_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="/groups/0/rule: a function"):
        save_tree(tmp_path / "state", {"groups": [{"rule": lambda: None}]})


def test_random_generators_go_on_where_they_were(tmp_path: Path) -> None:
    import random

    def draw() -> list[Any]:
        return [random.random(), random.gauss(0, 1), *numpy.random.normal(size=3), *torch.randn(3).tolist()]

    draw()
    states = random_states()
    expected = draw()
    restore_random_states(through_files(tmp_path, states))
    assert draw() == expected


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor, torch.optim.RMSprop])
def test_an_optimizer_and_its_schedule_go_on_as_if_nothing_had_happened(tmp_path: Path, kind: Any) -> None:
    def trained(interrupted: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        model.bias.requires_grad_(False)
        optimizer = kind([{"params": [model.weight], "lr": 0.1}])
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        for step in range(6):
            if step == 3 and interrupted:
                states = through_files(tmp_path, [optimizer.state_dict(), schedule.state_dict()])
                optimizer = kind([{"params": [model.weight], "lr": 0.5}])
                schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
                optimizer.load_state_dict(states[0])
                schedule.load_state_dict(states[1])
            model.weight.grad = torch.sin(model.weight.detach() * (step + 1))
            optimizer.step()
            schedule.step(float(step))
        return [parameter.detach() for parameter in model.parameters()]

    for one, other in zip(trained(False), trained(True), strict=True):
        assert torch.equal(one, other)


def test_the_files_are_json_and_safetensors(tmp_path: Path) -> None:
    save_tree(tmp_path / "state", {"a": torch.ones(2), "b": (1,)})
    assert json.loads((tmp_path / "state.json").read_text()) == {
        "tree": {"dict": [["a", {"tensor": "/a"}], ["b", {"tuple": [1]}]]}
    }
