"""The whole job, as its user starts it: all four stages train a tiny model in real processes, then nothing is left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from real_runs import environment, no_process_with
from tiny_models import tiny_config

from pipeline.artifacts import read_manifest
from pipeline.run_directory import STAGES, RunDirectory

WORDS = ("sun", "sea", "sky", "ice", "oak", "elm", "fox", "owl", "bee", "ant", "cat", "dog", "hen", "cow", "pig", "rat")

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def trivet(cache: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", *map(str, arguments)]
    return subprocess.run(
        command, env=environment(cache), cwd=cache, capture_output=True, text=True, timeout=600, check=False
    )


@linux_only
def test_the_whole_job_then_only_what_changed(tmp_path: Path) -> None:
    """A first run of everything; a second with nothing to do; a third with new preferences."""
    cache = tmp_path / "cache"
    cache.mkdir()
    pairs = [{"prompt": word, "chosen": word + "!", "rejected": "zz " + word} for word in WORDS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    sources = {
        "instructions": "tiny_data.py:demonstrations",
        "preferences": "pairs.jsonl",
        "prompts": "tiny_data.py:prompts",
    }
    data = {kind: {"sources": source, "held_out": 0.25} for kind, source in sources.items()}
    loaded = tiny_config(tmp_path, data=data)
    run = RunDirectory(loaded.config.run_dir)

    first = trivet(cache, "run", loaded.path)
    assert first.returncode == 0, first.stdout + first.stderr
    summary = json.loads(run.summary.read_text())
    assert list(summary["stages"]) == list(STAGES)
    assert not any(stage["cached"] for stage in summary["stages"].values())
    assert summary["stages"]["sft"]["metrics"]["steps"] == 4
    assert set(summary["evaluation"]["win_rate"]) == {"reward_model", "gold"}
    assert "win_rate.gold" in first.stdout
    for stage in STAGES:
        manifest = read_manifest(run.stage(stage))  # verifies every file
        assert summary["stages"][stage]["adapter_digest"] == (None if stage == "evaluate" else manifest.digest)
        assert run.log(stage).read_text()
    for stage in ("sft", "reward", "ppo"):
        assert run.metrics(stage).read_text()
    manifests = {stage: (run.stage(stage) / "trivet.json").read_bytes() for stage in STAGES}

    second = trivet(cache, "run", loaded.path)
    assert second.returncode == 0, second.stdout + second.stderr
    again = json.loads(run.summary.read_text())
    assert all(stage["cached"] and "unchanged" in stage["reason"] for stage in again["stages"].values())
    assert {stage: (run.stage(stage) / "trivet.json").read_bytes() for stage in STAGES} == manifests
    assert again["evaluation"] == summary["evaluation"]

    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "moon", "chosen": "moon!", "rejected": "zz moon"}) + "\n")
    third = trivet(cache, "run", loaded.path)
    assert third.returncode == 0, third.stdout + third.stderr
    changed = json.loads(run.summary.read_text())["stages"]
    assert {stage: changed[stage]["reason"] for stage in STAGES if not changed[stage]["cached"]} == {
        "reward": "changed since the last run: data",
        "ppo": "changed since the last run: parents",
        "evaluate": "changed since the last run: parents",
    }
    assert (run.stage("sft") / "trivet.json").read_bytes() == manifests["sft"]
    assert no_process_with(f"XDG_CACHE_HOME={cache}")
