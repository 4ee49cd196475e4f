"""Sampling: the distribution that was asked for, the log-probabilities that belong to it, and nothing hidden.

Shape legend: B sequence, T response token, V vocabulary.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny import tiny_tokenizer
from tiny_models import loaded_tiny_base
from tiny_ppo import favour_token, perturb, policy_roles, sharp_base, tiny_round, with_tokenizer
from torch import Tensor

from pipeline.chat import ChatFormat
from pipeline.generation import Response, SamplingSettings, derive_seed, draw, generate
from pipeline.roles import Role, Roles
from pipeline.scoring import Episode, score_logprobs

PROMPTS = [[5, 6, 7], [9] * 17, [40, 41, 42, 43, 44, 45], [77], [100, 3] * 6]
SEED = (0, "test")


def trainer_logprobs(roles: Roles, role: Role | None, responses: list[Response], temperature: float) -> list[Tensor]:
    episodes = [Episode(tuple(ids), found.ids) for ids, found in zip(PROMPTS, responses, strict=True)]
    return score_logprobs(roles, role, episodes, temperature=temperature, max_tokens=10_000)


def first_token_probabilities(roles: Roles, role: Role | None, prompt: list[int], temperature: float) -> Tensor:
    roles.inference_mode()
    with torch.no_grad(), roles.active(role):
        logits_V = roles.model(input_ids=torch.tensor([prompt])).logits[0, -1]
    return (logits_V.double() / temperature).softmax(dim=-1)


def chi_square_p(counts: Counter[int], probabilities_V: Tensor, draws: int) -> float:
    """p of Pearson's test; tokens expected less than 5 times share one bin."""
    expected_V = draws * probabilities_V
    observed_V = torch.tensor([float(counts[token]) for token in range(len(expected_V))], dtype=torch.float64)
    common_V = expected_V >= 5
    expected = torch.cat([expected_V[common_V], expected_V[~common_V].sum()[None]])
    observed = torch.cat([observed_V[common_V], observed_V[~common_V].sum()[None]])
    statistic = ((observed - expected) ** 2 / expected).sum()
    degrees = torch.tensor(len(expected) - 1.0, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees / 2, statistic / 2))


@pytest.mark.parametrize(("role", "temperature"), [("policy", 1.0), ("policy", 0.7), (None, 1.0)])
def test_samples_follow_the_tempered_softmax_of_the_role(tmp_path, role, temperature):
    roles = policy_roles(sharp_base(tmp_path))
    perturb(roles, "policy", 0.3)
    draws, prompt = 3000, [5, 6, 7]
    sampling = SamplingSettings(max_new_tokens=1, temperature=temperature, batch_size=1000)
    counts = Counter(found.ids[0] for found in generate(roles, role, [prompt] * draws, sampling, seed=SEED))
    assert chi_square_p(counts, first_token_probabilities(roles, role, prompt, temperature), draws) > 1e-3
    # The test can tell: another temperature, and another role.
    assert chi_square_p(counts, first_token_probabilities(roles, role, prompt, 1.5 * temperature), draws) < 1e-6
    other: Role | None = "policy" if role is None else None
    assert chi_square_p(counts, first_token_probabilities(roles, other, prompt, temperature), draws) < 1e-6


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_recorded_logprobs_are_the_trainers_own(tmp_path, architecture, temperature):
    """Left-padded, with a cache, token by token, against right-padded, in one forward pass."""
    base = loaded_tiny_base(tmp_path, architecture) if architecture == "gpt2" else sharp_base(tmp_path, architecture)
    roles = policy_roles(base)
    perturb(roles, "policy", 0.1)
    sampling = SamplingSettings(max_new_tokens=12, temperature=temperature)
    responses = generate(roles, "policy", PROMPTS, sampling, seed=SEED)
    for found, wanted_T in zip(responses, trainer_logprobs(roles, "policy", responses, temperature), strict=True):
        assert len(found.logprobs) == len(found.ids)
        assert torch.allclose(torch.tensor(found.logprobs), wanted_T, atol=1e-5)
    other = trainer_logprobs(roles, "policy", responses, temperature * 1.3)
    assert not torch.allclose(torch.tensor(responses[0].logprobs), other[0], atol=1e-3)


