"""A tiny run of all stages has the figures that it had; where it is meant to have others, see `golden.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden import CURVE, curve

KEPT = json.loads(CURVE.read_text())


@pytest.mark.skipif(
    torch.__version__.partition("+")[0] != KEPT["torch"], reason="another torch may draw and round otherwise"
)
def test_the_curve_of_a_tiny_run_does_not_move(tmp_path: Path) -> None:
    found = curve(tmp_path)
    assert list(found) == list(KEPT["curve"])
    for part, wanted in KEPT["curve"].items():
        assert len(found[part]) == len(wanted) >= 3, part
        for number, (line, expected) in enumerate(zip(found[part], wanted, strict=True), start=1):
            # Sums of float32 in another order, as with other threads or another processor, over a few dozen steps.
            assert line == pytest.approx(expected, rel=2e-3, abs=2e-5), (part, number)
