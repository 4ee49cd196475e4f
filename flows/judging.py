"""`trivet judge-pairs`: a run's reward model on further files of pairs, and the accuracy by subset in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rich.table import Table

from flows.display import Display
from flows.report import LiveReport
from pipeline import scored_pairs
from pipeline.artifacts import read_manifest
from pipeline.config_file import LoadedConfig
from pipeline.run_directory import RunDirectory, read_json
from pipeline.scored_pairs import SCORED, ScoredPair, Slice
from stages.device_lock import device_lock
from stages.judge_pairs import read_files
from stages.launch import device_of, launch_stage


def judge_pairs(loaded: LoadedConfig, files: Sequence[str], max_length: int, display: Display) -> None:
    """Judge the files in processes of their own, print what came out, and put it into the run's report.

    Args:
        loaded: the run's config.
        files: what `stages.judge_pairs.read_files` takes.
        max_length: tokens of prompt and answer together; longer pairs are counted and left out.
        display: where to.

    Raises:
        ConfigError, DataError: a file is no file of pairs; found before a model is loaded.
        ArtifactError: the run has no finished reward model.
        StageFailedError: the scoring failed.
    """
    run = RunDirectory.find(loaded)
    read_manifest(run.stage("reward"))
    found = read_files(files)
    arguments = [f"--pairs={file}" for file in files]
    with device_lock(device_of(loaded.config.launch), f"judge-pairs of {run.root.resolve()}", display.line):
        launch_stage(
            "reward",
            loaded.path,
            # What follows the config on the command line.
            [*loaded.overrides, *arguments, f"--max-length={max_length}"],
            loaded.config.launch.model_copy(update={"processes": 1}),
            run.log("reward").with_name("judge_pairs.log"),
            force=False,
            on_line=display.line,
            on_progress=display.progress,
            module="stages.judge_pairs",
        )
    for file in found:
        pairs, _ = scored_pairs.read_scored(run.judged_pairs(file.name) / SCORED)
        display.console.print(table_of(file.name, pairs))
        if dropped := read_json(run.judged_pairs(file.name) / "about.json")["dropped"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
            display.line(f"{file.name}: rows left out: {reasons}.", "yellow")
    LiveReport(run.root, display.line).write()
    display.line(f"The pairs the model gets most wrong, and the rest: {run.report}")


def table_of(name: str, pairs: Sequence[ScoredPair]) -> Table:
    """Accuracy by subset with 95% intervals, that of all pairs, and the mean over subsets, each of equal weight."""
    table = Table(title=name, title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("subset", overflow="fold")
    for column in ("pairs", "accuracy", "95% interval", "longer wins"):
        table.add_column(column, justify="right", no_wrap=True)
    subsets = scored_pairs.subsets(pairs)
    whole = Slice("all pairs", scored_pairs.accuracy(pairs), scored_pairs.longer_wins(pairs))
    for one in [*subsets, whole]:
        low, high = one.accuracy.low, one.accuracy.high
        table.add_row(
            one.name,
            str(one.accuracy.n),
            f"{one.accuracy.value:.3f}",
            f"[{low:.3f}, {high:.3f}]".replace("[", r"\["),
            f"{one.longer_wins.value:.3f}",
            style="bold" if one is whole and subsets else None,
        )
    if len(subsets) > 1:
        table.add_row("mean of the subsets", "", f"{fmean(one.accuracy.value for one in subsets):.3f}", "", "")
    return table


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What follows the config on the command line: files of pairs, and settings `key=value`."""
    overrides = [one for one in arguments if _is_override(one)]
    return [one for one in arguments if one not in overrides], overrides


def _is_override(argument: str) -> bool:
    key, equals, _ = argument.partition("=")
    return bool(equals) and key.replace(".", "").replace("_", "").isalnum() and not Path(argument).exists()
