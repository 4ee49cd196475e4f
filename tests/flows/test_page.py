"""What goes to Prefect's page: short logs, and texts that stay texts."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from pathlib import Path

import pytest
from finished_stages import SAMPLES, light_config, publish_all

from flows.page import bounded, lineage, page_only, samples_side_by_side, summary_table
from flows.summary import write_summary
from pipeline.artifacts import read_manifest
from pipeline.run_directory import STAGES, RunDirectory
from stages.launch import stage_result


def test_a_long_log_is_cut_and_says_where_the_rest_is() -> None:
    lines: list[str] = []
    log = bounded(lines.append, Path("run/logs/sft.log"))
    for number in range(2000):
        log(f"line {number}")
    assert len(lines) == 501
    assert lines[499] == "line 499"
    assert lines[500] == "More than 500 lines: all of them are in run/logs/sft.log."


def test_a_long_line_is_cut() -> None:
    lines: list[str] = []
    bounded(lines.append, Path("log"))("x" * 5000)
    assert lines == ["x" * 2000 + " ... (5000 characters)"]


def test_a_page_that_cannot_be_written_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with page_only(logging.getLogger("run")):
        raise ConnectionError("no server")
    assert "The page of this run lacks something: no server" in caplog.text


def test_table_and_lineage_tell_what_was_made_from_what(tmp_path: Path) -> None:
    loaded = publish_all(light_config(tmp_path))
    run = RunDirectory(loaded.config.run_dir)
    manifests = {stage: read_manifest(run.stage(stage)) for stage in STAGES}
    results = [
        stage_result(stage, run, manifest, cached=stage == "sft", reason=f"because of {stage}")
        for stage, manifest in manifests.items()
    ]
    summary = write_summary(loaded, results, datetime.now(UTC))
    table = summary_table(summary)
    assert "\n- sft cached: because of sft\n" in table
    assert "\n- ppo ran: because of ppo\n" in table
    assert r"held\_out\_loss\_after **2.5**" in table
    sft, reward = (manifests[stage].digest[:12] for stage in ("sft", "reward"))
    assert f"| ppo | `{manifests['ppo'].digest[:12]}` | sft `{sft}`, reward `{reward}` |" in lineage(summary)
    preferences = manifests["reward"].inputs["data"]["preferences"][:12]
    assert f"preferences `{preferences}`" in lineage(summary)


def test_answers_cannot_break_the_table(tmp_path: Path) -> None:
    path = tmp_path / "samples.json"
    path.write_text(json.dumps([SAMPLES[0] | {"ppo": "a | b\n<script>*x*"}, SAMPLES[0] | {"ppo": " "}]))
    text = samples_side_by_side(path)
    assert r"| PPO | 2 | a \| b<br>&lt;script&gt;\*x\* |" in text
    assert "| PPO | 2 | (nothing) |" in text
    assert samples_side_by_side(tmp_path / "absent.json") == ""
