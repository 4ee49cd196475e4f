"""Cards that a run may be meant for: how much memory they have, and what they compute in."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.memory import main_memory_bytes, memory_limit

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A device. `memory_bytes` is what its driver shows, which is a little under the number on the box."""

    name: str
    memory_bytes: int
    bfloat16: bool = True
    is_gpu: bool = True


def _card(name: str, mebibytes: int, *, bfloat16: bool = True) -> Card:
    return Card(name, mebibytes * 2**20, bfloat16)


CARDS: Mapping[str, Card] = {
    card.name: card
    for card in (
        _card("T4", 15_360, bfloat16=False),
        _card("V100 16GB", 16_384, bfloat16=False),
        _card("V100 32GB", 32_768, bfloat16=False),
        _card("RTX 3060", 12_288),
        _card("RTX 3090", 24_576),
        _card("RTX 4060 Ti 16GB", 16_380),
        _card("RTX 4080", 16_376),
        _card("RTX 4090", 24_564),
        _card("RTX 5090", 32_607),
        _card("RTX A6000", 49_140),
        _card("RTX 6000 Ada", 49_140),
        _card("L4", 23_034),
        _card("L40", 46_068),
        _card("L40S", 46_068),
        _card("A10", 23_028),
        _card("A100 40GB", 40_960),
        _card("A100 80GB", 81_920),
        _card("H100", 81_559),
        _card("H200", 143_771),
        _card("B200", 183_359),
        _card("MI300X", 196_592),
    )
}
"""Name -> card, with the memory that its driver shows."""

# Files that the drivers of NVIDIA (also under WSL), AMD and Intel GPUs make.
_ACCELERATOR_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd", "/dev/dri/renderD128", "/dev/accel")
_SIZE = re.compile(r"^\s*([0-9]*\.?[0-9]+)\s*(GiB|GB|G|MiB|MB|M)\s*$", re.IGNORECASE)
_MEMORY = re.compile(r"(\d+)gb")
_UNITS = {"gib": GIB, "gb": GIB, "g": GIB, "mib": 2**20, "mb": 2**20, "m": 2**20}


def size_in(text: str) -> int | None:
    """Bytes of a size such as `24GB`; None where the text is none.

    A card's gigabytes are 2**30 bytes, as its box counts.
    """
    size = _SIZE.match(text)
    return int(float(size[1]) * _UNITS[size[2].lower()]) or None if size is not None else None


def find_card(text: str, *, where: str) -> Card:
    """The card of a name (whatever its case and spaces, with its memory or without), or of a size such as `24GB`.

    Args:
        where: the setting that names it, for the error.

    Raises:
        ConfigError: no such card; names the nearest ones.
    """
    if (size := size_in(text)) is not None:
        return Card(text.strip(), size)
    name, known = _plain(text), {_plain(card.name): card for card in CARDS.values()}
    if name in known:
        return known[name]
    for plain, card in known.items():
        rest = _MEMORY.fullmatch(name.removeprefix(plain)) if name.startswith(plain) else None
        # A driver shows up to a tenth less than the box says.
        if rest is not None and 0.9 * int(rest[1]) * GIB <= card.memory_bytes <= int(rest[1]) * GIB:
            return card
    near = [card.name for plain, card in known.items() if name and plain.startswith(name)]
    near = near or [known[plain].name for plain in difflib.get_close_matches(name, known, n=3, cutoff=0.5)]
    raise ConfigError(
        f"'{text}' is no card that trivet knows{', perhaps ' + ' or '.join(near) if near else ''}",
        where=where,
        remedy=f"Give its memory instead, a number with its unit such as 24GB, or one of: {', '.join(CARDS)}.",
    )


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|rtx|amd|instinct|sxm\d?|pcie|hbm\d?e?|[^a-z0-9]", "", name.lower())


def cards_here() -> list[Card]:
    """The GPUs that this process may use, as NVIDIA's driver tells them; none where it is not asked or says nothing."""
    if not has_accelerator():
        return []
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    found = []
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
        for line in said.strip().splitlines():
            index, uuid, name, mebibytes = (part.strip() for part in line.split(","))
            wanted = allowed is None or any(one.strip() in (index, uuid) for one in allowed.split(","))
            if wanted:
                old = _plain(name).startswith(("teslav", "teslat", "teslap", "v100", "t4", "p100"))
                found.append(Card(name, int(mebibytes) * 2**20, bfloat16=not old))
    return found


def visible_gpus() -> tuple[str, ...]:
    """The NVIDIA GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None:
        return tuple(str(number) for number in range(len(cards_here())))
    return tuple(name for part in allowed.split(",") if (name := part.strip()) not in ("", "-1"))


def main_memory() -> Card:
    """This machine's main memory, as far as a container lets it be used."""
    flags = ""
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text()
    total = memory_limit() or main_memory_bytes()
    return Card("this machine's main memory", total, bfloat16="avx512_bf16" in flags, is_gpu=False)


def has_accelerator() -> bool:
    """Whether a GPU may be used, as far as can be told without importing torch."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return sys.platform == "darwin" or any(Path(device).exists() for device in _ACCELERATOR_DEVICES)
