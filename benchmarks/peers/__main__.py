"""`python -m benchmarks.peers`: the same work on llamacancel and on its peers, then a report and a plot."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from llamacancel.commands.make_model import cached_model

from .. import machine
from ..server import measure
from ..server.build import BuildFailed, llama_server
from ..server.launch import Kind, Shape, llama_server_kind, ours
from . import report
from .libraries import job_of, run_driver
from .load import loads
from .suite import conformance
from .venvs import PEERS, NotInstalled, bring

NAMES = ("llamacancel", "llama-server", *PEERS)
PARTS = ("stop", "cost", "conformance", "load")
ARCHITECTURES = {"llama": "attention", "mamba": "recurrent"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for.

    Returns:
        0 if all of ours ran; 1 if something of ours failed (what fails elsewhere is a finding); 2 if there is no
        plot, or the earlier runs were others; 130 after Ctrl-C.
    """
    args = _parser().parse_args(argv)
    try:
        from . import plot  # noqa: F401 (early, and not after half an hour)
    except ImportError as error:
        print(f'the plot needs matplotlib: pip install "llamacancel[bench]" ({error})', file=sys.stderr)
        return 2
    if args.report:
        return _finish(_earlier(args.out), args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    results = _nothing(args)
    if args.add:
        earlier = _earlier(args.out)
        if earlier["settings"] != results["settings"]:
            print(f"--add needs the settings of the earlier runs: {earlier['settings']}", file=sys.stderr)
            return 2
        results = earlier
    size = "tiny" if args.quick else "small"
    failures: dict[str, list[str]] = {part: [] for part in ("bring", *args.parts)}
    pythons, kinds = _bring(args, results, failures["bring"])
    run: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.peers", *(sys.argv[1:] if argv is None else argv)]),
        "started": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "interrupted": False,
    }
    watch = machine.Watch()
    begin = time.perf_counter()
    try:
        for part in args.parts:
            began = time.perf_counter()
            if part in ("stop", "cost"):
                _libraries(args, results, pythons, size, part, failures[part])
            elif part == "conformance":
                _conformance(args, results, kinds)
            else:
                sizes = measure.Sizes.quick() if args.quick else measure.Sizes(2, {1: 2, 4: 8, 16: 16})
                settings = measure.Settings.of(cached_model("llama", size), args.threads, args.seed, sizes, text=True)
                results["load"] = loads(settings, kinds, failures[part])
            measure.say(f"{part}: {time.perf_counter() - began:.0f} s")
    except KeyboardInterrupt:
        run["interrupted"] = True
    run |= {"seconds": time.perf_counter() - begin, "watch": watch.result()}
    results["runs"].append(run)
    for part, texts in failures.items():
        of_others = [text for text in results["failures"].get(part, []) if not text.startswith(tuple(args.only))]
        results["failures"][part] = [*of_others, *texts]
    status = _finish(results, args.out)
    if any(text.startswith("llamacancel") for texts in failures.values() for text in texts):
        return 1
    return 130 if run["interrupted"] else status


def _nothing(args: argparse.Namespace) -> dict[str, Any]:
    """The results of a run that has measured nothing yet."""
    return {
        "schema": 2,
        "settings": {"threads": args.threads, "quick": args.quick, "seed": args.seed},
        "machine": machine.describe(),
        "runs": [],
        "failures": {},
        "versions": {},
        "libraries": {},
        "conformance": [],
        "load": [],
    }


def _earlier(out: Path) -> dict[str, Any]:
    """What runs before have written into this folder."""
    found: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return found


def _finish(results: dict[str, Any], out: Path) -> int:
    """Write and print the report, and draw the plot."""
    from . import plot

    results = {**results, **report.summed_up(results["runs"])}
    print(report.write(results, out))
    for path in [out / "report.md", out / "report.json", *plot.draw(results, out)]:
        print(f"wrote {path}", file=sys.stderr)
    return 0


