"""Stage 4: is the policy better than SFT? Both answer held-out prompts; judges compare the answers.

    win rate = (wins + ties / 2) / n,   KL = E_policy[ sum_t log pi - log pi_SFT ]

Judges are the reward model, every reward function, the gold measure, which training never saw, and whoever
`evaluate.judges` names: reward models of other runs, and endpoints (`stages.judges`). Win rates come with Wilson's 95%
interval, means with the normal one, and length-controlled win rates with that of `pipeline.length_control`. On demand
the base answers as well, and the best of n answers of SFT (`stages.yardsticks`).

    python -m stages.evaluate CONFIG [key=value ...]
    accelerate launch -m stages.evaluate CONFIG
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts import Manifest, digest, read_manifest
from pipeline.base_files import load_tokenizer
from pipeline.base_model import Base, base_identity, fingerprint, load_base, require_unchanged
from pipeline.chat import ChatFormat
from pipeline.config import PipelineConfig
from pipeline.config_file import LoadedConfig
from pipeline.datasets import load_instructions, load_prompts
from pipeline.distributed import World, seed_everything
from pipeline.engines import require_engine
from pipeline.generation import SamplingSettings
from pipeline.kl import kl_k1
from pipeline.length_control import length_controlled_win_rate
from pipeline.memory_budget import MemoryBudget
from pipeline.progress import progress, say
from pipeline.records import Prompt, TokenizedExample, as_plain
from pipeline.rewards import Calibration, RewardFunction
from pipeline.roles import Role, Roles
from pipeline.run_directory import RunDirectory, write_json
from pipeline.scoring import Episode, require_finite, score_logprobs
from pipeline.sharding import sharers
from pipeline.statistics import mean_interval, win_rate
from stages.command import stage_main
from stages.experience import Budgets
from stages.gates import require_fitting_parents
from stages.held_out_answers import judged_while_learning
from stages.inputs import stage_inputs
from stages.interruption import deferred, stop_alone
from stages.judges import (
    Preferences,
    preferences_of,
    raw_scores,
    require_judges,
    scores_of_another_reward_model,
    where_of,
)
from stages.parts import Parts, batches_of
from stages.result import StageClock, finish
from stages.yardsticks import best_of, best_of_n_kl, perplexities, rewards_of

CONTESTANTS: tuple[tuple[str, Role | None], ...] = (("sft", "reference"), ("ppo", "policy"))
"""Who always answers, under which role."""

BEST_OF_N = "best_of_n"
"""What the best of n answers of SFT is called."""


@dataclass(frozen=True)
class Answers:
    """One contestant's answers to all prompts."""

    episodes: list[Episode]
    texts: list[str]
    finished: list[bool]

    def some(self, numbers: Sequence[int]) -> Answers:
        """Those with these numbers."""
        return Answers(
            [self.episodes[number] for number in numbers],
            [self.texts[number] for number in numbers],
            [self.finished[number] for number in numbers],
        )


