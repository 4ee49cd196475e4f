"""docs/using.md: its commands run on a tiny run, and its Python too."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner
from usable_run import usable_run

from flows.chat import HELP
from flows.cli import app
from pipeline.finished_run import open_run
from pipeline.progress import _view_for_this_process
from stages.export import EXPORT

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "using.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)


def commands() -> list[list[str]]:
    """Every command of `trivet`, but for the upload, which test_hub.py runs."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("trivet ")]
    words = [shlex.split(line, comments=True) for line in lines]
    return [found for found in words if "--push-to-hub" not in found]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/mine, prompts.jsonl and a converter to GGUF, as the docs call them."""
    folder = tmp_path_factory.mktemp("docs")
    usable_run(folder, run_dir=str(folder / "runs" / "mine"))
    (folder / "prompts.jsonl").write_text('{"prompt": "sun"}\n{"prompt": "sea"}\n')
    (folder / "llama.cpp").mkdir()
    shutil.copyfile(ROOT / "tests" / "gguf_converter.py", folder / "llama.cpp" / "convert_hf_to_gguf.py")
    return folder


def test_the_commands_do_what_they_say(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    found = commands()
    assert [words[1] for words in found].count("chat") == 3 and len(found) >= 9
    for words in found:
        _view_for_this_process.cache_clear()
        said = "sun\n/help\n" if words[1] == "chat" else None
        result = CliRunner().invoke(app, words[1:], input=said)
        assert result.exit_code == 0, (words, result.output, result.exception)
    assert len((place / "answers.jsonl").read_text().splitlines()) == 2
    rows = [json.loads(line) for line in (place / "both.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 4
    columns = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", DOCS, re.MULTILINE)[:6])))
    assert rows[0].keys() <= columns | {"columns"} and columns - rows[0].keys() <= {"columns"}
    forms = {json.loads(path.read_text())["form"] for path in (place / "out").glob(f"*/{EXPORT}")}
    assert forms == {"adapter", "merged", "requantized", "gguf"}


def test_the_python_runs_as_it_stands(place: Path) -> None:
    """With the base's path put in, which only the reader knows; in a folder where `trivet` is not."""
    found = open_run(place / "runs" / "mine")
    (program,) = blocks("python")
    if not (place / "out" / "adapter").exists():
        result = CliRunner().invoke(app, ["export", str(place / "runs/mine"), "ppo", str(place / "out/adapter")])
        assert result.exit_code == 0, result.output
    program = program.replace("path/or/hub-id/of/the/base", found.config.base.model)
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=place,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    assert len(answers) == 3 and len(set(answers)) == 3, "three adapters, three answers"


def test_options_and_commands_that_are_named_exist() -> None:
    options: set[str] = set()
    for command in app.registered_commands:
        name = command.name or getattr(command.callback, "__name__", "")
        output = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "300"}).output
        options |= set(re.findall(r"--[a-z-]+", output))
    ours = "\n".join(line for block in blocks("bash") for line in block.splitlines() if line.startswith("trivet"))
    named = set(re.findall(r"--[a-z-]+", ours)) | {"--turns", "--plain", "--batch-tokens", "--public"}
    assert named <= options
    for word in re.findall(r"`(/\w+)`", DOCS):
        assert word in HELP, word
