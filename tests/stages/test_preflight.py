"""Faults of later stages are found before the first one starts."""

from __future__ import annotations

import pytest
from tiny_models import tiny_config

from pipeline.errors import BaseModelError, ConfigError, DataError, RewardFunctionError
from stages.preflight import check, require_good_input

FAULTS = [
    ("evaluate.gold=nope.py:f", RewardFunctionError, "nope.py"),
    ("evaluate.gold=tiny_data.py:absent", RewardFunctionError, "absent"),
    ("ppo.rewards=[{function: tiny_data.py:absent}]", RewardFunctionError, "absent"),
    ("reward.trl={no_such_option: 1}", ConfigError, "no_such_option"),
    ("launch.accelerate_config=nope.yaml", ConfigError, "nope.yaml"),
    ("base.chat_template=nope.jinja", BaseModelError, "nope.jinja"),
    ("data.preferences.sources=[nope.jsonl]", DataError, "nope.jsonl"),
    ("data.prompts.sources=[nope.jsonl]", DataError, "nope.jsonl"),
]


@pytest.mark.parametrize(("override", "kind", "named"), FAULTS)
def test_each_fault_is_named_by_its_own_kind_of_error(tmp_path, override, kind, named):
    with pytest.raises(kind) as caught:
        check(tiny_config(tmp_path, override))
    assert named in str(caught.value)


def test_a_gold_function_that_returns_nan_is_found(tmp_path):
    (tmp_path / "judge.py").write_text("def judge(prompts, completions, **columns):\n    return [float('nan')] * 2\n")
    with pytest.raises(RewardFunctionError, match="nan"):
        check(tiny_config(tmp_path, "evaluate.gold=judge.py:judge"))


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
