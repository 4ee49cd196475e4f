"""What each data source gave, for people: the tables of `trivet data CONFIG`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.config_file import is_local_source

if TYPE_CHECKING:
    from rich.table import Table

    from pipeline.datasets import Split
    from pipeline.records import Comparison, Demonstration, Prompt

Side = Literal["train", "held out", "both"]


@dataclass(frozen=True)
class SourceReport:
    """What one source gave: `read` rows = `kept` + all of `dropped`; `kept` = `train` + `held_out`.

    `side` is what the config uses it for; `both` where a fraction of it is held out.
    """

    source: str
    side: Side
    format: str
    read: int
    kept: int
    dropped: Mapping[str, int]
    train: int
    held_out: int


def warnings(
    instructions: Split[Demonstration] | None, prompts: Split[Prompt] | None, preferences: Split[Comparison] | None
) -> Iterator[str]:
    """What is allowed but seldom meant: a policy that learns conversations and is then asked in plain text, or the
    other way round. Plain text is continued as it stands, without the chat template.

    Args:
        instructions: what the policy learns from; None where that is not known.
        prompts: what it is asked in PPO and in the evaluation; None where there are none.
        preferences: what the reward model learns from; None where there are none.
    """
    if instructions is None:
        return
    learned = [isinstance(row.prompt, str) for row in instructions.train]
    if any(learned) and not all(learned):
        yield (
            f"data.instructions mixes {sum(learned)} plain-text rows with {len(learned) - sum(learned)} conversations;"
            " only conversations go through the chat template. Write all of them in one form."
        )
        return
    plain = learned[0]
    for name, split in (("prompts", prompts), ("preferences", preferences)):
        rows = [] if split is None else [*split.train, *split.held_out]
        others = sum(isinstance(row.prompt, str) != plain for row in rows)
        if others and plain:
            yield (
                f"{others} of {len(rows)} rows of data.{name} are conversations, which go through the chat template,"
                " but data.instructions is plain text: the policy never saw the template. Write both in one form."
            )
        elif others:
            yield (
                f"{others} of {len(rows)} rows of data.{name} have a plain-text prompt, which is continued as it is,"
                " but data.instructions holds conversations: the policy would not be asked in the form that it learned."
                ' Write each prompt as messages: [{"role": "user", "content": ...}].'
            )


def _short_name(source: str) -> str:
    """A source's name without the folders that lead to it; a hub id as it is."""
    from rich.markup import escape

    return escape(Path(source).name if is_local_source(source) else source)


def render_reports(title: str, split: Split[Any]) -> list[Table]:
    """The reports as tables for a terminal: what each source gave, and how long its texts are in tokens."""
    from rich.table import Table

    sources = Table(title=title, title_justify="left")
    for column in ("source", "format", "read", "kept", "dropped", "train", "held out"):
        justify: Literal["left", "right"] = "left" if column in ("source", "format", "dropped") else "right"
        sources.add_column(column, justify=justify, overflow="fold", no_wrap=column == "format")
    for report in split.reports:
        dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(report.dropped.items())) or "-"
        counts = (str(report.train), str(report.held_out))
        sources.add_row(_short_name(report.source), report.format, str(report.read), str(report.kept), dropped, *counts)
    if not split.lengths:
        return [sources]
    lengths = Table(title=f"{title}: tokens", title_justify="left")
    for column in ("part", "median", "p95", "max"):
        lengths.add_column(column, justify="left" if column == "part" else "right")
    for part, values in split.lengths.items():
        ordered = sorted(values)
        lengths.add_row(part, *(str(ordered[round(share * (len(ordered) - 1))]) for share in (0.5, 0.95, 1.0)))
    return [sources, lengths]
