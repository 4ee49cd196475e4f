"""Starts a stage in processes of its own through `accelerate launch`, and ends them all if this one ends.

The parent imports no torch: it streams the stage's lines and progress, keeps them in the run's log, and
turns a failure into one error that says what went wrong.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Self

import yaml

from pipeline.artifacts import Manifest, read_manifest
from pipeline.cards import has_accelerator, visible_gpus
from pipeline.config import LaunchSettings
from pipeline.config_file import LoadedConfig
from pipeline.disk import writing
from pipeline.errors import ConfigError, LostProcessError, StageFailedError, StageInterruptedError
from pipeline.progress import FORMAT_VARIABLE, ProgressUpdate, parse_machine_line
from pipeline.run_directory import RunDirectory, StageName
from stages.device_lock import device_lock
from stages.inputs import find_current, parents_of
from stages.interruption import StoppedInOrder
from stages.launcher_file import launcher_settings, read_launcher_file, require_launchable, resolve
from stages.redaction import redaction
from stages.side_by_side import SideBySide

ERROR_FILE_VARIABLE = "TRIVET_ERROR_FILE"
"""Environment variable: where a stage that fails says why, as JSON."""

QUIET_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}
"""Keeps the libraries below a stage from sending and printing what nobody asked for; a user's values win."""

_CPU_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
"""Gives large tensors on a CPU pages of 2 MB: sampling takes a fifth less processor time."""

_CPU_FREED = {"MALLOC_MMAP_THRESHOLD_": str(4 << 20)}
"""Gives tensors on a CPU back to the system as soon as they are freed. Otherwise glibc keeps them in heaps that
recomputed layers leave full of holes: 3.4 GB instead of 1.8 GB for a step of SFT on the demo's model with 2048 tokens
at once (docs/memory.md). Only for the stages that train with TRL: sampling would take twice the processor time."""

_LAST_LINES = 30
_GRACE_SECONDS = 20.0
"""For a stage to finish what it is at and write a checkpoint."""
_SECONDS_BETWEEN_FOREIGN_BARS = 15.0
SOURCE_ROOT = Path(__file__).resolve().parent.parent
_SUPERVISOR = Path(__file__).resolve().with_name("supervisor.py")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|[\x00-\x08\x0b-\x1f\x7f]")
_LAUNCHER_REPORT = re.compile(r"torch/distributed/elastic/multiprocessing/api\.py:\d+\] failed \(exitcode")
_KILLED = re.compile(r"exitcode\s*: -9 \(pid: (\d+)\)")
_KILLED_BY_LAUNCHER = re.compile(r"Unable to shutdown process (\d+) via")
# What torchrun's own process ends with where it does not reach, or no longer reaches, that of another machine.
_APART = re.compile(r"torch\.distributed\.(Dist\w*Error: .*)")
_FOREIGN_BAR = re.compile(r"\d+%\|.*\|.*\d+/\d+|\d+it \[")
# bitsandbytes on a CPU, about an optional package.
_CHATTER = re.compile(r"^Failed to load CPU gemm_4bit_forward")


@dataclass(frozen=True)
class StageResult:
    """What a finished stage hands on: a few figures and digests, never a tensor or a model.

    `adapter_digest` is None for the evaluation, which makes no adapter. `cached` says that an earlier
    result was still current, `reason` why the stage ran or did not.
    """

    stage: StageName
    path: str
    adapter_digest: str | None
    seconds: float
    peak_memory_bytes: int
    metrics: Mapping[str, Any]
    cached: bool
    reason: str


