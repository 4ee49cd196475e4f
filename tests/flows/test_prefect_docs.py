"""What docs/prefect.md shows is what Prefect and trivet take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from finished_stages import light_config
from prefect.events.schemas.automations import AutomationCore

from flows.cli import app
from pipeline.config_file import flatten, load_config

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "prefect.md").read_text()
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS, re.DOTALL)


def test_automations_are_valid() -> None:
    found: list[dict[str, Any]] = [tree for text in blocks("yaml") if "trigger" in (tree := yaml.safe_load(text))]
    assert len(found) == 2
    for tree in found:
        for action in tree["actions"]:
            if "block_document_id" in action:
                action["block_document_id"] = "00000000-0000-0000-0000-000000000000"
        assert AutomationCore.model_validate(tree).trigger.type == "event"


def test_the_config_is_valid(tmp_path: Path) -> None:
    (tree,) = [tree for text in blocks("yaml") if "gates" in (tree := yaml.safe_load(text))]
    overrides = [f"{key}={value}" for key, value in flatten(tree)]
    assert len(overrides) == 7
    config = load_config(light_config(tmp_path), overrides).config
    assert (config.gates.min_win_rate, config.registry.promote, config.ppo.start_from) == (0.55, "approved", "promoted")


def test_every_command_of_ours_exists() -> None:
    names = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    shown = set(re.findall(r"^(?:\w+=\S+ )*trivet ([\w-]+)", "\n".join(blocks("bash")) + "\n" + README, re.MULTILINE))
    assert {"up", "promote", "rollback", "run"} <= shown
    assert shown <= names


def test_every_deployment_that_is_named_exists() -> None:
    declared = {
        f"{Path(entry['entrypoint'].partition(':')[2]).name}/{entry['name']}"
        for entry in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    }
    named = set(re.findall(r"prefect deployment run (\S+)", DOCS + README))
    assert named and named <= declared
