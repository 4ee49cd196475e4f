"""Every path of a run, named once. A finished stage appears by one atomic rename: whole or absent.

RUN/
  run.json            what the run belongs to: its config's name and its base
  config.json         the resolved config of the last start
  origins.json        the same setting by setting, with where each came from
  sft/ reward/ ppo/ evaluate/      finished stages, each with its manifest trivet.json
  learning_curve/F/   a run of its own: the reward stage on the share F of the pairs
  lm_eval/WHO.json    scores of base, sft or policy on tasks of lm-evaluation-harness
  pairs/NAME/         a reward model's scores of a further file of pairs
  summary.json        the figures of all stages
  report.html         all of this for people
  logs/STAGE.log      what the stage printed, on another machine than the first in STAGE.machineN.log
  metrics/STAGE.jsonl a line of metrics a step
  working/STAGE/      what an unfinished stage keeps: checkpoints, samples
  locks/STAGE         held by the process that works on the stage, and shared by those that read its result
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from pipeline.config_file import LoadedConfig
from pipeline.disk import writing
from pipeline.errors import RunDirectoryError
from pipeline.run_lock import LOCKS, hold, holder, unless_held

StageName = Literal["sft", "reward", "ppo", "evaluate"]
STAGES: tuple[StageName, ...] = get_args(StageName)

MANIFEST = "trivet.json"
"""In the folder of every finished stage: all that is known of it."""

STARTING = "its start"
"""What a process is at that only looks whether it may begin, and makes the run ready."""

LAYOUT_VERSION = 1
"""Raised when a newer trivet lays out a run in a way that this one would misread."""

_RETIRED = "-replaced"
_SECONDS_OF_A_START = 20.0
"""Starts wait for each other: none takes longer, on however slow a disk."""
_SECONDS_OF_A_FILE = 60.0
"""No file takes longer to write; a draft that is older was left behind."""


class RunDirectory:
    """The folder of one run.

    Args:
        root: the folder; it need not exist yet.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    @classmethod
    def find(cls, loaded: LoadedConfig) -> RunDirectory:
        """The config's run, which need not have begun. Writes nothing.

        Raises:
            RunDirectoryError: the folder belongs to another config or base, or was written by a newer version.
        """
        run = cls(loaded.config.run_dir)
        run._check_owner(_owner(loaded))
        return run

    @classmethod
    def open(
        cls, loaded: LoadedConfig, stages: Sequence[StageName] = STAGES, reads: Sequence[StageName] = ()
    ) -> RunDirectory:
        """Make the run ready for work: create its folder, and put right what killed processes left there.

        Args:
            stages: those that are to be worked on.
            reads: those whose results are to be read.

        Raises:
            RunDirectoryError: it belongs to another config or base, was written by a newer version, one of these
                stages is in use by another process, or it cannot be written.
        """
        run = cls.find(loaded)
        with writing(run.root):
            run.lock("start").parent.mkdir(parents=True, exist_ok=True)
            with ExitStack() as held:
                held.enter_context(hold(run.lock("start"), STARTING, _ignore, seconds=_SECONDS_OF_A_START))
                run._tidy()
                for stage in stages:
                    held.enter_context(run.locked(stage, STARTING, reads=set(reads).difference(stages), warn=_ignore))
                write_json(run.root / "run.json", _owner(loaded))
                write_json(run.root / "config.json", loaded.config.model_dump(mode="json"))
                write_json(run.root / "origins.json", _origins(loaded))
        return run

    @contextmanager
    def locked(
        self,
        stage: StageName,
        work: str | None = None,
        *,
        warn: Callable[[str], None],
        reads: Collection[StageName] = (),
    ) -> Iterator[None]:
        """Keep all other processes from working on a stage during the block, and from changing what it reads.

        Args:
            stage: which one.
            work: what this process does, in words that others are told. None: the stage.
            warn: told where the file system knows no locks.
            reads: the stages whose results it reads; others may read them too.

        Raises:
            RunDirectoryError: another process is in the way; says which one.
        """
        with writing(self.root):
            self.lock(stage).parent.mkdir(parents=True, exist_ok=True)
        parents = [self.lock(parent) for parent in sorted(reads)]
        with hold(self.lock(stage), work or f"the {stage} stage", warn, reads=parents):
            yield

    def _check_owner(self, owner: dict[str, Any]) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise RunDirectoryError(
                "a file lies where the run's folder should be",
                where=str(self.root),
                remedy="Choose another folder with run_dir=....",
            )
        path = self.root / "run.json"
        try:
            found = read_json(path)
            version = int(found["layout_version"])
        except (FileNotFoundError, NotADirectoryError):
            return
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            raise RunDirectoryError(
                "run.json is not readable", where=str(path), remedy="Remove that file if the folder is this run's."
            ) from None
        if version > LAYOUT_VERSION:
            raise RunDirectoryError(
                f"the run was written by a newer trivet: layout {version}, known: {LAYOUT_VERSION}",
                where=str(self.root),
                remedy="Upgrade trivet, or choose another folder with run_dir=....",
            )
        if not self._holds_work():
            return  # a start that went no further leaves the folder free
        for key in ("config_name", "base_model", "base_revision", "base_quantization"):
            if not _same(found.get(key), owner[key]):
                raise RunDirectoryError(
                    f"the run directory belongs to another config: its {key} is {found.get(key)!r},"
                    f" this config's is {owner[key]!r}",
                    where=str(self.root),
                    remedy="Choose another folder with run_dir=..., or move the old one away.",
                )

    def _holds_work(self) -> bool:
        """Whether a stage is at work or has left anything that another config could damage or mistake for its own."""
        working = (path for name in STAGES for path in self.working(name).rglob("*"))
        if any(self.stage(name).exists() for name in STAGES) or any(path.is_file() for path in working):
            return True
        return any(holder(self.lock(name)) is not None for name in STAGES)

    def _tidy(self) -> None:
        """Put right what killed processes left: half-made results go, and one that was being replaced comes back.

        A stage that somebody is at, or reads, is left alone.
        """
        for name in STAGES:
            with unless_held(self.lock(name)) as free:
                if free:
                    self._tidy_stage(name)
        for written in ("run.json", "config.json", "origins.json"):  # by starts alone, one at a time
            for draft in self.root.glob(f".{written}-*"):
                draft.unlink(missing_ok=True)
        # Processes without the lock, such as a flow that writes its summary, may have files in the making.
        for draft in [*self.root.glob(".*.json-*"), *self.root.glob(".*.html-*")]:
            if time.time() - draft.stat().st_mtime > _SECONDS_OF_A_FILE:
                draft.unlink(missing_ok=True)

    def _tidy_stage(self, name: StageName) -> None:
        for left in sorted(self.root.glob(f".{name}-*")):
            if left.name.endswith(_RETIRED) and not self.stage(name).exists():
                os.rename(left, self.stage(name))
            else:
                shutil.rmtree(left, ignore_errors=True)
        self._drop_work_of_the_finished(name)
        for draft in self.working(name).glob("**/.draft-*"):
            shutil.rmtree(draft, ignore_errors=True)
        for draft in self.metrics(name).parent.glob(f".{name}*.jsonl-*"):
            draft.unlink(missing_ok=True)

    def _drop_work_of_the_finished(self, name: StageName) -> None:
        """Drop what is older than the finished stage. Newer work is that of a stage that runs again."""
        finished = self.stage(name) / MANIFEST
        files = [path for path in self.working(name).rglob("*") if path.is_file()]
        if finished.exists() and all(path.stat().st_mtime < finished.stat().st_mtime for path in files):
            shutil.rmtree(self.working(name), ignore_errors=True)

    def stage(self, name: StageName) -> Path:
        """Folder of the finished stage; it exists only when the stage is whole."""
        return self.root / name

    def working(self, name: StageName) -> Path:
        """Folder of what an unfinished stage keeps, such as checkpoints."""
        return self.root / "working" / name

    def log(self, name: StageName, machine: int = 0) -> Path:
        """What the stage printed on a machine; lines that several append over a network would mix."""
        return self.root / "logs" / (f"{name}.machine{machine}.log" if machine else f"{name}.log")

    def metrics(self, name: StageName) -> Path:
        """A JSON line a step."""
        return self.root / "metrics" / f"{name}.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's events, a folder a stage."""
        return self.root / "tensorboard"

    def judged_pairs(self, name: str) -> Path:
        """Folder of the reward model's scores of a further file of pairs."""
        return self.root / "pairs" / name

    @property
    def learning_curve(self) -> Path:
        """Folder of the reward models that learnt from shares of the pairs, and of what the curve is made of."""
        return self.root / "learning_curve"

    @property
    def task_scores(self) -> Path:
        """Folder of the speakers' scores on tasks of lm-evaluation-harness."""
        return self.root / "lm_eval"

    def share(self, fraction: float) -> RunDirectory:
        """The run of such a reward model."""
        return RunDirectory(self.learning_curve / f"{fraction:.12g}")

    def lock(self, name: StageName | Literal["start"]) -> Path:
        """Held by the process that works on the stage, or that makes the run ready for work."""
        return self.root / LOCKS / name

    @property
    def summary(self) -> Path:
        """The figures of all stages."""
        return self.root / "summary.json"

    @property
    def report(self) -> Path:
        """The page for people."""
        return self.root / "report.html"

    @contextmanager
    def publish(self, name: StageName) -> Iterator[Path]:
        """A temporary folder that becomes the finished stage when the block ends without an error.

        An earlier result stays until the new one is complete, and is then replaced.
        """
        with writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=self.root))
            try:
                yield draft
                sync_tree(draft)
                draft.chmod(0o755)
                replace_folder(self.stage(name), draft, draft.with_name(draft.name + _RETIRED))
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(self.working(name), ignore_errors=True)


