"""`python -m benchmarks.containment`: a neighbour's stream beside the worst that strangers may send, then a report."""

from __future__ import annotations

import argparse
import inspect
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import llamacancel as lc
from llamacancel.commands.make_model import cached_model

from .. import machine
from . import measure, report
from .attacks import ATTACKS

PARTS = {"server": measure.beside_server, "engine": measure.beside_engine}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurements that the command line asks for.

    Returns:
        0 if all ran, whatever they showed; 1 if something failed; 130 after Ctrl-C.
    """
    args = parser().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    attacks = [attack for attack in ATTACKS if args.match in attack.name]
    model = args.model or cached_model(args.arch, "tiny" if args.quick else "small")
    rounds, seconds, n_ctx = (1, 0.2, 4096) if args.quick else (args.rounds, args.seconds, args.ctx_size)
    settings = measure.Settings.of(model, args.threads, args.seed, rounds, seconds, n_ctx)
    results: dict[str, Any] = {
        "schema": 1,
        "command": shlex.join(["python", "-m", "benchmarks.containment", *(sys.argv[1:] if argv is None else argv)]),
        "started": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "settings": {
            "threads": args.threads,
            "quick": args.quick,
            "seed": args.seed,
            "rounds": rounds,
            "seconds": seconds,
            "model": model.name,
            "step_seconds": inspect.signature(lc.Engine).parameters["step_seconds"].default,
        },
        "machine": machine.describe(),
        "interrupted": False,
        "failures": [],
        "rows": [],
    }
    watch = machine.Watch()
    begin = time.perf_counter()
    try:
        for name in args.only:
            try:
                results["rows"] += PARTS[name](settings, attacks)
            except (RuntimeError, OSError) as error:
                results["failures"].append(f"{name}: {error}")
    except KeyboardInterrupt:
        results["interrupted"] = True
    results["seconds"] = time.perf_counter() - begin
    results["watch"] = watch.result()
    print(report.write(results, args.out))
    for path in (args.out / "report.md", args.out / "report.json"):
        print(f"wrote {path}", file=sys.stderr)
    if results["failures"]:
        return 1
    return 130 if results["interrupted"] else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.containment",
        description="Measure the longest time between two pieces of a neighbour's text, alone and beside strangers who "
        "send the largest and the worst that is allowed: over HTTP from a server of ours, and in the engine alone. "
        "Takes about 20 minutes.",
    )
    add = found.add_argument
    add("--only", type=_parts, default=list(PARTS), metavar="PART,...", help=f"of: {', '.join(PARTS)}")
    add("--match", default="", metavar="TEXT", help="those attacks alone in whose name this is")
    add("--quick", action="store_true", help="a tiny model, a moment each: shows that everything runs")
    add("--model", type=Path, metavar="PATH", help="use this model instead of making one")
    add("--arch", default="llama", help="architecture of the model that is made (default: llama)")
    add("--threads", type=int, default=machine.cores(), help="threads to compute with (default: all)")
    add("--rounds", type=int, default=3, help="measurements of each attack (default: 3)")
    add("--seconds", type=float, default=3.0, help="how long each is, alone and beside (default: 3)")
    add("--ctx-size", type=int, default=4096, help="tokens of context for each slot (default: 4096)")
    add("--out", type=Path, default=Path(__file__).parents[1] / "results" / "containment", help="folder for the report")
    add("--seed", type=int, default=0, help="seed of the orders")
    return found


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(PARTS)}")
    return parts


if __name__ == "__main__":
    sys.exit(main())
