"""Two machines, as far as one can play both: each with a worker, a home and a folder of its own, and storage that each
sees under another path. What one has made the other one finds; what one is at the other one leaves alone; what one has
left unfinished the other one goes on with.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from box import PASSWORD, Box
from real_runs import ROOT, held_still, no_process_with, processes_with, wait_for

from pipeline.artifacts import read_manifest
from pipeline.registry import Registry
from pipeline.run_directory import STAGES, RunDirectory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

POOL = "second-box"


class SecondMachine:
    """A worker for a pool of its own, in a folder of its own, with the storage mounted at `mount`.

    Where the kernel lets this process have mounts of its own, they are real ones, and the first machine's path to the
    storage shows an empty folder; otherwise `mount` is a symbolic link.
    """

    def __init__(self, folder: Path, first: Box, storage: Path) -> None:
        self.folder, self.first, self.mount = folder, first, folder / "mnt"
        self.mark = f"XDG_CACHE_HOME={folder / 'cache'}"
        self.project = folder / "opt" / "trivet"
        self.project.mkdir(parents=True)
        for name in ("tiny.yaml", "tiny_data.py"):
            shutil.copy(first.folder / name, self.project / name)
        deployment = {
            "name": "elsewhere",
            "entrypoint": f"{ROOT}/flows/rlhf.py:rlhf",
            "work_pool": {"name": POOL, "job_variables": {"stream_output": False}},
            "parameters": {"config": "tiny.yaml"},
        }
        (self.project / "prefect.yaml").write_text(yaml.safe_dump({"deployments": [deployment]}))
        self.environment = first.environment | {
            "HOME": str(folder / "home"),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_URL": first.url,
            "PREFECT_API_AUTH_STRING": PASSWORD,
            "PREFECT_WORKER_QUERY_SECONDS": "1",
        }
        del self.environment["PREFECT_SERVER_API_AUTH_STRING"]
        self.mounts = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0
        if self.mounts:
            self.mount.mkdir()
            mine, theirs = shlex.quote(str(self.mount)), shlex.quote(str(storage))
            self._prefix = ["unshare", "-rm", "sh", "-c"]
            self._mounting = f"mount --bind {theirs} {mine} && mount -t tmpfs none {theirs} && exec "
        else:
            self.mount.symlink_to(storage)
            self._prefix, self._mounting = ["sh", "-c"], "exec "
        self.process: subprocess.Popen[bytes] | None = None

    def prefect(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "prefect", "--no-prompt", *arguments]

    def up(self) -> None:
        for arguments in (["work-pool", "create", POOL, "--type", "process"], ["deploy", "--all"]):
            command = self.prefect(*arguments)
            subprocess.run(command, env=self.environment, cwd=self.project, capture_output=True, check=True)
        worker = shlex.join(self.prefect("worker", "start", "--pool", POOL))
        with (self.folder / "worker.log").open("wb") as log:
            self.process = subprocess.Popen(
                [*self._prefix, self._mounting + worker],
                env=self.environment,
                cwd=self.project,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def lose(self) -> None:
        """Its power fails."""
        assert self.process is not None
        for pid in {**processes_with(self.mark), **processes_with(f"PREFECT_HOME={self.folder / 'prefect'}")}:
            os.kill(pid, signal.SIGKILL)
        self.process.wait(60)
        assert no_process_with(self.mark, 10)


def at(storage: Path) -> list[str]:
    """Everything that both machines use, where this one sees it."""
    return [
        f"run_dir={storage}/run",
        f"registry.folder={storage}/registry",
        f"base.model={storage}/llama-base",
        f"base.cache_dir={storage}/cache",
    ]


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[Box, SecondMachine, Path]]:
    first = Box(tmp_path / "first")
    storage = tmp_path / "first" / "storage"
    storage.mkdir()
    shutil.move(first.folder / "llama-base", storage / "llama-base")
    second = SecondMachine(tmp_path / "second", first, storage)
    try:
        first.up()
        second.up()
        yield first, second, storage
    finally:
        for process in (second.process, first.process):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
        for pid in processes_with(second.mark):
            os.kill(pid, signal.SIGKILL)
        assert no_process_with(f"XDG_CACHE_HOME={tmp_path}")


def test_two_machines_share_runs_and_registry(machines: tuple[Box, SecondMachine, Path]) -> None:
    first, second, storage = machines
    run, registry = RunDirectory(storage / "run"), Registry(storage / "registry")
    here, there = at(storage), at(second.mount)
    print(f"the second machine has {'mounts of its own' if second.mounts else 'a symbolic link'}")

    # What one has made the other one finds, and promotes.
    done, ended = first.run_to_its_end("rlhf/quickstart", *here)
    assert ended == "Completed"
    assert {name: state["name"] for name, state in first.tasks(done).items()} == dict.fromkeys(STAGES, "Completed")
    found, ended = first.run_to_its_end("rlhf/elsewhere", *there, "registry.promote=passed")
    assert ended == "Completed", (second.folder / "worker.log").read_text()
    states = {name: state["name"] for name, state in first.tasks(found).items()}
    assert states == dict.fromkeys(STAGES, "Cached") | {"promote": "Completed"}
    assert registry.current is not None and registry.current.digest == read_manifest(run.stage("ppo")).digest

    # What one is at the other one leaves alone.
    long = ["ppo.iterations=40", "ppo.checkpoint_every=1", "ppo.start_from=promoted"]
    run.metrics("ppo").unlink()
    begun = first.submit("rlhf/elsewhere", *there, *long)

    def iterations() -> int:
        return len(run.metrics("ppo").read_text().splitlines()) if run.metrics("ppo").exists() else 0

    wait_for(lambda: iterations() > 2, "PPO is at work there", 200, first.said)
    with held_still(second.mark, "stages.ppo"):
        refused, ended = first.run_to_its_end("sft/quickstart", *here, "seed=5")
        assert ended == "Failed"
        message = first.ask(f"/flow_runs/{refused}", method="GET")["state"]["message"]
        assert "the run directory is in use" in message and "has been at the ppo stage" in message

        # What one has left unfinished the other one goes on with.
        second.lose()
    reached = iterations()
    assert 2 < reached < 40 and first.state(begun) != "Completed"
    done, ended = first.run_to_its_end("rlhf/quickstart", *here, *long)
    assert ended == "Completed"
    assert "Resuming after" in run.log("ppo").read_text()
    assert [json.loads(line)["step"] for line in run.metrics("ppo").read_text().splitlines()] == list(range(1, 41))
    manifest = read_manifest(run.stage("ppo"))
    assert manifest.extra["started_from"] == registry.current.digest
    assert {name: state["name"] for name, state in first.tasks(done).items()} == {
        "sft": "Cached",
        "reward": "Cached",
        "ppo": "Completed",
        "evaluate": "Completed",
    }
