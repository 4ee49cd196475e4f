"""Rows as they come from a file, a function or the hub: mappings that know the line they stood in."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.artifacts import digest, file_digest
from pipeline.config import DataSource
from pipeline.config_file import is_local_source
from pipeline.errors import DataError, TrivetError
from pipeline.functions import load_function

_KINDS = "JSON, JSONL, CSV (each also gzipped), Parquet, or FILE.py:FUNCTION"
_CHECK_PATH = "Correct the path; a relative one starts from the config's folder."
# Longest CSV cell that is read, in characters; Python's own limit of 131,072 is shorter than some conversations.
_CSV_CELL = 1 << 26


class Cell(str):
    """A text out of a CSV cell. It may stand for a list, which CSV does not know."""


@dataclass(frozen=True)
class Row:
    """One row: its 1-based number among the source's rows, its place as messages name it, and its columns."""

    number: int
    where: str
    values: Mapping[str, Any]


def read_rows(source: DataSource) -> Iterator[Row]:
    """The rows of a source, in its order.

    Raises:
        DataError: the source is missing, unreadable, empty, of an unknown kind, or a row of it is malformed.
    """
    number = 0
    for where, values in _located_rows(source):
        number += 1
        if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
            raise DataError(
                f"the row is {_type_name(values)}, not an object of named columns",
                where=where,
                remedy='Write each row as {"column": value, ...}.',
            )
        yield Row(number, where, values)
    if number == 0:
        raise DataError("there are no rows in it", where=source.path, remedy="Fill it, or take it out of the config.")


def source_digest(source: DataSource) -> str:
    """What the source's rows follow from, found without tokenizing anything.

    For a file its bytes, for a function the rows that it returns, for a hub data set its commit as far as it is
    known here (asked of the hub, or else of the local cache).

    Raises:
        DataError: the source cannot be read.
    """
    if not _is_local(source):
        revision = source.revision or _hub_commit(source.path)
        return digest({"hub": source.path, "subset": source.subset, "split": source.split, "revision": revision})
    if _is_function(source.path):
        return digest([_as_json(row) for row in read_rows(source)])
    path = Path(source.path).expanduser()
    _check_file(path)
    try:
        return file_digest(path)
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}", where=str(path)) from None


def _as_json(row: Row) -> str:
    """A row of a function as a text that is the same in every process."""
    try:
        return json.dumps(row.values, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"the row holds what JSON does not know: {error}",
            where=row.where,
            remedy="Yield texts, numbers, lists, and objects with texts as keys; a set as a sorted list.",
        ) from None


def _located_rows(source: DataSource) -> Iterator[tuple[str, Any]]:
    if not _is_local(source):
        return _hub_rows(source)
    if _is_function(source.path):
        return _function_rows(source.path)
    path = Path(source.path).expanduser()
    _check_file(path)
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson")):
        return _jsonl_rows(path, _read_bytes(path))
    if name.endswith(".json"):
        return _json_rows(path)
    if name.endswith(".csv"):
        return _csv_rows(path)
    if name.endswith(".parquet"):
        return _parquet_rows(path)
    raise DataError("this is no kind of file that holds rows", where=str(path), remedy=f"Give {_KINDS}.")


def _is_local(source: DataSource) -> bool:
    return is_local_source(source.path)


def _is_function(path: str) -> bool:
    return ".py:" in path


def _check_file(path: Path) -> None:
    if os.path.isdir(path):
        raise DataError("this is a folder", where=str(path), remedy="Name the files in it, one source each.")
    if not os.path.exists(path):
        raise DataError("there is no such file", where=str(path), remedy=_CHECK_PATH)


def _read_bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix.lower() == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"the file cannot be read: {reason}", where=str(path)) from None


def _read_text(path: Path) -> str:
    content = _read_bytes(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, content[: error.start].count(b"\n") + 1) from None


def _not_utf8(path: Path, line: int) -> DataError:
    return DataError("this is not UTF-8 text", where=f"{path}, line {line}", remedy="Save the file as UTF-8.")


def _type_name(value: Any) -> str:
    names = {"list": "a list", "str": "a text", "int": "a number", "float": "a number", "bool": "true or false"}
    return "null" if value is None else names.get(type(value).__name__, f"of type {type(value).__name__}")


# ---- files


