"""Work is halved where memory really runs out, and only then."""

from __future__ import annotations

import pytest
import torch

from pipeline.errors import OutOfMemoryError
from pipeline.memory import is_out_of_memory
from pipeline.memory_budget import MemoryBudget

TOO_LARGE = 10**15
"""Bytes that no machine has."""


def hungry(limit: int, seen: list[int]):
    """Work that asks torch for more than there is when it is given more than `limit`."""

    def work(size: int) -> int:
        seen.append(size)
        torch.empty(TOO_LARGE if size > limit else size, dtype=torch.uint8)
        return size

    return work


def test_the_size_is_halved_until_the_work_fits_and_then_kept():
    said: list[str] = []
    seen: list[int] = []
    budget = MemoryBudget("ppo.microbatch_tokens", 1000, said.append)
    assert budget.fit(hungry(300, seen), smallest=10, whole=1200, remedy="") == 250
    assert budget.fit(hungry(300, seen), smallest=10, whole=1200, remedy="") == 250
    assert seen == [1000, 500, 250, 250]
    assert said == [
        "Out of memory with ppo.microbatch_tokens=1000; going on with 500.",
        "Out of memory with ppo.microbatch_tokens=500; going on with 250.",
    ]


def test_what_is_as_small_as_it_gets_is_an_error_with_the_remedy():
    seen: list[int] = []
    budget = MemoryBudget("ppo.microbatch_tokens", 1000, lambda _: None)
    with pytest.raises(OutOfMemoryError, match=r"even with ppo\.microbatch_tokens=600") as caught:
        budget.fit(hungry(0, seen), smallest=600, whole=9000, remedy="Lower it to 300.")
    assert seen == [1000, 600]
    assert caught.value.remedy == "Lower it to 300."


def test_a_size_that_the_work_does_not_fill_is_not_halved_in_vain():
    seen: list[int] = []
    budget = MemoryBudget("ppo.microbatch_tokens", 4096, lambda _: None)
    assert budget.fit(hungry(60, seen), smallest=10, whole=100, remedy="") == 50
    assert seen == [4096, 50]


def test_other_errors_pass():
    budget = MemoryBudget("x", 8, pytest.fail)

    def wrong(size: int) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        budget.fit(wrong, smallest=1, whole=8, remedy="")
    assert budget.size == 8


def test_what_torch_says_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(TOO_LARGE, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("out of range"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator: can't allocate memory"))
