"""A stage whose disk is full, from its start to its end: it says so, keeps what was there, and goes on with room."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from finished_stages import light_config
from tiny_models import tiny_config

from pipeline.config import LaunchSettings
from pipeline.config_file import load_config
from pipeline.errors import StageFailedError
from pipeline.run_directory import RunDirectory
from stages.inputs import find_current
from stages.launch import launch_stage

STAGE_THAT_FILLS_THE_DISK = """
from stages.command import stage_main
def run(loaded, directory):
    print("a line before", flush=True)
    with (directory.root / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
if __name__ == "__main__":
    stage_main("sft", run)
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting needs Linux and root")
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_stage_that_runs_out_of_space_says_where(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = light_config(tmp_path, run_dir=str(small_disk / "run"))
    (tmp_path / "filling_stage.py").write_text(STAGE_THAT_FILLS_THE_DISK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    log, lines = small_disk / "run" / "logs" / "sft.log", []
    with pytest.raises(StageFailedError) as caught:
        launch_stage(
            "sft",
            config,
            [],
            LaunchSettings(),
            log,
            force=False,
            on_line=lines.append,
            on_progress=print,
            module="filling_stage",
        )
    message = str(caught.value)
    assert f"{small_disk / 'run'}: the sft stage failed: cannot write: there is no space left on the disk (" in message
    assert "Free space there" in message
    assert "a line before" in log.read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_log_that_cannot_grow_is_said_once_and_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "talking_stage.py").write_text("print('one')\nprint('two')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    lines: list[str] = []
    launch_stage(
        "sft",
        light_config(tmp_path),
        [],
        LaunchSettings(),
        "/dev/full",
        force=False,
        on_line=lines.append,
        on_progress=print,
        module="talking_stage",
    )
    assert lines == ["warning: /dev/full: the log is not complete: No space left on device", "one", "two"]


def test_a_real_stage_leaves_nothing_on_a_full_disk_and_finishes_with_room(small_disk: Path, tmp_path: Path) -> None:
    run_dir = small_disk / "run"
    loaded = tiny_config(tmp_path, f"run_dir={run_dir}")
    command = [sys.executable, "-m", "stages.sft", str(loaded.path), f"run_dir={run_dir}"]
    run_dir.mkdir()
    filler = run_dir / "filler"
    filler.write_bytes(b"x" * 1_000_000)
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "cannot write: there is no space left on the disk" in done.stderr and "Traceback" not in done.stderr
    left = [path for path in run_dir.rglob("*") if path.name.startswith(".")]
    assert not left and not (run_dir / "sft").exists()
    filler.unlink()
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    manifest, _ = find_current("sft", load_config(loaded.path, loaded.overrides), RunDirectory(run_dir))
    assert manifest is not None
