"""The Prefect server that a run reports to: the user's own, or one that lives as long as the run.

Prefect would start such a server by itself, but leave it running when the run is ended by a signal, and
take twice as long. This one hangs on the same lifeline as a stage's processes.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.errors import TrivetError
from stages.launch import supervised

_SECONDS_TO_START = 90.0
_SECONDS_TO_ANSWER = 3.0
_QUIET = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
_USERS_CHOICE = ("PREFECT_API_URL", "PREFECT_PROFILE")


class ServerError(TrivetError, ConnectionError):
    """No Prefect server answers: the temporary one did not start, or the user's own is not there."""


def find_or_start_server() -> str:
    """Set the environment so that Prefect, imported later, finds a server; returns a sentence about which.

    With PREFECT_API_URL or PREFECT_PROFILE set, the user's own server and settings are used as they are.
    Otherwise a server runs until this process has ended, with its history under the cache folder, apart from
    any Prefect installation of the user's.

    Raises:
        ServerError: nothing answers.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if any(os.environ.get(name) for name in _USERS_CHOICE):
        if url := os.environ.get("PREFECT_API_URL"):
            _require_answer(url)
        return "Reporting to the Prefect server of your settings."
    home = Path(os.environ.setdefault("PREFECT_HOME", str(prefect_home())))
    until_exit = ExitStack()
    # Prefect's threads send their last events and log lines when the interpreter ends, before this is called.
    atexit.register(until_exit.close)
    os.environ["PREFECT_API_URL"] = until_exit.enter_context(_temporary_server(home))
    return f"The run's history is kept in {home}."


def prefect_home() -> Path:
    """Where Prefect keeps its history, unless PREFECT_HOME says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trivet" / "prefect"


def server_environment(url: str, *, with_page: bool) -> dict[str, str]:
    """Settings for a server at this address, and for the programs that talk to it.

    Args:
        url: `http://127.0.0.1:PORT/api`.
        with_page: whether people look at the server and schedules run by it.
    """
    host, _, port = url.removeprefix("http://").removesuffix("/api").partition(":")
    on = str(with_page).lower()
    return _QUIET | {
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_API_HOST": host,
        "PREFECT_SERVER_API_PORT": port,
        "PREFECT_SERVER_UI_ENABLED": on,
        # The newer page lets the browser ask an analytics service.
        "PREFECT_SERVER_UI_V2_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": on,
        "PREFECT_SERVER_LOGS_STREAM_OUT_ENABLED": on,
        "PREFECT_SERVER_LOGS_STREAM_PUBLISHING_ENABLED": on,
        # In memory, as is the default, a slot that is held while the server starts again is held for ever.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
    }


@contextmanager
def _temporary_server(home: Path) -> Iterator[str]:
    home.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    environment = os.environ | server_environment(url, with_page=False)
    with (
        tempfile.TemporaryFile() as log,
        supervised(
            [sys.executable, "-m", "prefect", "server", "start"], environment, output=log, error=subprocess.STDOUT
        ) as process,
    ):
        end = time.monotonic() + _SECONDS_TO_START
        while not answers(url):
            if process.poll() is not None or time.monotonic() > end:
                log.seek(0)
                said = log.read().decode(errors="replace").strip().splitlines()
                raise ServerError(
                    "the temporary Prefect server did not start" + "".join(f"\n  {line}" for line in said[-10:]),
                    remedy="Check the installation with trivet doctor, or run the stages one by one, which needs no"
                    " Prefect: trivet sft CONFIG, trivet reward CONFIG, ...",
                )
            time.sleep(0.1)
        yield url


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answers(url: str) -> bool:
    """Whether a healthy server is there."""
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=1) as reply:
        healthy: bool = reply.read() == b"true"
        return healthy
    return False


def _require_answer(url: str) -> None:
    """Find out in seconds what Prefect's client would wait minutes for."""
    try:
        urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=_SECONDS_TO_ANSWER).close()
    except urllib.error.HTTPError:
        return  # It refuses, so it is there; Prefect's client brings the password.
    except (OSError, ValueError) as error:
        raise ServerError(
            f"no Prefect server answers ({getattr(error, 'reason', None) or error})",
            where=f"PREFECT_API_URL={url}",
            remedy="Start it with prefect server start, or unset PREFECT_API_URL to run without one.",
        ) from None
