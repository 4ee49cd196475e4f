"""Every engine: samples of the role, with the trainer's log-probabilities, in the order of the prompts.

vLLM cannot run here; `tests/vllm_interface.py` stands for it.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_interface
from tiny_models import loaded_tiny_base
from tiny_ppo import favour_token, perturb, policy_roles, ppo_roles, sharp_base, tiny_round

from pipeline import engines, generation
from pipeline.config import RolloutSettings
from pipeline.engines import chosen_engine, require_engine, require_engine_for
from pipeline.errors import BaseModelError, ConfigError, DivergenceError
from pipeline.generation import Response, SamplingSettings, derive_seed
from pipeline.roles import Role, Roles
from pipeline.scoring import Episode, score_logprobs, score_logprobs_and_values

SHARED = [30, 31, 32, 33] * 10
"""More than two pages, so that prompts that begin so share them."""
PROMPTS = [[5, 6, 7], [9] * 17, [40, 41, 42, 43, 44, 45], [*SHARED, 1], [77], [*SHARED, 2, 3], [100, 3] * 6]
SEED = (0, "test")
TOLERANCE = 5e-5
"""In float32, of a token's log-probability in nats: token by token against one forward pass, logits of up to 20."""


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[vllm_interface.LLM]:
    """What stands for vLLM, installed."""
    for name, module in vllm_interface.modules().items():
        module.__spec__ = type(sys.__spec__)(name, None) if sys.__spec__ else None
        monkeypatch.setitem(sys.modules, name, module)
    vllm_interface.LLM.made.clear()
    return vllm_interface.LLM


def require_the_trainers(
    roles: Roles, role: Role | None, responses: list[Response], temperature: float, prompts: list[list[int]] = PROMPTS
) -> None:
    episodes = [Episode(tuple(ids), found.ids) for ids, found in zip(prompts, responses, strict=True)]
    wanted = score_logprobs(roles, role, episodes, temperature=temperature, max_tokens=10_000)
    for found, wanted_T in zip(responses, wanted, strict=True):
        assert torch.allclose(torch.tensor(found.logprobs), wanted_T, atol=TOLERANCE)
    other = score_logprobs(roles, role, episodes, temperature=1.3 * temperature, max_tokens=10_000)
    assert not torch.allclose(torch.tensor(responses[0].logprobs), other[0], atol=100 * TOLERANCE)


def paged(**changes: Any) -> SamplingSettings:
    return replace(SamplingSettings(max_new_tokens=12, engine="paged"), **changes)


# ---- transformers' continuous batching


@pytest.mark.parametrize("weights", ["adapter", "merged"])
@pytest.mark.parametrize(
    ("architecture", "temperature"), [("llama", 0.7), ("qwen3", 1.0), ("gpt2", 1.3), ("mistral", 1.0)]
)
def test_paged_gives_what_generate_gives(tmp_path, architecture, temperature, weights):
    """Token for token, since both draw with the same numbers; and the trainer's log-probabilities."""
    base = loaded_tiny_base(tmp_path, architecture) if architecture == "gpt2" else sharp_base(tmp_path, architecture)
    roles = policy_roles(base)
    perturb(roles, "policy", 0.1)
    favour_token(roles, base.chat.eos_token_id, 3.0)
    settings = paged(temperature=temperature, weights=weights, batch_size=3)
    found = engines.generate(roles, "policy", PROMPTS, settings, seed=SEED)
    wanted = generation.generate(roles, "policy", PROMPTS, settings, seed=SEED)
    assert [response.ids for response in found] == [response.ids for response in wanted]
    assert [response.finished for response in found] == [response.finished for response in wanted]
    assert {response.finished for response in found} == {True, False}
    require_the_trainers(roles, "policy", found, temperature)
    assert found != engines.generate(roles, "policy", PROMPTS, settings, seed=(1, "another"))


