"""Log-probabilities, values and rewards of finished sequences against the plain, slow way.

Shape legend: B sequence, L token, D width, T response token, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch
from tiny_models import loaded_tiny_base
from tiny_ppo import LORA, perturb, policy_roles, ppo_roles, sharp_base
from torch import Tensor

from pipeline import scoring
from pipeline.records import Comparison, Message, Origin
from pipeline.roles import Roles, reward_model_for_training
from pipeline.scoring import (
    Episode,
    batch_episodes,
    policy_logprobs,
    score_logprobs,
    score_logprobs_and_values,
    score_rewards,
    score_values,
)

EPISODES = [
    Episode((5, 6, 7), (8, 9, 10, 258)),
    Episode((40,) * 19, (41,)),
    Episode((77, 78), (79, 80, 81, 82, 83, 84, 85)),
    Episode((100, 3) * 6, (258,)),
    Episode((5, 6, 7), (258, 258, 9)),
]


def hidden(roles: Roles, role: str, ids: tuple[int, ...]) -> torch.Tensor:
    """Hidden states [L, D] of one sequence alone, without padding, from the model's own output."""
    roles.inference_mode()
    with torch.no_grad(), roles.active(role):
        output = roles.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return output.hidden_states[-1][0]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_full_logits(tmp_path, architecture, temperature):
    base = loaded_tiny_base(tmp_path, architecture) if architecture == "gpt2" else sharp_base(tmp_path, architecture)
    roles = policy_roles(base)
    perturb(roles, "policy", 0.1)
    found = score_logprobs(roles, "policy", EPISODES, temperature=temperature, max_tokens=64)
    for episode, found_T in zip(EPISODES, found, strict=True):
        with torch.no_grad(), roles.active("policy"):
            logits_LV = roles.model(input_ids=torch.tensor([episode.ids])).logits[0].double()
        logprobs_LV = (logits_LV / temperature).log_softmax(dim=-1)
        first = len(episode.prompt)
        wanted = [float(logprobs_LV[first + t - 1, token]) for t, token in enumerate(episode.response)]
        assert found_T.tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_values_stand_before_each_response_token(tmp_path, architecture):
    roles = ppo_roles(loaded_tiny_base(tmp_path, architecture))
    perturb(roles, "value")
    found = score_values(roles, EPISODES, max_tokens=64)
    weight_D, bias = roles.heads["value"].weight.detach()[0].double(), float(roles.heads["value"].bias.detach())
    for episode, found_T in zip(EPISODES, found, strict=True):
        hidden_LD = hidden(roles, "value", episode.ids).double()
        wanted = [float(hidden_LD[len(episode.prompt) + t - 1] @ weight_D) + bias for t in range(len(episode.response))]
        assert found_T.tolist() == pytest.approx(wanted, abs=1e-5)


def test_the_score_is_read_at_the_last_real_token(tmp_path):
    """The EOS where there is one, although padding, and a pad token that equals the EOS, follow or stand inside."""
    roles = ppo_roles(loaded_tiny_base(tmp_path))
    assert roles.base.chat.tokenizer.pad_token_id == roles.base.chat.eos_token_id == 258
    sequences = [episode.ids for episode in EPISODES]
    found_B = score_rewards(roles, sequences, max_tokens=10_000)
    weight_D = roles.heads["reward"].weight.detach()[0].double()
    for ids, score in zip(sequences, found_B.tolist(), strict=True):
        scores_L = hidden(roles, "reward", ids).double() @ weight_D
        assert score == pytest.approx(float(scores_L[-1]), abs=1e-5)
        assert abs(score - float(scores_L[-2])) > 1e-3


@pytest.mark.parametrize("max_tokens", [16, 40, 64])
def test_the_microbatch_budget_changes_nothing(tmp_path, max_tokens):
    roles = ppo_roles(loaded_tiny_base(tmp_path))
    perturb(roles, "value")

    def everything(budget: int) -> list[torch.Tensor]:
        return [
            *score_logprobs(roles, "policy", EPISODES, temperature=1.0, max_tokens=budget),
            *score_values(roles, EPISODES, max_tokens=budget),
            score_rewards(roles, [episode.ids for episode in EPISODES], max_tokens=budget),
        ]

    for found, wanted in zip(everything(max_tokens), everything(10_000), strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)  # padding changes the order of sums, nothing else


def test_no_role_computes_without_its_adapter(tmp_path):
    roles = ppo_roles(loaded_tiny_base(tmp_path))
    by_role = [
        torch.cat(score_logprobs(roles, role, EPISODES, temperature=1.0, max_tokens=64))
        for role in ("policy", "reference", "reward", None)
    ]
    assert torch.equal(by_role[0], by_role[1])
    assert not torch.allclose(by_role[0], by_role[2], atol=1e-3)
    assert not torch.allclose(by_role[0], by_role[3], atol=1e-3)


def test_prompt_positions_get_no_logits(tmp_path, monkeypatch):
    roles = ppo_roles(loaded_tiny_base(tmp_path))
    rows: list[int] = []
    own = roles.logits
    monkeypatch.setattr(roles, "logits", lambda states: rows.append(states.shape[0]) or own(states))
    monkeypatch.setattr(scoring, "LOGIT_CHUNK_TOKENS", 5)
    score_logprobs(roles, "policy", EPISODES, temperature=1.0, max_tokens=10_000)
    assert sum(rows) == sum(len(episode.response) for episode in EPISODES)
    assert max(rows) == 5
    rows.clear()
    score_values(roles, EPISODES, max_tokens=10_000)
    score_rewards(roles, [episode.ids for episode in EPISODES], max_tokens=10_000)
    assert rows == []