def test_a_filter_does_not_change_what_is_recorded(tmp_path):
    """With top_k the samples are filtered; what is recorded is still the unfiltered log-probability."""
    roles = policy_roles(sharp_base(tmp_path))
    sampling = SamplingSettings(max_new_tokens=6, top_k=1)
    responses = generate(roles, "policy", PROMPTS, sampling, seed=SEED)
    assert max(max(found.logprobs) for found in responses) < -1e-3  # the only token left would have 0
    for found, wanted_T in zip(responses, trainer_logprobs(roles, "policy", responses, 1.0), strict=True):
        assert torch.allclose(torch.tensor(found.logprobs), wanted_T, atol=1e-5)
    assert responses == generate(roles, "policy", PROMPTS, sampling, seed=(1, "another"))


def test_temperature_0_takes_the_likeliest_token_as_transformers_does(tmp_path):
    roles = policy_roles(sharp_base(tmp_path, dtype="bfloat16"))  # in 16 bits the likeliest token often is two
    perturb(roles, "policy", 0.1)
    sampling = SamplingSettings(max_new_tokens=12, temperature=0.0, batch_size=1)
    drawn: list[list[int]] = []
    responses = generate(roles, "policy", PROMPTS, sampling, seed=SEED, on_drawn=drawn.append)
    assert responses == generate(roles, "policy", PROMPTS, sampling, seed=(1, "another"))
    order = sorted(range(len(PROMPTS)), key=lambda index: (len(PROMPTS[index]), index))
    assert [token for (token,) in drawn] == [token for index in order for token in responses[index].ids]
    for prompt, found in zip(PROMPTS, responses, strict=True):
        with torch.no_grad(), roles.active("policy"):
            greedy = roles.model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=12,
                eos_token_id=roles.base.chat.eos_token_id,
                pad_token_id=roles.base.chat.eos_token_id,
            )
        assert list(found.ids) == greedy[0, len(prompt) :].tolist()
        assert min(found.logprobs) > -20 and max(found.logprobs) < -1e-6  # those at temperature 1


def test_a_response_ends_with_its_first_eos(tmp_path):
    roles = policy_roles(loaded_tiny_base(tmp_path))
    eos = roles.base.chat.eos_token_id
    favour_token(roles, eos, 4.0)
    responses = generate(roles, "policy", [PROMPTS[0]] * 64, SamplingSettings(max_new_tokens=6), seed=SEED)
    assert {found.finished for found in responses} == {True, False}
    assert len({len(found.ids) for found in responses}) > 3
    for found in responses:
        assert eos not in found.ids[:-1]
        assert found.finished == (found.ids[-1] == eos)
        assert found.finished or len(found.ids) == 6
        assert len(found.logprobs) == len(found.ids)


def test_ignoring_eos_fills_every_response(tmp_path):
    roles = policy_roles(loaded_tiny_base(tmp_path))
    favour_token(roles, roles.base.chat.eos_token_id, 4.0)
    sampling = SamplingSettings(max_new_tokens=6, ignore_eos=True)
    responses = generate(roles, "policy", PROMPTS, sampling, seed=SEED)
    assert {(len(found.ids), len(found.logprobs), found.finished) for found in responses} == {(6, 6, False)}


def tokenizers() -> dict[str, ChatFormat]:
    letter_pads = tiny_tokenizer()
    letter_pads.pad_token = letter_pads.convert_ids_to_tokens(letter_pads("s").input_ids[0])
    return {
        "pad = eos": ChatFormat(tiny_tokenizer("chatml")),
        "no pad": ChatFormat(tiny_tokenizer("no_pad")),
        "pad = a letter": ChatFormat(letter_pads),
    }


def test_what_the_pad_token_is_changes_nothing(tmp_path):
    """Not the samples, not their scores, not the advantages: the letter is one that prompts and responses use."""
    rounds = {}
    for name, chat in tokenizers().items():
        found = tiny_round(with_tokenizer(sharp_base(tmp_path), chat))
        favour_token(found.roles, chat.eos_token_id, 10.0)
        favour_token(found.roles, chat.tokenizer("s").input_ids[0], 3.0)
        rounds[name] = found.collect()
    wanted = rounds.pop("pad = eos")
    assert set(wanted.finished_B.tolist()) == {True, False}
    for name, found in rounds.items():
        assert found.episodes == wanted.episodes, name
        for field in ("mask_BT", "logprobs_BT", "values_BT", "raw_scores_B", "scores_B", "rewards_BT", "advantages_BT"):
            assert torch.equal(getattr(found, field), getattr(wanted, field)), (name, field)


