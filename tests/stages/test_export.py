"""`trivet export`: what comes out says what the adapter says, loads without trivet, and is whole or absent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from reported_run import answers, judged
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from typer.testing import CliRunner, Result
from usable_run import usable_run

import stages.export
from flows.cli import app
from pipeline.artifacts import folder_files
from pipeline.base_model import load_base
from pipeline.config_file import LoadedConfig
from pipeline.finished_run import open_run
from pipeline.merged_model import dequantized
from pipeline.plain_model import plain_state
from pipeline.progress import _view_for_this_process
from pipeline.roles import Role, Roles
from pipeline.run_directory import RunDirectory, read_json
from pipeline.scoring import score_rewards
from stages.export import EXPORT

IDS_BL = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedConfig:
    return usable_run(tmp_path_factory.mktemp("export"))


def trivet(*arguments: str | Path) -> Result:
    _view_for_this_process.cache_clear()  # each call has streams of its own
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def exported(loaded: LoadedConfig, stage: str, folder: Path, *options: str) -> Path:
    result = trivet("export", loaded.config.run_dir, stage, folder, *options)
    assert result.exit_code == 0, result.output
    return folder


def roles_of(loaded: LoadedConfig, stage: Any, role: Role) -> Roles:
    roles = Roles(load_base(open_run(loaded.config.run_dir).base, "cpu"))
    roles.add_from(role, RunDirectory(loaded.config.run_dir).stage(stage))
    roles.inference_mode()
    return roles


@torch.no_grad()
def adapter_logits(loaded: LoadedConfig, stage: str = "ppo") -> Tensor:
    roles = roles_of(loaded, stage, "policy")
    with roles.active("policy"):
        return roles.model(input_ids=IDS_BL).logits


@torch.no_grad()
def plain_logits(folder: Path, **options: Any) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()(input_ids=IDS_BL).logits


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


# ---- the adapter


@torch.no_grad()
def test_the_adapter_loads_with_peft_alone(loaded: LoadedConfig, tmp_path: Path) -> None:
    folder = exported(loaded, "ppo", tmp_path / "out", "--base-name", loaded.config.base.model)
    stage = RunDirectory(loaded.config.run_dir).stage("ppo")
    name = "adapter_model.safetensors"
    assert (folder / name).read_bytes() == (stage / name).read_bytes()
    base = AutoModelForCausalLM.from_pretrained(
        read_json(folder / "adapter_config.json")["base_model_name_or_path"], quantization_config=nf4()
    )
    model = PeftModel.from_pretrained(base, folder).eval()
    wanted = adapter_logits(loaded)
    # On a CPU with bfloat16 instructions bitsandbytes rounds to it in layers of 4 bits, unless it is kept from that.
    assert (model(input_ids=IDS_BL).logits - wanted).abs().max() < 0.01 * wanted.abs().max()
    assert (adapter_logits(loaded, "sft") - wanted).abs().max() > 0.1 * wanted.abs().max()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == load_base(loaded.config.base, "cpu").chat.tokenizer.chat_template
    assert "trivet.json" not in os.listdir(folder)


def test_nothing_of_this_machine_and_no_row_of_the_data_is_in_it(loaded: LoadedConfig, tmp_path: Path) -> None:
    for stage, form in (("ppo", "adapter"), ("reward", "adapter"), ("ppo", "merged")):
        options = ("--base-name", "somebody/base") if form == "adapter" else ()
        folder = exported(loaded, stage, tmp_path / f"{stage}-{form}", "--form", form, *options)
        for path in folder.iterdir():
            content = path.read_bytes()
            for private in (
                loaded.config.run_dir,
                loaded.config.base.model,
                "/home/someone",
                "Question 3 about",
                "zz ",
            ):
                assert private.encode() not in content, (path, private)


# ---- merged


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_merged_weights_say_what_the_adapter_says(tmp_path: Path, architecture: str, quantization: str) -> None:
    base = {"model": str(tmp_path / f"{architecture}-base"), "dtype": "float32", "quantization": quantization}
    base["cache_dir"] = str(tmp_path / "cache")
    loaded = usable_run(tmp_path, ("sft",), architecture=architecture, base=base)
    folder = exported(loaded, "sft", tmp_path / "out", "--form", "merged", "--dtype", "float32")
    wanted = adapter_logits(loaded, "sft")
    gap = (plain_logits(folder, dtype="auto") - wanted).abs().max()
    # int8 kernels round the activations as well, which plain weights do not.
    assert gap < (1e-4 if quantization != "int8" else 0.05) * wanted.abs().max()


def test_it_is_the_quantized_base_that_is_merged_into(loaded: LoadedConfig, tmp_path: Path) -> None:
    folder = exported(loaded, "ppo", tmp_path / "out", "--form", "merged", "--dtype", "float32")
    original = AutoModelForCausalLM.from_pretrained(loaded.config.base.model)
    naive = PeftModel.from_pretrained(original, RunDirectory(loaded.config.run_dir).stage("ppo")).eval()
    with torch.no_grad():
        far = (naive(input_ids=IDS_BL).logits - adapter_logits(loaded)).abs().max()
    near = (plain_logits(folder) - adapter_logits(loaded)).abs().max()
    assert near < 1e-3 * far


def test_sixteen_bits_and_what_they_change_is_reported(loaded: LoadedConfig, tmp_path: Path) -> None:
    result = trivet("export", loaded.config.run_dir, "ppo", tmp_path / "out", "--form", "merged")
    assert result.exit_code == 0, result.output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not hasattr(model.config, "quantization_config")
    about = read_json(tmp_path / "out" / EXPORT)
    found = about["agreement"]
    assert found["prompts"] == 16 and found["tokens"] > 16
    assert 0 < found["logits_mean"] < found["logits_max"] < found["logits_spread"]
    assert 0 <= found["kl"]["value"] < 0.1 and found["likeliest"]["value"] > 0.8
    card = (tmp_path / "out" / "README.md").read_text()
    for line in ("logits differ by", "greedy answers are the same for", "the likeliest next token is the same"):
        assert line in card and line in result.output
    # What is reported is what is so: the same prompts by hand.
    exact = exported(loaded, "ppo", tmp_path / "exact", "--form", "merged", "--dtype", "float32")
    found = read_json(exact / EXPORT)["agreement"]
    assert found["same_answers"]["value"] == found["likeliest"]["value"] == found["common"] == 1.0
    assert found["logits_max"] < 1e-3


def test_greedy_answers_end_where_the_template_says(loaded: LoadedConfig, tmp_path: Path) -> None:
    folder = exported(loaded, "ppo", tmp_path / "out", "--form", "merged")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    from tiny_models import tiny_base

    tiny_base(tmp_path / "llama-base", tied=True)
    roles = Roles(load_base(open_base(tmp_path), "cpu"))
    roles.add_fresh("policy", usable_lora())
    state = plain_state(roles.base.model, "policy", torch.bfloat16, roles.base.model)
    assert "model.embed_tokens.weight" in state and "lm_head.weight" not in state


def open_base(folder: Path) -> Any:
    from pipeline.config import BaseSettings

    return BaseSettings(model=str(folder / "llama-base"), dtype="float32", cache_dir=str(folder / "cache"))


def usable_lora() -> Any:
    from pipeline.config import LoraSettings

    return LoraSettings(rank=4, alpha=8)


# ---- quantized again, GGUF


def test_requantized_weights_load_in_plain_transformers(loaded: LoadedConfig, tmp_path: Path) -> None:
    folder = exported(loaded, "ppo", tmp_path / "out", "--form", "requantized", "--dtype", "float32")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.quantization_config.bnb_4bit_quant_type == "nf4"
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    with torch.no_grad():
        found = model.eval()(input_ids=IDS_BL).logits
    wanted = adapter_logits(loaded)
    # Quantizing random weights again costs a good deal, and still it is this policy and no other.
    correlation, other = (
        float(torch.corrcoef(torch.stack([found.flatten(), logits.flatten()]))[0, 1])
        for logits in (wanted, adapter_logits(loaded, "sft"))
    )
    assert correlation > 0.8 and correlation > other + 0.1
    assert {path.name for path in folder.iterdir()} >= {"README.md", EXPORT, "tokenizer.json", "chat_template.jinja"}
    assert not (folder / "merged").exists()
    assert read_json(folder / EXPORT)["agreement"]["logits_mean"] > 0


def test_quantizing_again_does_not_round_the_adapter_away(tmp_path: Path) -> None:
    """An adapter whose changes are smaller than the steps of NF4: weights move by it in the mean all the same."""
    loaded = usable_run(tmp_path, ("sft",), size=0.003)
    folder = exported(loaded, "sft", tmp_path / "out", "--form", "requantized", "--dtype", "float32")
    found = dict(AutoModelForCausalLM.from_pretrained(folder).named_modules())
    moved = wanted = 0.0
    for name, layer in roles_of(loaded, "sft", "policy").base.model.named_modules():
        if isinstance(layer, LoraLayer):
            change = layer.get_delta_weight("policy")
            moved += float(((dequantized(found[name]) - dequantized(layer.get_base_layer())) * change).sum())
            wanted += float(change.square().sum())
    assert 0.7 < moved / wanted < 1.3


def test_gguf_needs_the_converter(loaded: LoadedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setattr(stages.export, "_loaded", lambda *_: pytest.fail("the base is loaded"))
    result = trivet("export", loaded.config.run_dir, "ppo", tmp_path / "out", "--form", "gguf")
    assert result.exit_code == 2 and "llama.cpp's converter is not installed" in result.stderr
    result = trivet("export", loaded.config.run_dir, "ppo", tmp_path / "out", "--form", "gguf", "--converter", tmp_path)
    assert result.exit_code == 2 and "llama.cpp's converter is not there" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("float16", 0.05)])
def test_what_the_converter_makes_is_compared_with_the_adapter(
    loaded: LoadedConfig, tmp_path: Path, dtype: str, bound: float
) -> None:
    converter = Path(__file__).parents[1] / "gguf_converter.py"
    folder = exported(loaded, "ppo", tmp_path / "out", "--form", "gguf", "--converter", converter, "--dtype", dtype)
    (file,) = folder.glob("*.gguf")
    found = read_json(folder / EXPORT)
    assert found["form"] == "gguf" and 0 <= found["agreement"]["logits_max"] < bound
    assert file.stat().st_size > 10_000 and not list(folder.glob("*.safetensors"))


def test_a_converter_that_lays_weights_out_wrongly_is_found_out(loaded: LoadedConfig, tmp_path: Path) -> None:
    """The comparison is one with the file as it was written."""
    own = (Path(__file__).parents[1] / "gguf_converter.py").read_text()
    (tmp_path / "wrong.py").write_text(own.replace(".swapaxes(1, 2)", ""))
    converter = tmp_path / "wrong.py"
    folder = exported(loaded, "ppo", tmp_path / "out", "--form", "gguf", "--converter", converter, "--dtype", "float32")
    assert read_json(folder / EXPORT)["agreement"]["logits_max"] > 1e-3


def test_a_converter_that_fails_leaves_nothing(loaded: LoadedConfig, tmp_path: Path) -> None:
    (tmp_path / "convert_hf_to_gguf.py").write_text("print('I do not know this model'); raise SystemExit(3)")
    result = trivet("export", loaded.config.run_dir, "ppo", tmp_path / "out", "--form", "gguf", "--converter", tmp_path)
    assert result.exit_code == 2
    assert "ended with code 3 and no file:\nI do not know this model" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["convert_hf_to_gguf.py"]


# ---- reward models


@torch.no_grad()
def test_a_reward_model_becomes_a_classifier(loaded: LoadedConfig, tmp_path: Path) -> None:
    folder = exported(loaded, "reward", tmp_path / "out", "--form", "merged", "--dtype", "float32")
    roles = roles_of(loaded, "reward", "reward")
    chat = roles.base.chat
    sequences = [chat.example("sun", word).ids for word in ("yes", "a longer answer, by far")]
    wanted = score_rewards(roles, sequences, max_tokens=64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    # As anybody scores a batch: padded by the tokenizer, on either side.
    for side in ("right", "left"):
        batch = tokenizer.pad({"input_ids": [list(ids) for ids in sequences]}, return_tensors="pt", padding_side=side)
        assert torch.allclose(model(**batch).logits.squeeze(-1), wanted, atol=1e-3), side
    found = read_json(folder / EXPORT)
    assert found["agreement"]["same_preference"]["value"] == 1.0 and found["agreement"]["score_max"] < 1e-3
    assert found["reward_gain"] == 2.0 and "2 * score + -0.5" in (folder / "README.md").read_text()


def test_a_requantized_reward_model_keeps_its_head(loaded: LoadedConfig, tmp_path: Path) -> None:
    folder = exported(loaded, "reward", tmp_path / "out", "--form", "requantized")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert type(model.score) is torch.nn.Linear
    assert read_json(folder / EXPORT)["agreement"]["same_preference"]["n"] > 5


def test_a_reward_model_has_no_place_in_gguf(loaded: LoadedConfig, tmp_path: Path) -> None:
    result = trivet("export", loaded.config.run_dir, "reward", tmp_path / "out", "--form", "gguf")
    assert result.exit_code == 2 and "there is no place in a GGUF file" in result.stderr


# ---- whole or absent


def test_an_export_that_fails_leaves_nothing(
    loaded: LoadedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr("stages.agreement.compare_policy", fail)
    result = trivet("export", loaded.config.run_dir, "ppo", tmp_path / "out", "--form", "merged")
    assert isinstance(result.exception, RuntimeError)
    assert not list(tmp_path.iterdir())


def test_the_same_export_is_not_made_twice(
    loaded: LoadedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported(loaded, "ppo", tmp_path / "out")
    before = folder_files(folder)
    monkeypatch.setattr(stages.export, "_make", lambda *_: pytest.fail("it is made again"))
    result = trivet("export", loaded.config.run_dir, "ppo", folder)
    assert result.exit_code == 0 and "Exported before, and unchanged" in result.output
    assert folder_files(folder) == before


def test_what_lies_there_stays(loaded: LoadedConfig, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    for options in ((), ("--force",)):
        result = trivet("export", loaded.config.run_dir, "ppo", mine, *options)
        assert result.exit_code == 2 and "something else lies there" in result.stderr
    assert (mine / "notes.txt").read_text() == "mine"
    folder = exported(loaded, "ppo", tmp_path / "out")
    result = trivet("export", loaded.config.run_dir, "sft", folder)
    assert result.exit_code == 2 and "another export lies there" in result.stderr
    (folder / "README.md").write_text("edited")
    result = trivet("export", loaded.config.run_dir, "ppo", folder)
    assert result.exit_code == 2 and "was changed since" in result.stderr
    exported(loaded, "sft", folder, "--force")
    assert read_json(folder / EXPORT)["stage"] == "sft"


def test_bad_input_is_told_before_torch_is_there(tmp_path: Path, loaded: LoadedConfig) -> None:
    run = loaded.config.run_dir
    half = usable_run(tmp_path, ("sft",)).config.run_dir
    cases = [
        (["export", str(tmp_path / "absent"), "ppo", "out"], "there is no such folder"),
        (["export", run, "evaluate", "out"], "there is no 'evaluate'"),
        (["export", run, "ppo", "out", "--form", "zip"], "there is no 'zip'"),
        (["export", run, "ppo", "out", "--dtype", "int4"], "there is no 'int4'"),
        (["export", half, "ppo", "out"], "the ppo stage is not finished; it is waiting"),
        (["export", run, "ppo", "out", "--form", "merged", "--base-name", "x"], "only an adapter names a base"),
        (["export", run, "ppo", "out", "--push-to-hub", "a/b/c"], "this is no name of a repository"),
        (["export", run, "ppo", "out", "--push-to-hub", "a/b"], "set to work offline"),
    ]
    program = f"""
