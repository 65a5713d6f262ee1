"""The server benchmark runs from end to end with our server alone. No time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

for module in ("matplotlib", "fastapi", "uvicorn", "h11", "gguf"):
    pytest.importorskip(module, reason="the benchmark needs it")

ROOT = Path(__file__).resolve().parents[2]
PHASES = {"queue", "prefill", "first token", "streaming", "not streaming"}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a quick run has filled."""
    folder = tmp_path_factory.mktemp("server") / "results"
    command = [sys.executable, "-m", "benchmarks.server", "--quick", "--alone", "--threads", "1", "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == (folder / "report.md").read_text(encoding="utf-8").strip()
    return folder


@pytest.fixture(scope="module")
def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def test_nothing_fails(report: dict[str, Any]) -> None:
    assert report["failures"] == []
    assert not report["interrupted"]


def test_every_load_is_measured_with_and_without_hang_ups(report: dict[str, Any]) -> None:
    assert [(row["clients"], row["slots"], row["hang_ups"]) for row in report["load"]] == [
        (clients, slots, hang_ups) for clients, slots in ((1, 4), (4, 4), (16, 16)) for hang_ups in (False, True)
    ]


def test_every_answer_has_its_length(report: dict[str, Any]) -> None:
    for row in report["load"]:
        ours = row["servers"]["llamacancel"]
        assert ours["answered"] > 0
        assert ours["failed"] == ours["wrong_length"] == 0
        assert ours["hung_up"] == 0 or row["hang_ups"]
        assert len(ours["throughput"]) == 1
        assert {"median", "p99"} <= ours["ttft"].keys()
        assert (ours["freed"] or {"n": 0})["n"] <= ours["hung_up"]


def test_a_slot_is_seen_to_be_free_after_a_hang_up_in_each_phase(report: dict[str, Any]) -> None:
    (row,) = report["freed"]
    assert row["phases"].keys() == PHASES
    for of in row["phases"].values():
        assert of["exact"]["n"] == of["polled"]["n"] == 1


def test_the_share_of_the_scheduler_is_told_for_the_engine_alone_and_in_the_server(report: dict[str, Any]) -> None:
    parts = [*report["engine"], *(row["servers"]["llamacancel"]["engine"] for row in report["load"])]
    assert len(parts) == 8
    for part in parts:
        assert {"steps", "schedule_seconds", "run_seconds", "commit_seconds", "decode_seconds"} <= part.keys()
        assert part["steps"] > 0


def test_each_target_is_called_reached_or_missed(report: dict[str, Any]) -> None:
    names = [target["name"] for target in report["targets"]]
    assert len(names) == len(PHASES) + 2
    assert sum(name.startswith("hang-up to free slot") for name in names) == len(PHASES)


def test_the_plot_is_drawn_in_both_formats(out: Path) -> None:
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "report.svg").read_text(encoding="utf-8")
