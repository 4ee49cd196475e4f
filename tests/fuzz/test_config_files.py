"""Whatever a config file or an override holds: a config that can be shown and kept, or an error of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import almost, cases, damaged, texts, trees
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config_file import LoadedConfig, flatten, load_config
from pipeline.errors import ConfigError
from pipeline.run_directory import read_json, write_json

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
WHOLE = load_config(ROOT / "configs" / "quickstart.yaml").config.model_dump(mode="json")
REAL = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in CONFIGS]
SECTION_KEYS = sorted({part for key, _ in flatten(WHOLE) for part in key.split(".")})
KEYS = st.one_of(st.sampled_from([*SECTION_KEYS, "path", "weight", "function", "limit"]), texts(8), st.integers())
DOTTED = st.sampled_from(sorted(key for key, _ in flatten(WHOLE)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs")


def check(path: Path, overrides: tuple[str, ...] = ()) -> LoadedConfig | None:
    """Load, and use a config that loads as the command line does."""
    before = path.read_bytes()
    try:
        loaded = load_config(path, overrides)
    except ConfigError as error:
        assert str(error).strip() and len(str(error)) < 100_000
        return None
    finally:
        assert path.read_bytes() == before and [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert all(isinstance(line, str) for line in [*loaded.lines(), *loaded.config.arithmetic()])
    kept = path.parent.with_name("kept.json")
    write_json(kept, loaded.config.model_dump(mode="json"))
    assert read_json(kept) == json.loads(loaded.config.model_dump_json())
    return loaded


def write_yaml(path: Path, tree: Any) -> Path:
    path.write_text(yaml.safe_dump(tree, allow_unicode=False), encoding="utf-8")
    return path


@cases(300)
@given(tree=trees(KEYS))
def test_any_tree(folder: Path, tree: Any) -> None:
    check(write_yaml(folder / "run.yaml", tree))


@cases(500)
@given(data=st.data(), tree=st.sampled_from(REAL))
def test_a_real_config_with_some_values_changed(folder: Path, data: st.DataObject, tree: Any) -> None:
    check(write_yaml(folder / "run.yaml", data.draw(almost(tree, KEYS))))


@cases(60)
@given(data=st.data())
def test_all_settings_with_some_values_changed(folder: Path, data: st.DataObject) -> None:
    check(write_yaml(folder / "run.yaml", data.draw(almost(WHOLE, KEYS))))


@cases(300)
@given(data=st.data(), source=st.sampled_from(CONFIGS))
def test_a_real_config_with_some_bytes_changed(folder: Path, data: st.DataObject, source: Path) -> None:
    path = folder / "run.yaml"
    path.write_bytes(data.draw(damaged(source.read_bytes())))
    check(path)


@cases(200)
@given(content=st.one_of(st.binary(max_size=60), texts(60).map(lambda text: text.encode("utf-8", "surrogatepass"))))
def test_any_bytes(folder: Path, content: bytes) -> None:
    path = folder / "run.yaml"
    path.write_bytes(content)
    check(path)


@cases(400)
@given(
    overrides=st.lists(
        st.one_of(
            texts(),
            st.tuples(st.one_of(DOTTED, texts(10)), texts()).map("=".join),
            st.tuples(DOTTED, trees(KEYS, 4).map(lambda tree: yaml.safe_dump(tree, default_flow_style=True))).map(
                "=".join
            ),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_any_override(folder: Path, overrides: list[str]) -> None:
    path = folder / "run.yaml"
    path.write_bytes((ROOT / "configs" / "sentiment.yaml").read_bytes())
    check(path, tuple(overrides))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_what_is_right_passes(folder: Path, path: Path) -> None:
    copy = folder / "run.yaml"
    copy.write_bytes(path.read_bytes())
    assert check(copy) is not None