def _jsonl_rows(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    # Split at "\n" alone: str.splitlines would also break rows at U+2028, which JSON allows inside a text.
    for line, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not raw.strip():
            continue
        where = f"{path}, line {line}"
        try:
            yield where, json.loads(raw.decode("utf-8"), object_pairs_hook=_object)
        except UnicodeDecodeError:
            raise _not_utf8(path, line) from None
        except (ValueError, RecursionError) as error:
            column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            reason = _why_no_json(error)
            raise DataError(
                f"this is not a JSON object: {reason}{column}",
                where=where,
                remedy="Write one JSON object a line; a file that is one JSON list should be named .json.",
            ) from None


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    text = _read_text(path)
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    start = len(text) - len(text.lstrip())
    try:
        if text[start : start + 1] == "[":
            yield from _list_elements(path, text, start, decoder)
            return
        content, end = decoder.raw_decode(text, start)
    except DataError:  # of JSON lines under the name .json
        raise
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        reason = _why_no_json(error)
        raise DataError(
            f"this is not valid JSON: {reason}", where=f"{path}{line}", remedy="Write a list of objects."
        ) from None
    if text[end:].strip():
        # Several values in one file: JSON lines under the name .json, as many data sets have it.
        yield from _jsonl_rows(path, text.encode("utf-8", "surrogatepass"))
        return
    lists = [value for value in content.values() if isinstance(value, list)] if isinstance(content, dict) else []
    if len(lists) != 1:
        found = f"an object with {len(lists)} lists" if isinstance(content, dict) else _type_name(content)
        raise DataError(
            f"the file holds {found}, where one list of rows is expected",
            where=str(path),
            remedy="Write a list of objects, or an object with one such list.",
        )
    for number, value in enumerate(lists[0], 1):
        yield f"{path}, row {number}", value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json itself would take the last of two values under one key."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key '{next(key for key in keys if keys.count(key) > 1)}' stands there twice")
    return found


def _why_no_json(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "a number has too many digits" if "digits" in str(error) else str(error)


def _list_elements(path: Path, text: str, start: int, decoder: json.JSONDecoder) -> Iterator[tuple[str, Any]]:
    """The elements of a JSON list one by one, so that each knows its line."""

    def skip_space(position: int) -> int:
        while position < len(text) and text[position] in " \t\r\n":
            position += 1
        return position

    position, line, counted = skip_space(start + 1), 1, 0
    if text[position : position + 1] != "]":
        while True:
            line, counted = line + text.count("\n", counted, position), position
            value, position = decoder.raw_decode(text, position)
            yield f"{path}, line {line}", value
            position = skip_space(position)
            if text[position : position + 1] != ",":
                break
            position = skip_space(position + 1)
    if text[position : position + 1] != "]":
        raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
    if text[position + 1 :].strip():
        raise json.JSONDecodeError("Extra data", text, skip_space(position + 1))


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(_CSV_CELL)
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    header: list[str] | None = None
    line = 1
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"this is not valid CSV: {error}", where=f"{path}, line {line}") from None
        where = f"{path}, line {line}"
        if not cells:
            continue
        if header is None:
            header = cells
            repeated = sorted({name for name in header if header.count(name) > 1})
            separator = next((sign for sign in (";", "\t", "|") if len(header) == 1 and sign in header[0]), None)
            if separator is not None:
                raise DataError(
                    f"the columns are separated by {separator!r}", where=where, remedy="Write the file with commas."
                )
            if repeated:
                raise DataError(f"the column '{repeated[0]}' is named twice", where=where, remedy="Rename one.")
        elif len(cells) != len(header):
            raise DataError(
                f"the row has {len(cells)} cells, but the header names {len(header)} columns",
                where=where,
                remedy='Put cells that hold a comma or a line break in double quotes ("").',
            )
        else:
            yield where, dict(zip(header, map(Cell, cells), strict=True))


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet  # type: ignore[import-untyped]

    try:
        number = 0
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"the column '{twice}' stands there twice")
        for batch in file.iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", values
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(
            f"this is not a Parquet file that can be read: {error}", where=str(path), remedy="Write it again."
        ) from None


# ---- functions and the hub


def _function_rows(reference: str) -> Iterator[tuple[str, Any]]:
    function = load_function(reference, what="data function", error=DataError)
    number = 0
    try:
        for values in function():
            number += 1
            yield f"{reference}, row {number}", values
    except TrivetError:
        raise
    # A function that calls sys.exit must not end the run without a word.
    except (Exception, SystemExit) as error:
        raise DataError(
            f"the data function failed after {number} rows: {type(error).__name__}: {error}",
            where=reference,
            remedy="It takes no arguments and returns an iterable of dictionaries, one a row.",
        ) from error


def _hub_rows(source: DataSource) -> Iterator[tuple[str, Any]]:
    import datasets

    name = source.path if source.subset is None else f"{source.path} ({source.subset})"
    try:
        rows = datasets.load_dataset(source.path, name=source.subset, split=source.split, revision=source.revision)
    # Whatever goes wrong in there, from a typing error to a broken proxy, ends in the same advice; the library
    # and its HTTP clients have no common class of errors.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(
            f"the data set cannot be loaded from the hub: {reason}",
            where=f"{name}, split {source.split}",
            remedy="Check its name, split, subset and revision, and that the hub can be reached (trivet doctor);"
            " offline, give the path of a file that exists.",
        ) from error
    for number, values in enumerate(rows, 1):
        yield f"{name}, split {source.split}, row {number}", values


@lru_cache
def _hub_commit(path: str) -> str | None:
    """The commit that the data set's default branch stands at; None where neither hub nor cache can tell."""
    import huggingface_hub
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        try:
            return huggingface_hub.HfApi().dataset_info(path, timeout=10).sha
        # Not reachable, not found, not allowed: then what the cache holds is what will be read.
        except Exception:
            pass
    folder = Path(constants.HF_HUB_CACHE) / f"datasets--{path.replace('/', '--')}"
    try:
        return (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        snapshots = sorted((folder / "snapshots").glob("*"), key=os.path.getmtime)
        return snapshots[-1].name if snapshots else None
