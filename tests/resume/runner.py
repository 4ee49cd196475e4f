"""Runs stages in processes of their own that end where they are told to: once imported, forked for every run.

Reads orders from standard input, a JSON object a line, and answers each with a line:

    {"stage": "ppo", "config": "PATH", "overrides": [], "log": "PATH", "stop": null, "after": null,
     "most_tokens": null}  ->  {"status": 0}

`stop` is {"at": "stages.update:Updater._step", "call": 3, "when": "before", "signal": 9, "about": ""}: the process
gets the signal before (or after) the third call of that function whose arguments' text holds `about`. `after` is
[seconds, signal]: it gets the signal after that time. Above `most_tokens` in a forward pass of PPO, memory runs out. A
negative status is the signal that ended the process.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from typing import Any, NoReturn

import torch

from pipeline.roles import Roles
from stages import evaluate, ppo, reward, sft
from stages.command import stage_main

STAGES = {"sft": sft, "reward": reward, "ppo": ppo, "evaluate": evaluate}


def main() -> None:
    # A forked process may use no thread pool of its parent's.
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            run(order)
        status = ended(child, order["after"])
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)


def ended(child: int, after: list[float] | None) -> int:
    """Wait for the child's end, and send it the signal when its time has come; returns its status."""
    if after is not None:
        seconds, number = after
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return status
            time.sleep(0.002)
        os.kill(child, int(number))
    return os.waitpid(child, 0)[1]


def run(order: dict[str, Any]) -> NoReturn:
    """In the child: the stage, from its command line on."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.setsid()
    if order["stop"] is not None:
        stop_at(**order["stop"])
    if order["most_tokens"] is not None:
        limit_memory(order["most_tokens"])
    code = 1
    try:
        stage_main(order["stage"], STAGES[order["stage"]].run, [order["config"], *order["overrides"]])
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def stop_at(at: str, call: int, when: str, signal: int, about: str) -> None:
    """Have this process sent a signal before or after the nth call of a function."""
    module, _, path = at.partition(":")
    *outer, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in outer:
        owner = getattr(owner, part)
    own, calls = getattr(owner, name), 0

    def counting(*args: Any, **named: Any) -> Any:
        nonlocal calls
        if about in f"{args} {named}":
            calls += 1
            if calls == call and when == "before":
                os.kill(os.getpid(), signal)
            result = own(*args, **named)
            if calls == call and when == "after":
                os.kill(os.getpid(), signal)
            return result
        return own(*args, **named)

    setattr(owner, name, counting)


def limit_memory(most_tokens: int) -> None:
    """Have a forward pass of more tokens run out of memory."""
    own = Roles.hidden_states

    def limited(roles: Roles, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        if ids_BL.numel() > most_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return own(roles, ids_BL, mask_BL)

    Roles.hidden_states = limited  # type: ignore[method-assign]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main()
