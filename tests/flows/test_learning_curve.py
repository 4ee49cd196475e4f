"""`trivet learning-curve`: what it trains, what it skips, what it says, and what it leaves alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from finished_stages import light_config, publish
from real_runs import environment, wait_for
from reported_run import lines, pairs
from rich.console import Console
from tiny_models import tiny_config
from typer.testing import CliRunner, Result

import stages.reward as reward
import stages.sft as sft
from flows.cli import app
from flows.learning_curve import read_fractions, table_of
from pipeline.artifacts import MANIFEST, read_manifest
from pipeline.config_file import LoadedConfig, load_config
from pipeline.datasets import load_preferences
from pipeline.errors import ConfigError
from pipeline.learning_curve import CURVE, LearningCurve
from pipeline.run_directory import RunDirectory
from pipeline.run_state import read_learning_curve
from pipeline.scored_pairs import read_scored

NO_SFT = {"start_from": "base", "calibrate_on": "base"}


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def curve_command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["learning-curve", *(str(argument) for argument in arguments)])


def points_of(run: RunDirectory) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run.learning_curve / CURVE).read_text())["points"]
    return found


# -- the real thing


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> LoadedConfig:
    """A run whose SFT and reward model are finished."""
    settings = {
        "batch_size": 4,
        "microbatch_size": 2,
        "max_length": 128,
        "epochs": 3,
        "learning_rate": 3e-3,
        "calibration_prompts": 8,
        "checkpoint_every": 1,
    }
    loaded = tiny_config(tmp_path_factory.mktemp("curve"), reward=settings)
    for stage in (sft, reward):
        stage.run(loaded, RunDirectory.open(loaded))
    return loaded


def test_shares_are_trained_once_by_the_real_stage_and_the_run_is_left_as_it_is(trained: LoadedConfig) -> None:
    """The whole command in processes of its own, as a user starts it."""
    run = RunDirectory(trained.config.run_dir)
    files = [run.stage("reward") / MANIFEST, run.root / "config.json", run.root / "origins.json"]
    before = [path.read_bytes() for path in files]
    result = curve_command(trained.path, "--fractions", "0.25,1")
    assert result.exit_code == 0, result.output
    assert [path.read_bytes() for path in files] == before

    train = load_preferences(trained.config.data).train
    share, own = read_manifest(run.share(0.25).stage("reward")), read_manifest(run.stage("reward"))
    assert (share.metrics["pairs"], own.metrics["pairs"]) == (len(train) // 4, len(train))
    assert share.metrics["steps"] == 6 and own.metrics["steps"] == 24, "three epochs of either, four pairs a step"
    assert share.parents == own.parents and share.digest != own.digest
    # All else is the same.
    parts = [dict(manifest.inputs) for manifest in (share, own)]
    data = [dict(part.pop("data")) for part in parts]
    assert parts[0] == parts[1]
    assert data[0].pop("preferences") != data[1].pop("preferences") and data[0] == data[1]
    folders = [run.share(0.25).stage("reward"), run.stage("reward")]
    scored = [read_scored(folder / "held_out.jsonl")[0] for folder in folders]
    assert [pair.row for pair in scored[0]] == [pair.row for pair in scored[1]] and len(scored[0]) > 4
    assert points_of(run) == [
        {"fraction": 0.25, "own": False, "reward": share.digest},
        {"fraction": 1.0, "own": True, "reward": own.digest},
    ]
    accuracy = share.metrics["held_out_accuracy"]
    for text in (
        f"0.25 {len(train) // 4} {accuracy['value']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]",
        f"1 {len(train)} {own.metrics['held_out_accuracy']['value']:.3f}",
        f"From {len(train) // 4} to {len(train)} training pairs the accuracy changes by",
    ):
        assert text in " ".join(result.stdout.split()), result.stdout
    assert "Would more pairs help?" in run.report.read_text()

    again = curve_command(trained.path, "--fractions", "0.25,1")
    assert again.exit_code == 0, again.output
    assert "reward: nothing to do; unchanged" in again.stdout and "reward: starting" not in again.stdout
    assert read_manifest(run.share(0.25).stage("reward")).digest == share.digest


def test_an_interrupted_share_goes_on_where_it_stopped(trained: LoadedConfig, tmp_path: Path) -> None:
    run = RunDirectory(trained.config.run_dir)
    command = [sys.executable, "-m", "flows.cli", "learning-curve", str(trained.path), "--fractions", "0.5"]
    command += ["reward.epochs=20"]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment(tmp_path))
    checkpoints = run.share(0.5).working("reward") / "checkpoints"
    try:
        wait_for(lambda: list(checkpoints.glob("0*")), "a checkpoint", 240, log.read_text)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 75, log.read_text()
    finally:
        process.kill()
    assert not run.share(0.5).stage("reward").exists()
    assert "The same command goes on" in log.read_text()
    done = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path), timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Resuming after step" in done.stdout
    manifest = read_manifest(run.share(0.5).stage("reward"))
    assert manifest.metrics["pairs"] == len(load_preferences(trained.config.data).train) // 2
    # The run's own reward model has other settings: it is no point of this curve, and neither is the quarter.
    assert [point["fraction"] for point in points_of(run)] == [0.5]


# -- what belongs together, with results that only look trained


@pytest.fixture
def light(tmp_path: Path) -> LoadedConfig:
    """A run with enough pairs whose SFT and reward model are finished as far as their manifests say."""
    path = light_config(tmp_path, data=_data(tmp_path))
    loaded = load_config(path)
    run = RunDirectory.open(loaded)
    publish("sft", loaded, run)
    finish_reward(loaded, run, 400)
    return loaded


def _data(folder: Path) -> dict[str, Any]:
    rows = [{"prompt": f"p{n}", "chosen": f"c{n}", "rejected": f"r{n}"} for n in range(40)]
    (folder / "many.jsonl").write_text(lines(rows))
    return {kind: {"sources": "many.jsonl" if kind == "preferences" else f"{kind}.jsonl"} for kind in DATA}


DATA = ("instructions", "preferences", "prompts")


def finish_reward(loaded: LoadedConfig, run: RunDirectory, count: int, seed: int = 0) -> None:
    publish("reward", loaded, run, metrics={"pairs": count}, files={"held_out.jsonl": lines(pairs(seed=seed))})


def finish_share(loaded: LoadedConfig, fraction: float, *overrides: str) -> RunDirectory:
    """Finish the reward stage of a share, beside the run's SFT where it needs that."""
    run = RunDirectory(loaded.config.run_dir)
    share = run.share(fraction)
    there = load_config(loaded.path, [*overrides, f"run_dir={share.root}", f"data.preferences.fraction={fraction}"])
    RunDirectory.open(there)
    if there.config.reward_needs_sft and not share.stage("sft").exists():
        shutil.copytree(run.stage("sft"), share.stage("sft"))
    finish_reward(there, share, round(400 * fraction))
    return share


