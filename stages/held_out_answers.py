"""What the policy answered to held-out prompts while it learned, kept for judges that training must not see.

PPO writes a file each time it measures the policy, and publishes all of them with it. The evaluation has them judged by
the gold measure: where the reward still rises and the gold score falls, the reward is over-optimised (Gao et al. 2022,
arXiv 2210.10760, who draw both against the square root of the KL from the SFT policy).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.background import Background
from pipeline.records import Prompt, as_plain
from pipeline.rewards import RewardFunction
from pipeline.run_directory import read_json, write_json
from pipeline.statistics import mean_interval

HELD_OUT_ANSWERS = "held_out_answers.jsonl"
"""Among the files of PPO's result."""


def keep_answers(background: Background, folder: Path, iteration: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write down, beside the computation, what the policy answered after so many iterations: rows of `as_row`."""
    background.do(partial(write_json, folder / f"{iteration:08d}.json", {"answers": list(rows)}))


def drop_answers_after(folder: Path, iteration: int) -> None:
    """Drop those of iterations that are done again, or belong to an earlier run."""
    for path in _kept(folder):
        if int(path.stem) > iteration:
            path.unlink()


def publish_answers(folder: Path, result: Path) -> None:
    """Put all that was kept into the folder of PPO's result; no file where there is none."""
    lines = [
        json.dumps({"iteration": int(path.stem), **row}, ensure_ascii=False) + "\n"
        for path in _kept(folder)
        for row in read_json(path)["answers"]
    ]
    if lines:
        (result / HELD_OUT_ANSWERS).write_text("".join(lines), encoding="utf-8")


def as_row(number: int, prompt: Prompt, answer: str, score: float, kl: float) -> dict[str, Any]:
    """An answer as it is kept: `number` is the prompt's among all held-out ones, `kl` the answer's from SFT in nats."""
    return {"number": number, "prompt": as_plain(prompt.prompt), "answer": answer, "score": score, "kl": kl}


def judged_while_learning(
    result: Path,
    prompts: Sequence[Prompt],
    gold: RewardFunction,
    once: Callable[[str, Callable[[], list[float]]], list[float]],
) -> list[dict[str, Any]]:
    """What the gold measure says of the policy at each point at which PPO measured it.

    Args:
        result: folder of PPO's result.
        prompts: all held-out prompts. Answers to others, as of a file that has changed, are left out.
        once: keeps what a judge said under a name, so that it is not asked again after an interruption.

    Returns:
        a row a point: `iteration`, and the means over answers of `kl` (nats), `score` (PPO's own) and `gold`, each with
        its interval. None where PPO kept no answers.

    Raises:
        RewardFunctionError: the gold measure failed.
    """
    path = result / HELD_OUT_ANSWERS
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["number"] < len(prompts)]
    rows = [row for row in rows if as_plain(prompts[row["number"]].prompt) == row["prompt"]]
    found = []
    for iteration in sorted({row["iteration"] for row in rows}):
        some = [row for row in rows if row["iteration"] == iteration]

        def judge(some: Sequence[Mapping[str, Any]] = some) -> list[float]:
            return gold([prompts[row["number"]] for row in some], [row["answer"] for row in some])

        means = {name: mean_interval([row[name] for row in some]).as_dict() for name in ("kl", "score")}
        means["gold"] = mean_interval(once(f"gold-after-{iteration}", judge)).as_dict()
        found.append({"iteration": iteration, **means})
    return found


def _kept(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if path.stem.isdecimal())
