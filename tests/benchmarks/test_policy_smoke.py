"""The scheduler's benchmark runs from end to end, and the same seed gives the same. No figure is asserted."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from benchmarks.policy import __main__ as policy_benchmark
from benchmarks.policy.costs import SMALL
from benchmarks.policy.loads import LOADS
from benchmarks.policy.play import Client, Load, play
from llamacancel.engine.scheduler import policy


def test_it_prints_a_row_for_each_load_and_each_constant(capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: getattr(policy, name) for name in policy_benchmark.OFF}
    assert policy_benchmark.main(["--quick", "--match", "clients", "--constant", "PATIENCE"]) == 0
    printed = capsys.readouterr().out
    for load in LOADS:
        assert (f"| {load.name} |" in printed) == ("clients" in load.name)
    assert "| `_PATIENCE` off |" in printed
    assert {name: getattr(policy, name) for name in policy_benchmark.OFF} == before


def test_every_constant_of_the_policy_can_be_switched_off() -> None:
    numbers = {name for name, value in vars(policy).items() if name.startswith("_") and isinstance(value, int | float)}
    assert set(policy_benchmark.OFF) | {"_FEW_ROWS"} == numbers  # forced rows are in none of the loads


def test_the_same_seed_gives_the_same_and_everybody_is_answered_once() -> None:
    load = next(load for load in LOADS if load.name == "4 clients, a third hang up")
    assert dataclasses.asdict(play(load, SMALL, 3)) == dataclasses.asdict(play(load, SMALL, 3))
    calm = play(Load("calm", (Client((20, 300), 7, requests=3),) * 4, 2), SMALL, 0)
    assert (len(calm.first), calm.tokens, calm.freed) == (12, 12 * 7, [])


def test_costs_are_those_of_the_table_and_between_them_a_line() -> None:
    assert SMALL.prompt(1024, 64) == SMALL.table[1, SMALL.rows.index(64)]
    assert math.isclose(SMALL.prompt(512, 64), np.mean(SMALL.table[:2, SMALL.rows.index(64)]))
    assert SMALL.singles([0]) == SMALL.prompt(0, 1)