def test_shares_that_are_current_stay_part_of_the_curve(light: LoadedConfig) -> None:
    for fraction in (0.25, 0.5):
        finish_share(light, fraction)
    run = RunDirectory(light.config.run_dir)
    result = curve_command(light.path, "--fractions", "0.5")
    assert result.exit_code == 0, result.output
    assert [point["fraction"] for point in points_of(run)] == [0.25, 0.5], "all pairs were not asked for, nor found"
    result = curve_command(light.path, "--fractions", "1,0.5")
    assert [(point["fraction"], point["own"]) for point in points_of(run)] == [(0.25, False), (0.5, False), (1.0, True)]
    assert "the run's own reward model" in result.stdout and "reward: starting" not in result.stdout
    curve = read_learning_curve(run, [])
    assert curve is not None and [point.pairs for point in curve.points] == [100, 200, 400]


def test_shares_of_other_settings_are_no_part_of_it(light: LoadedConfig) -> None:
    other = "reward.learning_rate=0.5"
    finish_share(light, 0.25)
    finish_share(light, 0.5, other)
    result = curve_command(light.path, other, "--fractions", "0.5")
    assert result.exit_code == 0, result.output
    run = RunDirectory(light.config.run_dir)
    assert [point["fraction"] for point in points_of(run)] == [0.5]
    assert "One point is no curve yet" in result.stdout


def test_shares_of_another_sft_are_no_part_of_it(light: LoadedConfig) -> None:
    for fraction in (0.25, 0.5):
        finish_share(light, fraction)
    run = RunDirectory(light.config.run_dir)
    shutil.rmtree(run.stage("sft"))
    publish("sft", light, run, files={"more.txt": "another one"})
    share = run.share(0.5)
    shutil.rmtree(share.stage("sft"))
    finish_share(light, 0.5)
    result = curve_command(light.path, "--fractions", "0.5")
    assert result.exit_code == 0, result.output
    assert [point["fraction"] for point in points_of(run)] == [0.5]


