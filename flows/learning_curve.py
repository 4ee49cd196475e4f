"""`trivet learning-curve`: the reward model on growing shares of the training pairs. Would more pairs help?

Each share is a run of its own inside the run, RUN/learning_curve/F, whose reward stage is started as `trivet reward`
starts it: in processes of its own, resumed where it was interrupted, skipped where its result is current. The run's own
reward model is the point of all pairs where it is current; nothing here changes it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict

from rich.table import Table

from flows.display import Display
from flows.report import LiveReport
from pipeline.artifacts import read_manifest
from pipeline.config_file import LoadedConfig, load_config
from pipeline.datasets import load_preferences
from pipeline.errors import ArtifactError, ConfigError
from pipeline.learning_curve import CURVE, LearningCurve, Share
from pipeline.run_directory import MANIFEST, RunDirectory, write_json
from pipeline.run_lock import hold
from pipeline.run_state import is_run, read_learning_curve
from stages.inputs import find_current
from stages.launch import ensure_stage

_OPTION, _SETTING = "--fractions", "data.preferences.fraction"
_SET_HERE = ("run_dir", _SETTING)


def learning_curve(loaded: LoadedConfig, fractions: Sequence[float], display: Display) -> LearningCurve:
    """Train what is not current, the smallest share first, print the curve, and put it into the run's report.

    Args:
        loaded: the run's config.
        fractions: the shares to have, as `read_fractions` gives them. Others that are current stay part of the curve.
        display: where to.

    Raises:
        ConfigError, DataError: the config sets a share itself, or a share leaves no pair; before anything is trained.
        ArtifactError: the reward model starts from SFT, and that is not finished.
        TrivetError: a reward stage failed.
    """
    run = RunDirectory.find(loaded)
    _require_possible(loaded, run, fractions)
    if not is_run(run.root):  # a reward model that needs no SFT: nothing of the run is there yet
        RunDirectory.open(loaded, ())
    if loaded.config.reward.max_steps is not None:
        display.line("warning: with reward.max_steps a small share trains as long as a large one.", "yellow")
    shares: list[Share] = []
    for fraction in sorted({*fractions, *_found(run)}):
        share = _ensure(loaded, run, fraction, display) if fraction in fractions else _current(loaded, run, fraction)
        if share is not None:
            shares.append(share)
            write_json(run.learning_curve / CURVE, {"points": [asdict(one) for one in shares]})
            LiveReport(run.root, display.line).write()
    faults: list[str] = []
    curve = read_learning_curve(run, faults) or LearningCurve(())
    display.console.print(table_of(curve))
    for line in (f"{curve.headline}.", curve.sentence, *faults):
        display.line(line)
    display.line(f"The curve, and the rest: {run.report}")
    return curve


def read_fractions(text: str) -> list[float]:
    """Shares from `0.125,0.5,1`, the smallest first.

    Raises:
        ConfigError: one is no number above 0 and up to 1.
    """
    found = []
    for part in text.split(","):
        try:
            fraction = float(part)
        except ValueError:
            fraction = math.nan
        if not 0 < fraction <= 1:
            raise ConfigError(
                f"'{part.strip()}' is no share of the training pairs",
                where=_OPTION,
                remedy="Give numbers above 0 and up to 1 with commas between them, such as 0.25,0.5,1.",
            )
        found.append(fraction)
    return sorted(set(found))


def _require_possible(loaded: LoadedConfig, run: RunDirectory, fractions: Sequence[float]) -> None:
    config = loaded.config
    if config.data.preferences.fraction not in (None, 1.0):
        raise ConfigError(
            f"the config uses {config.data.preferences.fraction:g} of the pairs itself",
            where=_SETTING,
            remedy=f"Remove it: {_OPTION} says which shares to train on.",
        )
    if config.launch.machines > 1:
        raise ConfigError(
            f"launch.machines is {config.launch.machines}, and a learning curve is made on one machine",
            where="launch.machines",
            remedy="Set launch.machines=1.",
        )
    if config.reward_needs_sft:
        if not (run.stage("sft") / MANIFEST).exists():
            raise ArtifactError(
                "the reward model takes something from SFT, and there is no finished SFT",
                where=str(run.stage("sft")),
                remedy=f"Run it first: trivet sft {loaded.path}. With reward.start_from=base and"
                " reward.calibrate_on=base none is needed.",
            )
        read_manifest(run.stage("sft"))
    # The smallest share leaves the fewest pairs. Without a tokenizer none is too long, which the stage will see.
    load_preferences(_at(loaded, run, fractions[0]).config.data)


def _at(loaded: LoadedConfig, run: RunDirectory, fraction: float) -> LoadedConfig:
    """The config of the run whose reward model learns from that share."""
    kept = [one for one in loaded.overrides if one.partition("=")[0].strip() not in _SET_HERE]
    folder = json.dumps(str(run.share(fraction).root), ensure_ascii=False)  # which YAML reads as the same text
    return load_config(loaded.path, [*kept, f"run_dir={folder}", f"{_SETTING}={fraction!r}"])


def _ensure(loaded: LoadedConfig, run: RunDirectory, fraction: float, display: Display) -> Share:
    """The result for a share, trained if it is not current."""
    if (own := _own(loaded, run, fraction)) is not None:
        display.line(f"learning curve: all pairs; the run's own reward model, {run.stage('reward')}.")
        return own
    there = _at(loaded, run, fraction)
    display.line(f"learning curve: {fraction:g} of the training pairs, in {there.config.run_dir}.")
    if loaded.config.reward_needs_sft:
        _bring_sft(run, run.share(fraction), display)
    result = ensure_stage("reward", there, force=False, on_line=display.line, on_progress=display.progress)
    assert result.adapter_digest is not None
    return Share(fraction, False, result.adapter_digest)


def _current(loaded: LoadedConfig, run: RunDirectory, fraction: float) -> Share | None:
    """The result that lies there for a share, if it belongs beside the others."""
    if (own := _own(loaded, run, fraction)) is not None:
        return own
    if loaded.config.reward_needs_sft and not _has_sft_of(run, run.share(fraction)):
        return None
    with suppress(ArtifactError):
        found, _ = find_current("reward", _at(loaded, run, fraction), run.share(fraction))
        return None if found is None else Share(fraction, False, found.digest)
    return None


def _own(loaded: LoadedConfig, run: RunDirectory, fraction: float) -> Share | None:
    """The run's own reward model as the point of all pairs, if it is current."""
    if fraction < 1:
        return None
    with suppress(ArtifactError):
        found, _ = find_current("reward", loaded, run)
        return None if found is None else Share(fraction, True, found.digest)
    return None


