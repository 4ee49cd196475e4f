"""Other trainers on the workload of `benchmarks/ppo_iteration.py`, each in an environment of its own.

An environment is made once, with pip, in `~/.cache/trivet/peers`; it is made again when its requirements change. A
peer gets the base's folder, the prompts as token ids, and the sizes, and says what trivet's benchmark says of itself.

    python benchmarks/peers/side_by_side.py [--only trl-1.12.0] [--dtype auto|float32|bfloat16] [--iterations 1]
        [--prompts 32] [--new-tokens 48] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the workload is the benchmark's

from ppo_iteration import MODEL, Workload, questions

from pipeline.base_files import as_folder, read_tokenizer
from pipeline.base_model import compute_dtype
from pipeline.base_source import locate
from pipeline.chat import ChatFormat
from pipeline.config import BaseSettings, LaunchSettings
from stages.launch import child_environment

FOLDER = Path(__file__).parent
PEERS = {"trl-1.12.0": "trl_1_12_0"}
"""Each peer's script and requirements, `NAME.py` and `NAME.txt`."""


def environment(peer: str, cache: Path) -> Path:
    """The Python of a peer's environment, which is made if it is not there or out of date."""
    requirements = FOLDER / f"{PEERS[peer]}.txt"
    folder = cache / "peers" / peer
    stamp, python = folder / "installed.txt", folder / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != requirements.read_text():
        print(f"Setting up {folder}; this takes some minutes.", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "--requirement", str(requirements)], check=True, stdout=sys.stderr)
        stamp.write_text(requirements.read_text())
    return python


def given(work: Workload, iterations: int) -> dict[str, Any]:
    """The workload as a peer reads it."""
    settings = BaseSettings.model_validate({"model": MODEL, "dtype": work.dtype})
    folder = as_folder(locate(settings), settings)
    chat = ChatFormat(read_tokenizer(folder, settings))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "model": str(folder),
        "prompts": [list(chat.prompt_ids(prompt.prompt)) for prompt in questions(work.prompts)],
        "new_tokens": work.new_tokens,
        "minibatch_size": 8,
        "ppo_epochs": 1,
        "lora_rank": 16,
        "dtype": str(compute_dtype(settings, device)).removeprefix("torch."),
        "iterations": iterations,
    }


def measure(peer: str, work: Workload, iterations: int) -> dict[str, Any]:
    """What a peer's script says of an iteration; what it prints goes to the error stream."""
    python = environment(peer, Path(BaseSettings(model=MODEL).cache_dir).expanduser())
    with tempfile.TemporaryDirectory(prefix="trivet-bench-") as folder:
        asked, answer = Path(folder) / "workload.json", Path(folder) / "result.json"
        asked.write_text(json.dumps(given(work, iterations)))
        command = [str(python), str(FOLDER / f"{PEERS[peer]}.py"), str(asked), str(answer)]
        variables = child_environment(LaunchSettings())
        variables.pop("PYTHONPATH", None)  # trivet's packages are not the peer's
        subprocess.run(command, check=True, stdout=sys.stderr, env=variables)
        found: dict[str, Any] = json.loads(answer.read_text())
        return found


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Times other trainers on trivet's workload.")
    parser.add_argument("--only", default=",".join(PEERS), help="some of: " + ", ".join(PEERS))
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--iterations", type=int, default=1, help="after one to warm up; 0 measures that one")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    work = Workload("head", arguments.dtype, arguments.prompts, arguments.new_tokens)
    result = {peer: measure(peer, work, arguments.iterations) for peer in PEERS if peer in chosen}
    text = json.dumps(result, indent=2)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
