"""Reads a PipelineConfig from a YAML file and `key=value` overrides, and remembers where each value came from.

All faults are reported at once, before anything expensive starts.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import types
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config import DataSource, PipelineConfig, RewardSource
from pipeline.errors import ConfigError

ValueOrigin = Literal["default", "file", "override"]
# What PyYAML raises where a value is none of what its tag or its looks say: !!bool maybe, 2024-13-45, -0b_.
_NO_YAML = (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError, OverflowError)
_MERGE_TAG = "tag:yaml.org,2002:merge"
_NO_PATH_PREFIXES = ("package:",)
_MOST_VALUES, _LONGEST_KEY = 100_000, 10_000


@dataclass(frozen=True)
class LoadedConfig:
    """A checked config and its history.

    `origins` maps each dotted key that a user can set to where its value came from.
    """

    config: PipelineConfig
    path: Path
    overrides: tuple[str, ...]
    origins: Mapping[str, ValueOrigin]

    def lines(self) -> Iterator[str]:
        """The resolved config as `key: value  (origin)`, a line a value."""
        settings = list(self.settings())
        width = max(len(key) for key, _, _ in settings)
        for key, value, origin in settings:
            yield f"{key:<{width}}  {json.dumps(value):<28}  {origin}"

    def settings(self) -> Iterator[tuple[str, Any, str]]:
        """Every setting as its dotted key, its value, and where that came from, in words."""
        inherited = {
            "evaluate.max_new_tokens": ("ppo.max_new_tokens", self.config.evaluation_max_new_tokens),
            "evaluate.temperature": ("ppo.temperature", self.config.evaluation_temperature),
            "ppo.critic_learning_rate": ("ppo.learning_rate", self.config.ppo.learning_rate),
        }
        for key, value in flatten(self.config.model_dump(mode="json")):
            origin: str = self.origins.get(key, "default")
            if value is None and key in inherited:
                parent, value = inherited[key]
                origin = f"inherited from {parent}"
            yield key, value, origin


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read and check a config.

    Args:
        path: a YAML file. Relative paths of data, functions, templates and local bases inside it are
            relative to its folder; `run_dir` is relative to the working directory.
        overrides: `key=value` with a dotted key; the value is read as YAML.

    Raises:
        ConfigError: with every fault that was found, each with its key and what to do.
    """
    path = Path(path)
    tree = _read_yaml(path)
    from_file = {key for key, value in flatten(tree) if value != {}}
    from_overrides = _apply_overrides(tree, overrides)
    try:
        config = PipelineConfig.model_validate(tree)
    except ValidationError as error:
        faults = _explain(error)
        raise ConfigError(_numbered([*faults, *_other_contradictions(tree, error)]), where=str(path)) from None
    faults = list(config.contradictions())
    if faults:
        raise ConfigError(_numbered(faults), where=str(path))
    config = _resolve_paths(config, path.resolve().parent)
    origins: dict[str, ValueOrigin] = {}
    for key, _ in flatten(config.model_dump(mode="json")):
        if _covers(from_overrides, key):
            origins[key] = "override"
        elif _covers(from_file, key):
            origins[key] = "file"
        else:
            origins[key] = "default"
    return LoadedConfig(config, path, tuple(overrides), origins)


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a nested mapping as dotted keys. Lists and empty mappings are leaves."""
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{dotted}.")
        else:
            yield dotted, value


def _covers(keys: set[str], key: str) -> bool:
    return key in keys or any(known.startswith(f"{key}.") or key.startswith(f"{known}.") for known in keys)


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, of which PyYAML would silently take the last."""


