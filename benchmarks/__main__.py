"""`python -m benchmarks`: measure, then write a report and a plot."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from . import latency, machine, pieces, repair, report, token_cost
from .workload import Progress, Settings

PARTS = {"token": token_cost.steps, "latency": latency.steps, "repair": repair.steps, "pieces": pieces.steps}
SECTIONS = {
    "cost of a token": "token_cost",
    "latency of a cancel": "latency",
    "throughput": "throughput",
    "snapshot and repair": "repair",
    "pieces of a graph": "pieces",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurements that the command line asks for.

    Returns:
        0 if all ran, whatever they showed; 1 if a rolled back call gave other bits when it was done again;
        130 if it was stopped with Ctrl-C (what was measured by then is reported).
    """
    args = _parser().parse_args(argv)
    try:
        from . import plot
    except ImportError as error:
        print(f'the plot needs matplotlib: pip install "llamacancel[bench]" ({error})', file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    settings = Settings(args.threads, args.quick, args.seed, not args.no_1b)
    results: dict[str, Any] = {
        "schema": 1,
        "command": shlex.join(["python", "-m", "benchmarks", *(sys.argv[1:] if argv is None else argv)]),
        "started": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "settings": {"threads": args.threads, "quick": args.quick, "seed": args.seed, "only": args.only},
        "machine": machine.describe(),
        "interrupted": False,
        "token_cost": [],
        "latency": [],
        "throughput": None,
        "repair": [],
        "pieces": [],
    }
    watch = machine.Watch()
    if watch.others_before is not None and watch.others_before > machine.BUSY_CORES:
        print(
            f"warning: other processes keep {watch.others_before:.2f} cores busy; figures will be doubtful",
            file=sys.stderr,
        )
    begin = time.perf_counter()
    results["interrupted"] = not _measure(settings, args.only, results)
    results["seconds"] = time.perf_counter() - begin
    results["watch"] = watch.result()
    results["targets"] = report.targets(results)
    print(report.write(results, args.out))
    for path in [args.out / "report.md", args.out / "report.json", *plot.draw(results, args.out)]:
        print(f"wrote {path}", file=sys.stderr)
    wrong = report.verified(results)[1]
    if wrong:
        print(f"BROKEN: {wrong} calls that were rolled back gave other bits when done again", file=sys.stderr)
        return 1
    return 130 if results["interrupted"] else 0


def _measure(settings: Settings, only: Sequence[str], results: dict[str, Any]) -> bool:
    """Run all steps; False if Ctrl-C ended them."""
    steps = [step for part in PARTS if part in only for step in PARTS[part](settings)]
    progress = Progress(steps)
    with settings.models:
        try:
            for i, step in enumerate(steps):
                found = step.run(progress.begin(i))
                section = SECTIONS[step.section]
                if isinstance(results[section], list):
                    results[section].append(found)
                else:
                    results[section] = found
        except KeyboardInterrupt:
            return False
    progress.finish()
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure what a token costs, how soon a cancel is honoured, what a rollback takes, and what it "
        "costs to hand work over in pieces, as to a GPU (which `python -m benchmarks.gpu` measures). Models are "
        "made on the spot and kept in ~/.cache/llamacancel (1.4 GB in all). A full run takes about 15 minutes on "
        "two quiet cores; close other programs first.",
    )
    parser.add_argument("--only", type=_parts, default=list(PARTS), metavar="PART,...", help=f"of: {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="tiny models, few samples: shows that everything runs")
    parser.add_argument("--threads", type=int, default=machine.cores(), help="threads to compute with (default: all)")
    parser.add_argument(
        "--no-1b", action="store_true", help="leave out the model of 1 B parameters (1.1 GB, half the time)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="folder for report and plot"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts, orders and moments")
    return parser


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(PARTS)}")
    return parts


if __name__ == "__main__":
    sys.exit(main())
