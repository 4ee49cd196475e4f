"""A run whose adapters are real, on a real tiny base, without the training: what chat, generate and export work on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reported_run import answers, judged, lines
from tiny_models import tiny_base, tiny_config
from tiny_ppo import add_made_up, sharpen

from pipeline.base_model import load_base
from pipeline.config_file import LoadedConfig
from pipeline.data_report import SourceReport
from pipeline.datasets import load_preferences
from pipeline.rewards import Calibration
from pipeline.roles import Role, Roles
from pipeline.run_directory import RunDirectory, StageName
from pipeline.scored_pairs import HELD_OUT
from stages.gates import reward_probe
from stages.inputs import stage_inputs
from stages.pairs import score_pairs, tokenize, write_scored
from stages.result import StageClock, finish

ALL: tuple[StageName, ...] = ("sft", "reward", "ppo", "evaluate")
CALIBRATION = Calibration(gain=2.0, bias=-0.5)
SIZE = 0.15
"""Of the adapters' changes: enough for every speaker to say something else."""


def usable_run(
    folder: Path,
    stages: Sequence[StageName] = ALL,
    *,
    architecture: str = "llama",
    tokenizer_variant: str = "chatml",
    window: int | None = None,
    size: float = SIZE,
    **settings: Any,
) -> LoadedConfig:
    """A run with these stages finished.

    Args:
        folder: where base, data and run go.
        stages: which are finished; each needs those before it.
        architecture: of the base.
        tokenizer_variant: of `tiny_tokenizer`.
        window: tokens that the base says it reads; None: 1024.
        size: of the adapters' changes.
        settings: sections of the config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base_folder = folder / f"{architecture}-base"
    tiny_base(base_folder, architecture, tokenizer_variant=tokenizer_variant)
    if architecture == "llama":
        sharpen(base_folder)
    if window is not None:
        path = base_folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": window}))
    loaded = tiny_config(folder, architecture=architecture, **settings)
    run = RunDirectory.open(loaded)
    base = load_base(loaded.config.base, "cpu")
    roles = Roles(base)
    for number, (stage, role) in enumerate((("sft", "reference"), ("reward", "reward"), ("ppo", "policy"))):
        if stage in stages:
            add_made_up(
                roles,
                role,  # type: ignore[arg-type]
                seed=number,
                scale=size,
                head=stage == "reward",
                lora=loaded.config.lora,
            )
            roles.set_trainable()
            _publish(stage, role, roles, loaded, run)  # type: ignore[arg-type]
    if "evaluate" in stages:
        _evaluate(loaded, run, roles)
    return loaded


def _publish(stage: StageName, role: Role, roles: Roles, loaded: LoadedConfig, run: RunDirectory) -> None:
    report = SourceReport("/home/someone/rows.jsonl", "both", "messages", 50, 45, {"duplicate": 5}, 40, 5)
    metrics: dict[str, Any] = {
        "sft": {"held_out_loss_before": 3.0, "held_out_loss_after": 2.5, "rows": 40, "steps": 4},
        "reward": {"held_out_accuracy": {"value": 0.85, "low": 0.74, "high": 0.92, "n": 60}, "pairs": 40},
        "ppo": {"kl/policy_reference_k1": 3.6, "objective/score": 2.4},
    }[stage]
    extra: dict[str, Any] = {"data": [asdict(report)]}
    pairs = []
    if stage == "reward":
        pairs = tokenize(roles.base.chat, load_preferences(loaded.config.data).held_out)
        extra["probe"] = reward_probe(roles, [pair.chosen for pair in pairs])

    def save(folder: Path) -> None:
        roles.save(role, folder)
        if stage == "reward":
            write_scored(folder / HELD_OUT, pairs, score_pairs(roles, pairs, 256))

    finish(
        stage,
        "reward" if stage == "reward" else "policy",
        loaded,
        run,
        inputs=stage_inputs(stage, loaded.config, run),
        base=roles.base.identity,
        clock=StageClock(),
        metrics=metrics,
        save=save,
        calibration=CALIBRATION if stage == "reward" else None,
        extra=extra,
    )


def _evaluate(loaded: LoadedConfig, run: RunDirectory, roles: Roles) -> None:
    rows = answers()
    if not roles.base.chat.has_template:
        rows = [row | {"prompt": row["prompt"][0]["content"]} for row in rows]
    finish(
        "evaluate",
        "evaluation",
        loaded,
        run,
        inputs=stage_inputs("evaluate", loaded.config, run),
        base=roles.base.identity,
        clock=StageClock(),
        metrics=judged(rows),
        save=lambda folder: (folder / "answers.jsonl").write_text(lines(rows)) and None,
    )
