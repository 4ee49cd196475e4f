"""What Accelerate is told, and what is refused before anything starts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from tiny_models import tiny_config

from pipeline import cards
from pipeline.cards import Card
from pipeline.config import LaunchSettings, PipelineConfig
from pipeline.distributed import World
from pipeline.errors import ConfigError, StageFailedError
from pipeline.run_directory import STAGES, StageName
from pipeline.sharding import sharers
from stages import launcher_file as module
from stages.launch import ensure_stage
from stages.launcher_file import (
    ask_as_accelerate,
    launcher_settings,
    machine_rank_of,
    read_launcher_file,
    require_launchable,
    resolve,
)

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


def understood(path: Path) -> argparse.Namespace:
    """What `accelerate launch` itself makes of a file."""
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "-m", "stages.sft"])
    arguments, _, _ = _validate_launch_command(arguments)
    return arguments


def written(tmp_path: Path, **launch: Any) -> argparse.Namespace:
    path = tmp_path / "accelerate.yaml"
    path.write_text(yaml.safe_dump(launcher_settings(LaunchSettings.model_validate(launch), use_cpu=False)))
    return understood(path)


def test_the_section_says_what_accelerate_understands(tmp_path: Path) -> None:
    one = written(tmp_path)
    assert (one.num_processes, one.multi_gpu, one.use_fsdp, one.mixed_precision) == (1, False, False, "no")
    ddp = written(tmp_path, processes=4, strategy="ddp")
    assert (ddp.num_processes, ddp.num_machines, ddp.multi_gpu, ddp.use_fsdp) == (4, 1, True, False)
    assert ddp.main_process_port == 0
    sharded = written(tmp_path, processes=8, strategy="fsdp", cpu_offload=True, mixed_precision="bf16")
    assert (sharded.use_fsdp, sharded.multi_gpu, sharded.fsdp_version) == (True, False, 2)
    assert (sharded.fsdp_offload_params, sharded.fsdp_reshard_after_forward) == (True, True)
    assert (sharded.mixed_precision, sharded.fsdp_auto_wrap_policy) == ("bf16", "TRANSFORMER_BASED_WRAP")
    assert (
        written(tmp_path, processes=8, strategy="fsdp", reshard_after_forward=False).fsdp_reshard_after_forward is False
    )
    two = written(tmp_path, processes=8, machines=2, machine_rank=1, main_address="node0", strategy="fsdp")
    assert (two.num_processes, two.num_machines, two.machine_rank) == (16, 2, 1)
    assert (two.main_process_ip, two.main_process_port) == ("node0", 29500)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_launcher_file_is_one_and_has_no_hyperparameters(path: Path) -> None:
    load_config_from_file(str(path))
    arguments = understood(path)
    launcher = read_launcher_file(path)
    assert launcher.world_size == arguments.num_processes
    assert launcher.machines == (arguments.num_machines or 1)
    assert (launcher.zero is not None) == bool(arguments.use_deepspeed)
    assert (launcher.kind == "fsdp") == bool(arguments.use_fsdp or launcher.zero == 3)
    assert arguments.mixed_precision == "no"
    words = path.read_text()
    assert not [word for word in ("learning_rate", "batch_size", "max_length", "optimizer") if f"{word}:" in words]


def test_a_file_says_where_shares_lie_and_how_long_layers_stay(tmp_path: Path) -> None:
    def read(**fsdp: Any) -> tuple[bool, bool]:
        settings = {"distributed_type": "FSDP", "num_processes": 2, "fsdp_config": fsdp}
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(settings))
        found = read_launcher_file(tmp_path / "own.yaml")
        return found.offload, found.reshard

    assert read() == (False, True)
    assert read(fsdp_offload_params=True, fsdp_reshard_after_forward=False) == (True, False)
    assert read(fsdp_reshard_after_forward="FULL_SHARD") == (False, True)
    assert read(fsdp_reshard_after_forward="SHARD_GRAD_OP") == (False, False)


def test_a_file_and_the_base_must_agree_on_the_arithmetic(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    for word, found in (("bf16", "bf16"), ("no", "no"), ('"no"', "no"), ("null", "no"), ("FP16", "fp16")):
        own.write_text(f"distributed_type: MULTI_GPU\nnum_processes: 2\nmixed_precision: {word}\n")
        assert read_launcher_file(own).mixed_precision == found
    for dtype, fault in (("float16", None), ("auto", None), ("float32", "'float32'; set base.dtype=float16")):
        tree = config(accelerate_config=str(own)).model_dump(exclude_unset=True)
        tree["base"]["dtype"] = dtype
        if fault is None:
            assert require_launchable(PipelineConfig.model_validate(tree)).mixed_precision == "fp16"
            continue
        with pytest.raises(ConfigError, match=f"own.yaml: .*{fault}"):
            require_launchable(PipelineConfig.model_validate(tree))


def test_there_is_a_file_for_each_way() -> None:
    assert {path.stem for path in FILES} == {
        "one_gpu", "ddp", "fsdp2", "fsdp2_offload", "two_nodes", "deepspeed_zero2", "deepspeed_zero3",
    }  # fmt: skip


def with_gpus(monkeypatch: pytest.MonkeyPatch, *gibibytes: int) -> None:
    here = [Card(f"card {size}", size * 2**30) for size in gibibytes]
    monkeypatch.setattr(module, "cards_here", lambda: here)
    monkeypatch.setattr(module, "has_accelerator", lambda: bool(here))


def config(base: str = "meta-llama/Llama-3.1-70B", **launch: Any) -> PipelineConfig:
    rows = {"batch_size": 16, "microbatch_size": 1}
    tree = {"run_dir": "x", "base": {"model": base}, "launch": launch, "sft": rows, "reward": rows}
    return PipelineConfig.model_validate(tree)


def test_auto_is_decided_by_the_smallest_card_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 141, 45)
    launch, reason = resolve(config(processes=8))
    assert launch.strategy == "fsdp"
    assert reason == "launch.strategy=auto is fsdp: sft does not fit card 45 with the whole base on it."
    with_gpus(monkeypatch, 141, 141)
    assert resolve(config(processes=2))[0].strategy == "ddp"
    assert resolve(config(processes=2, card="RTX 4090"))[0].strategy == "fsdp"
    with_gpus(monkeypatch)
    launch, reason = resolve(config(processes=2))
    assert launch.strategy == "ddp" and "there is no GPU" in str(reason)
    assert resolve(config()) == (config().launch, None)
    assert resolve(config(processes=2, strategy="fsdp"))[1] is None


def test_more_processes_than_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 80, 80)
    assert require_launchable(config("Qwen/Qwen2.5-14B", processes=2)).kind == "ddp"
    with pytest.raises(ConfigError, match=r"launch: 4 processes .* 2 GPU\(s\)") as caught:
        require_launchable(config("Qwen/Qwen2.5-14B", processes=4))
    assert "Set launch.processes=2" in str(caught.value)
    (tmp_path / "a.yaml").write_text(
        "distributed_type: MULTI_GPU\nnum_processes: 8\nnum_machines: 2\nmain_process_ip: n\n"
    )
    with pytest.raises(ConfigError, match=r"a\.yaml: 4 processes"):
        require_launchable(config(accelerate_config=str(tmp_path / "a.yaml")))


@pytest.mark.parametrize(("name", "reason"), [("MEGATRON_LM", "no other model"), ("XLA", "on GPUs")])
def test_what_no_stage_can_do_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "own.yaml").write_text(f"distributed_type: {name}\nnum_processes: 2\n")
    with pytest.raises(ConfigError, match=rf"own\.yaml: it asks for {name}, which no stage can do: .*{reason}"):
        require_launchable(config(accelerate_config=str(tmp_path / "own.yaml")))


def test_the_files_at_hand_ask_for_what_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, *[80] * 8)
    found = {
        name: require_launchable(config(accelerate_config=str(ROOT / f"configs/accelerate/{name}.yaml")))
        for name in ("one_gpu", "ddp", "fsdp2", "fsdp2_offload", "deepspeed_zero2", "deepspeed_zero3")
    }
    assert {name: launcher.kind for name, launcher in found.items()} == {
        "one_gpu": "none",
        "ddp": "ddp",
        "fsdp2": "fsdp",
        "fsdp2_offload": "fsdp",
        "deepspeed_zero2": "ddp",
        "deepspeed_zero3": "fsdp",
    }
    assert [name for name, launcher in found.items() if launcher.offload] == ["fsdp2_offload"]
    assert require_launchable(config(processes=8, strategy="fsdp")).kind == "fsdp"


def deepspeed(folder: Path, processes: int = 8, machines: int = 1, **given: Any) -> PipelineConfig:
    """A config whose launcher file asks for DeepSpeed."""
    settings = {"distributed_type": "DEEPSPEED", "num_processes": processes, "num_machines": machines}
    own = {key: given.pop(key) for key in ("main_process_ip", "main_process_port", "machine_rank") if key in given}
    (folder / "own.yaml").write_text(yaml.safe_dump(settings | own | {"deepspeed_config": given}))
    return config(accelerate_config=str(folder / "own.yaml"), timeout=60, card="RTX 4090")


def test_what_a_deepspeed_file_asks_for_is_done_with_pytorchs_own_means(tmp_path: Path) -> None:
    launch, sentence = resolve(deepspeed(tmp_path, zero_stage=3, offload_param_device="cpu"))
    assert launch == LaunchSettings(processes=8, strategy="fsdp", cpu_offload=True, timeout=60, card="RTX 4090")
    assert str(sentence).endswith(
        "own.yaml asks for DeepSpeed's ZeRO-3: it runs as FSDP2, with a share of the base on each GPU."
    )
    assert understood_settings(tmp_path, launch) == (8, True, False)
    for stage in (0, 1, 2):
        launch, sentence = resolve(deepspeed(tmp_path, zero_stage=stage, offload_param_device="none"))
        assert launch == LaunchSettings(processes=8, strategy="ddp", timeout=60, card="RTX 4090")
        assert f"ZeRO-{stage}: it runs as DDP" in str(sentence)
        assert understood_settings(tmp_path, launch) == (8, False, False)
    launch, sentence = resolve(deepspeed(tmp_path, processes=1, zero_stage=3, offload_param_device="cpu"))
    assert launch == LaunchSettings(timeout=60, card="RTX 4090") and "nothing to share out" in str(sentence)


def understood_settings(tmp_path: Path, launch: LaunchSettings) -> tuple[int, bool, bool]:
    found = written(tmp_path, **launch.model_dump())
    return found.num_processes, found.use_fsdp, found.use_deepspeed


def test_deepspeeds_own_json_is_read(tmp_path: Path) -> None:
    own = {"train_batch_size": "auto", "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    (tmp_path / "ds.json").write_text(json.dumps(own))
    launch, _ = resolve(deepspeed(tmp_path, deepspeed_config_file="ds.json"))
    assert (launch.strategy, launch.cpu_offload) == ("fsdp", True)
    (tmp_path / "ds.json").write_text("{}")
    assert resolve(deepspeed(tmp_path, deepspeed_config_file=str(tmp_path / "ds.json")))[0].strategy == "ddp"
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(ConfigError, match=r"^launch.accelerate_config=\S+own.yaml: it is no Accelerate config"):
        resolve(deepspeed(tmp_path, deepspeed_config_file="ds.json"))
    with pytest.raises(
        ConfigError, match=r"^launch.accelerate_config=\S+own.yaml: there is no 'nope\.json', which it names"
    ):
        resolve(deepspeed(tmp_path, deepspeed_config_file="nope.json"))


def test_the_arithmetic_of_deepspeeds_json_must_be_the_bases(tmp_path: Path) -> None:
    for switches, found in (
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"fp16": {"enabled": True, "loss_scale": 0}, "bf16": {"enabled": False}}, "fp16"),
        ({"bf16": {"enabled": "auto"}}, "no"),
    ):
        (tmp_path / "ds.json").write_text(json.dumps(switches))
        by_file = deepspeed(tmp_path, deepspeed_config_file="ds.json")
        assert require_launchable(by_file).mixed_precision == found
    (tmp_path / "ds.json").write_text(json.dumps({"bf16": {"enabled": True}}))
    tree = by_file.model_dump(exclude_unset=True)
    tree["base"]["dtype"] = "float32"
    with pytest.raises(
        ConfigError, match=r"^launch.accelerate_config=\S+own.yaml: .*'bf16', .* 'float32'; set base.dtype=bfloat16"
    ):
        require_launchable(PipelineConfig.model_validate(tree))


def test_what_a_deepspeed_file_asks_for_in_vain_is_said(tmp_path: Path) -> None:
    def left_out(**given: Any) -> str:
        return str(resolve(deepspeed(tmp_path, **given))[1]).partition("; not done: ")[2]

    both = {"offload_param_device": "cpu", "offload_optimizer_device": "cpu"}
    assert left_out(zero_stage=2, **both) == "weights in main memory, optimizer states in main memory."
    assert left_out(zero_stage=3, **both) == "optimizer states in main memory."
    own = {"stage": 3, "offload_optimizer": {"device": "nvme"}, "offload_param": {"device": "none"}}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": own}))
    assert left_out(deepspeed_config_file="ds.json") == "optimizer states on nvme."
    assert left_out(zero_stage=3, deepspeed_hostfile="hosts") == "starting the machines of hosts."
    assert left_out(zero_stage=3, offload_optimizer_device="none") == ""


def test_several_machines_of_a_deepspeed_file_start_one_by_one(tmp_path: Path) -> None:
    where = {"main_process_ip": "node0", "main_process_port": 29501, "machine_rank": 1}
    launch, _ = resolve(deepspeed(tmp_path, processes=16, machines=2, zero_stage=3, **where))
    assert (launch.processes, launch.machines, launch.machine_rank) == (8, 2, 1)
    assert (launch.main_address, launch.main_port) == ("node0", 29501)
    with pytest.raises(ConfigError, match=r"^launch.accelerate_config=\S+own.yaml: it does not say where machine 0 is"):
        resolve(deepspeed(tmp_path, processes=16, machines=2, zero_stage=3))
    with pytest.raises(
        ConfigError, match=r"^launch.accelerate_config=\S+own.yaml: it has pdsh start the processes of all machines"
    ):
        resolve(deepspeed(tmp_path, processes=16, machines=2, deepspeed_multinode_launcher="pdsh", **where))
    with pytest.raises(ConfigError, match=r"^launch.accelerate_config=\S+own.yaml: it wants the weights on 'nvme'"):
        resolve(deepspeed(tmp_path, zero_stage=3, offload_param_device="nvme"))


def test_deepspeeds_engine_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by `accelerate launch` with such a file."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=r"launch\.accelerate_config=FILE"):
        sharers(World(), config().base)


@pytest.mark.parametrize(
    ("base", "fault"),
    [
        ({"quantization": "int8"}, "launch.strategy is 'fsdp', which shards no integers"),
        ({"quant_storage": "uint8"}, "base.quant_storage is 'uint8', which FSDP leaves whole on every GPU"),
    ],
)
def test_weights_that_fsdp_cannot_share_out_are_refused_whoever_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: dict[str, Any], fault: str
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_version: 2}\n")
    tree = config(accelerate_config=str(own)).model_dump(exclude_unset=True)
    tree["base"] |= base
    by_file = PipelineConfig.model_validate(tree)
    assert not list(by_file.contradictions())
    with pytest.raises(ConfigError, match=f"own.yaml: with 2 processes under FSDP: {fault}"):
        require_launchable(by_file)
    tree["launch"] = {"processes": 2, "strategy": "fsdp"}
    assert fault in "".join(PipelineConfig.model_validate(tree).contradictions())
    tree["launch"] = {"processes": 2}
    with_gpus(monkeypatch, 24, 24)
    monkeypatch.setattr(module, "choose_strategy", lambda *_: ("fsdp", "said so"))
    with pytest.raises(ConfigError, match=f"launch: with 2 processes under FSDP: {fault}"):
        require_launchable(PipelineConfig.model_validate(tree))


def test_an_engine_that_needs_the_whole_base_is_refused_whoever_asks_for_fsdp(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_version: 2}\n")
    tree = config(accelerate_config=str(own)).model_dump(exclude_unset=True)
    for rollout, refused in (({"engine": "paged", "weights": "adapter"}, True), ({"engine": "generate"}, False)):
        tree["ppo"] = {"rollout": rollout}
        found = PipelineConfig.model_validate(tree)
        if not refused:
            assert require_launchable(found).kind == "fsdp"
            continue
        with pytest.raises(
            ConfigError,
            match=r"^launch.accelerate_config=\S+own.yaml: with 2 processes under FSDP: ppo.rollout.engine is 'paged'",
        ):
            require_launchable(found)


def test_paging_over_a_copy_that_is_not_made_is_refused_before_the_base_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`ppo.rollout.weights=auto` merges where the copy takes a quarter of the card at the most."""
    tree = config("meta-llama/Llama-3.1-8B", processes=2, strategy="fsdp").model_dump(exclude_unset=True)
    tree["ppo"] = {"rollout": {"engine": "paged"}}
    paged = PipelineConfig.model_validate(tree)
    with_gpus(monkeypatch, 80, 80)
    assert require_launchable(paged).kind == "fsdp"
    with_gpus(monkeypatch, 80, 40)
    with pytest.raises(ConfigError, match=r"launch: ppo.rollout.engine is 'paged', .* a quarter of card 40"):
        require_launchable(paged)
    tree["launch"]["strategy"] = "ddp"
    assert require_launchable(PipelineConfig.model_validate(tree)).kind == "ddp"
    tree["launch"]["strategy"], tree["ppo"]["rollout"]["weights"] = "fsdp", "merged"
    assert require_launchable(PipelineConfig.model_validate(tree)).kind == "fsdp"


