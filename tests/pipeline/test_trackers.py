"""The figures in TensorBoard and other trackers are those of the metrics file, no step twice."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from finished_stages import light_config
from tiny_models import tiny_config
from typer.testing import CliRunner

from flows.cli import app
from pipeline.config_file import LoadedConfig, load_config
from pipeline.errors import ConfigError
from pipeline.metrics import read_metrics
from pipeline.run_directory import RunDirectory
from pipeline.trackers import TrackedMetrics, is_installed, require_trackers, trackers_of

pytest.importorskip("tensorboard", reason="TensorBoard is an extra")


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: the steps and values of each figure."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(folder)).Reload()
    return {tag: [(one.step, one.value) for one in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def opened(folder: Path, *overrides: str) -> tuple[LoadedConfig, RunDirectory]:
    loaded = load_config(light_config(folder), overrides)
    return loaded, RunDirectory.open(loaded)


def test_every_figure_of_the_file_is_in_the_events(tmp_path: Path) -> None:
    loaded, run = opened(tmp_path)
    with TrackedMetrics("ppo", loaded, run) as log:
        log.truncate_after(0)
        log.write(1, {"objective/score": 0.5, "kl/coefficient": 0.05})
        log.write(2, {"objective/score": math.nan, "kl/coefficient": 0.06})
        log.write(3, {"objective/score": 0.75, "kl/coefficient": 0.07})
    found = events(run.tensorboard / "ppo")
    assert found["objective/score"] == [(1, 0.5), (3, 0.75)], "a chart has a gap where there is no number"
    assert found["kl/coefficient"] == [(step, pytest.approx(0.04 + step / 100)) for step in (1, 2, 3)]
    assert [row["step"] for row in read_metrics(run.metrics("ppo"))] == [1, 2, 3]


def test_a_resumed_stage_shows_no_step_twice(tmp_path: Path) -> None:
    """Killed after step 5 with a checkpoint of step 3: what was written beyond it is made again, and replaced."""
    loaded, run = opened(tmp_path)
    interrupted = TrackedMetrics("sft", loaded, run)
    interrupted.truncate_after(0)
    for step in range(1, 6):
        interrupted.write(step, loss=float(step))
    time.sleep(1.1)  # TensorBoard orders a folder's files by the second they are of; a process takes longer to start
    with TrackedMetrics("sft", loaded, run) as log:
        log.truncate_after(3)
        for step in range(4, 8):
            log.write(step, loss=10.0 * step)
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0), (7, 70.0)]
    assert events(run.tensorboard / "sft")["loss"] == expected
    assert [(row["step"], row["loss"]) for row in read_metrics(run.metrics("sft"))] == expected


def test_a_stage_that_begins_anew_leaves_nothing_of_the_old_run(tmp_path: Path) -> None:
    loaded, run = opened(tmp_path)
    for value in (1.0, 2.0):
        with TrackedMetrics("sft", loaded, run) as log:
            log.truncate_after(0)
            log.write(1, loss=value)
    assert events(run.tensorboard / "sft") == {"loss": [(1, 2.0)]}
    assert len(list((run.tensorboard / "sft").iterdir())) == 1


def test_each_stage_has_a_folder_of_its_own(tmp_path: Path) -> None:
    loaded, run = opened(tmp_path)
    for stage in ("sft", "ppo"):
        with TrackedMetrics(stage, loaded, run) as log:  # type: ignore[arg-type]
            log.truncate_after(0)
            log.write(1, {f"{stage}/figure": 1.0})
    assert set(events(run.tensorboard / "sft")) == {"sft/figure"}
    assert set(events(run.tensorboard / "ppo")) == {"ppo/figure"}


def test_a_tracker_that_fails_loses_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded, run = opened(tmp_path)
    run.tensorboard.write_text("a file where the folder should be")
    with TrackedMetrics("sft", loaded, run) as log:
        log.truncate_after(0)
        log.write(1, loss=1.0)
        log.write(2, loss=2.0)
    assert [row["loss"] for row in read_metrics(run.metrics("sft"))] == [1.0, 2.0]
    said = capsys.readouterr().out
    assert said.count("warning: tensorboard failed while starting") == 1
    assert str(run.metrics("sft")) in said


def test_no_tracker_writes_no_events(tmp_path: Path) -> None:
    loaded, run = opened(tmp_path, "trackers=[]")
    with TrackedMetrics("sft", loaded, run) as log:
        log.truncate_after(0)
        log.write(1, loss=1.0)
    assert not run.tensorboard.exists() and len(read_metrics(run.metrics("sft"))) == 1


# -- what is installed


def missing(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if the packages were not there: an import of them fails."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def test_tensorboard_is_the_default_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(light_config(tmp_path)).config
    assert config.trackers == "auto" and trackers_of(config) == ("tensorboard",)
    missing(monkeypatch, "tensorboard")
    assert trackers_of(config) == ()
    require_trackers(config)  # nobody asked for it by name


def test_a_missing_package_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing(monkeypatch, "wandb", "mlflow")
    loaded, _ = opened(tmp_path, "trackers=[tensorboard, wandb, mlflow]")
    with pytest.raises(ConfigError, match="trackers: wandb and mlflow are not installed") as caught:
        require_trackers(loaded.config)
    assert "pip install 'trivet[wandb,mlflow]'" in str(caught.value)


def test_a_missing_package_stops_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `--dry-run`, and by a stage that is started by hand."""
    from stages import command, preflight, sft

    missing(monkeypatch, "trackio")
    loaded = tiny_config(tmp_path, "trackers=trackio")
    with pytest.raises(ConfigError, match="trackio is not installed"):
        preflight.check(loaded, ["sft"])
    monkeypatch.setattr(sft, "load_base", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as end:
        command.stage_main("sft", sft.run, [str(loaded.path), "trackers=trackio"])
    assert end.value.code == 2 and not (tmp_path / "run" / "sft").exists()


def test_a_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B leaves a folder `wandb` where it runs, which Python could take for an empty package."""
    if is_installed("wandb"):
        pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("wandb")


@pytest.mark.parametrize(
    ("given", "kept"), [("wandb", ("wandb",)), ("[mlflow, trackio]", ("mlflow", "trackio")), ("auto", "auto")]
)
def test_trackers_are_one_or_several(tmp_path: Path, given: str, kept: Any) -> None:
    assert load_config(light_config(tmp_path), [f"trackers={given}"]).config.trackers == kept


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["run", str(light_config(tmp_path)), "trackers=[tensorbord]"])
    assert result.exit_code == 2 and "tensorboard" in result.stderr and "trackers" in result.stderr


# -- in the stages


def test_stages_show_what_they_write(tmp_path: Path) -> None:
    from stages import ppo, reward, sft

    loaded = tiny_config(tmp_path)
    run = RunDirectory.open(loaded)
    for name, stage in (("sft", sft), ("reward", reward), ("ppo", ppo)):
        stage.run(loaded, run)
        rows = read_metrics(run.metrics(name))  # type: ignore[arg-type]
        written = [
            (figure, row["step"], value)
            for row in rows
            for figure, value in row.items()
            if figure != "step" and value is not None
        ]
        shown = events(run.tensorboard / name)
        assert sum(map(len, shown.values())) == len(written) > 3
        for figure, step, value in written:  # TensorBoard keeps float32
            assert (step, pytest.approx(value, rel=1e-6)) in shown[figure]


# -- the others, where they are installed


def read_mlflow(run_id: str) -> list[tuple[int, float]]:
    import mlflow

    return [(one.step, one.value) for one in mlflow.MlflowClient().get_metric_history(run_id, "loss")]


def test_mlflow_gets_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="MLflow is an extra")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    loaded, run = opened(tmp_path, "trackers=mlflow")
    resumed_twice(loaded, run)
    known = json.loads((run.root / "trackers" / "sft.json").read_text())
    assert sorted(read_mlflow(known["mlflow"]["run_id"])) == [(step, float(step)) for step in range(1, 7)]


def test_wandb_gets_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="Weights & Biases is an extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    loaded, run = opened(tmp_path, "trackers=wandb")
    resumed_twice(loaded, run)
    assert len(list((run.root / "trackers" / "wandb").glob("offline-run-*"))) == 2


def test_trackio_gets_each_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "trackio" not in sys.modules:  # it reads this when it is imported
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="Trackio is an extra")
    loaded, run = opened(tmp_path, "trackers=trackio")
    resumed_twice(loaded, run)
    assert "Resumed existing run" in capsys.readouterr().out


def resumed_twice(loaded: LoadedConfig, run: RunDirectory) -> None:
    """A stage that is cut off after step 4 and goes on from step 2."""
    for first, last in ((0, 4), (2, 6)):
        with TrackedMetrics("sft", loaded, run) as log:
            log.truncate_after(first)
            for step in range(first + 1, last + 1):
                log.write(step, loss=float(step))
            assert set(log._trackers) == {*trackers_of(loaded.config)}, "it did not fail"
