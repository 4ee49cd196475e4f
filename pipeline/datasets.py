"""From the config's sources to checked records: read, detect, drop with a reason, mix, split, report.

Nothing here depends on the order in which rows are read: limits, mixes and splits go by hashes of the content.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Generic

from pipeline.artifacts import digest
from pipeline.chat import ChatFormat
from pipeline.config import DataSet, DataSettings, DataSource
from pipeline.data_report import Side, SourceReport
from pipeline.errors import DataError
from pipeline.formats import (
    INSTRUCTION_FORMATS,
    PREFERENCE_FORMATS,
    PROMPT_FORMATS,
    Dropped,
    Format,
    Record,
    detect,
)
from pipeline.records import Comparison, Demonstration, Message, Prompt, Text, as_plain
from pipeline.sources import Row, read_rows, source_digest

Lengths = Mapping[str, int]


@dataclass(frozen=True)
class Split(Generic[Record]):
    """The records of one kind. No prompt stands on both sides (no row, for `split_by: row`).

    `lengths` are the kept records' token counts by part (prompt, completion, ...); empty without a ChatFormat.
    """

    train: list[Record]
    held_out: list[Record]
    reports: list[SourceReport]
    fingerprint: str
    lengths: Mapping[str, list[int]] = field(default_factory=dict)


def load_instructions(
    data: DataSettings, chat: ChatFormat | None = None, max_length: int | None = None
) -> Split[Demonstration]:
    """The demonstrations for SFT.

    Args:
        data: where they come from.
        chat: counts tokens and knows special tokens. None: neither is checked.
        max_length: tokens of prompt and completion together, at the most. None: any number.

    Raises:
        DataError: a source cannot be read, a row is malformed, or nothing is left.
    """

    def measure(record: Demonstration, chat: ChatFormat) -> tuple[Lengths, int]:
        prompt = len(chat.prompt_ids(record.prompt))
        total = len(chat.example(record.prompt, record.completion).ids)
        return {"prompt": prompt, "completion": total - prompt}, total

    return _load("instructions", data, INSTRUCTION_FORMATS, _Checks(chat, max_length, measure))


def load_preferences(
    data: DataSettings, chat: ChatFormat | None = None, max_length: int | None = None
) -> Split[Comparison]:
    """The comparisons for the reward model. Arguments and errors as `load_instructions`; both answers must fit."""

    def measure(record: Comparison, chat: ChatFormat) -> tuple[Lengths, int]:
        prompt = len(chat.prompt_ids(record.prompt))
        chosen = len(chat.example(record.prompt, record.chosen).ids)
        rejected = len(chat.example(record.prompt, record.rejected).ids)
        return {"prompt": prompt, "chosen": chosen - prompt, "rejected": rejected - prompt}, max(chosen, rejected)

    return _load("preferences", data, PREFERENCE_FORMATS, _Checks(chat, max_length, measure))


def load_prompts(
    data: DataSettings, chat: ChatFormat | None = None, max_prompt_tokens: int | None = None
) -> Split[Prompt]:
    """The prompts for PPO and evaluation. Arguments and errors as `load_instructions`."""

    def measure(record: Prompt, chat: ChatFormat) -> tuple[Lengths, int]:
        length = len(chat.prompt_ids(record.prompt))
        return {"prompt": length}, length

    return _load("prompts", data, PROMPT_FORMATS, _Checks(chat, max_prompt_tokens, measure))


def fingerprint(data_set: DataSet) -> str:
    """Identity of what a data set's records follow from, found without tokenizer or torch.

    Paths are not part of it: a file that moves stays the same data.

    Raises:
        DataError: a source cannot be read.
    """

    def identity(sources: Iterable[DataSource]) -> list[list[object]]:
        return [[source_digest(source), source.weight, source.limit] for source in sources]

    held_out = data_set.held_out
    content: dict[str, object] = {
        "sources": identity(data_set.sources),
        "held_out": held_out if isinstance(held_out, float) else identity(held_out),
        "split_by": data_set.split_by,
    }
    if data_set.fraction is not None and data_set.fraction < 1:  # the whole is what it is without this setting
        content["fraction"] = data_set.fraction
    return digest(content)


def prompt_key(prompt: Text) -> str:
    """Hash that decides on which side of the split a prompt stands, the same for all kinds of records.

    It goes by the first thing that the user says, whatever the case and spacing: all rows of one conversation
    stay together, as do a question asked as text and as a message, with or without a system turn.
    """
    if not isinstance(prompt, str):
        asked = [message.content for message in prompt if message.role == "user"]
        prompt = asked[0] if asked else ""
    return _hash("prompt", " ".join(prompt.split()).casefold())


# ---- loading


@dataclass(frozen=True)
class _Checks(Generic[Record]):
    """What needs a tokenizer. `measure` gives the lengths of a record's parts and the one that `max_tokens` is for."""

    chat: ChatFormat | None
    max_tokens: int | None
    measure: Callable[[Record, ChatFormat], tuple[Lengths, int]]


