"""`trivet generate`: every format in, an answer a line out, the same bytes after an interruption."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from typer.testing import CliRunner, Result
from usable_run import usable_run

from flows.cli import app
from pipeline import generation
from pipeline.config import DataSettings
from pipeline.config_file import LoadedConfig
from pipeline.datasets import load_instructions
from pipeline.errors import DataError
from pipeline.finished_run import open_run
from pipeline.progress import _view_for_this_process
from pipeline.records import Message
from stages.answer_file import read_prompts, with_system

ROOT = Path(__file__).parents[2]
WORDS = ("sun", "a long winter", "sky", "an old oak in the yard", "elm", "fox", "owl and bee")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedConfig:
    return usable_run(tmp_path_factory.mktemp("generate"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": [{"role": "user", "content": word}], "word": word} for word in WORDS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trivet(*arguments: str | Path | int) -> Result:
    _view_for_this_process.cache_clear()  # each call has streams of its own
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def generate(loaded: LoadedConfig, source: Path | str, output: Path, *more: str | int) -> list[dict[str, Any]]:
    result = trivet("generate", loaded.config.run_dir, source, output, "--tokens", 8, *more)
    assert result.exit_code == 0, result.output
    return read(output)


def read(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_every_prompt_is_answered_by_everyone(loaded: LoadedConfig, source: Path, tmp_path: Path) -> None:
    rows = generate(loaded, source, tmp_path / "out.jsonl", "--who", "policy", "--who", "base", "-n", 2, "--seed", 3)
    assert [(row["columns"]["word"], row["role"], row["answer"]) for row in rows] == [
        (word, who, number) for word in WORDS for who in ("policy", "base") for number in (0, 1)
    ]
    assert all(row["tokens"] <= 8 and row["logprob"] < 0 and row["seed"] == 3 for row in rows)
    assert rows[0]["source"] == f"{source}, row 1"
    twice = zip(rows[::2], rows[1::2], strict=True)
    assert sum(one["completion"] != other["completion"] for one, other in twice) > len(WORDS)
    assert not list(tmp_path.glob(".*")), "what was kept on the way is gone"


def test_the_batch_changes_nothing_and_the_seed_does(loaded: LoadedConfig, source: Path, tmp_path: Path) -> None:
    said = [
        [row["completion"] for row in generate(loaded, source, tmp_path / f"{name}.jsonl", *options)]
        for name, options in (
            ("a", ()),
            ("b", ("--batch-tokens", 1)),
            ("c", ("--seed", 1)),
            ("d", ("--weights", "adapter")),
        )
    ]
    assert said[0] == said[1] and said[0] != said[2]
    assert said[0] == said[3], "in float32 merged weights sample the same"


def test_greedy_answers_need_no_seed(loaded: LoadedConfig, source: Path, tmp_path: Path) -> None:
    said = [
        [
            row["completion"]
            for row in generate(loaded, source, tmp_path / f"{seed}", "--temperature", 0, "--seed", seed)
        ]
        for seed in (0, 1)
    ]
    assert said[0] == said[1]


def test_the_answers_are_instruction_data(loaded: LoadedConfig, source: Path, tmp_path: Path) -> None:
    generate(loaded, source, tmp_path / "out.jsonl")
    data = DataSettings.model_validate({"instructions": {"sources": str(tmp_path / "out.jsonl")}})
    split = load_instructions(data)
    assert {row.prompt for row in [*split.train, *split.held_out]} <= {(Message("user", word),) for word in WORDS}


def write_formats(folder: Path) -> dict[str, str]:
    rows = [{"prompt": word, "word": word} for word in WORDS]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "b.json").write_text(json.dumps(rows))
    with (folder / "c.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "word"])
        writer.writeheader()
        writer.writerows(rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "d.parquet")
    (folder / "e.py").write_text(f"def rows():\n    return {rows!r}\n")
    return {name: str(folder / name) for name in ("a.jsonl", "b.json", "c.csv", "d.parquet")} | {
        "function": str(folder / "e.py:rows")
    }


def test_every_kind_of_source_is_read(tmp_path: Path) -> None:
    for name, path in write_formats(tmp_path).items():
        prompts, dropped = read_prompts(path)
        assert [prompt.prompt for prompt in prompts] == list(WORDS), name
        assert not dropped and prompts[0].columns == {"word": "sun"}


def test_one_prompt_and_equal_prompts_are_answered_too(loaded: LoadedConfig, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"instruction": "sun"}\n')
    assert len(generate(loaded, tmp_path / "one.jsonl", tmp_path / "one.out")) == 1
    (tmp_path / "two.jsonl").write_text('{"prompt": "sun"}\n{"prompt": "sun"}\n')
    assert len(generate(loaded, tmp_path / "two.jsonl", tmp_path / "two.out")) == 2


def test_what_cannot_be_answered_is_counted(loaded: LoadedConfig, tmp_path: Path) -> None:
    texts = ["sun", " ", "forge <|im_end|> this", "long " * 300]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    result = trivet("generate", loaded.config.run_dir, tmp_path / "in.jsonl", tmp_path / "out", "--tokens", 4)
    assert result.exit_code == 0, result.output
    for said in (
        "1 rows were not answered: empty",
        "special token",
        "longer than the base reads (1024 tokens",
        "1 answers",
    ):
        assert said in result.output
    assert [row["prompt"] for row in read(tmp_path / "out")] == ["sun"]


def test_a_system_turn_stands_before_those_without_one() -> None:
    asked = (Message("user", "x"),)
    assert with_system(asked, "s") == (Message("system", "s"), *asked)
    assert with_system((Message("system", "own"), *asked), "s")[0].content == "own"
    assert with_system("plain", "s") == "plain"


def test_bad_input_is_told_before_a_model_is_loaded(
    loaded: LoadedConfig, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import stages.answering

    monkeypatch.setattr(stages.answering, "load_base", lambda *_: pytest.fail("the base is loaded"))
    there = tmp_path / "there"
    there.write_text("mine")
    (tmp_path / "words.jsonl").write_text('{"word": "sun"}\n')
    cases = [
        ((tmp_path / "absent.jsonl", tmp_path / "out"), "there is no such file"),
        ((tmp_path / "words.jsonl", tmp_path / "out"), "the columns fit no known format: word"),
        ((source, there), "there is such a file already"),
        ((source, tmp_path), "a folder lies where the answers should go"),
        ((source, there / "below"), "cannot write: a file lies where a folder should be"),
        ((source, tmp_path / "out", "--who", "nobody"), "nobody is called 'nobody'"),
        ((source, tmp_path / "out", "--weights", "half"), "there are no 'half' weights"),
    ]
    for arguments, problem in cases:
        result = trivet("generate", loaded.config.run_dir, *arguments)
        assert result.exit_code == 2 and problem in result.stderr, (problem, result.output)
    assert there.read_text() == "mine" and not (tmp_path / "out").exists()


def test_an_adapter_that_was_edited_is_refused(tmp_path: Path, source: Path) -> None:
    loaded = usable_run(tmp_path, ("sft", "reward", "ppo"))
    weights = Path(loaded.config.run_dir) / "ppo" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    result = trivet("generate", loaded.config.run_dir, source, tmp_path / "out", "--who", "policy")
    assert result.exit_code == 2
    assert "the adapter cannot be used" in result.stderr and "is not the one that the stage wrote" in result.stderr
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(tmp_path: Path) -> None:
    loaded = usable_run(tmp_path, ("sft",))
    weights = Path(loaded.config.base.model) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(Exception, match="than the one that sft was trained on"):
        open_run(loaded.config.run_dir)


def test_a_source_without_prompts_is_told(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": ""}\n')
    with pytest.raises(DataError, match="no row holds a prompt to answer: 1 empty"):
        read_prompts(str(tmp_path / "in.jsonl"))


def test_an_interrupted_start_goes_on_and_ends_with_the_same_bytes(
    loaded: LoadedConfig, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal in the middle of it, from outside; then the same command."""
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    options = ("--tokens", "64", "-n", "12", "--batch-tokens", "1")
    assert trivet("generate", loaded.config.run_dir, source, whole, *options).exit_code == 0
    command = [sys.executable, "-m", "flows.cli", "generate", loaded.config.run_dir, str(source), str(cut), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    kept, deadline = tmp_path / ".cut.jsonl.parts", time.monotonic() + 120
    while len(list(kept.glob("*.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and "The same command goes on" in said, said
    done = len(list(kept.glob("*.json")))
    assert 3 <= done < 12 * len(WORDS) and not cut.exists()
    sample, sampled = generation.generate, []

    def counting(*arguments: Any, **options: Any) -> Any:
        sampled.append(1)
        return sample(*arguments, **options)

    monkeypatch.setattr(generation, "generate", counting)
    assert trivet("generate", loaded.config.run_dir, source, cut, *options, "--seed", 0).exit_code == 0
    assert cut.read_bytes() == whole.read_bytes()
    assert len(sampled) == 12 * len(WORDS) - done
    assert not kept.exists()
