"""The figures of a stage in TensorBoard, Weights & Biases, MLflow or Trackio, besides `metrics/STAGE.jsonl`.

The trackers are Accelerate's. Every line of metrics goes to all of them under the same names. A stage that resumes goes
on in the same run of each tracker, without a step twice: TensorBoard drops what an interrupted run wrote beyond the
checkpoint, as the metrics file does; the others cannot take a step back, and get only steps that they have not seen.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat

from pipeline.config import PipelineConfig, TrackerName
from pipeline.config_file import LoadedConfig
from pipeline.errors import ConfigError
from pipeline.metrics import MetricsWriter
from pipeline.progress import say
from pipeline.run_directory import RunDirectory, StageName, read_json, write_json

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "trivet"
"""What trackers that sort runs by project call ours."""


def is_installed(name: TrackerName) -> bool:
    """Whether the tracker's package is there. A folder of that name, as W&B leaves one, is none."""
    found = importlib.util.find_spec(name)
    return found is not None and found.origin is not None


def require_trackers(config: PipelineConfig) -> None:
    """Refuse trackers whose package is missing, before anything expensive starts.

    Raises:
        ConfigError: naming the packages and how to install them.
    """
    missing = [name for name in trackers_of(config) if not is_installed(name)]
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            where="trackers",
            remedy=f"Run pip install 'trivet[{','.join(missing)}]', or do without: RUN/metrics is written anyway.",
        )


def trackers_of(config: PipelineConfig) -> tuple[TrackerName, ...]:
    """The trackers that a run uses; `auto` is TensorBoard where it is installed."""
    if config.trackers != "auto":
        return config.trackers
    return ("tensorboard",) if is_installed("tensorboard") else ()


class TrackedMetrics(MetricsWriter):
    """A stage's metrics file, whose lines go to the run's trackers as well.

    A tracker that fails is left out from then on, with a warning: no training is lost to one.

    Args:
        stage: whose figures they are.
        loaded: the run's config.
        run: where the file lies, and TensorBoard's events.

    Raises:
        RunDirectoryError: the disk does not take the file.
    """

    def __init__(self, stage: StageName, loaded: LoadedConfig, run: RunDirectory) -> None:
        super().__init__(run.metrics(stage))
        self._stage, self._loaded, self._run = stage, loaded, run
        self._trackers: dict[TrackerName, GeneralTracker] = {}
        self._known: dict[str, Any] = {}

    def truncate_after(self, step: int) -> None:
        """Go on after this step, in the file and in the trackers; 0 begins anew in both."""
        super().truncate_after(step)
        self._known = self._remembered() if step > 0 else {}
        for name in trackers_of(self._loaded.config):
            with self._forgiving(name, "starting"):
                self._trackers[name] = self._start(name, step)

    def write(self, step: int, values: Mapping[str, SupportsFloat] | None = None, /, **named: SupportsFloat) -> None:
        """Append one line, and pass on what of it is finite."""
        super().write(step, values, **named)
        figures = dict(finite_figures({**(values or {}), **named}))
        for name, tracker in list(self._trackers.items()):
            about = self._known.get(name, {})
            if step > about.get("sent", -1):
                with self._forgiving(name, "writing"):
                    tracker.log(figures, step=step)
                    if name != "tensorboard":
                        self._remember(name, about | {"sent": step})

    def close(self) -> None:
        """Bring what was written to the disk, and end the trackers' runs."""
        for name in list(self._trackers):
            with self._forgiving(name, "closing"):
                self._trackers.pop(name).finish()
        super().close()

    def _start(self, name: TrackerName, step: int) -> GeneralTracker:
        from accelerate import tracking

        folder, label = self._run.root, f"{self._run.root.name}-{self._stage}"
        tracker: GeneralTracker
        if name == "tensorboard":
            if step == 0:
                shutil.rmtree(self._run.tensorboard / self._stage, ignore_errors=True)
            # Steps from `purge_step` on that an interrupted run has written are hidden.
            tracker = tracking.TensorBoardTracker(self._stage, str(self._run.tensorboard), purge_step=step + 1)
            tracker.start()
            return tracker
        about = self._known.get(name) or {"id": uuid.uuid4().hex[:12]}
        if name == "wandb":
            scratch = folder / "trackers"
            scratch.mkdir(parents=True, exist_ok=True)
            options = {"name": label, "group": folder.name, "job_type": self._stage, "dir": str(scratch)}
            tracker = tracking.WandBTracker(PROJECT, id=about["id"], resume="allow", **options)
        elif name == "trackio":
            tracker = tracking.TrackioTracker(PROJECT, name=f"{label}-{about['id']}", resume="allow")
        else:
            tracker = tracking.MLflowTracker(PROJECT, run_id=about.get("run_id"), run_name=label)
        tracker.start()
        if "sent" not in about:
            tracker.store_init_configuration({key: str(value) for key, value, _ in self._loaded.settings()})
        if name == "mlflow":
            about = about | {"run_id": tracker.tracker.info.run_id}
        self._remember(name, about)
        return tracker

    def _forgiving(self, name: TrackerName, doing: str) -> _Forgiving:
        def leave_out(error: Exception) -> None:
            self._trackers.pop(name, None)
            say(
                f"warning: {name} failed while {doing} ({type(error).__name__}: {error}); going on without it."
                f" All figures are in {self.path}."
            )

        return _Forgiving(leave_out)

    def _remembered(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            return read_json(self._memory)
        return {}

    def _remember(self, name: TrackerName, about: Mapping[str, Any]) -> None:
        self._known[name] = dict(about)
        write_json(self._memory, self._known)

    @property
    def _memory(self) -> Path:
        return self._run.root / "trackers" / f"{self._stage}.json"


class _Forgiving:
    """Passes an error on to be told, and lets the block's work be lost."""

    def __init__(self, tell: Callable[[Exception], None]) -> None:
        self._tell = tell

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        self._tell(error)
        return True


def finite_figures(values: Mapping[str, SupportsFloat]) -> Iterator[tuple[str, float]]:
    """The figures that a chart can show."""
    for name, value in values.items():
        if math.isfinite(number := float(value)):
            yield name, number
