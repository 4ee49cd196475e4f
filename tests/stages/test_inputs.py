"""What a stage's result follows from: each setting that changes it, and none that does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from finished_stages import light_config, publish_all

from pipeline.artifacts import digest
from pipeline.config_file import load_config
from pipeline.errors import ForeignResultError
from pipeline.run_directory import STAGES, RunDirectory
from stages.inputs import find_current, parents_of, stage_inputs

# What a setting changes by itself; the stages after that follow by their parents' digests.
CHANGES = [
    ("seed=7", {"sft", "reward", "ppo", "evaluate"}),
    ("sft.epochs=2", {"sft"}),
    ("sft.log_every=50", set()),
    ("lora.rank=4", {"sft", "reward"}),
    ("reward.calibration_prompts=16", {"reward"}),
    ("reward.start_from=base", {"reward"}),
    ("launch.side_by_side=true reward.start_from=base reward.calibrate_on=base", {"reward"}),
    ("ppo.rollout.batch_size=8", {"reward", "ppo"}),
    ("ppo.rollout.weights=merged", {"reward", "ppo", "evaluate"}),
    ("ppo.rollout.engine=paged", {"reward", "ppo", "evaluate"}),
    ("ppo.temperature=0.5", {"reward", "ppo", "evaluate"}),
    ("ppo.learning_rate=0.5", {"ppo"}),
    ("ppo.checkpoint_every=50", set()),
    ("evaluate.batch_size=8", {"evaluate"}),
    ("data.preferences.fraction=0.5", {"reward"}),
    ("data.prompts.fraction=0.5", {"reward", "ppo", "evaluate"}),
    ("data.instructions.fraction=0.5", {"sft", "evaluate"}),
    ("data.preferences.fraction=1 data.prompts.fraction=1 data.instructions.fraction=1", set()),
    ("data.allow_special_tokens=true", {"sft", "reward", "ppo", "evaluate"}),
    ("base.cache_dir=elsewhere", set()),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = light_config(tmp_path_factory.mktemp("inputs"))
    publish_all(path)
    return path


@pytest.mark.parametrize(("override", "changed"), CHANGES)
def test_a_setting_changes_the_stages_whose_result_follows_from_it(
    finished: Path, override: str, changed: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a relative cache folder is made there
    before, after = load_config(finished).config, load_config(finished, override.split()).config
    run = RunDirectory(before.run_dir)
    found = {
        stage for stage in STAGES if digest(stage_inputs(stage, before, run)) != digest(stage_inputs(stage, after, run))
    }
    assert found == changed


def test_where_a_server_is_changes_no_result(finished: Path) -> None:
    configs = [
        load_config(finished, ["ppo.rollout.engine=vllm", f"ppo.rollout.server=http://{host}:8000"]).config
        for host in ("one", "other")
    ]
    run = RunDirectory(configs[0].run_dir)
    for stage in STAGES:
        one, other = (digest(stage_inputs(stage, config, run)) for config in configs)
        assert one == other, stage


def test_a_reward_model_that_takes_nothing_from_sft_stays_when_sft_changes(finished: Path) -> None:
    apart = ["reward.start_from=base", "reward.calibrate_on=base"]
    for overrides, parents in (([], ("sft",)), (apart[:1], ("sft",)), (apart, ())):
        loaded = load_config(finished, overrides)
        assert parents_of("reward", loaded.config) == parents
        inputs = stage_inputs("reward", loaded.config, RunDirectory(loaded.config.run_dir))
        assert tuple(inputs["parents"]) == parents
        assert parents_of("ppo", loaded.config) == ("sft", "reward")


def test_a_result_whose_figures_were_edited_is_made_again(finished: Path) -> None:
    loaded = load_config(finished)
    run = RunDirectory(loaded.config.run_dir)
    manifest = run.stage("reward") / "trivet.json"
    right = manifest.read_text()
    assert find_current("reward", loaded, run)[0] is not None
    manifest.write_text(right.replace("0.75", "0.95"))
    try:
        assert find_current("reward", loaded, run) == (
            None,
            "its result cannot be used: its content was edited: the checksum does not fit",
        )
    finally:
        manifest.write_text(right)


@pytest.mark.parametrize("whose", ["stray", "newer"])
def test_what_is_not_ours_is_not_replaced(finished: Path, whose: str) -> None:
    loaded = load_config(finished)
    run = RunDirectory(loaded.config.run_dir)
    manifest, stray = run.stage("reward") / "trivet.json", run.stage("reward") / "notes.txt"
    right = manifest.read_text()
    if whose == "stray":
        stray.write_text("mine")
    else:
        manifest.write_text(json.dumps(json.loads(right) | {"manifest_version": 99}))
    try:
        with pytest.raises(ForeignResultError, match="did not write" if whose == "stray" else "newer trivet"):
            find_current("reward", loaded, run)
        assert find_current("reward", loaded, run, force=True)[0] is None
    finally:
        stray.unlink(missing_ok=True)
        manifest.write_text(right)
