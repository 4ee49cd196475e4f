"""The table of mutations fits the source: `python tests/mutations.py` runs it."""

from __future__ import annotations

import pytest
from mutations import ROOT, TABLE, Mutation


@pytest.mark.parametrize("mutation", TABLE, ids=[mutation.what for mutation in TABLE])
def test_each_mutation_still_fits_the_source_and_names_tests_that_exist(mutation: Mutation):
    source = (ROOT / mutation.file).read_text()
    assert source.count(mutation.old) == 1
    compile(source.replace(mutation.old, mutation.new), mutation.file, "exec")
    assert mutation.new != mutation.old and mutation.tests
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text() if name else (ROOT / file).exists()


def test_every_description_is_its_own():
    assert len({mutation.what for mutation in TABLE}) == len(TABLE)
