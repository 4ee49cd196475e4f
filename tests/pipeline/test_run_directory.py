"""The run directory: a stage is whole or absent, and a run belongs to one config."""

from __future__ import annotations

import json
import os

import pytest
from tiny_models import tiny_config

from pipeline.errors import RunDirectoryError
from pipeline.run_directory import LAYOUT_VERSION, RunDirectory, read_json, write_json


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "run")


def publish(run: RunDirectory, content: str) -> None:
    with run.publish("sft") as draft:
        (draft / "file").write_text(content)


def test_a_stage_appears_when_it_is_whole(run):
    with run.publish("sft") as draft:
        (draft / "file").write_text("new")
        assert not run.stage("sft").exists()
    assert (run.stage("sft") / "file").read_text() == "new"
    assert [path.name for path in run.root.iterdir()] == ["sft"]
    assert run.stage("sft").stat().st_mode & 0o777 == 0o755


def test_a_crash_leaves_the_old_result_and_nothing_else(run):
    publish(run, "old")
    run.working("sft").mkdir(parents=True)
    with pytest.raises(RuntimeError, match="crash"), run.publish("sft") as draft:
        (draft / "file").write_text("half")
        raise RuntimeError("crash")
    assert (run.stage("sft") / "file").read_text() == "old"
    assert sorted(path.name for path in run.root.iterdir()) == ["sft", "working"]
    assert run.working("sft").exists(), "checkpoints of a stage that did not finish"


def test_a_new_result_replaces_the_old_and_ends_the_work(run):
    publish(run, "old")
    run.working("sft").mkdir(parents=True)
    run.working("reward").mkdir(parents=True)
    publish(run, "new")
    assert (run.stage("sft") / "file").read_text() == "new"
    assert not run.working("sft").exists() and run.working("reward").exists()
    assert sorted(path.name for path in run.root.iterdir()) == ["sft", "working"]


def test_a_rename_that_fails_puts_the_old_result_back(run, monkeypatch):
    publish(run, "old")
    rename = os.rename

    def failing(source, target):
        if str(target) == str(run.stage("sft")) and not str(source).endswith("-replaced"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="no"):
        publish(run, "new")
    assert (run.stage("sft") / "file").read_text() == "old"


def test_a_run_opens_again_under_its_own_config(tmp_path):
    RunDirectory.open(tiny_config(tmp_path))
    run = RunDirectory.open(tiny_config(tmp_path, "ppo.learning_rate=0.5"))
    assert read_json(run.root / "config.json")["ppo"]["learning_rate"] == 0.5


@pytest.mark.parametrize(
    ("override", "field"),
    [("base.quantization=int8", "base_quantization"), ("base.revision=v2", "base_revision")],
)
def test_another_base_is_refused_and_the_field_is_named(tmp_path, override, field):
    RunDirectory.open(tiny_config(tmp_path))
    with pytest.raises(RunDirectoryError, match=f"its {field} is"):
        RunDirectory.open(tiny_config(tmp_path, override))


def test_another_config_is_refused(tmp_path):
    loaded = tiny_config(tmp_path)
    run = RunDirectory.open(loaded)
    owner = read_json(run.root / "run.json")
    write_json(run.root / "run.json", owner | {"config_name": "other.yaml"})
    with pytest.raises(RunDirectoryError, match=r"'other\.yaml'"):
        RunDirectory.open(loaded)
    write_json(run.root / "run.json", owner | {"layout_version": LAYOUT_VERSION + 1})
    with pytest.raises(RunDirectoryError, match="newer trivet"):
        RunDirectory.open(loaded)
    (run.root / "run.json").write_text("{")
    with pytest.raises(RunDirectoryError, match="not readable"):
        RunDirectory.open(loaded)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunDirectoryError, match="cannot write") as caught:
        RunDirectory.open(tiny_config(tmp_path, f"run_dir={tmp_path / 'file' / 'run'}"))
    assert caught.value.remedy and "run_dir" in caught.value.remedy


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "state.json"
    write_json(path, {"a": "ä"})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": "ä"}
    assert [entry.name for entry in path.parent.iterdir()] == ["state.json"]
    path.write_text("[1]")
    with pytest.raises(ValueError, match="JSON object"):
        read_json(path)