def test_paged_responses_follow_from_their_numbers(tmp_path):
    """Not from those beside them, nor from how many are under way; the same prompt is answered in many ways."""
    roles = policy_roles(sharp_base(tmp_path))
    perturb(roles, "policy", 0.3)
    prompts = PROMPTS * 2

    def ids(batch_size: int, chosen: list[int]) -> list[tuple[int, ...]]:
        asked = [prompts[index] for index in chosen]
        found = engines.generate(roles, "policy", asked, paged(batch_size=batch_size), seed=SEED, numbers=chosen)
        return [response.ids for response in found]

    everything = list(range(len(prompts)))
    wanted = ids(64, everything)
    assert len(set(wanted)) > len(PROMPTS)
    assert ids(2, everything) == wanted
    assert ids(64, [13, 2, 7]) == [wanted[index] for index in (13, 2, 7)]


def test_paged_leaves_everything_as_it_was(tmp_path):
    """Global chance, the base's attention, the active role, and what learns."""
    roles = policy_roles(sharp_base(tmp_path))
    roles.set_trainable("policy")
    attention = roles.base.model.config._attn_implementation
    learning = roles.trainable_names()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    engines.generate(roles, "reference", PROMPTS, paged(), seed=SEED)
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    assert roles.base.model.config._attn_implementation == attention
    assert roles.trainable_names() == learning
    require_the_trainers(roles, "policy", generation.generate(roles, "policy", PROMPTS, paged(), seed=SEED), 1.0)


def test_paged_reads_values_as_the_trainer_does(tmp_path):
    roles = ppo_roles(sharp_base(tmp_path), "head")
    perturb(roles, "value", 0.3)
    favour_token(roles, roles.base.chat.eos_token_id, 3.0)
    found = engines.generate(roles, "policy", PROMPTS, paged(batch_size=3), seed=SEED, with_values=True)
    episodes = [Episode(tuple(ids), response.ids) for ids, response in zip(PROMPTS, found, strict=True)]
    _, wanted = score_logprobs_and_values(roles, episodes, temperature=1.0, max_tokens=10_000)
    for response, values_T in zip(found, wanted, strict=True):
        assert len(response.values) == len(response.ids)
        assert torch.allclose(torch.tensor(response.values), values_T, atol=1e-4)
    assert max(len(set(response.values)) for response in found) > 3


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.5}, {"ignore_eos": True}])
def test_paged_filters_and_ends_as_generate_does(tmp_path, options):
    roles = policy_roles(sharp_base(tmp_path))
    favour_token(roles, roles.base.chat.eos_token_id, 4.0)
    found = engines.generate(roles, "policy", PROMPTS, paged(**options), seed=SEED)
    wanted = generation.generate(roles, "policy", PROMPTS, paged(**options), seed=SEED)
    assert [(response.ids, response.finished) for response in found] == [
        (response.ids, response.finished) for response in wanted
    ]
    require_the_trainers(roles, "policy", found, 1.0)


def test_paged_is_refused_where_it_would_compute_wrongly(tmp_path):
    """Gemma 2 caps its attention; without flash kernels pages do not."""
    roles = policy_roles(sharp_base(tmp_path, "gemma2"))
    with pytest.raises(ConfigError, match=r"gemma2.* caps its attention[\s\S]*ppo.rollout.engine=generate"):
        require_engine_for(roles, paged())
    require_engine_for(roles, paged(engine="generate"))
    require_engine_for(roles, paged(engine="auto"))


def test_paged_is_refused_on_a_base_that_is_shared_out(tmp_path):
    """But for a merged copy, which is whole."""
    roles = policy_roles(sharp_base(tmp_path))
    require_engine_for(roles, paged(weights="adapter"))
    roles.shards = object()
    with pytest.raises(ConfigError, match="the base is shared out among processes"):
        require_engine_for(roles, paged(weights="adapter"))
    require_engine_for(roles, paged(weights="merged"))


def test_auto_is_generate_on_a_cpu(tmp_path):
    roles = policy_roles(sharp_base(tmp_path))
    assert chosen_engine(roles, "auto") == "generate"
    assert {chosen_engine(roles, name) for name in ("generate", "paged", "vllm")} == {"generate", "paged", "vllm"}


