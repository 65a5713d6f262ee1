"""Random schedules of everything that a context can do, cancels included, against a twin that sees no cancel.

`schedules.py` draws and judges them; `make soak` runs many more.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

import llamacancel as lc

from .clock import Clock
from .schedules import ARCHS, Counts, run_one

pytestmark = pytest.mark.timeout(1800)  # on a slow and busy machine

EXAMPLES = int(os.environ.get("LLAMACANCEL_EXAMPLES", "20"))
FIRST_SEED = 10**9  # the long runs begin at 0


@pytest.mark.parametrize("arch", ARCHS)
def test_a_random_schedule_leaves_what_a_schedule_without_cancels_leaves(
    arch: str, model_of: Callable[[str], lc.Model]
) -> None:
    Clock()  # skips the test where there is none
    counts = Counts()
    for seed in range(FIRST_SEED, FIRST_SEED + EXAMPLES):
        run_one(model_of(arch), arch, seed, counts)
    assert counts.failures == [], counts.failures[0][2]
    assert counts.cancels.total() > 5 * EXAMPLES
    assert {"rollback", "keep", "load", "all, rollback", "some, rollback", "some, keep"} <= set(counts.cancels)