import sys
from flows.cli import app
for arguments, _ in {cases!r}:
    try:
        app(arguments)
    except SystemExit as end:
        assert end.code == 2, (arguments, end)
assert "torch" not in sys.modules
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for _, problem in cases:
        assert problem in done.stderr, problem


# ---- the model card


def test_the_card_has_figures_lineage_and_limits(loaded: LoadedConfig, tmp_path: Path) -> None:
    (Path(loaded.config.base.model) / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    card = (exported(loaded, "ppo", tmp_path / "out") / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["trivet", "rlhf", "lora", "ppo"],
        "license": "apache-2.0",
    }
    manifests = open_run(loaded.config.run_dir).adapters
    for digest in (manifests["ppo"].digest, manifests["sft"].digest, manifests["reward"].digest):
        assert digest in body
    rate = judged(answers())["win_rate"]["gold"]
    figures = f"{rate['value']:.3f} | [{rate['low']:.3f}, {rate['high']:.3f}] | 40 |"
    assert f"| wins against SFT by the gold measure | {figures}" in body
    assert "| the same between answers of equal length, by the gold measure | 0.700 | [0.520, 0.830] | 40 |" in body
    assert "and between answers of equal length for 70% (52% to 83%)" in body
    assert "| KL to SFT, nats an answer | 4.000 | [3.500, 4.500] | 40 |" in body
    assert "| sft | rows.jsonl | 50 | 45 | 5 | 5 duplicate |" in body
    assert "apache-2.0" in body and "quantized as nf4-double/float32" in body
    assert "bnb_4bit_use_double_quant=True" in body
    reward = (exported(loaded, "reward", tmp_path / "reward") / "README.md").read_text()
    assert "| accuracy on held-out pairs | 0.850 | [0.740, 0.920] | 60 |" in reward
    assert "| reward | rows.jsonl |" in reward and "| ppo | rows.jsonl |" not in reward
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o644}


def test_a_run_that_was_not_judged_says_so(tmp_path: Path) -> None:
    loaded = usable_run(tmp_path, ("sft", "reward", "ppo"))
    card = (exported(loaded, "ppo", tmp_path / "out") / "README.md").read_text()
    assert "It was not compared with SFT" in card
    assert json.loads((tmp_path / "out" / EXPORT).read_text())["agreement"] is None
