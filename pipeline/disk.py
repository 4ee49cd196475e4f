"""What keeps a run from writing, in words: no space, a quota, a read-only folder, no permission."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from pipeline.errors import RunDirectoryError, TrivetError

_FAULTS = {
    errno.ENOSPC: "there is no space left on the disk",
    errno.EDQUOT: "the quota on this disk is used up",
    errno.EFBIG: "the file may not grow that large (see `ulimit -f`)",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "there is no permission to write",
    errno.EPERM: "there is no permission to write",
    errno.ENOTDIR: "a file lies where a folder should be",
    errno.EEXIST: "a file lies where a folder should be",
    errno.EISDIR: "a folder lies where a file should be",
    errno.EIO: "the disk reports an error",
}
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ALWAYS = (*_FULL, errno.EFBIG, errno.EROFS)
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def writing(
    path: Path,
    *,
    error: type[TrivetError] = RunDirectoryError,
    elsewhere: str = "choose another folder with run_dir=...",
) -> Iterator[None]:
    """A block that writes to a file or below a folder.

    Args:
        path: the file or folder.
        error: the class of the error that is raised.
        elsewhere: how the user has it written to another place.

    Raises:
        error: the disk did not take it; names the place, and what to do.
    """
    try:
        yield
    except TrivetError:
        raise
    except (OSError, SafetensorError) as failure:
        number = _number(failure)
        place = Path(os.path.abspath(getattr(failure, "filename", None) or path))
        ours = _is_about(place, Path(os.path.abspath(path)))
        # Without a name, or elsewhere, such a failure can only be one of writing; a missing permission need not be.
        if not number or not (ours or number in _ALWAYS):
            raise
        advice = "Free space there" if number in _FULL else "Correct that"
        raise error(
            f"cannot write: {_FAULTS.get(number) or os.strerror(number)}{_room(path) if number in _FULL else ''}",
            where=str(path if ours else place),
            remedy=f"{advice}, or {elsewhere}; what is finished stays, and the same command goes on from there.",
        ) from failure


def _is_about(place: Path, path: Path) -> bool:
    """Whether a failure at `place` is one of writing `path`: below it, at its draft, or at a folder above it."""
    is_draft = place.parent == path.parent and place.name.startswith(f".{path.name}-")
    return place.is_relative_to(path) or path.is_relative_to(place) or is_draft


def _number(failure: Exception) -> int:
    """The errno of a failure; 0 where it has none. safetensors has it in its text alone."""
    if isinstance(failure, OSError):
        return failure.errno or 0
    found = _RUST_ERROR.search(str(failure))
    return int(found.group(1)) if found else 0


def _room(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return ""
    return f" ({free / 1e6:.1f} MB free)"
