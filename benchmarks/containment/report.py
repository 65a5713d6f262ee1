"""The report: a table in Markdown, everything in JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..report import machine_section, milliseconds, rounded, table

__all__ = ["beyond", "markdown", "write"]

Results = dict[str, Any]


def beyond(results: Results) -> list[Results]:
    """The rows in which the neighbour waited longer than alone by more than a step may take, in the median."""
    return [row for row in results["rows"] if row["more_median"] > results["settings"]["step_seconds"]]


def write(results: Results, out: Path) -> str:
    """Write report.md and report.json; returns the Markdown."""
    text = markdown(results)
    (out / "report.md").write_text(text, encoding="utf-8")
    (out / "report.json").write_text(json.dumps(rounded(results), indent=1) + "\n", encoding="utf-8")
    return text


def markdown(results: Results) -> str:
    """The report in words and a table."""
    settings = results["settings"]
    parts = ["# What strangers do to a neighbour's stream", machine_section(results)]
    if settings["quick"]:
        parts.append("> **This was a run with `--quick`**: it shows that everything runs; its figures mean nothing.")
    if results["interrupted"]:
        parts.append("> **The run was stopped** before its end: what it had measured by then follows.")
    if results["failures"]:
        parts.append(
            "## Failures\n\n" + "\n".join(f"- {' / '.join(text.splitlines())}" for text in results["failures"])
        )
    parts.append(
        f"The longest time between two pieces of a neighbour's text within {settings['seconds']:g} s: alone, and then "
        f"while strangers send what the row says, {settings['rounds']} times each, in an order that was drawn. *More* "
        "is the difference within a round. A step may take "
        f"{settings['step_seconds'] * 1e3:.0f} ms (`step_seconds`): what is more by that in the median is **beyond**."
    )
    over = {(row["where"], row["attack"]) for row in beyond(results)}
    cells = [
        [
            row["where"],
            row["attack"],
            *(milliseconds(row[key]) for key in ("alone_median", "beside_median", "beside_worst")),
            f"{row['more_median'] * 1e3:+.1f} ms",
            f"{row['more_worst'] * 1e3:+.1f} ms",
            "**beyond**" if (row["where"], row["attack"]) in over else "within",
            ", ".join(f"{count} {what}" for what, count in row["answers"].items()),
        ]
        for row in results["rows"]
    ]
    head = ["Where", "Strangers send", "Alone, median", "Beside, median", "worst", "More, median", "worst", "A step",
            "What they got"]  # fmt: skip
    parts.append(table(head, cells) if cells else "Nothing was measured.")
    return "\n\n".join(parts) + "\n"
