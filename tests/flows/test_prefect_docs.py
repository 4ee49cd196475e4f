"""What docs/prefect.md shows is what Prefect and trivet take."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from finished_stages import light_config
from prefect.events.schemas.automations import AutomationCore
from prefect.utilities.schema_tools import validate
from prefect.utilities.templating import apply_values, find_placeholders

from flows.cli import app
from flows.parameters import override_pattern
from pipeline.config_file import flatten, load_config
from stages.launch import _GRACE_SECONDS

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


def test_stages_side_by_side_are_configured_as_shown(tmp_path: Path) -> None:
    (tree,) = [tree for text in blocks("yaml") if "launch" in (tree := yaml.safe_load(text))]
    config = load_config(light_config(tmp_path), [f"{key}={value}" for key, value in flatten(tree)]).config
    assert config.launch.side_by_side and not config.reward_needs_sft


JOB = json.loads((ROOT / "configs" / "prefect" / "kubernetes_job.json").read_text())


def cluster_deployment() -> dict[str, Any]:
    (tree,) = [tree for text in blocks("yaml") if "deployments" in (tree := yaml.safe_load(text))]
    (deployment,) = tree["deployments"]
    return dict(deployment)


def test_the_deployment_on_a_cluster_fits_its_job_template_and_the_config() -> None:
    deployment = cluster_deployment()
    variables = deployment["work_pool"]["job_variables"]
    assert validate(variables, JOB["variables"], preprocess=False) == []
    assert validate({}, JOB["variables"], preprocess=False)[0].message == "'image' is a required property"
    mount = JOB["variables"]["properties"]["mount_path"]["default"]
    for override in deployment["parameters"]["overrides"]:
        assert re.search(override_pattern(), override)
        assert override.partition("=")[2].startswith(f"{mount}/")
    file, _, flow = deployment["entrypoint"].partition(":")
    assert f"{flow} = flow(" in (ROOT / file).read_text()


def test_the_job_template_gives_a_job_with_gpus_and_shared_storage() -> None:
    """As Prefect fills it: defaults, then the deployment's own, then what is left without a value goes."""
    properties = JOB["variables"]["properties"]
    named = {placeholder.name for placeholder in find_placeholders(json.dumps(JOB["job_configuration"]))}
    assert named <= set(properties), "what the job asks for is a variable"
    assert set(properties) - named == set(), "and every variable is asked for"
    values = {name: entry["default"] for name, entry in properties.items() if "default" in entry}
    values |= cluster_deployment()["work_pool"]["job_variables"] | {
        "name": "run",
        "command": "prefect flow-run execute",
    }
    job = apply_values(JOB["job_configuration"], values, remove_notset=True)["job_manifest"]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == "registry.example.com/trivet:0.1"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 2, "memory": "64Gi"}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"storage": "/mnt/trivet", "shared-memory": "/dev/shm"}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
    claim = next(volume for volume in pod["volumes"] if volume["name"] == "storage")
    assert claim["persistentVolumeClaim"] == {"claimName": "trivet"}
    assert pod["restartPolicy"] == "Never" and job["spec"]["backoffLimit"] == 0
    assert pod["terminationGracePeriodSeconds"] > _GRACE_SECONDS
    assert "serviceAccountName" not in pod, "left out where nobody set it"


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
