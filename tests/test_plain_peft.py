"""The adapters of a run in PEFT and transformers alone: several on one base, switched, and mixed in one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from usable_run import usable_run

from pipeline.config_file import LoadedConfig
from pipeline.finished_run import open_run
from stages.answering import ROLE_OF, Speakers

QUESTIONS = ("sun", "a long winter", "sky and sea", "elm", "owl", "an old oak")
MIXED = ("sft", "ppo", "__base__", "ppo", "sft", "third")


@pytest.fixture(scope="module", params=["nf4", "none"])
def loaded(request: Any, tmp_path_factory: pytest.TempPathFactory) -> LoadedConfig:
    folder = tmp_path_factory.mktemp("peft")
    return usable_run(folder, ("sft", "reward", "ppo"), base=base_section(folder / "llama-base", request.param))


def base_section(model: Path, quantization: str) -> dict[str, str]:
    cache = str(model.parent / "cache")
    return {"model": str(model), "dtype": "float32", "quantization": quantization, "cache_dir": cache}


@pytest.fixture(scope="module")
def model(loaded: LoadedConfig, tmp_path_factory: pytest.TempPathFactory) -> PeftModel:
    """SFT, PPO, and an adapter of another run, which has the same base."""
    other = usable_run(
        tmp_path_factory.mktemp("other"),
        ("sft",),
        base=base_section(Path(loaded.config.base.model), loaded.config.base.quantization),
        lora={"rank": 2, "alpha": 8},
    )
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    quantization = nf4 if loaded.config.base.quantization == "nf4" else None
    base = AutoModelForCausalLM.from_pretrained(
        loaded.config.base.model, quantization_config=quantization, dtype=torch.float32
    )
    run = Path(loaded.config.run_dir)
    model = PeftModel.from_pretrained(base, run / "sft", adapter_name="sft")
    model.load_adapter(run / "ppo", adapter_name="ppo")
    model.load_adapter(Path(other.config.run_dir) / "sft", adapter_name="third")
    return model.eval()


def batch(loaded: LoadedConfig, questions: tuple[str, ...]) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(loaded.config.base.model, padding_side="left")
    chats = [[{"role": "user", "content": question}] for question in questions]
    return tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )


@torch.no_grad()
def alone(model: PeftModel, adapter: str, inputs: Any, *, new_tokens: int = 0) -> Tensor:
    """One adapter at a time, by PEFT's own switch: logits of the last token, or greedy answers."""
    if adapter == "__base__":
        with model.disable_adapter():
            return _asked(model, inputs, new_tokens)
    model.set_adapter(adapter)
    return _asked(model, inputs, new_tokens)


def _asked(model: Any, inputs: Any, new_tokens: int, **more: Any) -> Tensor:
    if new_tokens:
        ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, **more)
        return ids[:, inputs["input_ids"].shape[1] :]
    return model(**inputs, **more).logits[:, -1]


@torch.no_grad()
def test_a_mixed_batch_is_equal_to_single_runs(model: PeftModel, loaded: LoadedConfig) -> None:
    inputs = batch(loaded, QUESTIONS)
    mixed = _asked(model, inputs, 0, adapter_names=list(MIXED))
    for row, adapter in enumerate(MIXED):
        wanted = alone(model, adapter, inputs)[row]
        assert torch.allclose(mixed[row], wanted, atol=1e-4 * float(wanted.abs().max())), adapter
        others = {name: alone(model, name, inputs)[row] for name in set(MIXED) - {adapter}}
        for name, other in others.items():
            assert (mixed[row] - other).abs().max() > 0.05 * wanted.abs().max(), (adapter, name)


def test_greedy_answers_of_a_mixed_batch(model: PeftModel, loaded: LoadedConfig) -> None:
    inputs = batch(loaded, QUESTIONS)
    with torch.no_grad():
        mixed = _asked(model, inputs, 12, adapter_names=list(MIXED))
    for row, adapter in enumerate(MIXED):
        assert mixed[row].tolist() == alone(model, adapter, inputs, new_tokens=12)[row].tolist(), adapter
    assert len({tuple(row) for row in mixed.tolist()}) == len(MIXED)


@torch.no_grad()
def test_they_say_what_the_run_itself_says(model: PeftModel, loaded: LoadedConfig) -> None:
    speakers = Speakers(open_run(loaded.config.run_dir), ("base", "sft", "policy"))
    inputs = batch(loaded, ("sun",))
    for who, adapter in (("base", "__base__"), ("sft", "sft"), ("policy", "ppo")):
        with speakers.roles.active(ROLE_OF[who]):  # type: ignore[index]
            ours = speakers.roles.model(**inputs).logits[:, -1]
        theirs = alone(model, adapter, inputs)
        # On a CPU with bfloat16 instructions bitsandbytes rounds 4-bit layers to it, unless it is kept from that.
        gap = 0.01 if loaded.config.base.quantization == "nf4" else 1e-4
        assert (ours - theirs).abs().max() < gap * theirs.abs().max(), who
