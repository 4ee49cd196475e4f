"""The doctor: what is broken is called so, what is only unusual is not."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from finished_stages import light_config
from packaging.requirements import Requirement
from rich.console import Console

from flows import doctor
from flows.doctor import Finding, check_config, check_hub, check_versions, examine, judge_version, known_good_versions
from pipeline.device_check import NF4_ERROR_LIMIT, devices


@pytest.mark.parametrize(
    ("required", "tested", "verdict"),
    [
        ("pytest>=1", None, "ok"),
        ("pytest>=1", "pytest==0.1", "note"),
        ("pytest<1", "pytest==0.1", "broken"),
        (None, None, "ok"),
    ],
)
def test_versions_are_judged(required: str | None, tested: str | None, verdict: str) -> None:
    finding = judge_version("pytest", required and Requirement(required), tested and Requirement(tested))
    assert finding.verdict == verdict
    if verdict == "broken":
        assert finding.remedy == "pip install 'pytest==0.1'"


def test_a_missing_library_is_broken_only_if_required() -> None:
    absent = Requirement("no-such-library-here>=2")
    assert judge_version(absent.name, absent, None).verdict == "broken"
    assert judge_version(absent.name, None, Requirement("no-such-library-here==2")).verdict == "note"


def test_what_is_tested_with_is_what_is_installed() -> None:
    assert "prefect" in known_good_versions()
    assert [finding for finding in check_versions() if finding.verdict == "broken"] == []


def test_four_bit_arithmetic_is_really_done() -> None:
    found = devices()
    assert found[-1].kind == "cpu"
    for device in found:
        assert device.problem is None
        assert device.nf4_error is not None
        # Zero would mean that nothing was quantized.
        assert 0.01 < device.nf4_error < NF4_ERROR_LIMIT


def test_a_library_that_crashes_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_in_child", lambda *arguments: (-11, ""))
    assert [finding.verdict for finding in doctor.check_devices()] == ["broken"]
    monkeypatch.setattr(doctor, "_in_child", lambda *arguments: (1, "Traceback\nImportError: min_items"))
    (finding,) = doctor.check_prefect()
    assert (finding.verdict, finding.text) == ("broken", "ImportError: min_items")
    assert "fastapi" in finding.remedy


def test_offline_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(doctor.urllib.request, "urlopen", lambda *_, **__: pytest.fail("asked although offline"))
    assert [finding.verdict for finding in check_hub()] == ["note"]


def test_a_hub_that_is_not_there_is_only_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    (finding,) = check_hub()
    assert finding.verdict == "note"
    assert "refused" in finding.text


def test_a_config_is_checked_with_its_base(tmp_path: Path) -> None:
    path = light_config(tmp_path)
    assert [finding.verdict for finding in check_config(path)] == ["ok", "ok"]
    (tmp_path / "base" / "model.safetensors").unlink()
    assert [finding.verdict for finding in check_config(path)] == ["ok", "broken"]
    path.write_text("run_dir: 3\n")
    assert [finding.verdict for finding in check_config(path)] == ["broken"]


def test_one_broken_thing_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("versions", "machine", "devices", "prefect", "disk", "hub"):
        monkeypatch.setattr(
            doctor, f"check_{name}", lambda: iter([Finding("a", "ok", "fine"), Finding("b", "note", "hm")])
        )
    text = io.StringIO()
    assert examine(None, Console(file=text))
    assert "works here" in text.getvalue()
    monkeypatch.setattr(doctor, "check_disk", lambda: iter([Finding("c", "broken", "[full]", "Empty it.")]))
    assert not examine(None, Console(file=text))
    assert "[full]" in text.getvalue()
    assert "1 thing(s) broken" in text.getvalue()
