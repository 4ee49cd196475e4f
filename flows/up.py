"""`trivet up`: Prefect's server and one worker for a single machine, kept running, ended together.

Both hang on the same lifeline as a stage's processes: whatever ends this program ends them and what the worker has
started. Either one that dies alone is started again. Runs that lose their process with the worker go back into the
queue, where they resume; so do those of the last time, after a reboot for instance.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from flows.deployments import POOL, begins_in, configs_to_name, naming_configs, require_sound
from flows.server import ServerError, answers, prefect_home, server_environment
from pipeline.errors import ConfigError
from stages.launch import SOURCE_ROOT, supervised

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.filters import WorkPoolFilter
    from prefect.client.schemas.objects import FlowRun

_AT_WORK = ("RUNNING", "PENDING", "PAUSED")
_MOST_STARTS = 5
"""A run that lost its process so often is left alone: it may be what brings the machine down."""
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_BETWEEN_LISTS = 3.0
_SECONDS_TO_DIE = 60.0
_SECONDS_TO_START = 90.0
_SECONDS_BETWEEN_STARTS = 5.0


def up(*, port: int, limit: int, configs: Sequence[Path] = (), say: Callable[[str], None]) -> None:
    """Run server and worker until this process is asked to end.

    Args:
        port: where the server listens, on the loopback device.
        limit: how many runs the worker has at once.
        configs: folders whose configs a run may name besides those of the project.
        say: told what is up, and what had to be started again.

    Raises:
        ServerError: the port is taken, another server is set in the environment, or something does not start.
        ConfigError: a deployment of prefect.yaml cannot work, or a folder of configs is none.
    """
    url = f"http://127.0.0.1:{port}/api"
    project = find_project(Path.cwd())
    require_sound(project)
    elsewhere = [_folder_of_configs(folder) for folder in configs]
    _require_own_server(url, port)
    # Prefect, imported later in this process and in all others, takes its settings from here.
    os.environ.update(server_environment(url, with_page=True))
    os.environ.setdefault("PREFECT_HOME", str(prefect_home()))
    if secret := os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):
        os.environ["PREFECT_API_AUTH_STRING"] = secret
    home = Path(os.environ["PREFECT_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    prefect = [sys.executable, "-m", "prefect"]
    server = _Kept("server", [*prefect, "server", "start"], home)
    worker = _Kept("worker", [*prefect, "worker", "start", "--pool", POOL, "--limit", str(limit)], home)
    try:
        try:
            say("Starting Prefect's server ...")
            server.start()
            server.wait_until(lambda: answers(url))
            queue = _Queue(project, elsewhere, say)
            queue.make_pool()
            deploy(project)
            queue.name_configs()
            queue.put_back()
            worker.start()
            worker.wait_until(queue.has_worker)
            say(f"The page: {url.removesuffix('/api')}  (logs: {server.log}, {worker.log})")
            say(f"In other terminals: export PREFECT_API_URL={url}; prefect deployment run rlhf/quickstart")
            say("Ctrl-C ends server and worker; runs go on from there when they are up again.")
            _keep(server, worker, url, queue, say)
        except (KeyboardInterrupt, SystemExit):
            say("Stopping; a running stage writes a checkpoint first ...")
            was_up = worker.is_running
            worker.stop()
            if was_up and not _tried(queue.put_back):
                say("The server could not be told which runs were at work; they are put back at the next start.")
    finally:
        worker.stop()
        server.stop()


def find_project(folder: Path) -> Path:
    """The folder whose prefect.yaml is deployed: this one, or the one that trivet's source is in.

    Raises:
        ServerError: neither has one.
    """
    for candidate in (folder, SOURCE_ROOT):
        if (candidate / "prefect.yaml").is_file():
            return candidate.resolve()
    raise ServerError(
        "there is no prefect.yaml here", where=str(folder), remedy="Start from a checkout of trivet, which has one."
    )


def _folder_of_configs(folder: Path) -> Path:
    resolved = folder.expanduser().resolve()
    if not resolved.is_dir():
        raise ConfigError(
            "there is no such folder of configs",
            where=str(folder),
            remedy="Name folders that this machine sees: trivet up --configs FOLDER.",
        )
    return resolved


def deploy(project: Path) -> None:
    """Put all deployments of a project on the server.

    Raises:
        ServerError: Prefect refuses; says why.
    """
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    with supervised(command, os.environ, output=subprocess.PIPE, error=subprocess.STDOUT, folder=project) as process:
        output, _ = process.communicate()
    if process.returncode != 0:
        said = output.decode(errors="replace").strip()[-2000:]
        raise ServerError(f"the deployments were refused\n{said}", where=str(project / "prefect.yaml"))


def _require_own_server(url: str, port: int) -> None:
    other = os.environ.get("PREFECT_API_URL", url).rstrip("/")
    if other not in (url, url.replace("127.0.0.1", "localhost")):
        raise ServerError(
            "another server is set; trivet up brings its own",
            where=f"PREFECT_API_URL={other}",
            remedy=f"Unset it, or start only a worker for that server: prefect worker start --pool {POOL}.",
        )
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ServerError(
                f"the port cannot be used: {error.strerror}",
                where=f"127.0.0.1:{port}",
                remedy="Stop what listens there, perhaps another trivet up, or choose one: trivet up --port N.",
            ) from None


def _keep(server: _Kept, worker: _Kept, url: str, queue: _Queue, say: Callable[[str], None]) -> None:
    """Look after both for ever."""
    while True:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        if not server.is_running:
            say(f"The server has ended; starting it again. {server.last_words()}")
            server.start()
            server.wait_until(lambda: answers(url))
        if not worker.is_running:
            worker.stop()
            if not _tried(queue.put_back):
                continue  # The server is at fault, and comes first.
            say(f"The worker has ended; starting it again. {worker.last_words()}")
            worker.start()
        _tried(queue.look)
        _tried(queue.name_configs)


def _tried(question: Callable[[], None]) -> bool:
    """Whether the server answered. Where it does not, the next look finds out why."""
    try:
        question()
    except Exception:
        return False
    return True


class _Kept:
    """A program of Prefect's with a log of its own, which ends with us."""

    def __init__(self, name: str, command: list[str], home: Path) -> None:
        self.name, self.log = name, home / f"{name}.log"
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._stack = ExitStack()
        self._started = float("-inf")

    def start(self) -> None:
        """Start it, or start it again, though not in quick succession."""
        self.stop()
        time.sleep(max(0.0, self._started + _SECONDS_BETWEEN_STARTS - time.monotonic()))
        self._started = time.monotonic()
        log = self._stack.enter_context(self.log.open("wb"))
        self._process = self._stack.enter_context(
            supervised(self._command, os.environ, output=log, error=subprocess.STDOUT)
        )

    def stop(self) -> None:
        """End it with all that it has started. Nothing happens where it does not run."""
        self._stack.close()

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for it to be there.

        Raises:
            ServerError: it has ended instead, or takes too long; with the last lines of its log.
        """
        end = time.monotonic() + _SECONDS_TO_START
        while not condition():
            if not self.is_running or time.monotonic() > end:
                raise ServerError(f"Prefect's {self.name} did not start\n{self.last_words()}", where=str(self.log))
            time.sleep(0.1)

    def last_words(self) -> str:
        """The last lines of its log."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-10:])