@dataclass
class _Candidate(Generic[Record]):
    """A record on its way through the checks."""

    record: Record
    row: Row
    content: str
    """Hash of all that it says; equal for duplicates."""
    key: str
    """Hash of what may not stand on both sides of the split."""
    lengths: Lengths


@dataclass
class _Source(Generic[Record]):
    """A source on its way to a report."""

    settings: DataSource
    format: str
    read: int
    kept: list[_Candidate[Record]]
    dropped: Counter[str]

    def keep_only(self, count: int, reason: str) -> None:
        """Keep the `count` records with the smallest hashes, in the order of their rows."""
        if count < len(self.kept):
            self.keep(sorted(self.kept, key=_by_hash)[:count], reason)

    def keep(self, chosen: Sequence[_Candidate[Record]], reason: str) -> None:
        """Keep these records of its own, in the order of their rows."""
        places = {id(item) for item in chosen}
        kept = [item for item in self.kept if id(item) in places]
        if len(kept) < len(self.kept):
            self.dropped[reason] += len(self.kept) - len(kept)
            self.kept = kept


def _load(kind: str, data: DataSettings, formats: Sequence[Format[Record]], checks: _Checks[Record]) -> Split[Record]:
    data_set: DataSet = getattr(data, kind)
    where = f"data.{kind}"
    if not data_set.sources:
        raise DataError("no sources are named", where=f"{where}.sources", remedy="Name a file, function or data set.")
    by_row = data_set.split_by == "row"
    held_out_sources = () if isinstance(data_set.held_out, float) else data_set.held_out
    seen: set[str] = set()

    def read(sources: Iterable[DataSource], leaks: set[str]) -> list[_Source[Record]]:
        return [_read(source, formats, checks, data.allow_special_tokens, by_row, seen, leaks) for source in sources]

    # Held-out sources first: a row that stands on both sides is taken out of training, not out of the test.
    held = read(held_out_sources, set())
    _mix(held, f"{where}.held_out")
    seen.clear()
    pool = read(data_set.sources, {item.key for source in held for item in source.kept})
    _mix(pool, f"{where}.sources")
    if isinstance(data_set.held_out, float):
        keys = {item.key for source in pool for item in source.kept}
        held_keys = _held_out_keys(keys, data_set.held_out)
        if len(keys) == 1:
            rows = sum(len(source.kept) for source in pool)
            if rows == 1:
                raise DataError(
                    "one row is left, which cannot be both trained on and held out",
                    where=where,
                    remedy=f"Add rows, or give {where}.held_out sources of their own.",
                )
            raise DataError(
                f"all {rows} rows have the same prompt, so that none can be held out",
                where=where,
                remedy="Add other prompts."
                if by_row or kind == "prompts"
                else f"Set {where}.split_by: row, or give {where}.held_out sources of their own.",
            )
        held_out = [item for source in pool for item in source.kept if item.key in held_keys]
    else:
        held_keys = set()
        held_out = [item for source in held for item in source.kept]
    if data_set.fraction is not None:
        _thin(pool, held_keys, data_set.fraction, where)
    train = [item for source in pool for item in source.kept if item.key not in held_keys]
    for name, side, sources in (("train on", train, pool), ("hold out", held_out, held or pool)):
        if not side:
            raise DataError(_nothing_left(name, sources), where=where, remedy="Correct the data, or the limits on it.")
    side_of_pool: Side = "both" if isinstance(data_set.held_out, float) else "train"
    return Split(
        train=[item.record for item in train],
        held_out=[item.record for item in held_out],
        reports=[_report(source, side_of_pool, held_keys) for source in pool]
        + [_report(source, "held out", held_keys) for source in held],
        fingerprint=fingerprint(data_set),
        lengths={
            part: [item.lengths[part] for item in train + held_out] for part in (train[0].lengths if train else ())
        },
    )


