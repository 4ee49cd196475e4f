"""The last step of a run that asks for it: its policy is promoted, if need be after a person has said so."""

from __future__ import annotations

from uuid import uuid4

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.logging import get_run_logger

from flows.display import current_display
from flows.page import page_only, show_figures
from flows.promotion import describe, promote
from flows.tasks import Order
from pipeline.config_file import LoadedConfig, load_config
from pipeline.errors import GateError
from stages.launch import StageResult


class Approval(RunInput):
    """What the page asks for."""

    approve: bool
    note: str = ""


def promote_policy(order: Order, judgement: StageResult) -> None:
    """Promote the run's policy where the config's `registry.promote` wants it.

    Raises:
        GateError: nobody said yes in time, or somebody said no.
    """
    loaded = load_config(order.config, order.overrides)
    log = get_run_logger()
    if loaded.config.registry.promote == "never":
        return
    note = ""
    if loaded.config.registry.promote == "approved":
        if current_display() is not None:
            log.info("Promotion waits for a person: trivet promote %s", " ".join([order.config, *order.overrides]))
            return
        note = _ask(loaded, judgement)
    _promote(order, judgement, note)


@task(name="promote", cache_policy=NO_CACHE)
def _promote(order: Order, judgement: StageResult, note: str) -> None:
    event, new = promote(load_config(order.config, order.overrides), note=note)
    get_run_logger().info(describe(event, new=new))


def _ask(loaded: LoadedConfig, judgement: StageResult) -> str:
    """Pause the run until a person answers; returns the note."""
    hours = loaded.config.registry.approval_hours
    with page_only(get_run_logger()):
        show_figures("approval", "Promote this policy?", judgement)
    try:
        # A key of its own: a run that was put back into the queue while it waited asks again.
        answer = pause_flow_run(Approval, timeout=round(3600 * hours), poll_interval=2, key=f"approval-{uuid4()}")
    except FlowPauseTimeout:
        raise GateError(
            f"nobody approved the policy within {hours:g} hours",
            where="registry.promote=approved",
            remedy="Promote it by hand (trivet promote CONFIG), or run again, which asks again.",
        ) from None
    if not answer.approve:
        raise GateError(
            f"the policy was not approved{': ' if answer.note else ''}{answer.note}", where="registry.promote=approved"
        )
    return answer.note or "approved on the page"