def _bring(
    args: argparse.Namespace, results: dict[str, Any], failures: list[str]
) -> tuple[dict[str, tuple[Path, str]], list[Kind]]:
    """Pythons and drivers of the libraries by name, and the servers. Who cannot be brought is a failure."""
    pythons: dict[str, tuple[Path, str]] = {}
    kinds: list[Kind] = []
    if "llamacancel" in args.only:
        pythons["llamacancel"] = (Path(sys.executable), "llamacancel_library.py")
        kinds.append(ours())
    if "llama-server" in args.only and {"conformance", "load"} & set(args.parts):
        try:
            kinds.append(llama_server_kind(llama_server(args.llama_server)))
            build = "built elsewhere" if args.llama_server else "built here for this CPU from the same sources as ours"
            results["versions"]["llama-server"] = {"llama.cpp": results["machine"]["llama_cpp"], "build": build}
        except BuildFailed as error:
            failures.append(f"llama-server could not be built: {error}")
    for name, peer in PEERS.items():
        if name not in args.only:
            continue
        try:
            python = bring(peer)
        except NotInstalled as error:
            failures.append(f"{name} could not be installed: {error}")
            continue
        if peer.library is not None:
            pythons[name] = (python, peer.library)
        kinds.append(peer.kind(python))
    return pythons, kinds


def _libraries(
    args: argparse.Namespace,
    results: dict[str, Any],
    pythons: dict[str, tuple[Path, str]],
    size: str,
    part: str,
    failures: list[str],
) -> None:
    """One part of what the libraries do, on both models. Takes the place of what an earlier run found of it."""
    for arch, memory in ARCHITECTURES.items():
        job = job_of(cached_model(arch, size), args.threads, args.seed, quick=args.quick, parts=[part])
        rows = results["libraries"].setdefault(f"{arch} ({memory})", [])
        for name, (python, script) in pythons.items():
            measure.say(f"{name}, {arch}, {part}")
            found = run_driver(name, python, script, job, patience=120.0)
            failures += [f"{name}, {arch}, {text}" for text in found["failures"]]
            results["versions"].setdefault(name, found["versions"])
            row = next((row for row in rows if row["peer"] == name), None)
            if row is None:
                rows.append(found)
            else:
                row[part] = found[part]
        rows.sort(key=lambda row: NAMES.index(row["peer"]))


def _conformance(args: argparse.Namespace, results: dict[str, Any], kinds: list[Kind]) -> None:
    """The suite on each server. A model in 32-bit floats repeats itself, whoever it shares a step with."""
    shape = Shape(cached_model("llama", "tiny" if args.quick else "small", quant="f32"), 3, 4096, args.threads)
    found = conformance(
        kinds,
        shape,
        prefill=0.3 if args.quick else args.prefill,
        rounds=2 if args.quick else args.rounds,
        patience=args.patience,
        only=("queued-hang-up",) if args.quick else None,
        pictures=args.out,
    )
    names = {row["server"] for row in found}
    rows = [row for row in results["conformance"] if row["server"] not in names] + found
    results["conformance"] = sorted(rows, key=lambda row: NAMES.index(row["server"]))


def _parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description="Bring other bindings of llama.cpp by name into environments of their own (in "
        "~/.cache/llamacancel/peers), and do the same work on each and on llamacancel: stop a prefill, see what the "
        "next call gives, what being stoppable costs; the conformance suite, throughput and time to first token of "
        "the servers. Takes about half an hour on two quiet cores, and a quarter more when all have to be built. It "
        "can be done in slices: with --add, a part or a peer is added to what the folder has of earlier runs.",
    )
    add = found.add_argument
    add("--only", type=_list_of(NAMES), default=list(NAMES), metavar="NAME,...", help=f"of: {', '.join(NAMES)}")
    add("--parts", type=_list_of(PARTS), default=list(PARTS), metavar="PART,...", help=f"of: {', '.join(PARTS)}")
    add("--add", action="store_true", help="keep what --out has of other parts and peers, from earlier runs")
    add("--report", action="store_true", help="measure nothing: write report and plot again from report.json in --out")
    add("--quick", action="store_true", help="tiny models, a few samples: shows that everything runs")
    add("--llama-server", type=Path, metavar="PATH", help="use this llama-server instead of building one")
    add("--threads", type=int, default=machine.cores(), help="threads to compute with (default: all)")
    add("--prefill", type=float, default=1.0, help="seconds of a long prefill in the suite (default: 1)")
    add("--rounds", type=int, default=20, help="rounds of random hang-ups in the suite (default: 20)")
    add("--patience", type=float, default=420.0, help="seconds that the suite is given on a server (default: 420)")
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