def _read(
    settings: DataSource,
    formats: Sequence[Format[Record]],
    checks: _Checks[Record],
    allow_special_tokens: bool,
    by_row: bool,
    seen: set[str],
    leaks: set[str],
) -> _Source[Record]:
    rows = list(read_rows(settings))
    found = detect(formats, rows, settings.path)
    dropped: Counter[str] = Counter()
    candidates: list[_Candidate[Record]] = []
    for row in rows:
        record = found.read(row, settings.path)
        if isinstance(record, Dropped):
            dropped[record.reason] += 1
            continue
        said = _content(record)
        key = _hash("side", said) if by_row else prompt_key(record.prompt)
        candidates.append(_Candidate(record, row, _hash("row", said), key, {}))
    kept: list[_Candidate[Record]] = []
    # With a limit the smallest hashes are tried first, so that the others need not be tokenized.
    for position, item in enumerate(sorted(candidates, key=_by_hash) if settings.limit else candidates):
        if settings.limit and len(kept) == settings.limit:
            dropped["over the limit"] += len(candidates) - position
            break
        reason = _objection(item, checks, allow_special_tokens, seen, leaks)
        if reason is None:
            seen.add(item.content)
            kept.append(item)
        else:
            dropped[reason] += 1
    kept.sort(key=lambda item: item.row.number)
    return _Source(settings, found.name, len(rows), kept, dropped)


def _objection(
    item: _Candidate[Record],
    checks: _Checks[Record],
    allow_special_tokens: bool,
    seen: set[str],
    leaks: set[str],
) -> str | None:
    """Why the record is dropped; None if it is kept. Sets its lengths on the way."""
    record, chat = item.record, checks.chat
    if isinstance(record, Comparison) and _stripped(record.chosen) == _stripped(record.rejected):
        return "chosen = rejected"
    if chat is not None and not allow_special_tokens and any(map(chat.special_tokens_in, _words(record))):
        return "special token"
    if item.content in seen:
        return "duplicate"
    if item.key in leaks:
        return "leak"
    if chat is not None:
        try:
            item.lengths, length = checks.measure(record, chat)
        except DataError as error:
            raise DataError(error.problem, where=item.row.where, remedy=error.remedy) from None
        if checks.max_tokens is not None and length > checks.max_tokens:
            return "too long"
    return None


def _mix(sources: Sequence[_Source[Record]], where: str) -> None:
    """Trim the sources to the proportions of their weights, without repeating a row: n_i = floor(w_i min_j n_j/w_j)."""
    weights = [Fraction(str(source.settings.weight)) for source in sources if source.settings.weight is not None]
    if len(weights) < len(sources) or not sources:
        return
    for source in sources:
        if not source.kept:
            raise DataError(
                f"nothing is left of {source.settings.path}, so that it cannot have its share of the mix",
                where=where,
                remedy="Correct it, or take it out. " + _nothing_left("use", [source]),
            )
    unit = min(len(source.kept) / weight for source, weight in zip(sources, weights, strict=True))
    for source, weight in zip(sources, weights, strict=True):
        share = int(weight * unit)
        if share == 0:
            raise DataError(
                f"{source.settings.path} would have no row in the mix: its weight {source.settings.weight:g} stands for"
                f" {float(weight * unit):.2g} rows, as the smallest source beside it has no more to give",
                where=where,
                remedy="Raise its weight, lower the others', or take it out.",
            )
        source.keep_only(share, "over its weight")


