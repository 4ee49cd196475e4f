"""Tasks of lm-evaluation-harness: every speaker is asked with its own adapter, and what comes out is read again."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from reported_run import whole_run
from typer.testing import CliRunner, Result
from usable_run import usable_run

import stages.lm_tasks as lm_tasks
from flows.cli import app
from flows.report import render
from flows.report_views import task_rows
from pipeline.artifacts import read_manifest
from pipeline.finished_run import Speaker, open_run
from pipeline.run_directory import RunDirectory
from pipeline.run_state import read_run
from pipeline.task_scores import parse_scores
from stages.answering import ROLE_OF, Speakers

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed (trivet[lm-eval])"
)
CHOICES = ["sun", "sea", "a cat", "owl"]
WHO: tuple[Speaker, ...] = ("base", "sft", "policy")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return RunDirectory(usable_run(tmp_path_factory.mktemp("tasks")).config.run_dir)


def rows(count: int = 24) -> list[dict[str, Any]]:
    return [{"question": f"Word number {n}:", "choices": CHOICES, "answer": n % 4} for n in range(count)]


def own_task(folder: Path) -> Path:
    """A folder with one task, whose rows lie beside it."""
    folder.mkdir()
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    task = {
        "task": "own_words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "words.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 3.0},
    }
    (folder / "own_words.yaml").write_text(yaml.safe_dump(task))
    return folder


def trivet(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["lm-eval", *(str(argument) for argument in arguments)])


@torch.no_grad()
def accuracy_by_hand(speakers: Speakers, who: Speaker) -> float:
    """How often the right choice is the likeliest continuation, a sequence at a time."""
    tokenizer, right = speakers.chat.tokenizer, 0
    for row in rows():
        likelihoods = []
        for choice in row["choices"]:
            before = tokenizer(row["question"], add_special_tokens=False).input_ids
            whole = tokenizer(f"{row['question']} {choice}", add_special_tokens=False).input_ids
            ids = torch.tensor([whole], device=speakers.roles.device)
            with speakers.roles.active(ROLE_OF[who]):
                logprobs = speakers.roles.model(input_ids=ids).logits[0].float().log_softmax(-1)
            said = whole[len(before) :]
            likelihoods.append(sum(float(logprobs[len(before) - 1 + at, token]) for at, token in enumerate(said)))
        right += likelihoods.index(max(likelihoods)) == row["answer"]
    return right / len(rows())


@needs_harness
def test_every_speaker_is_asked_with_its_own_adapter(run: RunDirectory, tmp_path: Path) -> None:
    result = trivet(run.root, "--tasks", "own_words", "--include-path", own_task(tmp_path / "own"))
    assert result.exit_code == 0, result.output
    speakers = Speakers(open_run(run.root), WHO)
    found = {}
    for who in WHO:
        content = json.loads((run.task_scores / f"{who}.json").read_text())
        task = content["tasks"]["own_words"]
        assert (task["rows"], task["version"], task["examples"], task["chat"]) == (24, 3.0, 0, False)
        (metric,) = task["metrics"]
        assert metric["name"] == "acc" and metric["filter"] == "none" and metric["higher_is_better"] is True
        assert metric["value"] == pytest.approx(accuracy_by_hand(speakers, who))
        found[who] = metric["value"]
        assert f"{metric['value']:.3f} ± {metric['error']:.3f}" in result.stdout
        stage = {"base": None, "sft": "sft", "policy": "ppo"}[who]
        assert content["adapter"] == (stage and read_manifest(run.root / stage).digest)
    assert len(set(found.values())) > 1, "somebody answers otherwise"
    (row,) = task_rows(read_run(run.root))
    assert row.task == "own_words" and row.metric == "acc" and not row.outdated
    assert row.values["policy"] in render([read_run(run.root)])


@needs_harness
def test_other_tasks_of_the_same_adapter_stay_and_a_part_stands_apart(run: RunDirectory, tmp_path: Path) -> None:
    folder = own_task(tmp_path / "own")
    task = yaml.safe_load((folder / "own_words.yaml").read_text())
    (folder / "other.yaml").write_text(yaml.safe_dump(task | {"task": "other_words"}))
    for arguments in (["own_words", "--who", "sft"], ["other_words", "--who", "sft", "--limit", "8"]):
        result = trivet(run.root, "--include-path", folder, "--tasks", *arguments)
        assert result.exit_code == 0, result.output
    content = json.loads((run.task_scores / "sft.json").read_text())
    assert {name: task["rows"] for name, task in content["tasks"].items()} == {"own_words": 24, "other_words": 8}
    # Of another adapter nothing is kept.
    content["adapter"] = "another"
    (run.task_scores / "sft.json").write_text(json.dumps(content))
    assert [row.outdated for row in task_rows(read_run(run.root)) if row.task == "other_words"] == [["sft"]]
    trivet(run.root, "--include-path", folder, "--tasks", "other_words", "--who", "sft", "--limit", "8")
    assert set(json.loads((run.task_scores / "sft.json").read_text())["tasks"]) == {"other_words"}


@needs_harness
def test_faults_are_found_before_a_model_is_loaded(run: RunDirectory, tmp_path: Path) -> None:
    folder = own_task(tmp_path / "own")
    for arguments, said in (
        (["--tasks", "own_word", "--include-path", folder], "knows no task 'own_word'\n  -> Did you mean own_words"),
        (["--tasks", ","], "no task is named"),
        (["--tasks", "own_words", "--who", "judge"], "nobody is called 'judge'"),
        (["--tasks", "own_words", "--include-path", tmp_path / "absent"], "there is no such folder"),
    ):
        result = trivet(run.root, *arguments)
        assert result.exit_code == 2 and said in result.stderr, result.output
    (folder / "words.jsonl").unlink()
    result = trivet(run.root, "--tasks", "own_words", "--include-path", folder, "--who", "base")
    assert result.exit_code == 2 and "words.jsonl" in result.stderr, result.output


def test_without_the_harness_the_extra_is_named(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_tasks.importlib.util, "find_spec", lambda name: None)
    result = trivet(run.root, "--tasks", "own_words")
    assert result.exit_code == 2 and "pip install 'trivet[lm-eval]'" in result.stderr


# -- what lies there, whoever wrote it


def scores(adapter: str | None, value: float = 0.5, **more: Any) -> dict[str, Any]:
    metric = {"name": "acc", "filter": "none", "value": value, "error": 0.025, "higher_is_better": True}
    task = {"version": 1.0, "rows": 400, "examples": 5, "chat": False, "metrics": [metric]} | more
    return {"who": "sft", "adapter": adapter, "lm_eval": "0.4.13", "tasks": {"arc_easy": task}}


def test_scores_that_were_asked_alike_stand_side_by_side(tmp_path: Path) -> None:
    run = RunDirectory(whole_run(tmp_path).config.run_dir)
    run.task_scores.mkdir()
    sft, ppo = (read_manifest(run.stage(stage)).digest for stage in ("sft", "ppo"))
    for who, content in (
        ("base", scores(None, 0.25) | {"who": "base"}),
        ("sft", scores(sft)),
        ("policy", scores(ppo, 0.75, examples=0) | {"who": "policy"}),
    ):
        (run.task_scores / f"{who}.json").write_text(json.dumps(content))
    found = {tuple(row.values.values()) for row in task_rows(read_run(run.root))}
    assert found == {("0.250 ± 0.025", "0.500 ± 0.025", "-"), ("-", "-", "0.750 ± 0.025")}
    assert "0.750 ± 0.025" in render([read_run(run.root)])


@pytest.mark.parametrize(
    "content",
    [
        "{",
        '{"who": 3, "tasks": {}}',
        '{"who": "sft"}',
        json.dumps(scores("d", rows="many")),
        json.dumps(scores("d", metrics=[{"value": "high"}])),
        json.dumps(scores("d", metrics=None)),
    ],
)
def test_a_damaged_file_is_named_and_not_fatal(tmp_path: Path, content: str) -> None:
    run = RunDirectory(whole_run(tmp_path).config.run_dir)
    run.task_scores.mkdir()
    (run.task_scores / "sft.json").write_text(content)
    state = read_run(run.root)
    assert not state.tasks and len(state.answers) == 40
    (fault,) = state.faults
    assert "lm_eval/sft.json: cannot be read" in fault and "Not everything could be read" in render([state])


def test_a_file_is_read_as_it_is_written() -> None:
    (score,) = parse_scores(scores("d")).scores
    assert (score.task, score.metric, score.value, score.error, score.rows) == ("arc_easy", "acc", 0.5, 0.025, 400)
