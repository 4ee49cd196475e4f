"""Checkpoints: whole or passed over, the newest of the same inputs, and every tensor of the optimizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.checkpoint import STATE, CheckpointFolder, load_optimizer, optimizer_tensors
from pipeline.tensor_tree import save_tensors
from stages.ppo import _OPTIMIZERS


def write(content: str):
    def writer(folder: Path) -> None:
        (folder / "tensors.bin").write_text(content)
        (folder / "more").mkdir()
        (folder / "more" / "other.bin").write_text("x")

    return writer


@pytest.fixture
def folder(tmp_path):
    checkpoints = CheckpointFolder(tmp_path / "checkpoints", inputs_digest="mine", keep_last=3)
    for step in (2, 4, 6):
        checkpoints.save(step, {"kl": {"coefficient": step / 10}}, write(f"step {step}"))
    return checkpoints


def latest_step(folder: CheckpointFolder, warned: list[str] | None = None) -> int | None:
    found = folder.latest(warn=(warned if warned is not None else []).append)
    return None if found is None else found.step


def test_the_newest_is_found_with_its_state(folder):
    found = folder.latest(warn=pytest.fail)
    assert (found.step, found.state) == (6, {"kl": {"coefficient": 0.6}})
    assert (found.folder / "tensors.bin").read_text() == "step 6"


def test_none_is_none(tmp_path):
    assert latest_step(CheckpointFolder(tmp_path / "never", inputs_digest="mine", keep_last=1)) is None


@pytest.mark.parametrize(
    "how", ["flipped", "missing", "no state", "torn state", "state of another form", "edited state", "added", "link"]
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(folder, tmp_path, how):
    newest = tmp_path / "checkpoints" / "00000006"
    if how == "flipped":
        (newest / "tensors.bin").write_text("step 7")
    elif how == "missing":
        (newest / "more" / "other.bin").unlink()
    elif how == "no state":
        (newest / STATE).unlink()
    elif how == "edited state":
        (newest / STATE).write_text((newest / STATE).read_text().replace("0.6", "0.7"))
    elif how == "added":
        (newest / "more" / "mine.bin").write_text("x")
    elif how == "link":
        (newest / "tensors.bin").rename(tmp_path / "elsewhere")
        (newest / "tensors.bin").symlink_to(tmp_path / "elsewhere")
    else:
        (newest / STATE).write_text('{"inputs_digest": "mine"' if how == "torn state" else "[]")
    warned: list[str] = []
    assert latest_step(folder, warned) == 4
    assert len(warned) == 1 and "00000006" in warned[0]


def test_all_damaged_is_a_start_from_the_beginning(folder, tmp_path):
    for path in (tmp_path / "checkpoints").rglob("tensors.bin"):
        path.write_text("garbage")
    warned: list[str] = []
    assert latest_step(folder, warned) is None and len(warned) == 3


def test_checkpoints_of_other_inputs_do_not_count(folder, tmp_path):
    warned: list[str] = []
    assert latest_step(CheckpointFolder(tmp_path / "checkpoints", inputs_digest="other", keep_last=1), warned) is None
    assert len(warned) == 3 and all("other data or settings" in line for line in warned)


def test_only_the_last_are_kept(folder, tmp_path):
    folder.save(8, {}, write("step 8"))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["00000004", "00000006", "00000008"]


def test_later_checkpoints_of_other_inputs_do_not_push_out_new_ones(folder, tmp_path):
    """A run with new settings starts again from 0, below the numbers of the old one's checkpoints."""
    other = CheckpointFolder(tmp_path / "checkpoints", inputs_digest="other", keep_last=1)
    other.save(1, {}, write("new"))
    assert latest_step(other) == 1


def test_a_crash_while_writing_leaves_the_last_checkpoint(folder, tmp_path):
    def crash(draft: Path) -> None:
        write("half")(draft)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        folder.save(8, {}, crash)
    assert latest_step(folder) == 6
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3, "the draft is left behind"


def test_a_draft_of_a_killed_run_does_not_count(folder, tmp_path):
    shutil.copytree(tmp_path / "checkpoints" / "00000006", tmp_path / "checkpoints" / ".draft-x")
    assert latest_step(folder) == 6


def test_a_step_can_be_written_again(folder):
    folder.save(6, {"again": True}, write("step 6, again"))
    found = folder.latest(warn=pytest.fail)
    assert found.state == {"again": True} and (found.folder / "tensors.bin").read_text() == "step 6, again"


DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
SIZE = (512, 256)
"""Large enough for bitsandbytes to page its state and to round it."""


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("kind", ["adamw", "paged_adamw", "paged_adamw_8bit"])
def test_an_optimizer_goes_on_bit_for_bit(tmp_path, kind, device):
    def made() -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        torch.manual_seed(0)
        tensors = {"a.weight": torch.randn(SIZE), "still": torch.ones(2)}
        named = {name: nn.Parameter(tensor.to(device)) for name, tensor in tensors.items()}
        return named, _OPTIMIZERS[kind](list(named.values()), lr=0.1, betas=(0.9, 0.95))

    def step(named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, seed: int) -> None:
        named["a.weight"].grad = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)).to(device)
        optimizer.step()

    named, optimizer = made()
    for seed in range(3):
        step(named, optimizer, seed)
    copies = {name: tensor.cpu().clone() for name, tensor in optimizer_tensors(optimizer, named).items()}
    save_tensors(copies, tmp_path / "optimizer.safetensors")
    resumed, resumed_optimizer = made()
    with torch.no_grad():
        resumed["a.weight"].copy_(named["a.weight"])
    load_optimizer(tmp_path / "optimizer.safetensors", resumed_optimizer, resumed)
    kept, found = (each.state[names["a.weight"]] for each, names in ((optimizer, named), (resumed_optimizer, resumed)))
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in kept.items()}
    if kind != "adamw":
        paged = [getattr(state["state1"], "is_paged", False) for state in (kept, found)]
        assert paged == [device.type == "cuda"] * 2
        assert found["state1"].dtype == (torch.uint8 if kind.endswith("8bit") else torch.float32)
    for seed in range(3, 6):
        step(named, optimizer, seed)
        step(resumed, resumed_optimizer, seed)
    assert torch.equal(resumed["a.weight"], named["a.weight"])
    assert float(resumed_optimizer.state[resumed["a.weight"]]["step"]) == 6
    with pytest.raises(KeyError):
        load_optimizer(tmp_path / "optimizer.safetensors", resumed_optimizer, {"b": resumed["still"]})
