"""The model card of an export: what it is, how to load it, the figures with their intervals, its lineage, its limits.

It names no path of this machine and quotes no row of the data: what is exported is often published.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import yaml

import pipeline
from flows.verdict import as_estimate, judge_name, judgements_of, verdict_of
from pipeline.base_license import License, base_license, hub_name, shown_name
from pipeline.config_file import is_local_source
from pipeline.finished_run import FinishedRun
from pipeline.run_directory import StageName
from pipeline.statistics import Estimate

_WHAT: Mapping[StageName, str] = {
    "sft": "a policy after supervised fine-tuning on instructions",
    "reward": "a reward model, trained on pairs of answers of which one was preferred",
    "ppo": "a policy after PPO against a reward, started from supervised fine-tuning",
}
_FORMS = {
    "adapter": "a LoRA adapter in PEFT's format",
    "merged": "all weights with the adapter merged in, in {dtype}",
    "requantized": "all weights with the adapter merged in, in bitsandbytes' NF4, computing in {dtype}",
    "gguf": "all weights with the adapter merged in, as a GGUF file in {dtype}",
}
_TASKS = {"policy": "text-generation", "reward": "text-classification"}


def card(found: FinishedRun, about: Mapping[str, Any], compared: Sequence[str]) -> str:
    """The card as Markdown with YAML before it, as hubs read it.

    Args:
        found: the run.
        about: what `stages.export` says of the export.
        compared: the comparison with the adapter, in sentences; empty for the adapter itself.
    """
    licence = base_license(found.config.base)
    parts = [_front(found, about, licence), *_body(found, about, licence, compared)]
    return "\n".join(parts).rstrip() + "\n"


def _front(found: FinishedRun, about: Mapping[str, Any], licence: License | None) -> str:
    form, role = about["form"], about["role"]
    front: dict[str, Any] = {
        "library_name": "peft" if form == "adapter" else "transformers",
        "pipeline_tag": _TASKS[role],
        "tags": ["trivet", "rlhf", "lora", about["stage"], *(["gguf"] if form == "gguf" else [])],
    }
    if (base := hub_name(found.config.base)) is not None:
        front["base_model"] = base
        front["base_model_relation"] = "adapter" if form == "adapter" else "finetune"
    if licence is not None and licence.key is not None:
        front |= {"license": licence.key} | ({"license_name": licence.name} if licence.name else {})
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n"


def _body(
    found: FinishedRun, about: Mapping[str, Any], licence: License | None, compared: Sequence[str]
) -> Iterator[str]:
    stage: StageName = about["stage"]
    name = shown_name(found.config.base)
    yield f"# {_WHAT[stage][0].upper()}{_WHAT[stage][1:]}\n"
    yield f"This is {_FORMS[about['form']].format(dtype=about['dtype'])}, on the base `{name}`, made by trivet.\n"
    yield "## How to load it\n"
    yield from _loading(found, about)
    if compared:
        yield "## Merged and unmerged\n"
        yield f"{compared[0]}\n"
        yield from (f"- {line}" for line in compared[1:])
        yield ""
    yield "## Figures\n"
    yield from _figures(found, stage)
    yield "## Data\n"
    yield from _data(found, stage, about["parents"])
    yield "## Lineage\n"
    yield from _lineage(found, about)
    yield "## Limits\n"
    yield from _limits(found, about)
    yield "## Licence\n"
    yield (
        f"The base's licence is, as far as its files say: {licence}. It holds for what is made of it as well.\n"
        if licence
        else "The base's files here do not name a licence. Whatever it is, it holds for what is made of it as well.\n"
    )


def _loading(found: FinishedRun, about: Mapping[str, Any]) -> Iterator[str]:
    form, is_reward = about["form"], about["role"] == "reward"
    kind = "AutoModelForSequenceClassification" if is_reward else "AutoModelForCausalLM"
    if form == "gguf":
        yield "```bash\nllama-cli -m FILE.gguf\n```\n"
        return
    yield "```python"
    if form == "adapter":
        quantization = about["base"]["quantization"]
        yield "import torch\nfrom peft import PeftModel"
        yield f"from transformers import {kind}, AutoTokenizer, BitsAndBytesConfig\n"
        yield from _base_loading(found, quantization, kind, is_reward)
        yield 'model = PeftModel.from_pretrained(base, "THIS_FOLDER")'
    else:
        yield f"from transformers import {kind}, AutoTokenizer\n"
        yield f'model = {kind}.from_pretrained("THIS_FOLDER", dtype="{about["dtype"]}")'
    yield 'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")'
    yield "```\n"
    if is_reward:
        yield (
            "The score is `model(**inputs).logits[0, 0]` of a prompt with an answer that ends with its EOS."
            f" {about['reward_gain']:.6g} * score + {about['reward_bias']:.6g} has mean 0 and variance 1 on the answers"
            " of the SFT policy.\n"
        )
        if form == "adapter":
            yield (
                "Give one sequence at a time with `base.config.pad_token_id = None`, or a pad token that no answer"
                " ends with: transformers reads the last token that is not padding.\n"
            )


def _base_loading(found: FinishedRun, quantization: str, kind: str, is_reward: bool) -> Iterator[str]:
    storage, _, dtype = quantization.partition("/")
    name = hub_name(found.config.base) or "PATH/OF/THE/BASE"
    labels = ", num_labels=1" if is_reward else ""
    if storage.startswith("nf4"):
        double = storage.endswith("double")
        yield (
            "nf4 = BitsAndBytesConfig(\n"
            f'    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant={double},\n'
            f"    bnb_4bit_compute_dtype=torch.{dtype},\n)"
        )
        arguments = f"dtype=torch.{dtype}, quantization_config=nf4{labels}"
    elif storage == "int8":
        arguments = f"dtype=torch.{dtype}, quantization_config=BitsAndBytesConfig(load_in_8bit=True){labels}"
    else:
        arguments = f"dtype=torch.{dtype}{labels}"
    yield f'base = {kind}.from_pretrained("{name}", {arguments})'


def _figures(found: FinishedRun, stage: StageName) -> Iterator[str]:
    rows = [*_stage_figures(found, stage), *(_evaluation(found) if stage == "ppo" else ())]
    if not rows:
        yield "There are none.\n"
        return
    yield "| figure | value | 95% interval | n |\n|---|---|---|---|"
    for name, value in rows:
        if isinstance(value, Estimate):
            yield f"| {name} | {value.value:.3f} | [{value.low:.3f}, {value.high:.3f}] | {value.n} |"
        else:
            yield f"| {name} | {value:.4g} | | |"
    yield ""
    if stage == "ppo":
        yield f"{verdict_of(found.state).sentence}\n"


def _stage_figures(found: FinishedRun, stage: StageName) -> Iterator[tuple[str, Estimate | float]]:
    metrics = found.adapters[stage].metrics
    wanted = {
        "sft": {
            "held_out_loss_before": "held-out loss of the base, nats a token",
            "held_out_loss_after": "held-out loss, nats a token",
        },
        "reward": {
            "held_out_accuracy": "accuracy on held-out pairs",
            "held_out_accuracy_longer_wins": 'accuracy of "the longer answer wins"',
        },
        "ppo": {"kl/policy_reference_k1": "KL to SFT in the last round, nats an answer"},
    }
    for key, name in wanted[stage].items():
        estimate = as_estimate(metrics.get(key))
        if estimate is not None:
            yield name, estimate
        elif isinstance(metrics.get(key), (int, float)):
            yield name, float(metrics[key])


def _evaluation(found: FinishedRun) -> Iterator[tuple[str, Estimate | float]]:
    for one in judgements_of(found.state):
        yield f"wins against SFT by {judge_name(one.judge)}", one.win_rate
        if one.length_controlled is not None:
            yield f"the same between answers of equal length, by {judge_name(one.judge)}", one.length_controlled
        if one.difference is not None:
            yield f"mean score less SFT's by {judge_name(one.judge)}", one.difference
    figures = found.state.stages["evaluate"].figures
    if (kl := as_estimate(figures.get("kl"))) is not None:
        yield "KL to SFT, nats an answer", kl
    response = figures.get("response") or {}
    for name in ("sft", "ppo"):
        length = as_estimate((response.get(name) or {}).get("length"))
        if length is not None:
            yield f"length of {name.upper()}'s answers, tokens", length


def _data(found: FinishedRun, stage: StageName, parents: Mapping[str, str]) -> Iterator[str]:
    yield "| stage | source | rows read | kept | held out | dropped |\n|---|---|---|---|---|---|"
    for name, manifest in found.adapters.items():
        if name != stage and name not in parents:
            continue
        for report in manifest.extra.get("data") or ():
            dropped = ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items()) or "none"
            yield (
                f"| {name} | {_source(report['source'])} | {report['read']} | {report['kept']} |"
                f" {report['held_out']} | {dropped} |"
            )
    yield ""
    if stage == "ppo":
        prompts = [_source(source.path) for source in found.config.data.prompts.sources]
        yield f"PPO sampled answers to prompts of: {', '.join(prompts) or 'none'}.\n"


def _source(path: str) -> str:
    """A hub id, or the last part of a path: folders tell of the machine."""
    return PurePath(path).name if is_local_source(path) or path.startswith("/") else path


def _lineage(found: FinishedRun, about: Mapping[str, Any]) -> Iterator[str]:
    base = about["base"]
    yield f"- adapter: `{about['adapter']}` ({about['stage']}, trivet {about['code_version']})"
    for parent, digest in about["parents"].items():
        yield f"- made from {parent}: `{digest}`"
    for kind, digest in about["data"].items():
        if len(str(digest)) == 64:
            yield f"- {kind}: `{digest}`"
    yield f"- all that it follows from: `{about['inputs_digest']}`"
    yield f"- base: `{shown_name(found.config.base)}`, revision {base['revision'] or 'not pinned'}"
    yield f"- base's weights: `{base['weights']}`, quantized as {base['quantization']}"
    yield f"- tokenizer: `{base['tokenizer']}`, chat template: `{base['chat_template']}`"
    lora = found.adapters[about["stage"]].lora
    yield f"- LoRA: rank {lora.get('rank')}, alpha {lora.get('alpha')}; seed {found.config.seed}"
    yield f"- exported by trivet {pipeline.__version__}\n"


def _limits(found: FinishedRun, about: Mapping[str, Any]) -> Iterator[str]:
    stage = about["stage"]
    yield "- What the base does not know or does wrong, this does too; it was not tested for safety or bias."
    if stage == "reward":
        yield "- It scores answers to prompts like those that it was trained on; elsewhere its scores mean little."
        yield "- Scores are comparable for one prompt. A policy that is optimized against them for long exploits them."
    if stage == "ppo":
        if verdict_of(found.state).judgement is None:
            yield "- It was not compared with SFT: that it is better is not known."
        for caution in verdict_of(found.state).cautions:
            yield f"- {caution}"
        yield "- A reward stands for people's wishes only as far as its data does; PPO takes what the reward likes."
    if about["form"] == "adapter":
        yield "- It fits the base above, quantized as above; on another base or arithmetic its figures do not hold."
    elif about["form"] == "requantized":
        yield "- It was quantized after merging, which costs a part of what the adapter had learnt; see above how much."
    else:
        yield "- The weights are those of the quantized base, dequantized, not of the checkpoint before quantization."
    for caution in found.cautions:
        yield f"- {caution}"
    yield ""
