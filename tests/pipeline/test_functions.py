"""Functions by path: found, told apart, and every way to fail named with its place."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest

from pipeline.errors import DataError, RewardFunctionError
from pipeline.functions import function_digest, load_function


def write(folder: Path, text: str, name: str = "reward.py") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def test_a_function_is_imported_by_path(tmp_path: Path) -> None:
    file = write(tmp_path, "def twice(x):\n    return 2 * x\n")
    assert load_function(f"{file}:twice")(21) == 42


def test_files_of_the_same_name_do_not_take_each_others_place(tmp_path: Path) -> None:
    one = write(tmp_path / "a", "def f():\n    return 1\n", "json.py")
    two = write(tmp_path / "b", "def f():\n    return 2\n", "json.py")
    import json

    assert (load_function(f"{one}:f")(), load_function(f"{two}:f")()) == (1, 2)
    assert sys.modules["json"] is json


def test_a_changed_file_is_imported_again_and_an_unchanged_one_is_not(tmp_path: Path) -> None:
    file = write(tmp_path, "state = []\ndef f():\n    state.append(1)\n    return len(state)\n")
    load_function(f"{file}:f")()
    assert load_function(f"{file}:f")() == 2
    write(tmp_path, "def f():\n    return 'new'\n")
    assert load_function(f"{file}:f")() == "new"


def test_dataclasses_and_pickle_work_in_the_file(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Point:\n    x: int\ndef f():\n    return Point(3)\n",
    )
    assert pickle.loads(pickle.dumps(load_function(f"{file}:f")())).x == 3


@pytest.mark.parametrize(
    ("text", "name", "place", "problem"),
    [
        ("x = 1\nraise KeyError('oops')\n", "f", "reward.py, line 2", "KeyError: 'oops'"),
        ("x = 1\ny = (\n", "f", "reward.py, line 2", "SyntaxError"),
        ("import sys\nsys.exit(3)\n", "f", "reward.py, line 2", "SystemExit: 3"),
        ("import no_such_module_here\n", "f", "reward.py, line 1", "no_such_module_here"),
        ("f = 3\n", "f", "reward.py", "of type int"),
        ("def g():\n    pass\n", "f", "reward.py", "no reward function 'f'"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, text: str, name: str, place: str, problem: str) -> None:
    file = write(tmp_path, text)
    modules = set(sys.modules)
    with pytest.raises(RewardFunctionError) as caught:
        load_function(f"{file}:{name}")
    assert str(caught.value).startswith(f"{tmp_path}/{place}: ")
    assert problem in str(caught.value)
    assert caught.value.remedy
    if "cannot be imported" in str(caught.value):
        assert not [name for name in set(sys.modules) - modules if name.startswith("_trivet")]


def test_a_failed_import_that_is_mended_works(tmp_path: Path) -> None:
    file = write(tmp_path, "raise ValueError\n")
    with pytest.raises(RewardFunctionError):
        load_function(f"{file}:f")
    with pytest.raises(RewardFunctionError):
        load_function(f"{file}:f")
    write(tmp_path, "def f():\n    return 1\n")
    assert load_function(f"{file}:f")() == 1


@pytest.mark.parametrize("reference", ["reward.py", "reward:f", "reward.py:", "reward.py:a b", "", ":f"])
def test_a_reference_of_another_shape_is_refused(reference: str) -> None:
    with pytest.raises(RewardFunctionError, match=r"FILE\.py:FUNCTION"):
        load_function(reference)


def test_the_kind_of_error_and_of_function_are_the_callers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the data function's file cannot be read: No such file"):
        load_function(f"{tmp_path}/none.py:f", what="data function", error=DataError)


def test_the_digest_follows_the_bytes_and_the_name_and_runs_nothing(tmp_path: Path) -> None:
    file = write(tmp_path, "raise SystemExit\n")
    first = function_digest(f"{file}:f")
    assert first == function_digest(f"{file}:f") != function_digest(f"{file}:g")
    assert len(first) == 64
    moved = write(tmp_path / "elsewhere", "raise SystemExit\n")
    assert function_digest(f"{moved}:f") == first
    write(tmp_path, "raise SystemExit \n")
    assert function_digest(f"{file}:f") != first
    with pytest.raises(RewardFunctionError, match="No such file"):
        function_digest(f"{tmp_path}/none.py:f")
