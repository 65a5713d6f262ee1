"""`python -m benchmarks.policy`: what each constant of the scheduler buys, in computed time."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

import llamacancel as lc
from llamacancel.engine.scheduler import policy

from .costs import SMALL, Costs, measured
from .loads import LOADS
from .play import Load, play

OFF = {
    "_TILE_ROWS": 1,
    "_LONG_SECONDS": math.inf,
    "_PASSED_OVER": math.inf,
    "_PATIENCE": 0.0,
    "_PATIENCE_SHARE": 0.0,
    "_NEWEST": 1.0,
    "_NEWEST_LINE": 1e-9,
}
"""The value of each constant with which it does nothing."""

COLUMNS = ("tokens/s", "first token", "99 %", "longest gap", "slot free, 99 %")
Row = tuple[float, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table for each load: as it is, then with each constant off, halved and doubled."""
    args = parser().parse_args(argv)
    costs = SMALL
    if args.model is not None:
        with lc.Model.load(args.model) as model:
            costs = measured(model)
    loads = [load for load in LOADS if args.match in load.name]
    rounds = 1 if args.quick else args.rounds
    base = {load.name: played(load, costs, rounds) for load in loads}
    print("\n| load | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for load in loads:
        print(f"| {load.name} | {told(base[load.name])} |")
    print("\nChanges of these columns in percent, a column of loads each:\n")
    print("| constant | " + " | ".join(load.name for load in loads) + " |\n|" + "---|" * (len(loads) + 1))
    names = [name for name in OFF if args.constant in name]
    for name in names:
        for what, value in values(name, args.quick):
            with constant(name, value):
                changes = [changed(base[load.name], played(load, costs, rounds)) for load in loads]
            print(f"| `{name}` {what} | " + " | ".join(changes) + " |", flush=True)
    return 0


def values(name: str, quick: bool) -> Iterator[tuple[str, float]]:
    """What a constant is set to."""
    now = getattr(policy, name)
    yield "off", OFF[name]
    if not quick:
        yield "halved", type(now)(now / 2)
        yield "doubled", now * 2


@contextlib.contextmanager
def constant(name: str, value: float) -> Iterator[None]:
    """Within, a constant of the scheduler has another value."""
    before = getattr(policy, name)
    setattr(policy, name, value)
    try:
        yield
    finally:
        setattr(policy, name, before)


def played(load: Load, costs: Costs, rounds: int) -> Row:
    """Of all rounds, what `COLUMNS` says: the first token's mean and 99 %, and from a cancel to its slot being free."""
    found = [play(load, costs, seed) for seed in range(rounds)]
    first = [each for one in found for each in one.first]
    gaps = [each for one in found for each in one.gaps]
    freed = [each for one in found for each in one.freed] or [0.0]
    return (
        sum(one.tokens for one in found) / sum(one.seconds for one in found),
        float(np.mean(first)),
        float(np.percentile(first, 99)),
        max(gaps),
        float(np.percentile(freed, 99)),
    )


def told(row: Row) -> str:
    """A row in words."""
    return " | ".join([f"{row[0]:.1f}", *(f"{each:.3f} s" for each in row[1:])])


def changed(base: Row, row: Row) -> str:
    """What is other than in `base`, in percent."""
    return " ".join(f"{100 * (new / old - 1):+.1f}" if old else "." for old, new in zip(base, row, strict=True))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python -m benchmarks.policy", description=__doc__)
    add = found.add_argument
    add("--match", default="", metavar="TEXT", help="those loads alone in whose name this is")
    add("--constant", default="", metavar="TEXT", help="those constants alone in whose name this is")
    add("--model", type=Path, metavar="PATH", help="measure the costs of this model here instead of taking those known")
    add("--rounds", type=int, default=8, help="times that each load is drawn (default: 8)")
    add("--quick", action="store_true", help="one round: shows that everything runs")
    return found


if __name__ == "__main__":
    sys.exit(main())
