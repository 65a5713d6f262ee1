"""The suite's command line."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

__all__ = ["add_arguments", "run"]

_EPILOG = """
It is for servers on this machine, and for others that belong to you: it hangs up on purpose, many times, keeps the
server busy for minutes and may find the bug that takes it down. A host that is not loopback needs --i-own-this-server.

Exit status: 0 everything passed or could not be judged, 1 something failed, 2 the server could not be reached.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the suite's options to a parser."""
    parser.epilog = " ".join(_EPILOG.split())
    add = parser.add_argument
    add("--url", help="the server, as http://127.0.0.1:8080/v1")
    add("--model", help="the model's name in requests (default: the first that the server lists)")
    add("--slots", type=_positive, metavar="N", help="how many requests it works on at once (default: find out)")
    add("--endpoint", choices=["auto", "completions", "chat"], default="auto", help="(default: auto)")
    add("--api-key", metavar="KEY", help="bearer token")
    add("--only", action="append", metavar="NAME", help="run this scenario only; may be repeated")
    add("--list", action="store_true", help="list the scenarios with their claims and end")
    add("--rounds", type=_positive, default=100, metavar="N", help="rounds of random hang-ups (default: 100)")
    add("--seed", type=int, default=1, metavar="N", help="of everything random (default: 1)")
    add(
        "--prefill",
        type=_seconds,
        default=3.0,
        metavar="SECONDS",
        help="how long the prefill of a long prompt should take (default: 3)",
    )
    add(
        "--grace",
        type=_seconds,
        default=20.0,
        metavar="SECONDS",
        help="how much later than six times the expected time something counts as hanging (default: 20)",
    )
    add("--json", type=Path, metavar="FILE", help="write everything that was found")
    add("--junit", type=Path, metavar="FILE", help="write JUnit XML")
    add("--picture", type=Path, metavar="FILE.svg", help="draw every scenario's clients over time")
    add("--i-own-this-server", action="store_true", help="run against a host that is not this machine")


def run(args: argparse.Namespace) -> int:
    """Run the suite and return the exit status."""
    from .profile import ServerUnreachable
    from .runner import run_suite
    from .scenarios import SCENARIOS
    from .settings import Settings
    from .wire import Target

    out = _writer(sys.stdout)
    if args.list:
        for scenario in SCENARIOS.values():
            out(scenario.name)
            out(textwrap.fill(scenario.claim, 116, initial_indent="    ", subsequent_indent="    "))
        return 0
    say = _writer(sys.stderr)
    unknown = sorted(set(args.only or ()) - SCENARIOS.keys())
    if unknown:
        say(f"conformance: there is no scenario {', '.join(unknown)}; --list names them")
        return 2
    if not args.url:
        say("conformance: --url is needed, as --url http://127.0.0.1:8080/v1")
        return 2
    try:
        target = Target.parse(args.url)
    except ValueError as error:
        say(f"conformance: {error}")
        return 2
    if not args.i_own_this_server and not target.is_loopback():
        say(
            f"conformance: {target.host} is not this machine. The suite hangs up on purpose, many times: "
            "it is for servers that belong to you. If this one does, say --i-own-this-server."
        )
        return 2
    settings = Settings(
        target,
        model=args.model,
        slots=args.slots,
        endpoint=args.endpoint,
        key=args.api_key,
        prefill=args.prefill,
        rounds=args.rounds,
        seed=args.seed,
        grace=args.grace,
    )

    from .reports import as_json, as_junit, as_picture, summary, table_head, table_row

    head = [table_head()]

    def show(row: str) -> None:
        while head:
            out(head.pop())
        out(row)

    try:
        report = asyncio.run(run_suite(settings, only=args.only, say=say, took=lambda result: show(table_row(result))))
    except ServerUnreachable as error:
        say(f"conformance: {args.url} cannot be judged: {error}")
        return 2
    out(summary(report))
    for path, text in ((args.json, as_json), (args.junit, as_junit), (args.picture, as_picture)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text(report), encoding="utf-8")
    return 1 if report.count("failed") else 0


def _writer(stream: object) -> Callable[[str], None]:
    """Return a function that writes a line and flushes, and goes on in silence when nobody reads any more."""

    def write(line: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            stream.write(line + "\n")  # type: ignore[attr-defined]
            stream.flush()  # type: ignore[attr-defined]

    return write


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 upwards")
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 3600:
        raise argparse.ArgumentTypeError(f"{text} is not a time between 0 and 3600 seconds")
    return seconds
