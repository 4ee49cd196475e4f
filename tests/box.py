"""A machine on which `trivet up` runs: the real server, the real worker, the deployments of prefect.yaml."""

from __future__ import annotations

import base64
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from real_runs import ROOT, environment, held_still, processes_with, wait_for
from tiny_models import tiny_config

from flows.server import answers
from pipeline.config_file import LoadedConfig
from pipeline.run_directory import RunDirectory

PASSWORD = "trivet:open-sesame-8"
"""The server wants it everywhere."""


class Box:
    """A machine on which `trivet up` runs, in a Prefect home of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        reward = {"batch_size": 4, "microbatch_size": 2, "max_length": 128, "max_steps": 4, "calibration_prompts": 8}
        self.loaded: LoadedConfig = tiny_config(folder, reward=reward | {"log_every": 1})
        self.run = RunDirectory(self.loaded.config.run_dir)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/api"
        (folder / "cache").mkdir()
        self.environment = environment(folder / "cache") | {
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_SERVER_API_AUTH_STRING": PASSWORD,
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "3",
            "PREFECT_CLI_COLORS": "false",
            "COLUMNS": "200",
        }
        self.mark = f"PREFECT_HOME={folder / 'prefect'}"
        deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())
        for deployment in deployments["deployments"]:
            deployment["entrypoint"] = f"{ROOT}/{deployment['entrypoint']}"
            deployment["parameters"] = {"config": "tiny.yaml"}
        (folder / "prefect.yaml").write_text(yaml.safe_dump(deployments))
        self.process: subprocess.Popen[bytes] | None = None

    def up(self) -> None:
        before = len(self.said())
        with (self.folder / "up.log").open("ab") as log:
            command = [sys.executable, "-m", "flows.cli", "up", "--port", str(self.port)]
            self.process = subprocess.Popen(
                command, env=self.environment, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT
            )
        wait_for(lambda: "The page" in self.said()[before:] or self.ended(), "trivet up", 180, self.said)
        assert not self.ended(), self.said()

    def down(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)

    def ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def answers(self) -> bool:
        return answers(self.url)

    def said(self) -> str:
        path = self.folder / "up.log"
        return path.read_text() if path.exists() else ""

    def prefect(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "prefect", *arguments]
        variables = self.environment | {"PREFECT_API_URL": self.url, "PREFECT_API_AUTH_STRING": PASSWORD}
        done = subprocess.run(
            command, env=variables, cwd=self.folder, capture_output=True, text=True, timeout=400, check=False
        )
        assert not check or done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}\n{self.said()}"
        return done

    def submit(self, deployment: str, *overrides: str) -> str:
        """Submit a run as the page does; its id."""
        found = self.ask(f"/deployments/name/{deployment}", method="GET")
        asked = {"parameters": {"overrides": overrides}, "state": {"type": "SCHEDULED"}}
        return str(self.ask(f"/deployments/{found['id']}/create_flow_run", **asked)["id"])

    def run_to_its_end(self, deployment: str, *overrides: str) -> tuple[str, str]:
        """Submit a run and wait; its id, and the name of the state in which it ended."""
        run = self.submit(deployment, *overrides)
        ends = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
        found = partial(self.ask, f"/flow_runs/{run}", method="GET")
        wait_for(lambda: found()["state"]["type"] in ends, "the run has ended", 380, self.said)
        return run, str(found()["state"]["name"])

    def watch(self, deployment: str, *overrides: str) -> tuple[str, str]:
        """The same as a person does it in a terminal; the run's id, and what the command says."""
        parameters = ("--params", json.dumps({"overrides": overrides}))
        said = self.prefect("deployment", "run", deployment, *parameters, "--watch", "--watch-timeout", "380").stdout
        return said.partition("UUID: ")[2].split()[0], said

    def ask(self, path: str, method: str = "POST", **body: Any) -> Any:
        password = base64.b64encode(PASSWORD.encode()).decode()
        headers = {"Content-Type": "application/json", "Authorization": f"Basic {password}"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers, method=method)
        for _ in range(50):
            try:
                answer = urllib.request.urlopen(request, timeout=30).read()
                return json.loads(answer) if answer else None
            except urllib.error.HTTPError as error:
                if error.code != 503:  # its database is busy; Prefect's own client asks again as well
                    raise
            time.sleep(0.2)
        raise AssertionError(f"the server stays busy: {path}\n{self.said()}")

    def state(self, run_id: str) -> str:
        return str(self.ask(f"/flow_runs/{run_id}", method="GET")["state"]["name"])

    def reaches(self, run_id: str, state: str, seconds: float = 300.0) -> None:
        wait_for(lambda: self.state(run_id) == state, f"the run is {state}", seconds, self.said)

    def tasks(self, run_id: str) -> dict[str, dict[str, Any]]:
        found = self.ask("/task_runs/filter", flow_runs={"id": {"any_": [run_id]}})
        return {task["name"].rpartition("-")[0]: task["state"] for task in found}

    def process_of(self, program: str) -> int:
        """The process id of Prefect's server or worker."""
        lines = processes_with(self.mark)
        (pid,) = [pid for pid, line in lines.items() if f"prefect {program} start" in line and "supervisor" not in line]
        return pid

    def stage_processes(self) -> list[str]:
        """The command lines of stages, which do not inherit Prefect's settings."""
        return [line for line in processes_with(f"XDG_CACHE_HOME={self.folder}").values() if "stages." in line]

    def ppo_held_still(self) -> AbstractContextManager[None]:
        """PPO makes no step during the block."""
        return held_still(f"XDG_CACHE_HOME={self.folder}", "stages.ppo")

    def iterations(self) -> int:
        path = self.run.metrics("ppo")
        return len(path.read_text().splitlines()) if path.exists() else 0

    def is_in_ppo(self, more_than: int) -> None:
        """Wait until PPO is at work, so many iterations done."""
        wait_for(
            lambda: any("stages.ppo" in line for line in self.stage_processes()) and self.iterations() > more_than,
            f"PPO is past iteration {more_than}",
            240,
            self.said,
        )