def _thin(sources: Sequence[_Source[Record]], held_keys: set[str], fraction: float, where: str) -> None:
    """Keep a share of the rows that are trained on, of all sources together: those with the smallest hashes."""
    rows = [item for source in sources for item in source.kept if item.key not in held_keys]
    count = int(Fraction(str(fraction)) * len(rows))
    if rows and count == 0:
        raise DataError(
            f"{fraction:g} of {len(rows)} training rows is not even one",
            where=f"{where}.fraction",
            remedy=f"Set it to {math.ceil(1000 / len(rows)) / 1000:g} at least, or add rows.",
        )
    # By a hash of its own: after a limit, which takes the smallest ones, theirs would be no even sample.
    ordered = sorted(rows, key=_by_hash_of_fraction)
    held = [item for source in sources for item in source.kept if item.key in held_keys]
    kept = ordered[:count] + held
    for source in sources:
        source.keep(kept, "over the fraction")


def _held_out_keys(keys: set[str], fraction: float) -> set[str]:
    """The keys whose hash falls below the fraction; at least one, and never all, where there are two."""
    ordered = sorted(keys)
    count = sum(1 for key in ordered if int(key, 16) < fraction * 16 ** len(key))
    return set(ordered[: min(max(count, 1), len(ordered) - 1)])


# ---- what a record says


def _by_hash(item: _Candidate[Record]) -> tuple[str, int]:
    return item.content, item.row.number


def _by_hash_of_fraction(item: _Candidate[Record]) -> tuple[str, int]:
    return _hash("fraction", item.content), item.row.number


def _hash(purpose: str, text: str) -> str:
    """Hexadecimal SHA-256. The purpose keeps the choice of a limit independent of the choice of a side."""
    return hashlib.sha256(f"{purpose}\0{text}".encode()).hexdigest()


def _texts(record: Demonstration | Comparison | Prompt) -> list[Text]:
    if isinstance(record, Demonstration):
        return [record.prompt, record.completion]
    if isinstance(record, Comparison):
        return [record.prompt, record.chosen, record.rejected]
    return [record.prompt]


def _content(record: Demonstration | Comparison | Prompt) -> str:
    return json.dumps([as_plain(text) for text in _texts(record)])


def _words(record: Demonstration | Comparison | Prompt) -> list[str]:
    return [
        part
        for text in _texts(record)
        for part in ([text] if isinstance(text, str) else [message.content for message in text])
    ]


def _stripped(text: Text) -> Text:
    """The text without space around it, which nobody prefers an answer for."""
    if isinstance(text, str):
        return text.strip()
    return tuple(Message(message.role, message.content.strip()) for message in text)


# ---- reports


def _report(source: _Source[Record], side: Side, held_keys: set[str]) -> SourceReport:
    held = len(source.kept) if side == "held out" else sum(1 for item in source.kept if item.key in held_keys)
    return SourceReport(
        source=source.settings.path,
        side=side,
        format=source.format,
        read=source.read,
        kept=len(source.kept),
        dropped=dict(source.dropped),
        train=len(source.kept) - held,
        held_out=held,
    )


def _nothing_left(purpose: str, sources: Sequence[_Source[Record]]) -> str:
    dropped: Counter[str] = sum((source.dropped for source in sources), Counter())
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common()) or "none"
    return f"no rows are left to {purpose}: {sum(source.read for source in sources)} read, dropped: {reasons}"
