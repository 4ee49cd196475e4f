"""The manifest of a finished stage, `trivet.json`: written once, verified on every load.

It says what the stage was made from (base, tokenizer, template, parents, data, settings, code) and holds
the digest of every file beside it and of its own content, so that an edited, torn or foreign adapter, or a figure
that somebody improved, is noticed before it is used. The digests guard against accidents, not against forgers.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import ArtifactError, ForeignResultError, IncompatibleAdapterError
from pipeline.run_directory import MANIFEST, read_json, write_json

MANIFEST_VERSION = 1
_CHECKSUM = "checksum"


@dataclass(frozen=True)
class BaseIdentity:
    """What makes two bases the same: an adapter fits only the one it was trained on.

    `weights` is a digest of the source files, not of the quantized storage, which bitsandbytes repacks
    in place on some CPUs.
    """

    model: str
    revision: str | None
    weights: str
    quantization: str
    tokenizer: str
    chat_template: str


@dataclass(frozen=True)
class Manifest:
    """All that is known of a finished stage.

    `inputs` is what the result depends on, `inputs_digest` its digest; `files` maps each file of the folder
    to its SHA-256; `metrics` are the stage's final figures.
    """

    stage: str
    role: str
    base: BaseIdentity
    inputs: Mapping[str, Any]
    inputs_digest: str
    parents: Mapping[str, str]
    lora: Mapping[str, Any]
    metrics: Mapping[str, Any]
    seconds: float
    peak_memory_bytes: int
    files: Mapping[str, str]
    code_version: str
    reward_gain: float | None = None
    reward_bias: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    manifest_version: int = MANIFEST_VERSION

    @property
    def digest(self) -> str:
        """Identity of the result: of its files and of what they mean, not of when they were made."""
        return digest(
            {
                "role": self.role,
                "base": asdict(self.base),
                "files": dict(self.files),
                "reward": [self.reward_gain, self.reward_bias],
            }
        )


def digest(content: Any) -> str:
    """SHA-256 of JSON-able content, independent of the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-able content with its own checksum in it."""
    # As it will be read: JSON makes lists of tuples and texts of keys.
    plain: dict[str, Any] = json.loads(json.dumps(content, allow_nan=False))
    return plain | {_CHECKSUM: digest(plain)}


def unseal(content: Mapping[str, Any], where: Path, remedy: str) -> dict[str, Any]:
    """The content without its checksum, which must be right.

    Raises:
        ArtifactError: it has none, or was edited.
    """
    plain = dict(content)
    checksum = plain.pop(_CHECKSUM, None)
    if checksum is None:
        raise ArtifactError("it has no checksum: an older trivet wrote it", where=str(where), remedy=remedy)
    try:
        found = digest(plain)
    except RecursionError:
        raise ArtifactError("its content is nested too deeply", where=str(where), remedy=remedy) from None
    if checksum != found:
        raise ArtifactError("its content was edited: the checksum does not fit", where=str(where), remedy=remedy)
    return plain


def reward_folder(path: str | Path) -> Path:
    """Where a reward adapter lies: in a run's folder, or in this very one."""
    folder = Path(path)
    return folder / "reward" if (folder / "reward" / MANIFEST).exists() else folder


def folder_files(folder: Path, besides: str = MANIFEST) -> dict[str, str]:
    """The digest of every file in a folder, but for one, by its path relative to the folder.

    Raises:
        ArtifactError: there is a link, which may lead anywhere.
    """
    files: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise ArtifactError(
                "there is a link where a file of the stage should be",
                where=str(path),
                remedy="Put the file itself there, or run the stage again.",
            )
        if path.is_file() and path != folder / besides:
            files[path.relative_to(folder).as_posix()] = file_digest(path)
    return files


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into the stage's folder. Its other files must be complete."""
    write_json(folder / MANIFEST, seal(asdict(manifest)))


def read_manifest(folder: Path, *, with_files: bool = True) -> Manifest:
    """Read a stage's manifest and verify it and every file against it.

    Args:
        folder: of the finished stage.
        with_files: verify the files too, which reads all of them. Without, only the manifest itself: enough to tell
            of a stage, not to build on it.

    Raises:
        ArtifactError: the stage is absent, its manifest was edited, or a file is missing or differs from its digest.
        ForeignResultError: it was written by a newer version, or a file was added.
    """
    path = folder / MANIFEST
    try:
        content = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(
            "there is no finished stage here", where=str(folder), remedy="Run the stage first: trivet run CONFIG."
        ) from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"the manifest cannot be read: {error}", where=str(path), remedy=_again(folder)) from None
    version = content.get("manifest_version")
    if isinstance(version, int) and version > MANIFEST_VERSION:
        raise ForeignResultError(
            f"the manifest was written by a newer trivet ({content.get('code_version')})",
            where=str(path),
            remedy="Upgrade trivet, or choose another folder with run_dir=...; --force puts a new result in its place.",
        )
    manifest = _as_manifest(unseal(content, path, _again(folder)), folder)
    if with_files:
        _verify_files(folder, manifest)
    return manifest


def read_unverified(folder: Path) -> Manifest | None:
    """What a manifest says that may be damaged, edited or too old: to be shown, never to be built on. None where it
    says nothing."""
    try:
        content = read_json(folder / MANIFEST)
        content.pop(_CHECKSUM, None)
        return _as_manifest(content, folder)
    except (OSError, ValueError):
        return None


def _as_manifest(content: Mapping[str, Any], folder: Path) -> Manifest:
    try:
        return _manifest_type().validate_python(content)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise ArtifactError(
            f"the manifest is not complete: {place}: {fault['msg']}",
            where=str(folder / MANIFEST),
            remedy=_again(folder),
        ) from None


@functools.cache
def _manifest_type() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


def _verify_files(folder: Path, manifest: Manifest) -> None:
    found = folder_files(folder)
    for name, expected in manifest.files.items():
        if name not in found:
            raise ArtifactError("a file of the stage is missing", where=str(folder / name), remedy=_again(folder))
        if found[name] != expected:
            raise ArtifactError(
                f"the file is not the one that the stage wrote (SHA-256 {found[name][:12]}, expected {expected[:12]})",
                where=str(folder / name),
                remedy=_again(folder),
            )
    if surplus := sorted(set(found) - set(manifest.files)):
        raise ForeignResultError(
            "a file lies in the stage's folder that the stage did not write",
            where=str(folder / surplus[0]),
            remedy="Move it elsewhere; --force removes it with the old result.",
        )


def _again(folder: Path) -> str:
    return f"Run the stage again: trivet {folder.name} CONFIG --force."


def require_same_base(manifest: Manifest, base: BaseIdentity, folder: Path) -> None:
    """Refuse an adapter that was trained on another base.

    Raises:
        IncompatibleAdapterError: naming the first field that differs and both values.
    """
    for entry in fields(BaseIdentity):
        theirs, ours = getattr(manifest.base, entry.name), getattr(base, entry.name)
        # A folder may have moved; what counts is that its weights are the same.
        if entry.name != "model" and theirs != ours:
            raise IncompatibleAdapterError(
                f"the {manifest.role} adapter was trained on another base: its {entry.name} is {_short(theirs)},"
                f" this base's is {_short(ours)}",
                where=str(folder),
                remedy=f"Set the base section as it was then, or train again: trivet {manifest.stage} CONFIG --force.",
            )


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else repr(value)
