"""Functions of the user's own, named in the config as `FILE.py:FUNCTION`: rewards, gold measures, data."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.errors import RewardFunctionError, TrivetError


def load_function(
    reference: str, *, what: str = "reward function", error: type[TrivetError] = RewardFunctionError
) -> Callable[..., Any]:
    """Import a function from a Python file.

    The file runs once per process and content. It is imported under a name made from its path and bytes,
    so that two files called `reward.py` do not take each other's place.

    Args:
        reference: `FILE.py:FUNCTION`.
        what: what the function is for, as error messages call it.
        error: the class of the error that is raised.

    Raises:
        error: the file or the name is missing, the name is not a function, or importing the file raises.
    """
    path, name = _split(reference, what, error)
    source = _read(path, what, error)
    module = _module(path, source, what, error)
    try:
        function = getattr(module, name)
    except AttributeError:
        known = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise error(
            f"there is no {what} '{name}' in the file",
            where=str(path),
            remedy=f"Name one of those that it has: {', '.join(known)}." if known else f"Write `def {name}(...)`.",
        ) from None
    if not callable(function):
        raise error(
            f"'{name}' is to be a {what}, but it is of type {type(function).__name__}",
            where=str(path),
            remedy=f"Make {name} a function: `def {name}(...)`.",
        )
    return function  # type: ignore[no-any-return]


def function_digest(reference: str, *, error: type[TrivetError] = RewardFunctionError) -> str:
    """SHA-256 of the function's identity: its name and the bytes of its file, which is not run.

    Modules that the file imports are not part of it.
    """
    path, name = _split(reference, "function", error)
    return hashlib.sha256(name.encode() + b"\0" + _read(path, "function", error)).hexdigest()


def _split(reference: str, what: str, error: type[TrivetError]) -> tuple[Path, str]:
    file, colon, name = reference.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise error(
            f"'{reference}' does not name a {what}", remedy="Write FILE.py:FUNCTION, for example my_rewards.py:short."
        )
    return Path(file).expanduser().resolve(), name


def _read(path: Path, what: str, error: type[TrivetError]) -> bytes:
    try:
        return path.read_bytes()
    except OSError as failure:
        raise error(
            f"the {what}'s file cannot be read: {failure.strerror}",
            where=str(path),
            remedy="Correct the path; a relative one starts from the config's folder.",
        ) from None


def _module(path: Path, source: bytes, what: str, error: type[TrivetError]) -> ModuleType:
    identity = hashlib.sha256(str(path).encode() + b"\0" + source).hexdigest()[:16]
    name = f"_trivet_{path.stem}_{identity}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_loader(name, loader=None, origin=str(path))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)
    # Registered before it runs: dataclasses and pickle look a class's module up by name.
    sys.modules[name] = module
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    # A file that calls sys.exit at import must not end the run without a word.
    except (Exception, SystemExit) as failure:
        del sys.modules[name]
        raise error(
            f"the file of the {what} cannot be imported: {type(failure).__name__}: {failure}",
            where=f"{path}, line {_line_in(path, failure)}",
            remedy="Mend the file; `python FILE.py` shows the whole traceback.",
        ) from failure
    return module


def _line_in(path: Path, failure: BaseException) -> int:
    """The last line of the file that the failure passed through (1-based; 1 if none)."""
    if isinstance(failure, SyntaxError) and failure.filename == str(path):
        return failure.lineno or 1
    lines = [frame.lineno for frame in traceback.extract_tb(failure.__traceback__) if frame.filename == str(path)]
    return (lines[-1] if lines else None) or 1
