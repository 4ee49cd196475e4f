"""Measures a finished reward model on further files of pairs: another domain, or probes of its biases.

    python benchmarks/reward_on_pairs.py CONFIG FILE [FILE ...]

Prints a line a file: accuracy with its 95% interval, and that of the trivial baseline "the longer answer wins".
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.base_files import load_tokenizer
from pipeline.base_model import load_base
from pipeline.chat import ChatFormat
from pipeline.config import DataSettings
from pipeline.config_file import load_config
from pipeline.datasets import load_preferences
from pipeline.roles import Roles
from pipeline.run_directory import RunDirectory
from stages.pairs import held_out_metrics, score_pairs, tokenize

MAX_LENGTH, MAX_TOKENS = 1024, 2048


def main() -> None:
    """Command line: see the module's docstring."""
    config = load_config(sys.argv[1]).config
    chat = ChatFormat(load_tokenizer(config.base))
    files = {}
    for path in sys.argv[2:]:
        data = DataSettings.model_validate(
            {"preferences": {"sources": [path], "held_out": 0.5, "split_by": "row"}, "allow_special_tokens": True}
        )
        split = load_preferences(data, chat, MAX_LENGTH)
        files[path] = tokenize(chat, [*split.train, *split.held_out])
    roles = Roles(load_base(config.base))
    roles.add_from("reward", RunDirectory(config.run_dir).stage("reward"))
    for path, pairs in files.items():
        found = held_out_metrics(pairs, score_pairs(roles, pairs, MAX_TOKENS))
        accuracy, longer = found["held_out_accuracy"], found["held_out_accuracy_longer_wins"]
        interval = f"[{accuracy['low']:.3f}, {accuracy['high']:.3f}], n={len(pairs)}"
        print(f"{Path(path).stem}: {accuracy['value']:.3f} {interval}; longer wins {longer['value']:.3f}", flush=True)


if __name__ == "__main__":
    main()
