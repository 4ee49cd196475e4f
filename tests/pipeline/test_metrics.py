"""Metrics and peak memory: whole lines only, no step twice after resuming, numbers that JSON knows."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import ArtifactError
from pipeline.memory import megabytes, peak_memory_bytes, reset_peak
from pipeline.metrics import MetricsWriter, read_metrics

ROOT = Path(__file__).parents[2]


def test_lines_read_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics" / "ppo.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(1, {"kl/reference": 0.5}, loss=2)
        writer.write(2, loss=1.5)
    assert read_metrics(path) == [{"step": 1, "kl/reference": 0.5, "loss": 2.0}, {"step": 2, "loss": 1.5}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_does_not_know_becomes_null(tmp_path: Path, value: float) -> None:
    path = tmp_path / "sft.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(1, loss=value)
    assert json.loads(path.read_text()) == {"step": 1, "loss": None}


def test_a_metric_may_not_be_called_step(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "sft.jsonl") as writer, pytest.raises(ValueError, match="own key"):
        writer.write(1, {"step": 3.0})


def test_no_file_means_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_each_line_is_there_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "sft.jsonl"
    program = (
        "import os, signal, sys\nfrom pipeline.metrics import MetricsWriter\n"
        "writer = MetricsWriter(sys.argv[1])\n"
        "for step in range(1, 4): writer.write(step, loss=step)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program, str(path)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


def test_a_torn_last_line_is_dropped_and_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "sft.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1]
    with MetricsWriter(path) as writer:
        writer.write(2, loss=1.0)
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


@pytest.mark.parametrize(
    "line", ["not json", "[1]", '{"loss": 1.0}', '{"step": "2"}', '{"step": 2, "loss": "low"}', "[" * 100_000]
)
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "sft.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ArtifactError, match="line 2"):
        read_metrics(path)


def test_resuming_leaves_no_step_twice(tmp_path: Path) -> None:
    path = tmp_path / "ppo.jsonl"
    with MetricsWriter(path) as writer:
        for step in range(1, 8):
            writer.write(step, loss=step)
    with MetricsWriter(path) as writer:
        writer.truncate_after(5)
        writer.write(6, loss=60)
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [
        *((n, float(n)) for n in range(1, 6)),
        (6, 60),
    ]


def test_a_run_that_starts_over_begins_with_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "ppo.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(1, loss=1)
        writer.truncate_after(0)
        writer.write(1, loss=10)
    assert read_metrics(path) == [{"step": 1, "loss": 10.0}]
    assert list(path.parent.iterdir()) == [path]


def test_peak_memory_sees_what_was_held_and_let_go() -> None:
    assert "torch" not in sys.modules or not sys.modules["torch"].cuda.is_initialized()
    reset = reset_peak()
    before = peak_memory_bytes()
    block = bytearray(64 << 20)
    block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
    del block
    if not reset:
        pytest.skip("this machine does not allow the peak to be reset")
    # Some pages may have been in the process already.
    assert peak_memory_bytes() - before > 48 << 20
    reset_peak()
    assert peak_memory_bytes() < before + (32 << 20)


def test_peak_memory_imports_no_torch() -> None:
    program = (
        "import sys, pipeline.memory as m\nassert m.peak_memory_bytes() > 1 << 20\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def test_sizes_are_for_people() -> None:
    assert megabytes(812_400_000) == "812 MB"
    assert megabytes(3_440_000_000) == "3.4 GB"
