"""The base's files as transformers reads them (a GGUF file is converted once), and its tokenizer without weights."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from pipeline.base_source import BaseSource, locate, read_template
from pipeline.config import BaseSettings
from pipeline.disk import writing
from pipeline.errors import BaseModelError
from pipeline.run_directory import sync_tree

CONVERSION_VERSION = 1
"""Raised when a GGUF conversion must be made again."""

_DRAFT = ".converting-"


def load_tokenizer(base: BaseSettings) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with the config's chat template where one is set.

    Raises:
        BaseModelError: the base or its tokenizer cannot be found or read.
    """
    return read_tokenizer(_tokenizer_folder(locate(base), base), base)


def read_tokenizer(folder: Path, base: BaseSettings) -> PreTrainedTokenizerBase:
    """`load_tokenizer` for files that are at hand."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=base.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(
            f"the tokenizer cannot be loaded: {str(error).splitlines()[0]}",
            where=str(folder),
            remedy="The folder needs tokenizer.json (or the files of a slow tokenizer) beside the weights.",
        ) from None
    if base.chat_template is not None:
        tokenizer.chat_template = read_template(base.chat_template)
    return cast(PreTrainedTokenizerBase, tokenizer)


def as_folder(source: BaseSource, base: BaseSettings) -> Path:
    """The folder to load from; a GGUF file is converted to safetensors once and kept in the cache."""
    if source.kind == "folder":
        return source.path
    folder = _converted(source, base)
    if not folder.exists():
        print(f"Converting {source.path.name} to safetensors, once; it is kept in {folder}.", flush=True)
        _convert_gguf(source.path, folder, (_read_gguf_tokenizer, read_gguf_model))
    return folder


def _tokenizer_folder(source: BaseSource, base: BaseSettings) -> Path:
    """The folder with the tokenizer's files; from a GGUF file they are taken in a second, without the weights."""
    if source.kind == "folder":
        return source.path
    folder = _converted(source, base)
    if folder.exists():
        return folder
    alone = folder.with_name(f"{folder.name}-tokenizer")
    if not alone.exists():
        _convert_gguf(source.path, alone, (_read_gguf_tokenizer,))
    return alone


def _converted(source: BaseSource, base: BaseSettings) -> Path:
    name = f"{source.path.stem}-{source.weights[:16]}-v{CONVERSION_VERSION}"
    return Path(base.cache_dir).expanduser() / "gguf" / name


def _convert_gguf(file: Path, folder: Path, readers: Sequence[Callable[[Path], Any]]) -> None:
    """Save what the readers find in the file in a folder that appears when it is whole."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise BaseModelError(
            "reading a GGUF file needs the package 'gguf'",
            where=str(file),
            remedy="Install it: pip install 'trivet[gguf]'",
        ) from None
    with writing(folder, error=BaseModelError, elsewhere="set base.cache_dir to another folder"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_old_drafts(folder.parent)
        draft = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=folder.parent))
        try:
            for read in readers:
                _read(read, file).save_pretrained(draft)
            sync_tree(draft)
            draft.chmod(0o755)
            try:
                os.rename(draft, folder)
            except OSError:
                if not folder.exists():  # another process was first: its conversion is the same
                    raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _read(read: Callable[[Path], Any], file: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read(file)
        except Exception as error:  # the reader fails in as many ways as a file can be broken
            raise BaseModelError(
                f"the GGUF file cannot be read: {type(error).__name__}: {str(error)[:200]}",
                where=str(file),
                remedy="It may be torn, or of an architecture that transformers cannot read from GGUF.",
            ) from error


def _read_gguf_tokenizer(file: Path) -> Any:
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)


def read_gguf_model(file: Path) -> Any:
    """The model in a GGUF file, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, trust_remote_code=False, dtype=torch.float32
    )
    # The weights are plain tensors by now; saving would refuse while the config still calls them GGUF.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    return model


def _remove_old_drafts(cache: Path) -> None:
    """Remove what conversions that were killed left behind; one that goes on takes less than a day."""
    for draft in cache.glob(f"{_DRAFT}*"):
        if time.time() - draft.stat().st_mtime > 86_400:
            shutil.rmtree(draft, ignore_errors=True)
