"""What a run's folder says of the run, finished or not. It reads whatever is there, and names what cannot be read.

Nothing is changed, nothing is waited for, and no file that is damaged keeps the others from being shown.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from pipeline.artifacts import Manifest, read_manifest, read_unverified
from pipeline.config import PipelineConfig
from pipeline.config_file import flatten
from pipeline.errors import ArtifactError, RunDirectoryError
from pipeline.learning_curve import CURVE, CurvePoint, LearningCurve, Share
from pipeline.metrics import MetricsRow
from pipeline.run_directory import MANIFEST, STAGES, STARTING, RunDirectory, StageName, read_json
from pipeline.run_lock import holder
from pipeline.scored_pairs import HELD_OUT, SCORED, ScoredPair, read_scored
from pipeline.task_scores import SpeakerScores, parse_scores

Status = Literal["finished", "outdated", "going", "starting", "interrupted", "failed", "damaged", "waiting"]
"""`outdated`: finished, but from results that have been replaced since. `waiting`: not begun."""

SAMPLES, ANSWERS = "samples.json", "answers.jsonl"
"""The evaluation's answers side by side, in its folder: a few with one judge's opinion, and all of them."""

_SECONDS_TO_START = 180.0
"""Between a stage's start and its first word lie imports."""
_LOG_HEADER = re.compile(r"^--- (\S+) (\w+) ")
_LONGEST_LOG = 200_000
_MOST_ANSWERS = 2000


@dataclass(frozen=True)
class StageState:
    """How far a stage has come.

    `reason` is why it is not finished, or what is wrong; `done` the share of its steps, None where that is not known.
    `manifest` is that of the last finished result, also while the stage runs again.
    """

    name: StageName
    status: Status
    reason: str = ""
    manifest: Manifest | None = None
    metrics: Sequence[MetricsRow] = ()
    done: float | None = None

    @property
    def has_result(self) -> bool:
        """Whether there are figures to show."""
        return self.manifest is not None

    @property
    def figures(self) -> Mapping[str, Any]:
        """The final figures; empty where there are none."""
        return self.manifest.metrics if self.manifest is not None else {}


@dataclass(frozen=True)
class JudgedPairs:
    """A further file of pairs, as the reward model scored it. `dropped` counts rows that were not, by reason."""

    name: str
    pairs: Sequence[ScoredPair]
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunState:
    """All that is known of a run. `faults` are the files that could not be read, in words."""

    root: Path
    owner: Mapping[str, Any]
    config: Mapping[str, Any]
    settings: Sequence[tuple[str, Any, str | None]]
    config_path: str | None
    overrides: Sequence[str]
    summary: Mapping[str, Any]
    stages: Mapping[StageName, StageState]
    answers: Sequence[Mapping[str, Any]] = ()
    rounds: Sequence[Mapping[str, Any]] = ()
    held_out: Sequence[ScoredPair] = ()
    judged: Sequence[JudgedPairs] = ()
    curve: LearningCurve | None = None
    tasks: Sequence[SpeakerScores] = ()
    faults: Sequence[str] = ()
    changed: float = 0.0

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.root.resolve().name

    @property
    def checked_config(self) -> PipelineConfig | None:
        """The config as today's trivet understands it; None where it does not, as with another version's."""
        try:
            return PipelineConfig.model_validate(self.config)
        except (ValidationError, TypeError):
            return None

    @property
    def is_going(self) -> bool:
        """Whether a process works on it."""
        return any(stage.status in ("going", "starting") for stage in self.stages.values())

    @property
    def status(self) -> str:
        """The run in one word."""
        found = [stage.status for stage in self.stages.values()]
        for status in ("going", "starting", "failed", "damaged", "interrupted"):
            if status in found:
                return status
        if all(status == "finished" for status in found):
            return "finished"
        return "outdated" if "outdated" in found else "waiting" if set(found) == {"waiting"} else "unfinished"


