"""All that a visit to a machine with a GPU is for, in one command: prints a short JSON.

Random models of real shapes, saved and read like a user's: SFT, the reward model and two rounds of PPO with all four
roles, on NF4, in processes of their own. For each stage its seconds and the allocator's peak beside what `trivet plan`
says; for PPO the tokens a second by phase, with each way to sample. A shape whose PPO does not fit ends the row:
`largest` is the one before it.

    python benchmarks/gpu_visit.py [--shapes 1b,8b] [--rollouts merged,adapter,paged] [--scratch FOLDER] [--output FILE]
    python benchmarks/gpu_visit.py --shapes tiny --rollouts merged,adapter          a rehearsal on a CPU, in two minutes

The scratch folder takes two bytes a parameter; /dev/shm will do.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from memory_plan import WORDS, device_here, llama_config, make_config, measured_peaks, planned_bytes, write_data
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from pipeline.artifacts import read_manifest
from pipeline.base_files import load_tokenizer
from pipeline.chat import ChatFormat
from pipeline.config import BaseSettings
from pipeline.config_file import LoadedConfig, load_config
from pipeline.errors import TrivetError
from pipeline.memory_plan import plan_stages
from pipeline.metrics import read_metrics
from pipeline.model_shape import shape_of
from pipeline.run_directory import RunDirectory, StageName

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "heads": 2, "kv": 1, "words": 1024},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "heads": 32,
        "kv": 8,
        "words": 128256,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "heads": 32,
        "kv": 8,
        "words": 128256,
    },
    "14b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "heads": 40,
        "kv": 8,
        "words": 152064,
    },
    "32b": {
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "heads": 40,
        "kv": 8,
        "words": 152064,
    },
}
"""Those of Llama 3.2 1B, Llama 3.1 8B, Qwen 2.5 14B and 32B, from the smallest on."""
ROLLOUTS = {
    "merged": ("ppo.rollout.engine=generate", "ppo.rollout.weights=merged"),
    "adapter": ("ppo.rollout.engine=generate", "ppo.rollout.weights=adapter"),
    "paged": ("ppo.rollout.engine=paged", "ppo.rollout.weights=merged"),
}
ROUND = ("ppo.iterations=2", "ppo.prompts_per_iteration=64", "ppo.minibatch_size=16", "ppo.rollout.batch_size=64")
TEMPLATE = (
    "{% for message in messages %}{{ '<turn> ' + message['role'] + ' ' + message['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn> assistant ' }}{% endif %}"
)


def make_base(folder: Path, shape: dict[str, int]) -> None:
    """Save a random Llama in bfloat16, made where there is a GPU on it, and a tokenizer of one token a word."""
    config = llama_config(shape, shape["words"], tie_word_embeddings=False, bos_token_id=None, eos_token_id=1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    named = ["<other>", "<end>", "<turn>", "user", "assistant", "Say", "it.", *WORDS]
    named += [f"word{number}" for number in range(shape["words"] - len(named))]
    own = Tokenizer(models.WordLevel({word: number for number, word in enumerate(named)}, unk_token="<other>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<other>", eos_token="<end>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def figures(stage: StageName, loaded: LoadedConfig, planned: int, measured: int) -> dict[str, Any]:
    """Time and memory of a finished stage; of PPO, by phase of its last round."""
    run = RunDirectory(loaded.config.run_dir)
    found: dict[str, Any] = {
        "seconds": read_manifest(run.stage(stage)).seconds,
        "peak_mb": round(measured / 1e6),
        "planned_mb": round(planned / 1e6),
        "error": round(planned / measured - 1, 3),
    }
    rows = read_metrics(run.metrics(stage))
    if stage == "ppo":
        last = rows[-1]
        phases = {name: float(value or 0) for name, value in last.items() if name.startswith("seconds/")}
        found |= {name: round(value, 2) for name, value in phases.items()}
        # Of prompts and responses, so that the phases' figures can be compared.
        tokens = float(last["tokens/per_second"] or 0) * phases["seconds/total"]
        found["tokens_per_second"] = {
            name.removeprefix("seconds/"): round(tokens / value) for name, value in phases.items() if value
        }
    else:
        found["tokens_per_second"] = round(max((row.get("tokens_per_second") or 0.0) for row in rows))
    return found


def visit(name: str, rollouts: list[str], scratch: Path) -> dict[str, Any]:
    """All figures of one shape. A stage that fails says why, and ends it."""
    make_base(scratch / "base", SHAPES[name])
    chat = ChatFormat(load_tokenizer(BaseSettings(model=str(scratch / "base"))))
    write_data(scratch, chat)
    first = make_config(
        scratch, checkpointing=True, quantization="nf4", critic="adapter", dtype="auto", weights="merged"
    )
    on_gpu = torch.cuda.is_available()
    found: dict[str, Any] = {}
    stages: list[tuple[str, StageName, tuple[str, ...]]] = [("sft", "sft", ()), ("reward", "reward", ())]
    stages += [(f"ppo, {rollout}", "ppo", ROLLOUTS[rollout]) for rollout in rollouts]
    for label, stage, overrides in stages:
        loaded = load_config(first.path, [*ROUND, *overrides])
        plan = plan_stages(loaded.config, shape_of(loaded.config.base), device_here("auto"))
        planned = planned_bytes(plan[stage], on_gpu=on_gpu)
        try:
            for _, measured in measured_peaks(loaded, [stage]):
                found[label] = figures(stage, loaded, planned, measured)
        except TrivetError as error:
            found[label] = {"failed": str(error).splitlines()[0], "planned_mb": round(planned / 1e6)}
            if stage != "ppo":
                break
        print(f"{name} {label}: {json.dumps(found[label])}", file=sys.stderr, flush=True)
    best = min(
        (one["peak_mb"] for label, one in found.items() if label[:3] == "ppo" and "peak_mb" in one), default=None
    )
    if best is not None:
        found["ppo_to_sft_memory_ratio"] = round(best / found["sft"]["peak_mb"], 2)
    return found


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Memory and speed of all stages on random models of real shapes.")
    parser.add_argument("--shapes", default="1b,8b", help="from the smallest on; some of: " + ", ".join(SHAPES))
    parser.add_argument("--rollouts", default="merged,adapter", help="some of: " + ", ".join(ROLLOUTS))
    parser.add_argument("--scratch", type=Path, help="where the bases are saved; a temporary folder without")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu.json"))
    arguments = parser.parse_args()
    shapes, rollouts = arguments.shapes.split(","), arguments.rollouts.split(",")
    for given, known in ((shapes, SHAPES), (rollouts, ROLLOUTS)):
        if unknown := set(given) - set(known):
            parser.error(f"not known: {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    report: dict[str, Any] = {"device": device, "torch": torch.__version__, "largest": None, "shapes": {}}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for name in shapes:
        scratch = Path(tempfile.mkdtemp(prefix="trivet-visit-", dir=arguments.scratch))
        try:
            report["shapes"][name] = visit(name, rollouts, scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        fits = any("peak_mb" in one for label, one in report["shapes"][name].items() if label.startswith("ppo, "))
        report["largest"] = name if fits else report["largest"]
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
        if not fits:
            break
    print(json.dumps(report))


if __name__ == "__main__":
    main()
