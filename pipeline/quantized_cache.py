"""Weights as bitsandbytes quantized them, kept on disk: quantizing on a CPU takes longer than reading the result.

A copy is known by all that it follows from, and holds the same bits; what it was made from is still what the base is
identified by. On GPUs, which quantize while they read, none is kept.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.artifacts import BaseIdentity, digest, folder_files, seal, unseal
from pipeline.config import BaseSettings
from pipeline.errors import ArtifactError
from pipeline.run_directory import read_json, sync_tree, write_json

WORTH_PARAMETERS = 50_000_000
"""Smaller bases are quantized sooner than they are found."""
_LAYOUT = 1
"""Raised when what is kept must be made again."""
_DRAFT = ".quantizing-"
_FILES = "files.json"
"""The digests of a copy's files."""


def kept_folder(
    base: BaseSettings, identity: BaseIdentity, storage: Mapping[str, Any], device: torch.device
) -> Path | None:
    """Where the quantized weights are kept, or would be; None where none are.

    Args:
        storage: what else says how weights are packed, as JSON-able data.
    """
    if base.quantization != "nf4" or device.type != "cpu" or base.trust_remote_code:
        return None
    made_from = {
        "layout": _LAYOUT,
        "weights": identity.weights,
        "quantization": identity.quantization,
        "storage": dict(storage),
        "versions": {name: version(name) for name in ("bitsandbytes", "transformers")},
    }
    return Path(base.cache_dir).expanduser() / "quantized" / digest(made_from)[:32]


def intact(folder: Path) -> bool:
    """Whether every file of a copy is what was written; a copy that is not goes, to be made again."""
    try:
        written = unseal(read_json(folder / _FILES), folder / _FILES, "")["files"]
        whole = bool(written == folder_files(folder, besides=_FILES))
    except (OSError, ValueError, KeyError, TypeError, ArtifactError):
        whole = False
    if not whole:
        shutil.rmtree(folder, ignore_errors=True)
    return whole


def keep(model: PreTrainedModel, folder: Path) -> None:
    """Write the quantized model in a folder that appears when it is whole. Where that fails the next start quantizes.

    The model must not have computed or been wrapped yet.
    """
    if folder.exists() or model.num_parameters() < WORTH_PARAMETERS:
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=folder.parent))
        try:
            model.save_pretrained(draft)
            write_json(draft / _FILES, seal({"files": folder_files(draft, besides=_FILES)}))
            sync_tree(draft)
            os.rename(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)  # also where another process was first: it has kept the same
    except OSError:
        return
