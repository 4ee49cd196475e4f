"""Stage 4: is the policy better than SFT? Both answer held-out prompts; judges compare the answers.

    win rate = (wins + ties / 2) / n,   KL = E_policy[ sum_t log pi - log pi_SFT ]

Judges are the reward model, every reward function, and the gold measure, which training never saw. Win rates
come with Wilson's 95% interval, means with the normal one. Left out: judges that need a network.

    python -m stages.evaluate CONFIG [key=value ...]
    accelerate launch -m stages.evaluate CONFIG
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts import Manifest, digest, read_manifest
from pipeline.base_files import load_tokenizer
from pipeline.base_model import Base, base_identity, fingerprint, load_base, require_unchanged
from pipeline.chat import ChatFormat
from pipeline.config_file import LoadedConfig
from pipeline.datasets import load_prompts
from pipeline.distributed import World, seed_everything
from pipeline.engines import require_engine
from pipeline.generation import SamplingSettings
from pipeline.kl import kl_k1
from pipeline.memory_budget import MemoryBudget
from pipeline.progress import progress, say
from pipeline.records import Prompt, as_plain
from pipeline.rewards import Calibration, RewardFunction
from pipeline.roles import Role, Roles
from pipeline.run_directory import RunDirectory, write_json
from pipeline.scoring import Episode, require_finite, score_logprobs, score_rewards
from pipeline.sharding import sharers
from pipeline.statistics import mean_interval, win_rate
from stages.command import stage_main
from stages.experience import Budgets
from stages.gates import require_fitting_parents
from stages.inputs import stage_inputs
from stages.interruption import deferred, stop_alone
from stages.parts import Parts, batches_of
from stages.result import StageClock, finish

CONTESTANTS: tuple[tuple[str, Role], ...] = (("sft", "reference"), ("ppo", "policy"))
"""Who answers, under which role."""


@dataclass(frozen=True)
class Answers:
    """One contestant's answers to all prompts."""

    episodes: list[Episode]
    texts: list[str]
    finished: list[bool]


