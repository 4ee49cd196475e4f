"""A verifiable reward for `instructions.yaml`: the share of a prompt's constraints that the answer meets.

The checks themselves are the data set's own (`data/gold.py`, docs/results.md); the prompt rows name them in the
columns `instruction_id_list` and `kwargs`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

GOLD = Path(__file__).resolve().parent.parent / "data" / "gold.py"


@functools.cache
def checks() -> Callable[[str, list[str], list[dict[str, Any]]], float]:
    """The data set's scoring function."""
    spec = importlib.util.spec_from_file_location("instruction_checks", GOLD)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.if_score  # type: ignore[no-any-return]


def constraints_met(
    prompts: Sequence[object],
    completions: Sequence[str],
    instruction_id_list: Sequence[list[str]],
    kwargs: Sequence[list[dict[str, Any]]],
    **columns: object,
) -> list[float]:
    """0 to 1 for each answer."""
    rows = zip(completions, instruction_id_list, kwargs, strict=True)
    return [checks()(text, names, arguments) for text, names, arguments in rows]
