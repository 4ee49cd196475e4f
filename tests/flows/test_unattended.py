"""`trivet up` and what runs on it by itself: real server, worker, processes, signals; on the tiny model.

The tests of this file share one server and one run directory, and follow each other.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from box import PASSWORD, Box
from real_runs import no_process_with, processes_with, wait_for

from pipeline.artifacts import read_manifest
from pipeline.registry import Registry
from pipeline.run_directory import STAGES, RunDirectory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

LONG = ["ppo.iterations=16", "ppo.checkpoint_every=1"]
"""PPO long enough to be stopped twice."""


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    box = Box(tmp_path_factory.mktemp("box"))
    try:
        box.up()
        yield box
    finally:
        if box.process is not None and box.process.poll() is None:
            box.process.kill()  # the kernel closes the lifelines of all that it has started
            box.process.wait()
        assert no_process_with(f"XDG_CACHE_HOME={box.folder}")


def test_a_mistake_is_refused_at_submission(box: Box) -> None:
    refused = box.prefect("deployment", "run", "sft/quickstart", "-p", 'overrides=["sft.epoch=1"]', check=False)
    assert refused.returncode == 1
    assert "'sft.epoch=1' does not match" in refused.stdout
    refused = box.prefect("deployment", "run", "sft/quickstart", "-p", "config=run.txt", check=False)
    assert refused.returncode == 1
    refused = box.prefect("deployment", "run", "rlhf/quickstart", "-p", "config=later.yaml", check=False)
    assert refused.returncode == 1
    assert "'later.yaml' is not one of ['tiny.yaml', " in " ".join(refused.stdout.split())
    absent = box.folder / "configs" / "absent.yaml"
    refused = box.prefect("deployment", "run", "rlhf/quickstart", "-p", f"config={absent}", check=False)
    assert refused.returncode == 1
    assert box.ask("/flow_runs/filter") == []

    (box.folder / "later.yaml").write_text("")  # from now on it is there
    deployment = "/deployments/name/rlhf/quickstart"

    def configs() -> list[str]:
        schema = box.ask(deployment, method="GET")["parameter_openapi_schema"]
        found: list[str] = schema["properties"]["config"]["enum"]
        return found

    wait_for(lambda: configs()[:2] == ["later.yaml", "tiny.yaml"], "the server knows of the new config", 30, box.said)


def test_a_deployment_runs_all_stages_then_none(box: Box) -> None:
    first, said = box.watch("rlhf/quickstart")
    assert "Completed" in said
    summary = json.loads(box.run.summary.read_text())
    assert [name for name, stage in summary["stages"].items() if not stage["cached"]] == list(STAGES)
    assert {name: state["name"] for name, state in box.tasks(first).items()} == dict.fromkeys(STAGES, "Completed")

    # The page: figures, samples, lineage, curves, progress; and a log that is kept short.
    artifacts = {artifact["key"]: artifact for artifact in box.ask("/artifacts/filter", limit=200)}
    digest = read_manifest(box.run.stage("sft")).digest[:12]
    assert "- sft ran: not run yet" in artifacts["summary"]["data"]
    assert (
        f"| reward | `{read_manifest(box.run.stage('reward')).digest[:12]}` | sft `{digest}` |"
        in artifacts["lineage"]["data"]
    )
    assert artifacts["samples"]["data"].count("| PPO |") == 2
    for stage in ("sft", "reward", "ppo"):
        assert artifacts[f"curves-{stage}"]["data"].startswith(f"![Curves of {stage}](data:image/svg+xml;base64,")
    assert artifacts["progress-ppo"]["data"] == 100.0

    started = time.monotonic()
    again, ended = box.run_to_its_end("rlhf/quickstart")
    assert ended == "Completed"
    print(f"a run with nothing to do: {time.monotonic() - started:.1f} s from submission to its end")
    states = box.tasks(again)
    assert {name: state["name"] for name, state in states.items()} == dict.fromkeys(STAGES, "Cached")
    assert states["ppo"]["message"].startswith("unchanged: base, data, settings, parents and code")


def test_a_schedule_fires(box: Box) -> None:
    box.prefect("deployment", "schedule", "create", "rlhf/nightly", "--interval", "30", "--active")
    completed = {"state": {"type": {"any_": ["COMPLETED"]}}}

    def fired() -> bool:
        return any(run["auto_scheduled"] for run in box.ask("/flow_runs/filter", flow_runs=completed))

    wait_for(fired, "a scheduled run is completed", 180, box.said)
    box.prefect("deployment", "schedule", "clear", "rlhf/nightly", "--accept-yes")
    for run in box.ask("/flow_runs/filter", flow_runs={"state": {"type": {"any_": ["SCHEDULED"]}}}):
        box.ask(f"/flow_runs/{run['id']}", method="DELETE")


def test_the_password_is_needed_and_not_told(box: Box) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{box.url}/deployments/name/rlhf/quickstart", timeout=30)
    files = [*box.folder.glob("*.log"), *(box.folder / "prefect").glob("*.log"), *box.run.root.rglob("*")]
    texts = [path.read_bytes() for path in files if path.is_file()]
    texts += [json.dumps(box.ask(f"/{kind}/filter", limit=200)).encode() for kind in ("artifacts", "logs", "flow_runs")]
    assert len(texts) > 20
    assert not [text for text in texts if PASSWORD.encode() in text or PASSWORD.partition(":")[2].encode() in text]


def test_a_missed_gate_stops_the_run_with_the_figure(box: Box) -> None:
    run, ended = box.run_to_its_end("rlhf/quickstart", "gates.max_sft_loss=0.001")
    assert ended == "Failed"
    states = box.tasks(run)
    assert list(states) == ["sft"]
    assert "wanted at most 0.001" in states["sft"]["message"]


def test_a_person_approves_on_the_page(box: Box) -> None:
    registry = Registry(box.folder / "registry")
    run = box.submit("rlhf/quickstart", "registry.promote=approved")
    box.reaches(run, "Paused")
    assert registry.current is None
    assert box.ask(f"/flow_runs/{run}/resume", run_input={"approve": "perhaps"})["status"] == "REJECT"
    box.ask(f"/flow_runs/{run}/resume", run_input={"approve": True, "note": "looks good"})
    box.reaches(run, "Completed")
    assert registry.current is not None
    assert registry.current.note == "looks good"
    assert registry.current.digest == read_manifest(box.run.stage("ppo")).digest

    refused = box.submit("rlhf/quickstart", "registry.promote=approved")
    box.reaches(refused, "Paused")
    box.ask(f"/flow_runs/{refused}/resume", run_input={"approve": False, "note": "too verbose"})
    box.reaches(refused, "Failed")
    message = box.ask(f"/flow_runs/{refused}", method="GET")["state"]["message"]
    assert "the policy was not approved: too verbose" in message
    assert len(registry.history) == 1


def test_a_cancelled_run_leaves_nothing_and_resumes_also_after_its_worker_was_killed(box: Box) -> None:
    before = (box.run.stage("ppo") / "trivet.json").read_bytes()
    box.run.metrics("ppo").unlink()
    cancelled = box.submit("rlhf/quickstart", *LONG)
    box.is_in_ppo(more_than=1)
    with box.ppo_held_still():
        box.prefect("flow-run", "cancel", cancelled)
    wait_for(lambda: not box.stage_processes(), "its processes have ended", 30)
    box.reaches(cancelled, "Cancelled", 30)
    assert (box.run.stage("ppo") / "trivet.json").read_bytes() == before  # no half result
    stopped_at = box.iterations()
    assert stopped_at < 16

    resumed = box.submit("rlhf/quickstart", *LONG)
    box.is_in_ppo(more_than=stopped_at + 1)
    assert box.run.log("ppo").read_text().count("Resuming after") == 1
    with box.ppo_held_still():
        os.kill(box.process_of("worker"), signal.SIGKILL)
    wait_for(lambda: "goes back into the queue" in box.said(), "the lost run is noticed", 60, box.said)
    box.reaches(resumed, "Completed")
    assert box.run.log("ppo").read_text().count("Resuming after") == 2
    steps = [json.loads(line)["step"] for line in box.run.metrics("ppo").read_text().splitlines()]
    assert steps == list(range(1, 17))
    assert read_manifest(box.run.stage("ppo")).extra["iterations"] == 16


def test_a_stage_whose_process_is_killed_is_tried_again_and_resumes(box: Box) -> None:
    run = RunDirectory(box.folder / "killed")
    submitted = box.submit("sft/quickstart", f"run_dir={run.root}", "sft.max_steps=60", "sft.checkpoint_every=5")
    checkpoints = run.working("sft")
    wait_for(lambda: list(checkpoints.rglob("state.json")), "a checkpoint", 200, box.said)
    commands = processes_with(f"XDG_CACHE_HOME={box.folder}")
    trainers = [pid for pid, command in commands.items() if " -m stages.sft " in command]
    assert trainers, commands
    for pid in trainers:
        os.kill(pid, signal.SIGKILL)  # as the system does for lack of memory
    box.reaches(submitted, "Completed")
    log = run.log("sft").read_text()
    assert log.count("a process of the sft stage ended") == 1 and log.count("Resuming after") == 1
    (task,) = box.ask("/task_runs/filter", flow_runs={"id": {"any_": [submitted]}})
    assert task["run_count"] == 2
    assert [json.loads(line)["step"] for line in run.metrics("sft").read_text().splitlines()] == list(range(1, 61))


def test_a_cancelled_run_stops_both_stages_that_run_side_by_side(box: Box) -> None:
    endless = [f"{stage}.max_steps=100000" for stage in ("sft", "reward")]
    apart = ["launch.side_by_side=true", "reward.start_from=base", "reward.calibrate_on=base"]
    run = RunDirectory(box.folder / "other")
    cancelled = box.submit("rlhf/quickstart", f"run_dir={run.root}", *apart, *endless)
    metrics = [run.metrics("sft"), run.metrics("reward")]
    wait_for(lambda: all(path.exists() and path.read_text() for path in metrics), "both learn", 200, box.said)
    assert {name: state["name"] for name, state in box.tasks(cancelled).items()} == {
        "sft": "Running",
        "reward": "Running",
    }
    box.prefect("flow-run", "cancel", cancelled)
    wait_for(lambda: not box.stage_processes(), "their processes have ended", 30, box.said)
    box.reaches(cancelled, "Cancelled", 30)
    for stage in ("sft", "reward"):
        assert f"{stage}: stopped as asked" in run.log(stage).read_text()
        assert list((run.root / "working" / stage).rglob("*")), "a checkpoint"


def test_it_survives_its_server_ends_in_order_and_its_runs_go_on_when_it_is_up_again(box: Box) -> None:
    box.run.metrics("ppo").unlink()
    run = box.submit("rlhf/quickstart", "ppo.iterations=17", "ppo.checkpoint_every=1")
    box.is_in_ppo(more_than=1)
    with box.ppo_held_still():
        os.kill(box.process_of("server"), signal.SIGKILL)
        wait_for(lambda: "The server has ended" in box.said(), "the server's end is noticed", 60, box.said)
    box.is_in_ppo(more_than=box.iterations() + 1)
    with box.ppo_held_still():
        wait_for(box.answers, "there is a server again", 120, box.said)
        assert box.state(run) == "Running"
    assert box.down() == 0
    assert no_process_with(f"XDG_CACHE_HOME={box.folder}", 5)
    box.up()
    box.reaches(run, "Completed")
    assert read_manifest(box.run.stage("ppo")).extra["iterations"] == 17
    assert box.down() == 0


def test_a_port_in_use_is_named(box: Box) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        command = [sys.executable, "-m", "flows.cli", "up", "--port", str(port)]
        done = subprocess.run(command, env=box.environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"127.0.0.1:{port}: the port cannot be used" in done.stderr
    assert "trivet up --port N" in done.stderr
