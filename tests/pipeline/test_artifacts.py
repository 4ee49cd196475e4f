"""The manifest: what it says stays true, or the file and the field that broke it are named."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from pipeline.artifacts import (
    MANIFEST,
    MANIFEST_VERSION,
    BaseIdentity,
    Manifest,
    digest,
    folder_files,
    read_manifest,
    require_same_base,
    write_manifest,
)
from pipeline.errors import ArtifactError, IncompatibleAdapterError

BASE = BaseIdentity("base", None, "w" * 64, "nf4-double/float32", "t" * 64, "c" * 64)


@pytest.fixture
def stage(tmp_path):
    folder = tmp_path / "sft"
    (folder / "value").mkdir(parents=True)
    (folder / "adapter.bin").write_bytes(b"weights")
    (folder / "value" / "head.bin").write_bytes(b"head")
    write_manifest(folder, manifest(files=folder_files(folder)))
    return folder


def manifest(**changes) -> Manifest:
    settings = {
        "stage": "sft",
        "role": "policy",
        "base": BASE,
        "inputs": {"seed": 0},
        "inputs_digest": digest({"seed": 0}),
        "parents": {},
        "lora": {"rank": 4},
        "metrics": {"loss": 1.5},
        "seconds": 2.0,
        "peak_memory_bytes": 3,
        "files": {},
        "code_version": "0.1.0",
    }
    return Manifest(**(settings | changes))


def test_what_was_written_is_read(stage):
    found = read_manifest(stage)
    assert found == manifest(files=folder_files(stage), reward_gain=None)
    assert sorted(found.files) == ["adapter.bin", "value/head.bin"]


def test_the_identity_is_that_of_the_files_not_of_when_they_were_made():
    same = manifest(seconds=99.0, metrics={}, inputs={"seed": 1}, code_version="9")
    assert same.digest == manifest().digest
    for change in (
        {"files": {"adapter.bin": "x"}},
        {"role": "reward"},
        {"reward_gain": 2.0},
        {"reward_bias": 0.5},
        {"base": replace(BASE, quantization="int8/float32")},
    ):
        assert manifest(**change).digest != manifest().digest, change


def test_a_digest_does_not_depend_on_the_order_of_keys_and_refuses_nan():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1}) != digest({"b": [2, 1], "a": 1})
    with pytest.raises(ValueError):
        digest({"a": float("nan")})


@pytest.mark.parametrize("name", ["adapter.bin", "value/head.bin"])
def test_an_edited_or_missing_file_is_named(stage, name):
    (stage / name).write_bytes(b"edited")
    with pytest.raises(ArtifactError, match="not the one that the stage wrote") as caught:
        read_manifest(stage)
    assert caught.value.where == str(stage / name)
    (stage / name).unlink()
    with pytest.raises(ArtifactError, match="is missing") as caught:
        read_manifest(stage)
    assert caught.value.where == str(stage / name)


def test_an_added_file_is_named(stage):
    (stage / "value" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="did not write") as caught:
        read_manifest(stage)
    assert caught.value.where == str(stage / "value" / "notes.txt")


def test_an_absent_stage_says_so(tmp_path):
    with pytest.raises(ArtifactError, match="no finished stage"):
        read_manifest(tmp_path / "sft")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"base": {}}', '{"base": 3}'])
def test_a_manifest_that_is_none_is_an_error_of_ours(stage, content):
    (stage / MANIFEST).write_text(content)
    with pytest.raises(ArtifactError):
        read_manifest(stage)


def test_a_newer_manifest_is_refused(stage):
    content = json.loads((stage / MANIFEST).read_text())
    (stage / MANIFEST).write_text(json.dumps(content | {"manifest_version": MANIFEST_VERSION + 1, "new_field": 1}))
    with pytest.raises(ArtifactError, match="newer trivet"):
        read_manifest(stage)


@pytest.mark.parametrize("field", [entry.name for entry in fields(BaseIdentity) if entry.name != "model"])
def test_a_base_that_differs_is_refused_with_both_values(tmp_path, field):
    with pytest.raises(IncompatibleAdapterError, match=f"its {field} is ") as caught:
        require_same_base(manifest(), replace(BASE, **{field: "another"}), tmp_path)
    assert "'another'" in str(caught.value)


def test_a_base_that_only_moved_is_the_same(tmp_path):
    require_same_base(manifest(), replace(BASE, model="/elsewhere/base"), tmp_path)
