"""What Prefect's server refuses at submission, by the schema that a deployment brings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from flows.parameters import override_pattern
from pipeline.config_file import flatten, load_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "override",
    ["seed=1", "ppo.kl.coefficient=0.1", " ppo.kl = {target: 3}", "sft.trl.neftune_noise_alpha=5", "ppo.rewards=[{}]"],
)
def test_known_keys_pass(override: str) -> None:
    assert re.search(override_pattern(), override)


@pytest.mark.parametrize(
    "override", ["sft.epoch=1", "sft.epochss=1", "ppo.kl.coefficient.x=1", "lora", "xseed=1", "", "ppo.rewards.0=1"]
)
def test_unknown_keys_do_not(override: str) -> None:
    assert not re.search(override_pattern(), override)


def test_every_setting_there_is_passes() -> None:
    loaded = load_config(ROOT / "configs" / "quickstart.yaml")
    keys = [key for key, _ in flatten(loaded.config.model_dump(mode="json"))]
    assert len(keys) > 80
    assert not [key for key in keys if not re.search(override_pattern(), f"{key}=1")]


def test_the_deployments_are_the_five_flows() -> None:
    """Deployments name flows that exist, with the parameters that these have, in a pool that exists."""
    from prefect import Flow
    from prefect.utilities.schema_tools import validate

    from flows import one_stage, rlhf

    found = {}
    for deployment in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]:
        file, _, name = deployment["entrypoint"].partition(":")
        flow = getattr({"flows/rlhf.py": rlhf, "flows/one_stage.py": one_stage}[file], name)
        assert isinstance(flow, Flow)
        assert (ROOT / deployment["parameters"]["config"]).is_file()
        schema = ()
        schema = flow.parameters.model_dump()
        assert validate(deployment["parameters"], schema) == []
        wrong = deployment["parameters"] | {"overrides": ["sft.epoch=1"]}
        assert [error.message.split(" does")[0] for error in validate(wrong, schema)] == ["'sft.epoch=1'"]
        assert validate({"config": "run.json"}, schema) != []
        assert deployment["work_pool"]["name"] == "gpu-box"
        for schedule in deployment.get("schedules", []):
            assert schedule["active"] is False
        found[f"{flow.name}/{deployment['name']}"] = deployment
    assert set(found) == {
        "rlhf/nightly",
        *(f"{name}/quickstart" for name in ("rlhf", "sft", "reward", "ppo", "evaluate")),
    }
