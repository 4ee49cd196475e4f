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
    seal,
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


def test_a_link_is_no_file_of_the_stage(stage, tmp_path):
    (stage / "adapter.bin").rename(tmp_path / "elsewhere")
    (stage / "adapter.bin").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="link") as caught:
        read_manifest(stage)
    assert caught.value.where == str(stage / "adapter.bin")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "value/../../outside", "value/./head.bin", "."])
def test_a_manifest_names_no_file_outside_its_folder(stage, name):
    (stage.parent / "outside").write_text("x")
    files = folder_files(stage) | {name: "0" * 64}
    write_manifest(stage, manifest(files=files))
    with pytest.raises(ArtifactError, match="missing"):
        read_manifest(stage)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("metrics", {"loss": 0.1}),
        ("reward_gain", 3.0),
        ("seconds", 1.0),
        ("inputs_digest", "0" * 64),
        ("extra", {"a": 1}),
    ],
)
def test_a_figure_that_was_edited_by_hand_is_noticed(stage, field, value):
    content = json.loads((stage / MANIFEST).read_text())
    (stage / MANIFEST).write_text(json.dumps(content | {field: value}))
    with pytest.raises(ArtifactError, match="its content was edited") as caught:
        read_manifest(stage)
    assert caught.value.where == str(stage / MANIFEST) and "--force" in (caught.value.remedy or "")


def test_a_manifest_that_is_only_laid_out_otherwise_is_the_same(stage):
    content = json.loads((stage / MANIFEST).read_text())
    (stage / MANIFEST).write_text(json.dumps(dict(reversed(content.items()))))
    assert read_manifest(stage) == manifest(files=folder_files(stage))


def test_a_manifest_of_an_older_trivet_is_to_be_made_again(stage):
    content = json.loads((stage / MANIFEST).read_text())
    del content["checksum"]
    (stage / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="no checksum: an older trivet"):
        read_manifest(stage)


@pytest.mark.parametrize("change", [{"files": 3}, {"files": {"a": 1}}, {"base": {}}, {"metrics": []}, {"seconds": "x"}])
def test_a_sealed_manifest_of_another_form_is_an_error_of_ours(stage, change):
    content = json.loads((stage / MANIFEST).read_text())
    del content["checksum"]
    (stage / MANIFEST).write_text(json.dumps(seal(content | change)))
    with pytest.raises(ArtifactError, match=f"not complete: {next(iter(change))}"):
        read_manifest(stage)


def test_an_absent_stage_says_so(tmp_path):
    with pytest.raises(ArtifactError, match="no finished stage"):
        read_manifest(tmp_path / "sft")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"base": 3}', '{"a": NaN}', "[" * 100_000])
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
