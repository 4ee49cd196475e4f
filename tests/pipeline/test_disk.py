"""A disk that takes nothing more: an error that names the place and the way out, and everything earlier untouched."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_config

from pipeline.checkpoint import CheckpointFolder
from pipeline.disk import writing
from pipeline.errors import BaseModelError, RunDirectoryError
from pipeline.metrics import MetricsWriter, read_metrics
from pipeline.run_directory import RunDirectory, read_json, write_json

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    yield from _mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=256k", "none")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A run with a finished SFT stage on a file system that takes no writes."""
    source = tmp_path / "writable"
    with RunDirectory(source).publish("sft") as draft:
        (draft / "file").write_text("old")
    for folder in _mounted(tmp_path / "read-only", "--bind", str(source)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield folder


def _mounted(folder: Path, *arguments: str) -> Iterator[Path]:
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting needs Linux and root")
    done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Leave no byte free."""
    with pytest.raises(OSError, match="No space"), (folder / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_result_that_does_not_fit_leaves_the_earlier_one(small_disk: Path) -> None:
    run = RunDirectory(small_disk)
    with run.publish("sft") as draft:
        (draft / "file").write_text("old")
    before = names(small_disk)
    with pytest.raises(RunDirectoryError, match=r"no space left.*MB free") as caught, run.publish("sft") as draft:
        save_file({"weights": torch.zeros(1 << 20)}, draft / "adapter_model.safetensors")
    assert caught.value.where == str(small_disk) and "Free space" in (caught.value.remedy or "")
    assert names(small_disk) == before and (run.stage("sft") / "file").read_text() == "old"


def test_json_that_does_not_fit_leaves_the_earlier_one(small_disk: Path) -> None:
    write_json(small_disk / "summary.json", {"a": 1})
    with pytest.raises(RunDirectoryError, match="no space left") as caught:
        write_json(small_disk / "summary.json", {"a": "x" * 300_000})
    assert caught.value.where == str(small_disk / "summary.json")
    assert read_json(small_disk / "summary.json") == {"a": 1} and names(small_disk) == ["summary.json"]


def test_a_checkpoint_that_does_not_fit_leaves_the_last_one(small_disk: Path) -> None:
    folder = CheckpointFolder(small_disk / "checkpoints", inputs_digest="mine", keep_last=2)
    folder.save(1, {}, lambda draft: (draft / "tensors").write_bytes(b"x"))
    with pytest.raises(RunDirectoryError, match="no space left") as caught:
        folder.save(2, {}, lambda draft: save_file({"weights": torch.zeros(1 << 20)}, draft / "tensors"))
    assert caught.value.where == str(small_disk / "checkpoints")
    found = folder.latest(warn=pytest.fail)
    assert found is not None and found.step == 1
    assert names(small_disk / "checkpoints") == ["00000001", "00000001/state.json", "00000001/tensors"]


def test_metrics_on_a_full_disk_keep_their_whole_lines(small_disk: Path) -> None:
    path = small_disk / "metrics" / "ppo.jsonl"
    with pytest.raises(RunDirectoryError, match="no space left") as caught, MetricsWriter(path) as writer:
        for step in range(100_000):
            writer.write(step, reward=0.5)
    assert caught.value.where == str(path)
    rows = read_metrics(path)
    assert path.read_bytes().endswith(b"\n") and [row["step"] for row in rows] == list(range(len(rows)))
    fill(small_disk)
    before = path.read_bytes()
    with pytest.raises(RunDirectoryError, match="no space left"), MetricsWriter(path) as writer:
        writer.truncate_after(len(rows) - 10)
    assert path.read_bytes() == before and names(small_disk / "metrics") == ["ppo.jsonl"]


def test_a_full_disk_still_tells_who_works_on_the_run(small_disk: Path) -> None:
    run = RunDirectory(small_disk)
    fill(small_disk)
    with (
        run.locked("sft", warn=pytest.fail),
        pytest.raises(RunDirectoryError, match="in use"),
        run.locked("ppo", reads=["sft"], warn=pytest.fail),
    ):
        pass


def test_a_read_only_run_is_named_and_stays(read_only: Path) -> None:
    with pytest.raises(RunDirectoryError, match="read-only") as caught, RunDirectory(read_only).publish("sft"):
        pass
    assert caught.value.where == str(read_only) and "run_dir" in (caught.value.remedy or "")
    with pytest.raises(RunDirectoryError, match="read-only"):
        RunDirectory.open(tiny_config(read_only.parent / "config", f"run_dir={read_only}"))
    with pytest.raises(RunDirectoryError, match="read-only"):
        MetricsWriter(read_only / "metrics" / "sft.jsonl")
    assert names(read_only) == ["sft", "sft/file"]


def test_a_limit_on_the_size_of_files_is_told_from_a_full_disk(tmp_path: Path) -> None:
    program = f"""
    import resource, sys
    import torch
    from pathlib import Path
    from safetensors.torch import save_file
    from pipeline.errors import RunDirectoryError
    from pipeline.run_directory import RunDirectory
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        with RunDirectory(Path({str(tmp_path)!r})).publish("sft") as draft:
            save_file({{"weights": torch.zeros(1 << 20)}}, draft / "adapter_model.safetensors")
    except RunDirectoryError as error:
        print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "ulimit -f" in done.stdout, done.stderr
    assert names(tmp_path) == []


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics").write_text("in the way")
    with pytest.raises(RunDirectoryError, match="a file lies where a folder should be") as caught:
        MetricsWriter(tmp_path / "metrics" / "sft.jsonl")
    assert caught.value.where == str(tmp_path / "metrics" / "sft.jsonl")


def test_only_failures_to_write_there_are_translated(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), writing(tmp_path / "run"):
        (tmp_path / "data.jsonl").read_text()
    with pytest.raises(PermissionError), writing(tmp_path / "run"):
        raise PermissionError(13, "Permission denied", str(tmp_path / "data.jsonl"))
    with pytest.raises(RunDirectoryError, match="no permission"), writing(tmp_path / "run"):
        raise PermissionError(13, "Permission denied", str(tmp_path / "run" / "sft"))
    with pytest.raises(BaseModelError, match="no space left"), writing(tmp_path / "cache", error=BaseModelError):
        raise OSError(28, "No space left on device")
    with pytest.raises(RuntimeError, match="another matter"), writing(tmp_path):
        raise RuntimeError("another matter")
