"""The flow on Prefect: what it reports, what it does not run again, and that nothing of it stays behind."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from finished_stages import METRICS, light_config, publish_all
from real_runs import environment, no_process_with, wait_for
from rich.console import Console
from tiny_models import tiny_config

from flows.display import Display, RunLogHandler, current_display, showing
from flows.summary import figures_of, key_figures, show_summary, write_summary
from pipeline.artifacts import read_manifest
from pipeline.config_file import load_config
from pipeline.progress import ProgressUpdate
from pipeline.registry import Registry
from pipeline.run_directory import RunDirectory
from stages.interruption import EXIT_INTERRUPTED
from stages.launch import StageResult

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder for all runs: only the first has to make Prefect's database."""
    return tmp_path_factory.mktemp("cache")


@linux_only
def test_a_finished_run_is_reported_and_nothing_is_launched(tmp_path: Path, cache: Path) -> None:
    """The whole command with the real Prefect, on finished stages: with a reward, without, and side by side."""
    path = light_config(tmp_path)
    publish_all(path)
    (tmp_path / "judge.py").write_text("def score(prompts, completions): return [0.0] * len(prompts)\n")
    bare_path = light_config(
        tmp_path / "other",
        data={kind: {"sources": f"{kind}.jsonl"} for kind in ("instructions", "prompts")},
        ppo={"rewards": [{"function": str(tmp_path / "judge.py") + ":score"}]},
    )
    publish_all(bare_path)
    apart_path = light_config(
        tmp_path / "apart", reward={"start_from": "base", "calibrate_on": "base"}, launch={"side_by_side": True}
    )
    publish_all(apart_path)
    program = f"""
import sys
from flows.cli import main
sys.argv = ["trivet", "run", {str(path)!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
from flows.rlhf import rlhf
summary = rlhf({str(bare_path)!r}, ["registry.promote=passed", {f"registry.folder={tmp_path}/registry"!r}], False)
assert list(summary["stages"]) == ["sft", "ppo", "evaluate"], summary
summary = rlhf({str(apart_path)!r}, [], False)
assert [stage["cached"] for stage in summary["stages"].values()] == [True] * 4, summary
assert "torch" not in sys.modules
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment(cache), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["stages"]) == ["sft", "reward", "ppo", "evaluate"]
    for name, stage in summary["stages"].items():
        assert stage["cached"]
        assert stage["reason"].startswith("unchanged")
        assert stage["metrics"] == METRICS[name]
        assert stage["seconds"] >= 0
        assert stage["peak_memory_bytes"] > 0
        assert (stage["adapter_digest"] is None) == (name == "evaluate")
    assert summary["evaluation"] == METRICS["evaluate"]
    assert summary["config"] == str(path)
    assert {"torch", "prefect", "python", "trivet"} <= set(summary["versions"])
    assert summary["started"] <= summary["finished"]

    for text in ("sft: nothing to do", "Starting Prefect", "Please turn the handle.", "How do I open the [red] door?"):
        assert text in done.stdout
    assert "win_rate.gold  0.7 [0.52, 0.83, n=32]" in done.stdout
    assert not (tmp_path / "run" / "logs").exists()
    promoted = Registry(tmp_path / "registry").current
    assert promoted is not None
    assert promoted.digest == read_manifest(tmp_path / "other" / "run" / "ppo").digest
    # Neither Prefect's own chatter, nor log lines that could not be delivered, nor a server left behind.
    ours = ("nothing to do", "Current is now version 1")
    assert [line for line in done.stderr.splitlines() if not any(text in line for text in ours)] == []
    assert "Beginning flow run" not in done.stdout
    assert no_process_with(f"XDG_CACHE_HOME={cache}")
    assert (cache / "trivet" / "prefect" / "prefect.db").exists()
    assert not (cache / "home").exists()


@linux_only
def test_a_run_that_is_ended_leaves_no_process(tmp_path: Path, cache: Path) -> None:
    """SFT waits for its data for ever, which is as good a moment as any."""
    path = tiny_config(tmp_path).path
    (tmp_path / "slow.py").write_text(
        "import os, time\n"
        "def rows():\n"
        "    if os.environ.get('TRIVET_PROGRESS'): time.sleep(600)\n"  # as in a stage, and in no other process
        "    yield {'prompt': 'p', 'completion': 'c'}\n"
        "    yield {'prompt': 'q', 'completion': 'c'}\n"
    )
    command = [
        sys.executable,
        "-m",
        "flows.cli",
        "run",
        str(path),
        f"data.instructions.sources={tmp_path}/slow.py:rows",
    ]
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(command, env=environment(cache), stdout=output, stderr=subprocess.STDOUT)
    variable = f"XDG_CACHE_HOME={cache}"
    wait_for(
        lambda: "sft: starting" in (tmp_path / "output").read_text() or process.poll() is not None,
        "the first stage",
        120,
        (tmp_path / "output").read_text,
    )
    assert process.poll() is None, (tmp_path / "output").read_text()
    process.terminate()
    assert process.wait(60) == EXIT_INTERRUPTED, (tmp_path / "output").read_text()
    assert "sft: stopped as asked" in (tmp_path / "output").read_text()
    assert no_process_with(variable)


# ---- the summary


def result(stage: str, **changes: object) -> StageResult:
    values = {
        "stage": stage,
        "path": "p",
        "adapter_digest": "d",
        "seconds": 12.0,
        "peak_memory_bytes": 10**9,
        "metrics": METRICS[stage],
        "cached": False,
        "reason": "not run yet",
    }
    return StageResult(**(values | changes))  # type: ignore[arg-type]


def test_the_summary_of_a_part_of_a_run(tmp_path: Path) -> None:
    loaded = load_config(light_config(tmp_path))
    summary = write_summary(loaded, [result("sft"), None], datetime.now(UTC))
    assert list(summary["stages"]) == ["sft"]
    assert summary["evaluation"] == {}
    assert json.loads(RunDirectory(loaded.config.run_dir).summary.read_text()) == summary


def test_the_table_shows_time_memory_and_key_figures(tmp_path: Path) -> None:
    loaded = load_config(light_config(tmp_path))
    summary = write_summary(loaded, [result("sft"), result("ppo", cached=True)], datetime.now(UTC))
    text = io.StringIO()
    show_summary(summary, Console(file=text, width=150))
    for expected in ("sft", "12 s", "1.0 GB", "held_out_loss_after  2.5", "(earlier)", "objective/score  0.5"):
        assert expected in text.getvalue()
    assert "policy/loss" not in text.getvalue()


def test_figures_are_short_texts() -> None:
    metrics = {
        "rate": {"value": 0.75, "low": 0.6, "high": 0.86, "n": 40},
        "nested": {"inner": {"value": 1.0, "low": 0.5, "high": 2.0}, "loss": 0.123456789},
        "count": 3,
        "nothing": None,
        "curve": [1, 2],
    }
    assert dict(figures_of(metrics)) == {
        "rate": "0.75 [0.6, 0.86, n=40]",
        "nested.inner": "1 [0.5, 2]",
        "nested.loss": "0.1235",
        "count": "3",
        "nothing": "-",
    }
    assert dict(key_figures("sft", METRICS["sft"])) == {"held_out_loss_before": "3", "held_out_loss_after": "2.5"}


# ---- the display


def record(name: str, level: int, text: str, path: str = "/here/tasks.py") -> logging.LogRecord:
    return logging.LogRecord(name, level, path, 1, text, None, None)


def test_run_logs_are_printed_as_they_are_and_chatter_is_not() -> None:
    text = io.StringIO()
    handler = RunLogHandler(io.StringIO())
    with showing(Display(Console(file=text))) as display:
        assert current_display() is display
        handler.emit(record("prefect.task_runs", logging.INFO, "sft: [starting] 50%"))
        handler.emit(record("prefect.flow_runs", logging.INFO, "Beginning flow run", "/x/prefect/flow_engine.py"))
        handler.emit(record("prefect.task_runs", logging.ERROR, "Traceback", "/x/prefect/task_engine.py"))
        handler.emit(record("prefect.client", logging.INFO, "chatter"))
        handler.emit(record("prefect.client", logging.WARNING, "worth knowing"))
    assert text.getvalue() == "sft: [starting] 50%\nworth knowing\n"
    assert current_display() is None


def test_without_a_display_the_stream_is_used() -> None:
    stream = io.StringIO()
    RunLogHandler(stream).emit(record("prefect.flow_runs", logging.INFO, "a line"))
    assert stream.getvalue() == "a line\n"


def test_progress_in_a_pipe_is_lines() -> None:
    text = io.StringIO()
    display = Display(Console(file=text))
    display.progress(ProgressUpdate("ppo", "iterations", 0, 4, 0.0))
    display.progress(ProgressUpdate("ppo", "iterations", 4, 4, 8.0, 2.0, finished=True))
    display.close()
    assert text.getvalue() == "ppo 0/4 iterations\nppo 4/4 iterations, 2.0 s each, took 8.0 s\n"
