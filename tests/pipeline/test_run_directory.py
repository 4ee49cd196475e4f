"""The run directory: a stage is whole or absent, and a run belongs to one config."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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


KILLED_BETWEEN_THE_RENAMES = """
import os, signal, sys
from pipeline.run_directory import RunDirectory
run, rename = RunDirectory(sys.argv[1]), os.rename
def renaming(source, target):
    if target == run.stage("sft"):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.rename = renaming
with run.publish("sft") as draft:
    (draft / "file").write_text("new")
"""


def test_a_result_that_a_kill_left_half_replaced_comes_back(tmp_path):
    loaded = tiny_config(tmp_path)
    run = RunDirectory.open(loaded)
    publish(run, "old")
    command = [sys.executable, "-c", KILLED_BETWEEN_THE_RENAMES, str(run.root)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not run.stage("sft").exists() and len(list(run.root.glob(".sft-*"))) == 2
    RunDirectory.open(loaded, ["ppo"], ["sft"])  # also at the start of a stage that reads it
    assert (run.stage("sft") / "file").read_text() == "old"
    assert not list(run.root.glob(".*"))


def test_an_interruption_between_the_renames_puts_the_old_result_back(run, monkeypatch):
    publish(run, "old")
    rename = os.rename

    def interrupted(source, target):
        rename(source, target)
        if str(target).endswith("-replaced"):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish(run, "new")
    assert (run.stage("sft") / "file").read_text() == "old"
    assert [path.name for path in run.root.iterdir()] == ["sft"]


def test_what_killed_processes_left_goes_at_the_next_start(tmp_path):
    loaded = tiny_config(tmp_path)
    run = RunDirectory.open(loaded)
    publish(run, "finished")
    whole = run.working("ppo") / "00000001"
    left = [run.root / ".sft-abcdefgh", run.root / ".sft-abcdefgh-replaced", run.working("ppo") / ".draft-xyz"]
    for folder in (*left, whole):
        folder.mkdir(parents=True)
    run.metrics("sft").parent.mkdir()
    under_the_lock = [run.root / ".config.json-new", run.metrics("sft").with_name(".sft.jsonl-new")]
    for path in (*under_the_lock, run.root / ".report.html-old", run.root / ".summary.json-new"):
        path.write_text("{")
    an_hour_ago = time.time() - 3600
    os.utime(run.root / ".report.html-old", (an_hour_ago, an_hour_ago))
    RunDirectory.open(loaded)
    assert not any(path.exists() for path in (*left, *under_the_lock)) and whole.exists()
    assert (run.stage("sft") / "file").read_text() == "finished"
    assert [path.name for path in run.root.glob(".*")] == [".summary.json-new"], "another process may be writing it"


def test_a_start_leaves_a_stage_alone_that_somebody_is_at(tmp_path):
    loaded = tiny_config(tmp_path)
    run = RunDirectory.open(loaded)
    drafts = [run.root / ".sft-abcdefgh", run.working("sft") / ".draft-xyz", run.root / ".reward-abcdefgh"]
    for draft in drafts:
        draft.mkdir(parents=True)
    with run.locked("sft", warn=pytest.fail):
        RunDirectory.open(loaded, ["reward"])
        assert [draft.exists() for draft in drafts] == [True, True, False]
        with pytest.raises(RunDirectoryError, match="has been at the sft stage"):
            RunDirectory.open(loaded, ["ppo"], ["sft", "reward"])
        with pytest.raises(RunDirectoryError, match="has been at the sft stage"):
            RunDirectory.open(loaded)
        with pytest.raises(RunDirectoryError, match="belongs to another config"):  # which has left no file so far
            RunDirectory.open(tiny_config(tmp_path, "base.revision=other"), ["reward"])
    RunDirectory.open(loaded, ["reward"])
    assert not any(draft.exists() for draft in drafts)


def test_starts_wait_for_each_other(tmp_path):
    """Two stages that start at the same moment: neither is refused, and run.json is that of one of them."""
    loaded = tiny_config(tmp_path)
    with ThreadPoolExecutor(8) as threads:
        names = [*("sft", "reward", "ppo", "evaluate")] * 3
        runs = list(threads.map(lambda name: RunDirectory.open(loaded, [name]), names))
    assert len(runs) == 12 and read_json(runs[0].root / "run.json")["config_name"] == "tiny.yaml"


def test_a_run_opens_again_under_its_own_config(tmp_path):
    RunDirectory.open(tiny_config(tmp_path))
    run = RunDirectory.open(tiny_config(tmp_path, "ppo.learning_rate=0.5"))
    assert read_json(run.root / "config.json")["ppo"]["learning_rate"] == 0.5


@pytest.mark.parametrize(
    ("override", "field"),
    [("base.quantization=int8", "base_quantization"), ("base.revision=v2", "base_revision")],
)
@pytest.mark.parametrize("left", ["sft/adapter_model.safetensors", "working/ppo/checkpoints/00000001/state.json"])
def test_another_base_is_refused_and_the_field_is_named(tmp_path, override, field, left):
    run = RunDirectory.open(tiny_config(tmp_path))
    (run.root / left).parent.mkdir(parents=True)
    (run.root / left).write_text("work")
    with pytest.raises(RunDirectoryError, match=f"its {field} is"):
        RunDirectory.open(tiny_config(tmp_path, override))


def test_a_base_that_lies_elsewhere_is_not_another_one(tmp_path):
    """As where two machines see a shared folder under different paths. Another name, and another hub id, are others."""
    loaded = tiny_config(tmp_path)
    RunDirectory.open(loaded).stage("sft").mkdir()
    base = Path(loaded.config.base.model)
    (tmp_path / "mnt").mkdir()
    (tmp_path / "mnt" / base.name).symlink_to(base)
    RunDirectory.open(tiny_config(tmp_path, f"base.model={tmp_path}/mnt/{base.name}"))
    for other in (str(base.with_name("other-base")), f"org/{base.name}"):
        with pytest.raises(RunDirectoryError, match="its base_model is"):
            RunDirectory.open(tiny_config(tmp_path, f"base.model={other}"))


def test_a_start_that_went_no_further_leaves_the_folder_free(tmp_path):
    """Such as one with a base that is not there: the next one, with the right base, is not refused."""
    RunDirectory.open(tiny_config(tmp_path, "base.revision=mistyped")).working("sft").mkdir(parents=True)
    run = RunDirectory.open(tiny_config(tmp_path))
    assert read_json(run.root / "run.json")["base_revision"] is None


def test_another_config_is_refused(tmp_path):
    loaded = tiny_config(tmp_path)
    run = RunDirectory.open(loaded)
    run.stage("sft").mkdir()
    owner = read_json(run.root / "run.json")
    write_json(run.root / "run.json", owner | {"config_name": "other.yaml"})
    with pytest.raises(RunDirectoryError, match=r"'other\.yaml'"):
        RunDirectory.open(loaded)
    write_json(run.root / "run.json", owner | {"layout_version": LAYOUT_VERSION + 1})
    with pytest.raises(RunDirectoryError, match="newer trivet"):
        RunDirectory.open(loaded)
    for edited in (
        "{",
        "[]",
        "{}",
        '{"layout_version": "new"}',
        '{"layout_version": NaN}',
        '{"layout_version": 1e999}',
        "[" * 100_000,
    ):
        (run.root / "run.json").write_text(edited)
        with pytest.raises(RunDirectoryError, match="not readable"):
            RunDirectory.open(loaded)


def test_what_stands_in_config_json_is_for_readers_alone(tmp_path):
    loaded = tiny_config(tmp_path)
    run = RunDirectory.open(loaded)
    written = read_json(run.root / "config.json")
    (run.root / "config.json").write_text("[]")
    assert read_json(RunDirectory.open(loaded).root / "config.json") == written


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunDirectoryError, match="cannot write") as caught:
        RunDirectory.open(tiny_config(tmp_path, f"run_dir={tmp_path / 'file' / 'run'}"))
    assert caught.value.remedy and "run_dir" in caught.value.remedy


def test_a_file_in_the_place_of_the_run_is_named_before_anything_is_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunDirectoryError, match="a file lies where the run's folder should be"):
        RunDirectory.find(tiny_config(tmp_path, f"run_dir={tmp_path / 'file'}"))


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
