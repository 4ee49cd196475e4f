"""How the base is spread over GPUs, and the cheapest change that makes a run fit."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.cards import CARDS, Card
from pipeline.config import PipelineConfig
from pipeline.memory_advice import changed, choose_strategy, device_of, judge
from pipeline.memory_plan import device_bytes, fits, plan_stages
from pipeline.model_shape import PUBLIC_SHAPES

SMALL, LARGE = PUBLIC_SHAPES["meta-llama/Llama-3.1-8B"], PUBLIC_SHAPES["meta-llama/Llama-3.1-70B"]
TIGHT: dict[str, Any] = {
    "sft": {"microbatch_size": 1, "batch_size": 16},
    "reward": {"microbatch_size": 1, "batch_size": 16},
    "ppo": {"microbatch_tokens": 1024, "rollout": {"batch_size": 4, "weights": "adapter"}},
    "evaluate": {"batch_size": 4},
}


def config(**sections: Any) -> PipelineConfig:
    found = PipelineConfig.model_validate({"run_dir": "x", "base": {"model": "m"}} | sections)
    assert not list(found.contradictions())
    return found


def launch(processes: int, **more: Any) -> dict[str, Any]:
    small = {"microbatch_size": 1, "batch_size": 16}
    return {"launch": {"processes": processes, **more}, "sft": small, "reward": small}


def test_one_process_shares_nothing() -> None:
    assert choose_strategy(config(), LARGE, CARDS["T4"]) == ("none", "one process")


def test_ddp_where_the_base_fits_and_fsdp_where_it_does_not() -> None:
    several = config(**launch(8))
    assert choose_strategy(several, SMALL, CARDS["RTX 4090"])[0] == "ddp"
    strategy, reason = choose_strategy(several, LARGE, CARDS["RTX 4090"])
    assert strategy == "fsdp" and reason == "sft does not fit RTX 4090 with the whole base on it"
    assert choose_strategy(several, LARGE, CARDS["H200"])[0] == "ddp"
    assert choose_strategy(config(**launch(8, strategy="ddp")), LARGE, CARDS["T4"])[0] == "ddp"
    main_memory = Card("main memory", 2**30, is_gpu=False)
    assert choose_strategy(several, LARGE, main_memory)[0] == "ddp"
    whole = config(**launch(8), base={"model": "m", "quantization": "int8"})
    assert choose_strategy(whole, LARGE, CARDS["T4"])[0] == "ddp"


@pytest.mark.parametrize(
    ("sections", "shape", "card", "expected"),
    [
        ({}, SMALL, "RTX 4090", []),
        (TIGHT | {"base": {"model": "m", "quantization": "none"}}, SMALL, "16GB", ["base.quantization"]),
        (TIGHT | {"sft": {"microbatch_size": 1, "gradient_checkpointing": False, "max_length": 4096}}, SMALL, "16GB",
         ["sft.gradient_checkpointing"]),
        ({"ppo": {"rollout": {"batch_size": 64, "weights": "adapter"}, "max_prompt_tokens": 3072},
          "evaluate": {"batch_size": 1}}, SMALL, "RTX 4090", ["ppo.rollout.batch_size"]),
        (TIGHT, LARGE, "64GB", []),
        (TIGHT, LARGE, "32GB", None),
    ],
)  # fmt: skip
def test_the_cheapest_change_is_found(sections: Any, shape: Any, card: str, expected: list[str] | None) -> None:
    from pipeline.cards import find_card

    verdict = judge(config(**sections), shape, find_card(card, where=""))
    if expected is None:
        assert verdict.changes is None
    else:
        assert verdict.changes is not None
        assert [key for change in verdict.changes for key in change.settings] == expected


@pytest.mark.parametrize("card", ["T4", "16GB", "RTX 4090", "RTX A6000", "H100"])
@pytest.mark.parametrize("shape", list(PUBLIC_SHAPES.values()), ids=lambda shape: shape.name.rpartition("/")[2])
def test_what_is_proposed_does_make_it_fit_and_nothing_of_it_can_be_left_out(shape: Any, card: str) -> None:
    from pipeline.cards import find_card

    wide = config(base={"model": "m", "quantization": "none"}, sft={"gradient_checkpointing": False})
    chosen = find_card(card, where="")
    verdict = judge(wide, shape, chosen)
    for left_out in [None, *(verdict.changes or ())[:-1]]:
        rest = [change for change in verdict.changes or () if change is not left_out]
        better = changed(wide, rest)
        assert better is not None
        strategy, _ = choose_strategy(better, shape, chosen)
        plans = plan_stages(better, shape, device_of(better, chosen, strategy))
        fitting = all(fits(plan, chosen) for plan in plans.values())
        assert fitting == (left_out is None and verdict.changes is not None)


def test_moments_are_rounded_where_no_smaller_batch_is_left() -> None:
    settings = config(
        **TIGHT
        | {
            "ppo": {"microbatch_tokens": 640, "rollout": {"batch_size": 1, "weights": "adapter"}},
            "evaluate": {"batch_size": 1},
        }
    )
    plan = plan_stages(settings, SMALL, device_of(settings, CARDS["H200"], "none"))["ppo"]
    verdict = judge(settings, SMALL, Card("tight", device_bytes(plan) - 100 * 2**20))
    assert verdict.changes is not None
    assert [dict(change.settings) for change in verdict.changes] == [{"ppo.optimizer": "paged_adamw_8bit"}]
