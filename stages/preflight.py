"""Everything that can be wrong with a run's input, found before its first stage spends time.

Loads tokenizer and data and calls each reward function once, but no model. A flow calls `require_good_input`, which
runs this module in a process of its own, so that the flow's process stays free of torch.

    python -m stages.preflight STAGE,... CONFIG [key=value ...]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline import errors
from pipeline.config_file import LoadedConfig, load_config
from pipeline.errors import TrivetError
from pipeline.run_directory import RunDirectory, StageName
from stages.command import leave_message
from stages.inputs import find_current, require_lengths_that_fit, stages_of
from stages.launch import ERROR_FILE_VARIABLE, child_environment, supervised
from stages.launcher_file import require_launchable

_WARNING = "warning: "


def require_good_input(
    loaded: LoadedConfig, stages: Sequence[StageName] | None = None, *, warn: Callable[[str], None] = print
) -> None:
    """Check the input of stages in another process, unless there is nothing left to run.

    Args:
        stages: which ones. None: all of the run's.
        warn: told what is allowed but seldom meant, a line each.

    Raises:
        TrivetError: what `check` raises there.
    """
    run = RunDirectory(loaded.config.run_dir)
    stages = stages or stages_of(loaded.config)
    if all(find_current(stage, loaded, run)[0] is not None for stage in stages):
        return
    with tempfile.TemporaryDirectory(prefix="trivet-") as scratch:
        message = Path(scratch) / "error.json"
        config = [str(loaded.path.resolve()), *loaded.overrides]
        command = [sys.executable, "-m", "stages.preflight", ",".join(stages), *config]
        environment = child_environment(loaded.config.launch) | {ERROR_FILE_VARIABLE: str(message)}
        with supervised(command, environment, output=subprocess.PIPE, error=subprocess.STDOUT) as process:
            output, _ = process.communicate()
        if process.returncode == 0:
            for line in output.decode(errors="replace").splitlines():
                if line.startswith(_WARNING):
                    warn(line)
            return
        if not message.exists():
            said = output.decode(errors="replace")[-2000:]
            raise TrivetError(f"the check of the input ended with exit code {process.returncode}:\n{said}")
        found = json.loads(message.read_text(encoding="utf-8"))
    kind = getattr(errors, found["kind"], TrivetError)
    raise kind(found["problem"], where=found["where"], remedy=found["remedy"])


def check(loaded: LoadedConfig, stages: Sequence[str]) -> list[str]:
    """Read all that these stages will read, short of the models; returns what is allowed but seldom meant.

    Raises:
        TrivetError: the first fault; its kind says whether config, base, data or a function is to blame.
    """
    from pipeline.base_files import load_tokenizer
    from pipeline.base_model import base_identity, require_agreed_dtype
    from pipeline.chat import ChatFormat
    from pipeline.data_report import warnings
    from pipeline.datasets import load_instructions, load_preferences, load_prompts
    from pipeline.distributed import this_device
    from pipeline.engines import require_engine
    from pipeline.rewards import RewardFunction, RewardSum
    from pipeline.trackers import require_trackers
    from pipeline.trl_options import check_trl_options
    from stages.judges import require_judges

    config = loaded.config
    launcher = require_launchable(config)
    require_agreed_dtype(config.base, this_device(), launcher.mixed_precision)
    require_trackers(config)
    require_lengths_that_fit(config, stages)
    check_trl_options(config)
    if set(stages) - {"sft"}:
        require_engine(config.ppo.rollout)
    rewards = RewardSum(config.ppo.rewards, model_scores=None)
    gold = config.evaluate.gold and RewardFunction(config.evaluate.gold, what="gold function")
    chat = ChatFormat(load_tokenizer(config.base))
    assert chat.eos_token_id >= 0  # reading it is the check
    instructions = preferences = prompts = None
    if "sft" in stages:
        instructions = load_instructions(config.data, chat, config.sft.max_length)
    if "reward" in stages:
        preferences = load_preferences(config.data, chat, config.reward.max_length)
    if "ppo" in stages or "evaluate" in stages:
        prompts = load_prompts(config.data, chat, config.ppo.max_prompt_tokens)
        rewards.probe(prompts.train)
        if gold and "evaluate" in stages:
            gold.probe(prompts.held_out)
    if "evaluate" in stages and config.evaluate.judges:
        require_judges(config, base_identity(config.base, chat, this_device()))
    return list(warnings(instructions, prompts, preferences))


def main() -> None:
    """Command line: see the module's docstring."""
    try:
        for warning in check(load_config(sys.argv[2], sys.argv[3:]), sys.argv[1].split(",")):
            print(_WARNING + warning)
    except TrivetError as error:
        if not leave_message(error):
            print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
