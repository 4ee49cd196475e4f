"""Reward functions are the user's code: whatever they do wrong is named, with the place."""

from __future__ import annotations

import textwrap

import pytest
import torch
from tiny_ppo import prompts

from pipeline.config import RewardSource
from pipeline.errors import RewardFunctionError
from pipeline.records import Origin, Prompt
from pipeline.rewards import Calibration, RewardFunction, RewardSum

SOURCE = """
def length(prompts, completions, **columns):
    return [len(text) for text in completions]

def echo(prompts, completions, word):
    return [float(text == found) for text, found in zip(completions, word)]

def nan_on_bad(prompts, completions, **columns):
    return [float("nan") if text == "bad" else 0 for text in completions]

def too_few(prompts, completions, **columns):
    return [1.0][: len(completions) - 1]

def raising(prompts, completions, **columns):
    raise KeyError("nothing here")

def words(prompts, completions, **columns):
    return list(completions)

def nothing(prompts, completions, **columns):
    return None

sees = []
def remember(prompts, completions, **columns):
    sees.append((prompts, completions, columns))
    return sees and [0.0] * len(prompts)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "judge.py"
    path.write_text(textwrap.dedent(SOURCE))
    return path


def asked(count: int) -> list[Prompt]:
    return [Prompt(f"prompt {row}", Origin("words.jsonl", row + 1), {"word": "ab"}) for row in range(count)]


def test_a_function_gets_prompts_completions_and_columns(file):
    assert RewardFunction(f"{file}:length")(asked(2), ["abc", ""]) == [3.0, 0.0]
    assert RewardFunction(f"{file}:echo")(asked(2), ["ab", "x"]) == [1.0, 0.0]
    remember = RewardFunction(f"{file}:remember")
    mixed = [Prompt("plain", Origin("a", 1), {"k": 1}), prompts(1)[0]]
    remember(mixed, ["x", "y"])
    seen = remember._function.__globals__["sees"][-1]
    assert seen == (["plain", [{"role": "user", "content": "sun"}]], ["x", "y"], {"k": [1, None]})


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nan_on_bad", r"returned nan for the response 'bad' to words\.jsonl, row 2"),
        ("too_few", "returned 1 numbers for 2 responses"),
        ("raising", "failed: KeyError: 'nothing here'"),
        ("words", "failed: ValueError"),
        ("nothing", "failed: TypeError"),
        ("echoes", "there is no reward function 'echoes'"),
    ],
)
def test_what_a_function_does_wrong_is_named_with_its_place(file, name, problem):
    with pytest.raises(RewardFunctionError, match=problem) as caught:
        RewardFunction(f"{file}:{name}")(asked(2), ["ok", "bad"])
    assert caught.value.where is not None and str(file) in caught.value.where


def test_a_file_that_cannot_be_imported_is_named_with_its_line(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import os\nimport no_such_module_here\n")
    with pytest.raises(RewardFunctionError, match="cannot be imported: ModuleNotFoundError") as caught:
        RewardFunction(f"{path}:anything")
    assert caught.value.where == f"{path}, line 2"
    with pytest.raises(RewardFunctionError, match="cannot be read"):
        RewardFunction(f"{tmp_path / 'absent.py'}:anything")


def test_a_probe_finds_the_fault_before_a_model_is_loaded(file):
    sources = [RewardSource(function=f"{file}:raising"), RewardSource()]
    with pytest.raises(RewardFunctionError, match="nothing here"):
        RewardSum(sources, model_scores=None).probe(asked(3))
    RewardSum([RewardSource(function=f"{file}:length")], model_scores=None).probe(asked(1))


def test_the_sum_weighs_its_terms_and_reports_them_unweighted(file):
    sources = [RewardSource(weight=2.0), RewardSource(function=f"{file}:length", weight=-0.5)]
    total_B, terms = RewardSum(sources, model_scores=lambda sequences: torch.tensor([1.0, -3.0]))(
        asked(2), ["abcd", "ab"], [(1, 2), (3, 4)]
    )
    assert total_B.tolist() == [2 * 1 - 0.5 * 4, 2 * -3 - 0.5 * 2]
    assert {name: term.tolist() for name, term in terms.items()} == {"model": [1.0, -3.0], "length": [4.0, 2.0]}


def test_calibrated_scores_have_mean_0_and_variance_1():
    raw_B = 40 + 3 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    scores_B = Calibration.fit(raw_B).apply(raw_B).double()
    assert float(scores_B.mean()) == pytest.approx(0, abs=1e-4)  # float32 at 40: 40 * 2**-24 * gain
    assert float(scores_B.var(correction=0)) == pytest.approx(1, abs=1e-4)
    assert torch.equal(scores_B.argsort(), raw_B.argsort())


def test_scores_that_do_not_vary_are_only_shifted():
    calibration = Calibration.fit(torch.full((5,), 7.0))
    assert calibration.gain == 1.0 and calibration.apply(torch.tensor([7.0, 9.0])).tolist() == [0.0, 2.0]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("import sys; sys.exit(4)", "the reward function failed: SystemExit: 4"),
        ("return [1.0]", "Return a list of one number for every response"),
    ],
)
def test_a_reward_function_that_exits_or_miscounts_is_told_what_to_do(tmp_path, body, expected):
    (tmp_path / "judge.py").write_text(f"def judge(prompts, completions):\n    {body}\n")
    prompts = [Prompt("a", Origin("s", 1)), Prompt("b", Origin("s", 2))]
    with pytest.raises(RewardFunctionError, match=expected):
        RewardFunction(f"{tmp_path}/judge.py:judge").probe(prompts)
