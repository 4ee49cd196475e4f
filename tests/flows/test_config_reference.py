"""docs/config.md says what pipeline/config.py says: every setting, with its type, bounds, default and purpose."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import Field

from flows.config_reference import PAGE, _group, reference
from pipeline.config import DataSet, DataSource, PipelineConfig, RewardSource, Section
from pipeline.config_file import flatten, load_config

ROOT = Path(__file__).parents[2]


def rows() -> Iterator[list[str]]:
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in line.replace("\\|", "/").strip("| ").split(" | ")]


def test_the_page_is_the_one_that_the_code_makes() -> None:
    made = "run: python -m flows.config_reference --write"
    assert PAGE.read_text(encoding="utf-8") == reference(), made


def test_every_setting_of_a_real_config_stands_there(tmp_path: Path) -> None:
    """As the loader spells keys, which is how people write them."""
    keys = {cells[0].strip("`") for cells in rows()}
    loaded = load_config(ROOT / "configs" / "quickstart.yaml")
    spelt = {key for key, _ in flatten(loaded.config.model_dump(mode="json"))}
    inside = {
        f"data.{kind}.{name}" for kind in ("instructions", "preferences", "prompts") for name in DataSet.model_fields
    }
    assert inside <= spelt and spelt - inside <= keys
    assert set(DataSet.model_fields) | set(DataSource.model_fields) <= keys
    assert {f"ppo.rewards.{name}" for name in RewardSource.model_fields} <= keys


def test_every_row_says_what_the_setting_is() -> None:
    found = list(rows())
    assert len(found) > 130
    assert not [cells for cells in found if len(cells) != 4 or not all(cells) or not cells[3].endswith((".", ")"))]


def test_the_defaults_that_stand_there_are_the_config_s() -> None:
    """Read back as YAML, as a user would write them."""
    import yaml

    config = PipelineConfig.model_validate({"run_dir": "r", "base": {"model": "m"}})
    defaults = dict(flatten(config.model_dump(mode="json")))
    compared = 0
    for key, _, default, _ in rows():
        if (key := key.strip("`")) in defaults and default.startswith("`") and key != "ppo.rewards":
            value = yaml.safe_load(default.strip("`"))
            wanted = defaults[key]
            assert (float(value) if isinstance(wanted, float) else value) == wanted, key
            compared += 1
    assert compared > 110


class _Inner(Section):
    """What is inside."""

    depth: int = Field(3, ge=1, le=9)
    """How deep, in metres."""


class _Outer(Section):
    """A group.

    Of two paragraphs | and a bar.
    """

    width: float | None = Field(None, gt=0)
    """How wide. None: as wide as it is."""
    colours: tuple[str, ...] = ("red", "blue")
    """Which ones."""
    inner: _Inner = _Inner()
    """The inside."""


def test_types_bounds_and_groups_are_put_in_words() -> None:
    page = "\n".join(_group(("outer",), _Outer))
    assert "A group. Of two paragraphs \\| and a bar." in page
    assert "| `outer.width` | number or null, above 0 | `null` | How wide. null: as wide as it is. |" in page
    assert "| `outer.colours` | list of text | `[red, blue]` | Which ones. |" in page
    assert "| `outer.inner` | group | see below | The inside. |" in page
    assert "## outer > inner" in page
    assert "| `outer.inner.depth` | whole number, at least 1 and at most 9 | `3` | How deep, in metres. |" in page


@pytest.mark.parametrize("options", [[], ["--write"]])
def test_the_command_prints_or_writes_it(options: list[str]) -> None:
    before = PAGE.stat().st_mtime_ns
    done = subprocess.run(
        [sys.executable, "-m", "flows.config_reference", *options], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == ("" if options else reference())
    assert (PAGE.stat().st_mtime_ns > before) == bool(options)
    assert PAGE.read_text(encoding="utf-8") == reference()