def run(loaded: LoadedConfig, run: RunDirectory) -> Manifest:
    """Compare the PPO policy with the SFT policy; returns the manifest of the finished stage.

    Raises:
        DataError, RewardFunctionError: before a model is loaded.
        IncompatibleAdapterError, ArtifactError: an adapter does not fit or is damaged.
        BaseModelError: the base would have changed.
        Interrupted: the stage was asked to stop; answers and scores so far are kept.
    """
    config, clock = loaded.config, StageClock()
    world = World()  # the processes share the answers and scores; one of them asks the functions and writes
    seed_everything(config.seed, deterministic=config.deterministic)

    # Data and judges.
    chat = ChatFormat(load_tokenizer(config.base))
    prompts = load_prompts(config.data, chat, config.ppo.max_prompt_tokens).held_out[: config.evaluate.prompts]
    functions = {
        source.name: RewardFunction(source.function) for source in config.ppo.rewards if source.function is not None
    }
    if config.evaluate.gold is not None:
        functions["gold"] = RewardFunction(config.evaluate.gold, what="gold function")
    for function in functions.values():
        function.probe(prompts)

    inputs = stage_inputs("evaluate", config, run)
    require_engine(config.ppo.rollout)
    require_fitting_parents("evaluate", config, run, base_identity(config.base, chat, world.device))

    # Adapters.
    share_out_to = sharers(world, config.base)
    base = load_base(config.base, world.device)
    base_before = fingerprint(base.model)
    roles = Roles(base, share_out_to=share_out_to)
    roles.add_from("reference", run.stage("sft"))
    roles.add_from("policy", run.stage("ppo"))
    reward_manifest = roles.add_from("reward", run.stage("reward")) if config.trains_reward_model else None
    roles.set_trainable()
    roles.disable_dropout()
    if roles.shards is not None:
        say(roles.shards.sentence)

    # Answer.
    sampling = SamplingSettings(
        max_new_tokens=config.evaluation_max_new_tokens,
        temperature=config.evaluation_temperature,
        batch_size=config.evaluate.batch_size,
        weights=config.ppo.rollout.weights,
        engine=config.ppo.rollout.engine,
        server=config.ppo.rollout.server,
        vllm=config.ppo.rollout.vllm,
    )
    budgets = Budgets(
        MemoryBudget("ppo.microbatch_tokens", config.ppo.microbatch_tokens, say, alone=roles.shards is None),
        MemoryBudget("evaluate.batch_size", config.evaluate.batch_size, say, alone=roles.shards is None),
        length_setting="evaluate.max_new_tokens",
    )
    parts = Parts(
        run.working("evaluate") / "parts",
        inputs_digest=digest(inputs),
        world=world,
        budgets=budgets,
        in_step=roles.shards is not None,
    )
    roles.between_passes = partial(stop_alone, world)
    answers = {}
    with deferred(), progress(2 * len(prompts), "evaluate", "answers") as bar:
        for name, role in CONTESTANTS:
            answers[name] = answer(
                parts,
                roles,
                role,
                prompts,
                sampling,
                seed=(config.seed, "evaluate"),
                on_batch=bar.advance,
            )

    # Judge.
    batches = batches_of([len(episode.prompt) for episode in answers["ppo"].episodes], sampling.batch_size)
    scores: dict[str, dict[str, list[float]]] = {}
    with deferred(), progress((3 if reward_manifest else 1) * len(prompts), "evaluate", "scores") as bar:
        if reward_manifest is not None:
            calibration = Calibration.of(reward_manifest)
            raw = {
                name: parts.compute(
                    f"reward-{name}", batches, partial(raw_scores, roles, found.episodes, budgets), bar.advance
                )
                for name, found in answers.items()
            }
            scores["reward_model"] = {
                name: calibration.apply(torch.tensor(found)).tolist() for name, found in raw.items()
            }
        kl = partial(policy_kl, roles, answers["ppo"].episodes, sampling.temperature, budgets)
        kl_B = parts.compute("kl", batches, kl, bar.advance)
    require_unchanged(base, base_before)
    if world.is_main:
        for number, (judge, function) in enumerate(functions.items()):
            scores[judge] = {
                name: parts.keep(f"function-{number}-{name}", partial(function, prompts, found.texts))
                for name, found in answers.items()
            }
        publish(loaded, run, inputs, base, clock, prompts, answers, scores, kl_B, reward_manifest)
    world.wait()
    return read_manifest(run.stage("evaluate"))


def publish(
    loaded: LoadedConfig,
    run: RunDirectory,
    inputs: Mapping[str, Any],
    base: Base,
    clock: StageClock,
    prompts: Sequence[Prompt],
    answers: Mapping[str, Answers],
    scores: Mapping[str, Mapping[str, list[float]]],
    kl_B: Sequence[float],
    reward: Manifest | None,
) -> None:
    """Write down what came out: the figures, and all answers side by side."""
    metrics: dict[str, Any] = {
        "n": len(prompts),
        "kl": mean_interval(kl_B).as_dict(),
        "win_rate": {judge: compare(found["ppo"], found["sft"]) for judge, found in scores.items()},
        "mean_score": {
            judge: {name: mean_interval(values).as_dict() for name, values in found.items()}
            for judge, found in scores.items()
        },
        "response": {name: describe(found) for name, found in answers.items()},
    }
    if reward is not None:
        metrics["reward_accuracy"] = reward.metrics["held_out_accuracy"]
    rows = side_by_side(prompts, answers, scores)

    def save(folder: Path) -> None:
        with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_json(folder / "samples.json", [as_sample(row) for row in rows[: loaded.config.evaluate.samples]])

    finish(
        "evaluate",
        "evaluation",
        loaded,
        run,
        inputs=inputs,
        base=base.identity,
        clock=clock,
        metrics=metrics,
        save=save,
    )


