"""How the base is spread over GPUs, and the cheapest change that makes a run fit."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.cards import CARDS, Card, find_card
from pipeline.config import PipelineConfig
from pipeline.memory_advice import Change, changed, choose_strategy, device_of, judge
from pipeline.memory_plan import device_bytes, fits, plan_stages
from pipeline.model_shape import PUBLIC_SHAPES

SMALL, LARGE = PUBLIC_SHAPES["meta-llama/Llama-3.1-8B"], PUBLIC_SHAPES["meta-llama/Llama-3.1-70B"]
TIGHT: dict[str, Any] = {
    "sft": {"microbatch_size": 1, "batch_size": 16},
    "reward": {"microbatch_size": 1, "batch_size": 16},
    "ppo": {"microbatch_tokens": 1024, "rollout": {"batch_size": 4, "weights": "adapter"}},
    "evaluate": {"batch_size": 4},
}
LONG = {"sft": {"microbatch_size": 1, "batch_size": 16, "max_length": 8192}}


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
    whole = "sft does not fit {} with the whole base on it"
    assert choose_strategy(several, LARGE, CARDS["L40S"]) == ("fsdp", whole.format("L40S"))
    # Loading takes the whole base on each: what the table of docs/memory.md has for eight GPUs.
    neither = f"{whole.format('RTX 4090')}, and neither does a share: sft takes 39.7 GiB while 'loading'"
    assert choose_strategy(several, LARGE, CARDS["RTX 4090"]) == ("fsdp", neither)
    assert choose_strategy(several, LARGE, CARDS["H200"])[0] == "ddp"
    assert choose_strategy(config(**launch(8, strategy="ddp")), LARGE, CARDS["T4"])[0] == "ddp"
    main_memory = Card("main memory", 2**30, is_gpu=False)
    assert choose_strategy(several, LARGE, main_memory)[0] == "ddp"
    int8 = config(**launch(8), base={"model": "m", "quantization": "int8"})
    assert choose_strategy(int8, LARGE, CARDS["T4"])[0] == "ddp"


@pytest.mark.parametrize(
    ("sections", "shape", "card", "expected"),
    [
        ({}, SMALL, "RTX 4090", []),
        (TIGHT | {"base": {"model": "m", "quantization": "none"}}, SMALL, "16GB", ["base.quantization"]),
        (TIGHT | {"sft": {"microbatch_size": 1, "gradient_checkpointing": False, "max_length": 4096}}, SMALL, "16GB",
         ["sft.gradient_checkpointing"]),
        ({"ppo": {"rollout": {"batch_size": 64, "weights": "adapter"}, "max_prompt_tokens": 3072},
          "evaluate": {"batch_size": 1}}, SMALL, "RTX 4090", ["ppo.rollout.batch_size"]),
        (TIGHT | launch(8, strategy="fsdp", reshard_after_forward=False), LARGE, "44GB",
         ["launch.reshard_after_forward"]),
        (TIGHT | launch(2) | LONG, LARGE, "40GB", ["launch.strategy", "launch.cpu_offload"]),
        (TIGHT | launch(2, strategy="ddp") | LONG, LARGE, "40GB", ["launch.strategy", "launch.cpu_offload"]),
        (TIGHT | launch(2, strategy="fsdp") | LONG, LARGE, "40GB", ["launch.cpu_offload"]),
        (TIGHT, LARGE, "64GB", []),
        (TIGHT, LARGE, "32GB", None),
    ],
)  # fmt: skip
def test_the_cheapest_change_is_found(sections: Any, shape: Any, card: str, expected: list[str] | None) -> None:
    verdict = judge(config(**sections), shape, find_card(card, where=""))
    if expected is None:
        assert verdict.changes is None
    else:
        assert verdict.changes is not None
        assert [key for change in verdict.changes for key in change.settings] == expected


@pytest.mark.parametrize("card", ["T4", "16GB", "RTX 4090", "RTX A6000", "H100"])
@pytest.mark.parametrize("shape", list(PUBLIC_SHAPES.values()), ids=lambda shape: shape.name.rpartition("/")[2])
def test_what_is_proposed_does_make_it_fit_and_nothing_of_it_can_be_left_out(shape: Any, card: str) -> None:
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


def test_a_setting_is_lowered_no_further_than_it_must() -> None:
    """Not as far as the search had come when another was found to be needed; and to what divides a batch, if odd."""
    wide = config(
        sft={"microbatch_size": 9, "batch_size": 18, "max_length": 2048},
        reward={"microbatch_size": 1, "batch_size": 16},
        ppo={"microbatch_tokens": 1024, "rollout": {"batch_size": 64, "weights": "adapter"}},
        evaluate={"batch_size": 1},
    )
    proposed = judge(wide, SMALL, find_card("12GB", where="")).changes
    assert [change.text for change in proposed or ()] == ["ppo.rollout.batch_size=32", "sft.microbatch_size=3"]
    for milder in ("ppo.rollout.batch_size=64", "sft.microbatch_size=6"):
        key, size = milder.split("=")
        rest = [change for change in proposed or () if key not in change.settings]
        other = changed(wide, [*rest, Change({key: int(size)}, "")])
        assert other is not None and judge(other, SMALL, find_card("12GB", where="")).changes


def test_a_launcher_file_is_not_told_what_the_section_could_say() -> None:
    several = config(**TIGHT | launch(8, strategy="ddp"))
    card = find_card("44GB", where="")
    assert [change.text for change in judge(several, LARGE, card).changes or ()] == ["launch.strategy=fsdp"]
    assert judge(several, LARGE, card, launcher_file=True).changes is None


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
