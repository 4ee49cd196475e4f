"""What a round of PPO reports. Every mean is over all processes.

| metric | formula | unit |
|---|---|---|
| kl/policy_reference_k1 | mean over responses of sum_t log pi - log pi_ref, on samples of pi | nats a response |
| kl/policy_reference_k3 | the same with (ratio - 1) - log ratio, ratio = pi_ref / pi | nats a response |
| kl/coefficient | beta | reward a nat |
| objective/score_raw | mean of the weighted sum of reward terms | reward |
| objective/score | the same after clipping and the penalty for a missing EOS | reward |
| objective/reward | mean of score - beta * k1: what PPO maximizes | reward |
| score/NAME | mean of one reward term, unweighted | its own |
| policy/entropy | mean over tokens, of the tempered distribution | nats a token |
| policy/clip_fraction, value/clip_fraction | share of tokens at which clipping is in force | 0..1 |
| policy/approx_kl | mean over tokens of k3 between the sampling and the updated policy | nats a token |
| policy/ratio_max | largest probability ratio of the update | 1 is none |
| value/explained_variance | 1 - Var(return - value) / Var(return), before the update | at most 1 |
| ROLE/gradient_norm | mean over steps of the norm before clipping | |
| response/length_mean, length_p95 | tokens, EOS included | tokens |
| response/eos_rate | share of responses that end by themselves | 0..1 |
| response/repetition | mean share of a response's 3-grams that it has said before | 0..1 |
| response/score_length_correlation | Pearson's r of score and length | -1..1 |
| sampler/logprob_gap_mean, _max | absolute difference of the sampler's log-probabilities from the trainer's | nats |
| sampler/checked | share of the responses that this was measured on; the others' were taken from the sampler | 0..1 |
| padding/score, padding/update | share of the forward passes' tokens that are padding | 0..1 |
| update/first_ratio_error | largest distance of the ratio from 1 before the first step | |
| held_out/score, kl, length | the policy on held-out prompts, where it was measured | reward, nats, tokens |
| seconds/rollout, score, update, total; tokens/per_second; memory/peak_mb | | s, tokens/s, MB |
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.distributed import World
from pipeline.masking import explained_variance, masked_sum
from pipeline.memory import peak_memory_bytes
from pipeline.records import as_plain
from pipeline.run_directory import RunDirectory, write_text
from stages.experience import Experience
from stages.update import UpdateStatistics, padding_share

_SAMPLES_KEPT = 2


def round_metrics(
    experience: Experience,
    statistics: UpdateStatistics,
    *,
    kl_coefficient: float,
    world: World,
) -> dict[str, float]:
    """The figures of one round, by the names of the table above."""
    mask_BT = experience.mask_BT
    responses = float(world.sum(torch.tensor(float(len(experience.episodes)))))

    def mean_over_responses(values_B: Tensor) -> float:
        return float(world.sum(values_B.double().sum().cpu())) / responses

    k1_B = masked_sum(experience.kl_BT, mask_BT, dim=1).cpu()
    checked_BT = mask_BT & experience.checked_B.to(mask_BT.device)[:, None]
    gap_BT = (experience.logprobs_BT - experience.sampler_logprobs_BT).abs()
    checked = float(world.sum(checked_BT.sum().double().cpu()))
    tokens = float(world.sum(mask_BT.sum().double().cpu()))
    lengths = world.gather([len(episode.response) for episode in experience.episodes])
    scores = world.gather(experience.scores_B.tolist())
    seconds = {**experience.seconds, "update": statistics.seconds}
    total_seconds = world.maximum(sum(seconds.values()))
    metrics = {
        "kl/policy_reference_k1": mean_over_responses(k1_B),
        "kl/policy_reference_k3": mean_over_responses(masked_sum(experience.kl_k3_BT, mask_BT, dim=1)),
        "kl/coefficient": kl_coefficient,
        "objective/score_raw": mean_over_responses(experience.raw_scores_B),
        "objective/score": mean_over_responses(experience.scores_B),
        "objective/reward": mean_over_responses(experience.scores_B - kl_coefficient * k1_B),
        "value/explained_variance": float(
            explained_variance(experience.values_BT, experience.returns_BT, mask_BT, all_reduce=world.sum)
        ),
        "response/length_mean": sum(lengths) / len(lengths),
        "response/length_p95": _quantile(lengths, 0.95),
        "response/eos_rate": mean_over_responses(experience.finished_B.float()),
        "response/repetition": mean_over_responses(
            torch.tensor([repetition(episode.response) for episode in experience.episodes])
        ),
        "response/score_length_correlation": correlation(scores, [float(length) for length in lengths]),
        "sampler/logprob_gap_mean": float(world.sum(masked_sum(gap_BT, checked_BT).double().cpu())) / checked,
        "sampler/logprob_gap_max": world.maximum(float(torch.where(checked_BT, gap_BT, 0).max())),
        "sampler/checked": mean_over_responses(experience.checked_B.float()),
        "padding/score": padding_share(experience.padding, world),
        "seconds/total": total_seconds,
        "tokens/per_second": tokens / total_seconds,
        "memory/peak_mb": world.maximum(peak_memory_bytes() / 1e6),
    }
    if statistics.first_ratio_error is not None:
        metrics["update/first_ratio_error"] = world.maximum(statistics.first_ratio_error)
    metrics |= {f"score/{name}": mean_over_responses(term_B) for name, term_B in experience.terms.items()}
    metrics |= {f"seconds/{phase}": world.maximum(value) for phase, value in seconds.items()}
    return metrics | statistics.metrics(world)


def repetition(ids: Sequence[int]) -> float:
    """Share of a response's 3-grams of tokens that occurred in it before; 0 below three tokens."""
    grams = [tuple(ids[start : start + 3]) for start in range(len(ids) - 2)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Pearson's r; 0 where either does not vary."""
    pair = torch.tensor([list(left), list(right)], dtype=torch.float64)
    centred = pair - pair.mean(dim=1, keepdim=True)
    norms = centred.norm(dim=1)
    return float(centred[0] @ centred[1] / (norms[0] * norms[1])) if bool((norms > 1e-12).all()) else 0.0


def drop_samples_after(run: RunDirectory, step: int) -> None:
    """Drop the responses of rounds that are done again, or belong to an earlier run."""
    path = run.metrics("ppo").with_name("ppo_samples.jsonl")
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]  # the rest is torn
        write_text(path, "".join(f"{line}\n" for line in lines if _step(line) <= step))


def _step(line: str) -> float:
    """The step of a line of samples; a line that cannot be read belongs to none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def sample_lines(run: RunDirectory, iteration: int, experience: Experience) -> None:
    """Append a few of the round's responses to `metrics/ppo_samples.jsonl`."""
    path = run.metrics("ppo").with_name("ppo_samples.jsonl")
    with path.open("a", encoding="utf-8") as file:
        for index in range(min(_SAMPLES_KEPT, len(experience.episodes))):
            line = {
                "step": iteration,
                "prompt": as_plain(experience.prompts[index].prompt),
                "response": experience.completions[index],
                "score": float(experience.scores_B[index]),
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _quantile(values: Sequence[int], share: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))
