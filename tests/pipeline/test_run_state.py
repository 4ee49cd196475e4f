"""What a run's folder says of the run: every state it can be in, and every file that can be damaged."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from finished_stages import light_config, publish
from reported_run import ROUNDS, whole_run, write_metrics, write_samples

from pipeline.artifacts import read_manifest
from pipeline.config_file import LoadedConfig, load_config
from pipeline.errors import RunDirectoryError
from pipeline.metrics import MetricsWriter
from pipeline.run_directory import STAGES, STARTING, RunDirectory, StageName
from pipeline.run_lock import holder
from pipeline.run_state import find_runs, read_run


@pytest.fixture
def begun(tmp_path: Path) -> tuple[LoadedConfig, RunDirectory]:
    """A run that was started and has done nothing yet."""
    loaded = load_config(light_config(tmp_path))
    return loaded, RunDirectory.open(loaded)


def statuses(run: RunDirectory) -> dict[StageName, str]:
    return {name: stage.status for name, stage in read_run(run.root).stages.items()}


def header(stage: str) -> str:
    return f"--- 2026-11-21T14:43:44+00:00 {stage} config.yaml (1 process(es))\n"


def log(run: RunDirectory, stage: StageName, text: str, age: float = 0.0) -> None:
    run.log(stage).parent.mkdir(exist_ok=True)
    run.log(stage).write_text(text)
    os.utime(run.log(stage), (time.time() - age,) * 2)


def test_a_whole_run(tmp_path: Path) -> None:
    run = RunDirectory(whole_run(tmp_path).config.run_dir)
    state = read_run(run.root)
    assert state.status == "finished" and not state.is_going and state.faults == []
    assert statuses(run) == dict.fromkeys(STAGES, "finished")
    assert {len(stage.metrics) for name, stage in state.stages.items() if name != "evaluate"} == {ROUNDS}
    assert (len(state.answers), len(state.held_out), len(state.rounds)) == (40, 60, ROUNDS)
    assert state.stages["reward"].figures["held_out_accuracy"]["value"] == 0.85
    assert ("base.quantization", "nf4", "default") in state.settings
    assert state.config_path == str(tmp_path / "run.yaml")


def test_a_run_that_has_just_begun(begun: tuple[LoadedConfig, RunDirectory]) -> None:
    state = read_run(begun[1].root)
    assert state.status == "waiting"
    assert state.settings and state.faults == []
    assert all(stage.done is None and not stage.has_result for stage in state.stages.values())


def test_the_stage_whose_process_holds_the_lock_is_going(begun: tuple[LoadedConfig, RunDirectory]) -> None:
    loaded, run = begun
    publish("sft", loaded, run)
    write_metrics(run, "ppo", rounds=5)
    with run.locked("ppo", warn=print):
        state = read_run(run.root)
        assert state.is_going and state.status == "going"
        assert statuses(run) == {"sft": "finished", "reward": "waiting", "ppo": "going", "evaluate": "waiting"}
        assert state.stages["ppo"].done == 5 / 100
    assert statuses(run)["ppo"] == "interrupted"


def test_looking_does_not_take_the_lock(begun: tuple[LoadedConfig, RunDirectory]) -> None:
    _, run = begun
    assert holder(run.lock("sft")) is None
    with run.locked("sft", warn=print):
        found = holder(run.lock("sft"))
        assert found is not None and found["pid"] == os.getpid() and found["work"] == "the sft stage"
    with run.locked("sft", STARTING, warn=print):
        assert statuses(run) == dict.fromkeys(STAGES, "waiting")
        run.lock("sft").write_text("")  # as on a full disk
        assert statuses(run) == {"sft": "going", "reward": "waiting", "ppo": "waiting", "evaluate": "waiting"}
    assert holder(run.root / "absent") is None


def test_two_stages_are_going_at_once_and_what_is_read_is_not(begun: tuple[LoadedConfig, RunDirectory]) -> None:
    loaded, run = begun
    with run.locked("sft", warn=print), run.locked("reward", warn=print):
        assert statuses(run) == {"sft": "going", "reward": "going", "ppo": "waiting", "evaluate": "waiting"}
    for stage in ("sft", "reward"):
        publish(stage, loaded, run)
    with run.locked("ppo", reads=["sft", "reward"], warn=print):
        assert statuses(run) == {"sft": "finished", "reward": "finished", "ppo": "going", "evaluate": "waiting"}


def test_what_a_log_says_of_the_last_start(begun: tuple[LoadedConfig, RunDirectory]) -> None:
    _, run = begun
    log(run, "sft", header("sft"))
    assert statuses(run)["sft"] == "starting"
    log(run, "sft", header("sft"), age=3600)
    assert statuses(run)["sft"] == "interrupted"
    log(run, "sft", header("sft") + "sft: starting; not run yet.\n")
    assert statuses(run)["sft"] == "interrupted"
    log(run, "sft", header("sft") + "sft: starting; not run yet.\nsft: stopped as asked\n  -> The same command.\n")
    assert statuses(run)["sft"] == "interrupted"
    log(run, "sft", header("sft") + "rows.jsonl, line 2: the sft stage failed: no text\n  -> Correct it.\n")
    state = read_run(run.root)
    assert state.status == "failed" and "no text" in state.stages["sft"].reason
    for end in ("was killed", "ended (exit code 1) without a word"):  # as `stages.launch` says it
        log(run, "sft", header("sft") + f"a process of the sft stage {end}, as happens\n")
        assert read_run(run.root).stages["sft"].status == "failed", end
    log(run, "sft", header("sft") + "the sft stage failed: once\n" + header("sft"))
    assert statuses(run)["sft"] == "starting"


def test_a_failed_second_attempt_leaves_the_figures_of_the_first(begun: tuple[LoadedConfig, RunDirectory]) -> None:
    loaded, run = begun
    publish("sft", loaded, run)
    log(run, "sft", header("sft") + "the sft stage failed: no memory\n", age=-10)
    stage = read_run(run.root).stages["sft"]
    assert stage.status == "failed" and stage.figures["held_out_loss_after"] == 2.5
    log(run, "sft", header("sft") + "sft: starting\nsft: finished in 2 s, peak memory 1 GB, result in sft.\n", age=-10)
    assert statuses(run)["sft"] == "finished"


def test_a_stage_made_from_a_result_that_was_replaced_is_outdated(tmp_path: Path) -> None:
    loaded = whole_run(tmp_path)
    run = RunDirectory(loaded.config.run_dir)
    publish("sft", loaded, run, files={"other.txt": "another adapter"})
    state = read_run(run.root)
    assert {name: stage.status for name, stage in state.stages.items()} == {
        "sft": "finished",
        "reward": "outdated",
        "ppo": "outdated",
        "evaluate": "outdated",
    }
    assert state.status == "outdated" and "another sft result" in state.stages["ppo"].reason


def test_how_far_a_stage_is(begun: tuple[LoadedConfig, RunDirectory]) -> None:
    _, run = begun
    with MetricsWriter(run.metrics("sft")) as writer:
        writer.write(3, {"loss": 2.0, "epoch": 0.25})
        writer.write(4, {"eval_loss": 2.0})
    assert read_run(run.root).stages["sft"].done == 0.25


def test_without_a_reward_model_there_is_no_such_stage(tmp_path: Path) -> None:
    data = {kind: {"sources": f"{kind}.jsonl"} for kind in ("instructions", "prompts")}
    path = light_config(tmp_path, data=data, ppo={"rewards": [{"function": "judge.py:score"}]})
    run = RunDirectory.open(load_config(path))
    assert list(read_run(run.root).stages) == ["sft", "ppo", "evaluate"]


# -- damage


def test_figures_that_are_no_numbers_are_gaps(begun: tuple[LoadedConfig, RunDirectory]) -> None:
    _, run = begun
    run.metrics("ppo").parent.mkdir()
    rows = ['{"step": 1, "a": 1.5}', '{"step": 2, "a": NaN}', '{"step": 3, "a": Infinity}', '{"step": 4, "a": null}']
    run.metrics("ppo").write_text("\n".join([*rows, '{"step": 5, "a": 2}', '{"step": 6, "a"']))
    state = read_run(run.root)
    assert [row["a"] for row in state.stages["ppo"].metrics] == [1.5, None, None, None, 2]
    assert state.faults == [], "a line that is being written is no fault"


def test_a_damaged_file_is_named_and_the_rest_is_there(tmp_path: Path) -> None:
    run = RunDirectory(whole_run(tmp_path).config.run_dir)
    metrics = run.metrics("ppo").read_text().splitlines()
    metrics[2] = "\x00\x00 torn"
    metrics[4] = '{"no step": 1}'
    run.metrics("ppo").write_text("\n".join(metrics) + "\n")
    (run.root / "config.json").write_text("{")
    (run.root / "origins.json").write_text("[]")
    (run.root / "run.json").write_bytes(b"\xff\xfe")
    run.summary.write_text('{"seconds": NaN}')
    for stage, name in (("evaluate", "answers.jsonl"), ("reward", "held_out.jsonl")):
        path = run.root / stage / name
        path.write_text(path.read_text().replace("{", "(", 1))
    state = read_run(run.root)
    said = "\n".join(state.faults)
    names = ("ppo.jsonl, line 3", "without a step", "config.json", "origins.json", "run.json", "summary.json")
    for text in (*names, "answers.jsonl, line 1", "held_out.jsonl, line 1"):
        assert text in said, text
    assert len(state.stages["ppo"].metrics) == ROUNDS - 2
    assert (len(state.answers), len(state.held_out)) == (39, 59)
    assert {name: stage.status for name, stage in state.stages.items()} == {
        "sft": "finished",
        "reward": "damaged",
        "ppo": "finished",
        "evaluate": "damaged",
    }


def test_a_damaged_stage_still_shows_what_its_manifest_says(tmp_path: Path) -> None:
    run = RunDirectory(whole_run(tmp_path).config.run_dir)
    (run.stage("sft") / "adapter.txt").write_text("bits flipped")
    edited = json.loads((run.stage("ppo") / "trivet.json").read_text())
    edited["metrics"]["objective/score"] = 99.0
    (run.stage("ppo") / "trivet.json").write_text(json.dumps(edited))
    (run.stage("evaluate") / "trivet.json").write_text("{")
    state = read_run(run.root)
    assert state.status == "damaged"
    assert [state.stages[name].status for name in ("sft", "ppo", "evaluate")] == ["damaged"] * 3
    assert state.stages["sft"].figures and state.stages["ppo"].figures and not state.stages["evaluate"].figures
    assert "adapter.txt" in state.stages["sft"].reason and "edited" in state.stages["ppo"].reason
    # A list of runs reads no adapters: it sees the manifests alone.
    quick = read_run(run.root, with_files=False)
    assert [quick.stages[name].status for name in ("sft", "ppo")] == ["finished", "damaged"]


def test_a_file_that_changes_is_verified_again(tmp_path: Path) -> None:
    run = RunDirectory(whole_run(tmp_path).config.run_dir)
    assert read_run(run.root).status == "finished"
    before = (run.stage("sft") / "adapter.txt").stat()
    (run.stage("sft") / "adapter.txt").write_text("SFT")
    os.utime(run.stage("sft") / "adapter.txt", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert read_run(run.root).status == "damaged"


def test_an_older_run_has_samples_and_no_origins(tmp_path: Path) -> None:
    loaded = load_config(light_config(tmp_path))
    run = RunDirectory.open(loaded)
    for stage in STAGES:
        publish(stage, loaded, run)
    (run.root / "origins.json").unlink()
    state = read_run(run.root)
    assert [row["scores"] for row in state.answers] == [{"gold": {"sft": -1.5, "ppo": 2.0}}]
    assert ("seed", 0, None) in state.settings


def test_further_files_of_pairs_are_found(tmp_path: Path) -> None:
    run = RunDirectory(whole_run(tmp_path).config.run_dir)
    folder = run.judged_pairs("bench")
    folder.mkdir(parents=True)
    (folder / "scored.jsonl").write_text((run.stage("reward") / "held_out.jsonl").read_text())
    (folder / "about.json").write_text('{"file": "bench.jsonl"}')
    (run.judged_pairs("empty")).mkdir()
    (found,) = read_run(run.root).judged
    assert (found.name, len(found.pairs), found.about) == ("bench", 60, {"file": "bench.jsonl"})


# -- where runs are


def test_a_run_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    whole_run(tmp_path / "one", name="first")
    with pytest.raises(RunDirectoryError, match="there is no such folder") as caught:
        read_run(tmp_path / "one" / "frist")
    assert str(tmp_path / "one" / "first") in str(caught.value)
    with pytest.raises(RunDirectoryError, match="there is no run here"):
        read_run(tmp_path)
    with pytest.raises(RunDirectoryError, match="a file, not a run's folder"):
        read_run(tmp_path / "one" / "run.yaml")
    with pytest.raises(RunDirectoryError, match="there is no such folder"):
        find_runs(tmp_path / "absent")


def test_runs_are_found_in_a_folder_and_one_below_the_newest_first(tmp_path: Path) -> None:
    folders = [Path(whole_run(tmp_path / group, name=group).config.run_dir) for group in ("old", "new")]
    (tmp_path / "no-run").mkdir()
    for path in (folders[0].rglob("*"), [folders[0]]):
        for file in path:
            os.utime(file, (1e9, 1e9))
    assert find_runs(tmp_path) == [folders[1], folders[0]]
    assert find_runs(folders[0]) == [folders[0]]


def test_reading_changes_nothing(tmp_path: Path) -> None:
    run = RunDirectory(whole_run(tmp_path).config.run_dir)
    write_samples(run)

    def everything() -> list[tuple[Path, int, int]]:
        return [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(run.root.rglob("*"))]

    before = everything()
    read_run(run.root)
    assert everything() == before
    assert read_manifest(run.stage("sft"), with_files=False) == read_manifest(run.stage("sft"))