def ensure_stage(
    stage: StageName,
    loaded: LoadedConfig,
    *,
    force: bool,
    on_line: Callable[[str], None],
    on_progress: Callable[[ProgressUpdate], None],
    beside: SideBySide | None = None,
) -> StageResult:
    """The stage's result: the finished one if it is current, else that of a new run.

    Args:
        stage: which one. The stages before it must have results.
        loaded: the run's config.
        force: run the stage in any case.
        on_line: receives what the stage prints.
        on_progress: receives how far it has come.
        beside: the stages that run at the same time in threads of this process. None: there are none.

    Raises:
        TrivetError: the stage failed, or what it needs is not there.
    """
    run = RunDirectory.open(loaded, [stage], parents_of(stage, loaded.config))
    current, reason = find_current(stage, loaded, run, force=force)
    if current is not None and not force:
        on_line(f"{stage}: nothing to do; {reason}.")
        return stage_result(stage, run, current, cached=True, reason=reason)
    if current is not None:
        reason = "run again on demand"
    launcher = require_launchable(loaded.config)
    launch, choice = resolve(loaded.config)
    if choice is not None:
        on_line(choice)
    device, work = device_of(loaded.config.launch), f"the {stage} stage of {run.root.resolve()}"
    with device_lock(device, work, on_line) if beside is None else beside.device(device, stage, work, on_line):
        launch_stage(
            stage,
            loaded.path,
            loaded.overrides,
            launch,
            run.log(stage, launcher.machine_rank),
            force=force,
            on_line=on_line,
            on_progress=on_progress,
            beside=beside,
        )
    return stage_result(stage, run, read_manifest(run.stage(stage)), cached=False, reason=reason)


def device_of(launch: LaunchSettings) -> str | None:
    """The name under which runs on this machine wait for each other; None where nothing waits."""
    if launch.device == "auto":
        return "gpu" if has_accelerator() else None
    return launch.device


def stage_result(stage: StageName, run: RunDirectory, manifest: Manifest, *, cached: bool, reason: str) -> StageResult:
    """A finished stage as it is handed on.

    Args:
        cached: whether it was finished before.
        reason: why the stage ran or did not.
    """
    return StageResult(
        stage=stage,
        path=str(run.stage(stage)),
        adapter_digest=None if stage == "evaluate" else manifest.digest,
        seconds=manifest.seconds,
        peak_memory_bytes=manifest.peak_memory_bytes,
        metrics=manifest.metrics,
        cached=cached,
        reason=reason,
    )


def launch_stage(
    stage: StageName,
    config_path: str | Path,
    overrides: Sequence[str],
    launch: LaunchSettings,
    log_path: str | Path,
    *,
    force: bool,
    on_line: Callable[[str], None],
    on_progress: Callable[[ProgressUpdate], None],
    module: str | None = None,
    beside: SideBySide | None = None,
) -> None:
    """Run a stage to its end in processes of its own.

    Whatever ends this process, be it an error, a signal or SIGKILL, ends the stage's whole process tree; where there
    is time for it the stage writes a checkpoint first.

    Args:
        stage: which one.
        config_path: the run's config file.
        overrides: `key=value` settings on top of it.
        launch: how many processes, or whose Accelerate config.
        log_path: the stage's log; a header and everything the stage prints is appended to it.
        force: run it although its finished result is current.
        on_line: receives every line that the stage prints, without terminal codes.
        on_progress: receives the state of the stage's progress bars; these lines are not in the log.
        module: the module to run. None: `stages.STAGE`.
        beside: who else may ask the stage to stop. None: nobody.

    Raises:
        StageFailedError: the stage did not end well; holds what it said and the last lines of its log.
        StageInterruptedError: the stage was asked to stop, by a signal of its own.
        StoppedInOrder: this process was asked to end, and the stage has stopped where it can go on.
        RunDirectoryError: the log cannot be opened.
    """
    log_path = Path(log_path)
    arguments = [str(Path(config_path).resolve()), *overrides, *(["--force"] if force else [])]
    last_lines: deque[str] = deque(maxlen=_LAST_LINES)
    launcher_report: list[str] = []

    def keep(line: str) -> None:
        # torchrun ends a failure with forty lines about itself, which would push out what the stage said.
        if launcher_report or _LAUNCHER_REPORT.search(line):
            launcher_report.append(line)
            return
        if not _CHATTER.search(line):
            last_lines.append(line)
            on_line(line)

    with writing(log_path), tempfile.TemporaryDirectory(prefix="trivet-") as scratch, _Log(log_path, on_line) as log:
        error_path = Path(scratch) / "error.json"
        command = [
            *_accelerate_command(launch, Path(scratch), stage),
            *("--module", module or f"stages.{stage}"),
            *arguments,
        ]
        environment = child_environment(launch, stage) | {ERROR_FILE_VARIABLE: str(error_path), FORMAT_VARIABLE: "json"}
        started = datetime.now(UTC).isoformat(timespec="seconds")
        log.write(f"--- {started} {stage} {' '.join(arguments)} ({_processes(launch)} process(es))")
        try:
            code = _run_supervised(command, environment, log, keep, on_progress, beside)
        except BaseException as error:  # an orchestrator may make an exception of its own of a signal
            if not isinstance(error, Exception) and _told(error_path).get("kind") == StageInterruptedError.__name__:
                StoppedInOrder.happened = True
                if isinstance(error, (KeyboardInterrupt, SystemExit)):
                    raise StoppedInOrder from None
            raise
        if code != 0 or error_path.exists():
            killed = _was_killed(code, [*last_lines, *launcher_report])
            failure = _failure(stage, code, error_path, last_lines, log_path, killed=killed)
            if isinstance(failure, StageProcessError):  # one that was stopped has said so itself
                log.write(failure.summary)
            raise failure