@dataclass(frozen=True)
class Evaluation:
    """All that came of it.

    `scores` are by judge and contestant, a number a prompt; `opinions` of judges who see two answers at once, by judge
    and opponent; `kl_B` is each of PPO's answers' KL to SFT in nats; `while_learning` has a row for each time that PPO
    measured the policy.
    """

    prompts: Sequence[Prompt]
    answers: Mapping[str, Answers]
    scores: Mapping[str, Mapping[str, list[float]]]
    opinions: Mapping[str, Mapping[str, Preferences]]
    kl_B: Sequence[float]
    forgetting: Mapping[str, Any] | None
    while_learning: Sequence[Mapping[str, Any]] = ()

    def points(self, opponent: str) -> Iterator[tuple[str, list[float | None]]]:
        """By each judge, 1 where PPO beats the opponent, 0 where it loses, 0.5 for a tie, None where nobody knows."""
        for judge, scores in self.scores.items():
            pairs = zip(scores["ppo"], scores[opponent], strict=True)
            yield judge, [0.5 if ours == theirs else float(ours > theirs) for ours, theirs in pairs]
        for judge, opinions in self.opinions.items():
            if opponent in opinions and any(point is not None for point in opinions[opponent].points):
                known = opinions[opponent].points
                yield judge, [*known, *[None] * (len(self.prompts) - len(known))]

    def against(self, opponent: str) -> dict[str, Any]:
        """PPO's win rates against an opponent, as they are and length-controlled, by judge."""
        lengths = [
            len(ours.response) - len(theirs.response)
            for ours, theirs in zip(self.answers["ppo"].episodes, self.answers[opponent].episodes, strict=True)
        ]
        rates, controlled = {}, {}
        for judge, points in self.points(opponent):
            known = [(point, gap) for point, gap in zip(points, lengths, strict=True) if point is not None]
            won = [point for point, _ in known]
            rates[judge] = count(won)
            controlled[judge] = length_controlled_win_rate(won, [gap for _, gap in known]).as_dict()
        return {"win_rate": rates, "length_controlled_win_rate": controlled}


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
    held_out = load_prompts(config.data, chat, config.ppo.max_prompt_tokens).held_out
    prompts = held_out[: config.evaluate.prompts]
    functions = {
        source.name: RewardFunction(source.function) for source in config.ppo.rewards if source.function is not None
    }
    if config.evaluate.gold is not None:
        functions["gold"] = RewardFunction(config.evaluate.gold, what="gold function")
    for function in functions.values():
        function.probe(prompts)
    rows = held_out_rows(config, chat)

    inputs = stage_inputs("evaluate", config, run)
    require_engine(config.ppo.rollout)
    identity = base_identity(config.base, chat, world.device)
    require_fitting_parents("evaluate", config, run, identity)
    require_judges(config, identity)

    # Adapters.
    share_out_to = sharers(world, config.base)
    base = load_base(config.base, world.device, plain_attention=config.prefers_plain_attention)
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
    contestants = [*CONTESTANTS, *([("base", None)] if "base" in config.evaluate.opponents else [])]
    n = config.evaluate.best_of
    candidates = [prompt for prompt in prompts for _ in range(n)] if n > 1 else []
    answers, drawn = {}, None
    clock.go_on(run, "evaluate", digest(inputs))
    ask = partial(answer, parts, roles, sampling=sampling)
    with deferred(), progress(len(contestants) * len(prompts) + len(candidates), "evaluate", "answers") as bar:
        for name, role in contestants:
            answers[name] = ask(role, prompts, seed=(config.seed, "evaluate"), on_batch=bar.advance)
        if candidates:
            seed = (config.seed, "best of n")
            drawn = ask("reference", candidates, seed=seed, on_batch=bar.advance, name=BEST_OF_N)

    # Judge.
    batches = batches_of([len(episode.prompt) for episode in answers["ppo"].episodes], sampling.batch_size)
    scores: dict[str, dict[str, list[float]]] = {}
    others = [judge for judge in config.evaluate.judges if judge.reward_run is not None]
    passes = (len(answers) if reward_manifest else 0) + 1 + len(others) * (len(answers) + (n > 1))
    total = passes * len(prompts) + (len(candidates) if reward_manifest else 0) + len(contestants) * len(rows)
    with deferred(), progress(total, "evaluate", "scores") as bar:
        of_candidates = None
        if reward_manifest is not None:
            calibration = Calibration.of(reward_manifest)

            def standardised(name: str, episodes: list[Episode], batches: Sequence[Sequence[int]]) -> list[float]:
                raw = parts.compute(
                    f"reward-{name}", batches, partial(raw_scores, roles, episodes, budgets), bar.advance
                )
                numbers: list[float] = calibration.apply(torch.tensor(raw)).tolist()
                return numbers

            scores["reward_model"] = {
                name: standardised(name, found.episodes, batches) for name, found in answers.items()
            }
            if drawn is not None:
                lengths = [len(episode.prompt) for episode in drawn.episodes]
                of_candidates = standardised(BEST_OF_N, drawn.episodes, batches_of(lengths, sampling.batch_size))
        if drawn is not None:
            # One process asks the functions, which need not be the same in all.
            rewards = partial(rewards_of, config.ppo, functions, candidates, drawn.texts, drawn.finished, of_candidates)
            best = best_of(parts.keep("best-of-n-rewards", rewards), n) if world.is_main else []
            best = world.gather(best)
            answers[BEST_OF_N] = drawn.some(best)
            if of_candidates is not None:
                scores["reward_model"][BEST_OF_N] = [of_candidates[index] for index in best]
        episodes = {name: found.episodes for name, found in answers.items()}
        for judge in others:
            found = scores_of_another_reward_model(parts, roles, judge, episodes, batches, bar.advance)
            scores[judge.label] = found
        kl = partial(policy_kl, roles, answers["ppo"].episodes, sampling.temperature, budgets)
        kl_B = parts.compute("kl", batches, kl, bar.advance)
        forgetting = None
        if rows:
            forgetting = perplexities(parts, roles, contestants, rows, sampling.batch_size, bar.advance)
    require_unchanged(base, base_before)
    opinions = opinions_of(parts, config, prompts, answers)
    if world.is_main:
        for number, (name, function) in enumerate(functions.items()):
            scores[name] = {
                contestant: parts.keep(f"function-{number}-{contestant}", partial(function, prompts, found.texts))
                for contestant, found in answers.items()
            }
        gold = functions.get("gold")
        learning = [] if gold is None else judged_while_learning(run.stage("ppo"), held_out, gold, parts.keep)
        evaluation = Evaluation(prompts, answers, scores, opinions, kl_B, forgetting, learning)
        publish(loaded, run, inputs, base, clock, evaluation, reward_manifest)
    world.wait()
    return read_manifest(run.stage("evaluate"))


def held_out_rows(config: PipelineConfig, chat: ChatFormat) -> list[TokenizedExample]:
    """The held-out instructions that show what was forgotten; none where there are none, or none are wanted."""
    if not config.evaluate.perplexity_rows or not config.data.instructions.sources:
        return []
    held_out = load_instructions(config.data, chat, config.sft.max_length).held_out[: config.evaluate.perplexity_rows]
    return [chat.example(record.prompt, record.completion) for record in held_out]


