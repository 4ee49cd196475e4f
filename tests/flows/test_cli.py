"""The trivet command, as its user sees it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from finished_stages import light_config, publish_all
from tiny_models import tiny_config
from typer.testing import CliRunner, Result

import pipeline
from flows.cli import app

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_HOME"):
        monkeypatch.delenv(name, raising=False)


def trivet(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_version() -> None:
    result = trivet("--version")
    assert (result.exit_code, result.output) == (0, f"trivet {pipeline.__version__}\n")


@pytest.mark.parametrize(
    ("command", "place", "goes_on"),
    [("run", "flows.cli._load", True), ("chat", "pipeline.finished_run.open_run", False)],
)
def test_what_is_interrupted_goes_on_only_where_something_is_kept(
    command: str, place: str, goes_on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupted)
    result = trivet(command, tmp_path)
    assert result.exit_code == 130 and result.stderr.startswith("Interrupted.")
    assert ("The same command goes on where this one stopped." in result.stderr) == goes_on


def test_help_names_every_command() -> None:
    for arguments in ([], ["--help"], ["-h"]):
        output = trivet(*arguments).output
        for command in ("run", "sft", "reward", "ppo", "evaluate", "data", "doctor", "promote", "rollback", "up"):
            assert f" {command} " in output
        for command in (
            "report",
            "runs",
            "show",
            "judge-pairs",
            "learning-curve",
            "lm-eval",
            "chat",
            "generate",
            "export",
        ):
            assert f" {command} " in output


@pytest.mark.parametrize("command", ["run", "sft", "reward", "ppo", "evaluate", "data"])
def test_a_missing_config_is_said_in_one_breath(command: str, tmp_path: Path) -> None:
    result = trivet(command, tmp_path / "absent.yaml")
    assert result.exit_code == 2
    assert "absent.yaml: cannot read the config: No such file or directory" in result.stderr
    assert "-> Give the path of a YAML file" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["run", "sft", "data"])
def test_all_faults_of_a_config_are_said(command: str, tmp_path: Path) -> None:
    result = trivet(command, light_config(tmp_path), "sft.epoch=1", "lora.rank=0")
    assert result.exit_code == 2
    assert "2 faults" in result.stderr
    assert "did you mean 'epochs'?" in result.stderr


def test_a_misspelt_option_is_refused(tmp_path: Path) -> None:
    result = trivet("run", light_config(tmp_path), "--forced")
    assert result.exit_code == 2
    assert "--force" in result.stderr


def test_a_dry_run_shows_settings_batches_and_plan(tmp_path: Path) -> None:
    result = trivet("run", tiny_config(tmp_path).path, "ppo.kl.coefficient=0.2", "--dry-run")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert any(line.split() == ["ppo.kl.coefficient", "0.2", "override"] for line in lines)
    assert any(line.startswith("ppo: a round samples 8 responses") for line in lines)
    assert [line.partition(":")[0] for line in lines[-5:-1]] == ["sft", "reward", "ppo", "evaluate"]
    assert lines[-5] == "sft: would run; not run yet."
    assert lines[-1].startswith("The input of sft, reward, ppo, evaluate is good")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_tells_what_a_later_stage_would_fail_at(tmp_path: Path) -> None:
    result = trivet("run", tiny_config(tmp_path).path, "evaluate.gold=nope.py:f", "--dry-run")
    assert result.exit_code == 2
    assert "nope.py" in result.stderr


def test_without_a_reward_model_there_is_no_reward_stage(tmp_path: Path) -> None:
    path = light_config(tmp_path, ppo={"rewards": [{"function": "judge.py:score"}]})
    (tmp_path / "judge.py").write_text("def score(prompts, completions): return [0.0] * len(prompts)\n")
    result = trivet("run", path, "data.preferences.sources=[]", "--dry-run")
    plan = [line.partition(":")[0] for line in result.stdout.splitlines() if ": would run" in line]
    assert plan == ["sft", "ppo", "evaluate"]


def test_a_finished_stage_is_not_launched(tmp_path: Path) -> None:
    path = light_config(tmp_path)
    publish_all(path)
    for stage in ("sft", "reward", "ppo", "evaluate"):
        result = trivet(stage, path)
        assert result.exit_code == 0
        assert f"{stage}: nothing to do; unchanged" in result.stdout
    assert not (tmp_path / "run" / "logs").exists()


def test_another_configs_run_directory_is_left_alone(tmp_path: Path) -> None:
    publish_all(light_config(tmp_path))
    other = tmp_path / "other.yaml"
    other.write_text((tmp_path / "run.yaml").read_text())
    for command in ("run", "sft"):
        result = trivet(command, other)
        assert result.exit_code == 2
        assert "the run directory belongs to another config" in result.stderr
        assert "run_dir=" in result.stderr


def test_a_dead_server_is_noticed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    result = trivet("run", light_config(tmp_path))
    assert result.exit_code == 2
    assert "PREFECT_API_URL=http://127.0.0.1:9/api: no Prefect server answers" in result.stderr
    assert "unset PREFECT_API_URL" in result.stderr


def test_up_brings_its_own_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://prefect.example/api")
    result = trivet("up")
    assert result.exit_code == 2
    assert "PREFECT_API_URL=http://prefect.example/api: another server is set" in result.stderr
    assert "prefect worker start --pool gpu-box" in result.stderr


def test_data_reports_every_source(tmp_path: Path) -> None:
    path = tiny_config(tmp_path).path
    result = trivet("data", path)
    assert result.exit_code == 0, result.output
    for title in ("Instructions", "Preferences", "Prompts"):
        assert title in result.stdout
    assert "tiny_data.py:demonstrations" in result.stdout
    assert " 40 " in result.stdout
    result = trivet("data", path, "data.preferences.sources=[]")
    assert "data.preferences: no sources in the config." in result.stdout


def test_bad_rows_are_named_by_data(tmp_path: Path) -> None:
    path = tiny_config(tmp_path).path
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": }\n')
    result = trivet("data", path, f"data.instructions.sources={tmp_path / 'bad.jsonl'}")
    assert result.exit_code == 2
    assert "bad.jsonl" in result.stderr
    assert "line 2" in result.stderr


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m flows.cli run {tiny_config(tmp_path).path} --dry-run | head -n 1"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
