"""A reward model judged on further files of pairs: what is read, in which form, and what comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_stages import light_config, publish_all
from rich.console import Console
from tiny_models import tiny_config
from typer.testing import CliRunner

import stages.reward as reward
import stages.sft as sft
from flows.cli import app
from flows.judging import split_arguments, table_of
from pipeline.base_model import load_base
from pipeline.config_file import LoadedConfig
from pipeline.errors import ConfigError, DataError
from pipeline.records import Comparison, Message, Origin
from pipeline.roles import Roles
from pipeline.run_directory import RunDirectory
from pipeline.scored_pairs import SCORED, parse_pair, read_scored
from pipeline.scoring import score_rewards
from stages.judge_pairs import as_learnt, judge, learnt_conversations, read_files


def bench_rows(count: int = 24) -> list[dict[str, Any]]:
    """Rows as RewardBench has them: plain texts, and what subset they belong to."""
    return [
        {
            "prompt": f"Say the word number {number}.",
            "chosen": f"It is word {number}!",
            "rejected": "zz" * (1 + number % 5),
            "subset": ("chat", "safety", "code")[number % 3],
        }
        for number in range(count)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> LoadedConfig:
    """A run whose reward model has learnt conversations, a little."""
    loaded = tiny_config(tmp_path_factory.mktemp("judge"))
    for stage in (sft, reward):
        stage.run(loaded, RunDirectory.open(loaded))
    return loaded


# -- what is judged


def test_rows_files_and_names(tmp_path: Path) -> None:
    path = write(
        tmp_path / "reward.bench.jsonl", [*bench_rows(6), bench_rows(6)[0], {**bench_rows(1)[0], "chosen": ""}]
    )
    (found,) = read_files([str(path)])
    assert (found.name, len(found.comparisons)) == ("reward", 6)
    assert [pair.origin.row for pair in found.comparisons] == [1, 2, 3, 4, 5, 6], "nothing is held out"
    assert sum(found.dropped.values()) == 2
    assert found.comparisons[0].columns["subset"] == "chat"
    (limited,) = read_files([f"{{path: {path}, limit: 3}}"])
    assert len(limited.comparisons) == 3


def test_sources_that_are_none_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", bench_rows())
    (tmp_path / "b").mkdir()
    other = write(tmp_path / "b" / "a.json.jsonl", bench_rows())
    with pytest.raises(ConfigError, match="would both be called 'a'"):
        read_files([str(path), str(other)])
    with pytest.raises(ConfigError, match="names no data"):
        read_files(["{path: a.jsonl, splt: test}"])
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        read_files([str(tmp_path / "absent.jsonl")])
    with pytest.raises(DataError, match="fit no known format"):
        read_files([str(write(tmp_path / "c.jsonl", [{"question": "a", "answer": "b"}]))])


def test_plain_text_takes_the_form_that_was_learnt() -> None:
    plain = Comparison("Why?", "So.", "No.", Origin("f", 1))
    talk = Comparison(
        (Message("user", "Why?"),), (Message("assistant", "So."),), (Message("assistant", "No."),), Origin("f", 1)
    )
    assert as_learnt([plain, talk], conversations=True) == [talk, talk]
    assert as_learnt([plain, talk], conversations=False) == [plain, talk]


def test_files_and_overrides_are_told_apart(tmp_path: Path) -> None:
    odd = write(tmp_path / "a=b.jsonl", bench_rows(1))
    arguments = ["bench.jsonl", "reward.microbatch_size=2", str(odd), "{path: x, split: y}", "allenai/reward-bench"]
    files, overrides = split_arguments(arguments)
    assert overrides == ["reward.microbatch_size=2"]
    assert files == ["bench.jsonl", str(odd), "{path: x, split: y}", "allenai/reward-bench"]


# -- what comes out


def test_every_pair_is_scored_by_the_run_s_reward_adapter(trained: LoadedConfig, tmp_path: Path) -> None:
    run = RunDirectory(trained.config.run_dir)
    assert learnt_conversations(run) is True
    rows = [*bench_rows(), {"prompt": "long", "chosen": "x" * 200, "rejected": "y", "subset": "chat"}]
    files = read_files([str(write(tmp_path / "bench.jsonl", rows))])
    (folder,) = judge(trained, files, max_length=128)
    assert folder == run.judged_pairs("bench")
    pairs, faults = read_scored(folder / SCORED)
    assert faults == [] and [pair.row for pair in pairs] == list(range(1, 25))
    about = json.loads((folder / "about.json").read_text())
    assert about["dropped"] == {"longer than 128 tokens": 1} and about["pairs"] == 24
    assert about["as_conversations"] is True and about["file"].endswith("bench.jsonl")
    # By hand, one at a time: a user's question and an assistant's answer.
    roles = Roles(load_base(trained.config.base, "cpu"))
    roles.add_from("reward", run.stage("reward"))
    for pair, row in zip(pairs[:4], rows[:4], strict=True):
        prompt = (Message("user", row["prompt"]),)
        for score, answer in ((pair.score_chosen, row["chosen"]), (pair.score_rejected, row["rejected"])):
            ids = roles.base.chat.example(prompt, (Message("assistant", answer),)).ids
            assert score == pytest.approx(float(score_rewards(roles, [ids], max_tokens=1)), abs=1e-4)
        assert pair.columns == {"subset": row["subset"]}
    # Again, and on another file: each result keeps to its own folder.
    before = (folder / SCORED).read_bytes()
    judge(trained, [*files, *read_files([str(write(tmp_path / "other.jsonl", bench_rows(4)))])])
    assert len(read_scored(folder / SCORED)[0]) == 25, "the long one is short enough by default"
    assert (folder / SCORED).read_bytes() != before
    assert len(read_scored(run.judged_pairs("other") / SCORED)[0]) == 4
    assert torch.is_grad_enabled()


def test_pairs_that_are_all_too_long_are_an_error(trained: LoadedConfig, tmp_path: Path) -> None:
    files = read_files([str(write(tmp_path / "bench.jsonl", bench_rows()))])
    with pytest.raises(DataError, match="no pair has at most 8 tokens"):
        judge(trained, files, max_length=8)


def test_the_command_prints_accuracy_by_subset_and_fills_the_report(trained: LoadedConfig, tmp_path: Path) -> None:
    """The whole command in processes of its own, as a user starts it."""
    left_out = [
        {"prompt": "p", "chosen": "same", "rejected": "same", "subset": "chat"},
        {"prompt": "long", "chosen": "x" * 3000, "rejected": "y", "subset": "chat"},
    ]
    path = write(tmp_path / "mybench.jsonl", [*bench_rows(), *left_out])
    result = CliRunner().invoke(app, ["judge-pairs", str(trained.path), str(path), "reward.microbatch_size=4"])
    assert result.exit_code == 0, result.output
    run = RunDirectory(trained.config.run_dir)
    pairs, _ = read_scored(run.judged_pairs("mybench") / SCORED)
    wins = sum(pair.lead > 0 for pair in pairs)
    for text in ("mybench", "chat", "safety", "code", "all pairs", f"{wins / 24:.3f}", "mean of the subsets"):
        assert text in result.stdout, text
    about = json.loads((run.judged_pairs("mybench") / "about.json").read_text())
    assert sum(about["dropped"].values()) == 2
    reasons = ", ".join(f"1 {reason}" for reason in sorted(about["dropped"]))
    assert f"mybench: rows left out: {reasons}." in result.stdout
    page = run.report.read_text()
    assert "mybench.jsonl" in page and "safety" in page
    assert "--pairs=" in (run.root / "logs" / "judge_pairs.log").read_text()


def test_faults_are_found_before_a_model_is_loaded(tmp_path: Path) -> None:
    loaded = publish_all(light_config(tmp_path))
    run = ["judge-pairs", str(loaded.path)]
    for arguments, said in (
        ([str(tmp_path / "absent.jsonl")], "absent.jsonl"),
        (["seed=1"], "no file of pairs is named"),
    ):
        result = CliRunner().invoke(app, [*run, *arguments])
        assert result.exit_code == 2 and said in result.stderr, result.output
    bare = light_config(tmp_path / "bare")
    result = CliRunner().invoke(app, ["judge-pairs", str(bare), str(write(tmp_path / "a.jsonl", bench_rows()))])
    assert result.exit_code == 2 and "there is no finished stage here" in result.stderr


def test_the_table_weighs_subsets_equally() -> None:
    rows = [(1.0, "a"), (1.0, "a"), (-1.0, "a"), (-1.0, "b")]
    pairs = [
        parse_pair(
            {
                "source": "f",
                "row": number,
                "score_chosen": lead,
                "score_rejected": 0.0,
                "characters_chosen": 2,
                "characters_rejected": 1,
                "columns": {"subset": subset},
            }
        )
        for number, (lead, subset) in enumerate(rows)
    ]
    console = Console(width=100, record=True)
    console.print(table_of("bench", pairs))
    said = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "a 3 0.667 [0.208, 0.939] 1.000" in said
    assert any(line.startswith("all pairs 4 0.500") for line in said)
    assert any(line.startswith("mean of the subsets 0.333") for line in said)
