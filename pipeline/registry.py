"""Promoted policies: numbered copies of finished runs, one of which is the current one.

REGISTRY/
  registry.json        which version is current, and all that has happened; replaced atomically
  versions/0001/...    the stages of a promoted run, as they were; never changed
  lock                 held while a version is added

A version holds the whole line of adapters, since a run directory is overwritten by its next run.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pipeline.artifacts import read_manifest
from pipeline.disk import writing
from pipeline.errors import RegistryError
from pipeline.run_directory import RunDirectory, StageName, read_json, sync_tree, write_json
from pipeline.run_lock import hold


@dataclass(frozen=True)
class Event:
    """A line of the history: which version became the current one, when, how and why."""

    version: int
    action: Literal["promote", "rollback"]
    time: str
    run_dir: str
    digest: str
    figures: Mapping[str, Any]
    note: str = ""


class Registry:
    """A folder of promoted policies.

    Args:
        root: the folder; it need not exist yet.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    @property
    def history(self) -> list[Event]:
        """All that has happened, the oldest first.

        Raises:
            RegistryError: registry.json is not readable.
        """
        path = self.root / "registry.json"
        try:
            events = [Event(**event) for event in read_json(path)["history"]]
            if odd := next((event for event in events if type(event.version) is not int or event.version < 1), None):
                raise ValueError(f"{odd.version!r} is no version")
            return events
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            raise RegistryError(
                f"the history is not readable ({error})",
                where=str(path),
                remedy="Put back a copy of the file, or move the folder away and promote again.",
            ) from None

    @property
    def current(self) -> Event | None:
        """What made the current version the current one. None: nothing was promoted yet."""
        history = self.history
        return history[-1] if history else None

    def stage(self, name: StageName) -> Path | None:
        """The folder of the current version's stage. None: nothing was promoted yet."""
        return None if self.current is None else self._folder(self.current.version) / name

    def promote(
        self, run: RunDirectory, stages: Sequence[StageName], *, figures: Mapping[str, Any], note: str = ""
    ) -> tuple[Event, bool]:
        """Make a finished run's policy the current one. Every file is verified, before it is copied and after.

        Args:
            run: the finished run.
            stages: those that it has.
            figures: the evaluation's, kept in the history.
            note: why, or by whom.

        Returns:
            What is the current version now, and whether it is new: a policy that is current stays it.

        Raises:
            ArtifactError: a stage is missing or damaged.
            RegistryError, RunDirectoryError: the folder cannot be written, or somebody else is promoting.
        """
        digest = read_manifest(run.stage("ppo")).digest
        with self._changing():
            current, history = self.current, self.history
            if current is not None and current.digest == digest:
                return current, False
            version = 1 + max((event.version for event in history), default=0)
            self._add(run, stages, version)
            event = Event(version, "promote", _now(), str(run.root.resolve()), digest, dict(figures), note)
            self._point_to(event)
        return event, True

    def rollback(self, version: int | None = None, *, note: str = "") -> Event:
        """Make an earlier version the current one.

        Args:
            version: its number. None: the one that was current before this one.
            note: why, or by whom.

        Raises:
            RegistryError: there is no such version.
            ArtifactError: its files are not what they were.
        """
        with self._changing():
            history = self.history
            known = {event.version: event for event in history}
            if version is None:
                version = _before(history)
            if version not in known:
                raise RegistryError(
                    f"there is no version {version} to go back to" if version else "there is no earlier version",
                    where=str(self.root),
                    remedy=f"Choose one of {', '.join(map(str, sorted(known)))}." if known else "Promote a run first.",
                )
            if not self._folder(version).is_dir():
                raise RegistryError(
                    f"the files of version {version} are gone",
                    where=str(self._folder(version)),
                    remedy="Put them back from a copy, or choose another version.",
                )
            for folder in sorted(self._folder(version).iterdir()):
                read_manifest(folder)
            target = known[version]
            event = Event(version, "rollback", _now(), target.run_dir, target.digest, target.figures, note)
            self._point_to(event)
        return event

    def _folder(self, version: int) -> Path:
        return self.root / "versions" / f"{version:04d}"

    def _add(self, run: RunDirectory, stages: Sequence[StageName], version: int) -> None:
        versions = self.root / "versions"
        with writing(versions):
            versions.mkdir(exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=versions))
        try:
            for stage in stages:
                read_manifest(run.stage(stage))
                with writing(draft):
                    shutil.copytree(run.stage(stage), draft / stage)
                read_manifest(draft / stage)
            with writing(versions):
                sync_tree(draft)
                draft.chmod(0o755)
                target = self._folder(version)
                shutil.rmtree(target, ignore_errors=True)  # of a promotion that was killed before its last step
                draft.rename(target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _point_to(self, event: Event) -> None:
        history = [asdict(one) for one in (*self.history, event)]
        write_json(self.root / "registry.json", {"current": event.version, "history": history})

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        with hold(self.root / "lock", "a promotion", lambda _: None):
            yield


def _before(history: Sequence[Event]) -> int:
    """The version that was current before the current one was promoted; 0 where there is none."""
    if not history:
        return 0
    promoted = [event.version for event in history if event.action == "promote"]
    return max((version for version in promoted if version < history[-1].version), default=0)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
