"""Files of prompts answered by a finished run: JSON lines in, JSON lines out, in batches, and not twice.

A line an answer, in the order of the prompts: `prompt` and `completion`, so that the file is instruction data as it
stands; `role`, the number of the `answer`, the `seed` of all draws, `tokens`, whether it is `finished`, `logprob` (the
sum over its tokens of what they were sampled with, in nats, before top-k and top-p), `source`, and the prompt row's
other `columns`. What is done is kept beside the output until the output is there, so that the same command goes on
after an interruption; on one machine the file is then the same, byte for byte.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import digest
from pipeline.config import DataSource
from pipeline.config_file import is_local_source
from pipeline.disk import writing
from pipeline.errors import DataError, OutputError, StageInterruptedError
from pipeline.finished_run import STAGE_OF, FinishedRun, Speaker
from pipeline.formats import PROMPT_FORMATS, Dropped, detect
from pipeline.progress import progress, say
from pipeline.records import Message, Prompt, Text, as_plain
from pipeline.sources import read_rows, source_digest
from stages import interruption
from stages.interruption import Interrupted

if TYPE_CHECKING:
    from pipeline.chat import ChatFormat
    from pipeline.generation import SamplingSettings
    from stages.answering import Speakers


@dataclass(frozen=True)
class Order:
    """What is wanted.

    `who` speaks, each `count` times a prompt; `batch_tokens` is how many tokens, prompts and answers at their longest,
    a batch has at the most; `weights` is as in `ppo.rollout`.
    """

    who: tuple[Speaker, ...]
    count: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    batch_tokens: int
    weights: str
    system: str | None = None


@dataclass(frozen=True)
class Written:
    """What came of it: how many prompts were answered, and why others were not."""

    prompts: int
    answers: int
    dropped: Mapping[str, int]


def read_prompts(path: str) -> tuple[list[Prompt], Counter[str]]:
    """The prompts of a source, all of them and in its order, and how many rows say nothing, by reason.

    Args:
        path: a file, a hub id or `FILE.py:FUNCTION`; rows as for `data.prompts`.

    Raises:
        DataError: the source cannot be read, its rows are malformed, or none holds a prompt.
    """
    source = _source(path)
    rows = list(read_rows(source))
    form = detect(PROMPT_FORMATS, rows, source.path)
    prompts: list[Prompt] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        record = form.read(row, source.path)
        if isinstance(record, Dropped):
            dropped[record.reason] += 1
        else:
            prompts.append(record)
    if not prompts:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise DataError(f"no row holds a prompt to answer: {reasons}", where=source.path)
    return prompts, dropped


def _source(path: str) -> DataSource:
    if not is_local_source(path):
        return DataSource(path=path)
    file, colon, function = path.rpartition(":") if ".py:" in path else (path, "", "")
    return DataSource(path=f"{Path(file).expanduser().resolve()}{colon}{function}")


def require_free(output: Path, *, force: bool) -> None:
    """Refuse an output that is there already, or that could not be written, before anything is loaded.

    Raises:
        OutputError: it is.
    """
    if output.is_dir():
        raise OutputError("a folder lies where the answers should go", where=str(output), remedy="Name a file.")
    if output.exists() and not force:
        raise OutputError(
            "there is such a file already", where=str(output), remedy="Name another, or replace it with --force."
        )
    with _writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass


def answer_file(
    found: FinishedRun, prompts: Sequence[Prompt], dropped: Mapping[str, int], source: str, order: Order, output: Path
) -> Written:
    """Answer the prompts and write the file, which appears when it is whole.

    Args:
        found: the run.
        prompts: what to answer.
        dropped: rows that were none, by reason.
        source: what the prompts were read from.
        order: by whom, and how.
        output: where to.

    Returns:
        what was written.

    Raises:
        ArtifactError, IncompatibleAdapterError, BaseModelError: adapters or base cannot be used.
        DataError: no prompt can be answered.
        OutOfMemoryError: not even one answer fits into memory.
        OutputError: the disk does not take it.
        StageInterruptedError: asked to stop; the same command goes on.
    """
    from stages.answering import Speakers

    kept = output.with_name(f".{output.name}.parts")
    speakers = Speakers(found, order.who)
    dropped = Counter(dropped)
    chosen = list(_answerable(speakers, prompts, order, found.config.data.allow_special_tokens, dropped))
    if not chosen:
        raise DataError(f"no prompt can be answered: {_listed(dropped)}", where=source)
    identity = digest(
        {
            "order": asdict(order),
            "source": source_digest(_source(source)),
            "adapters": {who: found.adapters[STAGE_OF[who]].digest for who in order.who if who in STAGE_OF},
            "base": asdict(speakers.roles.base.identity),
        }
    )
    try:
        with _stopping_in_order(), _writing(output):
            rows = _answers(speakers, chosen, order, kept, identity)
            _write_lines(output, rows)
    except Interrupted:
        raise StageInterruptedError(
            "generate: stopped as asked; what is done is kept", remedy="The same command goes on from there."
        ) from None
    shutil.rmtree(kept, ignore_errors=True)
    return Written(len(chosen), len(rows), dropped)


def with_system(prompt: Text, system: str | None) -> Text:
    """The prompt with a system turn before it, if one is wanted and it has none of its own."""
    if system is None or isinstance(prompt, str) or prompt[0].role == "system":
        return prompt
    return (Message("system", system), *prompt)


def _answerable(
    speakers: Speakers, prompts: Sequence[Prompt], order: Order, special: bool, dropped: Counter[str]
) -> Iterator[tuple[int, Prompt, Text, list[int]]]:
    """Each prompt that can be answered: its number, itself, as it is asked, and its tokens."""
    for number, prompt in enumerate(prompts):
        if not special and _spells_special_tokens(speakers.chat, prompt.prompt):
            dropped["special token in the text"] += 1
            continue
        asked = with_system(prompt.prompt, order.system)
        ids = speakers.chat.prompt_ids(asked)
        if speakers.window is not None and len(ids) + order.max_new_tokens > speakers.window:
            dropped[f"longer than the base reads ({speakers.window} tokens with the answer)"] += 1
            continue
        yield number, prompt, asked, ids


def _spells_special_tokens(chat: ChatFormat, text: Text) -> bool:
    parts = [text] if isinstance(text, str) else [message.content for message in text]
    return any(chat.special_tokens_in(part) for part in parts)


def _answers(
    speakers: Speakers,
    chosen: Sequence[tuple[int, Prompt, Text, list[int]]],
    order: Order,
    kept: Path,
    identity: str,
) -> list[dict[str, Any]]:
    from pipeline.batching import group_by_tokens
    from pipeline.distributed import World
    from pipeline.generation import SamplingSettings
    from pipeline.memory_budget import MemoryBudget
    from stages.experience import Budgets
    from stages.parts import Parts

    batches = group_by_tokens([len(ids) + order.max_new_tokens for *_, ids in chosen], order.batch_tokens)
    sampling = SamplingSettings(
        max_new_tokens=order.max_new_tokens,
        temperature=order.temperature,
        top_k=order.top_k,
        top_p=order.top_p,
        weights=order.weights,  # type: ignore[arg-type]
    )
    budgets = Budgets(
        MemoryBudget("--batch-tokens", order.batch_tokens, say),
        MemoryBudget("the number of answers at once", max(len(batch) for batch in batches), say),
        length_setting="--tokens",
    )
    parts = Parts(kept, inputs_digest=identity, world=World(), budgets=budgets)
    rows: list[tuple[int, int, int, dict[str, Any]]] = []
    with progress(len(chosen) * order.count * len(order.who), "generate", "answers") as bar:
        for place, who in enumerate(order.who):
            for number in range(order.count):
                make = _sampler(speakers, who, chosen, sampling, budgets, seed=(order.seed, "generate", number))
                found = parts.compute(f"{who}-{number:04d}", batches, make, bar.advance)
                for (row, prompt, asked, _), answer in zip(chosen, found, strict=True):
                    rows.append((row, place, number, _line(prompt, asked, who, number, order.seed, answer)))
    return [line for *_, line in sorted(rows, key=lambda one: one[:3])]


def _sampler(
    speakers: Speakers,
    who: Speaker,
    chosen: Sequence[tuple[int, Prompt, Text, list[int]]],
    sampling: SamplingSettings,
    budgets: Any,
    *,
    seed: tuple[int | str, ...],
) -> Callable[[Sequence[int]], list[Any]]:
    from pipeline.generation import generate
    from stages.answering import ROLE_OF

    def stop_if_asked() -> None:
        if interruption.requested():
            raise Interrupted

    def sample(batch: Sequence[int]) -> list[Any]:
        responses = budgets.fit_responses(
            sampling,
            len(batch),
            lambda fitting: generate(
                speakers.roles,
                ROLE_OF[who],
                [chosen[index][-1] for index in batch],
                fitting,
                seed=seed,
                # Of the row among all rows: an answer does not depend on which other rows can be answered.
                numbers=[chosen[index][0] for index in batch],
                on_token=stop_if_asked,
            ),
        )
        return [[speakers.chat.decode(one.ids), len(one.ids), one.finished, sum(one.logprobs)] for one in responses]

    return sample


def _line(prompt: Prompt, asked: Text, who: Speaker, number: int, seed: int, answer: Sequence[Any]) -> dict[str, Any]:
    text, tokens, finished, logprob = answer
    line = {
        "prompt": as_plain(asked),
        "completion": text,
        "role": who,
        "answer": number,
        "seed": seed,
        "tokens": tokens,
        "finished": finished,
        "logprob": round(logprob, 4),
        "source": str(prompt.origin),
    }
    return line | ({"columns": dict(prompt.columns)} if prompt.columns else {})


def _write_lines(output: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    descriptor, draft = tempfile.mkstemp(prefix=f".{output.name}-", dir=output.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(draft, 0o644)
        os.replace(draft, output)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def _writing(output: Path) -> Any:
    return writing(output, error=OutputError, elsewhere="name another OUTPUT")


@contextmanager
def _stopping_in_order() -> Iterator[None]:
    """Let a signal stop the sampling where nothing is lost, as in a stage."""
    import signal

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    interruption.install()
    try:
        with interruption.deferred():
            yield
    finally:
        interruption.withdraw()
        for number, handler in before.items():
            signal.signal(number, handler)


def _listed(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
