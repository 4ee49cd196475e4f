"""Launching a stage: what it prints and how it fails reaches the parent, and no process of it outlives anyone."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finished_stages import light_config

from pipeline.config import LaunchSettings
from pipeline.config_file import load_config
from pipeline.errors import StageFailedError, StageInterruptedError
from pipeline.progress import ProgressUpdate
from pipeline.run_directory import STAGES
from stages import launch as module
from stages.interruption import StoppedInOrder
from stages.launch import StageProcessError, available_cores, child_environment, launch_stage, supervised

ROOT = Path(__file__).parents[2]
SUPERVISOR = ROOT / "stages" / "supervisor.py"


@pytest.fixture
def stage_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module that a launch can run, and returns its name."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    # Whatever the user has configured for Accelerate must not matter.
    broken = tmp_path / "hf" / "accelerate" / "default_config.yaml"
    broken.parent.mkdir(parents=True)
    broken.write_text("num_processes: 7\nnonsense: true\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))

    def write(text: str) -> str:
        (folder / "made_up_stage.py").write_text(textwrap.dedent(text))
        return "made_up_stage"

    return write


def start(tmp_path: Path, name: str, **options: object) -> SimpleNamespace:
    """Launch a made-up stage; returns its lines, its progress, its log and the error, if any."""
    seen = SimpleNamespace(lines=[], updates=[], error=None)
    log = tmp_path / "logs" / "sft.log"
    try:
        launch_stage(
            "sft",
            options.pop("config", tmp_path / "run.yaml"),  # type: ignore[arg-type]
            options.pop("overrides", ["a.b=1"]),  # type: ignore[arg-type]
            options.pop("launch", LaunchSettings()),  # type: ignore[arg-type]
            log,
            force=True,
            on_line=options.pop("on_line", seen.lines.append),  # type: ignore[arg-type]
            on_progress=seen.updates.append,
            module=name,
        )
    except StageFailedError as error:
        seen.error = error
    seen.log = log.read_text()
    return seen


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


def wait_until(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(0.02)


# ---- lines, progress, log, surroundings


def test_a_stage_reports_to_its_parent(
    tmp_path: Path, stage_module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = stage_module(
        """
        import json, os, sys
        sys.stderr.write("\\x1b[31mred\\x1b[0m text\\n")
        for step in range(50):
            sys.stderr.write(f"\\rLoading: {step}%|####      | {step}/50 [00:01<00:02]")
        print()
        import torch, stages, pipeline
        from pipeline.progress import progress
        with progress(3, "sft") as job:
            for _ in range(3):
                print("a line", flush=True)
                job.advance(note="loss 2")
        print(json.dumps({
            "arguments": sys.argv[1:], "safe": sys.flags.safe_path, "threads": torch.get_num_threads(),
            "stages": stages.__file__, "prefect": [key for key in os.environ if key.startswith("PREFECT_")],
            "world": os.environ.get("WORLD_SIZE", "1"), "stdin": sys.stdin.read(),
            "token": os.environ["HF_TOKEN"],
        }))
        """
    )
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "user:secret")
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "logs" / "sft.log"
    log.parent.mkdir()
    log.write_text("--- an earlier start\n")
    seen = start(tmp_path, name, config="run.yaml")
    assert seen.error is None

    assert "red text" in seen.lines
    assert seen.lines.count("a line") == 3
    assert sum("Loading" in line for line in seen.lines) == 1
    told = json.loads(seen.lines[-1])
    assert told["token"] == "<HF_TOKEN>"
    assert "hf_0123456789" not in seen.log
    assert told["arguments"] == [str(tmp_path / "run.yaml"), "a.b=1", "--force"]
    assert told["stages"] == str(ROOT / "stages" / "__init__.py")
    assert told["threads"] == available_cores()
    assert (told["safe"], told["prefect"], told["world"], told["stdin"]) == (True, [], "1", "")

    assert [update.done for update in seen.updates][-1] == 3
    assert isinstance(seen.updates[-1], ProgressUpdate)
    assert seen.updates[-1].finished
    earlier, header, *logged = seen.log.splitlines()
    assert earlier == "--- an earlier start"
    assert header.startswith("--- 2")
    assert f"sft {tmp_path / 'run.yaml'} a.b=1 --force (1 process(es))" in header
    assert logged == seen.lines  # and so no progress


# ---- failures


def test_a_crash_comes_with_the_last_lines(tmp_path: Path, stage_module: Callable[[str], str]) -> None:
    seen = start(tmp_path, stage_module("for n in range(100): print(n)\nraise LookupError('the reason')"))
    assert isinstance(seen.error, StageProcessError)
    assert len(seen.error.last_lines) == 30
    assert seen.error.last_lines[-1] == "LookupError: the reason"
    # The launcher adds nothing of its own.
    assert "accelerate" not in "".join(seen.error.last_lines)
    assert str(tmp_path / "logs" / "sft.log") in (seen.error.remedy or "")
    assert "LookupError: the reason" in str(seen.error)
    assert "LookupError" not in seen.error.summary
    assert seen.error.summary in seen.log


def test_a_silent_death_suggests_memory(tmp_path: Path, stage_module: Callable[[str], str]) -> None:
    seen = start(tmp_path, stage_module("import os\nprint('so far', flush=True)\nos.kill(os.getpid(), 9)"))
    assert (
        "a process of the sft stage ended (exit code 1) without a word, as happens where the system runs out of"
        in str(seen.error)
    )
    assert "sft.microbatch_size" in seen.error.remedy
    assert seen.error.last_lines == ("so far",)


def test_the_stages_own_error_comes_first(tmp_path: Path, stage_module: Callable[[str], str]) -> None:
    light_config(tmp_path)
    name = stage_module(
        """
        from pipeline.errors import DataError
        from stages.command import stage_main
        def run(loaded, run):
            raise DataError("the row has no answer", where="rows.jsonl, line 3", remedy="Add one.")
        stage_main("sft", run)
        """
    )
    seen = start(tmp_path, name, overrides=["seed=3"])
    assert seen.error.problem == "the sft stage failed: the row has no answer"
    assert (seen.error.where, seen.error.remedy) == ("rows.jsonl, line 3", "Add one.")
    assert str(seen.error).startswith("rows.jsonl, line 3: the sft stage failed: the row has no answer\n  -> Add one.")
    # Said once, by the parent: not by the stage as well, and without a traceback.
    assert not any("no answer" in line or "Traceback" in line for line in seen.lines)
    assert "the row has no answer" in seen.log


def test_running_out_of_memory_names_the_setting(tmp_path: Path) -> None:
    told = {"kind": "OutOfMemoryError", "problem": "OutOfMemoryError: tried 2 GiB", "where": None, "remedy": None}
    path = tmp_path / "error.json"
    path.write_text(json.dumps(told))
    for stage, setting in (("sft", "sft.microbatch_size"), ("ppo", "ppo.microbatch_tokens")):
        error = module._failure(stage, 1, path, [], tmp_path / "log", killed=False)  # type: ignore[arg-type]
        assert setting in (error.remedy or "")


@pytest.mark.parametrize("launcher", ["watches", "sees both ends at once"])
def test_of_two_processes_the_killed_one_is_to_blame(
    tmp_path: Path, stage_module: Callable[[str], str], launcher: str
) -> None:
    light_config(tmp_path)
    name = stage_module(
        f"""
        import os, signal, subprocess
        from accelerate import Accelerator
        from stages.command import stage_main
        def run(loaded, run):
            accelerator = Accelerator()
            assert accelerator.num_processes == 2 and accelerator.device.type == "cpu"
            open({str(tmp_path)!r} + f"/here-is-{{accelerator.process_index}}", "x").close()
            accelerator.wait_for_everyone()
            if {launcher != "watches"} and accelerator.process_index == 0:
                held = os.getppid()
                os.kill(held, signal.SIGSTOP)
                subprocess.Popen(["sh", "-c", f"sleep 5; kill -CONT {{held}}"], start_new_session=True)
            accelerator.wait_for_everyone()
            if accelerator.process_index == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            accelerator.wait_for_everyone()
        stage_main("sft", run)
        """
    )
    settings = LaunchSettings(processes=2)
    seen = start(tmp_path, name, launch=settings, overrides=["launch.processes=2"])
    assert {path.name for path in tmp_path.glob("here-is-*")} == {"here-is-0", "here-is-1"}
    assert "a process of the sft stage was killed, as happens where the system runs out of memory" in str(seen.error)
    assert not any("ChildFailedError" in line for line in seen.lines)
    assert "ChildFailedError" in seen.log


def test_one_that_no_longer_answers_was_not_killed_for_want_of_memory(
    tmp_path: Path, stage_module: Callable[[str], str]
) -> None:
    """What the launcher itself kills, half a minute after the others have ended, is no victim of the system."""
    light_config(tmp_path)
    name = stage_module(
        """
        import os, signal
        from accelerate import Accelerator
        from stages.command import stage_main
        def run(loaded, run):
            accelerator = Accelerator()
            accelerator.wait_for_everyone()
            if accelerator.process_index == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            accelerator.wait_for_everyone()
        stage_main("sft", run)
        """
    )
    settings = LaunchSettings(processes=2, timeout=4)
    seen = start(tmp_path, name, launch=settings, overrides=["launch.processes=2", "launch.timeout=4"])
    assert "forcefully exiting" in seen.log and re.search(r"exitcode\s*: -9", seen.log)
    assert "another process of the stage has ended, or did not take part in time" in str(seen.error)
    assert "memory" not in seen.error.summary


def test_an_error_in_the_parent_ends_the_stage(tmp_path: Path, stage_module: Callable[[str], str]) -> None:
    pid_file = tmp_path / "pid"
    name = stage_module(
        f"""
        import os, time
        open({str(pid_file)!r}, "w").write(str(os.getpid()))
        print("started", flush=True)
        time.sleep(600)
        """
    )

    def on_line(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, name, on_line=on_line)
    assert gone(int(pid_file.read_text()))


def test_the_error_survives_pickling() -> None:
    error = StageProcessError("it failed", where="here", remedy="Do this.", last_lines=["a", "b"])
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, StageProcessError)
    assert str(again) == str(error) == "here: it failed\n  -> Do this.\nThe last lines of its log:\n  a\n  b"


# ---- threads and devices


def test_cores_are_shared_out_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [module._threads(LaunchSettings(processes=n), "sft") for n in (1, 2, 3, 16)] == [8, 4, 2, 1]
    beside = LaunchSettings(side_by_side=True)
    assert [module._threads(beside, stage) for stage in STAGES] == [4, 4, 8, 8]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert module._threads(LaunchSettings(), "sft") == 5


def test_stages_side_by_side_have_gpus_of_their_own_where_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_accelerator", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c,GPU-d,GPU-e")
    everything = os.environ["CUDA_VISIBLE_DEVICES"]

    def gpus(**settings: Any) -> list[str]:
        launch = LaunchSettings(**settings)
        return [child_environment(launch, stage)["CUDA_VISIBLE_DEVICES"] for stage in STAGES]

    assert gpus() == [everything] * 4
    assert gpus(side_by_side=True) == ["GPU-a", "GPU-b", everything, everything]
    assert gpus(side_by_side=True, processes=2) == ["GPU-a,GPU-b", "GPU-c,GPU-d", everything, everything]
    assert gpus(side_by_side=True, processes=3) == [everything] * 4


def test_an_own_accelerate_config_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("distributed_type: FSDP\nnum_processes: 8\nnum_machines: 2\nmain_process_ip: n\n")
    launch = LaunchSettings(accelerate_config=str(path))
    command = module._accelerate_command(launch, tmp_path, "ppo")
    assert command[command.index("--config_file") + 1] == str(path)
    assert module._processes(launch) == 4
    monkeypatch.setattr(module, "has_accelerator", lambda: False)
    assert "ACCELERATE_USE_CPU" not in child_environment(launch)
    assert child_environment(LaunchSettings())["ACCELERATE_USE_CPU"] == "true"


def test_a_stage_on_a_cpu_gives_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_accelerator", lambda: False)
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    environment = child_environment(LaunchSettings(), "sft")
    assert "MALLOC_MMAP_THRESHOLD_" not in child_environment(LaunchSettings(), "ppo")
    assert (environment["MALLOC_MMAP_THRESHOLD_"], environment["THP_MEM_ALLOC_ENABLE"]) == ("4194304", "0")
    monkeypatch.setattr(module, "has_accelerator", lambda: True)
    assert "MALLOC_MMAP_THRESHOLD_" not in child_environment(LaunchSettings(), "sft")


def test_the_choice_of_a_strategy_is_announced(tmp_path: Path, stage_module: Callable[[str], str]) -> None:
    path = light_config(tmp_path)
    lines: list[str] = []
    rows = ["launch.processes=2", "sft.microbatch_size=1", "reward.microbatch_size=1"]
    with pytest.raises(StageFailedError):  # what looks like a model is none
        module.ensure_stage(
            "sft", load_config(path, rows), force=False, on_line=lines.append, on_progress=lambda update: None
        )
    assert lines[0] == "launch.strategy=auto is ddp: there is no GPU, and processes on CPUs share main memory."


def test_hidden_gpus_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not module.has_accelerator()


# ---- the supervisor

TREE = """
import os, signal, subprocess, sys, time
# A child in a session of its own that ignores SIGTERM, and a grandchild whose parent is gone.
stubborn = "import os, signal, time; os.setsid(); signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
orphan = "import os, sys, time\\nif os.fork(): sys.exit()\\nos.setsid()\\nprint(os.getpid(), flush=True)"
orphan += "\\ntime.sleep(600)"
first = subprocess.Popen([sys.executable, "-c", stubborn])
second = subprocess.Popen([sys.executable, "-c", orphan], stdout=subprocess.PIPE, text=True)
print(os.getpid(), first.pid, second.stdout.readline().strip(), flush=True)
{end}
"""


def parent_of(tree: str, grace: float = 0.5) -> subprocess.Popen[str]:
    """A process that runs a tree of processes as `launch_stage` would, and passes on what it prints."""
    program = f"""
