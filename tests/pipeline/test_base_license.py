"""The licence of a base: what its files say, and nothing where they say nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import tiny_base

from pipeline.base_license import License, base_license, hub_name, shown_name
from pipeline.config import BaseSettings


def settings(model: Path | str, folder: Path) -> BaseSettings:
    return BaseSettings(model=str(model), cache_dir=str(folder / "cache"))


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n# Tiny", License("mit")),
        ("---\nlicense: other\nlicense_name: llama3.1\n---\n", License("other", "llama3.1")),
        ("---\ntags: [tiny]\n---\nlicense: mit", None),
        ("---\nlicense: [mit]\n---\n", None),
        ("license: mit", None),
        ("---\n{broken", None),
    ],
)
def test_a_folder_s_card_names_it(tmp_path: Path, card: str, licence: License | None) -> None:
    base = tiny_base(tmp_path / "base")
    (base / "README.md").write_text(card)
    assert base_license(settings(base, tmp_path)) == licence


def test_a_file_of_that_name_is_pointed_at(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    assert base_license(settings(base, tmp_path)) is None
    (base / "LICENSE").write_text("You may.")
    assert base_license(settings(base, tmp_path)) == License(None, "see LICENSE of the base")


def test_a_gguf_file_names_it(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    for name, licence in (("with", License("apache-2.0")), ("without", None)):
        file = tmp_path / f"{name}.gguf"
        writer = gguf.GGUFWriter(file, "llama")
        if licence is not None:
            writer.add_license(str(licence))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert base_license(settings(file, tmp_path)) == licence


def test_names_for_others(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "a-base")
    assert (hub_name(settings(base, tmp_path)), shown_name(settings(base, tmp_path))) == (None, "a-base")
    assert hub_name(settings("somebody/a-model", tmp_path)) == "somebody/a-model"
    assert shown_name(settings("somebody/a-model", tmp_path)) == "somebody/a-model"
