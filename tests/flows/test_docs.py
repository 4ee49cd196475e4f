"""What README and docs/ say can be done as they say it: commands, settings, figures, links and tables.

Every bash block runs in a real bash, in a folder laid out as a user's is. The programs in it are stand-ins that write
down how they were called; the calls are then made in this process, on a tiny model in the place of the real one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from finished_stages import light_config
from mutations import TABLE
from reported_run import whole_run
from tiny_models import tiny_config
from typer.main import get_command
from typer.testing import CliRunner

from flows.cli import app
from pipeline.artifacts import read_manifest
from pipeline.cards import GIB, find_card
from pipeline.config import JudgeSettings, PipelineConfig, RewardSource
from pipeline.config_file import flatten, load_config
from pipeline.metrics import read_metrics
from pipeline.run_directory import RunDirectory
from stages import command, evaluate, ppo, preflight, reward, sft

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN_ELSEWHERE = {"using.md": "tests/flows/test_using_docs.py"}
"""Pages whose commands another test runs."""
COMMAND_PAGES = [page for page in PAGES if page.name not in RUN_ELSEWHERE]
STAGES = {"sft": sft, "reward": reward, "ppo": ppo, "evaluate": evaluate}

DRY = {"run", "sft", "reward", "ppo", "evaluate"}
"""Commands that train: they are run with --dry-run, which loads config, tokenizer, data and functions."""

NOT_RUN = {
    r"trivet up\b": "keeps a server running until it is ended; tests/flows/test_unattended.py runs it",
    r"trivet rollback\b": "needs two promoted versions; tests/pipeline/test_registry.py has them",
    r"trivet (chat|generate|export)\b": "needs minutes for all forms; tests/flows/test_using_docs.py runs them",
    r"trivet learning-curve\b": "trains; tests/flows/test_learning_curve.py runs it",
    r"trivet lm-eval\b|lm_eval ": "needs an extra and the hub's data; tests/stages/test_lm_tasks.py has local ones",
    r"trivet doctor\b": "starts Prefect and asks the hub; tests/flows/test_doctor.py runs its checks",
    r"prefect ": "needs a running server; the help of each command is asked for its options, and"
    " tests/flows/test_prefect_docs.py compares the names of deployments",
    r"make ": "installs and trains; `make -n` shows that the target is there",
    r"python tests/mutations\.py": "breaks the code on purpose, for minutes; its words are looked up in the table",
    r"\S*python benchmarks/": "measures for minutes; its --help is asked for the options",
    r"pip install ": "needs a network; the extra is looked up in pyproject.toml",
    r"cp ": "what it copies is looked up",
    r"vllm |trivet ppo .*engine=vllm": "needs vLLM and a GPU; tests/pipeline/test_engines.py speaks with a server",
    r"tensorboard ": "serves a page until it is ended; tests/pipeline/test_trackers.py reads the events",
}
"""Calls that are not made, and why. What can be known of them without is still checked: `CHECKS`."""


@dataclass(frozen=True)
class Call:
    """A program that a page calls."""

    page: str
    program: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join([self.program, *self.arguments])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


PROGRAMS = (
    "trivet",
    "make",
    "prefect",
    "accelerate",
    "torchrun",
    "python",
    "pip",
    "cp",
    "tensorboard",
    "lm_eval",
    "vllm",
    "srun",
    "scontrol",
)
STAND_IN = """#!{python}
import json, os, subprocess, sys
name = os.path.basename(sys.argv[0])
if name == "srun":
    sys.exit(subprocess.run(sys.argv[1:]).returncode)
if name == "scontrol":
    print("node0\\nnode1")
    sys.exit()