class _Queue:
    """The pool's runs, of which none may be forgotten as running while no process runs it."""

    def __init__(self, project: Path, elsewhere: Sequence[Path], say: Callable[[str], None]) -> None:
        self._project, self._elsewhere, self._say = project, elsewhere, say
        self._seen: dict[UUID, float] = {}
        self._since = datetime.now(UTC)
        self._configs: tuple[str, ...] | None = ()
        self._listed_at = float("-inf")

    def make_pool(self) -> None:
        """Create the work pool if there is none yet; an existing one keeps its settings."""
        from prefect.client.schemas.actions import WorkPoolCreate
        from prefect.exceptions import ObjectAlreadyExists

        with _client() as client:
            try:
                client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
            except ObjectAlreadyExists:
                return

    def has_worker(self) -> bool:
        """Whether a worker has reported for the pool since this program was started."""
        with _client() as client:
            heartbeats = [worker.last_heartbeat_time for worker in client.read_workers_for_work_pool(POOL)]
        return any(heartbeat is not None and heartbeat > self._since for heartbeat in heartbeats)

    def look(self) -> None:
        """Remember which runs are at work now."""
        with _client() as client:
            self._seen |= {run.id: time.monotonic() for run in _runs(client, _AT_WORK)}

    def name_configs(self) -> None:
        """Tell the server, now and then, which configs a run may name, if that has changed."""
        if time.monotonic() - self._listed_at < _SECONDS_BETWEEN_LISTS:
            return
        self._listed_at = time.monotonic()
        configs = configs_to_name(self._project, self._elsewhere)
        if configs == self._configs:
            return
        from prefect.client.schemas.actions import DeploymentUpdate

        with _client() as client:
            for deployment in client.read_deployments(work_pool_filter=_our_pool()):
                if begins_in(deployment.pull_steps, self._project):
                    schema = naming_configs(deployment.parameter_openapi_schema or {}, configs)
                    client.update_deployment(deployment.id, DeploymentUpdate(parameter_openapi_schema=schema))
        self._configs = configs

    def put_back(self) -> None:
        """While no worker runs: put the runs back into the queue that were at work, and finish cancelled ones."""
        from prefect.states import Cancelled, Crashed, Scheduled

        with _client() as client:
            lost = {run.id: run for run in _runs(client, _AT_WORK)}
            # The processes of a worker that was killed may have said so themselves, shortly before it is noticed.
            recently = {run for run, seen in self._seen.items() if time.monotonic() - seen < _SECONDS_TO_DIE}
            lost |= {run.id: run for run in _runs(client, ("CRASHED",)) if run.id in recently}
            for run in lost.values():
                if run.run_count >= _MOST_STARTS:
                    self._say(f"Run {run.name} lost its process {run.run_count} times and is left alone.")
                    message = f"Its process ended with the worker, for the {run.run_count}th time."
                    client.set_flow_run_state(run.id, Crashed(message=message), force=True)
                    continue
                message = "Its process ended with the worker; it resumes."
                client.set_flow_run_state(run.id, Scheduled(name="Resuming", message=message), force=True)
                self._say(f"Run {run.name} goes back into the queue and resumes.")
            for run in _runs(client, ("CANCELLING",)):
                client.set_flow_run_state(run.id, Cancelled(), force=True)
        self._seen = {}


def _client() -> SyncPrefectClient:
    from prefect.client.orchestration import get_client

    return get_client(sync_client=True)


def _runs(client: SyncPrefectClient, states: Iterable[str]) -> list[FlowRun]:
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
    from prefect.client.schemas.objects import StateType

    types = [StateType(state) for state in states]
    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=types))),
        work_pool_filter=_our_pool(),
    )


def _our_pool() -> WorkPoolFilter:
    from prefect.client.schemas.filters import WorkPoolFilter, WorkPoolFilterName

    return WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL]))