class _Log:
    """The log of a stage. What the disk does not take is lost and that is said once; the stage goes on as it can.

    Raises:
        OSError: the file cannot even be opened.
    """

    def __init__(self, path: Path, on_line: Callable[[str], None]) -> None:
        self._path, self._on_line, self._complete = path, on_line, True

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Without a buffer nothing is left to be written, and to fail, when it is closed.
        self._file = self._path.open("ab", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, line: str) -> None:
        try:
            self._file.write(f"{line}\n".encode(errors="replace"))
        except OSError as error:
            if self._complete:
                self._on_line(f"warning: {self._path}: the log is not complete: {error.strerror}")
            self._complete = False


def _accelerate_command(launch: LaunchSettings, scratch: Path, stage: StageName) -> list[str]:
    """`accelerate launch` with a config file of our own, so that it does not read the user's default one."""
    if launch.accelerate_config is not None:
        config_file = launch.accelerate_config
    else:
        config_file = str(scratch / "accelerate.yaml")
        settings = launcher_settings(launch, use_cpu=not has_accelerator())
        Path(config_file).write_text(yaml.safe_dump(settings), encoding="utf-8")
    # --quiet: without it a failing stage's own message is followed by a traceback of the launcher.
    return [
        *(sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", config_file),
        *("--num_cpu_threads_per_process", str(_threads(launch, stage))),
        # How long machines wait for each other before any process starts. Accelerate's files have no key for it.
        *("--rdzv_conf", f"timeout={math.ceil(launch.timeout)}"),
    ]


def child_environment(launch: LaunchSettings, stage: StageName | None = None) -> dict[str, str]:
    """What the processes of a stage get as their environment; a user's values win.

    Threads that wait for each other spin for a moment and then sleep. OpenMP's own default spins long: where other
    programs want the cores, spinning threads hold up the very ones that they wait for (measured on 2 cores beside
    three other programs: a forward pass took 27 s, and 1.0 s without spinning). Sleeping at once makes every small
    product wait for a thread to wake up (on two idle cores: sampling takes 1.5 times as long).
    """
    # Stages know nothing of Prefect, and its settings may hold a password.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    waiting = {} if "OMP_WAIT_POLICY" in inherited else {"GOMP_SPINCOUNT": "1000"}
    environment = QUIET_ENVIRONMENT | waiting | inherited
    environment["PYTHONUNBUFFERED"] = "1"
    # Stages are found wherever trivet was started, and nothing in that folder takes a library's place.
    environment["PYTHONSAFEPATH"] = "1"
    if Path(sysconfig.get_path("purelib")).resolve() != SOURCE_ROOT:
        paths = [str(SOURCE_ROOT), *filter(None, [inherited.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    if not has_accelerator():
        environment = _CPU_PAGES | (_CPU_FREED if stage in ("sft", "reward") else {}) | environment
        if launch.accelerate_config is None:
            environment["ACCELERATE_USE_CPU"] = "true"
    elif gpus := _own_gpus(launch, stage):
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return environment


def _shares(launch: LaunchSettings, stage: StageName | None) -> bool:
    """Whether the stage runs, or would in a whole run, beside another one."""
    return launch.side_by_side and stage in ("sft", "reward")


def _own_gpus(launch: LaunchSettings, stage: StageName | None) -> tuple[str, ...]:
    """The GPUs that a stage has to itself beside another one; none where it takes what there is."""
    if not _shares(launch, stage):
        return ()
    return halves(visible_gpus(), launch.processes)[0 if stage == "sft" else 1]


def halves(gpus: Sequence[str], processes: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """GPUs for two stages of so many processes each; nothing for either where there are not enough."""
    if len(gpus) < 2 * processes:
        return (), ()
    return tuple(gpus[:processes]), tuple(gpus[processes : 2 * processes])


def available_cores() -> int:
    """The cores that this process may use: its affinity, further limited by a container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))  # Without a limit the quota is the word "max".
    return max(1, cores)


def _threads(launch: LaunchSettings, stage: StageName) -> int:
    """Threads for each process's arithmetic. Accelerate by itself would leave a CPU stage with one.

    A stage that may run beside another one has as many when it runs alone: sums depend on it in their last bits.
    """
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    return max(1, available_cores() // (_processes(launch) * (2 if _shares(launch, stage) else 1)))


def _processes(launch: LaunchSettings) -> int:
    """Processes on this machine."""
    if launch.accelerate_config is None:
        return launch.processes
    try:
        return read_launcher_file(launch.accelerate_config).processes
    except ConfigError:
        return 1  # Accelerate itself will say what is wrong with the file.


@contextmanager
def supervised(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    output: int | IO[bytes],
    error: int | IO[bytes],
    folder: Path | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command whose whole process tree ends with the block, or with this process, however that dies.

    Args:
        command: the program and its arguments.
        environment: its environment.
        output: where its standard output goes, as for `subprocess.Popen`.
        error: where its standard error goes.
        folder: its working directory. None: this process's.
    """
    lifeline, held_open = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_SUPERVISOR), str(lifeline), str(_GRACE_SECONDS), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=error,
            env=environment,
            cwd=folder,
            pass_fds=[lifeline],
            # Ctrl-C reaches this process alone, which then asks the supervisor to end the tree in order.
            start_new_session=True,
        )
    except BaseException:
        os.close(held_open)
        raise
    finally:
        os.close(lifeline)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_SECONDS + 6)
        os.close(held_open)


def _run_supervised(
    command: list[str],
    environment: dict[str, str],
    log: _Log,
    on_line: Callable[[str], None],
    on_progress: Callable[[ProgressUpdate], None],
    beside: SideBySide | None,
) -> int:
    with (
        supervised(command, environment, output=subprocess.PIPE, error=subprocess.STDOUT) as process,
        nullcontext() if beside is None else beside.stopping(process),
    ):
        assert process.stdout is not None
        # The end of this stream means that no process of the stage is left.
        with io.TextIOWrapper(process.stdout, encoding="utf-8", errors="replace") as lines:
            try:
                _pass_on(lines, log, on_line, on_progress)
            except BaseException:
                # The stage may still write a checkpoint, and says so. A second interruption ends it at once.
                process.terminate()
                _pass_on(lines, log, on_line, on_progress)
                raise
        return process.wait()


def _pass_on(
    lines: Iterable[str], log: _Log, on_line: Callable[[str], None], on_progress: Callable[[ProgressUpdate], None]
) -> None:
    hide_secrets = redaction(os.environ)
    for line in _without_foreign_bars(map(hide_secrets, lines)):
        update, rest = parse_machine_line(line)
        if update is not None:
            on_progress(update)
        if text := _ESCAPES.sub("", rest).rstrip():
            log.write(text)
            on_line(text)


def _without_foreign_bars(lines: Iterable[str]) -> Iterator[str]:
    """Let only a few states of a library's own progress bar through, such as a download's."""
    shown_at = -math.inf
    for line in lines:
        if _FOREIGN_BAR.search(line):
            if time.monotonic() - shown_at < _SECONDS_BETWEEN_FOREIGN_BARS:
                continue
            shown_at = time.monotonic()
        yield line


class StageProcessError(StageFailedError):
    """A stage's process ended with an error; besides the message it keeps the last lines of the log."""

    def __init__(
        self, problem: str, *, where: str | None = None, remedy: str | None = None, last_lines: Sequence[str] = ()
    ) -> None:
        super().__init__(problem, where=where, remedy=remedy)
        self.last_lines = tuple(last_lines)

    @property
    def summary(self) -> str:
        """The message without the log's lines, for where these have been seen already."""
        return super().__str__()

    def __str__(self) -> str:
        if not self.last_lines:
            return self.summary
        return f"{self.summary}\nThe last lines of its log:\n" + "\n".join(f"  {line}" for line in self.last_lines)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.problem, self.where, self.remedy, self.last_lines)


class StageDiedError(StageProcessError):
    """A stage's process ended without a word, as if killed from outside, or misses one. Started again, it resumes."""


def _rebuild(
    kind: type[StageProcessError], problem: str, where: str | None, remedy: str | None, last_lines: tuple[str, ...]
) -> StageProcessError:
    return kind(problem, where=where, remedy=remedy, last_lines=last_lines)


_LESS_MEMORY = {
    "sft": "Lower sft.microbatch_size or sft.max_length.",
    "reward": "Lower reward.microbatch_size or reward.max_length.",
    "ppo": "Lower ppo.microbatch_tokens or ppo.rollout.batch_size.",
    "evaluate": "Lower evaluate.batch_size.",
}


def _was_killed(code: int, launcher_lines: Sequence[str]) -> bool:
    """Whether a process was killed from outside, as far as the launcher tells.

    Its report lists all that have failed: one that misses the killed one may be called the root cause. Those that it
    ended itself are listed too, and one that did not heed SIGTERM for half a minute, as one that no longer answers, it
    killed; it has said so before.
    """
    text = "\n".join(launcher_lines)
    killed, by_launcher = set(_KILLED.findall(text)), set(_KILLED_BY_LAUNCHER.findall(text))
    return code == 128 + signal.SIGKILL or bool(killed - by_launcher)


def _told(error_path: Path) -> dict[str, Any]:
    """What the stage said of its end; empty where it said nothing."""
    with contextlib.suppress(OSError, ValueError):
        told: dict[str, Any] = json.loads(redaction(os.environ)(error_path.read_text(encoding="utf-8")))
        return told
    return {}


def _failure(
    stage: StageName, code: int, error_path: Path, last_lines: Sequence[str], log_path: Path, *, killed: bool
) -> StageFailedError:
    told = _told(error_path)
    whole_log = f"The whole log: {log_path}"
    # Where one of several processes was killed, what the others say is only that they miss it.
    if told and not killed:
        if told["kind"] == StageInterruptedError.__name__:
            return StageInterruptedError(told["problem"], where=told["where"], remedy=told["remedy"])
        out_of_memory = told["kind"] in ("OutOfMemoryError", "MemoryError")
        failed = StageDiedError if told["kind"] == LostProcessError.__name__ else StageProcessError
        return failed(
            f"the {stage} stage failed: {told['problem']}",
            where=told["where"],
            remedy=told["remedy"] or (_LESS_MEMORY[stage] if out_of_memory else whole_log),
            last_lines=last_lines,
        )
    if apart := [found[1] for line in last_lines if (found := _APART.match(line))]:
        return StageDiedError(
            f"the machines of the {stage} stage have not come together, or one of them is gone: {apart[-1]}",
            where="launch.machines",
            remedy="Run the same command on each machine with its own launch.machine_rank, the others no more than"
            " launch.timeout seconds after the first; launch.main_address and launch.main_port must lead to machine 0."
            f" {whole_log}",
            last_lines=last_lines,
        )
    if not killed and any("Traceback (most recent call last)" in line for line in last_lines):
        return StageProcessError(
            f"the {stage} stage ended with exit code {code}", remedy=whole_log, last_lines=last_lines
        )
    end = "was killed" if killed else f"ended (exit code {code}) without a word"
    return StageDiedError(
        f"a process of the {stage} stage {end}, as happens where the system runs out of memory",
        remedy=f"{_LESS_MEMORY[stage]} The same command goes on from the last checkpoint. {whole_log}",
        last_lines=last_lines,
    )