name = sys.argv[0] if ".venv" in sys.argv[0] else name
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
"""


@cache
def calls_of(page: Path, folder: Path) -> tuple[Call, ...]:
    """Run a page's bash blocks one after the other in the folder; the calls that they make."""
    programs, log = folder / "bin", folder / f"{page.stem}.calls"
    for place, names in ((programs, PROGRAMS), (folder / ".venv" / "bin", ("python",))):
        place.mkdir(parents=True, exist_ok=True)
        for name in names:
            (place / name).write_text(STAND_IN.format(python=sys.executable))
            (place / name).chmod(0o755)
    (folder / ".venv" / "bin" / "activate").touch()
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(log)}
    for block in blocks(page, "bash"):
        done = subprocess.run(
            ["bash", "-eu", "-c", block],
            cwd=folder,
            env=environment | {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NODEID": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{page.name}:\n{block}\n{done.stderr}"
    lines = log.read_text().splitlines() if log.exists() else []
    return tuple(Call(page.name, program, tuple(rest)) for program, *rest in map(json.loads, lines))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: configs, data, a tiny model that has been through all stages, and runs to look at."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "configs", folder / "configs")
    settings: dict[str, Any] = {
        "sft": {"batch_size": 16, "microbatch_size": 2, "max_length": 128, "max_steps": 2},
        "reward": {"batch_size": 16, "microbatch_size": 2, "max_length": 128, "max_steps": 2, "calibration_prompts": 8},
        "ppo": {
            "iterations": 2,
            "prompts_per_iteration": 16,
            "minibatch_size": 8,
            "max_new_tokens": 8,
            "microbatch_tokens": 256,
            "held_out": {"every": 1, "prompts": 8},
        },
        "evaluate": {"prompts": 8, "gold": "tiny_data.py:share_of_a", "samples": 2},
        "run_dir": "runs/mine",
    }
    tiny_config(folder / "configs", **settings).path.rename(folder / "configs" / "my.yaml")
    # The configs for real models have rows longer than a tiny base reads; positions are no weights of it.
    shape = folder / "configs" / "llama-base" / "config.json"
    shape.write_text(json.dumps(json.loads(shape.read_text()) | {"max_position_embeddings": 8192}))
    for name in ("my.yaml", "tiny_data.py"):  # prefect.md keeps its config beside prefect.yaml
        shutil.copy(folder / "configs" / name, folder / name)
    pairs = [{"prompt": f"p{n}", "chosen": f"good {n}", "rejected": f"bad {n}", "subset": "s"} for n in range(4)]
    for name in ("bench.jsonl", "probes.jsonl"):
        (folder / name).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for config in (folder / "configs").glob("*.yaml"):
        for source in re.findall(r"\.\./data/([\w.]+)", config.read_text()):
            write_stand_in(folder / "data" / source)
    rated = [{"text": f"a {word} film", "rating": n % 9 - 4} for n, word in enumerate(["good", "bad", "dull"] * 9)]
    (folder / "data" / "sentiment_gold_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rated))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        loaded = load_config(folder / "configs" / "my.yaml")
        for stage in STAGES.values():
            stage.run(loaded, RunDirectory.open(loaded))
    for name in ("other", "quickstart", "a", "b", "c", "sentiment"):
        whole_run(folder / "made-up" / name, name=name)
        (folder / "runs" / name).symlink_to(folder / "made-up" / name / name)
    return folder


def write_stand_in(path: Path) -> None:
    """A file that has the columns of every kind of rows."""
    path.parent.mkdir(exist_ok=True)
    turn = {"prompt": "Say {}.", "completion": "It is {}.", "chosen": "It is {}.", "rejected": "No {}."}
    if path.name.startswith("sft"):
        turn = {key: turn[key] for key in ("prompt", "completion")}
    elif path.name.startswith("prefs"):
        del turn["completion"]
    else:
        turn = {"prompt": turn["prompt"]}
    rows = [{key: text.format(f"{path.stem} {n}") for key, text in turn.items()} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def at_the_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")

    def check_here(loaded: Any, stages: Any, **_: Any) -> None:  # the same check, without a process of its own
        preflight.check(loaded, stages)

    monkeypatch.setattr(preflight, "require_good_input", check_here)
    return place


def substitutes(place: Path, arguments: tuple[str, ...]) -> list[str]:
    """Overrides that put the tiny model in the place of a config's own, whose texts are longer in bytes."""
    if not any(re.search(r"configs/(?!my\.yaml)\w+\.yaml", argument) for argument in arguments):
        return []
    long = ["sft.max_length=4096", "reward.max_length=4096", "ppo.max_prompt_tokens=4096"]
    return [f"base.model={place / 'configs' / 'llama-base'}", "run_dir=runs/dry", *long]


# -- the calls


def all_calls(place: Path) -> Iterator[Call]:
    for page in COMMAND_PAGES:
        yield from calls_of(page, place if page.stem != "your_data" else your_folder(place))


def your_folder(place: Path) -> Path:
    """That of docs/your_data.md, which makes its own files."""
    folder = place / "yours"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def yours(place: Path) -> Path:
    """The folder of docs/your_data.md after its blocks: its config has trained the tiny model on its rows."""
    folder = your_folder(place)
    calls_of(ROOT / "docs" / "your_data.md", folder)
    config = folder / "configs" / "my.yaml"
    text = config.read_text()
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in text
    config.write_text(text.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(place / "configs" / "llama-base")))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        loaded = load_config(config)
        for stage in STAGES.values():
            stage.run(loaded, RunDirectory.open(loaded))
    return folder


SUBSTITUTED = {
    ("allenai/reward-bench, split: filtered", "bench.jsonl"): "is on a hub",
    (", wandb]", "]"): "is an extra that the tests do without",
}
"""What calls name that is not here, what takes its place, and why."""

MADE: set[tuple[Path, str]] = set()
"""Calls that another page makes too are made once."""


def reason_not_to(call: Call) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.match(pattern, str(call))), None)


def test_the_pages_call_what_they_should(place: Path) -> None:
    seen = {call.program for call in all_calls(place)}
    assert {"trivet", "make", "prefect", "torchrun", "python", "cp"} <= seen
    ours = {call.arguments[0] for call in all_calls(place) if call.program == "trivet"}
    assert DRY | {"data", "plan", "report", "show", "runs", "judge-pairs", "up", "promote"} <= ours
    for pattern in NOT_RUN:
        assert any(re.match(pattern, str(call)) for call in all_calls(place)), f"nothing is called like {pattern}"


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=lambda page: page.name)
def test_every_command_of_ours_runs(at_the_place: Path, yours: Path, page: Path) -> None:
    place = yours if page.stem == "your_data" else at_the_place
    os.chdir(place)
    for call in calls_of(page, place):
        if call.program != "trivet" or reason_not_to(call) or (place, str(call)) in MADE:
            continue
        MADE.add((place, str(call)))
        arguments = list(call.arguments)
        for (what, instead), _ in SUBSTITUTED.items():
            arguments = [argument.replace(what, instead) for argument in arguments]
        if arguments[0] in {*DRY, "plan", "data"}:
            arguments += substitutes(at_the_place, call.arguments)
        if arguments[0] in DRY and "--dry-run" not in arguments:
            arguments.append("--dry-run")
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, f"{call}\n{result.output}\n{result.stderr}"


