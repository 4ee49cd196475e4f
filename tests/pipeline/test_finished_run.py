"""A run as something to use: what is there, what is not and why, and what it learnt from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from finished_stages import light_config, publish, publish_all
from usable_run import usable_run

from pipeline.config_file import load_config
from pipeline.errors import ArtifactError, BaseModelError, IncompatibleAdapterError, RunDirectoryError
from pipeline.finished_run import as_text, learnt_conversations, open_run, prompts_seen
from pipeline.records import Message
from pipeline.run_directory import RunDirectory


def test_what_is_there_and_what_it_learnt_from(tmp_path: Path) -> None:
    loaded = usable_run(tmp_path)
    found = open_run(loaded.config.run_dir, ("ppo",))
    assert found.speakers == ("base", "sft", "policy") and found.adapters.keys() == {"sft", "reward", "ppo"}
    assert found.base.dtype == "float32" and not found.cautions
    assert learnt_conversations(found) is True
    prompts = prompts_seen(found, 3)
    assert [prompt[0].content for prompt in prompts] == [  # type: ignore[union-attr]
        f"Question {number} about the {word}?" for number, word in enumerate(("tides", "bicycle", "soup"))
    ]


def test_the_base_computes_as_it_did_whatever_the_config_leaves_open(tmp_path: Path) -> None:
    base = {"model": str(tmp_path / "llama-base"), "dtype": "bfloat16", "cache_dir": str(tmp_path / "cache")}
    loaded = usable_run(tmp_path, ("sft",), base=base)
    path = Path(loaded.config.run_dir) / "config.json"
    config = json.loads(path.read_text())
    config["base"]["dtype"] = "auto"
    path.write_text(json.dumps(config))
    assert open_run(loaded.config.run_dir).base.dtype == "bfloat16"


def test_a_policy_of_a_replaced_sft_result_is_told(tmp_path: Path) -> None:
    loaded = usable_run(tmp_path, ("sft", "reward", "ppo"))
    other = usable_run(tmp_path / "other", ("sft",), lora={"rank": 2, "alpha": 8})
    run = RunDirectory(loaded.config.run_dir)
    run.stage("sft").rename(tmp_path / "old")
    RunDirectory(other.config.run_dir).stage("sft").rename(run.stage("sft"))
    found = open_run(run.root)
    assert any("ppo is outdated: made from another sft result" in caution for caution in found.cautions)


def test_faults_say_what_is_wrong_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="there is no such folder"):
        open_run(tmp_path / "absent")
    loaded = load_config(light_config(tmp_path))
    run = RunDirectory.open(loaded)
    with pytest.raises(ArtifactError, match="the sft stage is not finished; it is waiting") as error:
        open_run(run.root)
    assert f"trivet run {loaded.path.resolve()} goes on with it" in str(error.value)
    publish("sft", loaded, run)
    with pytest.raises(IncompatibleAdapterError, match="another base lies at"):
        open_run(run.root)
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(BaseModelError, match="there is no model here"):
        open_run(run.root)
    path = run.root / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"newer": 1}))
    with pytest.raises(RunDirectoryError, match="not those of this version of trivet: newer: extra inputs"):
        open_run(run.root)
    path.unlink()
    with pytest.raises(RunDirectoryError, match="the run's settings are not there"):
        open_run(run.root)


def test_a_damaged_stage_that_is_needed_is_told(tmp_path: Path) -> None:
    loaded = publish_all(light_config(tmp_path))
    (Path(loaded.config.run_dir) / "ppo" / "adapter.txt").write_text("edited")
    with pytest.raises(ArtifactError, match=r"the adapter cannot be used: .*is not the one that the stage wrote"):
        open_run(loaded.config.run_dir, ("ppo",))


def test_texts_as_files_hold_them() -> None:
    assert as_text([{"role": "user", "content": "x"}]) == (Message("user", "x"),)
    assert as_text("x") == "x"
    assert [as_text(odd) for odd in (None, "", [], [1], [{"role": "user"}], 3)] == [None] * 6
