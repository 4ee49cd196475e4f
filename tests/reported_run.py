"""Runs for the tests of the report: whole ones and parts of one, with figures that follow from each other."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finished_stages import light_config, publish

from pipeline.artifacts import read_manifest
from pipeline.config_file import LoadedConfig, load_config
from pipeline.metrics import MetricsWriter
from pipeline.run_directory import STAGES, RunDirectory, StageName
from pipeline.statistics import mean_interval, win_rate

ROUNDS = 12
HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='hacked=1'>\"'&"
WORDS = ("tides", "bicycle", "soup", "guitar", "garden", "letter")


def answers(count: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Answers side by side, of which PPO's are better more often than not."""
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        word = WORDS[number % len(WORDS)]
        gold = {"sft": chance.uniform(0, 1), "ppo": chance.uniform(0.5, 1.5)}
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"Question {number} about the {word}?"}],
                "source": f"prompts.jsonl, row {number + 1}",
                "sft": f"I do not know about the {word}.",
                "ppo": f"I do know about the {word}, gladly. Good luck!",
                "scores": {
                    "reward_model": {"sft": gold["sft"] - 0.5, "ppo": gold["ppo"] + chance.uniform(-0.3, 0.3)},
                    "gold": gold,
                },
            }
        )
    return rows


def judged(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of an evaluation that gave these answers."""
    rates, means = {}, {}
    for judge in ("reward_model", "gold"):
        pairs = [(row["scores"][judge]["ppo"], row["scores"][judge]["sft"]) for row in rows]
        wins, losses = sum(ppo > sft for ppo, sft in pairs), sum(ppo < sft for ppo, sft in pairs)
        ties = len(pairs) - wins - losses
        rates[judge] = win_rate(wins, ties, losses).as_dict() | {"wins": wins, "ties": ties, "losses": losses}
        means[judge] = {
            name: mean_interval([pair[index] for pair in pairs]).as_dict() for index, name in enumerate(("ppo", "sft"))
        }
    length = {"value": 20.0, "low": 18.0, "high": 22.0, "n": len(rows)}

    def point(iteration: int, kl: float, gold: float) -> dict[str, Any]:
        middles = {"kl": kl, "score": math.log(iteration), "gold": gold}
        found = {name: {"value": at, "low": at - 0.1, "high": at + 0.1, "n": 8} for name, at in middles.items()}
        return {"iteration": iteration, **found}

    return {
        "n": len(rows),
        "gold_while_learning": [point(4, 1.2, 0.9), point(8, 2.4, 1.1), point(12, 3.6, 0.7)],
        "kl": {"value": 4.0, "low": 3.5, "high": 4.5, "n": len(rows)},
        "win_rate": rates,
        "length_controlled_win_rate": {"gold": {"value": 0.7, "low": 0.52, "high": 0.83, "n": len(rows)}},
        "mean_score": means,
        "response": {name: {"length": length, "eos_rate": 1.0} for name in ("sft", "ppo")},
    }


def pairs(count: int = 60, seed: int = 0, lead: float = 1.5) -> list[dict[str, Any]]:
    """Held-out pairs, most of which the reward model gets right: `lead` is that of the preferred answers, in the mean.

    The same seed gives the same pairs, scored by a model that is better or worse.
    """
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        chosen, rejected = "c" * chance.randint(20, 120), "r" * chance.randint(20, 120)
        found = chance.gauss(lead, 1.5)
        rows.append(
            {
                "source": "pairs.jsonl",
                "row": number + 1,
                "prompt": [{"role": "user", "content": f"Which of these, number {number}?"}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "margin": None,
                "score_chosen": found / 2,
                "score_rejected": -found / 2,
                "characters_chosen": len(chosen),
                "characters_rejected": len(rejected),
                "tokens_chosen": 5,
                "tokens_rejected": 5,
                "columns": {"subset": ("chat", "code", "safety")[number % 3]},
            }
        )
    return rows


def lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a file of JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_metrics(run: RunDirectory, stage: StageName, rounds: int = ROUNDS, **more: Sequence[float]) -> None:
    """A stage's metrics, as the stage itself would write them; `more` are further figures by step."""
    with MetricsWriter(run.metrics(stage)) as writer:
        for step in range(1, rounds + 1):
            figures: dict[str, float] = {name: values[step - 1] for name, values in more.items()}
            if stage == "ppo":
                figures |= {
                    "objective/score": math.log(step),
                    "objective/reward": math.log(step) - 0.1,
                    "kl/policy_reference_k1": 0.3 * step,
                    "policy/entropy": 2 - 0.05 * step,
                    "policy/clip_fraction": 0.1,
                    "policy/gradient_norm": 0.5,
                    "value/explained_variance": 0.05 * step,
                    "response/length_mean": 20.0 + step,
                }
            else:
                figures |= {"loss": 3.0 / step, "grad_norm": 1.0, "epoch": step / rounds}
            writer.write(step, figures)


def whole_run(folder: Path, *, seed: int = 0, name: str = "run", **settings: Any) -> LoadedConfig:
    """A run in which every stage is finished.

    Args:
        folder: where config, data and run go.
        seed: of the made-up answers and pairs.
        name: of the run's folder.
        settings: sections of the config.
    """
    loaded = load_config(light_config(folder, run_dir=str(folder / name), **settings))
    run = RunDirectory.open(loaded)
    rows = answers(seed=seed)
    report = {"source": "rows.jsonl", "side": "both", "format": "prompt/completion", "read": 50, "kept": 45}
    report |= {"dropped": {"duplicate": 5}, "train": 40, "held_out": 5}
    made: dict[StageName, dict[str, Any]] = {
        "sft": {"metrics": {"held_out_loss_before": 3.0, "held_out_loss_after": 2.5}, "extra": {"data": [report]}},
        "reward": {
            "metrics": {"held_out_accuracy": {"value": 0.85, "low": 0.74, "high": 0.92, "n": 60}, "pairs": 400},
            "files": {"held_out.jsonl": lines(pairs(seed=seed))},
        },
        "ppo": {"metrics": {"kl/policy_reference_k1": 3.6, "objective/score": 2.4}},
        "evaluate": {"metrics": judged(rows), "files": {"answers.jsonl": lines(rows)}},
    }
    for stage in STAGES:
        if stage != "evaluate":
            write_metrics(run, stage)
        publish(stage, loaded, run, **made[stage])
    write_samples(run)
    write_curve(loaded, {0.25: (100, pairs(seed=seed, lead=0.0)), 0.5: (200, pairs(seed=seed, lead=0.7))})
    return loaded


def write_curve(loaded: LoadedConfig, shares: Mapping[float, tuple[int, Sequence[Mapping[str, Any]]]]) -> None:
    """A learning curve of these shares, each with its training pairs and its scores, and of the run's reward model."""
    run = RunDirectory(loaded.config.run_dir)
    points = []
    for fraction, (count, scored) in shares.items():
        folder = run.share(fraction)
        there = load_config(
            loaded.path, [f"run_dir={json.dumps(str(folder.root))}", f"data.preferences.fraction={fraction}"]
        )
        RunDirectory.open(there)
        shutil.copytree(run.stage("sft"), folder.stage("sft"))
        figures = {"pairs": count, "held_out_pairs": len(scored)}
        manifest = publish("reward", there, folder, metrics=figures, files={"held_out.jsonl": lines(scored)})
        points.append({"fraction": fraction, "own": False, "reward": manifest.digest})
    points.append({"fraction": 1.0, "own": True, "reward": read_manifest(run.stage("reward")).digest})
    (run.learning_curve / "curve.json").write_text(json.dumps({"points": points}))


def write_samples(run: RunDirectory, rounds: int = ROUNDS) -> None:
    """What the policy said in its rounds."""
    rows = [
        {"step": step, "prompt": "Say it.", "response": f"It is round {step}.", "score": 0.1 * step}
        for step in range(1, rounds + 1)
    ]
    path = run.metrics("ppo").with_name("ppo_samples.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines(rows))


def hostile_run(folder: Path) -> Path:
    """A run in which every text that data, models and settings bring is HTML."""
    loaded = load_config(light_config(folder, run_dir=str(folder / "run <b>&")), [])
    run = RunDirectory.open(loaded)
    rows = answers(5)
    for number, row in enumerate(rows):
        row |= {
            "prompt": [{"role": HOSTILE, "content": HOSTILE}],
            "sft": HOSTILE
            if number % 2
            else "Nothing alike.",  # so that both are shown, what differs and what does not
            "ppo": f"{HOSTILE} x",
            "source": HOSTILE,
        }
        row["scores"][HOSTILE] = {"sft": 0.1, "ppo": 0.2}
    figures = judged(rows)
    figures["win_rate"][HOSTILE] = figures["win_rate"]["gold"]
    figures[HOSTILE] = HOSTILE
    report = {"source": HOSTILE, "side": HOSTILE, "format": HOSTILE, "read": 2, "kept": 1, "dropped": {HOSTILE: 1}}
    hard = pairs(30)
    for row in hard:
        row |= {
            "source": HOSTILE,
            "chosen": HOSTILE,
            "rejected": f"{HOSTILE} y",
            "prompt": HOSTILE,
            "score_rejected": 9.0,
        }
        row["columns"] = {HOSTILE: f"{HOSTILE}{row['row'] % 2}", "subset": f"{HOSTILE}{row['row'] % 3}"}
    write_metrics(run, "ppo", **{f"score/{HOSTILE}": [0.1] * 12, "score/other": [0.2] * 12})
    publish("sft", loaded, run, extra={"data": [report]})
    publish("reward", loaded, run, files={"held_out.jsonl": lines(hard)})
    publish("ppo", loaded, run, extra={"gates": {HOSTILE: 1.0}})
    publish("evaluate", loaded, run, metrics=figures, files={"answers.jsonl": lines(rows)})
    folder = run.judged_pairs("bench")
    folder.mkdir(parents=True)
    (folder / "scored.jsonl").write_text(lines(hard))
    (folder / "about.json").write_text(json.dumps({"file": HOSTILE, "dropped": {HOSTILE: 3}}))
    samples = [{"step": HOSTILE, "prompt": HOSTILE, "response": HOSTILE, "score": HOSTILE}]
    run.metrics("ppo").with_name("ppo_samples.jsonl").write_text(lines(samples))
    run.log("sft").parent.mkdir()
    run.log("sft").write_text(f"--- now sft x\nthe sft stage failed: {HOSTILE}\n")
    os.utime(run.log("sft"), (time.time() + 60,) * 2)  # after the result: a second attempt
    origins = {"config": HOSTILE, "overrides": [HOSTILE], "settings": [[HOSTILE, HOSTILE, HOSTILE]]}
    (run.root / "origins.json").write_text(json.dumps(origins))
    entry = {"fraction": 0.5, "own": True, "reward": HOSTILE}
    points = [entry, {HOSTILE: HOSTILE}, HOSTILE, entry | {"fraction": HOSTILE}]
    run.learning_curve.mkdir()
    (run.learning_curve / "curve.json").write_text(json.dumps({"points": points}))
    summary = {"versions": {HOSTILE: HOSTILE}, "machine": {HOSTILE: HOSTILE}, "started": HOSTILE}
    run.summary.write_text(json.dumps(summary))
    return run.root
