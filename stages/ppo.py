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
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import bitsandbytes
import torch
from torch import nn

from pipeline.artifacts import Manifest, digest, read_manifest
from pipeline.background import Background
from pipeline.base_files import load_tokenizer
from pipeline.base_model import base_identity, fingerprint, load_base, require_unchanged
from pipeline.chat import ChatFormat
from pipeline.config import PPOSettings
from pipeline.config_file import LoadedConfig
from pipeline.datasets import load_prompts
from pipeline.distributed import World, seed_everything
from pipeline.engines import chosen_engine, require_engine
from pipeline.errors import (
    ConfigError,
    DataError,
    DivergenceError,
    OutOfMemoryError,
    RewardFunctionError,
    TrivetError,
)
from pipeline.generation import derive_seed
from pipeline.kl import AdaptiveKL, FixedKL, KLController
from pipeline.memory import megabytes
from pipeline.progress import progress, say
from pipeline.records import Prompt
from pipeline.registry import Registry
from pipeline.rewards import Calibration, RewardSum
from pipeline.roles import Roles
from pipeline.run_directory import RunDirectory
from pipeline.sharding import sharers
from pipeline.trackers import TrackedMetrics
from stages.command import stage_main
from stages.experience import Budgets, collect, reward_model_scores, sample, sampling_settings
from stages.gates import check_reward_round_trip, check_startup, require_fitting_parents
from stages.held_out_answers import drop_answers_after, keep_answers, publish_answers
from stages.inputs import stage_inputs
from stages.interruption import Interrupted, deferred, stop_alone
from stages.result import StageClock, finish
from stages.round_metrics import drop_samples_after, round_metrics, sample_lines
from stages.rounds import Rounds
from stages.selection import is_better, measure_held_out, violations
from stages.training_state import Checkpoints, Position, TrainingState
from stages.update import Updater, UpdateStatistics