def _mapping_without_duplicates(
    loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = False
) -> dict[Hashable, Any]:
    seen: dict[Hashable, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == _MERGE_TAG:  # `<<: *name`
            continue
        key = loader.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
        line = key_node.start_mark.line + 1
        if not isinstance(key, Hashable):
            raise ConfigError(
                f"a key in line {line} is itself a group of settings or a list",
                where=str(getattr(loader, "name", "config")),
                remedy='Put what begins with { or [ in quotes, if it is a text: "{{ name }}".',
            )
        if key in seen:
            raise ConfigError(
                f"the key '{key}' stands in line {seen[key]} and again in line {line}",
                where=str(getattr(loader, "name", "config")),
                remedy="Keep one of them.",
            )
        seen[key] = line
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


# YAML 1.1 takes 1e-5 for a text: it wants a point and a sign.
_StrictLoader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(
            f"cannot read the config: {reason}",
            where=str(path),
            remedy="Give the path of a YAML file, such as configs/quickstart.yaml.",
        ) from None
    try:
        loader = _StrictLoader(text)
        loader.name = str(path)
        try:
            tree = loader.get_single_data()
        finally:
            loader.dispose()  # type: ignore[no-untyped-call]
    except ConfigError:
        raise
    except _NO_YAML as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
        raise ConfigError(
            f"not valid YAML: {getattr(error, 'problem', None) or error}", where=where, remedy=_yaml_remedy(error)
        ) from None
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ConfigError(
            "the file does not hold a mapping of settings",
            where=str(path),
            remedy="Start from configs/quickstart.yaml.",
        )
    _check_values(tree, str(path))
    return tree


def _yaml_remedy(error: Exception) -> str:
    """What most often is wrong where YAML gives up."""
    said = str(error)
    if "\\t" in said:
        return "Indent with spaces; YAML allows no tabs."
    if "mapping values are not allowed" in said:
        return 'Put the value in quotes if it holds a colon, "like: this"; otherwise see to the indentation above.'
    if isinstance(error, RecursionError):
        return "Nest it less deeply."
    return "See to the indentation, colons, quotes and brackets there and in the line above."


def _apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> set[str]:
    """Put the overrides into the tree; returns their keys."""
    seen: dict[str, str] = {}
    leaves: set[str] = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(
                f"'{override}' is not an override", remedy="Write key=value, for example ppo.kl.coefficient=0.1."
            )
        if key in seen:
            if seen[key] == text:
                continue
            raise ConfigError(
                f"the override {key} is given twice, as '{seen[key]}' and as '{text}'", remedy="Keep one of them."
            )
        seen[key] = text
        try:
            value = yaml.load(text, _StrictLoader)
        except ConfigError:
            raise
        except _NO_YAML as error:
            raise ConfigError(
                f"the value of the override '{override}' is not valid YAML: {getattr(error, 'problem', None) or error}",
                remedy="Quote it for the shell and for YAML: 'key=\"value: with a colon\"'.",
            ) from None
        _check_values(value, f"the override {key}", key)
        _check_values(key, "an override")
        for leaf, part in flatten({key: value}):
            if near := next((other for other in leaves if _covers({other}, leaf)), None):
                raise ConfigError(f"the overrides {near} and {leaf} are of one setting", remedy="Keep one of them.")
            leaves.add(leaf)
            _put(tree, leaf, part)
    return leaves


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key."""
    *parents, last = key.split(".")
    node = tree
    for depth, parent in enumerate(parents):
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(
                f"the override {key} goes into {'.'.join(parents[: depth + 1])}, which holds a single value",
                remedy=f"Override {'.'.join(parents[: depth + 1])} as a whole.",
            )
    node[last] = value


def _check_values(tree: Any, where: str, place: str = "") -> None:
    """Refuse what YAML's escapes and aliases can spell, but no setting can be.

    Raises:
        ConfigError: a text that no path, name or file can hold, or an alias that contains itself or multiplies.
    """
    rest, seen = [(tree, place)], 0
    while rest:
        value, place = rest.pop()
        seen += 1
        if seen > _MOST_VALUES or len(place) > _LONGEST_KEY:
            raise ConfigError(
                f"there are more than {_MOST_VALUES} values, or an alias (*name) inside of what it stands for",
                where=where,
                remedy="Write the values out.",
            )
        if isinstance(value, str) and (found := re.search("[\0\ud800-\udfff]", value)):
            raise ConfigError(
                f"{place or 'a key'} holds the character U+{ord(found.group()):04X}, which is no text",
                where=where,
                remedy="Write it without that escape.",
            )
        inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in inside:
            rest += [(key, ""), (item, f"{place}.{key}".lstrip("."))]


# What pydantic says in the words of Python.
_PLAIN_WORDS = {
    "tuple_type": "input should be a list",
    "model_type": "input should be a group of settings, `key: value` each",
}


def _explain(error: ValidationError) -> list[str]:
    faults = []
    for detail in error.errors():
        place = ".".join(
            str(part) for part in detail["loc"] if not str(part).startswith(("function-", "tuple[", "literal["))
        )
        if detail["type"] == "extra_forbidden":
            faults.append(f"unknown key '{place}'; {_advice(place, *detail['loc'])}")
        elif detail["type"] == "missing":
            faults.append(f"the key '{place}' is missing; it has no default")
        else:
            got = "" if isinstance(detail["input"], (dict, list)) else f" (got {detail['input']!r})"
            wanted = _PLAIN_WORDS.get(detail["type"]) or detail["msg"].removeprefix("Value error, ")
            faults.append(f"{place}: {wanted[0].lower()}{wanted[1:]}{got}")
    return faults


def _advice(place: str, *location: str | int) -> str:
    """Which key was meant by an unknown one: of its own section, or of the whole config."""
    *parents, name = location
    section = _section_at(parents)
    known = sorted(section.model_fields) if section else []
    everywhere = dict(_keys(PipelineConfig))

    def near(cutoff: float) -> list[str]:
        return difflib.get_close_matches(str(name), known, n=1, cutoff=cutoff)

    meant = (
        near(0.8)
        or [key for key, last in everywhere.items() if last == name]
        or difflib.get_close_matches(place, everywhere, n=1, cutoff=0.9)
        or near(0.6)
    )
    if meant:
        return f"did you mean {' or '.join(repr(key) for key in meant)}?"
    return f"known keys: {', '.join(known)}"


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every dotted key that a config can set outside of lists, with its last part."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")


def _other_contradictions(tree: Any, error: ValidationError) -> Iterator[str]:
    """What contradicts itself among the settings that are well formed. `tree` loses those that are not."""
    malformed = [_take_out(tree, detail["loc"]) for detail in error.errors()]
    try:
        config = PipelineConfig.model_validate(tree)
    except ValidationError:  # a key is missing, too
        return
    # One that names a malformed setting would be about its default.
    yield from (fault for fault in config.contradictions() if not any(name in fault for name in malformed))


def _take_out(tree: Any, location: Sequence[str | int]) -> str:
    """Remove the innermost setting at a place that pydantic names, and give its name."""
    holder: dict[Any, Any] = {}
    name, inside = "", tree
    for part in location:
        if isinstance(inside, dict) and part in inside:
            holder, name, inside = inside, str(part), inside[part]
        elif isinstance(inside, list) and isinstance(part, int) and part < len(inside):
            inside = inside[part]
    holder.pop(name, None)
    return name


def _numbered(faults: list[str]) -> str:
    if len(faults) == 1:
        return faults[0]
    return f"{len(faults)} faults:\n" + "\n".join(f"  {n}. {fault}" for n, fault in enumerate(faults, 1))


def _section_at(location: Sequence[str | int]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = PipelineConfig
    for part in location:
        if isinstance(part, int) or section is None:
            continue
        field = section.model_fields.get(str(part))
        section = _section_in(field.annotation) if field else section
    return section


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, tuple):
        return next((found for arg in get_args(annotation) if (found := _section_in(arg))), None)
    return None


def _resolve_paths(config: PipelineConfig, folder: Path) -> PipelineConfig:
    """Make the config's relative input paths absolute, so that every process finds the same files."""

    def resolve(text: str) -> str:
        expanded = Path(text).expanduser()
        return str(expanded if expanded.is_absolute() else (folder / expanded).resolve())

    def base_model(text: str) -> str:
        looks_local = text.startswith((".", "/", "~")) or text.endswith(".gguf") or os.path.exists(folder / text)
        return resolve(text) if looks_local and not text.startswith(_NO_PATH_PREFIXES) else text

    def source(item: DataSource) -> DataSource:
        return item.model_copy(update={"path": resolve(item.path)}) if is_local_source(item.path, folder) else item

    def function(text: str | None) -> str | None:
        if text is None:
            return None
        file, colon, name = text.rpartition(":")
        return f"{resolve(file)}:{name}" if colon else text

    data = {}
    for kind in ("instructions", "preferences", "prompts"):
        data_set = getattr(config.data, kind)
        held_out = data_set.held_out
        if not isinstance(held_out, float):
            held_out = tuple(source(item) for item in held_out)
        data[kind] = data_set.model_copy(
            update={"sources": tuple(source(item) for item in data_set.sources), "held_out": held_out}
        )
    rewards = tuple(RewardSource(function=function(item.function), weight=item.weight) for item in config.ppo.rewards)
    return config.model_copy(
        update={
            "base": config.base.model_copy(
                update={
                    "model": base_model(config.base.model),
                    "chat_template": config.base.chat_template and resolve(config.base.chat_template),
                    "cache_dir": str(Path(config.base.cache_dir).expanduser()),
                }
            ),
            "data": config.data.model_copy(update=data),
            "ppo": config.ppo.model_copy(update={"rewards": rewards}),
            "evaluate": config.evaluate.model_copy(update={"gold": function(config.evaluate.gold)}),
            "launch": config.launch.model_copy(
                update={
                    "accelerate_config": config.launch.accelerate_config and resolve(config.launch.accelerate_config)
                }
            ),
        }
    )


def is_local_source(path: str, folder: Path = Path()) -> bool:
    """Whether a data source's path names a file or function on this machine rather than a hub data set."""
    file = path.rpartition(":")[0] if ".py:" in path else path
    # Some of them no source can be: a file of that name is a mistake to name, not a hub id to ask for.
    suffixes = (".json", ".jsonl", ".ndjson", ".csv", ".parquet", ".py", ".gz", ".tsv", ".txt", ".xlsx", ".zip")
    return file.startswith((".", "/", "~")) or file.lower().endswith(suffixes) or os.path.exists(folder / file)
