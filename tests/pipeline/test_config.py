"""The config: every fault at once, with its key and a way out; every value with where it came from."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import PipelineConfig, PPOSettings
from pipeline.config_file import LoadedConfig, flatten, is_local_source, load_config
from pipeline.errors import ConfigError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
# Nine lines that stand for a billion values.
LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
EVEN = ["sft.microbatch_size=1", "reward.microbatch_size=1"]
MINIMAL: dict[str, Any] = {"run_dir": "runs/x", "base": {"model": "org/model"}}


def load(tmp_path: Path, *overrides: str, text: str | None = None, **sections: Any) -> LoadedConfig:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | sections) if text is None else text)
    return load_config(path, overrides)


def fault(tmp_path: Path, *overrides: str, text: str | None = None, **sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, *overrides, text=text, **sections)
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_of_the_project_loads(path: Path) -> None:
    loaded = load_config(path)
    assert loaded.config.arithmetic()
    assert list(loaded.lines())


def test_there_are_configs_to_load() -> None:
    assert "quickstart.yaml" in {path.name for path in CONFIGS}


# ---- unknown and missing keys, wrong values


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sft.learning_rat=1", "unknown key 'sft.learning_rat'; did you mean 'learning_rate'?"),
        ("ppo.kl.coeficient=1", "unknown key 'ppo.kl.coeficient'; did you mean 'coefficient'?"),
        ("pppo.epochs=1", "unknown key 'pppo'; did you mean 'ppo'?"),
        ("launch.zzz=1", "unknown key 'launch.zzz'; known keys: accelerate_config, card, cpu_offload, device,"),
        ("data.prompts.sources=[{path: a.jsonl, wieght: 2}]", "did you mean 'weight'?"),
        ("ppo.rewards=[{functoin: 'a.py:f'}]", "did you mean 'function'?"),
        ("ppo.klcoefficient=1", "unknown key 'ppo.klcoefficient'; did you mean 'ppo.kl.coefficient'?"),
        ("microbatch_tokens=9", "unknown key 'microbatch_tokens'; did you mean 'ppo.microbatch_tokens'?"),
        ("packing=true", "unknown key 'packing'; did you mean 'sft.packing' or 'ppo.packing'?"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in fault(tmp_path, override)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    message = fault(tmp_path, text="base: {}")
    assert "the key 'run_dir' is missing" in message
    assert "the key 'base.model' is missing" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sft.epochs=0", ("sft.epochs", "greater than 0", "got 0")),
        ("base.quantization=nf3", ("base.quantization", "'nf4'", "got 'nf3'")),
        ("ppo.iterations=many", ("ppo.iterations", "integer", "got 'many'")),
        ("ppo.iterations=2.5", ("ppo.iterations", "got 2.5")),
        ("data.prompts.held_out=1.5", ("data.prompts.held_out", "between 0 and 1")),
        ("sft=3", ("sft", "got 3")),
    ],
)
def test_a_wrong_value_is_named_with_what_is_wanted(tmp_path: Path, override: str, words: tuple[str, ...]) -> None:
    message = fault(tmp_path, override)
    assert all(word in message for word in words), message


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    message = fault(tmp_path, "sft.epochs=-1", "ppo.clip=1", "lora.rank=0")
    assert "3 faults:" in message
    for number, key in enumerate(("lora.rank", "sft.epochs", "ppo.clip"), 1):
        assert f"{number}. " in message
        assert key in message


def test_every_contradiction_comes_at_once(tmp_path: Path) -> None:
    message = fault(tmp_path, "sft.batch_size=5", "ppo.top_k=3", "ppo.rewards=[]")
    assert "3 faults:" in message


def test_contradictions_come_beside_malformed_values(tmp_path: Path) -> None:
    message = fault(tmp_path, "lora.rank=0", "sft.batch_size=5", "ppo.nonsense=1")
    assert "3 faults:" in message
    assert "lora.rank" in message and "sft.batch_size" in message and "ppo.nonsense" in message


def test_a_malformed_value_is_not_taken_for_its_default(tmp_path: Path) -> None:
    message = fault(tmp_path, "ppo.iterations=many", "ppo.critic_warmup_iterations=150")
    assert "critic_warmup" not in message and "ppo.iterations" in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sft.epochs=3", "sft={epochs: 2}"], "the overrides sft.epochs and sft.epochs are of one setting"),
        (["sft.trl={a: 1}", "sft.trl={}"], "given twice"),
        (["sft={}", "sft.epochs=2"], "the overrides sft and sft.epochs are of one setting"),
        (["seed=2024-13-45"], "is not valid YAML"),
        (["seed=-0b_"], "is not valid YAML"),
        (["seed=" + "9" * 5000], "is not valid YAML"),
        (["seed=!!bool maybe"], "is not valid YAML"),
        (["seed=!!int ''"], "is not valid YAML"),
        (["seed=!!timestamp foo"], "is not valid YAML"),
        (["seed=99999999999999999999"], "less than 4294967296"),
        (["seed={{ name }}"], "a key in line 1 is itself a group of settings"),
        (["run_dir="], "run_dir"),
    ],
)
def test_overrides_that_cannot_be_meant(tmp_path: Path, overrides: list[str], words: str) -> None:
    assert words in fault(tmp_path, *overrides)


@pytest.mark.parametrize("value", ["!!bool maybe", "!!int ''", "!!timestamp foo", "2024-13-45", "{{ name }}"])
def test_values_of_a_file_that_are_not_what_they_say(tmp_path: Path, value: str) -> None:
    assert "run.yaml" in fault(tmp_path, text=f"run_dir: x\nseed: {value}\n")


def test_a_group_as_an_override_changes_what_it_names_alone(tmp_path: Path) -> None:
    loaded = load(tmp_path, "lora={rank: 8}", "sft={epochs: 3}", lora={"alpha": 5}, sft={"max_length": 99}, ppo={})
    config = loaded.config
    assert (config.lora.rank, config.lora.alpha, config.sft.epochs, config.sft.max_length) == (8, 5, 3, 99)
    origins = {key: loaded.origins[key] for key in ("lora.rank", "lora.alpha", "lora.dropout", "ppo.iterations")}
    assert list(origins.values()) == ["override", "file", "default", "default"]


def test_numbers_and_merged_groups_are_read_as_people_write_them(tmp_path: Path) -> None:
    text = """
        run_dir: x
        base: {model: org/model}
        sft: &shared {batch_size: 16, trl: {lr_scheduler_kwargs: {min_lr: 1e-5, other: 2E3}}}
        reward: {<<: *shared, max_length: 99, trl: {}}
    """
    config = load(tmp_path, text=textwrap.dedent(text)).config
    assert config.sft.trl["lr_scheduler_kwargs"] == {"min_lr": 1e-5, "other": 2000.0}
    assert (config.reward.batch_size, config.reward.max_length) == (16, 99)


# ---- contradictions, each with the key to change


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["sft.batch_size=10", "sft.microbatch_size=4"], "set sft.batch_size=12"),
        (["reward.batch_size=16", "launch.processes=3"], "set reward.batch_size=24"),
        (["ppo.prompts_per_iteration=9", "launch.processes=2"], "multiple of launch.processes"),
        (["ppo.minibatch_size=24"], "does not divide the 64 responses"),
        (
            ["ppo.minibatch_size=1", "launch.processes=2", "sft.microbatch_size=1", "reward.microbatch_size=1"],
            "ppo.minibatch_size is 1, which 2 processes cannot share evenly",
        ),
        (["ppo.top_p=0.9"], "allow_biased_sampling"),
        (["ppo.top_k=50"], "allow_biased_sampling"),
        (["ppo.rollout.server=http://a:8000"], "set ppo.rollout.engine=vllm, or remove ppo.rollout.server"),
        (["ppo.rollout.vllm={seed: 1}", "ppo.rollout.engine=paged"], "or remove ppo.rollout.vllm"),
        (["ppo.rollout.engine=vllm", "ppo.rollout.weights=merged"], "set ppo.rollout.weights=adapter, or remove it"),
        (
            ["ppo.rollout.engine=vllm", "ppo.rollout.server=http://a:8000", "ppo.rollout.vllm={seed: 1}"],
            "ppo.rollout.server is set too; remove one of them",
        ),
        (
            ["ppo.rollout.engine=vllm", "ppo.temperature=0.7", "ppo.top_k=3", "ppo.allow_biased_sampling=true"],
            "set ppo.temperature=1, or ppo.top_p=1 and ppo.top_k=0",
        ),
        (["ppo.rollout.engine=vllm", "launch.processes=2", *EVEN], "set ppo.rollout.server, or another engine"),
        (
            [
                *("ppo.rollout.engine=paged", "ppo.rollout.weights=adapter"),
                *("launch.processes=2", "launch.strategy=fsdp", *EVEN),
            ],
            "needs the base whole, and launch.strategy is 'fsdp'; set ppo.rollout.engine=auto",
        ),
        (["ppo.rewards=[]"], "nothing to maximize"),
        (["ppo.rewards=[{}, {weight: 2}]"], "names the source 'model' 2 times"),
        (["ppo.rewards=[{function: 'a.py:f'}, {function: 'b.py:f'}]"], "names the source 'f' 2 times"),
        (["ppo.rewards=[{weight: 0}]"], "weight 0"),
        (["ppo.kl.controller=adaptive", "ppo.kl.coefficient=0"], "set a positive start value"),
        (["ppo.critic_warmup_iterations=100"], "the policy would never learn"),
        (["base.quantization=none", "base.double_quantization=true"], "set base.quantization=nf4"),
        (["launch.accelerate_config=a.yaml", "launch.processes=4"], "remove launch.processes"),
        (["launch.accelerate_config=a.yaml", "launch.strategy=ddp", "launch.machines=1"], "remove launch.machines"),
        (["launch.machine_rank=1"], "there are 1 machine(s), numbered from 0"),
        (["launch.machines=2", *EVEN], "set launch.main_address"),
        (["launch.strategy=fsdp"], "there is one process; set launch.processes"),
        (["launch.cpu_offload=true"], "launch.cpu_offload is for FSDP alone"),
        (["launch.reshard_after_forward=false"], "launch.reshard_after_forward is for FSDP alone"),
        (["launch.mixed_precision=bf16", "base.dtype=float16"], "'float16'; set base.dtype=bfloat16"),
        (["launch.mixed_precision=fp16", "base.dtype=float32"], "'float32'; set base.dtype=float16"),
        (["launch.strategy=fsdp", "launch.processes=2", "base.quantization=int8", *EVEN], "or launch.strategy=ddp"),
        (["base.quantization=none", "base.quant_storage=bfloat16"], "base.quant_storage is set"),
        (["launch.strategy=fsdp", "launch.processes=2", "base.quant_storage=uint8", *EVEN], "FSDP leaves whole"),
        (["launch.machines=3", "launch.main_address=a"], "launch.processes x launch.machines = 4 x 3 = 12"),
        (["data.preferences.sources=[{path: a.jsonl, weight: 1}, b.jsonl]"], "give all of them one, or none"),
        (
            ["ppo.held_out.every=null", "ppo.guard.action=warn", "ppo.publish=best"],
            "set ppo.held_out.every, or ppo.publish=last",
        ),
        (["ppo.held_out.every=null", "ppo.publish=last", "ppo.guard.action=stop"], "or ppo.guard.action=warn"),
        (["ppo.kl.controller=adaptive", "ppo.kl.horizon=5"], "set it to 14 at least"),
        (
            ["ppo.held_out.prompts=1", "launch.processes=2", "sft.microbatch_size=1", "reward.microbatch_size=1"],
            "set it to 2 at least",
        ),
        (["ppo.rewards=[{function: 'a.py:gold'}]"], "rename the function a.py:gold"),
        (["reward.calibrate_on=base"], "set reward.start_from=base, or remove reward.calibrate_on"),
        (["launch.side_by_side=true"], "set reward.start_from=base and reward.calibrate_on=base, or remove"),
        (["launch.side_by_side=true", "reward.start_from=base"], "set reward.calibrate_on=base, or remove"),
        (
            ["launch.side_by_side=true", "ppo.rewards=[{function: 'a.py:f'}]", "data.preferences.sources=[]"],
            "trains no reward model beside SFT; remove it",
        ),
        (
            [
                *("launch.side_by_side=true", "reward.start_from=base", "reward.calibrate_on=base"),
                *("launch.machines=2", "launch.main_address=a", *EVEN),
            ],
            "launch.machines is 2, which meet at one launch.main_port",
        ),
        (
            [
                *("launch.side_by_side=true", "reward.start_from=base", "reward.calibrate_on=base"),
                "launch.accelerate_config=a.yaml",
            ],
            "launch.accelerate_config decides which GPUs and ports",
        ),
        (["gates.judge=gold"], "does not judge here; choose of reward_model"),
        (
            ["gates.min_reward_accuracy=0.6", "ppo.rewards=[{function: 'a.py:f'}]", "data.preferences.sources=[]"],
            "trains no reward model",
        ),
        (["evaluate.judges=[{name: j}]"], "names no judge; give reward_run, or endpoint"),
        (["evaluate.judges=[{endpoint: 'http://h/v1'}]"], "set evaluate.judges[0].model"),
        (["evaluate.judges=[{reward_run: r, timeout: 3}]"], "evaluate.judges[0].timeout is for an endpoint"),
        (["evaluate.judges=[{reward_run: runs/a}, {reward_run: b/a/reward}]"], "are called 'a'"),
    ],
)
def test_a_contradiction_names_the_key_to_change(tmp_path: Path, overrides: list[str], expected: str) -> None:
    assert expected in fault(tmp_path, *overrides)


def test_every_contradiction_has_a_test() -> None:
    """Counts the statements that report one; a new one needs a line above."""
    source = (ROOT / "pipeline" / "config.py").read_text()
    body = source[source.index("def contradictions") :]
    assert body.count("yield ") == 47


@pytest.mark.parametrize(
    "overrides",
    [
        ["ppo.top_p=0.9", "ppo.allow_biased_sampling=true"],
        ["ppo.kl.coefficient=0"],
        ["ppo.critic_warmup_iterations=99"],
        ["base.quantization=none"],
        ["launch.accelerate_config=a.yaml"],
        ["ppo.rewards=[{function: 'a.py:f'}, {function: 'b.py:g', weight: -1}]"],
        ["data.preferences.sources=[{path: a.jsonl, weight: 1}, {path: b.jsonl, weight: 3}]"],
        ["launch.processes=4"],
        ["launch.processes=2", "launch.strategy=fsdp", "launch.cpu_offload=true", *EVEN],
        ["launch.mixed_precision=bf16"],
        ["ppo.rollout.engine=paged", "ppo.rollout.weights=adapter"],
        ["ppo.rollout.engine=paged", "launch.processes=2", "launch.strategy=fsdp", *EVEN],
        ["launch.mixed_precision=bf16", "base.dtype=bfloat16"],
        ["launch.machines=2", "launch.machine_rank=1", "launch.main_address=node0", *EVEN],
    ],
)
def test_what_goes_together_is_accepted(tmp_path: Path, overrides: list[str]) -> None:
    load(tmp_path, *overrides)


# ---- the file itself


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run_dir: [a\nbase: {", "not valid YAML"),
        ("- a\n- b", "does not hold a mapping"),
        ("", "does not hold a mapping"),
        ("1: a", "does not hold a mapping"),
        ("run_dir: a\nbase: {model: m}\nrun_dir: b", "'run_dir' stands in line 1 and again in line 3"),
        ("base: {model: m, model: n}", "'model' stands in line 1 and again in line 1"),
        ("run_dir: !!python/object/apply:os.system [true]", "not valid YAML"),
        ('run_dir: "a\\ud800"', "run_dir holds the character U+D800"),
        ('base: {model: "a\\0b"}', "base.model holds the character U+0000"),
        ('sft: {trl: {a: [1, "\\udfff"]}}', "sft.trl.a.1 holds the character U+DFFF"),
        ("run_dir: &a [*a]", "an alias (*name) inside of what it stands for"),
        ("base: &a {model: *a}", "recursive"),
        (LAUGHS, "more than 100000 values"),
        ('sft: {trl: {"\\ud800": 1}}', "a key holds the character U+D800"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    message = fault(tmp_path, text=text)
    assert expected in message
    assert "run.yaml" in message


@pytest.mark.parametrize(
    ("text", "place", "remedy"),
    [
        ("run_dir: a\nbase:\n\tmodel: m", "line 3, column 1", "no tabs"),
        ("run_dir: a: b", "line 1, column 11", "quotes"),
        ("run_dir: [a\nbase: m", "line 2, column 5", "brackets"),
        ("base: " + "[" * 5000, "run.yaml", "less deeply"),
    ],
)
def test_yaml_that_cannot_be_read_comes_with_its_place_and_a_way_out(
    tmp_path: Path, text: str, place: str, remedy: str
) -> None:
    said, _, advice = fault(tmp_path, text=text).partition("\n  -> ")
    assert place in said and "not valid YAML" in said and remedy in advice


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot read the config: No such file"):
        load_config(tmp_path / "absent.yaml")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "run.yaml")


# ---- overrides and origins


def test_an_override_wins_and_says_so(tmp_path: Path) -> None:
    loaded = load(tmp_path, "ppo.kl.coefficient=0.25", ppo={"kl": {"coefficient": 0.1, "target": 3}})
    assert loaded.config.ppo.kl.coefficient == 0.25
    assert loaded.config.ppo.kl.target == 3
    origins = loaded.origins
    assert origins["ppo.kl.coefficient"] == "override"
    assert origins["ppo.kl.target"] == "file"
    assert origins["ppo.kl.horizon"] == "default"
    assert origins["run_dir"] == "file"
    lines = {line.split()[0]: line for line in loaded.lines()}
    assert lines["ppo.kl.coefficient"].endswith("override")
    assert lines["base.model"].endswith("file")


def test_override_values_are_yaml(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        "lora.target_modules=[q_proj, v_proj]",
        "ppo.score_clip=null",
        "deterministic=true",
        "data.prompts.sources=a.jsonl",
        "ppo.learning_rate=3.0e-6",
        "base.revision=main=x",
    )
    assert loaded.config.lora.target_modules == ("q_proj", "v_proj")
    assert loaded.config.ppo.score_clip is None
    assert loaded.config.deterministic
    assert [Path(source.path).name for source in loaded.config.data.prompts.sources] == ["a.jsonl"]
    assert loaded.config.ppo.learning_rate == 3e-6
    assert loaded.config.base.revision == "main=x"


@pytest.mark.parametrize("text", ["2e-4", "1e-5", "5E-6"])
def test_a_learning_rate_may_be_written_as_people_write_it(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, f"sft.learning_rate={text}").config.sft.learning_rate == float(text)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lora.target_modules=q_proj", "lora.target_modules: input should be a list (got 'q_proj')"),
        ("ppo.rewards=null", "ppo.rewards: input should be a list (got None)"),
        ("ppo=3", "ppo: input should be a group of settings, `key: value` each (got 3)"),
        ("data.prompts.held_out=1.5", "data.prompts.held_out: a held-out fraction lies between 0 and 1 (got 1.5)"),
    ],
)
def test_a_wrong_kind_of_value_is_named_in_the_words_of_yaml(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in fault(tmp_path, override)


def test_every_setting_has_an_origin_and_a_line(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    keys = {key for key, _ in flatten(loaded.config.model_dump(mode="json"))}
    assert set(loaded.origins) == keys
    assert {line.split()[0] for line in loaded.lines()} == keys


def test_an_inherited_value_names_its_source(tmp_path: Path) -> None:
    lines = {line.split()[0]: line for line in load(tmp_path, "ppo.temperature=0.7").lines()}
    assert lines["evaluate.temperature"].split()[1] == "0.7"
    assert lines["evaluate.temperature"].endswith("inherited from ppo.temperature")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["ppo.epochs"], "is not an override"),
        (["=3"], "is not an override"),
        (["ppo.epochs=1", "ppo.epochs=2"], "given twice"),
        (["ppo.epochs=[1"], "not valid YAML"),
        (["sft.trl=&a [*a]"], "an alias (*name) inside of what it stands for"),
        (['run_dir="\\ud800"'], "run_dir holds the character U+D800"),
        (["sft.\ud800=1"], "a key holds the character U+D800"),
        (["run_dir.x=1"], "goes into run_dir, which holds a single value"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, overrides: list[str], expected: str) -> None:
    assert expected in fault(tmp_path, *overrides)


def test_the_same_override_twice_is_harmless(tmp_path: Path) -> None:
    assert load(tmp_path, "ppo.epochs=3", "ppo.epochs=3").config.ppo.epochs == 3


# ---- paths


def test_input_paths_are_relative_to_the_file_and_outputs_to_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(elsewhere)
    config = load(
        tmp_path,
        base={"model": "tiny", "chat_template": "chat.jinja"},
        data={
            "instructions": {"sources": ["sft.jsonl", "make.py:rows", "org/hub-set"]},
            "prompts": {"sources": ["p.jsonl"], "held_out": ["held.jsonl"]},
        },
        ppo={"rewards": [{"function": "judge.py:score"}]},
        evaluate={"gold": "../gold.py:gold"},
        launch={"accelerate_config": "accelerate.yaml"},
    ).config
    assert config.run_dir == "runs/x"
    assert config.base.model == str(tmp_path / "tiny")
    assert config.base.chat_template == str(tmp_path / "chat.jinja")
    sources = [source.path for source in config.data.instructions.sources]
    assert sources == [str(tmp_path / "sft.jsonl"), f"{tmp_path / 'make.py'}:rows", "org/hub-set"]
    held_out = config.data.prompts.held_out
    assert isinstance(held_out, tuple)
    assert held_out[0].path == str(tmp_path / "held.jsonl")
    assert config.ppo.rewards[0].function == f"{tmp_path / 'judge.py'}:score"
    assert config.evaluate.gold == f"{tmp_path.parent / 'gold.py'}:gold"
    assert config.launch.accelerate_config == str(tmp_path / "accelerate.yaml")


@pytest.mark.parametrize("model", ["org/model", "package:thing/file.gguf"])
def test_a_base_that_is_no_path_stays_as_it_is(tmp_path: Path, model: str) -> None:
    assert load(tmp_path, f"base.model={model}").config.base.model == model


def test_absolute_and_home_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load(tmp_path, "data.prompts.sources=[~/p.jsonl, /abs/q.jsonl]").config
    assert [source.path for source in config.data.prompts.sources] == [str(tmp_path / "p.jsonl"), "/abs/q.jsonl"]
    assert config.base.cache_dir == str(tmp_path / ".cache" / "trivet")


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("a.jsonl", True),
        ("make.py:rows", True),
        ("absent.jsonl.gz", True),
        ("absent.CSV", True),
        ("folder/absent.txt", True),
        ("org/set-v1.5", False),
        ("./folder", True),
        ("org/data", False),
        ("squad", False),
    ],
)
def test_hub_sets_are_told_from_files(tmp_path: Path, path: str, local: bool) -> None:
    assert is_local_source(path, tmp_path) is local


# ---- what the config promises to its readers


def test_batches_divide_exactly(tmp_path: Path) -> None:
    config = load(tmp_path, "sft.batch_size=24", "sft.microbatch_size=3", "launch.processes=2").config
    assert config.accumulation_steps("sft") == 4
    assert any("24 rows = 2 process(es) x 3 at once x 4 accumulation" in line for line in config.arithmetic())
    config = load(tmp_path, "ppo.responses_per_prompt=2", "ppo.minibatch_size=32", "ppo.epochs=3").config
    assert (config.responses_per_iteration, config.minibatches_per_epoch) == (128, 4)
    assert any("12 steps = 3 epoch(s) x 4 minibatch(es) of 32" in line for line in config.arithmetic())


@pytest.mark.parametrize(
    ("overrides", "needs", "trains"),
    [
        ([], True, True),
        (["ppo.rewards=[{function: 'a.py:f'}]"], False, False),
        (["ppo.rewards=[{function: 'a.py:f'}]", "data.preferences.sources=p.jsonl"], False, True),
    ],
)
def test_when_there_is_a_reward_stage(tmp_path: Path, overrides: list[str], needs: bool, trains: bool) -> None:
    config = load(tmp_path, *overrides).config
    assert (config.needs_reward_model, config.trains_reward_model) == (needs, trains)


def test_the_config_is_frozen_and_every_field_is_described() -> None:
    with pytest.raises(ValueError, match="frozen"):
        PPOSettings().epochs = 3  # type: ignore[misc]

    def described(section: Any) -> None:
        for name, field in section.model_fields.items():
            nested = field.annotation
            if isinstance(nested, type) and hasattr(nested, "model_fields"):
                described(nested)
            else:
                assert field.description, f"{section.__name__}.{name} has no docstring"

    described(PipelineConfig)


def test_the_resolved_config_is_json(tmp_path: Path) -> None:
    json.dumps(load(tmp_path).config.model_dump(mode="json"), allow_nan=False)


def test_a_name_that_no_file_can_have_is_no_file(tmp_path: Path) -> None:
    """The system refuses to look for it, which is not a fault of the program."""
    assert load(tmp_path, f"base.model={'x' * 1000}").config.base.model == "x" * 1000
