"""`trivet doctor`: is the installation whole, and what can this machine do?

Each check runs what it vouches for: the 4-bit arithmetic is computed, Prefect's server is imported.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from pipeline.base_source import PACKAGE_PREFIX, locate
from pipeline.config import LaunchSettings
from pipeline.config_file import load_config
from pipeline.errors import TrivetError
from pipeline.memory import megabytes, memory_limit
from stages.launch import SOURCE_ROOT, available_cores, child_environment

_HUB = "https://huggingface.co"
_HUB_SECONDS = 3.0
_CHILD_SECONDS = 180.0
_LITTLE_DISK = 5e9
_LITTLE_MEMORY = 3e9
_MARKS = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "broken": "[red]broken[/red]"}


@dataclass(frozen=True)
class Finding:
    """One line of the report. `broken` means that trivet does not work as it is; `note` is worth knowing."""

    subject: str
    verdict: Literal["ok", "note", "broken"]
    text: str
    remedy: str = ""


def examine(config: Path | None, console: Console) -> bool:
    """Run all checks and print the report.

    Args:
        config: also check that this config loads and that its base is there. None: no config.
        console: where to print.

    Returns:
        Whether nothing required is broken.
    """
    checks: list[Callable[[], Iterator[Finding]]] = [
        check_versions,
        check_machine,
        check_devices,
        check_prefect,
        check_disk,
        check_hub,
    ]
    if config is not None:
        checks.append(lambda: check_config(config))
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    findings = []
    with console.status("Checking ..."):
        for check in checks:
            for finding in check():
                findings.append(finding)
                table.add_row(finding.subject, _MARKS[finding.verdict], _plain(finding))
    console.print(table)
    broken = sum(finding.verdict == "broken" for finding in findings)
    console.print(f"{broken} thing(s) broken." if broken else "Everything that trivet needs works here.")
    return not broken


def _plain(finding: Finding) -> Any:
    from rich.text import Text

    return Text(finding.text + (f"\n-> {finding.remedy}" if finding.remedy else ""))


def check_versions() -> Iterator[Finding]:
    """Every requirement of the project against what is installed, and against the versions it is tested with."""
    yield Finding("python", "ok", platform.python_version())
    try:
        declared = [Requirement(text) for text in metadata.requires("trivet") or []]
    except metadata.PackageNotFoundError:
        yield Finding("trivet", "note", "runs from a folder, not installed", "Install it: pip install -e .")
        declared = []
    tested = known_good_versions()
    required = {one.name: one for one in declared if one.marker is None or one.marker.evaluate({"extra": ""})}
    for name in sorted(required.keys() | tested.keys()):
        yield judge_version(name, required.get(name), tested.get(name))


def known_good_versions() -> dict[str, Requirement]:
    """The lines of constraints.txt by name; none where trivet does not run from its source folder."""
    try:
        lines = (SOURCE_ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    entries = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {entry.name: entry for entry in entries}


def judge_version(name: str, required: Requirement | None, tested: Requirement | None) -> Finding:
    """What the installed version of a library is worth.

    Args:
        name: the distribution.
        required: the project's requirement, None where it is not known.
        tested: what the project is tested with, None where that is not fixed.
    """
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        if required is None:
            return Finding(name, "note", "not installed; not everything needs it", f"pip install --no-deps '{tested}'")
        return Finding(name, "broken", "not installed", f"pip install '{required}'")
    if required is not None and not required.specifier.contains(installed, prereleases=True):
        wanted = tested if tested is not None else required
        return Finding(name, "broken", f"{installed}, but {required.specifier} is needed", f"pip install '{wanted}'")
    if tested is not None and not tested.specifier.contains(installed, prereleases=True):
        return Finding(name, "note", f"{installed}; tested with {tested.specifier}")
    return Finding(name, "ok", installed)


def check_machine() -> Iterator[Finding]:
    """Cores and memory."""
    yield Finding("cores", "ok", str(available_cores()))
    memory = memory_limit()
    if memory is None:
        return
    if memory < _LITTLE_MEMORY:
        yield Finding("memory", "note", megabytes(memory), "The demo needs 4 GB.")
    else:
        yield Finding("memory", "ok", megabytes(memory))


def check_devices() -> Iterator[Finding]:
    """The devices, with 4-bit arithmetic really done on each."""
    code, output = _in_child("-m", "pipeline.device_check")
    try:
        report = json.loads(output.strip().splitlines()[-1])
    except (ValueError, IndexError):
        last = output.strip().splitlines()[-1:] or [f"ended with exit code {code}"]
        yield Finding("4-bit base", "broken", last[0], "Reinstall torch and bitsandbytes for this machine's hardware.")
        return
    cuda = report["cuda"]
    if cuda is not None and len(report["devices"]) == 1:
        yield Finding("cuda", "note", f"torch is built for CUDA {cuda}, but sees no GPU", "Check the driver.")
    for device in report["devices"]:
        memory = f", {megabytes(device['memory_bytes'])}" if device["memory_bytes"] else ""
        subject = f"nf4 on {device['kind']}"
        if device["problem"] is None:
            text = f"{device['name']}{memory}; a weight survives to within {device['nf4_error']:.1%}"
            yield Finding(subject, "ok", text)
        else:
            remedy = "Reinstall bitsandbytes for this hardware, or set base.quantization=none."
            yield Finding(subject, "broken", f"{device['name']}{memory}; {device['problem']}", remedy)


def check_prefect() -> Iterator[Finding]:
    """Whether Prefect's server can be imported with the libraries beside it."""
    code, output = _in_child("-c", "import prefect.server.api.server")
    if code == 0:
        yield Finding("prefect's server", "ok", "imports")
    else:
        last = output.strip().splitlines()[-1:] or [f"exit code {code}"]
        pins = "'fastapi>=0.139,<0.151' 'sqlalchemy[asyncio]>=2.0,<2.1'"
        yield Finding("prefect's server", "broken", last[0], f"pip install {pins}")


