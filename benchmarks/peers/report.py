"""The report: tables in Markdown, everything in JSON."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from ..report import machine_section, milliseconds, ratio_text, rounded, table
from ..server.report import load_section

__all__ = ["markdown", "write"]

Results = dict[str, Any]


def write(results: Results, out: Path) -> str:
    """Write report.md and report.json; returns the Markdown."""
    text = markdown(results)
    (out / "report.md").write_text(text, encoding="utf-8")
    (out / "report.json").write_text(json.dumps(rounded(results), indent=1) + "\n", encoding="utf-8")
    return text


def markdown(results: Results) -> str:
    """The report in words and tables."""
    parts = ["# llamacancel and its peers", machine_section(results)]
    if results["settings"]["quick"]:
        parts.append("> **This was a run with `--quick`**: it shows that everything runs; its figures mean nothing.")
    if results["interrupted"]:
        parts.append("> **The run was stopped** before its end: what it had measured by then follows.")
    parts.append(_versions(results))
    if results["failures"]:
        parts.append("## Failures\n\n" + "\n".join(f"- {_cell(text)}" for text in results["failures"]))
    for arch, rows in results["libraries"].items():
        parts.append(_stops(arch, rows))
        parts.append(_costs(arch, rows))
    if results["conformance"]:
        parts.append(_conformance(results["conformance"]))
    if results["load"]:
        parts.append(load_section(results["load"]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _versions(results: Results) -> str:
    cells = [
        [name, _cell("; ".join(f"{key} {value}" for key, value in of.items()))]
        for name, of in results["versions"].items()
    ]
    return "## Who took part\n\n" + table(["Peer", "What it is"], cells)


def _stops(arch: str, rows: list[Results]) -> str:
    text = (
        f"## Stopped in a prefill, as libraries: {arch}\n\n"
        "Another thread asks for a stop at a random moment of the prefill of about 1,024 tokens. *Control back*: from "
        "asking to the call's return. *Rest of the prefill*: what was left of it at that moment, had it gone on. *Next "
        "call*: another, shorter prompt on the same object; *next turn*: the same where both began with a conversation "
        "that the object had computed before; *same again*: the prompt that was stopped; all compared with what an "
        "undisturbed object of the same peer gives. *Asked before*: a stop asked for just before a call."
    )
    cells = []
    for row in rows:
        for way, of in row["stop"].items():
            count = len(of["samples"])
            latency, rest = of["latency"], of["rest"]
            cells.append(
                [
                    row["peer"],
                    way,
                    str(count),
                    *(([milliseconds(latency["median"]), milliseconds(latency["max"])]) if latency else ["-", "-"]),
                    milliseconds(rest["median"]) if rest else "-",
                    _counted([sample["said"] for sample in of["samples"]]),
                    _counted([sample["next"] for sample in of["samples"] if not sample["history"]]),
                    _counted([sample["next"] for sample in of["samples"] if sample["history"]]),
                    _counted([sample["again"] for sample in of["samples"]]),
                    _cell(of["early"] or "-"),
                ]
            )
    head = ["Peer", "Way", "Stops", "Control back, median", "worst", "Rest of the prefill, median", "The call",
            "Next call", "Next turn", "Same again", "Asked before"]  # fmt: skip
    return f"{text}\n\n{table(head, cells)}" if cells else ""


def _costs(arch: str, rows: list[Results]) -> str:
    text = (
        f"## What it costs that a prefill can be stopped: {arch}\n\n"
        "Prefills with the way to stop against prefills without, in pairs: alone, and beside one thread that computes "
        "in Python. A ratio is the median of the pairs; in brackets, the range that holds it with 95 % certainty."
    )
    cells = [
        [
            row["peer"],
            way,
            milliseconds(of["medians"]["plain, alone"]),
            ratio_text(of["ratios"]["alone"]),
            milliseconds(of["medians"]["plain, busy"]),
            ratio_text(of["ratios"]["busy"]),
        ]
        for row in rows
        for way, of in row["cost"].items()
    ]
    head = ["Peer", "Way", "Prefill without", "With / without", "Prefill without, beside a busy thread",
            "With / without, beside a busy thread"]  # fmt: skip
    return f"{text}\n\n{table(head, cells)}" if cells else ""


def _conformance(rows: list[Results]) -> str:
    names = list(dict.fromkeys(scenario["name"] for row in rows for scenario in row["scenarios"]))
    outcomes = [{scenario["name"]: scenario["outcome"] for scenario in row["scenarios"]} for row in rows]
    cells = [[name, *(_outcome(of.get(name)) for of in outcomes)] for name in names]
    parts = [
        "## Conformance, as servers\n\n`llamacancel conformance` against each; `--list` tells what a scenario claims.",
        table(["Scenario", *(row["server"] for row in rows)], cells) if cells else "",
        "\n".join(f"- {row['server']}: {_cell(row['failure'])}" for row in rows if row["failure"]),
        "\n".join(
            f"- {row['server']}, {scenario['name']}, {scenario['outcome']}: {_cell(scenario['why'])}"
            for row in rows
            for scenario in row["scenarios"]
            if scenario["outcome"] == "failed"
        ),
    ]
    return "\n\n".join(part for part in parts if part)


def _outcome(outcome: str | None) -> str:
    return {"failed": "**failed**", "could not be judged": "not judged", None: "-"}.get(outcome, outcome or "-")


def _counted(texts: list[str]) -> str:
    """Each text with how often it was, unless it was always the same."""
    counts = Counter(texts)
    if not counts:
        return "-"
    if len(counts) == 1:
        return _cell(texts[0])
    return "; ".join(f"{count} times {_cell(text)}" for text, count in counts.most_common())


def _cell(text: str) -> str:
    return " / ".join(str(text).split("\n")).replace("|", "\\|")