def test_an_episode_without_a_response_is_a_fault_of_the_caller(tmp_path):
    roles = ppo_roles(loaded_tiny_base(tmp_path))
    with pytest.raises(AssertionError, match="prompt and a response"):
        score_logprobs(roles, "policy", [Episode((5,), ())], temperature=1.0, max_tokens=64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_same_pair_gets_the_same_score_in_both_stages(tmp_path, quantization, dtype):
    """As the reward stage trains and as PPO scores: the same ids, and bit for bit the same score."""
    from stages.reward import score_while_training, tokenize

    def fresh_base():
        return loaded_tiny_base(tmp_path, quantization=quantization, dtype=dtype)

    prompt, answers = (Message("user", "sun"),), ("sun!", "zz sun, and a longer answer")
    chosen, rejected = ((Message("assistant", text),) for text in answers)
    base = fresh_base()
    pair = tokenize(base.chat, [Comparison(prompt, chosen, rejected, Origin("tiny", 1))])[0]

    # PPO's side of the ids: the prompt as it is sampled from, and a response that says these words and then EOS.
    for ids, text in zip((pair.chosen, pair.rejected), answers, strict=True):
        said = tuple(base.chat.tokenizer(text, add_special_tokens=False).input_ids)
        assert Episode(tuple(base.chat.prompt_ids(prompt)), (*said, base.chat.eos_token_id)).ids == ids

    torch.manual_seed(3)
    model, _ = reward_model_for_training(base, LORA, None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter)) if "lora_" in name else None
    sequences = [pair.chosen, pair.rejected]
    trained_B = score_while_training(model, sequences, base.device, 64)
    model.save_pretrained(str(tmp_path / "reward"), save_embedding_layers=False)
    roles = Roles(fresh_base())
    roles.add_weights("reward", tmp_path / "reward")
    assert torch.equal(score_rewards(roles, sequences, max_tokens=64), trained_B)
    assert float((trained_B[0] - trained_B[1]).abs()) > 1e-3


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_one_pass_gives_logprobs_and_a_heads_values_as_two_do(tmp_path, quantization):
    """The values are checked against the trunk's states, one sequence at a time."""
    roles = ppo_roles(loaded_tiny_base(tmp_path, quantization=quantization), critic="head")
    perturb(roles, "policy", 0.1)
    perturb(roles, "value")
    logprobs, values = score_logprobs_and_values(roles, EPISODES, temperature=0.9, max_tokens=40)
    for found_T, wanted_T in zip(
        logprobs, score_logprobs(roles, "policy", EPISODES, temperature=0.9, max_tokens=40), strict=True
    ):
        assert torch.equal(found_T, wanted_T)
    weight_D, bias = roles.heads["value"].weight.detach()[0], float(roles.heads["value"].bias.detach())
    for episode, found_T in zip(EPISODES, values, strict=True):
        states_LD = hidden(roles, "policy", episode.ids)[len(episode.prompt) - 1 : -1]
        assert torch.allclose(found_T, states_LD @ weight_D + bias, atol=1e-5)


# ---- packed


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma", "gemma2", "gpt2"])
def test_packed_sequences_give_what_padded_ones_give(tmp_path, architecture):
    """Log-probabilities within 1e-5 in float32, gradients of the adapter too; and no token is computed for nothing."""
    roles = policy_roles(loaded_tiny_base(tmp_path, architecture))
    perturb(roles, "policy", 0.1)
    roles.set_trainable("policy")
    roles.disable_dropout()
    found: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}
    for packing in ("never", "always"):
        roles.pack(packing)
        roles.training_mode(gradient_checkpointing=True)
        batch = batch_episodes(EPISODES, roles.device)
        with roles.active("policy"):
            hidden_BLD = roles.hidden_states(batch.ids_BL, batch.mask_BL)
            logprobs_N = policy_logprobs(roles, hidden_BLD, batch, temperature=1.0).logprobs_N
            (logprobs_N * torch.arange(len(logprobs_N))).sum().backward()
        gradients = {name: p.grad.clone() for name, p in roles.parameters("policy").items() if p.grad is not None}
        for parameter in roles.parameters("policy").values():
            parameter.grad = None
        found[packing] = logprobs_N.detach(), gradients
    (wanted_N, wanted), (packed_N, packed) = found.values()
    assert torch.allclose(packed_N, wanted_N, atol=1e-5)
    assert packed.keys() == wanted.keys() and len(wanted) > 4
    for name, gradient in wanted.items():
        assert torch.allclose(packed[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())), name


def test_packed_microbatches_are_filled_with_tokens_alone(tmp_path):
    roles = policy_roles(loaded_tiny_base(tmp_path))
    sizes = []
    trunk = roles.base.model.model
    trunk.register_forward_pre_hook(lambda _, __, named: sizes.append(named["input_ids"].shape), with_kwargs=True)
    lengths = [len(episode.ids) for episode in EPISODES]
    for packing, padding in (("never", True), ("always", False)):
        sizes.clear()
        roles.pack(packing)
        rows = score_logprobs(roles, "policy", EPISODES, temperature=1.0, max_tokens=2 * max(lengths))
        assert [len(row) for row in rows] == [len(episode.response) for episode in EPISODES]
        computed = sum(rows * columns for rows, columns in sizes)
        assert roles.padding.take() == (computed - sum(lengths), computed)
        assert (computed > sum(lengths)) == padding
        assert all(rows * columns <= 2 * max(lengths) for rows, columns in sizes)