def read_run(folder: str | Path, *, with_files: bool = True) -> RunState:
    """Read a run.

    Args:
        folder: the run's.
        with_files: verify every file of the finished stages, and read samples and scores too. Without, what a list
            of runs shows.

    Raises:
        RunDirectoryError: there is no run.
    """
    run = RunDirectory(folder)
    if not is_run(run.root):
        raise RunDirectoryError(_nothing_here(run.root), where=str(folder), remedy=_runs_nearby(run.root))
    faults: list[str] = []
    config = _object(run.root / "config.json", faults)
    origins = _object(run.root / "origins.json", faults)
    summary = _object(run.summary, faults)
    stages = _stages(run, config, faults, with_files=with_files)
    held_out: list[ScoredPair] = []
    judged: list[JudgedPairs] = []
    curve = None
    if with_files:
        held_out, found = read_scored(run.stage("reward") / HELD_OUT)
        faults += found
        judged = list(_judged(run, faults))
        curve = read_learning_curve(run, faults)
    return RunState(
        root=run.root,
        owner=_object(run.root / "run.json", faults),
        config=config,
        settings=_settings(config, origins),
        config_path=origins.get("config") or summary.get("config"),
        overrides=[str(one) for one in origins.get("overrides") or summary.get("overrides") or ()],
        summary=summary,
        stages=stages,
        answers=_answers(run, faults) if with_files else (),
        rounds=_lines(run.metrics("ppo").with_name("ppo_samples.jsonl"), faults, torn=True),
        held_out=held_out,
        judged=judged,
        curve=curve,
        tasks=list(_task_scores(run, faults)) if with_files else (),
        faults=faults,
        changed=_changed(run.root),
    )


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, however little of it there is."""
    return (folder / "run.json").is_file() or any((folder / stage / MANIFEST).is_file() for stage in STAGES)


def find_runs(folder: str | Path) -> list[Path]:
    """The runs in a folder and in the folders in it, the newest first; the folder itself if it is one.

    Raises:
        RunDirectoryError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunDirectoryError(
            "there is no such folder", where=str(folder), remedy="Name the folder that runs lie in."
        )
    if is_run(folder):
        return [folder]
    near = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    deeper = [inside for path in near if not is_run(path) for inside in sorted(path.iterdir()) if inside.is_dir()]
    return sorted((path for path in [*near, *deeper] if is_run(path)), key=_changed, reverse=True)


def _nothing_here(root: Path) -> str:
    if not root.exists():
        return "there is no such folder"
    return "there is no run here" if root.is_dir() else "this is a file, not a run's folder"


def _runs_nearby(root: Path) -> str:
    parent = root.parent
    near = [str(path) for path in (find_runs(parent) if parent.is_dir() and not is_run(parent) else [])][:5]
    return f"Runs there: {', '.join(near)}." if near else "Name a run's folder; trivet runs FOLDER lists them."


# ---- stages


def _stages(
    run: RunDirectory, config: Mapping[str, Any], faults: list[str], *, with_files: bool
) -> dict[StageName, StageState]:
    names = [name for name in STAGES if name != "reward" or _has_reward_stage(run, config)]
    found = {name: _stage(name, run, config, _at_work(run, name), faults, with_files=with_files) for name in names}
    return {name: _as_of_its_parents(stage, found) for name, stage in found.items()}


def _at_work(run: RunDirectory, name: StageName) -> str | None:
    """Since when a process is at the stage. None: nobody is, or only to look whether it may start."""
    found = holder(run.lock(name))
    return None if found is None or found.get("work") == STARTING else f"since {found.get('since', 'a while')}"


def _has_reward_stage(run: RunDirectory, config: Mapping[str, Any]) -> bool:
    if run.stage("reward").exists() or not config:
        return True
    rewards = _inside(config, "ppo", "rewards") or [{}]
    functions = [entry.get("function") for entry in rewards if isinstance(entry, Mapping)]
    return not all(functions) or bool(_inside(config, "data", "preferences", "sources"))


def _stage(
    name: StageName,
    run: RunDirectory,
    config: Mapping[str, Any],
    at_work_since: str | None,
    faults: list[str],
    *,
    with_files: bool,
) -> StageState:
    metrics = read_rows(run.metrics(name), faults)
    manifest, damage = None, ""
    if run.stage(name).exists():
        try:
            manifest = _manifest(run.stage(name), with_files=with_files)
        except ArtifactError as error:
            damage = str(error).splitlines()[0]
            faults.append(damage)
            manifest = read_unverified(run.stage(name))

    def state(status: Status, reason: str = "") -> StageState:
        unfinished = status not in ("finished", "damaged")
        return StageState(name, status, reason, manifest, metrics, _share_done(name, metrics, config, unfinished))

    log = _log_of_last_start(run.log(name))
    if at_work_since is not None:
        return state("going", at_work_since)
    if damage:
        return state("damaged", damage)
    newer = log is not None and (manifest is None or log.changed > _mtime(run.stage(name) / MANIFEST) + 1.0)
    if log is not None and newer:
        if log.failure:
            stopped = "stopped as asked" in log.failure
            return state("interrupted" if stopped else "failed", log.failure)
        if not log.has_begun and time.time() - log.changed < _SECONDS_TO_START:
            return state("starting", "its processes are starting")
        if not log.is_over:
            return state("interrupted", "its process is gone; the same command goes on from there")
    if manifest is not None:
        return state("finished")
    if metrics or run.working(name).exists():
        return state("interrupted", "it was begun and is not finished; the same command goes on from there")
    return state("waiting")


