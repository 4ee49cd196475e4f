"""`trivet generate`: a file of prompts answered by a run, and what became of its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from flows.display import Display
from pipeline.errors import ConfigError
from pipeline.finished_run import SPEAKERS, FinishedRun
from stages.answer_file import Order, Written, answer_file, read_prompts, require_free
from stages.command import quiet
from stages.device_lock import device_lock
from stages.launch import device_of

_WEIGHTS = ("auto", "merged", "adapter")


def order_of(
    found: FinishedRun,
    *,
    who: Sequence[str],
    count: int,
    tokens: int | None,
    temperature: float | None,
    top_p: float,
    top_k: int,
    seed: int,
    batch_tokens: int,
    weights: str | None,
    system: str | None,
) -> Order:
    """The options of the command as an order; what is None is as the run was evaluated.

    Raises:
        ConfigError: nobody is called so, or there are no such weights.
    """
    for one in who:
        if one not in SPEAKERS:
            raise ConfigError(f"nobody is called '{one}'", where="--who", remedy=f"Choose from: {', '.join(SPEAKERS)}.")
    if weights is not None and weights not in _WEIGHTS:
        raise ConfigError(f"there are no '{weights}' weights", where="--weights", remedy=f"{', '.join(_WEIGHTS)}.")
    return Order(
        who=tuple(dict.fromkeys(who)) or (found.speakers[-1],),  # type: ignore[arg-type]
        count=count,
        max_new_tokens=tokens or found.config.evaluation_max_new_tokens,
        temperature=found.config.evaluation_temperature if temperature is None else temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        batch_tokens=batch_tokens,
        weights=weights or found.config.ppo.rollout.weights,
        system=system,
    )


def generate(found: FinishedRun, source: str, output: Path, order: Order, display: Display, *, force: bool) -> Written:
    """Answer a file and say what came of it.

    Args:
        found: the run.
        source: the prompts: a file, a hub id, or `FILE.py:FUNCTION`.
        output: where the answers go.
        order: by whom, and how.
        display: told what happens.
        force: replace an output that is there.

    Raises:
        OutputError: there is such an output.
        ArtifactError: who is to speak has no finished stage.
        DataError: the prompts cannot be read; all of this is found before a model is loaded.
    """
    require_free(output, force=force)
    for who in order.who:
        found.require(who)
    for caution in found.cautions:
        display.line(f"warning: {caution}", "yellow")
    prompts, dropped = read_prompts(source)
    quiet()
    with device_lock(device_of(found.config.launch), f"generate from {found.state.root.resolve()}", display.line):
        written = answer_file(found, prompts, Counter(dropped), source, order, output)
    for reason, count in written.dropped.items():
        display.line(f"warning: {count} rows were not answered: {reason}", "yellow")
    display.line(f"{written.answers} answers to {written.prompts} prompts: {output}")
    return written
