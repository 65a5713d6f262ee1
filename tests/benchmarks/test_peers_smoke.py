"""The benchmark of the peers runs from end to end with llamacancel alone. No time is asserted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

for module in ("matplotlib", "fastapi", "uvicorn", "h11", "gguf"):
    pytest.importorskip(module, reason="the benchmark needs it")

from benchmarks.peers.libraries import Job, run_driver  # noqa: E402 (after the skips)
from benchmarks.peers.venvs import PEERS, NotInstalled, Peer, bring  # noqa: E402 (after the skips)

ROOT = Path(__file__).resolve().parents[2]
NO_JOB = Job("no model", 2, 2048, 2048, 512, [], [], "", 8, 1, 1, ["stop"], 0)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a quick run has filled."""
    folder = tmp_path_factory.mktemp("peers") / "results"
    command = [sys.executable, "-m", "benchmarks.peers", "--quick", "--only", "llamacancel", "--threads", "1"]
    command += ["--parts", "stop,cost,conformance", "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def test_nothing_of_ours_fails(report: dict[str, Any]) -> None:
    assert set(report["failures"]) == {"bring", "stop", "cost", "conformance"}
    assert not any(report["failures"].values())
    assert not report["interrupted"]


def test_it_is_an_attention_and_a_recurrent_model(report: dict[str, Any]) -> None:
    assert report["libraries"].keys() == {"llama (attention)", "mamba (recurrent)"}


def test_after_a_stop_the_next_calls_are_right(report: dict[str, Any]) -> None:
    for (row,) in report["libraries"].values():
        assert row["stop"].keys() == {"CancelToken", "Engine"}
        for of in row["stop"].values():
            assert of["repeats"]
            assert len(of["samples"]) == 2
            assert {sample["history"] for sample in of["samples"]} == {False, True}
            assert {sample["next"] for sample in of["samples"]} == {"right"}
            assert {sample["again"] for sample in of["samples"]} == {"right"}


def test_a_stop_that_was_asked_for_before_the_call_keeps_it_from_starting(report: dict[str, Any]) -> None:
    for (row,) in report["libraries"].values():
        assert {of["early"] for of in row["stop"].values()} == {"raises DecodeCancelled"}


def test_the_threads_and_sizes_that_were_asked_for_are_read_back(report: dict[str, Any]) -> None:
    for (row,) in report["libraries"].values():
        assert row["settings"].keys() == {"CancelToken", "Engine"}
        for found in row["settings"].values():
            assert found == {"n_threads": 1, "n_threads_batch": 1, "n_ctx": 2048, "n_batch": 2048, "n_ubatch": 512}


def test_the_cost_is_measured_alone_and_beside_a_busy_thread(report: dict[str, Any]) -> None:
    for (row,) in report["libraries"].values():
        for of in row["cost"].values():
            assert of["ratios"].keys() == {"alone", "busy"}


def test_the_suite_has_judged_our_server(report: dict[str, Any]) -> None:
    (row,) = report["conformance"]
    assert row["failure"] is None
    assert "queued-hang-up" in {scenario["name"] for scenario in row["scenarios"]}


def test_table_and_plot_are_written(out: Path) -> None:
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "| llamacancel | Engine " in text
    assert "4 of 4" in text
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")


def test_another_run_is_added_to_what_there_is(report: dict[str, Any], out: Path, tmp_path: Path) -> None:
    shutil.copy(out / "report.json", tmp_path)
    command = [sys.executable, "-m", "benchmarks.peers", "--quick", "--only", "llamacancel", "--threads", "1"]
    command += ["--parts", "conformance", "--add", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert found["libraries"] == report["libraries"]
    assert len(found["runs"]) == 2
    assert [row["server"] for row in found["conformance"]] == ["llamacancel"]


def test_a_run_with_other_settings_is_not_added(out: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.peers", "--quick", "--threads", "2", "--add", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 2
    assert "--add needs the settings of the earlier runs" in done.stderr


def test_a_peer_that_computes_with_other_settings_fails_or_dies_is_told(tmp_path: Path) -> None:
    told = [
        {"event": "begin", "part": "stop", "way": "flag"},
        {"event": "settings", "way": "flag", "found": {"n_threads": 4, "n_ubatch": 512}},
        {"event": "failed", "part": "stop", "way": "flag", "message": "RuntimeError: no"},
    ]
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import json, sys\n"
        "ways = json.load(sys.stdin)['ways']\n"
        "first = {'event': 'versions', 'versions': {'peer': '0.1'}, 'ways': {'flag': '', 'crash': ''}}\n"
        f"for line in {told!r} if ways == ['flag'] else [] if ways else [first]:\n"
        "    print(json.dumps(line), flush=True)\n"
        "exit(3 if ways == ['crash'] else 0)\n"
    )
    found = run_driver("peer", Path(sys.executable), str(driver), NO_JOB, patience=60.0)
    assert found["failures"] == [
        "flag, stop: RuntimeError: no",
        "its start: its process ended with status 3",
        "flag: it computes with n_threads=4 instead of 2",
    ]
    assert found["stop"]["flag"]["broken"]
    assert found["stop"]["crash"]["broken"]


def test_a_peer_that_hangs_is_ended_and_told(tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text("import time\ntime.sleep(600)\n")
    found = run_driver("peer", Path(sys.executable), str(driver), NO_JOB, patience=2.0)
    assert found["failures"] == ["its start: nothing came for 2 s: it hangs"]


def test_a_peer_that_cannot_be_installed_is_told_with_what_pip_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMACANCEL_BENCH_CACHE", str(tmp_path))
    nowhere = tmp_path / "no-such-folder" / "peer-0.1-py3-none-any.whl"
    peer = Peer("nobody", "nobody", str(nowhere), None, lambda python, shape, port: [], pip=("--no-index",))
    with pytest.raises(NotInstalled, match="pip failed"):
        bring(peer)


def test_every_peer_has_a_driver() -> None:
    drivers = ROOT / "benchmarks" / "peers" / "drivers"
    assert PEERS.keys() == {"llama-cpp-python", "cyllama", "xllamacpp"}
    assert all(peer.library and os.path.isfile(drivers / peer.library) for peer in PEERS.values())