import os, subprocess, sys
sys.path.insert(0, {str(ROOT)!r})
from stages import launch
launch._GRACE_SECONDS = {grace}
with launch.supervised([sys.executable, "-c", {tree!r}], os.environ, output=None, error=None) as process:
    process.wait()
"""
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(sys.platform != "linux", reason="adopting orphans is a feature of Linux")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_the_parent_however_it_dies(number: signal.Signals) -> None:
    parent = parent_of(TREE.format(end="time.sleep(600)"))
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 3
    assert not any(gone(pid) for pid in pids)
    parent.send_signal(number)
    parent.wait()
    wait_until(lambda: all(gone(pid) for pid in pids), "the whole tree ends")


@pytest.mark.skipif(sys.platform != "linux", reason="adopting orphans is a feature of Linux")
def test_nothing_outlives_the_command_itself() -> None:
    parent = parent_of(TREE.format(end=""))
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    parent.wait(60)
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize(
    ("program", "code"),
    [("raise SystemExit(0)", 0), ("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)],
)
def test_the_exit_code_is_passed_on(program: str, code: int) -> None:
    with supervised([sys.executable, "-c", program], os.environ, output=None, error=None) as process:  # type: ignore[arg-type]
        assert process.wait(60) == code


def test_a_command_that_does_not_exist() -> None:
    with supervised(["/no/such/program"], os.environ, output=subprocess.PIPE, error=subprocess.STDOUT) as process:
        assert process.stdout is not None
        assert b"/no/such/program: No such file" in process.stdout.read()
        assert process.wait(60) == 127


def test_leaving_the_block_ends_the_command() -> None:
    command = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
    with supervised(command, os.environ, output=subprocess.PIPE, error=subprocess.STDOUT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
    assert process.poll() is not None


def test_asked_to_stop_the_command_may_clean_up() -> None:
    tidy = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(print('tidy', flush=True)))\n"
    command = [sys.executable, "-c", f"{tidy}print('up', flush=True)\ntime.sleep(600)"]
    with supervised(command, os.environ, output=subprocess.PIPE, error=subprocess.STDOUT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.terminate()
        assert process.stdout.read() == b"tidy\n"
        assert process.wait(60) == 0


def test_a_second_signal_leaves_no_time_to_clean_up() -> None:
    stubborn = "import signal, time\nsignal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True))\n"
    command = [sys.executable, "-c", f"{stubborn}print('up', flush=True)\nwhile True: time.sleep(1)"]
    with supervised(command, os.environ, output=subprocess.PIPE, error=subprocess.STDOUT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.terminate()
        assert process.stdout.readline() == b"asked\n"
        process.terminate()
        assert process.wait(10) == 128 + signal.SIGKILL


# ---- a stage that is asked to stop

STOPS = """
import time
from stages.command import stage_main
from stages.interruption import Interrupted, deferred, requested
def run(loaded, run):
    with deferred():
        print("started", flush=True)
        while not requested():
            time.sleep(0.05)
        print("checkpoint written", flush=True)
        raise Interrupted
stage_main("sft", run)
"""


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit])
def test_a_stage_may_write_a_checkpoint_when_the_parent_is_asked_to_end(
    tmp_path: Path, stage_module: Callable[[str], str], ending: type[BaseException]
) -> None:
    seen: list[str] = []

    def on_line(line: str) -> None:
        seen.append(line)
        if line == "started":
            raise ending

    with pytest.raises(StoppedInOrder):
        start(tmp_path, stage_module(STOPS), config=light_config(tmp_path), overrides=[], on_line=on_line)
    assert "checkpoint written" in seen


def test_a_stage_that_was_asked_to_stop_by_itself_says_so(tmp_path: Path, stage_module: Callable[[str], str]) -> None:
    stopped = STOPS.replace('print("started", flush=True)', "import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    seen = start(tmp_path, stage_module(stopped), config=light_config(tmp_path), overrides=[])
    assert isinstance(seen.error, StageInterruptedError)
    assert str(seen.error) == "sft: stopped as asked\n  -> The same command goes on from there."
    assert str(seen.error) in seen.log