def test_paged_stops_where_logits_are_not_finite(tmp_path):
    roles = policy_roles(sharp_base(tmp_path))
    favour_token(roles, 3, math.nan)
    with pytest.raises(DivergenceError, match="not finite"):
        engines.generate(roles, "policy", PROMPTS, paged(), seed=SEED)


def test_paged_can_be_stopped_amid_its_work(tmp_path):
    roles = policy_roles(sharp_base(tmp_path))
    asked = []

    def stop() -> None:
        asked.append(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engines.generate(roles, "policy", PROMPTS, paged(max_new_tokens=200), seed=SEED, on_token=stop)
    assert len(asked) == 1
    engines.generate(roles, "policy", PROMPTS, paged(), seed=SEED)


def test_a_failure_of_the_paged_engine_is_named(tmp_path):
    """What its thread fails with is an error here, and lack of memory is one that less can be tried after."""
    roles = policy_roles(sharp_base(tmp_path))
    failing: list[Exception] = []

    def fail(*_: Any) -> None:
        raise failing[0]

    roles.base.model.get_output_embeddings().register_forward_pre_hook(fail)
    failing[:] = [ValueError("odd shapes")]
    with pytest.raises(BaseModelError, match=r"continuous batching failed: odd shapes[\s\S]*engine=generate"):
        engines.generate(roles, "policy", PROMPTS, paged(), seed=SEED)
    failing[:] = [torch.OutOfMemoryError("CUDA out of memory")]
    with pytest.raises(torch.OutOfMemoryError):
        engines.generate(roles, "policy", PROMPTS, paged(), seed=SEED)


@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_a_round_is_the_same_by_either_engine(tmp_path, critic):
    rounds = {
        engine: tiny_round(sharp_base(tmp_path), critic=critic, rollout=RolloutSettings(engine=engine)).collect()
        for engine in ("generate", "paged")
    }
    left, right = rounds.values()
    assert left.episodes == right.episodes
    for name in ("logprobs_BT", "values_BT", "advantages_BT", "sampler_logprobs_BT"):
        assert torch.allclose(getattr(left, name), getattr(right, name), atol=1e-4), name


# ---- vLLM


def by_vllm(**changes: Any) -> SamplingSettings:
    return replace(SamplingSettings(max_new_tokens=6, engine="vllm"), **changes)


def drawn_by_hand(folder: Path, roles: Roles, role: Role, number: int, temperature: float, scratch: Path) -> list[int]:
    """What the stand-in draws for a response under the seed that its number gives."""
    roles.save(role, scratch)
    sampler = vllm_interface.Sampler(str(folder))
    sampler.load("by hand", str(scratch))
    given = vllm_interface.SamplingParams(
        max_tokens=6,
        temperature=temperature,
        seed=derive_seed(*SEED, number),
        stop_token_ids=[roles.base.chat.eos_token_id],
    )
    return sampler.respond(PROMPTS[number], given, "by hand")[0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("where", ["here", "server"])
def test_vllm_samples_from_the_roles_own_weights(tmp_path, vllm, where, temperature):
    """Each round's: the adapter goes there again after the policy has learned; its base does not."""
    roles = policy_roles(sharp_base(tmp_path))
    with vllm_interface.server(tmp_path / "llama-base") as (address, served):
        settings = by_vllm(temperature=temperature, server=address if where == "server" else None)
        rounds = []
        for scale in (0.0, 0.3):
            perturb(roles, "policy", scale)
            told: list[int] = []
            found = engines.generate(roles, "policy", PROMPTS, settings, seed=SEED, on_batch=told.append)
            assert sum(told) == len(PROMPTS)
            require_the_trainers(roles, "policy", found, temperature)
            wanted = drawn_by_hand(tmp_path / "llama-base", roles, "policy", 2, temperature, tmp_path / str(scale))
            assert list(found[2].ids) == wanted
            rounds.append(found)
        assert rounds[0] != rounds[1]
        bare = engines.generate(roles, None, PROMPTS, settings, seed=SEED)
        require_the_trainers(roles, None, bare, temperature)
        assert not served.adapters, "adapters are unloaded when a round is sampled"
    assert len(vllm.made) == (where == "here"), "vLLM starts once"
    if where == "here":
        names = [request and request.lora_name for request in vllm.made[0].requests]
        assert len(set(names)) == 3 and names[-1] is None
        assert not any(Path(request.lora_path).exists() for request in vllm.made[0].requests if request)


def test_vllms_responses_end_with_eos(tmp_path, vllm):
    roles = policy_roles(loaded_tiny_base(tmp_path))  # every token is about as likely
    found = engines.generate(roles, "policy", PROMPTS * 4, by_vllm(max_new_tokens=40), seed=SEED)
    assert {response.finished for response in found} == {True, False}
    eos = roles.base.chat.eos_token_id
    for response in found:
        assert response.finished == (response.ids[-1] == eos) and eos not in response.ids[:-1]
        assert response.finished or len(response.ids) == 40
    ignoring = engines.generate(roles, "policy", PROMPTS * 4, by_vllm(max_new_tokens=40, ignore_eos=True), seed=SEED)
    assert {(len(response.ids), response.finished) for response in ignoring} == {(40, False)}


def test_a_round_with_vllm_computes_what_vllm_does_not_say(tmp_path, vllm):
    """It reads no values: with a head as the critic all of them come from the trainer's pass."""
    rounds = {
        reuse: tiny_round(
            sharp_base(tmp_path), critic="head", rollout=RolloutSettings(engine="vllm", reuse_logprobs=reuse)
        ).collect()
        for reuse in (True, False)
    }
    assert rounds[True].checked_B.all()
    assert torch.equal(rounds[True].values_BT, rounds[False].values_BT)
    gap_BT = (rounds[True].logprobs_BT - rounds[True].sampler_logprobs_BT).abs()
    assert float(gap_BT.max()) < TOLERANCE


def test_vllm_that_is_not_there_is_missed_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"vLLM is not installed[\s\S]*pip install 'trivet\[vllm\]'"):
        require_engine(RolloutSettings(engine="vllm"))
    with pytest.raises(ConfigError, match=r"does not answer[\s\S]*vllm serve"):
        require_engine(RolloutSettings(engine="vllm", server="http://127.0.0.1:9"))
    require_engine(RolloutSettings())


def test_options_of_vllm_go_there_and_ours_stay_ours(tmp_path, vllm):
    roles = policy_roles(sharp_base(tmp_path))
    engines.generate(roles, "policy", PROMPTS, by_vllm(vllm={"gpu_memory_utilization": 0.3}), seed=SEED)
    assert vllm.made[0].gpu_memory_utilization == 0.3
    for options, said in (({"model": "other"}, "sets vLLM's option 'model' itself"), ({"odd": 1}, "does not start")):
        with pytest.raises(ConfigError, match=said):
            engines.generate(policy_roles(sharp_base(tmp_path)), "policy", PROMPTS, by_vllm(vllm=options), seed=SEED)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"updates": False}, ConfigError, r"load_lora_adapter with 404[\s\S]*VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        ({"fault": "no ids"}, BaseModelError, "no token ids"),
        ({"fault": "short"}, BaseModelError, "without an EOS"),
        ({"fault": "nan"}, BaseModelError, "a log-probability that is no finite number"),
        ({"fault": "beyond"}, BaseModelError, "a token that is none of the base's"),
        ({"fault": "no logprobs"}, BaseModelError, "lacks a completion, or its log-probabilities"),
        ({"fault": "no choice"}, BaseModelError, "lacks a completion, or its log-probabilities"),
        ({"fault": "words"}, ConfigError, "names no base model as vLLM does"),
        ({"fault": "no base"}, ConfigError, "names no base model as vLLM does"),
    ],
)
def test_a_server_that_does_otherwise_is_refused(tmp_path, options, error, said):
    roles = policy_roles(sharp_base(tmp_path))
    with (
        vllm_interface.server(tmp_path / "llama-base", **options) as (address, _),
        pytest.raises(error, match=said),
    ):
        engines.generate(roles, "policy", PROMPTS[:1], by_vllm(server=address), seed=SEED)
