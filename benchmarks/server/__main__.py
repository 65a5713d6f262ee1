"""`python -m benchmarks.server`: our server against llama.cpp's own, then a report and a plot."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from llamacancel.commands.make_model import cached_model

from .. import machine
from . import measure, report
from .build import BuildFailed, llama_server
from .launch import Kind, llama_server_kind, ours

PARTS = ("load", "freed", "engine")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurements that the command line asks for.

    Returns:
        0 if all ran, whatever they showed; 1 if something failed; 2 if there is no plot or no model; 130 after Ctrl-C.
    """
    args = parser().parse_args(argv)
    try:
        from . import plot
    except ImportError as error:
        print(f'the plot needs matplotlib: pip install "llamacancel[bench]" ({error})', file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "schema": 1,
        "command": shlex.join(["python", "-m", "benchmarks.server", *(sys.argv[1:] if argv is None else argv)]),
        "started": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "settings": {"threads": args.threads, "quick": args.quick, "seed": args.seed, "only": args.only},
        "machine": machine.describe(),
        "interrupted": False,
        "failures": [],
        "load": [],
        "freed": [],
        "engine": [],
    }
    sizes = measure.Sizes.quick() if args.quick else measure.Sizes(rounds=args.rounds, trials=args.trials)
    model = args.model or cached_model(args.arch, "tiny" if args.quick else "small")
    settings = measure.Settings.of(model, args.threads, args.seed, sizes)
    results["settings"]["model"] = model.name
    kinds = _kinds(args, results["failures"])
    watch = machine.Watch()
    if watch.others_before is not None and watch.others_before > machine.BUSY_CORES:
        print(f"warning: other processes keep {watch.others_before:.2f} cores busy", file=sys.stderr)
    begin = time.perf_counter()
    try:
        if "engine" in args.only:
            results["engine"] = measure.engine_steps(settings)
        if "load" in args.only:
            results["load"] = measure.loads(settings, kinds, results["failures"])
        if "freed" in args.only:
            results["freed"] = measure.freed(settings, kinds, results["failures"])
    except KeyboardInterrupt:
        results["interrupted"] = True
    results["seconds"] = time.perf_counter() - begin
    results["watch"] = watch.result()
    results["targets"] = report.targets(results)
    print(report.write(results, args.out))
    for path in [args.out / "report.md", args.out / "report.json", *plot.draw(results, args.out)]:
        print(f"wrote {path}", file=sys.stderr)
    if results["failures"]:
        return 1
    return 130 if results["interrupted"] else 0


def _kinds(args: argparse.Namespace, failures: list[str]) -> list[Kind]:
    """Ours first; the others are compared with it."""
    kinds = [ours()]
    if args.alone:
        return kinds
    try:
        path = llama_server(args.llama_server)
    except BuildFailed as error:
        failures.append(f"llama-server: {error}")
        return kinds
    kinds.append(llama_server_kind(path))
    if args.unified:
        kinds.append(llama_server_kind(path, "llama-server --kv-unified", "--kv-unified"))
    return kinds


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.server",
        description="Run our server and llama.cpp's own in turn, on a model made on the spot: throughput and time to "
        "first token at 1, 4 and 16 clients, without hang-ups and with a third of the clients hanging up; from a "
        "hang-up to a free slot in each phase; and the scheduler's share of a step. llama-server is built from "
        "vendor/llama.cpp with our own options when it is missing. Takes about 15 minutes on two quiet cores.",
    )
    add = found.add_argument
    add("--only", type=_parts, default=list(PARTS), metavar="PART,...", help=f"of: {', '.join(PARTS)}")
    add("--quick", action="store_true", help="a tiny model, a few requests: shows that everything runs")
    add("--alone", action="store_true", help="our server alone")
    add("--unified", action="store_true", help="llama-server with --kv-unified, too")
    add("--llama-server", type=Path, metavar="PATH", help="use this llama-server instead of building one")
    add("--model", type=Path, metavar="PATH", help="use this model instead of making one")
    add("--arch", default="llama", help="architecture of the model that is made (default: llama)")
    add("--threads", type=int, default=machine.cores(), help="threads to compute with (default: all)")
    add("--rounds", type=int, default=5, help="rounds of each load (default: 5)")
    add("--trials", type=int, default=40, help="hang-ups in each phase (default: 40)")
    add("--out", type=Path, default=Path(__file__).parents[1] / "results" / "server", help="folder for the report")
    add("--seed", type=int, default=0, help="seed of prompts, orders and moments")
    return found


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(PARTS)}")
    return parts


if __name__ == "__main__":
    sys.exit(main())