def _found(run: RunDirectory) -> Iterator[float]:
    """The shares that have a result already."""
    for manifest in run.learning_curve.glob(f"*/reward/{MANIFEST}"):
        with suppress(ConfigError):
            yield from read_fractions(manifest.parents[1].name)


def _has_sft_of(run: RunDirectory, share: RunDirectory) -> bool:
    with suppress(ArtifactError):
        return read_manifest(share.stage("sft")).digest == read_manifest(run.stage("sft")).digest
    return False


def _bring_sft(run: RunDirectory, share: RunDirectory, display: Display) -> None:
    """Put a copy of the run's SFT result where the share's reward stage looks for it.

    Raises:
        ArtifactError: it is not whole, or was replaced meanwhile.
        RunDirectoryError: another process works on it.
    """
    if _has_sft_of(run, share):
        return
    for folder in (run, share):
        folder.lock("sft").parent.mkdir(parents=True, exist_ok=True)
    held = hold(share.lock("sft"), "the copy of SFT", display.line, reads=[run.lock("sft")])
    with held, share.publish("sft") as draft:
        shutil.copytree(run.stage("sft"), draft, dirs_exist_ok=True)
        read_manifest(draft)


def table_of(curve: LearningCurve) -> Table:
    """A row a share: its pairs, the accuracy on held-out pairs with its 95% interval, beside "longer wins"."""
    table = Table(title="Learning curve", title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in ("share", "pairs", "accuracy", "95% interval", "longer wins", "held-out pairs"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in curve.points:
        low, high = one.accuracy.low, one.accuracy.high
        table.add_row(
            f"{one.fraction:g}",
            str(one.pairs),
            f"{one.accuracy.value:.3f}",
            f"[{low:.3f}, {high:.3f}]".replace("[", r"\["),
            f"{one.longer_wins.value:.3f}",
            str(one.accuracy.n),
        )
    return table
