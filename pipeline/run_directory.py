"""Every path of a run, named once. A finished stage appears by one atomic rename: whole or absent.

RUN/
  run.json            what the run belongs to: its config's name and its base
  config.json         the resolved config of the last start
  sft/ reward/ ppo/ evaluate/      finished stages, each with its manifest trivet.json
  summary.json        the figures of all stages
  logs/STAGE.log      what the stage printed
  metrics/STAGE.jsonl a line of metrics a step
  working/STAGE/      what an unfinished stage keeps: checkpoints, samples
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from pipeline.config_file import LoadedConfig
from pipeline.errors import RunDirectoryError

StageName = Literal["sft", "reward", "ppo", "evaluate"]
STAGES: tuple[StageName, ...] = get_args(StageName)

LAYOUT_VERSION = 1
"""Raised when a newer trivet lays out a run in a way that this one would misread."""


class RunDirectory:
    """The folder of one run.

    Args:
        root: the folder; it need not exist yet.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    @classmethod
    def open(cls, loaded: LoadedConfig) -> RunDirectory:
        """Create the run's folder, or check that an existing one belongs to this config.

        Raises:
            RunDirectoryError: it belongs to another config or base, was written by a newer version, or
                cannot be written.
        """
        run = cls(loaded.config.run_dir)
        owner: dict[str, Any] = {
            "layout_version": LAYOUT_VERSION,
            "config_name": loaded.path.name,
            "base_model": loaded.config.base.model,
            "base_revision": loaded.config.base.revision,
            "base_quantization": loaded.config.base.quantization,
        }
        try:
            run.root.mkdir(parents=True, exist_ok=True)
            run._check_owner(owner)
            write_json(run.root / "run.json", owner)
            write_json(run.root / "config.json", loaded.config.model_dump(mode="json"))
        except OSError as error:
            if isinstance(error, RunDirectoryError):
                raise
            raise RunDirectoryError(
                f"cannot write to the run directory: {error.strerror}",
                where=str(run.root),
                remedy="Choose another folder with run_dir=..., or free space and permissions there.",
            ) from None
        return run

    def _check_owner(self, owner: dict[str, Any]) -> None:
        path = self.root / "run.json"
        if not path.exists():
            return
        try:
            found = read_json(path)
        except ValueError:
            raise RunDirectoryError(
                "run.json is not readable", where=str(path), remedy="Remove that file if the folder is this run's."
            ) from None
        if found.get("layout_version", 0) > LAYOUT_VERSION:
            raise RunDirectoryError(
                f"the run was written by a newer trivet: layout {found['layout_version']}, known: {LAYOUT_VERSION}",
                where=str(self.root),
                remedy="Upgrade trivet, or choose another folder with run_dir=....",
            )
        for key in ("config_name", "base_model", "base_revision", "base_quantization"):
            if found.get(key) != owner[key]:
                raise RunDirectoryError(
                    f"the run directory belongs to another config: its {key} is {found.get(key)!r},"
                    f" this config's is {owner[key]!r}",
                    where=str(self.root),
                    remedy="Choose another folder with run_dir=..., or move the old one away.",
                )

    def stage(self, name: StageName) -> Path:
        """Folder of the finished stage; it exists only when the stage is whole."""
        return self.root / name

    def working(self, name: StageName) -> Path:
        """Folder of what an unfinished stage keeps, such as checkpoints."""
        return self.root / "working" / name

    def log(self, name: StageName) -> Path:
        """What the stage printed."""
        return self.root / "logs" / f"{name}.log"

    def metrics(self, name: StageName) -> Path:
        """A JSON line a step."""
        return self.root / "metrics" / f"{name}.jsonl"

    @property
    def summary(self) -> Path:
        """The figures of all stages."""
        return self.root / "summary.json"

    @contextmanager
    def publish(self, name: StageName) -> Iterator[Path]:
        """A temporary folder that becomes the finished stage when the block ends without an error.

        An earlier result stays until the new one is complete, and is then replaced.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=self.root))
        try:
            yield draft
            _sync_tree(draft)
            draft.chmod(0o755)
            target = self.stage(name)
            retired = draft.with_name(f"{draft.name}-replaced")
            if target.exists():
                os.rename(target, retired)
            try:
                os.rename(draft, target)
            except OSError:
                if retired.exists():
                    os.rename(retired, target)
                raise
            _sync(self.root)
            shutil.rmtree(retired, ignore_errors=True)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(self.working(name), ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}-", delete=False
    ) as file:
        try:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError where it is not one."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    """Bring a folder's files to the disk before the rename that makes them count."""
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)
