"""The tables of docs/memory.md: what models of 1B to 70B take, at the default settings. Arithmetic, no measurement.

python benchmarks/memory_table.py            writes them into docs/memory.md, between the marks
python benchmarks/memory_table.py --check    exit code 1 where the file has others
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.cards import GIB
from pipeline.config import PipelineConfig
from pipeline.memory_plan import Device, device_bytes, plan_stages
from pipeline.model_shape import PUBLIC_SHAPES

DOCS = Path(__file__).resolve().parents[1] / "docs" / "memory.md"
BEGIN, END = "<!-- memory_table.py: begin -->", "<!-- memory_table.py: end -->"
ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("nf4, twice quantized", {}),
    ("nf4", {"base": {"double_quantization": False}}),
    ("int8", {"base": {"quantization": "int8"}}),
    ("bfloat16", {"base": {"quantization": "none"}}),
    ("nf4, critic: head", {"ppo": {"critic": "head"}}),
    (
        "nf4, nothing recomputed",
        {name: {"gradient_checkpointing": False} for name in ("sft", "reward", "ppo")},
    ),
    ("nf4, FSDP on 8 GPUs", {"launch": {"processes": 8, "strategy": "fsdp"}}),
)


def settings(changes: dict[str, Any]) -> PipelineConfig:
    """The defaults, with microbatches of 2 (rows, pairs) and 16 answers at once, so that 8 processes can share them."""
    tree: dict[str, Any] = {
        "run_dir": "x",
        "base": {"model": "x"},
        "sft": {"batch_size": 16, "microbatch_size": 2},
        "reward": {"batch_size": 16, "microbatch_size": 2},
        "ppo": {"rollout": {"batch_size": 16, "weights": "adapter"}},
        "evaluate": {"batch_size": 16},
    }
    for section, values in changes.items():
        tree[section] = tree.get(section, {}) | values
    config = PipelineConfig.model_validate(tree)
    assert not list(config.contradictions())
    return config


def table() -> Iterator[str]:
    """Lines of Markdown: a row a model and way of storing it, a column a stage, GiB on each GPU."""
    yield "| model | base | sft | reward | ppo | evaluate |"
    yield "|---|---|---|---|---|---|"
    for name, shape in PUBLIC_SHAPES.items():
        for title, changes in ROWS:
            config = settings(changes)
            sharded = config.launch.strategy == "fsdp"
            device = Device(2, processes=config.launch.world_size, sharding="fsdp" if sharded else "none")
            plans = plan_stages(config, shape, device)
            needed = [f"{device_bytes(plan) / GIB:.1f}" for plan in plans.values()]
            yield f"| {name.rpartition('/')[2]} | {title} | {' | '.join(needed)} |"


def with_table(text: str) -> str:
    """The document with the table between the marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, *table(), END]) + after


def main() -> None:
    """Command line: see the module's docstring."""
    text = DOCS.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1, "the marks are missing"
    renewed = with_table(text)
    if "--check" in sys.argv:
        if renewed != text:
            print("docs/memory.md has other figures: run python benchmarks/memory_table.py", file=sys.stderr)
            sys.exit(1)
        return
    DOCS.write_text(renewed, encoding="utf-8")


if __name__ == "__main__":
    main()
