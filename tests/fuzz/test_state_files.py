"""Whatever was done to what a run left: the same content, an earlier one, or an error of ours; never another one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from finished_stages import light_config
from fuzzing import almost, cases, damaged, texts, trees
from hypothesis import given
from hypothesis import strategies as st

from pipeline.artifacts import (
    MANIFEST,
    BaseIdentity,
    Manifest,
    digest,
    folder_files,
    read_manifest,
    seal,
    write_manifest,
)
from pipeline.checkpoint import STATE, CheckpointFolder
from pipeline.config_file import LoadedConfig, load_config
from pipeline.errors import ArtifactError, RunDirectoryError, TrivetError
from pipeline.metrics import MetricsWriter, read_metrics
from pipeline.run_directory import RunDirectory

BASE = BaseIdentity("base", None, "w" * 64, "nf4", "t" * 64, "c" * 64)
KEYS = st.one_of(st.sampled_from(["step", "files", "state", "checksum", "base", "metrics"]), texts(6))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest, bytes]:
    """A finished stage's folder, its manifest, and that manifest's bytes."""
    folder = tmp_path_factory.mktemp("run") / "sft"
    folder.mkdir()
    (folder / "adapter.bin").write_bytes(b"weights")
    manifest = Manifest(
        stage="sft",
        role="policy",
        base=BASE,
        inputs={"seed": 0, "data": {"instructions": "d"}},
        inputs_digest=digest({"seed": 0}),
        parents={"sft": "p"},
        lora={"rank": 4},
        metrics={"loss": 1.5, "accuracy": {"value": 0.5, "low": 0.1}},
        seconds=2.0,
        peak_memory_bytes=3,
        files=folder_files(folder),
        code_version="0.1.0",
        reward_gain=0.5,
        reward_bias=0.25,
        extra={"probe": [{"ids": [1], "score": 0.5}]},
    )
    write_manifest(folder, manifest)
    return folder, manifest, (folder / MANIFEST).read_bytes()


@cases(600)
@given(data=st.data())
def test_an_edited_manifest_is_refused_or_says_the_same(
    stage: tuple[Path, Manifest, bytes], data: st.DataObject
) -> None:
    folder, manifest, right = stage
    content = json.loads(right)
    edited = data.draw(st.one_of(damaged(right), almost(content, KEYS).map(lambda tree: json.dumps(tree).encode())))
    (folder / MANIFEST).write_bytes(edited)
    try:
        assert read_manifest(folder) == manifest
    except ArtifactError as error:
        assert str(folder) in str(error) and error.remedy


@cases(600)
@given(data=st.data())
def test_a_sealed_manifest_of_any_form_is_whole_or_refused(
    stage: tuple[Path, Manifest, bytes], data: st.DataObject
) -> None:
    """Such as another version of trivet might write."""
    folder, _, right = stage
    content = json.loads(right)
    del content["checksum"]
    tree = data.draw(st.one_of(almost(content, KEYS), trees(KEYS)))
    try:
        (folder / MANIFEST).write_text(json.dumps(seal(tree)))
    except (ValueError, TypeError):
        return  # NaN, or no mapping: nothing that could be sealed
    try:
        found = read_manifest(folder)
    except ArtifactError as error:
        assert str(folder) in str(error) and error.remedy
    else:
        assert found.files == folder_files(folder) and isinstance(found.base, BaseIdentity) and found.digest


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    folder = CheckpointFolder(root, inputs_digest="mine", keep_last=3)
    for step in (1, 2):
        folder.save(step, {"kl": step / 10, "draws": [step]}, lambda draft: (draft / "tensors").write_bytes(b"x" * 100))
    return root


@cases(600)
@given(data=st.data(), sealed=st.booleans())
def test_an_edited_checkpoint_is_passed_over(checkpoints: Path, data: st.DataObject, sealed: bool) -> None:
    newest = checkpoints / "00000002"
    right = {name: (newest / name).read_bytes() for name in (STATE, "tensors")}
    state = json.loads(right[STATE])
    edits = almost(state, KEYS)
    if sealed:
        del state["checksum"]
        edited = json.dumps(data.draw(almost(state, KEYS)))
        try:
            edited = json.dumps(seal(json.loads(edited)))
        except ValueError:
            return
        (newest / STATE).write_text(edited)
    elif data.draw(st.booleans()):
        (newest / "tensors").write_bytes(data.draw(damaged(right["tensors"])))
    else:
        content = data.draw(st.one_of(damaged(right[STATE]), edits.map(lambda tree: json.dumps(tree).encode())))
        (newest / STATE).write_bytes(content)
    warned: list[str] = []
    try:
        found = CheckpointFolder(checkpoints, inputs_digest="mine", keep_last=3).latest(warn=warned.append)
        if sealed:
            assert found is not None and isinstance(found.step, int) and isinstance(found.state, dict)
        else:
            assert found is not None and found.state == {"kl": found.step / 10, "draws": [found.step]}
        assert (found.step == 1) == bool(warned) or sealed
    finally:
        for name, content in right.items():
            (newest / name).write_bytes(content)


@pytest.fixture(scope="module")
def owned(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedConfig, bytes]:
    """A run that has begun, and the bytes of its run.json."""
    loaded = load_config(light_config(tmp_path_factory.mktemp("owned")))
    return loaded, (RunDirectory.open(loaded).root / "run.json").read_bytes()


@cases(400)
@given(data=st.data())
def test_an_edited_owner_is_the_same_or_refused(owned: tuple[LoadedConfig, bytes], data: st.DataObject) -> None:
    loaded, right = owned
    path = Path(loaded.config.run_dir) / "run.json"
    edits = almost(json.loads(right), KEYS).map(lambda tree: json.dumps(tree).encode())
    edited = data.draw(st.one_of(damaged(right), edits, st.binary(max_size=40)))
    path.write_bytes(edited)
    try:
        RunDirectory.open(loaded)
    except RunDirectoryError as error:
        assert error.remedy and path.read_bytes() == edited
    else:
        assert path.read_bytes() == right


@cases(400)
@given(data=st.data())
def test_edited_metrics_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "metrics.jsonl"
    right = b"".join(b'{"step": %d, "reward": 0.5, "kl": null}\n' % step for step in range(4))
    rows = st.lists(trees(KEYS), max_size=4).map(lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode())
    path.write_bytes(data.draw(st.one_of(damaged(right), rows)))
    try:
        found = read_metrics(path)
        with MetricsWriter(path) as writer:
            writer.truncate_after(1)
            writer.write(2, reward=1.0)
    except TrivetError as error:
        assert str(path) in str(error) and error.remedy
    else:
        kept = [row for row in found if row["step"] <= 1]
        assert [row["step"] for row in read_metrics(path)] == [*(row["step"] for row in kept), 2]
