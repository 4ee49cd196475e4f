"""`trivet export --push-to-hub`: huggingface_hub's own client against a server of HTTP on this machine."""

from __future__ import annotations

import base64
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from usable_run import usable_run

from pipeline.artifacts import folder_files
from stages.export import EXPORT

ROOT = Path(__file__).parents[2]
TOKEN = "hf_made_up_for_this_test"


class Hub(ThreadingHTTPServer):
    """As much of the hub as an upload of small files asks for. `refuses` is the status of every commit."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.cards: list[str] = []
        self.refuses: int | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _say(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._say({"error": "not found"}, 404)

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.end_headers()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        hub, path = self.server, self.path.partition("?")[0]
        hub.tokens.add(self.headers["Authorization"])
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            hub.repositories[name] = wanted
            self._say({"url": f"{hub.address}/{name}", "id": name, "name": name})
        elif path == "/api/validate-yaml":
            hub.cards.append(json.loads(body)["content"])
            self._say({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            self._say({"files": files})
        elif path.endswith("/commit/main"):
            if hub.refuses is not None:
                self._say({"error": "You may not write here."}, hub.refuses)
                return
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    assert entry["value"]["encoding"] == "base64"
                    hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            name = path.removeprefix("/api/models/").removesuffix("/commit/main")
            oid = "0" * 40
            self._say({"commitUrl": f"{hub.address}/{name}/commit/{oid}", "commitOid": oid, "success": True})
        else:
            self._say({"error": f"no such thing: {path}"}, 404)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return usable_run(tmp_path_factory.mktemp("hub"), ("sft",)).config.run_dir


def trivet(address: str, *arguments: str | Path, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the client reads where the hub is when it is imported."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": "/nonexistent/hf",
        "HF_TOKEN": token,
        "NO_PROXY": "127.0.0.1",
        "COLUMNS": "200",
    }
    command = [sys.executable, "-m", "flows.cli", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def test_the_whole_export_is_uploaded(hub: Hub, run_folder: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    done = trivet(hub.address, "export", run_folder, "sft", folder, "--push-to-hub", "someone/tiny")
    assert done.returncode == 0, done.stderr
    assert f"On the hub: {hub.address}/someone/tiny/commit/" in done.stdout
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "README.md", EXPORT, "tokenizer.json"} <= hub.files.keys()
    assert hub.repositories["someone/tiny"]["visibility"] == "private", "nobody sees it unless that is asked for"
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert set(hub.cards) == {(folder / "README.md").read_text()}, "the hub has read the card before it took the files"
    done = trivet(hub.address, "export", run_folder, "sft", tmp_path / "2", "--push-to-hub", "someone/open", "--public")
    assert done.returncode == 0, done.stderr
    assert hub.repositories["someone/open"]["visibility"] == "public"


def test_the_upload_of_the_docs(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/using.md, as it stands there."""
    usable_run(tmp_path, run_dir=str(tmp_path / "runs" / "mine"))
    monkeypatch.chdir(tmp_path)
    docs = (ROOT / "docs" / "using.md").read_text().splitlines()
    lines = [line for line in docs if line.startswith("trivet ") and "--push-to-hub" in line]
    assert lines
    for line in lines:
        done = trivet(hub.address, *shlex.split(line, comments=True)[1:])
        assert done.returncode == 0, (line, done.stderr)
    assert hub.repositories["me/my-policy"]["visibility"] == "private"


def test_a_hub_that_refuses_leaves_the_export(hub: Hub, run_folder: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    hub.refuses = 403
    arguments = ("export", run_folder, "sft", folder, "--push-to-hub", "someone/tiny")
    done = trivet(hub.address, *arguments)
    assert done.returncode == 2 and "the hub did not take it" in done.stderr and "403" in done.stderr
    assert f"The export is whole in {folder}" in done.stderr and "Traceback" not in done.stderr
    before = folder_files(folder)
    hub.refuses = None
    done = trivet(hub.address, *arguments)
    assert done.returncode == 0 and "Exported before, and unchanged" in done.stdout
    assert folder_files(folder) == before and hub.files


def test_no_token_and_no_hub(hub: Hub, run_folder: str, tmp_path: Path) -> None:
    arguments = ("export", run_folder, "sft", tmp_path / "out", "--push-to-hub", "someone/tiny")
    done = trivet(hub.address, *arguments, token="")
    assert done.returncode == 2 and "there is no token for the hub" in done.stderr
    assert not (tmp_path / "out").exists(), "it is told before anything is made"
    closed = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    address = f"http://127.0.0.1:{closed.server_address[1]}"
    closed.server_close()
    done = trivet(address, *arguments)
    assert done.returncode == 2 and "the hub did not take it" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "out" / EXPORT).exists()