def test_without_sft_a_curve_is_made_where_there_is_no_run_yet(tmp_path: Path) -> None:
    """What was finished is found by the curve's own settings, on the command line too."""
    path = light_config(tmp_path, data=_data(tmp_path), reward=NO_SFT)
    loaded = load_config(path)
    finish_share(loaded, 0.5, "seed=3")
    result = curve_command(path, "seed=3", "run_dir=" + loaded.config.run_dir, "--fractions", "0.5")
    assert result.exit_code == 0, result.output
    run = RunDirectory(loaded.config.run_dir)
    assert [point["fraction"] for point in points_of(run)] == [0.5]
    assert "Would more pairs help?" in run.report.read_text()


def test_the_copy_of_sft_follows_the_run_s(light: LoadedConfig) -> None:
    """A share whose own SFT is another one gets the run's before its stage starts."""
    run = RunDirectory(light.config.run_dir)
    share = finish_share(light, 0.5)
    shutil.rmtree(run.stage("sft"))
    publish("sft", light, run, files={"more.txt": "another one"})
    # The stage itself fails: the base only looks like one.
    result = curve_command(light.path, "--fractions", "0.5")
    assert result.exit_code == 2 and "the reward stage failed" in result.stderr
    assert (share.stage("sft") / "more.txt").read_text() == "another one"
    assert read_manifest(share.stage("sft")).digest == read_manifest(run.stage("sft")).digest
    assert not list(share.root.glob(".sft-*"))


# -- what is refused, before anything is trained


@pytest.mark.parametrize("text", ["", "0", "1.5", "-0.1", "half", "0.5,,1", "nan", "0.5 1"])
def test_shares_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no share of the training pairs"):
        read_fractions(text)


def test_shares_are_read_in_any_order() -> None:
    assert read_fractions("1, 0.25,0.125,1.0,2.5e-1") == [0.125, 0.25, 1.0]


def test_faults_are_found_before_a_process_is_started(light: LoadedConfig, tmp_path: Path) -> None:
    run = RunDirectory(light.config.run_dir)
    for arguments, said in (
        (["--fractions", "0.5,2"], "--fractions: '2' is no share of the training pairs"),
        (["data.preferences.fraction=0.5"], "the config uses 0.5 of the pairs itself"),
        (["--fractions", "0.01,1"], "data.preferences.fraction: 0.01 of"),
        (["launch.machines=2", "launch.main_address=a"], "a learning curve is made on one machine"),
        (["data.preferences.sources=absent.jsonl"], "absent.jsonl"),
    ):
        result = curve_command(light.path, *arguments)
        assert result.exit_code == 2 and said in result.stderr, result.output
    (run.stage("sft") / "adapter.txt").write_text("flipped")
    result = curve_command(light.path)
    assert result.exit_code == 2 and "adapter.txt: the file is not the one" in result.stderr
    shutil.rmtree(run.stage("sft"))
    result = curve_command(light.path)
    assert result.exit_code == 2 and "there is no finished SFT" in result.stderr
    assert f"trivet sft {light.path}" in result.stderr
    assert not run.learning_curve.exists()


def test_a_share_that_somebody_works_on_is_left_alone(light: LoadedConfig) -> None:
    run = RunDirectory(light.config.run_dir)
    share = finish_share(light, 0.5)
    (share.stage("reward") / "adapter.txt").write_text("flipped")  # so that it would be made again
    with share.locked("reward", warn=print):
        result = curve_command(light.path, "--fractions", "0.5")
    assert result.exit_code == 2 and f"process {os.getpid()} has been at the reward stage" in result.stderr
    assert not (run.learning_curve / CURVE).exists()


# -- what is printed


def test_the_table_shows_every_share(light: LoadedConfig) -> None:
    finish_share(light, 0.5)
    curve_command(light.path, "--fractions", "0.5,1")
    curve = read_learning_curve(RunDirectory(light.config.run_dir), [])
    assert curve is not None
    console = Console(width=100, record=True)
    console.print(table_of(curve))
    said = [" ".join(line.split()) for line in console.export_text().splitlines()]
    one = curve.points[0]
    wanted = f"0.5 200 {one.accuracy.value:.3f} [{one.accuracy.low:.3f}, {one.accuracy.high:.3f}]"
    assert any(line.startswith(wanted) and line.endswith(f"{one.longer_wins.value:.3f} 60") for line in said)
    assert any(line.startswith("1 400 ") for line in said)
    Console(width=100).print(table_of(LearningCurve(())))
