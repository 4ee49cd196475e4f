"""Whatever rows a source holds, in whatever kind of file: counted and kept or dropped, or an error of ours."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzzing import almost, cases, damaged, texts, trees
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from pipeline.chat import ChatFormat
from pipeline.config import DataSettings
from pipeline.data_report import render_reports
from pipeline.datasets import Split, load_instructions, load_preferences, load_prompts
from pipeline.errors import DataError
from pipeline.records import as_plain

CHAT = ChatFormat(tiny_tokenizer())
MAX_TOKENS = 200
ASKED, ANSWERED = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
LOADERS: dict[str, Callable[..., Split[Any]]] = {
    "instructions": load_instructions,
    "preferences": load_preferences,
    "prompts": load_prompts,
}
RIGHT: dict[str, list[dict[str, Any]]] = {
    "instructions": [
        {"messages": [{"role": "system", "content": "Be."}, ASKED, ANSWERED, ASKED, ANSWERED]},
        {"prompt": "Why?", "completion": "So."},
        {"prompt": [ASKED], "completion": [ANSWERED]},
        {"instruction": "Why?", "input": "this", "output": "So."},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
    ],
    "preferences": [
        {"prompt": "Why?", "chosen": "So.", "rejected": "No.", "margin": 0.5},
        {"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [{"role": "assistant", "content": "No."}]},
        {"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
        {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, {"role": "assistant", "content": "No."}]},
    ],
    "prompts": [{"prompt": "Why?", "answer": 3}, {"prompt": [ASKED]}, {"messages": [ASKED]}, {"instruction": "Why?"}],
}
COLUMNS = sorted({key for rows in RIGHT.values() for row in rows for key in row})
KEYS = st.one_of(st.sampled_from([*COLUMNS, "role", "content", "from", "value", "type", "text"]), texts(6))
KINDS = st.sampled_from(sorted(LOADERS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def check(kind: str, path: Path, *, special: bool = False) -> Split[Any] | None:
    """Load a file as one kind of data; what comes out keeps its promises."""
    settings = DataSettings.model_validate(
        {kind: {"sources": [{"path": str(path)}], "held_out": 0.5}, "allow_special_tokens": special}
    )
    try:
        split = LOADERS[kind](settings, CHAT, MAX_TOKENS)
    except DataError as error:
        assert str(path) in str(error) or f"data.{kind}" in str(error), error
        return None
    (report,) = split.reports
    assert report.read == report.kept + sum(report.dropped.values())
    assert report.kept == report.train + report.held_out == len(split.train) + len(split.held_out)
    assert split.train and split.held_out and render_reports(kind, split)
    for record in [*split.train, *split.held_out]:
        assert 0 < len(CHAT.prompt_ids(record.prompt)) <= MAX_TOKENS
        said = [record.prompt, *(getattr(record, name, ()) for name in ("completion", "chosen", "rejected"))]
        spelled = [
            CHAT.special_tokens_in(text if isinstance(text, str) else "".join(m.content for m in text)) for text in said
        ]
        assert special or not any(spelled)
        json.dumps([as_plain(text) for text in said]).encode()
    return split


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows: list[Any]) -> bytes:
    columns = list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    for row in rows:
        cells = [row.get(column) if isinstance(row, dict) else row for column in columns]
        writer.writerow([json.dumps(cell) if isinstance(cell, (list, dict)) else cell for cell in cells])
    return text.getvalue().encode("utf-8", "surrogatepass")


def as_parquet(rows: list[Any]) -> bytes | None:
    """None where Arrow finds no common type for the rows."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = pyarrow.Table.from_pylist(rows)
        sink = io.BytesIO()
        parquet.write_table(table, sink)
    except (pyarrow.ArrowException, UnicodeError, AttributeError, TypeError, OverflowError):
        return None
    return sink.getvalue()


WRITERS: dict[str, Callable[[list[Any]], bytes | None]] = {
    "rows.jsonl": jsonl,
    "rows.json": lambda rows: json.dumps(rows).encode(),
    "rows.csv": as_csv,
    "rows.jsonl.gz": lambda rows: gzip.compress(jsonl(rows)),
    "rows.parquet": as_parquet,
}
FILES = st.sampled_from(sorted(WRITERS))


@st.composite
def almost_right_rows(draw: st.DrawFn, kind: str) -> list[Any]:
    right = draw(st.sampled_from(RIGHT[kind]))
    rows = [draw(almost(right, KEYS)) if draw(st.booleans()) else right for _ in range(draw(st.integers(1, 5)))]
    return [
        row | {"prompt": f"{number} {row['prompt']}"} if isinstance(row.get("prompt"), str) else row
        for number, row in enumerate(rows)
    ]


@cases(1000)
@given(data=st.data(), kind=KINDS, name=FILES, special=st.booleans())
def test_rows_that_are_almost_right(folder: Path, data: st.DataObject, kind: str, name: str, special: bool) -> None:
    content = WRITERS[name](data.draw(almost_right_rows(kind)))
    if content is not None:
        (folder / name).write_bytes(content)
        check(kind, folder / name, special=special)


@cases(400)
@given(rows=st.lists(trees(KEYS), max_size=4), kind=KINDS, name=FILES)
def test_any_rows(folder: Path, rows: list[Any], kind: str, name: str) -> None:
    content = WRITERS[name](rows)
    if content is not None:
        (folder / name).write_bytes(content)
        check(kind, folder / name)


@cases(600)
@given(data=st.data(), kind=KINDS, name=FILES)
def test_right_files_with_some_bytes_changed(folder: Path, data: st.DataObject, kind: str, name: str) -> None:
    right = RIGHT[kind][0]
    content = WRITERS[name]([right, right])
    assert content is not None
    (folder / name).write_bytes(data.draw(damaged(content)))
    check(kind, folder / name)


@cases(300)
@given(content=st.binary(max_size=80), kind=KINDS, name=FILES)
def test_any_bytes(folder: Path, content: bytes, kind: str, name: str) -> None:
    (folder / name).write_bytes(content)
    check(kind, folder / name)


@pytest.mark.parametrize("name", sorted(WRITERS))
@pytest.mark.parametrize("kind", sorted(LOADERS))
def test_what_is_right_passes(folder: Path, kind: str, name: str) -> None:
    rows = [json.loads(json.dumps(RIGHT[kind][0]).replace("Why", f"Why {number}")) for number in range(4)]
    content = WRITERS[name](rows)
    assert content is not None
    (folder / name).write_bytes(content)
    split = check(kind, folder / name)
    assert split is not None and len(split.train) + len(split.held_out) == 4
