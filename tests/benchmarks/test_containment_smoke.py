"""The containment benchmark runs from end to end. No time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

for module in ("fastapi", "uvicorn", "h11", "gguf"):
    pytest.importorskip(module, reason="the benchmark needs it")

from benchmarks.containment.attacks import ATTACKS, Facts, engine_request  # noqa: E402
from benchmarks.containment.measure import longest_gap  # noqa: E402
from benchmarks.containment.report import beyond  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CHOSEN = "cancels"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a quick run of some attacks has written."""
    folder = tmp_path_factory.mktemp("containment") / "results"
    command = [sys.executable, "-m", "benchmarks.containment", "--quick", "--threads", "1", "--match", CHOSEN]
    done = subprocess.run(
        [*command, "--out", str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == (folder / "report.md").read_text(encoding="utf-8").strip()
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_each_attack_has_a_row_at_the_server_and_at_the_engine(report: dict[str, Any]) -> None:
    names = [attack.name for attack in ATTACKS if CHOSEN in attack.name]
    assert len(names) > 1
    assert [(row["where"], row["attack"]) for row in report["rows"]] == [
        (where, name) for where in ("server", "engine") for name in names
    ]
    assert report["failures"] == []


def test_a_row_tells_what_strangers_got_and_how_long_the_neighbour_waited(report: dict[str, Any]) -> None:
    for row in report["rows"]:
        assert sum(row["answers"].values()) > 0
        assert len(row["alone"]) == len(row["beside"]) == 1
        assert min(row["alone"] + row["beside"]) > 0
        assert row["more_worst"] == pytest.approx(row["beside"][0] - row["alone"][0], abs=1e-5)


def test_the_names_of_attacks_are_their_own_and_each_body_can_be_sent() -> None:
    facts = Facts(n_vocab=32000, long=2000)
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)
    for attack in ATTACKS:
        assert len(json.dumps(attack.fields(facts), ensure_ascii=False).encode()) <= 4 * 2**20, attack.name
        if attack.in_engine:
            assert engine_request(attack, facts)[0] in ("submit", "embed")


def test_the_longest_gap_is_one_that_lies_in_the_window_if_only_in_part() -> None:
    times = [0.0, 5.0, 6.0, 8.0, 9.0, 19.0]
    assert longest_gap(times, 5.5, 8.5) == 2.0
    assert longest_gap(times, 4.0, 8.5) == 5.0
    assert longest_gap(times, 8.5, 9.5) == 10.0
    with pytest.raises(ValueError, match="empty"):
        longest_gap(times, 20.0, 21.0)


def test_more_than_a_step_in_the_median_is_beyond() -> None:
    rows = [{"more_median": 0.3}, {"more_median": 0.5}]
    assert beyond({"rows": rows, "settings": {"step_seconds": 0.4}}) == rows[1:]
