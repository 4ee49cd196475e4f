"""A local server that speaks as an OpenAI-compatible endpoint does, for judges to be tested with."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Asked:
    """One request: its headers and its JSON."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    def between(self, mark: str) -> str:
        """What stands between two marks of the last message."""
        found = re.search(rf"<{mark}>\n(.*?)\n</{mark}>", self.body["messages"][-1]["content"], re.DOTALL)
        assert found is not None
        return found[1]


Reply = Callable[[Asked], "tuple[int, str, dict[str, str]] | str"]
"""What to reply: a judge's words, or a status, a body and headers."""


@dataclass
class JudgeServer:
    """Where it listens, and what it was asked."""

    address: str
    asked: list[Asked] = field(default_factory=list)


@contextmanager
def judge_server(reply: Reply) -> Iterator[JudgeServer]:
    """Serve on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """What a redirected question becomes."""
            self.answer({})

        def do_POST(self) -> None:
            self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def answer(self, body: dict[str, Any]) -> None:
            asked = Asked(self.path, dict(self.headers), body)
            found.asked.append(asked)
            said = reply(asked)
            if isinstance(said, str):
                said = 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}), {}
            status, text, headers = said
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found = JudgeServer(f"http://127.0.0.1:{server.server_address[1]}/v1")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()


def longer_wins(asked: Asked) -> str:
    """A judge who likes length."""
    lengths = [len(asked.between(f"answer_{letter}")) for letter in "AB"]
    return "tie" if lengths[0] == lengths[1] else "A" if lengths[0] > lengths[1] else "B"