def _as_of_its_parents(stage: StageState, stages: Mapping[StageName, StageState]) -> StageState:
    """The stage, outdated if one that it was made from has another result by now."""
    if stage.status != "finished" or stage.manifest is None:
        return stage
    for parent, wanted in stage.manifest.parents.items():
        now = next((other.manifest for other in stages.values() if other.name == parent), None)
        if now is not None and now.digest != wanted:
            reason = f"made from another {parent} result ({wanted[:12]}) than the one that lies there now"
            return StageState(stage.name, "outdated", reason, stage.manifest, stage.metrics, stage.done)
    return stage


def _manifest(folder: Path, *, with_files: bool) -> Manifest:
    if not with_files:
        return read_manifest(folder, with_files=False)
    return _verified(folder, tuple(sorted((str(path), *_stamp(path)) for path in folder.rglob("*"))))


@functools.lru_cache(maxsize=64)
def _verified(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> Manifest:
    """The manifest with all files verified: once, as long as no file changes its size or time."""
    return read_manifest(folder)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.lstat()
    except OSError:
        return (0, 0)
    return status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class _Log:
    """What a stage printed since it was last started."""

    changed: float
    has_begun: bool
    is_over: bool
    failure: str


def _log_of_last_start(path: Path) -> _Log | None:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LONGEST_LOG))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    headers = [number for number, line in enumerate(lines) if _LOG_HEADER.match(line)]
    said = lines[headers[-1] + 1 :] if headers else lines
    stage = path.stem
    failure = [number for number, line in enumerate(said) if _is_failure(line, stage)]
    is_over = any(line.startswith((f"{stage}: finished in", f"{stage}: nothing to do")) for line in said)
    return _Log(
        changed=_mtime(path),
        has_begun=any(line.startswith(f"{stage}: ") for line in said) or bool(failure),
        is_over=is_over or bool(failure),
        failure="\n".join(said[failure[-1] :][:6]) if failure and not is_over else "",
    )


def _is_failure(line: str, stage: str) -> bool:
    return (
        f"the {stage} stage failed" in line
        or f"the {stage} stage ended with" in line
        or line.startswith(f"a process of the {stage} stage ")
        or line.startswith(f"{stage}: stopped as asked")
    )


def _share_done(
    name: StageName, metrics: Sequence[MetricsRow], config: Mapping[str, Any], unfinished: bool
) -> float | None:
    if not unfinished:
        return 1.0
    if not metrics:
        return None
    step, limit = metrics[-1]["step"] or 0, _inside(config, name, "max_steps")
    if name == "ppo":
        limit = limit or _inside(config, "ppo", "iterations")
    if isinstance(limit, int) and limit > 0:
        return min(1.0, step / limit)
    epochs = _inside(config, name, "epochs")
    epoch = next((row["epoch"] for row in reversed(metrics) if row.get("epoch") is not None), None)
    return min(1.0, epoch / epochs) if isinstance(epochs, (int, float)) and epochs > 0 and epoch is not None else None


# ---- files


def read_rows(path: Path, faults: list[str]) -> list[MetricsRow]:
    """The lines of a metrics file, without those that are none; NaN is null, as a gap."""
    rows: list[MetricsRow] = []
    for row in _lines(path, faults, torn=True):
        step = row.get("step")
        if isinstance(step, bool) or not isinstance(step, int):
            faults.append(f"{path}: a line without a step is left out")
            continue
        rows.append({name: _number(value) for name, value in row.items()})
    return rows


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if value == value and abs(value) != float("inf") else None