def check_disk() -> Iterator[Finding]:
    """Space for runs and for what is cached."""
    for subject, folder in (("disk, here", Path.cwd()), ("disk, caches", Path("~/.cache").expanduser())):
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        text = f"{megabytes(free)} free"
        if free < _LITTLE_DISK:
            yield Finding(subject, "note", text, "Checkpoints and models need room.")
        else:
            yield Finding(subject, "ok", text)


def check_hub() -> Iterator[Finding]:
    """Whether models and data can be fetched from the hub; local ones need no hub."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        yield Finding("hub", "note", "switched off by HF_HUB_OFFLINE; cached and local models work")
        return
    address = os.environ.get("HF_ENDPOINT", _HUB).rstrip("/")
    answers: list[str] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_HUB_SECONDS).close()
            answers.append("")
        except urllib.error.HTTPError:
            answers.append("")  # It is there.
        except (OSError, ValueError) as error:
            answers.append(str(getattr(error, "reason", error)))

    # In a thread, since looking up a name knows no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_HUB_SECONDS)
    if answers == [""]:
        yield Finding("hub", "ok", f"{address} answers")
        return
    reason = answers[0] if answers else f"no answer in {_HUB_SECONDS:g} s"
    yield Finding("hub", "note", f"{address}: {reason}", "Local models and data, such as the demo's, need no hub.")


def check_config(path: Path) -> Iterator[Finding]:
    """Whether a config loads, and whether its base is there if that can be told without a download."""
    try:
        base = load_config(path).config.base
        yield Finding("config", "ok", f"{path} loads")
        if base.model.startswith((PACKAGE_PREFIX, "/", ".", "~")) or Path(base.model).exists():
            yield Finding("base", "ok", str(locate(base).path))
        else:
            yield Finding("base", "note", f"{base.model} is a hub id; it is fetched when first needed")
    except TrivetError as error:
        where = f"{error.where}: " if error.where else ""
        yield Finding("config", "broken", f"{where}{error.problem}", error.remedy or "")


def _in_child(*arguments: str) -> tuple[int, str]:
    """Run Python as a stage would be run; returns the exit code and what it printed, errors last."""
    environment = child_environment(LaunchSettings()) | {"PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_CHILD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 1, f"no answer in {_CHILD_SECONDS:g} s"
    return done.returncode, done.stdout if done.returncode == 0 else done.stdout + done.stderr