def test_draws_follow_from_the_seed_alone(tmp_path):
    roles = policy_roles(loaded_tiny_base(tmp_path))
    sampling = SamplingSettings(max_new_tokens=4)

    def draw(*seed: int | str) -> list[tuple[int, ...]]:
        return [found.ids for found in generate(roles, "policy", PROMPTS, sampling, seed=seed)]

    torch.manual_seed(11)
    before = torch.get_rng_state()
    wanted = draw(0, "rollout", 3, 1)
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    torch.manual_seed(12)
    assert draw(0, "rollout", 3, 1) == wanted
    others = [draw(1, "rollout", 3, 1), draw(0, "rollout", 4, 1), draw(0, "rollout", 3, 0), draw(0, "gates", 3, 1)]
    assert wanted not in others and len(set(map(tuple, others))) == 4


def test_a_response_does_not_depend_on_those_beside_it(tmp_path):
    """Nor on the batch size, so that a batch which is halved for lack of memory gives the same answers."""
    roles = policy_roles(sharp_base(tmp_path))
    perturb(roles, "policy", 0.3)
    prompts = PROMPTS * 3

    def ids(batch_size: int, chosen: list[int]) -> list[tuple[int, ...]]:
        sampling = SamplingSettings(max_new_tokens=6, batch_size=batch_size)
        found = generate(roles, "policy", [prompts[index] for index in chosen], sampling, seed=SEED, numbers=chosen)
        return [response.ids for response in found]

    everything = list(range(len(prompts)))
    wanted = ids(64, everything)
    assert len(set(wanted)) > len(PROMPTS), "the same prompt is answered differently under another number"
    assert ids(4, everything) == wanted
    assert ids(64, [13, 2, 7]) == [wanted[index] for index in (13, 2, 7)]
    assert wanted == [found.ids for found in generate(roles, "policy", prompts, SamplingSettings(6), seed=SEED)]


def test_a_token_that_cannot_be_said_is_never_drawn():
    """The ends of the interval are where it could be."""
    probabilities_BV = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).repeat(4, 1)
    uniforms_B = torch.tensor([0.0, 0.25, 0.24999999, 1 - 2**-53], dtype=torch.float64)
    assert draw(probabilities_BV, uniforms_B).tolist() == [1, 3, 1, 3]


def test_every_token_of_a_large_vocabulary_keeps_its_share():
    """After a likely token, the unlikely ones are small steps on a large sum."""
    size = 200_000
    probabilities_BV = torch.full((1, size), 1e-9)
    probabilities_BV[0, 0] = 1 - size * 1e-9
    total = float(probabilities_BV.double().sum())
    for token in (1, 777, 123_456, size - 1):
        middle = (float(probabilities_BV[0, 0]) + (token - 0.5) * float(torch.tensor(1e-9))) / total
        assert draw(probabilities_BV, torch.tensor([middle], dtype=torch.float64)).tolist() == [token]


def test_seeds_of_different_parts_differ():
    parts = [(seed, "rollout", iteration, rank) for seed in (0, 1) for iteration in range(9) for rank in range(4)]
    assert len({derive_seed(*part) for part in parts}) == len(parts)
    assert derive_seed(1, 12) != derive_seed(11, 2)
    assert 0 <= derive_seed("x") < 2**63


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_padding_and_batches_do_not_change_the_likeliest_response(tmp_path, architecture):
    roles = policy_roles(loaded_tiny_base(tmp_path, architecture))
    perturb(roles, "policy", 0.1)

    def likeliest(prompts: list[list[int]], batch_size: int) -> list[Response]:
        sampling = SamplingSettings(max_new_tokens=8, temperature=1e-5, batch_size=batch_size)
        return generate(roles, "policy", prompts, sampling, seed=SEED)

    alone = [likeliest([prompt], 1)[0].ids for prompt in PROMPTS]
    assert len(set(alone)) > 1
    for batch_size in (1, 2, 64):
        assert [found.ids for found in likeliest(PROMPTS, batch_size)] == alone


def test_progress_is_told_of_every_response(tmp_path):
    roles = policy_roles(loaded_tiny_base(tmp_path))
    told: list[int] = []
    sampling = SamplingSettings(max_new_tokens=2, batch_size=2)
    generate(roles, "policy", PROMPTS, sampling, seed=SEED, on_batch=told.append)
    assert told == [2, 2, 1]