def _object(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or ("not JSON" if isinstance(error, ValueError) else str(error))
        faults.append(f"{path}: cannot be read: {reason}")
        return {}


def _lines(path: Path, faults: list[str], *, torn: bool = False, most: int | None = None) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines. A torn last line of a file that is being written is no fault."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        faults.append(f"{path}: cannot be read: {error.strerror}")
        return []
    if torn or not lines[-1]:
        lines.pop()
    found = []
    for number, line in enumerate(lines if most is None else lines[:most], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            found.append(row)
        else:
            faults.append(f"{path}, line {number}: not a JSON object; it is left out")
    return found


def _answers(run: RunDirectory, faults: list[str]) -> list[dict[str, Any]]:
    """All answers side by side, or the few samples where an older trivet kept no others."""
    answers = _lines(run.stage("evaluate") / ANSWERS, faults, most=_MOST_ANSWERS)
    path = run.stage("evaluate") / SAMPLES
    if answers or not path.exists():
        return answers
    try:
        samples = json.loads(path.read_text(encoding="utf-8"))
        return [
            {**entry, "scores": {str(entry["judge"]): dict(entry["scores"])}} for entry in samples if "prompt" in entry
        ]
    except (OSError, ValueError, TypeError, KeyError):
        faults.append(f"{path}: cannot be read: not a list of samples")
        return []


def _judged(run: RunDirectory, faults: list[str]) -> Iterator[JudgedPairs]:
    for folder in sorted(run.judged_pairs("any").parent.glob("*")):
        pairs, found = read_scored(folder / SCORED)
        faults += found
        if pairs:
            yield JudgedPairs(folder.name, pairs, _object(folder / "about.json", faults))


def _task_scores(run: RunDirectory, faults: list[str]) -> Iterator[SpeakerScores]:
    for path in sorted(run.task_scores.glob("*.json")):
        if content := _object(path, faults):
            try:
                yield parse_scores(content)
            except ValueError as error:
                faults.append(f"{path}: cannot be read: {error}")


def read_learning_curve(run: RunDirectory, faults: list[str]) -> LearningCurve | None:
    """The reward models on shares of the pairs that belong together; None where there are none.

    Args:
        faults: gets what cannot be read, in words.
    """
    path = run.learning_curve / CURVE
    entries = _object(path, faults).get("points", [])
    points: list[CurvePoint] = []
    left_out: list[str] = []
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries], 1):
        try:
            share = Share.parse(entry)
        except ValueError as error:
            faults.append(f"{path}, point {number}: {error}; it is left out")
            continue
        folder = (run if share.own else run.share(share.fraction)).stage("reward")
        try:
            manifest = _manifest(folder, with_files=True)
        except ArtifactError as error:
            faults.append(str(error).splitlines()[0])
            continue
        pairs = manifest.metrics.get("pairs")
        held_out, found = read_scored(folder / HELD_OUT)
        faults += found
        if manifest.digest != share.reward:
            left_out.append(f"{share.fraction:g}: another reward model lies there by now")
        elif not held_out or isinstance(pairs, bool) or not isinstance(pairs, int) or pairs < 1:
            left_out.append(f"{share.fraction:g}: its result does not tell how it does on which pairs")
        else:
            points.append(CurvePoint(share.fraction, pairs, held_out))
    points.sort(key=lambda point: (point.pairs, point.fraction))
    return LearningCurve(points, left_out) if points or left_out else None


def _settings(config: Mapping[str, Any], origins: Mapping[str, Any]) -> list[tuple[str, Any, str | None]]:
    """Every setting with its origin, or None for the origin where an older trivet did not keep it."""
    try:
        return [(str(key), value, str(origin)) for key, value, origin in origins["settings"]]
    except (KeyError, TypeError, ValueError):
        return [(key, value, None) for key, value in flatten(config)]


def _inside(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _changed(root: Path) -> float:
    """When something of the run last changed, as far as its folders tell."""
    paths = [root / "run.json", root / "config.json", root / "summary.json"]
    paths += [path for folder in ("metrics", "logs") for path in (root / folder).glob("*")]
    paths += [root / stage / MANIFEST for stage in STAGES]
    return max(map(_mtime, paths), default=0.0)


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def started_at(state: RunState) -> datetime | None:
    """When the run began, as far as its summary tells."""
    try:
        return datetime.fromisoformat(str(state.summary["started"]))
    except (KeyError, ValueError):
        return None
