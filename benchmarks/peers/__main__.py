"""`python -m benchmarks.peers`: the same work on llamacancel and on its peers, then a report and a plot."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from llamacancel.make_model import cached_model

from .. import machine
from ..server import measure
from ..server.build import BuildFailed, llama_server
from ..server.launch import Kind, Shape, llama_server_kind, ours
from . import report
from .libraries import job_of, run_driver
from .suite import conformance
from .venvs import PEERS, NotInstalled, bring

NAMES = ("llamacancel", *PEERS, "llama-server")
PARTS = ("stop", "cost", "conformance", "load")
ARCHITECTURES = {"llama": "attention", "mamba": "recurrent"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for.

    Returns:
        0 if all of ours ran; 1 if something of ours failed (what fails elsewhere is a finding); 2 if there is no
        plot; 130 after Ctrl-C.
    """
    args = _parser().parse_args(argv)
    try:
        from . import plot
    except ImportError as error:
        print(f'the plot needs matplotlib: pip install "llamacancel[bench]" ({error})', file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "schema": 1,
        "command": shlex.join(["python", "-m", "benchmarks.peers", *(sys.argv[1:] if argv is None else argv)]),
        "started": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "settings": {"threads": args.threads, "quick": args.quick, "seed": args.seed, "only": args.only},
        "machine": machine.describe(),
        "interrupted": False,
        "failures": [],
        "versions": {},
        "libraries": {},
        "conformance": [],
        "load": [],
    }
    size = "tiny" if args.quick else "small"
    pythons, kinds = _bring(args, results)
    watch = machine.Watch()
    begin = time.perf_counter()
    try:
        if library_parts := [part for part in ("stop", "cost") if part in args.parts]:
            _libraries(args, results, pythons, size, library_parts)
        model = cached_model("llama", size)
        if "conformance" in args.parts:
            shape = Shape(model, 3, 4096, args.threads)
            results["conformance"] = conformance(
                kinds,
                shape,
                prefill=0.05 if args.quick else args.prefill,
                rounds=2 if args.quick else args.rounds,
                only=("queued-hang-up",) if args.quick else (),
                pictures=args.out,
            )
        if "load" in args.parts:
            sizes = measure.Sizes.quick() if args.quick else measure.Sizes(2, {1: 2, 4: 8, 16: 16})
            settings = measure.Settings.of(model, args.threads, args.seed, sizes, text=True)
            results["load"] = measure.loads(settings, kinds, results["failures"])
    except KeyboardInterrupt:
        results["interrupted"] = True
    results["seconds"] = time.perf_counter() - begin
    results["watch"] = watch.result()
    print(report.write(results, args.out))
    for path in [args.out / "report.md", args.out / "report.json", *plot.draw(results, args.out)]:
        print(f"wrote {path}", file=sys.stderr)
    if any(text.startswith("llamacancel") for text in results["failures"]):
        return 1
    return 130 if results["interrupted"] else 0


def _bring(args: argparse.Namespace, results: dict[str, Any]) -> tuple[dict[str, tuple[Path, str]], list[Kind]]:
    """Pythons and drivers of the libraries by name, and the servers. Who cannot be brought is a failure."""
    pythons: dict[str, tuple[Path, str]] = {}
    kinds: list[Kind] = []
    if "llamacancel" in args.only:
        pythons["llamacancel"] = (Path(sys.executable), "llamacancel_library.py")
        kinds.append(ours())
    if "llama-server" in args.only and {"conformance", "load"} & set(args.parts):
        try:
            kinds.append(llama_server_kind(llama_server(args.llama_server)))
            results["versions"]["llama-server"] = {"llama.cpp": results["machine"]["llama_cpp"], "build": "built here"}
        except BuildFailed as error:
            results["failures"].append(f"llama-server could not be built: {error}")
    for name, peer in PEERS.items():
        if name not in args.only:
            continue
        try:
            python = bring(peer)
        except NotInstalled as error:
            results["failures"].append(f"{name} could not be installed: {error}")
            continue
        if peer.library is not None:
            pythons[name] = (python, peer.library)
        kinds.append(peer.kind(python))
    return pythons, kinds


def _libraries(
    args: argparse.Namespace, results: dict[str, Any], pythons: dict[str, tuple[Path, str]], size: str, parts: list[str]
) -> None:
    for arch, memory in ARCHITECTURES.items():
        job = job_of(cached_model(arch, size), args.threads, args.seed, quick=args.quick, parts=parts)
        rows = results["libraries"].setdefault(f"{arch} ({memory})", [])
        for name, (python, script) in pythons.items():
            measure.say(f"{name}, {arch}")
            row = run_driver(name, python, script, job, patience=120.0)
            rows.append(row)
            results["versions"].setdefault(name, row["versions"])
            results["failures"] += [f"{name}, {arch}, {text}" for text in row["failures"]]


def _parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description="Bring other bindings of llama.cpp by name into environments of their own (in "
        "~/.cache/llamacancel/peers), and do the same work on each and on llamacancel: stop a prefill, see what the "
        "next call gives, what being stoppable costs; the conformance suite, throughput and time to first token of "
        "the servers. Takes about half an hour on two quiet cores, and a quarter more when all have to be built.",
    )
    add = found.add_argument
    add("--only", type=_list_of(NAMES), default=list(NAMES), metavar="NAME,...", help=f"of: {', '.join(NAMES)}")
    add("--parts", type=_list_of(PARTS), default=list(PARTS), metavar="PART,...", help=f"of: {', '.join(PARTS)}")
    add("--quick", action="store_true", help="tiny models, a few samples: shows that everything runs")
    add("--llama-server", type=Path, metavar="PATH", help="use this llama-server instead of building one")
    add("--threads", type=int, default=machine.cores(), help="threads to compute with (default: all)")
    add("--prefill", type=float, default=1.5, help="seconds of a long prefill in the suite (default: 1.5)")
    add("--rounds", type=int, default=30, help="rounds of random hang-ups in the suite (default: 30)")
    add("--out", type=Path, default=Path(__file__).parents[1] / "results" / "peers", help="folder for the report")
    add("--seed", type=int, default=0, help="seed of prompts, orders and moments")
    return found


def _list_of(names: Sequence[str]) -> Any:
    def parse(text: str) -> list[str]:
        given = text.split(",")
        if unknown := [name for name in given if name not in names]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(names)}")
        return given

    return parse


if __name__ == "__main__":
    sys.exit(main())
