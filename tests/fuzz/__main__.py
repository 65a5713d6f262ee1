"""`python -m tests.fuzz --seconds 600`: draws for each target in turn until the time is over, and keeps what fails."""

from __future__ import annotations

import argparse
import itertools
import secrets
import sys
import time
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from .targets import TARGETS, Wrong
from .tries import Tries, keep

ROUND = 200  # cases of a target before the next one's turn


def fuzz(name: str, tries: Tries, number: int, until: float, most: int = ROUND) -> tuple[Any, Wrong] | None:
    """Draws cases of a target; the smallest that fails, and how, or None."""
    failed: list[tuple[Any, Wrong]] = []

    @seed(number)
    @settings(
        max_examples=most,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        print_blob=False,
    )
    @given(TARGETS[name]().draw)
    def each(case: Any) -> None:
        if time.monotonic() > until and not failed:
            return
        try:
            tries(case)
        except Wrong as error:
            failed.append((case, error))
            raise

    try:
        each()
    except Wrong:
        return failed[-1]  # hypothesis ends with the smallest
    return None


def main() -> int:
    """Draw, tell, and keep."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long, all targets together")
    parser.add_argument("--only", action="append", choices=list(TARGETS), help="of this target alone; may be repeated")
    parser.add_argument("--seed", type=int, default=None, help="draw the same again")
    options = parser.parse_args()
    first = secrets.randbelow(2**32) if options.seed is None else options.seed
    print(f"seed {first}", flush=True)
    names = options.only or list(TARGETS)
    all_tries = {name: Tries(name) for name in names}
    until, n_failed = time.monotonic() + options.seconds, 0
    for number, name in zip(itertools.count(first), itertools.cycle(names), strict=False):
        if time.monotonic() > until:
            break
        found = fuzz(name, all_tries[name], number, until)
        if found is not None:
            n_failed += 1
            case, error = found
            print(f"{name}: FAILED (kept as {keep(name, case)})\n{error}", flush=True)
    for name, tries in all_tries.items():
        with tries:
            told = ", ".join(f"{what} {n}" for what, n in tries.told.most_common())
            print(f"{name:8} {sum(tries.told.values()):7} cases: {told or 'none'}", flush=True)
    return 1 if n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
