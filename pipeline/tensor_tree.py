"""Nested values with tensors in them as two files: the tensors as safetensors, the rest as JSON.

For what others pickle: the states of optimizers, schedules and random generators. Every number comes back bit for bit,
and tuples, dicts with any plain keys and numpy arrays come back as what they were.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.run_directory import read_json, write_json


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors by name as safetensors."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, path, metadata={"format": "pt"})


def save_tree(stem: Path, tree: Any) -> None:
    """Write a tree as `STEM.safetensors` and `STEM.json`.

    Args:
        stem: the path of both files, without their suffix.
        tree: dicts, lists, tuples, texts, numbers, None, tensors and numpy arrays, in any depth.

    Raises:
        TypeError: it holds something else, named with its place.
    """
    tensors: dict[str, Tensor] = {}
    plain = _encode(tree, "", tensors)
    save_file(tensors, stem.with_suffix(".safetensors"), metadata={"format": "pt"})
    write_json(stem.with_suffix(".json"), {"tree": plain})


def load_tree(stem: Path) -> Any:
    """What `save_tree` wrote; tensors are on the CPU."""
    tensors = load_file(stem.with_suffix(".safetensors"))
    return _decode(read_json(stem.with_suffix(".json"))["tree"], tensors)


def _encode(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Tensor):
        while place in tensors:  # the keys 1 and "1" of one dict, say
            place += "+"
        # A copy, since safetensors refuses tensors that share their storage.
        tensors[place] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": place}
    if isinstance(value, numpy.ndarray):
        return {"array": value.tolist(), "dtype": value.dtype.str}
    if isinstance(value, numpy.generic):
        return _encode(value.item(), place, tensors)
    if isinstance(value, list):
        return [_encode(item, f"{place}/{index}", tensors) for index, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": _encode(list(value), place, tensors)}
    if isinstance(value, dict):
        return {
            "dict": [[_encode(key, place, tensors), _encode(value[key], f"{place}/{key}", tensors)] for key in value]
        }
    raise TypeError(f"{place}: a {type(value).__name__} can be written neither as a tensor nor as JSON")


def _decode(plain: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(plain, list):
        return [_decode(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if "tensor" in plain:
        return tensors[plain["tensor"]]
    if "dict" in plain:
        return {_decode(key, tensors): _decode(value, tensors) for key, value in plain["dict"]}
    if "tuple" in plain:
        return tuple(_decode(plain["tuple"], tensors))
    if "array" in plain:
        return numpy.array(plain["array"], dtype=plain["dtype"])
    return float(plain["float"])
