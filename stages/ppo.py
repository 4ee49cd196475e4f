"""Stage 3: proximal policy optimization of the SFT policy against the reward (Ouyang et al. 2022).

    maximize  E[ sum_t min(r_t A_t, clip(r_t, 1 - c, 1 + c) A_t) ],   r_t = pi(a_t | s_t) / pi_old(a_t | s_t)

on responses a to prompts s, where the score stands at the last token and every token pays
beta * log(pi / pi_reference). Four roles share one base: the policy and the critic learn, the reference (the SFT
adapter) and the reward adapter stand still.

After Schulman et al. 2017 (PPO), Schulman et al. 2016 (advantages), Ziegler et al. 2019 (KL controller).
Left out: the pretraining mix (PPO-ptx), the entropy bonus, and sharing one sequence between many prompts.

    python -m stages.ppo CONFIG [key=value ...]
    accelerate launch --num_processes 8 -m stages.ppo CONFIG launch.processes=8
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from pipeline.artifacts import Manifest, digest, read_manifest
from pipeline.base_model import fingerprint, load_base, load_tokenizer
from pipeline.chat import ChatFormat
from pipeline.checkpoint import CheckpointFolder, load_optimizer, save_optimizer
from pipeline.config import PPOSettings
from pipeline.config_file import LoadedConfig
from pipeline.datasets import load_prompts
from pipeline.distributed import World, seed_everything
from pipeline.errors import ConfigError, DivergenceError, RewardFunctionError, StartupGateError
from pipeline.generation import derive_seed
from pipeline.kl import AdaptiveKL, FixedKL, KLController
from pipeline.metrics import MetricsWriter
from pipeline.progress import progress
from pipeline.records import Prompt
from pipeline.rewards import Calibration, RewardSum
from pipeline.roles import Roles
from pipeline.run_directory import RunDirectory
from pipeline.scoring import score_rewards
from stages.command import stage_main
from stages.experience import collect
from stages.gates import check_reward_round_trip, check_startup
from stages.inputs import stage_inputs
from stages.result import StageClock, finish
from stages.round_metrics import drop_samples_after, round_metrics, sample_lines
from stages.update import Updater


def run(loaded: LoadedConfig, run: RunDirectory) -> Manifest:
    """Train the policy; returns the manifest of the finished stage.

    Raises:
        DataError, RewardFunctionError: before a model is loaded.
        IncompatibleAdapterError, StartupGateError: before the first iteration.
        DivergenceError: something is not finite; the last checkpoint is intact.
    """
    config, ppo, clock = loaded.config, loaded.config.ppo, StageClock()
    world = World()
    require_even_shares(ppo, world)
    seed_everything(config.seed, deterministic=config.deterministic)

    # Data, and whatever else can be wrong before a model is loaded.
    chat = ChatFormat(load_tokenizer(config.base))
    prompts = load_prompts(config.data, chat, ppo.max_prompt_tokens).train
    RewardSum(ppo.rewards, model_scores=None).probe(prompts)
    inputs_digest = digest(stage_inputs("ppo", config, run))

    # Adapters: the reference is the SFT adapter, the policy starts as its copy.
    base = load_base(config.base, world.device)
    fingerprint_before = fingerprint(base.model)
    roles = Roles(base)
    roles.add_from("reference", run.stage("sft"))
    roles.copy("reference", "policy")
    calibration, measured = Calibration(), {}
    if config.needs_reward_model:
        reward_manifest = roles.add_from("reward", run.stage("reward"))
        assert reward_manifest.reward_gain is not None and reward_manifest.reward_bias is not None
        calibration = Calibration(reward_manifest.reward_gain, reward_manifest.reward_bias)
        measured["reward_round_trip"] = check_reward_round_trip(roles, reward_manifest, run.stage("reward"))
    add_critic(roles, ppo)
    roles.set_trainable("policy", "value")
    roles.disable_dropout()

    def model_scores(sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        return calibration.apply(score_rewards(roles, sequences, max_tokens=ppo.microbatch_tokens))

    rewards = RewardSum(ppo.rewards, model_scores)

    # Optimizer and what else has a state.
    learning = {**roles.parameters("policy"), **roles.parameters("value")}
    optimizer = make_optimizer(roles, ppo)
    kl = make_controller(ppo)
    updater = Updater(roles, optimizer, ppo, seed=config.seed, world=world)
    checkpoints = CheckpointFolder(
        run.working("ppo") / "checkpoints", inputs_digest=inputs_digest, keep_last=ppo.keep_last
    )
    checkpoint = checkpoints.latest(warn=lambda text: say(world, f"warning: {text}"))
    start = 0
    if checkpoint is not None:
        start = checkpoint.step
        restore_roles(roles, checkpoint.folder)
        load_optimizer(checkpoint.folder / "optimizer.safetensors", optimizer, learning)
        kl.load_state_dict(checkpoint.state["kl"])
        say(world, f"Resuming after iteration {start} of {ppo.iterations}.")

    # Gates.
    measured |= check_startup(roles, prompts, ppo, seed=config.seed, policy_is_reference=start == 0)
    say(world, "Gates passed: " + ", ".join(f"{name} {value:.3g}" for name, value in measured.items()) + ".")

    # Loop.
    last = min(ppo.iterations, ppo.max_steps or ppo.iterations)
    metrics: dict[str, float] = {}
    writer = MetricsWriter(run.metrics("ppo")) if world.is_main else nullcontext()
    with writer as log, progress(last, "ppo", "iterations", done=start) as bar:
        if log is not None:
            log.truncate_after(start)
            drop_samples_after(run, start)
        for iteration in range(start, last):
            set_learning_rates(optimizer, ppo, iteration)
            mine = world.share(prompts_of(prompts, ppo, config.seed, iteration))
            critic_only = iteration < ppo.critic_warmup_iterations
            try:
                experience = collect(
                    roles,
                    rewards,
                    [prompt for prompt in mine for _ in range(ppo.responses_per_prompt)],
                    ppo,
                    kl_coefficient=kl.coefficient,
                    seed=(config.seed, "rollout", iteration, world.rank),
                    world=world,
                )
                statistics, seconds = updater.timed_update(experience, iteration, critic_only=critic_only)
            except DivergenceError as error:
                where = error.where or f"iteration {iteration + 1}"
                raise DivergenceError(error.problem, where=where, remedy=error.remedy) from None
            except RewardFunctionError as error:
                where = f"iteration {iteration + 1}, {error.where}"
                raise RewardFunctionError(error.problem, where=where, remedy=error.remedy) from error.__cause__
            metrics = round_metrics(experience, statistics, seconds, kl_coefficient=kl.coefficient, world=world)
            kl.update(metrics["kl/policy_reference_k1"], config.responses_per_iteration)
            if log is not None:
                log.write(iteration + 1, metrics)
                sample_lines(run, iteration + 1, experience)
            done = iteration + 1
            if world.is_main and (done % ppo.checkpoint_every == 0 or done == last):
                checkpoints.save(
                    done, {"kl": kl.state_dict()}, lambda folder: save_state(folder, roles, optimizer, learning)
                )
            world.wait()
            bar.advance(
                note=f"score {metrics['objective/score']:.2f}, KL {metrics['kl/policy_reference_k1']:.2f},"
                f" length {metrics['response/length_mean']:.0f}"
            )

    # Result.
    if fingerprint(base.model) != fingerprint_before:
        raise StartupGateError("the quantized base changed during PPO; this is a bug, please report it")

    def save(folder: Path) -> None:
        roles.save("policy", folder)
        save_critic(roles, ppo, folder / "value")

    if world.is_main:
        extra = {"gates": measured, "iterations": last}
        finish("ppo", "policy", loaded, run, base=base.identity, clock=clock, metrics=metrics, save=save, extra=extra)
    world.wait()
    return read_manifest(run.stage("ppo"))


def require_even_shares(ppo: PPOSettings, world: World) -> None:
    """Refuse a number of processes that the config did not reckon with.

    Raises:
        ConfigError: naming the setting that the processes cannot share evenly.
    """
    for key, number in (("prompts_per_iteration", ppo.prompts_per_iteration), ("minibatch_size", ppo.minibatch_size)):
        if number % world.size:
            raise ConfigError(
                f"ppo.{key} is {number}, which {world.size} processes cannot share evenly",
                remedy=f"Set ppo.{key}={-(-number // world.size) * world.size}, or start another number of processes.",
            )


def say(world: World, line: str) -> None:
    """Print a line, once for all processes."""
    if world.is_main:
        print(line, flush=True)


def add_critic(roles: Roles, ppo: PPOSettings) -> None:
    """Give the critic its adapter (as configured) and its head.

    The adapter starts as the reward adapter (Ouyang et al. 2022), or the reference's where there is none. The head
    starts at zero: the reward model's own head was trained on last tokens only, and what it says of unfinished
    answers would lead the policy astray until it is unlearned (measured: docs/results.md).
    """
    if ppo.critic == "adapter":
        roles.copy("reward" if "reward" in roles.heads else "reference", "value")
    head = roles.add_head("value", bias=True)
    nn.init.zeros_(head.weight)


def make_optimizer(roles: Roles, ppo: PPOSettings) -> torch.optim.Optimizer:
    """AdamW over the float32 adapters and heads; one group a role, so that each has its learning rate."""
    groups = [
        {"params": list(roles.parameters("policy").values()), "peak": ppo.learning_rate},
        {"params": list(roles.parameters("value").values()), "peak": ppo.critic_learning_rate or ppo.learning_rate},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=ppo.adam_betas, eps=ppo.adam_epsilon, weight_decay=0.0)


def set_learning_rates(optimizer: torch.optim.Optimizer, ppo: PPOSettings, iteration: int) -> None:
    """Anneal both learning rates: a function of the iteration alone, so that a resumed run has no schedule to load."""
    share = iteration / ppo.iterations
    factor = {"constant": 1.0, "linear": 1.0 - share, "cosine": 0.5 * (1.0 + math.cos(math.pi * share))}
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor[ppo.lr_schedule]


def make_controller(ppo: PPOSettings) -> KLController:
    """The configured KL controller."""
    if ppo.kl.controller == "fixed":
        return FixedKL(ppo.kl.coefficient)
    return AdaptiveKL(ppo.kl.coefficient, target=ppo.kl.target, horizon=ppo.kl.horizon)


def prompts_of(prompts: Sequence[Prompt], ppo: PPOSettings, seed: int, iteration: int) -> list[Prompt]:
    """The prompts of a round, over all processes: the next ones of endless reshuffled passes over the data."""
    chosen = []
    orders: dict[int, list[int]] = {}
    first = iteration * ppo.prompts_per_iteration
    for position in range(first, first + ppo.prompts_per_iteration):
        epoch, index = divmod(position, len(prompts))
        if epoch not in orders:
            generator = torch.Generator().manual_seed(derive_seed(seed, "prompts", epoch))
            orders[epoch] = torch.randperm(len(prompts), generator=generator).tolist()
        chosen.append(prompts[orders[epoch][index]])
    return chosen


def save_critic(roles: Roles, ppo: PPOSettings, folder: Path) -> None:
    """The critic's adapter and head; with `critic: head` there is only a head."""
    if ppo.critic == "adapter":
        roles.save("value", folder)
    else:
        roles.save_head("value", folder)


def save_state(folder: Path, roles: Roles, optimizer: torch.optim.Optimizer, learning: dict[str, nn.Parameter]) -> None:
    """Everything that changes during PPO, as tensors by parameter name."""
    roles.save_tensors(learning, folder / "roles.safetensors")
    save_optimizer(folder / "optimizer.safetensors", optimizer, learning)


def restore_roles(roles: Roles, folder: Path) -> None:
    """Put back what `save_state` wrote."""
    learning: dict[str, Any] = {**roles.parameters("policy"), **roles.parameters("value")}
    with torch.no_grad():
        for name, tensor in load_file(folder / "roles.safetensors").items():
            learning[name].copy_(tensor)


if __name__ == "__main__":
    stage_main("ppo", run)
