"""prefect.yaml is checked before it is deployed, and a run may only name a config that is there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from finished_stages import light_config
from real_runs import ROOT

from flows.deployments import begins_in, configs_in, configs_to_name, naming_configs, require_sound
from pipeline.errors import ConfigError


def project(folder: Path, **changes: Any) -> Path:
    """A folder with a config and one deployment of it."""
    light_config(folder)
    deployment: dict[str, Any] = {
        "name": "nightly",
        "entrypoint": "flows/rlhf.py:rlhf",
        "work_pool": {"name": "gpu-box"},
        "parameters": {"config": "run.yaml"},
        "schedules": [{"cron": "0 2 * * *", "active": True}],
    }
    deployments = [{key: value for key, value in (deployment | changes).items() if value is not None}]
    (folder / "prefect.yaml").write_text(yaml.safe_dump({"deployments": deployments}))
    return folder


def test_what_comes_with_trivet_is_sound(tmp_path: Path) -> None:
    require_sound(ROOT)
    require_sound(project(tmp_path))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"work_pool": None}, r"rlhf/nightly and its schedule has no work pool.*set work_pool: \{name: gpu-box\}"),
        ({"work_pool": {"work_queue_name": "default"}, "schedules": None}, "rlhf/nightly has no work pool"),
        ({"parameters": {"config": "absent.yaml"}}, r"rlhf/nightly: .*absent\.yaml: cannot read the config"),
        (
            {"parameters": {"config": "run.yaml", "overrides": ["sft.epoch=2"]}},
            "unknown key 'sft.epoch'",
        ),
        ({"parameters": {"config": "run.yaml", "overrides": ["sft.batch_size=3"]}}, "not a multiple of"),
        ({"parameters": {"config": "run.yaml", "forced": True}}, "a parameter 'forced', which no flow here knows"),
    ],
)
def test_a_deployment_that_cannot_work_is_refused_with_the_reason(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        require_sound(project(tmp_path, **changes))
    assert str(caught.value).startswith(str(tmp_path / "prefect.yaml"))


@pytest.mark.parametrize(
    "changes", [{"work_pool": {"name": "cluster"}}, {"pull": [{"git_clone": {}}]}, {"parameters": None}]
)
def test_of_workers_elsewhere_nothing_is_known(tmp_path: Path, changes: dict[str, Any]) -> None:
    require_sound(project(tmp_path, **({"parameters": {"config": "/mnt/theirs.yaml"}} | changes)))


@pytest.mark.parametrize("text", ["", "name: trivet", "deployments: 3", "deployments: [x]", "a: [", "[]"])
def test_a_file_without_deployments_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "prefect.yaml").write_text(text)
    with pytest.raises(ConfigError, match="holds no list of deployments"):
        require_sound(tmp_path)


def test_configs_are_found_wherever_a_run_may_name_them(tmp_path: Path) -> None:
    (project(tmp_path) / "configs" / "deep").mkdir(parents=True)
    for name in ("configs/a.yml", "configs/deep/b.yaml", "runs/c/d.yaml", ".venv/e.yaml", "mine/f.yaml", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "mine" / "run.json").write_text("{}")
    assert configs_in(tmp_path) == ("run.yaml", "configs/a.yml", "configs/deep/b.yaml")
    for number in range(501):
        (tmp_path / "configs" / f"{number}.yaml").write_text("")
    assert configs_in(tmp_path) is None
    assert configs_to_name(tmp_path) is None


def test_a_run_may_name_configs_of_further_folders_by_their_full_paths(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "b.yaml").write_text("")
    (tmp_path / "ours").mkdir()
    own = project(tmp_path / "ours")
    full = str(own / "run.yaml")
    assert configs_to_name(own) == ("run.yaml", full)
    assert configs_to_name(own, [tmp_path / "theirs"]) == ("run.yaml", full, str(tmp_path / "theirs" / "b.yaml"))


def test_a_folder_of_configs_that_is_not_there_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.up import up

    monkeypatch.chdir(project(tmp_path))
    with pytest.raises(ConfigError, match="no such folder of configs"):
        up(port=1, limit=1, configs=[tmp_path / "absent"], say=print)


def test_a_run_may_name_nothing_but_what_is_there() -> None:
    from prefect.utilities.schema_tools import validate

    from flows.rlhf import rlhf

    schema = rlhf.parameters.model_dump()

    def refused(config: str, schema: dict[str, Any]) -> list[str]:
        return [error.message for error in validate({"config": config}, schema)]

    named = naming_configs(schema, ["my.yaml", "configs/a.yaml"])
    assert "enum" not in schema["properties"]["config"], "the one that was given stays as it was"
    assert refused("my.yaml", named) == refused("configs/a.yaml", named) == []
    for config in ("our.yaml", "/mnt/b.yaml", "~/c.yaml", "../d.yaml"):
        assert refused(config, named) == [f"{config!r} is not one of ['my.yaml', 'configs/a.yaml']"]
    assert refused("run.json", named)[0].startswith("'run.json' does not match")
    again = naming_configs(named, ["our.yaml"])
    assert refused("our.yaml", again) == [] and refused("my.yaml", again) == ["'my.yaml' is not one of ['our.yaml']"]
    assert naming_configs(again, None) == schema
    assert refused("our.yaml", naming_configs(schema, [])) == ["'our.yaml' is not one of []"]
    theirs = {"properties": {"city": {"type": "string"}}}
    assert naming_configs(theirs, ["my.yaml"]) == theirs


def test_only_deployments_that_begin_in_the_folder_are_told_what_lies_there(tmp_path: Path) -> None:
    step = "prefect.deployments.steps.set_working_directory"
    assert begins_in([{step: {"directory": str(tmp_path)}}], tmp_path)
    assert not begins_in([{step: {"directory": "/elsewhere"}}], tmp_path)
    assert not begins_in([{step: {"directory": str(tmp_path)}}, {step: {"directory": "/elsewhere"}}], tmp_path)
    assert not begins_in(None, tmp_path)


def test_a_folder_that_goes_while_it_is_looked_at_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project(tmp_path) / "configs").mkdir()
    walk = os.walk

    def walking(folder: Path) -> Any:
        for number, found in enumerate(walk(folder)):
            if number == 0:
                shutil.rmtree(tmp_path / "configs")
            yield found

    monkeypatch.setattr(os, "walk", walking)
    assert configs_in(tmp_path) == ("run.yaml",)
