"""A finished reward model judged on further files of pairs: a benchmark such as RewardBench, another domain, probes.

    trivet judge-pairs CONFIG FILE [FILE ...] [key=value ...]
    python -m stages.judge_pairs CONFIG [key=value ...] --pairs FILE [--pairs FILE ...]

Rows are `prompt`, `chosen`, `rejected`, as in training; a column `subset` names what a row belongs to. What comes out
lies in RUN/pairs/NAME: a line a pair with its scores, and what was judged how. No row is trained on, and none is kept
back: pairs that are too long for `--max-length` are counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config import DataSettings, DataSource
from pipeline.config_file import LoadedConfig, is_local_source, load_config
from pipeline.datasets import load_preferences
from pipeline.errors import ConfigError, DataError, TrivetError
from pipeline.progress import progress, say
from pipeline.records import Comparison, Message
from pipeline.run_directory import RunDirectory, write_json
from pipeline.scored_pairs import HELD_OUT, SCORED, read_scored

MAX_LENGTH = 2048
"""Tokens of prompt and answer together, at the most; what RewardBench's own script takes."""

_PAIRS_BETWEEN_LOOKS = 32


@dataclass(frozen=True)
class PairFile:
    """A file of pairs under the name that its result gets, and why rows of it were dropped."""

    name: str
    source: DataSource
    comparisons: Sequence[Comparison]
    dropped: Mapping[str, int]


def read_files(files: Sequence[str]) -> list[PairFile]:
    """The pairs of every file. Loads no tokenizer, so that faults are found at once.

    Args:
        files: paths, hub ids, `FILE.py:FUNCTION`, or a source as in a config: `{path: ..., split: ..., limit: ...}`.

    Raises:
        ConfigError: a source that is none, or two of the same name.
        DataError: a file cannot be read, or holds no pairs.
    """
    sources = [_source(file) for file in files]
    names = [_name(source) for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"two files would both be called '{name}'",
                where="judge-pairs",
                remedy="Rename one, or judge them apart.",
            )
    return [_read(name, source) for name, source in zip(names, sources, strict=True)]


def _source(file: str) -> DataSource:
    try:
        tree = yaml.safe_load(file) if file.lstrip().startswith("{") else {"path": file}
        source = DataSource.model_validate(tree)
    except (yaml.YAMLError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"'{file}' names no data: {reason}",
            where="judge-pairs",
            remedy="Give a path, a hub id, or a source: '{path: allenai/reward-bench, split: filtered}'.",
        ) from None
    return source.model_copy(update={"path": _absolute(source.path)}) if is_local_source(source.path) else source


def _absolute(path: str) -> str:
    file, colon, function = path.rpartition(":") if ".py:" in path else (path, "", "")
    return f"{Path(file).expanduser().resolve()}{colon}{function}"


def _name(source: DataSource) -> str:
    """The file's name without folders and suffixes; letters that are safe in a path."""
    last = source.path.rpartition(":")[2] if ".py:" in source.path else source.path.rstrip("/").rpartition("/")[2]
    stem = last.partition(".")[0] or last
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in stem) or "pairs"


def _read(name: str, source: DataSource) -> PairFile:
    # Both halves of the split are taken: the whole file is judged.
    data = DataSettings.model_validate(
        {
            "preferences": {"sources": [source.model_dump()], "held_out": 0.5, "split_by": "row"},
            "allow_special_tokens": True,
        }
    )
    split = load_preferences(data)
    comparisons = sorted([*split.train, *split.held_out], key=lambda row: row.origin.row)
    return PairFile(name, source, comparisons, dict(split.reports[0].dropped))


def as_learnt(pairs: Sequence[Comparison], conversations: bool) -> list[Comparison]:
    """Pairs in the form that the reward model learnt: a question in plain text becomes a user's turn.

    Args:
        pairs: as the file has them.
        conversations: whether the reward model learnt conversations. Plain text is then put into turns; without,
            every pair stays as it is.
    """
    return [
        replace(
            pair,
            prompt=(Message("user", pair.prompt),),
            chosen=_turn(pair.chosen),
            rejected=_turn(pair.rejected),
        )
        if conversations and isinstance(pair.prompt, str)
        else pair
        for pair in pairs
    ]


def _turn(answer: Any) -> Any:
    return (Message("assistant", answer),) if isinstance(answer, str) else answer


def learnt_conversations(run: RunDirectory) -> bool | None:
    """Whether the reward model learnt conversations; None where its held-out pairs do not tell."""
    pairs, _ = read_scored(run.stage("reward") / HELD_OUT)
    prompts = [pair.prompt for pair in pairs if pair.prompt is not None]
    return isinstance(prompts[0], list) if prompts else None


