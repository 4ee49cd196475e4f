"""The licence of a base, as far as its own files tell. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.base_source import PACKAGE_PREFIX, in_package, locate
from pipeline.config import BaseSettings

_LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")


@dataclass(frozen=True)
class License:
    """A licence as hubs know it, or `other` with a `name` of its own; without a key where only a text is known."""

    key: str | None
    name: str | None = None

    def __str__(self) -> str:
        return self.name or self.key or "unknown"


def base_license(base: BaseSettings) -> License | None:
    """The licence, as the base's model card, its GGUF file or its hub's card says. None: it is not known here.

    The hub is asked where the base comes from it and it can be reached.
    """
    source = locate(base)
    if source.kind == "gguf":
        return _of_gguf(source.path)
    named = _of_card(source.path / "README.md")
    if named is not None or not _is_hub_id(base.model):
        files = (name for name in _LICENCE_FILES if (source.path / name).exists())
        beside = (License(None, f"see {name} of the base") for name in files)
        return named or next(beside, None)
    return _of_hub(base)


def _is_hub_id(model: str) -> bool:
    return not model.startswith((PACKAGE_PREFIX, "/", ".", "~")) and not Path(model).exists()


def _of_card(card: Path) -> License | None:
    """The front matter's `license`, and the `license_name` that goes with `other`."""
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    if not text.startswith("---"):
        return None
    try:
        front: Any = yaml.safe_load(text.split("---", 2)[1])
    except (yaml.YAMLError, IndexError):
        return None
    if not isinstance(front, dict) or not isinstance(front.get("license"), str):
        return None
    named = front.get("license_name")
    return License(front["license"], named if isinstance(named, str) else None)


def _of_gguf(file: Path) -> License | None:
    try:
        from gguf import GGUFReader

        found = GGUFReader(file).get_field("general.license")
        return License(str(found.contents())) if found is not None else None
    # The licence is a courtesy: whatever keeps it from being read, the base itself was read all the same.
    except Exception:
        return None


def _of_hub(base: BaseSettings) -> License | None:
    from huggingface_hub import hf_hub_download

    try:
        return _of_card(Path(hf_hub_download(base.model, "README.md", revision=base.revision)))
    # Offline, refused or without a card: it is not known then.
    except Exception:
        return None


def hub_name(base: BaseSettings) -> str | None:
    """The base's hub id, by which others can load it; None where it is a file or folder of this machine."""
    return base.model if _is_hub_id(base.model) else None


def shown_name(base: BaseSettings) -> str:
    """What the base is called for others: a hub id or a package's file, else the last part of its path."""
    if base.model.startswith(PACKAGE_PREFIX):
        return f"{in_package(base.model).name} of the package {base.model.removeprefix(PACKAGE_PREFIX).split('/')[0]}"
    return base.model if _is_hub_id(base.model) else Path(base.model).name
