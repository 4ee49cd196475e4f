"""Imports run flows -> stages -> pipeline, never back; Prefect stays in flows; nothing starts heavy libraries early."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = ("pipeline", "stages", "flows")
FILES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]
HEAVY = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "prefect")


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, wherever in the file, and the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield node.module or "", node.lineno


def run_python(program: str) -> str:
    """What a program prints in a fresh interpreter that knows the project."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DO_NOT_TRACK": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_after(statement: str) -> set[str]:
    """Which of the heavy libraries a statement loads."""
    return set(run_python(f"import sys\n{statement}\nprint(*[m for m in {HEAVY!r} if m in sys.modules])").split())


def test_the_layers_are_where_they_should_be() -> None:
    assert {path.parent.name for path in FILES} == set(LAYERS)
    assert len(FILES) > 40


def test_imports_run_downwards() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in FILES
        for module, line in imports(path)
        if module.split(".")[0] in LAYERS[LAYERS.index(path.parent.name) + 1 :]
    ]
    assert not wrong


def test_prefect_is_known_to_the_flows_alone() -> None:
    assert not [
        f"{path.relative_to(ROOT)}:{line}"
        for path in FILES
        for module, line in imports(path)
        if module.split(".")[0] == "prefect" and path.parent.name != "flows"
    ]


def test_flows_train_nothing_themselves() -> None:
    training = set(HEAVY) - {"prefect"}
    assert not [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in FILES
        for module, line in imports(path)
        if module.split(".")[0] in training and path.parent.name == "flows"
    ]


def test_no_module_is_called_utils() -> None:
    assert not [path for path in FILES if path.stem in ("utils", "util", "helpers", "common", "misc")]


def test_the_command_starts_without_heavy_libraries() -> None:
    assert loaded_after("import flows.cli") == set()


def test_help_loads_nothing_heavy() -> None:
    program = f"""
import sys
from flows.cli import app
for arguments in (["--help"], ["--version"], ["run", "--help"]):
    try:
        app(arguments)
    except SystemExit as end:
        assert not end.code, end
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    assert not loaded, (arguments, loaded)
"""
    assert "evaluate" in run_python(program)


def test_what_the_parent_process_needs_is_light() -> None:
    modules = (
        "pipeline.datasets, stages.inputs, stages.launch, stages.command, stages.judge_pairs, flows.doctor,"
        " flows.summary, flows.server, flows.report, flows.runs, flows.judging, flows.learning_curve, flows.chat,"
        " flows.generating, flows.lm_tasks, stages.lm_tasks,"
        " flows.exporting, pipeline.finished_run, pipeline.base_license, stages.export, stages.answer_file"
    )
    assert loaded_after(f"import {modules}") == set()


def test_the_flow_loads_prefect_but_no_torch() -> None:
    assert loaded_after("import flows.rlhf") == {"prefect"}


def test_the_supervisor_needs_the_standard_library_alone() -> None:
    outside = {name.split(".")[0] for name, _ in imports(ROOT / "stages" / "supervisor.py")} - sys.stdlib_module_names
    assert not outside


# What runs code that it finds in a file. `exec` has one place: the user's own functions.
_PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
_LOADERS = {"torch.load", "torch.save", "np.load", "numpy.load", "pd.read_pickle", "pandas.read_pickle", "eval"}
_UNSAFE_YAML = {"yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.Loader", "yaml.UnsafeLoader"}


def called(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """Every dotted name that stands in a file, with its place."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Name, ast.Attribute)):
            yield ast.unparse(node), node


def test_no_pickle_is_read_or_written() -> None:
    wrong = [f"{path.name}:{line}" for path in FILES for name, line in imports(path) if name.split(".")[0] in _PICKLES]
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            options = node.keywords if isinstance(node, ast.Call) else []
            wrong += [f"{path.name}:{option.value.lineno}" for option in options if option.arg == "allow_pickle"]
        forbidden = _LOADERS | _UNSAFE_YAML | (set() if path.name == "functions.py" else {"exec"})
        wrong += [f"{path.name}:{getattr(node, 'lineno', 0)}" for name, node in called(path) if name in forbidden]
    assert not wrong


def test_a_model_is_loaded_from_safetensors_or_gguf_alone() -> None:
    """Whatever reads a model's weights says so; the rest reads configs and tokenizers."""
    seen = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained"):
                source = ast.unparse(node.func).removesuffix(".from_pretrained")
                if source in ("AutoTokenizer", "LoraConfig"):
                    continue
                options = {option.arg: ast.unparse(option.value) for option in node.keywords}
                assert options.get("use_safetensors") == "True" or path.name == "base_files.py", ast.unparse(node)
                seen.append((path.name, source, "use_safetensors" in options))
    assert ("base_model.py", "AutoModelForCausalLM", True) in seen
    assert sum(not safe for _, _, safe in seen) == 1, "only the reader of GGUF files, which cannot hold a pickle"


def test_every_module_says_what_it_is() -> None:
    assert not [path for path in FILES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
