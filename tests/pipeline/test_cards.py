"""Cards by name and by size; the ones that are here, as the driver's own program tells them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import cards
from pipeline.cards import CARDS, GIB, cards_here, find_card, main_memory, visible_gpus
from pipeline.errors import ConfigError


@pytest.mark.parametrize("text", ["RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090", "rtx-4090"])
def test_a_card_is_known_however_it_is_written(text: str) -> None:
    assert find_card(text, where="--card") is CARDS["RTX 4090"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("4090", "RTX 4090"),
        ("A6000", "RTX A6000"),
        ("L40", "L40"),
        ("H100 80GB", "H100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("H100 PCIe", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("L40S 48GB", "L40S"),
        ("T4 16GB", "T4"),
        ("RTX 4090 24GB", "RTX 4090"),
    ],
)
def test_everyday_names_are_known(text: str, name: str) -> None:
    assert find_card(text, where="--card") is CARDS[name]


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("A100", "A100 40GB or A100 80GB"),
        ("H100 40GB", "A100 40GB or A100 80GB or H100"),
        ("V100", "V100 16GB or V100 32GB"),
    ],
)
def test_a_name_that_says_too_little_or_is_wrong_comes_with_the_right_ones(text: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"'{text}' is no card that trivet knows, perhaps {near}\n"):
        find_card(text, where="--card")


@pytest.mark.parametrize(("text", "size"), [("24GB", 24 * GIB), ("1.5 gib", 3 * GIB // 2), ("512MB", 2**29)])
def test_a_size_stands_for_a_card(text: str, size: int) -> None:
    assert find_card(text, where="--memory").memory_bytes == size


@pytest.mark.parametrize("text", ["RTX 4091", "0GB", "GB", "24", ""])
def test_an_unknown_card_is_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(ConfigError, match=r"launch\.card: '.*' is no card that trivet knows") as caught:
        find_card(text, where="launch.card")
    assert "a number with its unit such as 24GB, or one of: T4, " in str(caught.value)
    if text == "RTX 4091":
        assert "perhaps RTX 4090 or" in str(caught.value)


def driver(folder: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    """A program in the driver's place."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{output}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(cards, "_ACCELERATOR_DEVICES", (str(program),))


def test_the_driver_tells_what_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver(tmp_path, monkeypatch, "0, GPU-a, NVIDIA L4, 23034\n1, GPU-b, Tesla V100-SXM2-16GB, 16384\n")
    found = cards_here()
    assert [(card.name, card.memory_bytes // 2**20, card.bfloat16) for card in found] == [
        ("NVIDIA L4", 23034, True),
        ("Tesla V100-SXM2-16GB", 16384, False),
    ]
    for visible, names in (("1", ["Tesla V100-SXM2-16GB"]), ("GPU-a", ["NVIDIA L4"]), ("", []), ("-1", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [card.name for card in cards_here()] == names


def test_the_gpus_that_may_be_used_have_the_names_that_cuda_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(tmp_path, monkeypatch, "0, GPU-a, NVIDIA L4, 23034\n1, GPU-b, NVIDIA L4, 23034\n")
    assert visible_gpus() == ("0", "1")
    for visible, names in (("1", ("1",)), ("GPU-b, GPU-a", ("GPU-b", "GPU-a")), ("", ()), ("-1", ())):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert visible_gpus() == names


def test_a_driver_that_says_nothing_is_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver(tmp_path, monkeypatch, "NVIDIA-SMI has failed\n")
    assert cards_here() == []


def test_main_memory_is_what_the_system_has() -> None:
    memory = main_memory()
    assert not memory.is_gpu
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < memory.memory_bytes <= total * 1.01