def opinions_of(
    parts: Parts, config: PipelineConfig, prompts: Sequence[Prompt], answers: Mapping[str, Answers]
) -> dict[str, dict[str, Preferences]]:
    """What each endpoint says of PPO beside each opponent: by judge, then by opponent."""
    endpoints = [judge for judge in config.evaluate.judges if judge.endpoint is not None]
    opponents = [name for name in ("sft", "base") if name in answers]
    questions = sum(min(len(prompts), judge.prompts or len(prompts)) for judge in endpoints) * len(opponents)
    if not questions:
        return {}
    with deferred(), progress(questions, "evaluate", "questions to judges") as bar:
        return {
            judge.label: {
                name: preferences_of(
                    parts, judge, name, prompts, answers["ppo"].texts, answers[name].texts, bar.advance
                )
                for name in opponents
            }
            for judge in endpoints
        }


def publish(
    loaded: LoadedConfig,
    run: RunDirectory,
    inputs: Mapping[str, Any],
    base: Base,
    clock: StageClock,
    found: Evaluation,
    reward: Manifest | None,
) -> None:
    """Write down what came out: the figures, and all answers side by side."""
    evaluate = loaded.config.evaluate
    metrics: dict[str, Any] = {
        "n": len(found.prompts),
        "kl": mean_interval(found.kl_B).as_dict(),
        **found.against("sft"),
        "mean_score": {
            judge: {name: mean_interval(values).as_dict() for name, values in scores.items()}
            for judge, scores in found.scores.items()
        },
        "response": {name: describe(answers) for name, answers in found.answers.items()},
    }
    if "base" in found.answers:
        metrics["against_base"] = found.against("base")
    if BEST_OF_N in found.answers:
        metrics[BEST_OF_N] = {"n": evaluate.best_of, "kl": best_of_n_kl(evaluate.best_of), **found.against(BEST_OF_N)}
    if found.forgetting is not None:
        metrics["perplexity"] = found.forgetting
    if found.while_learning:
        metrics["gold_while_learning"] = found.while_learning
    if evaluate.judges:
        metrics["judges"] = {
            judge.label: where_of(judge)
            | {f"against_{name}": opinion.figures for name, opinion in found.opinions.get(judge.label, {}).items()}
            for judge in evaluate.judges
        }
    if reward is not None:
        metrics["reward_accuracy"] = reward.metrics["held_out_accuracy"]
    rows = side_by_side(found)

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
    role: Role | None,
    prompts: Sequence[Prompt],
    sampling: SamplingSettings,
    *,
    seed: tuple[int | str, ...],
    on_batch: Callable[[int], None],
    name: str | None = None,
) -> Answers:
    """One sampled answer a prompt. All contestants get the same seeds, so that equal policies answer equally."""
    chat = roles.base.chat
    ids = [tuple(chat.prompt_ids(prompt.prompt)) for prompt in prompts]
    found = parts.answers(
        roles,
        role,
        ids,
        sampling,
        seed=seed,
        on_batch=on_batch,
        name=name,
    )
    return Answers(
        [Episode(prompt, one.ids) for prompt, one in zip(ids, found, strict=True)],
        [chat.decode(one.ids) for one in found],
        [one.finished for one in found],
    )


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


def count(points: Sequence[float]) -> dict[str, float]:
    """A win rate with its interval, from 1 for a win, 0 for a loss and 0.5 for a tie."""
    wins, ties = sum(point == 1 for point in points), sum(point == 0.5 for point in points)
    losses = len(points) - wins - ties
    return win_rate(wins, ties, losses).as_dict() | {"wins": wins, "ties": ties, "losses": losses}


def describe(answers: Answers) -> dict[str, Any]:
    """Length in tokens, with its interval, and the share of answers that end by themselves."""
    return {
        "length": mean_interval([float(len(episode.response)) for episode in answers.episodes]).as_dict(),
        "eos_rate": sum(answers.finished) / len(answers.finished),
    }


def side_by_side(found: Evaluation) -> list[dict[str, Any]]:
    """A row a prompt: the prompt, all answers, and what each judge gave them."""
    rows = []
    for index, prompt in enumerate(found.prompts):
        scores = {judge: {name: values[index] for name, values in of.items()} for judge, of in found.scores.items()}
        for judge, opinions in found.opinions.items():
            points = opinions["sft"].points
            if index < len(points) and (point := points[index]) is not None:
                scores[judge] = {"sft": 1 - point, "ppo": point}
        rows.append(
            {
                "prompt": as_plain(prompt.prompt),
                "source": str(prompt.origin),
                **{name: answers.texts[index] for name, answers in found.answers.items()},
                "scores": scores,
            }
        )
    return rows


def as_sample(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `side_by_side` for a reader: one judge's opinion, the gold measure's where there is one."""
    judge = "gold" if "gold" in row["scores"] else next(iter(row["scores"]))
    answers = {name: row[name] for name, _ in CONTESTANTS}
    return {"prompt": row["prompt"], **answers, "judge": judge, "scores": row["scores"][judge]}


if __name__ == "__main__":
    stage_main("evaluate", run)
