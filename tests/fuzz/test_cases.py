"""Cases that failed once, and a few fresh ones of each kind."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from .__main__ import fuzz
from .targets import TARGETS
from .tries import CASES, Tries

KEPT = sorted(CASES.glob("*/*.json"))
FRESH = 20


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_case_that_failed_once_does_not_fail_again(path: Path) -> None:
    with Tries(path.parent.name) as tries:
        tries(json.loads(path.read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TARGETS))
def test_what_is_drawn_leaves_process_and_neighbours_as_they_were(name: str) -> None:
    with Tries(name) as tries:
        found = fuzz(name, tries, 1, math.inf, FRESH)
        assert found is None, found
        assert sum(tries.told.values()) >= FRESH
