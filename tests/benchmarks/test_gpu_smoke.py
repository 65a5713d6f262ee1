"""The check on a GPU runs from end to end where the CPU stands in for one, and goes on where it stopped. No time is
asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llamacancel as lc
from benchmarks.gpu import report
from benchmarks.gpu.measures import KINDS, MEASURES
from benchmarks.gpu.steps import QUICK_LAWS
from benchmarks.gpu.wheelhouse import requirements

pytestmark = pytest.mark.timeout(1800)  # on a slow and busy machine

ROOT = Path(__file__).resolve().parents[2]


def check(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)


FORCED = ("--forced", "--quick", "--threads", "1")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a check that was ended early and then run again, to its end."""
    folder = tmp_path_factory.mktemp("gpu")
    early = check(folder, *FORCED, "--minutes", "0.0001")
    assert early.returncode == 4, early.stdout + early.stderr
    done = check(folder, *FORCED)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def test_every_step_is_done_and_the_report_says_on_what(out: Path, results: dict[str, Any]) -> None:
    assert results["steps"].keys() == {*MEASURES, *QUICK_LAWS}
    assert results["failures"] == {}
    assert results["left"] == []
    text = (out / "report.md").read_text(encoding="utf-8")
    assert results["target"]["description"] in text
    assert results["date"] in text
    assert "No GPU was used" in text


def test_what_was_done_is_not_done_again(out: Path, results: dict[str, Any]) -> None:
    done = out / "done.json"
    before = done.stat().st_mtime_ns
    again = check(out.parent, *FORCED)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stderr.count("done before") == len(results["steps"])
    assert done.stat().st_mtime_ns == before


def test_cancels_are_honoured_inside_a_graph_and_done_again_to_the_bit(results: dict[str, Any]) -> None:
    steps = results["steps"]
    kinds = steps["memory kinds"]["kinds"]
    assert [case["arch"] for case in kinds] == list(KINDS)
    for case in (steps["latency"], steps["partial offload"], *kinds):
        assert case["honoured"] > 0
        assert case["redone"] > 0
        assert case["wrong_bits"] == 0
    assert steps["two contexts"]["runs"] > 0
    assert steps["two contexts"]["wrong_bits"] == 0
    assert steps["latency"]["plain"]["wait"]["n"] == steps["latency"]["honoured"]


def test_the_laws_were_tested_in_pieces(results: dict[str, Any]) -> None:
    for name in QUICK_LAWS:
        assert results["steps"][name]["passed"] > 0
        assert results["steps"][name]["failed"] == []


def test_targets_are_called_reached_or_missed(results: dict[str, Any]) -> None:
    names = [target["name"] for target in results["targets"]]
    for word in ("p99", "prefill with a token", "single-token", "beside one that is cancelled", "other bits"):
        assert any(word in name for name in names)
    assert report.broken(results) is False
    assert report.broken({"steps": {"two contexts": {"wrong_bits": 1}}})


def test_without_a_device_it_says_so_with_a_status_of_its_own(tmp_path: Path) -> None:
    told = check(tmp_path, "--device", "no such device")
    assert told.returncode == 3
    assert "no device" in told.stderr
    assert "CPU" in told.stderr
    if not any(device["kind"] in ("gpu", "igpu") for device in lc.build_info()["devices"]):
        assert check(tmp_path).returncode == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is of Python 3.11")
def test_the_wheelhouse_has_what_the_laws_import() -> None:
    names = {need.split(">")[0] for need in requirements()}
    assert {"numpy", "gguf", "pytest", "pytest-timeout", "hypothesis", "psutil"} <= names
