"""`trivet export`: an adapter of a run as a folder for other programs, with a model card, here and on a hub."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from flows.display import Display
from flows.hub import push, require_hub
from flows.model_card import card
from pipeline.errors import ConfigError
from pipeline.finished_run import ADAPTER_STAGES, FinishedRun
from stages.command import quiet
from stages.device_lock import device_lock
from stages.export import DTYPES, FORMS, ExportOrder, Made, export, find_converter, require_possible
from stages.launch import device_of

_CARD = "README.md"


def order_of(stage: str, form: str, dtype: str | None, base_name: str | None, converter: Path | None) -> ExportOrder:
    """The options of the command as an order.

    Raises:
        ConfigError: there is no such stage, form or dtype.
    """
    for value, known, where in ((stage, ADAPTER_STAGES, "STAGE"), (form, FORMS, "--form"), (dtype, DTYPES, "--dtype")):
        if value is not None and value not in known:
            raise ConfigError(f"there is no '{value}'", where=where, remedy=f"Choose one of: {', '.join(known)}.")
    return ExportOrder(stage, form, dtype or "bfloat16", base_name, converter)  # type: ignore[arg-type]


def export_run(
    found: FinishedRun,
    order: ExportOrder,
    folder: Path,
    display: Display,
    *,
    repository: str | None,
    public: bool,
    force: bool,
) -> Made:
    """Make the export, say how it compares with the adapter, and upload it if that is wanted.

    Args:
        found: the run, with the stage finished.
        order: what is wanted.
        folder: where to.
        display: told what happens.
        repository: on the hub, OWNER/NAME; None: no upload.
        public: whether everybody sees a repository that is made now.
        force: replace another export.

    Raises:
        OutputError: what is wanted is not possible, the place is taken, or the hub refuses.
    """
    require_possible(found, order)
    if repository is not None:
        require_hub(repository)
    if order.form == "gguf":
        find_converter(order.converter)
    for caution in found.cautions:
        display.line(f"warning: {caution}", "yellow")

    def write_card(draft: Path, about: Mapping[str, Any], compared: list[str]) -> None:
        (draft / _CARD).write_text(card(found, about, compared), encoding="utf-8")
        for line in compared:
            display.line(line)

    quiet()
    make = partial(export, found, order, folder, write_card, force=force)
    with device_lock(device_of(found.config.launch), f"export of {found.state.root.resolve()}", display.line):
        made = make()
    display.line(f"{'Exported' if made.is_new else 'Exported before, and unchanged'}: {folder}")
    if repository is not None:
        display.line(f"On the hub: {push(folder, repository, public=public)}")
    return made
