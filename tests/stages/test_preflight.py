"""Faults of later stages are found before the first one starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from real_runs import ROOT
from tiny_models import tiny_config

from pipeline.errors import BaseModelError, ConfigError, DataError, RewardFunctionError
from pipeline.run_directory import STAGES
from stages.preflight import check, require_good_input

FAULTS = [
    ("evaluate.gold=nope.py:f", RewardFunctionError, "nope.py"),
    ("evaluate.gold=tiny_data.py:absent", RewardFunctionError, "absent"),
    ("ppo.rewards=[{function: tiny_data.py:absent}]", RewardFunctionError, "absent"),
    ("reward.trl={no_such_option: 1}", ConfigError, "no_such_option"),
    ("launch.accelerate_config=nope.yaml", ConfigError, "nope.yaml"),
    ("launch.accelerate_config=fp8.yaml", ConfigError, "mixed_precision is 'fp8'"),
    ("base.chat_template=nope.jinja", BaseModelError, "nope.jinja"),
    ("data.preferences.sources=[nope.jsonl]", DataError, "nope.jsonl"),
    ("data.prompts.sources=[nope.jsonl]", DataError, "nope.jsonl"),
]


TOO_LONG = [
    ("sft", "sft.max_length=1025", "sft.max_length is 1025 tokens, more than the 1024 that the base reads"),
    ("reward", "reward.max_length=1025", "reward.max_length is 1025 tokens"),
    ("reward", "ppo.max_prompt_tokens=1024", "ppo.max_prompt_tokens + ppo.max_new_tokens is"),
    ("ppo", "ppo.max_new_tokens=1024", "ppo.max_prompt_tokens + ppo.max_new_tokens is"),
    ("evaluate", "evaluate.max_new_tokens=1024", "ppo.max_prompt_tokens + evaluate.max_new_tokens is"),
]


@pytest.mark.parametrize(("stage", "override", "said"), TOO_LONG)
def test_lengths_beyond_what_the_base_reads_are_refused(tmp_path: Path, stage: str, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(tiny_config(tmp_path, override), [stage])
    assert said in str(caught.value)


def test_a_stage_that_is_started_by_itself_refuses_them_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stages.sft", str(tiny_config(tmp_path).path), "sft.max_length=1025"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and "sft.max_length is 1025 tokens" in ended.stderr


@pytest.mark.parametrize(("override", "kind", "named"), FAULTS)
def test_each_fault_is_named_by_its_own_kind_of_error(tmp_path, override, kind, named):
    (tmp_path / "fp8.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 2\nmixed_precision: fp8\n")
    with pytest.raises(kind) as caught:
        check(tiny_config(tmp_path, override), STAGES)
    assert named in str(caught.value)


def test_a_gold_function_that_returns_nan_is_found(tmp_path):
    (tmp_path / "judge.py").write_text("def judge(prompts, completions, **columns):\n    return [float('nan')] * 2\n")
    with pytest.raises(RewardFunctionError, match="nan"):
        check(tiny_config(tmp_path, "evaluate.gold=judge.py:judge"), STAGES)


def test_another_process_finds_the_same_and_says_so_as_the_same_error(tmp_path):
    require_good_input(tiny_config(tmp_path), warn=pytest.fail)
    with pytest.raises(DataError, match=r"nope\.jsonl") as caught:
        require_good_input(tiny_config(tmp_path, "data.prompts.sources=[nope.jsonl]"))
    assert caught.value.remedy


def test_what_is_seldom_meant_is_said_and_does_not_stop_the_run(tmp_path):
    (tmp_path / "plain.jsonl").write_text("".join(f'{{"prompt": "word {n}"}}\n' for n in range(8)))
    said: list[str] = []
    require_good_input(tiny_config(tmp_path, "data.prompts.sources=[plain.jsonl]"), warn=said.append)
    assert len(said) == 1 and said[0].startswith("warning: 8 of 8 rows of data.prompts have a plain-text prompt")


def test_a_stage_alone_is_checked_alone(tmp_path: Path) -> None:
    loaded = tiny_config(tmp_path, "data.preferences.sources=[nope.jsonl]", "data.prompts.sources=[nope.jsonl]")
    assert check(loaded, ["sft"]) == []
    for stage in ("reward", "ppo", "evaluate"):
        with pytest.raises(DataError, match=r"nope\.jsonl"):
            check(loaded, [stage])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("distributed_type: MEGATRON_LM\n", "MEGATRON_LM"),
        ("- 1", "is no A"),
    ],
)
def test_an_accelerate_config_that_no_stage_can_follow_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=expected):
        check(tiny_config(tmp_path, "launch.accelerate_config=mine.yaml"), STAGES)
    (tmp_path / "mine.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 2\n")
    assert check(tiny_config(tmp_path, "launch.accelerate_config=mine.yaml"), STAGES) == []
