"""Shared test helpers live beside this file: `tiny.py` (tokenizers) and `tiny_models.py` (bases and configs)."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.progress import _view_for_this_process

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny tensors: threads cost more than they save, most of all on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _progress_goes_where_the_test_looks() -> Iterator[None]:
    """Progress keeps the stream that it first wrote to, which pytest closes with the test that captured it."""
    _view_for_this_process.cache_clear()
    yield
    _view_for_this_process.cache_clear()
