"""Two machines, played by two launches on this one: the documented commands, and what becomes of the one that is left.

Each has an address of the same machine, its own rank and its own home; processes meet over a real port.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from process_group import TESTS, free_port
from real_runs import ROOT, environment, processes_with, wait_for
from safetensors.torch import load_file
from tiny_models import tiny_config
from torch.testing import assert_close

from pipeline.artifacts import read_manifest
from pipeline.config_file import LoadedConfig
from pipeline.metrics import read_metrics
from pipeline.run_directory import RunDirectory
from stages import sft

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

DATA = {"instructions": "demonstrations", "preferences": "comparisons", "prompts": "prompts"}
DOCS = (ROOT / "docs" / "many_gpus.md").read_text()


def two_machines(folder: Path, *overrides: str, steps: int = 3) -> LoadedConfig:
    """A config as configs/two_nodes.yaml has it, with one process a machine."""
    # SGD without clipping: that, and Adam's first steps, would hide a wrong scale of the gradient.
    training = {"batch_size": 4, "microbatch_size": 2, "max_steps": steps, "learning_rate": 0.05, "optimizer": "sgd"}
    training |= {"max_length": 64, "log_every": 1, "max_grad_norm": 1e9}
    held_out = {kind: {"sources": [f"tiny_data.py:{name}"], "held_out": 0.3} for kind, name in DATA.items()}
    launch = {"processes": 1, "machines": 2, "main_address": "node0", "main_port": free_port(), "strategy": "fsdp"}
    return tiny_config(folder, *overrides, sft=training, launch=launch, data=held_out)


def alone(folder: Path) -> Path:
    """The result of the same stage in one process."""
    one = ("launch.machines=1", "launch.main_address=null", "launch.strategy=auto")
    loaded = two_machines(folder, f"run_dir={folder / 'alone'}", *one)
    sft.run(loaded, RunDirectory.open(loaded))
    return RunDirectory.find(loaded).stage("sft")


def require_common_result(run: RunDirectory, wanted: Path, said: str) -> None:
    """One result, to which each process gave its half: as far as floating-point sums go that of one process.

    Each has held half of the base.
    """
    assert "each process holds 50% of its layers'" in said
    two, one = (load_file(path / "adapter_model.safetensors") for path in (run.stage("sft"), wanted))
    # Sums of float32 in another order, in three steps that moved the weights a thousand times as far.
    assert_close(two, one, rtol=1e-4, atol=1e-6)
    assert max(float(tensor.abs().max()) for name, tensor in one.items() if "lora_B" in name) > 1e-3
    rows = read_manifest(run.stage("sft")).metrics["held_out_rows"]
    assert rows % 2 and f"held-out loss 0/{rows // 2 + 1} rows" in said


def block(marker: str) -> str:
    """The shell block of the docs that has these words."""
    (found,) = (text for text in re.findall(r"```bash\n(.*?)```", DOCS, flags=re.DOTALL) if marker in text)
    return str(found)


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def test_the_slurm_script_of_the_docs_runs_a_stage_on_both(tmp_path: Path) -> None:
    """With a Slurm of two nodes in six lines: `srun` starts the command once a node."""
    loaded, wanted = two_machines(tmp_path), alone(tmp_path)
    programs = tmp_path / "bin"
    program(programs, "scontrol", 'test "$*" = "show hostnames n[0-1]" && printf "127.0.0.1\\n127.0.0.2\\n"')
    program(programs, "trivet", f'exec {sys.executable} -m flows.cli "$@"')
    program(
        programs,
        "srun",
        'for node in 0 1; do SLURM_NODEID=$node HOME=$HOME$node "$@" & jobs+=($!); done\n'
        'for job in "${jobs[@]}"; do wait "$job" || failed=1; done; exit ${failed:-0}',
    )
    script = block("#SBATCH")
    for documented, here in (("configs/two_nodes.yaml", str(loaded.path)), ("sft reward ppo evaluate", "sft")):
        assert script.count(documented) == 1
        script = script.replace(documented, here)
    done = subprocess.run(
        ["bash", "-c", script],
        env=environment(tmp_path / "cache")
        | {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[0-1]", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunDirectory.find(loaded)
    require_common_result(run, wanted, done.stdout + done.stderr)
    assert "launch.machine_rank=0 (1 process(es))" in run.log("sft").read_text()
    assert "launch.machine_rank=1 (1 process(es))" in run.log("sft", 1).read_text()


def test_the_torchrun_commands_of_the_docs_run_a_stage_on_both(tmp_path: Path) -> None:
    loaded, wanted = two_machines(tmp_path), alone(tmp_path)
    script = block("torchrun")
    for documented, here in (
        ("torchrun", f"{sys.executable} -m torch.distributed.run"),
        ("configs/two_nodes.yaml", str(loaded.path)),
        ("--nproc_per_node 8", "--nproc_per_node 1"),
        ("--master_addr node0", "--master_addr 127.0.0.1"),
        ("--master_port 29500", f"--master_port {free_port()}"),
    ):
        assert script.count(documented) == 1
        script = script.replace(documented, here)
    assert script.count("--node_rank 0") == 1
    machines = [
        subprocess.Popen(
            ["bash", "-c", script.replace("--node_rank 0", f"--node_rank {rank}")],
            env=environment(tmp_path / "cache") | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    require_common_result(RunDirectory.find(loaded), wanted, said[0])


# ---- the one that is left

SECONDS_AFTER_THE_TIMEOUT = 60.0
"""Twice what launcher and supervisor give processes that do not answer, before they kill them."""


def machine(loaded: LoadedConfig, rank: int, *overrides: str) -> subprocess.Popen[str]:
    own = [*overrides, "launch.main_address=127.0.0.1", f"launch.machine_rank={rank}"]
    paths = os.pathsep.join([str(ROOT), str(TESTS)])
    return subprocess.Popen(
        [sys.executable, str(TESTS / "one_machine.py"), "sft", str(loaded.path), *own],
        env=environment(loaded.path.parent / f"cache{rank}") | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextmanager
def at_work(folder: Path, *overrides: str) -> Iterator[tuple[list[subprocess.Popen[str]], int]]:
    """Two machines between two of very many steps; with the process of the second one."""
    loaded = two_machines(folder, steps=100000)
    run, both = RunDirectory.find(loaded), [machine(loaded, rank, *overrides) for rank in (0, 1)]
    try:
        wait_for(
            lambda: (run.metrics("sft").exists() and len(read_metrics(run.metrics("sft"))) >= 2) or both[0].poll(),
            "the second step",
            200,
            lambda: run.log("sft").read_text() if run.log("sft").exists() else "",
        )
        (second,) = (
            number
            for number, line in processes_with(f"XDG_CACHE_HOME={folder / 'cache1'}").items()
            if "stages.sft" in line and "accelerate" not in line
        )
        yield both, second
    finally:
        for process in both:
            process.kill()


def ended(process: subprocess.Popen[str], *, after: float = 0.0) -> str:
    """What a launch said that has to fail by itself, `after` seconds of waiting for another at the most."""
    started = time.monotonic()
    said: str = process.communicate(timeout=after + SECONDS_AFTER_THE_TIMEOUT)[0]
    print(f"ended after {time.monotonic() - started:.1f} s")
    assert process.returncode == 1, said
    return said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_machine_that_stays_alone_says_so_in_time(tmp_path: Path, rank: int) -> None:
    process = machine(two_machines(tmp_path), rank, "launch.timeout=3")
    try:
        said = ended(process, after=3)
    finally:
        process.kill()
    assert "launch.machines: the machines of the sft stage have not come together" in said
    assert "launch.main_address and launch.main_port must lead to machine 0" in said


def test_a_process_that_dies_on_one_machine_ends_the_stage_on_both(tmp_path: Path) -> None:
    with at_work(tmp_path) as (both, second):
        os.kill(second, signal.SIGKILL)
        said = [ended(process) for process in both]
    assert "the sft stage failed: another process of the stage has ended" in said[0], said[0]
    assert "on several machines run it on each" in said[0]
    assert "a process of the sft stage was killed" in said[1]


def test_a_process_that_no_longer_answers_is_waited_for_only_so_long(tmp_path: Path) -> None:
    with at_work(tmp_path, "launch.timeout=10") as (both, second):
        os.kill(second, signal.SIGSTOP)
        try:
            said = ended(both[0], after=10)
        finally:
            os.kill(second, signal.SIGKILL)
    assert "another process of the stage has ended, or did not take part in time" in said
