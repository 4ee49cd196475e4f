"""The command line that all stages share.

    accelerate launch -m stages.sft CONFIG [key=value ...] [--force] [--dry-run]

A finished stage whose inputs have not changed is not run again. Exit codes: 0 done or nothing to do,
1 a fault in the program, 2 something the user can put right, 75 asked to stop: the same command goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from pipeline.artifacts import Manifest
from pipeline.config_file import LoadedConfig, load_config
from pipeline.disk import writing
from pipeline.errors import StageInterruptedError, TrivetError
from pipeline.memory import megabytes
from pipeline.progress import duration, is_main_process, say
from pipeline.run_directory import RunDirectory, StageName
from pipeline.trackers import require_trackers
from stages import interruption
from stages.inputs import find_current, parents_of, require_lengths_that_fit
from stages.interruption import EXIT_INTERRUPTED, Interrupted
from stages.launch import ERROR_FILE_VARIABLE, QUIET_ENVIRONMENT
from stages.launcher_file import ask_as_accelerate

Run = Callable[[LoadedConfig, RunDirectory], Manifest]


def stage_main(stage: StageName, run: Run, argv: Sequence[str] | None = None) -> NoReturn:
    """Run a stage as a program: read the config, skip what is done, report what went wrong.

    Args:
        stage: the stage's name.
        run: does the work and publishes the result; every process of a launch calls it.
        argv: arguments, None for the program's own.

    Raises:
        SystemExit: always, with the exit code.
    """
    arguments = _parser(stage).parse_intermixed_args(argv)
    quiet()
    faulthandler.enable()
    interruption.install()
    try:
        loaded = load_config(arguments.config, arguments.overrides)
        if arguments.dry_run:
            print("\n".join(plan(loaded, (stage,), force=arguments.force)))
        else:
            _run_unless_current(stage, run, loaded, force=arguments.force)
    except TrivetError as error:
        if not leave_message(error):
            print(error, file=sys.stderr)
        sys.exit(2)
    except Interrupted:
        stopped = StageInterruptedError(f"{stage}: stopped as asked", remedy="The same command goes on from there.")
        leave_message(stopped)
        say(str(stopped))
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        traceback.print_exc()
        leave_message(_seen_from_here(error))
        sys.exit(1)
    sys.exit(0)


def plan(loaded: LoadedConfig, stages: Sequence[StageName], *, force: bool) -> Iterator[str]:
    """What `--dry-run` prints: each setting with its origin, the batch arithmetic, and which stages would run."""
    yield from loaded.lines()
    yield ""
    yield from loaded.config.arithmetic()
    yield ""
    run = RunDirectory.find(loaded)
    will_run: list[StageName] = []
    for stage in stages:
        manifest, reason = find_current(stage, loaded, run, force=force)
        renewed = [parent for parent in parents_of(stage, loaded.config) if parent in will_run]
        if manifest is not None and not force and not renewed:
            yield f"{stage}: would not run; {reason}."
            continue
        will_run.append(stage)
        if manifest is not None:
            reason = "--force" if force else f"after {' and '.join(renewed)}, if their results change"
        yield f"{stage}: would run; {reason}."


def _parser(stage: StageName) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"stages.{stage}", allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file of the run")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace the file's")
    parser.add_argument("--force", action="store_true", help="run although the finished result is current")
    parser.add_argument("--dry-run", action="store_true", help="show settings and plan, run nothing")
    return parser


def _run_unless_current(stage: StageName, run: Run, loaded: LoadedConfig, *, force: bool) -> None:
    with _at_work(stage, loaded) as directory:
        manifest, reason = find_current(stage, loaded, directory, force=force)
        if manifest is not None and not force:
            say(f"{stage}: nothing to do; {reason}.")
            return
        require_trackers(loaded.config)
        require_lengths_that_fit(loaded.config, [stage])
        _heed_launcher(loaded)
        say(f"{stage}: starting; {'run again on demand' if manifest is not None else reason}.")
        finished = run(loaded, directory)
        say(
            f"{stage}: finished in {duration(finished.seconds)}, peak memory {megabytes(finished.peak_memory_bytes)},"
            f" result in {directory.stage(stage)}."
        )


def _heed_launcher(loaded: LoadedConfig) -> None:
    """Meet the other processes, where a launcher has started some; refuse an arithmetic that it asks for in vain.

    Raises:
        LostProcessError: not all processes have come.
        ConfigError: the base computes in another arithmetic, or these processes cannot work as the section says.
    """
    if (precision := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
        from pipeline.base_model import require_agreed_dtype
        from pipeline.distributed import this_device

        require_agreed_dtype(loaded.config.base, this_device(), precision)
    if _is_one_of_several():
        from pipeline.distributed import meet

        ask_as_accelerate(loaded.config)
        meet(loaded.config.launch.timeout)


def _is_one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def _seen_from_here(error: Exception) -> Exception:
    """The error, or what it says of another process that this one has waited for."""
    if not _is_one_of_several():
        return error
    from pipeline.distributed import as_lost_process

    return as_lost_process(error) or error


@contextlib.contextmanager
def _at_work(stage: StageName, loaded: LoadedConfig) -> Iterator[RunDirectory]:
    """The run, kept from all others by the main process of this launch."""
    if not is_main_process():
        yield RunDirectory.find(loaded)
        return
    parents = parents_of(stage, loaded.config)
    directory = RunDirectory.open(loaded, [stage], parents)
    with directory.locked(stage, reads=parents, warn=say), writing(directory.root):
        yield directory


def quiet() -> None:
    """Silence the libraries below. The environment may come too late for those that are imported already."""
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Meant for the developers of these libraries, not for who trains with them.
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.simplefilter("ignore", category)
    # PEFT says so whenever a base has moved; the manifest tells by digest whether it is the same one.
    warnings.filterwarnings("ignore", message=".*base_model_name_or_path.*was renamed")
    if (transformers := sys.modules.get("transformers")) is not None:
        transformers.utils.logging.disable_progress_bar()
    # It asks for a package of faster kernels at every start on a CPU.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def leave_message(error: Exception) -> bool:
    """Tell the parent process what went wrong, if there is one that asked to be told."""
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if path is None:
        return False
    if isinstance(error, TrivetError):
        problem, where, remedy = error.problem, error.where, error.remedy
    else:
        problem, where, remedy = f"{type(error).__name__}: {error}", None, None
    message = {"kind": type(error).__name__, "problem": problem, "where": where, "remedy": remedy}
    # The first process to fail is the one to believe: the others fail because it is gone.
    try:
        with open(path, "x", encoding="utf-8") as file:
            json.dump(message, file)
    except FileExistsError:
        pass
    except OSError:  # no room for it: what is printed reaches the parent all the same
        return False
    return True