def test_torchruns_processes_are_asked_as_accelerate_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(environment: dict[str, str], **launch: Any) -> dict[str, str]:
        variables = dict(environment)
        monkeypatch.setattr(module.os, "environ", variables)
        ask_as_accelerate(config(processes=2, **launch))
        return {key: value for key, value in variables.items() if key not in environment}

    kept_here = {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "false", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    assert asked({}, strategy="fsdp") == kept_here
    switched = kept_here | {"FSDP_OFFLOAD_PARAMS": "true", "FSDP_RESHARD_AFTER_FORWARD": "false"}
    assert asked({}, strategy="fsdp", cpu_offload=True, reshard_after_forward=False) == switched
    assert asked({}, strategy="ddp") == {}
    # Accelerate's own launcher has asked already, or has not been told to.
    assert asked({"ACCELERATE_MIXED_PRECISION": "no"}, strategy="fsdp") == {}
    own = {"accelerate_config": str(ROOT / "configs/accelerate/fsdp2_offload.yaml")}
    monkeypatch.setattr(module, "read_launcher_file", lambda path: module.Launcher("fsdp", 2, 1, path, offload=True))
    variables: dict[str, str] = {}
    monkeypatch.setattr(module.os, "environ", variables)
    ask_as_accelerate(config(**own))
    assert variables == kept_here | {"FSDP_OFFLOAD_PARAMS": "true"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_alone_is_refused_before_its_processes_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: StageName
) -> None:
    """As `trivet ppo CONFIG` is, not only `trivet run CONFIG`."""
    with_gpus(monkeypatch, 24)
    monkeypatch.setattr("stages.launch.launch_stage", lambda *_, **__: pytest.fail("started"))
    named: dict[str, Any] = {"force": False, "on_line": print, "on_progress": print}
    even = [f"{name}.microbatch_size=1" for name in ("sft", "reward")]
    with pytest.raises(ConfigError, match=r"2 processes are to start on this machine, which has 1 GPU\(s\)"):
        ensure_stage(stage, tiny_config(tmp_path, "launch.processes=2", *even), **named)
    file = ROOT / "configs/accelerate/deepspeed_zero3.yaml"
    with_gpus(monkeypatch, *[24] * 8)
    even = [f"{name}.batch_size=16" for name in ("sft", "reward")]
    even += ["ppo.minibatch_size=8", "ppo.held_out.prompts=8"]
    with pytest.raises(ConfigError, match=r"with 8 processes under FSDP: .* 'int8'"):
        ensure_stage(
            stage, tiny_config(tmp_path, f"launch.accelerate_config={file}", "base.quantization=int8", *even), **named
        )


def test_a_batch_that_the_files_processes_cannot_share_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 3\n")
    loaded = tiny_config(tmp_path, "launch.accelerate_config=mine.yaml")
    with pytest.raises(ConfigError, match=r"mine\.yaml: with 3 processes under DDP: sft\.batch_size is 4"):
        require_launchable(loaded.config)


@pytest.mark.parametrize("text", ["- 1", "num_processes: [", "a", "parallelism_config: {tp_size: many}"])
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"^launch.accelerate_config=\S+mine.yaml: it is no Accelerate config"):
        read_launcher_file(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ({"distributed_type": "MULTI_GPUS"}, "distributed_type is 'MULTI_GPUS', which no stage can do"),
        ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8', which no stage can do"),
        ({"num_processes": 0}, "num_processes is 0"),
        ({"num_processes": None}, "num_processes is None"),
        ({"num_processes": "many"}, "num_processes is 'many'"),
        ({"num_machines": -1}, "num_machines is -1"),
        ({"num_machines": 3, "main_process_ip": "n"}, "num_processes is 8, with num_machines 3"),
        ({"distributed_type": "NO"}, "num_processes is 8, with num_machines 1 and distributed_type NO"),
        ({"distributed_type": False}, "num_processes is 8, with num_machines 1 and distributed_type NO"),
        ({"num_machines": 2}, "it does not say where machine 0 is"),
        ({"main_process_port": "open"}, "main_process_port is 'open'"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 4}}, "DeepSpeed's stage is 4"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": "auto"}}, "DeepSpeed's stage is 'auto'"),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_sharding_strategy": "NO_SHARD"}},
            "its fsdp_sharding_strategy, NO_SHARD, shares",
        ),
        ({"parallelism_config": {"parallelism_config_tp_size": 2}}, "its parallelism_config_tp_size is 2"),
    ],
)
def test_what_a_file_cannot_mean_is_named(tmp_path: Path, lines: dict[str, Any], fault: str) -> None:
    own = {"distributed_type": "MULTI_GPU", "num_processes": 8} | lines
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(own))
    with pytest.raises(ConfigError, match=rf"^launch.accelerate_config=\S+mine.yaml: {fault}") as caught:
        read_launcher_file(tmp_path / "mine.yaml")
    assert caught.value.remedy


