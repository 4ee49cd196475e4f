"""What the fuzz tests share: how many cases, and material that is wild or almost right.

In CI the cases are always the same. `TRIVET_FUZZ_FACTOR=20 pytest tests/fuzz` tries twenty times as many, new ones.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

_FACTOR = int(os.environ.get("TRIVET_FUZZ_FACTOR", "0"))
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "\n\nHuman:", "\n\nAssistant:", "\ud800", "\0", "\u2028", "﻿")


def cases(count: int) -> Any:
    """A decorator that sets the number of cases of a property."""
    return settings(
        max_examples=count * max(1, _FACTOR),
        derandomize=not _FACTOR,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@functools.cache
def texts(size: int = 30) -> st.SearchStrategy[str]:
    """Any text, also such as forges turns, breaks lines or is no Unicode."""
    anything = st.text(st.characters(codec=None), max_size=size)
    spiced = st.lists(st.one_of(st.sampled_from(SPECIAL), anything), max_size=3).map("".join)
    return st.one_of(st.text(max_size=size), anything, spiced, st.just("x" * 5000))


@functools.cache
def scalars() -> st.SearchStrategy[Any]:
    """What may stand where one value stands, at the edges of its kind."""
    numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([0, -1, 1, 2**31, 2**63, 10**400, 0.5, 1e308]))
    return st.one_of(st.none(), st.booleans(), numbers, texts())


@functools.cache
def trees(keys: st.SearchStrategy[Any], leaves: int = 12) -> st.SearchStrategy[Any]:
    """Any nesting of lists and mappings."""

    def wider(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=4))

    return st.recursive(scalars(), wider, max_leaves=leaves)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values inside a tree."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def almost(draw: st.DrawFn, tree: Any, keys: st.SearchStrategy[Any]) -> Any:
    """The tree with one to three values replaced, removed, or joined by another."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        known = list(places(tree))
        if not known:
            return tree
        *path, last = draw(st.sampled_from(known))
        parent = tree
        for key in path:
            parent = parent[key]
        match draw(st.sampled_from(["replace", "replace", "remove", "add"])):
            case "replace":
                parent[last] = draw(trees(keys))
            case "remove":
                del parent[last]
            case _ if isinstance(parent, dict):
                parent[draw(keys)] = draw(trees(keys))
            case _:
                parent.append(draw(trees(keys)))
    return tree


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes cut off, with some of them overwritten, or with others put between."""
    for _ in range(draw(st.integers(1, 3))):
        position = draw(st.integers(0, max(0, len(content) - 1)))
        junk = draw(st.binary(min_size=1, max_size=8))
        match draw(st.sampled_from(["cut", "overwrite", "insert", "remove"])):
            case "cut":
                content = content[:position]
            case "overwrite":
                content = content[:position] + junk + content[position + len(junk) :]
            case "insert":
                content = content[:position] + junk + content[position:]
            case _:
                content = content[:position] + content[position + len(junk) :]
    return content