def run(loaded: LoadedConfig, run: RunDirectory) -> Manifest:
    """Train the policy; returns the manifest of the finished stage.

    Raises:
        DataError, RewardFunctionError: before a model is loaded.
        IncompatibleAdapterError, StartupGateError: before the first iteration.
        DivergenceError: something is not finite, or left a bound too early; the last checkpoint is intact.
        OutOfMemoryError: a single sequence does not fit.
        Interrupted: the stage was asked to stop; a checkpoint is written.
    """
    config, ppo, clock = loaded.config, loaded.config.ppo, StageClock()
    world = World()
    require_even_shares(ppo, world)
    seed_everything(config.seed, deterministic=config.deterministic)

    # Data, and whatever else can be wrong before a model is loaded.
    chat = ChatFormat(load_tokenizer(config.base))
    inputs = stage_inputs("ppo", config, run)
    split = load_prompts(config.data, chat, ppo.max_prompt_tokens)
    require_enough_prompts(split.held_out, ppo, world)
    RewardSum(ppo.rewards, model_scores=None).probe(split.train)
    require_engine(ppo.rollout)
    require_fitting_parents("ppo", config, run, base_identity(config.base, chat, world.device))

    # Adapters: the reference is the SFT adapter, the policy starts as its copy or at the promoted one.
    share_out_to = sharers(world, config.base)
    base = load_base(config.base, world.device, plain_attention=config.prefers_plain_attention)
    base_before = fingerprint(base.model)
    roles = Roles(base, share_out_to=share_out_to)
    sft_digest = roles.add_from("reference", run.stage("sft")).digest
    promoted = Registry(config.registry.folder).stage("ppo") if ppo.start_from == "promoted" else None
    if promoted is None:
        roles.copy("reference", "policy")
        started_from = sft_digest
    else:
        started_from = roles.add_from("policy", promoted).digest
        say(f"The policy starts at the promoted one, {promoted}.")
    if roles.shards is not None:
        say(roles.shards.sentence)
    calibration, measured = Calibration(), {}
    if config.needs_reward_model:
        reward_manifest = roles.add_from("reward", run.stage("reward"))
        calibration = Calibration.of(reward_manifest)
        measured["reward_round_trip"] = check_reward_round_trip(roles, reward_manifest, run.stage("reward"))
    add_critic(roles, ppo)
    roles.set_trainable("policy", "value")
    roles.disable_dropout()
    roles.pack(ppo.packing)
    budgets = Budgets.of(ppo, say, alone=roles.shards is None)
    rewards = RewardSum(ppo.rewards, reward_model_scores(roles, calibration, budgets))
    roles.between_passes = partial(stop_alone, world)

    # What changes from step to step, and its checkpoints.
    optimizer = make_optimizer(roles, ppo)
    state = TrainingState(roles, optimizer, make_controller(ppo), budgets, world, started_from)
    updater = Updater(roles, optimizer, ppo, seed=config.seed, world=world, budgets=budgets)
    background, answers = Background(), run.working("ppo") / "held_out"
    checkpoints = Checkpoints(run.working("ppo"), config, digest(inputs), world, warn=say, background=background)
    rounds = Rounds(run.working("ppo"), config, digest(inputs), world, warn=say)

    # Gates: before a checkpoint is put back, so that the policy is still the copy that it starts as.
    measured |= check_startup(
        roles, split.train, ppo, seed=config.seed, policy_is_reference=promoted is None, budgets=budgets
    )
    reused = bool(measured.pop("sampler_serves"))
    say("Gates passed: " + ", ".join(f"{name} {value:.3g}" for name, value in measured.items()) + ".")
    say(paths_taken(roles, ppo, reused=reused))
    position = checkpoints.restore(state, rounds.exists)
    if position != Position():
        say(f"Resuming after {position} of {ppo.iterations} iterations.")

    # Loop.
    clock.go_on(run, "ppo", digest(inputs))
    last = min(ppo.iterations, ppo.max_steps or ppo.iterations)
    left = bounds_left(position.iteration, state.metrics, ppo)
    writer = TrackedMetrics("ppo", loaded, run) if world.is_main else nullcontext()
    with (
        writer as log,
        progress(last, "ppo", "iterations", done=position.iteration) as bar,
        deferred(),
        background,
    ):
        if log is not None:
            log.truncate_after(position.iteration)
            drop_samples_after(run, position.iteration)
            drop_answers_after(answers, position.iteration)
        while position.iteration < last and not stops(left, ppo):
            iteration, statistics = position.iteration, position.statistics or UpdateStatistics()
            done = iteration + 1
            set_learning_rates(optimizer, ppo, iteration)
            mine = world.share(prompts_of(split.train, ppo, config.seed, iteration))
            asked = [prompt for prompt in mine for _ in range(ppo.responses_per_prompt)]
            sampled_by = position.sampled_by or state.digest()
            try:
                experience = rounds.load(iteration, sampled_by, asked, roles, budgets)
                if experience is None:
                    draw = partial(
                        sample,
                        roles,
                        asked,
                        seed=(config.seed, "rollout", iteration),
                        world=world,
                        budgets=budgets,
                        sampling=sampling_settings(ppo),
                        with_values=ppo.rollout.reuse_logprobs and ppo.critic == "head",
                    )
                    sampled = rounds.sampled(iteration, sampled_by, asked, roles, budgets, draw)
                    beta = state.kl.coefficient
                    experience = collect(
                        roles, rewards, asked, sampled, ppo, kl_coefficient=beta, world=world, budgets=budgets
                    )
                    rounds.save(iteration, sampled_by, experience, budgets)
                critic_only = iteration < ppo.critic_warmup_iterations
                updater.update(experience, iteration, critic_only=critic_only, statistics=statistics)
                held_out = {}
                if ppo.held_out.every is not None and (done % ppo.held_out.every == 0 or done == last):
                    held_out = measure_held_out(
                        roles,
                        rewards,
                        split.held_out,
                        ppo,
                        seed=config.seed,
                        world=world,
                        budgets=budgets,
                        keep=partial(keep_answers, background, answers, done),
                    )
            except Interrupted:
                checkpoints.save_unfinished(Position(iteration, statistics, sampled_by), state)
                raise
            except (DivergenceError, RewardFunctionError, OutOfMemoryError) as error:
                raise in_iteration(done, error) from error.__cause__
            figures = round_metrics(experience, statistics, kl_coefficient=state.kl.coefficient, world=world)
            state.metrics = figures | held_out
            state.kl.update(state.metrics["kl/policy_reference_k1"], config.responses_per_iteration)
            if held_out and is_better(held_out, state.best, ppo.guard):
                state.best = {"iteration": done, **held_out}
                checkpoints.save_best(done, state)
            left = bounds_left(done, state.metrics, ppo)
            if log is not None:
                log.write(done, state.metrics)
                log.sync()
                background.do(partial(sample_lines, run, done, experience))
            if done % ppo.checkpoint_every == 0 or done == last or stops(left, ppo):
                checkpoints.save(done, state)
            world.wait()
            position = Position(done)
            for violation in left:
                say(f"warning: {violation}.")
            bar.advance(
                note=f"score {state.metrics['objective/score']:.2f},"
                f" KL {state.metrics['kl/policy_reference_k1']:.2f},"
                f" length {state.metrics['response/length_mean']:.0f}"
            )

    # Result.
    require_unchanged(base, base_before)
    stopped = left[0] if stops(left, ppo) else None
    if stopped is not None and state.best is None:
        raise DivergenceError(
            f"the policy left a bound of ppo.guard before one within it had been measured: {stopped}",
            remedy="Lower ppo.learning_rate, raise ppo.kl.coefficient, or set a smaller ppo.held_out.every.",
        )
    assert state.metrics is not None
    metrics = dict(state.metrics)
    published = position.iteration
    if state.best is not None and (ppo.publish == "best" or stopped is not None):
        published = int(state.best["iteration"])
        metrics |= {name: value for name, value in state.best.items() if name != "iteration"}

    def save(folder: Path) -> None:
        if published != position.iteration:
            save_learned(roles, ppo, folder / "last")
            checkpoints.restore_best(state)
            say(f"Publishing the policy of iteration {published}, the best on held-out prompts.")
        save_learned(roles, ppo, folder)
        publish_answers(answers, folder)

    if world.is_main:
        extra = {
            "data": [asdict(report) for report in split.reports],
            "gates": measured,
            "iterations": position.iteration,
            "published": published,
            "stopped": stopped,
            "started_from": started_from,
        }
        finish(
            "ppo",
            "policy",
            loaded,
            run,
            inputs=inputs,
            base=base.identity,
            clock=clock,
            metrics=metrics,
            save=save,
            extra=extra,
        )
    world.wait()
    return read_manifest(run.stage("ppo"))