def _same(found: Any, own: Any) -> bool:
    """Whether two owners' values agree. A folder may have moved, or lie elsewhere on another machine that shares the
    run: its weights, whose digest stands in every manifest, tell whether it is the same."""
    if isinstance(found, str) and isinstance(own, str) and os.path.isabs(found) and os.path.isabs(own):
        return Path(found).name == Path(own).name
    return bool(found == own)


def _ignore(_: str) -> None:
    """The stage itself will warn."""


def _owner(loaded: LoadedConfig) -> dict[str, Any]:
    """What a run belongs to."""
    return {
        "layout_version": LAYOUT_VERSION,
        "config_name": loaded.path.name,
        "base_model": loaded.config.base.model,
        "base_revision": loaded.config.base.revision,
        "base_quantization": loaded.config.base.quantization,
    }


def _origins(loaded: LoadedConfig) -> dict[str, Any]:
    """What was asked for, setting by setting."""
    return {
        "config": str(loaded.path.resolve()),
        "overrides": list(loaded.overrides),
        "settings": [list(setting) for setting in loaded.settings()],
    }


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the new one, never a part.

    Raises:
        RunDirectoryError: the disk does not take it.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file as `write_json` does."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError where it is not one; NaN, which JSON does not know, included."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_not_json, parse_float=_finite)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def _not_json(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def replace_folder(target: Path, draft: Path, retired: Path) -> None:
    """Put a complete folder in the place of an earlier one, if there is one.

    Args:
        retired: what the earlier one is called between the two renames. Whoever opens the folders next after a kill
            gives it its name back where `target` is missing.
    """
    try:
        if target.exists():
            os.rename(target, retired)
        os.rename(draft, target)
    except BaseException:
        if retired.exists() and not target.exists():
            os.rename(retired, target)
        raise
    sync(target.parent)
    shutil.rmtree(retired, ignore_errors=True)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Bring a folder's files to the disk before the rename that makes them count."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