def judge(loaded: LoadedConfig, files: Sequence[PairFile], max_length: int = MAX_LENGTH) -> list[Path]:
    """Score every pair of every file with the run's reward adapter.

    Args:
        loaded: the run's config.
        files: what to judge.
        max_length: tokens of prompt and answer together; a pair with a longer one is not judged.

    Returns:
        The folder of each result.

    Raises:
        ArtifactError: there is no finished reward model.
        IncompatibleAdapterError: it belongs to another base.
        DataError: no pair of a file is short enough.
        DivergenceError: a score is not finite.
    """
    from pipeline.base_files import load_tokenizer
    from pipeline.base_model import load_base
    from pipeline.chat import ChatFormat
    from pipeline.roles import Roles
    from stages.pairs import Pair, tokenize

    config = loaded.config
    run = RunDirectory.find(loaded)
    conversations = learnt_conversations(run)
    chat = ChatFormat(load_tokenizer(config.base))
    short: list[tuple[PairFile, list[Pair], Counter[str]]] = []
    for file in files:
        for line in _warnings(file, conversations):
            say(line)
        dropped = Counter(file.dropped)
        pairs = []
        for pair in tokenize(chat, as_learnt(file.comparisons, bool(conversations))):
            if max(len(pair.chosen), len(pair.rejected)) <= max_length:
                pairs.append(pair)
            else:
                dropped[f"longer than {max_length} tokens"] += 1
        if not pairs:
            raise DataError(
                f"no pair has at most {max_length} tokens", where=file.source.path, remedy="Raise --max-length."
            )
        short.append((file, pairs, dropped))
    roles = Roles(load_base(config.base, plain_attention=config.prefers_plain_attention))
    manifest = roles.add_from("reward", run.stage("reward"))
    roles.set_trainable()
    roles.disable_dropout()
    max_tokens = config.reward.microbatch_size * config.reward.max_length
    folders = []
    for file, pairs, dropped in short:
        started = time.monotonic()
        folder = run.judged_pairs(file.name)
        _score(roles, pairs, max_tokens, file.name, folder)
        about = {
            "file": file.source.path,
            "reward": manifest.digest,
            "pairs": len(pairs),
            "dropped": dict(dropped),
            "max_length": max_length,
            "as_conversations": bool(conversations),
            "seconds": round(time.monotonic() - started, 3),
        }
        write_json(folder / "about.json", about)
        folders.append(folder)
    return folders


def _score(roles: Any, pairs: Sequence[Any], max_tokens: int, name: str, folder: Path) -> None:
    import torch

    from pipeline.scoring import require_finite
    from stages.pairs import score_pairs, write_scored

    scores = []
    with progress(len(pairs), name, "pairs") as bar:
        for start in range(0, len(pairs), _PAIRS_BETWEEN_LOOKS):
            part = pairs[start : start + _PAIRS_BETWEEN_LOOKS]
            scores.append(score_pairs(roles, part, max_tokens))
            bar.advance(len(part))
    found = require_finite(torch.cat(scores), "score of a pair", where=name)
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{SCORED}"
    write_scored(draft, pairs, found)
    draft.replace(folder / SCORED)


def _warnings(file: PairFile, conversations: bool | None) -> Iterator[str]:
    plain = sum(isinstance(pair.prompt, str) for pair in file.comparisons)
    if conversations is None and plain:
        yield (
            f"warning: {file.name}: nothing tells whether the reward model learnt conversations or plain text;"
            f" {plain} plain-text pairs are judged as they stand."
        )
    elif conversations is False and plain < len(file.comparisons):
        yield (
            f"warning: {file.name}: {len(file.comparisons) - plain} pairs are conversations, but the reward model"
            " learnt plain text and never saw the template."
        )


def main() -> None:
    """Command line: see the module's docstring."""
    from stages.command import leave_message

    parser = argparse.ArgumentParser(prog="stages.judge_pairs", allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", type=Path)
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--pairs", action="append", required=True, metavar="FILE")
    parser.add_argument("--max-length", type=int, default=MAX_LENGTH, metavar="TOKENS")
    arguments = parser.parse_intermixed_args()
    try:
        loaded = load_config(arguments.config, arguments.overrides)
        folders = judge(loaded, read_files(arguments.pairs), arguments.max_length)
    except TrivetError as error:
        if not leave_message(error):
            print(error, file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        leave_message(error)
        traceback.print_exc()
        sys.exit(1)
    say(f"Judged: {', '.join(json.dumps(str(folder)) for folder in folders)}")


if __name__ == "__main__":
    main()
