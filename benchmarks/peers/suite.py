"""The conformance suite against each server."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamacancel.conformance.profile import ServerUnreachable
from llamacancel.conformance.reports import as_picture
from llamacancel.conformance.results import Result
from llamacancel.conformance.runner import run_suite
from llamacancel.conformance.scenarios import SCENARIOS
from llamacancel.conformance.settings import Settings
from llamacancel.conformance.wire import Target

from ..server.launch import Kind, Server, ServerFailed, Shape
from ..server.measure import say

__all__ = ["conformance"]


def conformance(
    kinds: Sequence[Kind],
    shape: Shape,
    *,
    prefill: float,
    rounds: int,
    patience: float,
    only: Sequence[str] | None = None,
    pictures: Path | None = None,
) -> list[dict[str, Any]]:
    """Run the suite on each server, in turn.

    Args:
        kinds, shape: The servers.
        prefill, rounds: As for the suite.
        patience: Seconds that a server is given; what was not judged by then is not judged.
        only: Scenarios; None for all.
        pictures: Folder for each server's lanes.

    Returns:
        Of each: `scenarios` with their outcomes and reasons, and why there are none or not all (`failure`).
    """
    found = []
    for kind in kinds:
        say(f"conformance of {kind.name}")
        results: list[Result] = []
        take = functools.partial(_take, results)
        row: dict[str, Any] = {"server": kind.name, "scenarios": [], "failure": None}
        found.append(row)
        try:
            with Server(kind, shape) as server:
                settings = Settings(Target.parse(server.url), prefill=prefill, rounds=rounds, grace=10.0)
                suite = run_suite(settings, only=only, took=take)
                report = asyncio.run(asyncio.wait_for(suite, patience))
                row["repeats"] = report.repeats
                if pictures is not None:
                    path = pictures / f"conformance-{kind.name}.svg"
                    path.write_text(as_picture(report), encoding="utf-8")
        except asyncio.TimeoutError:
            row["failure"] = f"the suite was stopped after {patience:.0f} s"
        except ServerUnreachable as error:
            row["failure"] = f"it cannot be judged: {error}"
        except (ServerFailed, OSError) as error:
            row["failure"] = str(error)
        row["scenarios"] = [
            {"name": of.name, "outcome": of.outcome, "why": of.why, "figures": of.figures, "seconds": of.seconds}
            for of in results
        ]
        if results and row["failure"]:
            missing = [name for name in only or SCENARIOS if name not in {of.name for of in results}]
            row["scenarios"] += [
                {"name": name, "outcome": "could not be judged", "why": row["failure"], "figures": {}, "seconds": 0.0}
                for name in missing
            ]
    return found


def _take(results: list[Result], result: Result) -> None:
    say(f"  {result.name}: {result.outcome}")
    results.append(result)