def test_commands_that_are_not_run_are_at_least_parsed(place: Path) -> None:
    commands: Any = get_command(app).commands  # type: ignore[attr-defined]
    parsed = []
    for call in all_calls(place):
        if call.program == "trivet" and reason_not_to(call):
            commands[call.arguments[0]].make_context(call.arguments[0], list(call.arguments[1:]))
            parsed.append(call.arguments[0])
    assert {"up", "rollback", "doctor"} <= set(parsed)


def staged(arguments: tuple[str, ...]) -> None:
    """`-m stages.NAME CONFIG ...` as a dry run."""
    assert arguments[0] == "-m"
    stage = arguments[1].removeprefix("stages.")
    with pytest.raises(SystemExit) as end:
        command.stage_main(stage, STAGES[stage].run, [*arguments[2:], "--dry-run"])  # type: ignore[arg-type]
    assert end.value.code == 0


def test_launchers_take_what_they_are_given(at_the_place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    page = (ROOT / "README.md").read_text()
    in_text = re.findall(r"`accelerate (launch [^`]+)`", page)
    assert in_text
    launched = [Call("README.md", "accelerate", tuple(text.split())) for text in in_text]
    launched += [call for call in all_calls(at_the_place) if call.program in ("accelerate", "torchrun")]
    for call in launched:
        parser = launch_command_parser() if call.program == "accelerate" else get_args_parser()
        options = parser.parse_args(list(call.arguments[1:] if call.program == "accelerate" else call.arguments))
        module = ("-m", options.training_script, *options.training_script_args)
        overrides = substitutes(at_the_place, module)
        staged((*module, *overrides))
    assert "would run" in capfd.readouterr().out
    assert {call.program for call in launched} == {"accelerate", "torchrun"}


@pytest.mark.parametrize("name", sorted({"bench.py", "memory_plan.py", "memory_table.py", "results_table.py"}))
def test_options_of_benchmarks_exist(place: Path, name: str) -> None:
    called = {call for call in all_calls(place) if "benchmarks/" + name in str(call)}
    shown = {option for call in called for option in call.arguments if option.startswith("--")}
    shown |= set(re.findall(r"(--[\w-]+)", " ".join(re.findall(rf"benchmarks/{name} ([^`\n]*)", docs_text()))))
    assert called or f"benchmarks/{name}" in docs_text()
    source = (ROOT / "benchmarks" / name).read_text()
    for option in shown:
        assert f'"{option}"' in source, f"{name} has no {option}"


def docs_text() -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def test_make_targets_exist(place: Path) -> None:
    targets = {call.arguments[0] for call in all_calls(place) if call.program == "make"}
    assert {"demo", "test"} <= targets
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_what_is_copied_exists_and_what_is_installed_is_declared(place: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for call in all_calls(place):
        if call.program == "cp":
            assert (ROOT / call.arguments[0]).exists()
        if call.program == "pip":
            named = [extra for text in call.arguments for extra in re.findall(r"\[([\w,-]+)\]", text)]
            assert named and all(extra in extras for text in named for extra in text.split(","))


def test_words_for_the_mutations_find_some(place: Path) -> None:
    words = [call.arguments[1:] for call in all_calls(place) if call.arguments[:1] == ("tests/mutations.py",)]
    words += [tuple(text.split()) for text in re.findall(r"`python tests/mutations\.py (\w+)`", docs_text())]
    assert words
    for wanted in words:
        assert any(all(word in f"{one.what} {one.tests}" for word in wanted) for one in TABLE), wanted


def test_options_of_prefect_exist(place: Path) -> None:
    """Its help is asked once a command."""
    wanted: dict[tuple[str, ...], set[str]] = {}
    for call in all_calls(place):
        if call.program == "prefect":
            words = [word for word in call.arguments if word != "--no-prompt"]
            verb = tuple(words[:1] if words[0] == "deploy" else words[:2])
            wanted.setdefault(verb, set()).update(word for word in words if word.startswith("-"))
    assert len(wanted) > 3
    for verb, options in wanted.items():
        program = [sys.executable, "-m", "prefect", *verb, "--help"]
        done = subprocess.run(program, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "200"})
        assert done.returncode == 0, f"{verb}: {done.stderr}"
        for option in options:
            assert option in done.stdout, f"prefect {' '.join(verb)} has no {option}"


# -- what stands between the commands


def test_settings_that_are_named_exist(tmp_path: Path) -> None:
    keys = {key for key, _ in flatten(load_config(light_config(tmp_path)).config.model_dump(mode="json"))}
    parents = {".".join(key.split(".")[:end]) for key in keys for end in (1, 2, 3)}
    passed_through = {"sft.trl.neftune_noise_alpha"}
    named = set()
    for page in PAGES:
        for text in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
            named |= set(re.findall(rf"^(?:{'|'.join(PipelineConfig.model_fields)})\.[a-z_]+(?:\.[a-z_]+)*", text))
    named = {name for name in named if not name.endswith((".py", ".json", ".jsonl", ".html", ".md", ".yaml"))}
    listed = {f"ppo.rewards.{name}" for name in RewardSource.model_fields}  # of the entries of lists
    listed |= {f"evaluate.judges.{name}" for name in JudgeSettings.model_fields}
    assert len(named) > 80
    assert not named - keys - parents - passed_through - listed


def test_yaml_blocks_are_settings(tmp_path: Path) -> None:
    path, seen = light_config(tmp_path, sft={"batch_size": 32}, reward={"batch_size": 32}), 0  # for eight processes
    for page in PAGES:
        for block in blocks(page, "yaml"):
            tree = yaml.safe_load(block)
            if isinstance(tree, dict) and set(tree) <= set(PipelineConfig.model_fields):
                load_config(path, [f"{key}={json.dumps(value)}" for key, value in flatten(tree)])
                seen += 1
    assert seen >= 4


def test_figures_of_ppo_that_are_named_are_written(place: Path) -> None:
    figures = {name for row in read_metrics(place / "runs" / "mine" / "metrics" / "ppo.jsonl") for name in row}
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    prefixes = "|".join(sorted({name.partition("/")[0] for name in figures if "/" in name}))
    named = set(re.findall(rf"`((?:{prefixes})/\w+)`", text))
    assert len(named) > 15
    assert named <= figures


def test_links_lead_somewhere() -> None:
    found = 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                found += 1
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
    assert found > 60


def test_every_page_stands_in_the_index() -> None:
    index = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [page.name for page in PAGES[1:] if f"](docs/{page.name})" not in index]


def test_the_largest_bases_follow_from_the_table_of_memory() -> None:
    needs = {}
    for line in (ROOT / "docs" / "memory.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if len(cells) == 6 and cells[1] == "nf4, twice quantized":
            needs[cells[0]] = max(float(cell) for cell in cells[2:])
    assert len(needs) > 5
    table = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8").partition("largest bases: begin")[2]
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in table.splitlines()
        if re.search(r"\dB \|", line)
    ]
    assert len(rows) > 5
    for card, memory, base, most in rows:
        size = find_card(card, where="docs").memory_bytes / GIB
        assert float(memory) == pytest.approx(size, abs=0.05)
        assert (base, float(most)) == max(
            ((name, need) for name, need in needs.items() if need <= size), key=lambda pair: pair[1]
        )


def test_the_data_of_your_data_are_rows_that_train(yours: Path) -> None:
    """The shell of docs/your_data.md writes what it says that it writes, and its judge judges."""
    folder = yours
    for name, keys, count in (
        ("sft", {"messages"}, 12),
        ("preferences", {"prompt", "chosen", "rejected"}, 12),
        ("prompts", {"prompt", "topic"}, 32),
    ):
        rows = [json.loads(line) for line in (folder / "data" / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == count and all(set(row) == keys for row in rows)
    metrics = read_manifest(folder / "runs" / "mine" / "evaluate").metrics
    assert {"gold", "reward_model"} == set(metrics["win_rate"])


def test_a_stand_in_writes_down_how_it_was_called(tmp_path: Path) -> None:
    """The test of the tests: an option that is not there is noticed."""
    page = tmp_path / "page.md"
    page.write_text("```bash\nfor n in 1 2; do\n  trivet runs \\\n    --nope $n\ndone\n```\n")
    calls = calls_of(page, tmp_path)
    assert [str(call) for call in calls] == ["trivet runs --nope 1", "trivet runs --nope 2"]
    result = CliRunner().invoke(app, list(calls[0].arguments))
    assert result.exit_code == 2 and "--nope" in result.stderr