def answer(
    parts: Parts,
    roles: Roles,
    role: Role,
    prompts: Sequence[Prompt],
    sampling: SamplingSettings,
    *,
    seed: tuple[int | str, ...],
    on_batch: Callable[[int], None],
) -> Answers:
    """One sampled answer a prompt. Both contestants get the same seeds, so that equal policies answer equally."""
    chat = roles.base.chat
    ids = [tuple(chat.prompt_ids(prompt.prompt)) for prompt in prompts]
    found = parts.answers(
        roles,
        role,
        ids,
        sampling,
        seed=seed,
        on_batch=on_batch,
    )
    return Answers(
        [Episode(prompt, one.ids) for prompt, one in zip(ids, found, strict=True)],
        [chat.decode(one.ids) for one in found],
        [one.finished for one in found],
    )


def raw_scores(roles: Roles, episodes: Sequence[Episode], budgets: Budgets, batch: Sequence[int]) -> list[float]:
    """The reward adapter's raw scores of some of the episodes."""
    chosen = [episodes[index].ids for index in batch]
    raw_B = budgets.fit_sequences(
        [len(ids) for ids in chosen], lambda most: score_rewards(roles, chosen, max_tokens=most)
    )
    numbers: list[float] = require_finite(raw_B, "score of the reward model", where="evaluate").tolist()
    return numbers


def policy_kl(
    roles: Roles, episodes: Sequence[Episode], temperature: float, budgets: Budgets, batch: Sequence[int]
) -> list[float]:
    """KL(policy || SFT) of some of the policy's responses in nats: the sum of k1 over a response's tokens."""
    chosen = [episodes[index] for index in batch]

    def logprobs(role: Role) -> list[torch.Tensor]:
        return budgets.fit_sequences(
            [len(episode.ids) for episode in chosen],
            lambda most: score_logprobs(roles, role, chosen, temperature=temperature, max_tokens=most),
        )

    policy, reference = logprobs("policy"), logprobs("reference")
    kl_B = torch.stack([kl_k1(ours, theirs).sum() for ours, theirs in zip(policy, reference, strict=True)])
    numbers: list[float] = require_finite(kl_B, "KL divergence from the SFT policy", where="evaluate").tolist()
    return numbers


def compare(challenger: Sequence[float], incumbent: Sequence[float]) -> dict[str, float]:
    """Win rate of the challenger, prompt by prompt; equal scores are ties."""
    wins = sum(ours > theirs for ours, theirs in zip(challenger, incumbent, strict=True))
    losses = sum(ours < theirs for ours, theirs in zip(challenger, incumbent, strict=True))
    ties = len(challenger) - wins - losses
    return win_rate(wins, ties, losses).as_dict() | {"wins": wins, "ties": ties, "losses": losses}


def describe(answers: Answers) -> dict[str, Any]:
    """Length in tokens, with its interval, and the share of answers that end by themselves."""
    return {
        "length": mean_interval([float(len(episode.response)) for episode in answers.episodes]).as_dict(),
        "eos_rate": sum(answers.finished) / len(answers.finished),
    }


def side_by_side(
    prompts: Sequence[Prompt], answers: Mapping[str, Answers], scores: Mapping[str, Mapping[str, list[float]]]
) -> list[dict[str, Any]]:
    """A row a prompt: the prompt, both answers, and what each judge gave them."""
    return [
        {
            "prompt": as_plain(prompt.prompt),
            "source": str(prompt.origin),
            **{name: found.texts[index] for name, found in answers.items()},
            "scores": {
                judge: {name: values[index] for name, values in found.items()} for judge, found in scores.items()
            },
        }
        for index, prompt in enumerate(prompts)
    ]


def as_sample(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `side_by_side` for a reader: one judge's opinion, the gold measure's where there is one."""
    judge = "gold" if "gold" in row["scores"] else next(iter(row["scores"]))
    answers = {name: row[name] for name, _ in CONTESTANTS}
    return {"prompt": row["prompt"], **answers, "judge": judge, "scores": row["scores"][judge]}


if __name__ == "__main__":
    stage_main("evaluate", run)
