"""The table of mutations fits the source: `python tests/mutations.py` runs it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from mutations import ROOT, TABLE, Mutation


@pytest.mark.parametrize("mutation", TABLE, ids=[mutation.what for mutation in TABLE])
def test_each_mutation_still_fits_the_source_and_names_tests_that_exist(mutation: Mutation):
    source = (ROOT / mutation.file).read_text()
    assert source.count(mutation.old) == 1
    assert_known_names(source.replace(mutation.old, mutation.new), mutation.file)
    assert mutation.new != mutation.old and mutation.tests
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text() if name else (ROOT / file).exists()


def assert_known_names(source: str, file: str) -> None:
    """A test should fail because of what the mutation does, not because a name is unknown."""
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--select",
        "F821,E9",
        "--stdin-filename",
        file,
        "-",
    ]
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_description_is_its_own():
    assert len({mutation.what for mutation in TABLE}) == len(TABLE)
