"""`trivet plan`, as its user sees it; and that every config fits the card that it names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from finished_stages import light_config
from tiny_models import tiny_base
from typer.testing import CliRunner, Result

from flows.cli import app

ROOT = Path(__file__).parents[2]
NAMED = ("one_gpu_8b", "one_gpu_70b", "fsdp_8_gpus", "two_nodes")


def trivet(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("name", NAMED)
def test_a_config_fits_the_card_that_it_names(name: str) -> None:
    result = trivet("plan", ROOT / "configs" / f"{name}.yaml", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["fits"] and plan["changes"] == []
    assert set(plan["stages"]) == {"sft", "reward", "ppo", "evaluate"}
    assert plan["card"]["name"] in (ROOT / "configs" / f"{name}.yaml").read_text()
    for stage in plan["stages"].values():
        assert stage["tensor_bytes"] == sum(stage["parts"].values()) < stage["device_bytes"]
        assert stage["device_bytes"] <= plan["card"]["memory_bytes"]


def test_activations_are_given_with_checkpointing_and_without() -> None:
    config = ROOT / "configs/one_gpu_8b.yaml"
    found = {}
    for on in (True, False):
        switches = [f"{stage}.gradient_checkpointing={str(on).lower()}" for stage in ("sft", "reward", "ppo")]
        found[on] = json.loads(trivet("plan", config, *switches, "--json").stdout)["stages"]
    for stage in ("sft", "reward", "ppo"):
        both = found[True][stage]["activations"]
        assert both == found[False][stage]["activations"] and both["kept"] > 5 * both["recomputed"] > 0
        assert found[False][stage]["parts"]["activations"] == both["kept"]
    assert found[True]["evaluate"]["activations"] == {}
    table = trivet("plan", config).stdout
    for row, name in (("activations, recomputed", "recomputed"), ("activations, all kept", "kept")):
        sizes = [found[True][stage]["activations"][name] / 2**30 for stage in ("sft", "reward", "ppo")]
        (line,) = [line for line in table.splitlines() if line.startswith(row)]
        assert line.split()[-3:] == [f"{size:.2f}" for size in sizes]


def test_what_does_not_fit_comes_with_the_way_out() -> None:
    result = trivet("plan", ROOT / "configs/one_gpu_70b.yaml", "--card", "RTX 4090")
    assert result.exit_code == 0
    assert "sft: at most while" in result.stdout and "does NOT fit RTX 4090" in result.stdout
    result = trivet("plan", ROOT / "configs/one_gpu_8b.yaml", "--memory", "10GB")
    assert "The cheapest change that makes it fit:" in result.stdout
    settings = [
        word for line in result.stdout.splitlines() if line.startswith("  ") for word in line.split("(")[0].split()
    ]
    assert settings
    again = trivet("plan", ROOT / "configs/one_gpu_8b.yaml", *settings, "--memory", "10GB", "--json")
    assert json.loads(again.stdout)["fits"]


def test_what_takes_memory_at_work_is_seen_where_loading_decides() -> None:
    config = ROOT / "configs/fsdp_8_gpus.yaml"
    stages = json.loads(trivet("plan", config, "--json").stdout)["stages"]
    assert {stage["at"] for stage in stages.values()} == {"loading"}
    table = trivet("plan", config).stdout
    rows = dict(re.findall(r"^(\S.*?)\s{2,}([\d. ]+)$", table, flags=re.MULTILINE))
    for part in ("adapters", "gradients", "optimizer", "activations", "FSDP buffers"):
        assert rows[part].split()[0] == f"{stages['sft']['moments']['forward and backward'][part] / 2**30:.2f}"
    sft = stages["sft"]
    at_work, loading, peak = (
        float(rows[row].split()[0]) for row in ("at work, together", "while loading", "peak of the tensors")
    )
    assert at_work < loading == peak
    for size, moment in ((at_work, "forward and backward"), (loading, "loading")):
        assert size == pytest.approx(sum(sft["moments"][moment].values()) / 2**30, abs=0.005)
    assert sft["parts"] == sft["moments"]["loading"]
    assert "sft: at most while 'loading', at work while 'forward and backward'; fits RTX A6000" in table


def test_stages_side_by_side_have_to_fit_together() -> None:
    together = ["launch.side_by_side=true", "reward.start_from=base", "reward.calibrate_on=base"]
    config = ROOT / "configs/one_gpu_8b.yaml"
    assert "side by side" not in trivet("plan", config).stdout
    for card, verdict in (("H200", "which fits H200"), ("12GB", "GiB more than there is")):
        option = ("--memory" if card == "12GB" else "--card", card)
        stages = json.loads(trivet("plan", config, *together, *option, "--json").stdout)["stages"]
        needed = (stages["sft"]["device_bytes"] + stages["reward"]["device_bytes"]) / 2**30
        said = trivet("plan", config, *together, *option).stdout.splitlines()[-1]
        assert said.startswith(f"sft and reward side by side: {needed:.2f} GiB on one GPU, ") and verdict in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--card", "RTX 9999"], "is no card that trivet knows"),
        (["--memory", "much"], "--memory: 'much' is no size"),
        (["--memory", "24"], "'24' is no size  -> Give a number with its unit: 24GB, 24GiB or 24000MB."),
        (["--memory", "24TB"], "'24TB' is no size"),
        (["--memory", "RTX 4090"], "'RTX 4090' is no size"),
        (["--card", "T4", "--memory", "16GB"], "both given"),
        (["launch.card=abacus"], "launch.card: 'abacus' is no card"),
        (["launch.accelerate_config=nope.yaml"], "there is no such file"),
    ],
)
def test_bad_input_is_refused(options: list[str], words: str) -> None:
    config = "quickstart.yaml" if "accelerate" in options[0] else "one_gpu_8b.yaml"
    result = trivet("plan", ROOT / "configs" / config, *options)
    assert result.exit_code == 2 and words in result.stderr.replace("\n", "")


def test_a_model_whose_config_misses_fields_is_named(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "model")
    settings = json.loads((base / "config.json").read_text())
    del settings["intermediate_size"]
    (base / "config.json").write_text(json.dumps(settings))
    result = trivet("plan", light_config(tmp_path), f"base.model={base}")
    assert result.exit_code == 2 and "does not say intermediate_size" in result.stderr


def test_an_own_launcher_file_decides() -> None:
    path = ROOT / "configs/accelerate/fsdp2.yaml"
    options = ["sft.microbatch_size=1", "reward.microbatch_size=1", f"launch.accelerate_config={path}", "--json"]
    plan = json.loads(trivet("plan", ROOT / "configs/one_gpu_8b.yaml", *options).stdout)
    assert plan["strategy"] == "fsdp"
    assert plan["stages"]["sft"]["at"] == "loading" and not plan["stages"]["sft"]["host_bytes"]
    options[-2] = options[-2].replace("fsdp2", "fsdp2_offload")
    offloaded = json.loads(trivet("plan", ROOT / "configs/one_gpu_8b.yaml", *options).stdout)
    assert offloaded["stages"]["sft"]["host_bytes"] > 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("base.quantization=int8", "which shards no integers"),
        ("sft.batch_size=12", "which is not a multiple of"),
    ],
)
def test_what_does_not_go_with_an_own_launcher_file_is_refused(override: str, words: str) -> None:
    path = ROOT / "configs/accelerate/deepspeed_zero3.yaml"
    even = ["sft.microbatch_size=1", "reward.microbatch_size=1"]
    result = trivet("plan", ROOT / "configs/one_gpu_8b.yaml", *even, f"launch.accelerate_config={path}", override)
    assert result.exit_code == 2 and words in " ".join(result.stderr.split())


def test_what_an_own_launcher_file_decides_is_not_proposed() -> None:
    even = [f"{stage}.batch_size=16" for stage in ("sft", "reward")] + ["launch.card=44GB"]
    config, file = ROOT / "configs/one_gpu_70b.yaml", ROOT / "configs/accelerate/ddp.yaml"
    section = trivet("plan", config, *even, "launch.processes=8", "launch.strategy=ddp").stdout
    assert section.splitlines()[-1].startswith("  launch.strategy=fsdp")
    own = trivet("plan", config, *even, f"launch.accelerate_config={file}").stdout
    assert own.splitlines()[-1].startswith("No change that trivet knows")


def test_the_answer_comes_within_seconds_and_without_torch() -> None:
    program = (
        "import sys; from flows.cli import app\n"
        f"try: app(['plan', {str(ROOT / 'configs/one_gpu_8b.yaml')!r}])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'prefect', 'accelerate'} & set(sys.modules)"
    )
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)
    assert time.monotonic() - started < 5


def test_the_table_of_the_docs_is_what_the_arithmetic_gives_now() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "memory_table.py", "--check"],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
