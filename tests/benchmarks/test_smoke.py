"""The benchmarks run from end to end and leave a report, its figures and a plot. No time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the plot needs it")

pytestmark = pytest.mark.timeout(1800)  # on a slow and busy machine

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = {"llama", "moe", "swa", "mamba", "hybrid", "hybrid-swa"}
MEMORY_KINDS = {"attention", "sliding_window", "recurrent", "hybrid", "hybrid_sliding_window"}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a quick run has filled."""
    folder = tmp_path_factory.mktemp("benchmarks") / "results"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--threads", "1", "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == (folder / "report.md").read_text(encoding="utf-8").strip()
    return folder


@pytest.fixture(scope="module")
def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def test_the_report_says_what_machine_it_ran_on(out: Path, report: dict[str, Any]) -> None:
    assert {"cpu", "cores", "memory_gb", "build", "git_commit", "llama_cpp_commit"} <= report["machine"].keys()
    assert {"load_before", "load_after", "busy"} <= report["watch"].keys()
    assert f"{report['machine']['cores']} cores" in (out / "report.md").read_text(encoding="utf-8")


def test_a_token_is_compared_with_none_and_with_the_bare_call_for_all_architectures(report: dict[str, Any]) -> None:
    rows = report["token_cost"]
    assert {(row["arch"], row["work"]) for row in rows} == {
        (arch, work) for arch in ARCHITECTURES for work in ("prefill", "single-token")
    }
    for row in rows:
        assert row["ratios"].keys() == {"token / no token", "deadline / no token", "no token / bare", "token / bare"}
        assert all(ratio["low"] <= ratio["median"] <= ratio["high"] for ratio in row["ratios"].values())


def test_cancels_are_honoured_for_the_small_models_and_for_each_cut_of_the_large_one(report: dict[str, Any]) -> None:
    cases = {case["key"]: case for case in report["latency"]}
    assert {"small llama", "1b aim 0.02", "1b aim 0.01", "1b n_ubatch 512", "1b n_ubatch 64"} <= cases.keys()
    for case in cases.values():
        assert case["honoured"] == len(case["samples"]) > 0
        assert case["latency"].keys() == {"n", "median", "p90", "p99", "max", "mean"}
        assert case["repair_share"]["n"] == case["honoured"]
    assert len(report["throughput"]["variants"]) == 5


def test_snapshot_and_repair_are_measured_for_each_kind_of_memory(report: dict[str, Any]) -> None:
    rows = report["repair"]
    assert {row["memory_kind"] for row in rows} == MEMORY_KINDS
    for row in rows:
        assert {"snapshot_bytes", "guard_seconds"} <= row["single_row"].keys()
        assert {"snapshot_bytes", "repair"} <= row["cancelled"].keys()
        assert {"snapshot_bytes", "repair"} <= row["one_of_two"].keys()
    saved = {row["memory_kind"]: row["single_row"]["snapshot_bytes"] for row in rows}
    assert saved["attention"] == 0
    assert all(size > 0 for kind, size in saved.items() if kind != "attention")


def test_pieces_of_a_graph_are_compared_with_the_whole(report: dict[str, Any]) -> None:
    rows = report["pieces"]
    assert {(row["model"], row["work"]) for row in rows} == {
        (model, work) for model in ("small model", "1 B shape") for work in ("prefill", "single-token")
    }
    for row in rows:
        assert row["throughput"].keys() == row["pieces"].keys() >= {"chosen"}
        assert all(ratio["low"] <= ratio["median"] <= ratio["high"] for ratio in row["throughput"].values())


def test_calls_that_were_rolled_back_give_the_same_bits_when_done_again(report: dict[str, Any]) -> None:
    parts = [*report["latency"], *(row["cancelled"] for row in report["repair"])]
    assert sum(part["redone"] for part in parts) >= len(parts)
    assert sum(part["wrong_bits"] for part in parts) == 0


def test_each_target_is_called_reached_or_missed(report: dict[str, Any]) -> None:
    assert len(report["targets"]) >= 2 * len(report["token_cost"]) + 5
    for target in report["targets"]:
        assert {"name", "measured", "limit", "sense", "unit", "reached"} <= target.keys()


def test_the_plot_is_drawn_in_both_formats(out: Path) -> None:
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "report.svg").read_text(encoding="utf-8")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the clock is put before the C library's")
def test_the_gaps_between_looks_are_measured() -> None:
    command = [sys.executable, "-m", "benchmarks.gaps", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    row = done.stdout.splitlines()[-1].split("|")
    assert all(float(gap) > 0 for gap in row[3:5])