def test_what_a_file_may_mean_is_read(tmp_path: Path) -> None:
    sizes = {"parallelism_config_dp_shard_size": 2, "parallelism_config_tp_size": 1}
    for lines, found in (
        ({"distributed_type": "MULTI_XPU", "num_processes": 4}, ("ddp", 4)),
        ({"distributed_type": False}, ("none", 1)),
        ({"distributed_type": "FSDP", "num_processes": 2, "parallelism_config": sizes}, ("fsdp", 2)),
    ):
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(lines))
        launcher = read_launcher_file(tmp_path / "mine.yaml")
        assert (launcher.kind, launcher.processes) == found


def test_the_log_of_a_machine_has_the_rank_that_its_file_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "num_processes: 2\nnum_machines: 2\nmachine_rank: 1\nmain_process_ip: n\n"
    (tmp_path / "mine.yaml").write_text(f"distributed_type: MULTI_GPU\n{lines}")
    logs: list[Path] = []

    def launch(stage: str, path: Path, overrides: object, settings: LaunchSettings, log: Path, **_: object) -> None:
        logs.append(log)
        raise StageFailedError("not today")

    monkeypatch.setattr("stages.launch.launch_stage", launch)
    loaded = tiny_config(
        tmp_path, "launch.accelerate_config=mine.yaml", "sft.microbatch_size=1", "reward.microbatch_size=1"
    )
    assert machine_rank_of(loaded.config.launch) == 1
    assert machine_rank_of(LaunchSettings(machines=4, machine_rank=3, main_address="n")) == 3
    with pytest.raises(StageFailedError):
        ensure_stage("sft", loaded, force=False, on_line=print, on_progress=print)
    assert [log.name for log in logs] == ["sft.machine1.log"]


def test_the_cards_that_are_asked_for_are_the_ones_of_this_machine() -> None:
    assert module.cards_here is cards.cards_here
