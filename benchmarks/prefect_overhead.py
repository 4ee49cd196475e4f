"""What Prefect adds to a run against a running server, and a run in which nothing changed; prints JSON.

Starts `trivet up` in a folder of its own and submits a run whose stages are all finished (their results are made up,
so that no model is needed): from submission to Completed, a stage's task inside it, and the same stage without
Prefect.

    python benchmarks/prefect_overhead.py [--runs 3] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from flows.server import answers
from pipeline.config_file import load_config
from stages.launch import ensure_stage, supervised

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from finished_stages import light_config, publish_all  # noqa: E402

STAGES = ("sft", "reward", "ppo", "evaluate")


def main() -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trivet-bench-") as folder:
        result = measure(Path(folder), arguments.runs)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n", encoding="utf-8")


def measure(folder: Path, runs: int) -> dict[str, Any]:
    """Seconds, the median of the runs where there are several."""
    config = light_config(folder)
    publish_all(config)
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    for deployment in deployments["deployments"]:
        deployment["entrypoint"] = f"{ROOT}/{deployment['entrypoint']}"
        deployment["parameters"] = {"config": str(config)}
    (folder / "prefect.yaml").write_text(yaml.safe_dump(deployments), encoding="utf-8")

    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment = kept | {"PREFECT_HOME": str(folder / "prefect"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "flows.cli", "up", "--port", str(port)]
    with (folder / "up.log").open("wb") as log:
        started = time.monotonic()
        with supervised(command, environment, output=log, error=subprocess.STDOUT, folder=folder) as box:
            while "The page" not in (folder / "up.log").read_text(encoding="utf-8"):
                if box.poll() is not None:
                    raise SystemExit((folder / "up.log").read_text(encoding="utf-8"))
                time.sleep(0.1)
            up = time.monotonic() - started
            assert answers(url)
            measured = [submit(url) for _ in range(runs)]
            started = time.monotonic()
            box.send_signal(signal.SIGTERM)
            box.wait(60)
            down = time.monotonic() - started
    loaded = load_config(config)
    started = time.monotonic()
    for stage in STAGES:
        ensure_stage(stage, loaded, force=False, on_line=lambda line: None, on_progress=lambda update: None)
    plain = (time.monotonic() - started) / len(STAGES)
    task = statistics.median(seconds for one in measured for seconds in one["tasks"])
    return {
        "trivet_up_seconds": round(up, 2),
        "trivet_down_seconds": round(down, 2),
        "nothing_changed_seconds": round(statistics.median(one["whole"] for one in measured), 2),
        "of_which_until_the_flow_runs": round(statistics.median(one["start"] for one in measured), 2),
        "stage_as_a_task_seconds": round(task, 3),
        "stage_without_prefect_seconds": round(plain, 3),
        "prefect_adds_to_a_stage_seconds": round(task - plain, 3),
        "runs": runs,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
    }


def submit(url: str) -> dict[str, Any]:
    """Submit a run through the API and wait for it. Seconds: whole, until it runs, of each task."""
    deployment = ask(f"{url}/deployments/name/rlhf/quickstart")
    started = time.monotonic()
    run = ask(f"{url}/deployments/{deployment['id']}/create_flow_run", {"state": {"type": "SCHEDULED"}})
    while (state := ask(f"{url}/flow_runs/{run['id']}")["state"])["type"] in ("SCHEDULED", "PENDING", "RUNNING"):
        time.sleep(0.1)
    whole = time.monotonic() - started
    if state["type"] != "COMPLETED":
        raise SystemExit(f"the run ended as {state['name']}: {state['message']}")
    finished = ask(f"{url}/flow_runs/{run['id']}")
    tasks = ask(f"{url}/task_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
    created, began = (datetime.fromisoformat(finished[key]) for key in ("created", "start_time"))
    return {
        "whole": whole,
        "start": (began - created).total_seconds(),
        "tasks": [
            (datetime.fromisoformat(one["end_time"]) - datetime.fromisoformat(one["start_time"])).total_seconds()
            for one in tasks
        ],
    }


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """The API's answer; a server whose database is busy is asked again, as Prefect's own client does."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise
        time.sleep(0.2)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
