"""The reference of all settings, made from where they are declared.

python -m flows.config_reference              print it
python -m flows.config_reference --write      write docs/config.md
"""

from __future__ import annotations

import argparse
import inspect
import json
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from pipeline.config import PipelineConfig, Section

PAGE = Path(__file__).parents[1] / "docs" / "config.md"

_HEAD = """\
# Every setting

Made from [pipeline/config.py](../pipeline/config.py) by `python -m flows.config_reference --write`, not by hand.

A config is a YAML file with these groups. Any value can be given on the command line as well, by its dotted key:
`trivet run my.yaml ppo.kl.coefficient=0.1`; a list or a group is written as YAML: `'ppo.rewards=[{function: r.py:f}]'`.
Paths in the file are relative to the file, but for `run_dir` and `registry.folder`, which are relative to the working
directory. `trivet run my.yaml --dry-run` prints each value with its origin.
"""
_PLAIN = {str: "text", bool: "true or false", int: "whole number", float: "number", type(None): "null", Any: "anything"}
_SIGNS = {Ge: ("ge", "at least"), Gt: ("gt", "above"), Le: ("le", "at most"), Lt: ("lt", "below")}


def reference() -> str:
    """The whole page, as Markdown."""
    return "\n".join([_HEAD, *_group((), PipelineConfig)])


def _group(place: tuple[str, ...], section: type[Section]) -> Iterator[str]:
    """A heading, what the group is for, a table of its settings, and then its groups."""
    yield f"## {_title(place)}\n"
    yield f"{_prose(inspect.getdoc(section) or '')}\n"
    fields = section.model_fields
    inner = [(name, kind) for name, field in fields.items() if (kind := _section_in(field.annotation)) is not None]
    if rows := [_row(place, name, field) for name, field in fields.items() if field.description]:
        yield "| key | type | default | what it is |\n|---|---|---|---|"
        yield from rows
        yield ""
    for kind in dict.fromkeys(kind for _, kind in inner):  # what several keys hold is described once
        names = [name for name, other in inner if other is kind]
        yield from _group((*place, ", ".join(names)), kind)


def _title(place: Sequence[str]) -> str:
    return " > ".join(place) if place else "The file itself"


def _row(place: Sequence[str], name: str, field: FieldInfo) -> str:
    key = name if any("," in part for part in place) else ".".join([*place, name])
    about = _prose(field.description or "")
    if _is_group(field):
        return f"| `{key}` | group | see below | {about} |"
    default = "none: it has to be given"
    if not field.is_required():
        default = f"`{_value(field.get_default(call_default_factory=True))}`"
    return f"| `{key}` | {_kind(field.annotation, field.metadata)} | {default} | {about} |"


def _kind(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in words, with the bounds of its values."""
    bounds = [
        f"{word} {getattr(one, attribute):g}"
        for one in metadata
        for kind, (attribute, word) in _SIGNS.items()
        if isinstance(one, kind)
    ]
    words = _kind_without_bounds(annotation)
    return words if not bounds else f"{words}, {' and '.join(bounds)}"


def _kind_without_bounds(annotation: Any) -> str:
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    arguments = get_args(annotation)
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kind(arguments[0], [one for item in arguments[1:] for one in getattr(item, "metadata", [item])])
    if origin is Literal:
        return ", ".join(f"`{_value(one)}`" for one in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(one) for one in arguments)
    if origin is tuple:
        if arguments[-1] is not Ellipsis:
            return f"list of {len(arguments)}: {_kind(arguments[0])}"
        return "list of groups" if _section_in(arguments[0]) else f"list of {_kind(arguments[0])}"
    assert origin is dict, annotation
    return "group of keys and values"


def _is_group(field: FieldInfo) -> bool:
    """Whether the setting is nothing but a group of others."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def _section_in(annotation: Any) -> type[Section] | None:
    """The group of settings that a key holds, once or as a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for one in get_args(annotation) if (found := _section_in(one)) is not None), None)


def _value(value: Any) -> str:
    """A default as one writes it in YAML."""
    if isinstance(value, bool) or value is None or isinstance(value, int):
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_value(one) for one in value)}]"
    if isinstance(value, Section):
        given = {name: getattr(value, name) for name in type(value).model_fields}
        return f"{{{', '.join(f'{name}: {_value(one)}' for name, one in given.items() if one is not None)}}}"
    if isinstance(value, dict):
        return json.dumps(value)
    text = str(value)
    return text if yaml.safe_load(text) == text else json.dumps(text)  # to YAML a bare `no` is false


def _prose(text: str) -> str:
    """A docstring as one line of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("None:", "null:").replace("None ", "null ")


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="flows.config_reference", allow_abbrev=False)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} instead of printing it")
    if parser.parse_args().write:
        PAGE.write_text(reference(), encoding="utf-8")
    else:
        print(reference(), end="")


if __name__ == "__main__":
    main()