def bounds_left(iteration: int, metrics: Mapping[str, float] | None, ppo: PPOSettings) -> list[str]:
    """The bounds that the figures of an iteration (1-based) leave, as sentences; those of no iteration leave none."""
    return [f"iteration {iteration}: {violation}" for violation in violations(metrics or {}, ppo.guard)]


def stops(left: Sequence[str], ppo: PPOSettings) -> bool:
    """Whether bounds that were left end the stage."""
    return bool(left) and ppo.guard.action == "stop"


def in_iteration(number: int, error: DivergenceError | RewardFunctionError | OutOfMemoryError) -> TrivetError:
    """The same error, which also says in which iteration (1-based) it came up."""
    where = error.where or ""
    if not where.startswith("iteration"):
        where = f"iteration {number}, {where}".removesuffix(", ")
    return type(error)(error.problem, where=where, remedy=error.remedy)


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


def require_enough_prompts(held_out: Sequence[Prompt], ppo: PPOSettings, world: World) -> None:
    """Refuse to measure on fewer held-out prompts than there are processes.

    Raises:
        DataError: there are too few; says what to do.
    """
    if ppo.held_out.every is not None and len(held_out) < world.size:
        raise DataError(
            f"{len(held_out)} held-out prompts cannot be shared by {world.size} processes",
            where="data.prompts.held_out",
            remedy="Hold out more prompts, or set ppo.held_out.every=null and ppo.publish=last.",
        )


def paths_taken(roles: Roles, ppo: PPOSettings, *, reused: bool) -> str:
    """How the rounds are computed, as a sentence.

    Args:
        reused: whether the sampler's log-probabilities could be the old ones at the start; each round looks anew.
    """
    engine = chosen_engine(roles, ppo.rollout.engine)
    merged = engine != "vllm" and roles.merges(ppo.rollout.weights)
    weights = f"a merged copy of {megabytes(roles.merged_bytes)}" if merged else "the adapter"
    old = "the sampler's" if reused else "from a pass of the policy"
    values = "the value adapter's pass" if ppo.critic == "adapter" else "wherever those come from"
    passes = "packed" if roles.packs else "padded to like lengths"
    return (
        f"Samples come from {weights} by {engine}, old log-probabilities are {old}, values come from {values};"
        f" sequences are {passes}."
    )


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
    kind = _OPTIMIZERS[ppo.optimizer]
    return kind(groups, lr=0.0, betas=ppo.adam_betas, eps=ppo.adam_epsilon, weight_decay=0.0)


_OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "paged_adamw": bitsandbytes.optim.PagedAdamW,
    "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
}


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


def save_learned(roles: Roles, ppo: PPOSettings, folder: Path) -> None:
    """The policy's adapter, and the critic's adapter and head under `value`; with `critic: head` only a head there."""
    roles.save("policy", folder)
    if ppo.critic == "adapter":
        roles.save("value", folder / "value")
    else:
        roles.save_head("value", folder / "value")


if __name__ == "__main__":
    stage_main("ppo", run)
