"""The registry of promoted policies: what is current, how it got there, and what a crash leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from finished_stages import light_config, publish, publish_all
from real_runs import ROOT
from typer.testing import CliRunner

from flows.cli import app
from pipeline.artifacts import folder_files, read_manifest, write_manifest
from pipeline.config_file import LoadedConfig, load_config
from pipeline.errors import ArtifactError, RegistryError, RunDirectoryError
from pipeline.registry import Registry
from pipeline.run_directory import STAGES, RunDirectory
from pipeline.run_lock import hold


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedConfig:
    return publish_all(light_config(tmp_path))


@pytest.fixture
def run(loaded: LoadedConfig) -> RunDirectory:
    return RunDirectory(loaded.config.run_dir)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def another_policy(loaded: LoadedConfig, run: RunDirectory, text: str) -> None:
    """A PPO stage with other files, as another night would leave it."""
    publish("ppo", loaded, run)
    folder = run.stage("ppo")
    manifest = read_manifest(folder)
    (folder / "adapter.txt").write_text(text)
    write_manifest(folder, replace(manifest, files=folder_files(folder)))


def test_promotions_are_numbered_copies(registry: Registry, loaded: LoadedConfig, run: RunDirectory) -> None:
    assert registry.current is None
    assert registry.stage("ppo") is None
    event, new = registry.promote(run, STAGES, figures={"n": 8}, note="the first")
    assert (event.version, event.action, event.note, event.figures, new) == (1, "promote", "the first", {"n": 8}, True)
    digest = read_manifest(run.stage("ppo")).digest
    assert event.digest == digest
    for stage in STAGES:
        copied = Registry(registry.root).stage(stage)
        assert copied is not None
        assert read_manifest(copied) == read_manifest(run.stage(stage))

    assert registry.promote(run, STAGES, figures={}) == (event, False)
    another_policy(loaded, run, "better")
    second, new = registry.promote(run, STAGES, figures={})
    assert (second.version, new) == (2, True)
    assert registry.stage("ppo") == registry.root / "versions" / "0002" / "ppo"
    assert read_manifest(registry.root / "versions" / "0001" / "ppo").digest == digest
    assert [one.version for one in registry.history] == [1, 2]


def test_rolling_back(registry: Registry, loaded: LoadedConfig, run: RunDirectory) -> None:
    with pytest.raises(RegistryError, match="no earlier version"):
        registry.rollback()
    for text in ("one", "two", "three"):
        another_policy(loaded, run, text)
        registry.promote(run, STAGES, figures={})
    assert registry.rollback(note="worse").version == 2
    assert registry.rollback().version == 1
    with pytest.raises(RegistryError, match="no earlier version"):
        registry.rollback()
    assert registry.rollback(3).version == 3
    with pytest.raises(RegistryError, match=r"(?s)no version 7 to go back to.*1, 2, 3"):
        registry.rollback(7)
    assert [(event.action, event.version) for event in registry.history] == [
        *(("promote", version) for version in (1, 2, 3)),
        *(("rollback", version) for version in (2, 1, 3)),
    ]
    # Numbers are never used twice.
    another_policy(loaded, run, "four")
    assert registry.promote(run, STAGES, figures={})[0].version == 4


def test_a_damaged_version_does_not_become_current(registry: Registry, loaded: LoadedConfig, run: RunDirectory) -> None:
    registry.promote(run, STAGES, figures={})
    another_policy(loaded, run, "two")
    registry.promote(run, STAGES, figures={})
    (registry.root / "versions" / "0001" / "ppo" / "adapter.txt").write_text("edited")
    with pytest.raises(ArtifactError, match="not the one that the stage wrote"):
        registry.rollback()
    assert registry.current is not None and registry.current.version == 2


def test_a_damaged_run_is_not_promoted(registry: Registry, run: RunDirectory) -> None:
    (run.stage("reward") / "adapter.txt").unlink()
    with pytest.raises(ArtifactError, match="missing"):
        registry.promote(run, STAGES, figures={})
    assert registry.current is None
    assert list((registry.root / "versions").iterdir()) == []


EVENT = '{"action": "promote", "time": "", "run_dir": "", "digest": "", "figures": {}, "version": VERSION}'


@pytest.mark.parametrize(
    "content",
    ["{}", *('{"history": [' + EVENT.replace("VERSION", version) + "]}" for version in ('"1"', "1.0", "0", "1e999"))],
)
def test_an_unreadable_history_is_named(registry: Registry, content: str) -> None:
    registry.root.mkdir()
    (registry.root / "registry.json").write_text(content)
    with pytest.raises(RegistryError, match=r"registry\.json: the history is not readable"):
        _ = registry.current


def test_a_promotion_killed_before_its_last_step_changes_nothing(
    registry: Registry, loaded: LoadedConfig, run: RunDirectory
) -> None:
    """The copy is complete, but nothing points to it; the next promotion takes its number."""
    registry.promote(run, STAGES, figures={})
    another_policy(loaded, run, "two")
    program = f"""
import os, signal
from pipeline import registry
from pipeline.run_directory import STAGES, RunDirectory
registry.write_json = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
registry.Registry({str(registry.root)!r}).promote(RunDirectory({str(run.root)!r}), STAGES, figures={{}})
"""
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (registry.root / "versions" / "0002").exists()
    assert registry.current is not None and registry.current.version == 1
    another_policy(loaded, run, "three")
    event, _ = registry.promote(run, STAGES, figures={})
    assert event.version == 2
    assert (registry.root / "versions" / "0002" / "ppo" / "adapter.txt").read_text() == "three"


def test_one_promotion_at_a_time(registry: Registry, run: RunDirectory) -> None:
    registry.root.mkdir()
    with hold(registry.root / "lock", "a promotion", print), pytest.raises(RunDirectoryError, match="a promotion"):
        registry.promote(run, STAGES, figures={})


def test_the_command(tmp_path: Path, loaded: LoadedConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def trivet(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, [arguments[0], str(loaded.path), *arguments[1:]])
        return done.exit_code, done.output

    code, said = trivet("promote", "gates.max_sft_loss=2.4")
    assert code == 2
    assert "held-out loss 2.5, wanted at most 2.4" in said
    code, said = trivet("promote", "sft.learning_rate=1")
    assert code == 2
    assert "the run is not finished: sft, changed since the last run: settings" in said
    code, said = trivet("promote", "--note", "good enough")
    assert (code, "Current is now version 1" in said) == (0, True)
    assert "Nothing to do: current already is version 1" in trivet("promote")[1]
    assert trivet("rollback")[0] == 2
    history = json.loads((tmp_path / "registry" / "registry.json").read_text())
    assert history["current"] == 1
    assert [event["note"] for event in history["history"]] == ["good enough"]
    assert load_config(loaded.path).config.registry.folder == "registry"


def test_a_version_whose_files_are_gone_is_not_gone_back_to(registry: Registry, run: RunDirectory) -> None:
    registry.promote(run, STAGES, figures={})
    shutil.rmtree(registry.root / "versions")
    with pytest.raises(RegistryError, match="the files of version 1 are gone"):
        registry.rollback(1)
