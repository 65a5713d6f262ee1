"""The report: targets, tables in Markdown, everything in JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..report import machine_section, milliseconds, ratio_text, rounded, table, targets_section

__all__ = ["freed_section", "load_section", "markdown", "shares", "targets", "write"]

Results = dict[str, Any]

FREED_P99 = 0.050 + 0.020  # beside the bound that the core aims at by default
SCHEDULER_SHARE = 0.03


def targets(results: Results) -> list[dict[str, Any]]:
    """Compare what was measured with what the project wants to reach."""
    found: list[dict[str, Any]] = []

    def add(name: str, measured: float, limit: float, sense: str, unit: str, note: str = "") -> None:
        reached = measured <= limit if sense == "at most" else measured >= limit
        found.append(
            {
                "name": name,
                "measured": measured,
                "limit": limit,
                "sense": sense,
                "unit": unit,
                "reached": reached,
                "note": note,
            }
        )

    for row in results["load"]:
        if row["clients"] == 1:
            continue
        for other, ratios in row["ratios"].items():
            what = f"{row['clients']} clients{', a third hanging up' if row['hang_ups'] else ''}, against {other}"
            speed = ratios["throughput"]
            doubt = "within the noise" if speed["low"] <= 1 <= speed["high"] else ""
            add(f"throughput, {what}", speed["median"], 1.0, "at least", "ratio", doubt)
            add(f"time to first token, p99, {what}", ratios["ttft_p99"], 1.0, "at most", "ratio")
    for row in results["freed"]:
        for phase, of in row["phases"].items():
            if of["exact"]:
                add(f"hang-up to free slot, {phase}, p99", of["exact"]["p99"], FREED_P99, "at most", "s")
    for row in results["engine"]:
        share = shares(row)["scheduler"]
        add(
            f"scheduler's share of a step, {row['slots']} slots, {row['work']}",
            share,
            SCHEDULER_SHARE,
            "at most",
            "share",
        )
    return found


def shares(row: Results) -> dict[str, float]:
    """Parts of the time of steps: the scheduler's, and all that is not llama.cpp's computing."""
    total = row["schedule_seconds"] + row["run_seconds"] + row["commit_seconds"]
    scheduler = row["schedule_seconds"] + row["commit_seconds"]
    return {
        "step": total / max(row["steps"], 1),
        "scheduler": scheduler / total,
        "schedule": row["schedule_seconds"] / total,
        "commit": row["commit_seconds"] / total,
        "sampling": (row["run_seconds"] - row["decode_seconds"]) / total,
    }


def write(results: Results, out: Path) -> str:
    """Write report.md and report.json; returns the Markdown."""
    text = markdown(results)
    (out / "report.md").write_text(text, encoding="utf-8")
    (out / "report.json").write_text(json.dumps(rounded(results), indent=1) + "\n", encoding="utf-8")
    return text


def markdown(results: Results) -> str:
    """The report in words and tables."""
    parts = ["# Our server against llama.cpp's own", machine_section(results)]
    if results["settings"]["quick"]:
        parts.append("> **This was a run with `--quick`**: it shows that everything runs; its figures mean nothing.")
    if results["interrupted"]:
        parts.append("> **The run was stopped** before its end: what it had measured by then follows.")
    parts.append(targets_section(results))
    if results["failures"]:
        parts.append("## Failures\n\n" + "\n".join(f"- {_one_line(text)}" for text in results["failures"]))
    if results["load"]:
        parts.append(load_section(results["load"]))
    if results["freed"]:
        parts.append(freed_section(results["freed"]))
    if results["engine"]:
        parts.append(_engine_section(results["engine"], results["load"]))
    return "\n\n".join(parts) + "\n"


def load_section(rows: list[Results]) -> str:
    """Throughput and time to first token of each server under each load."""
    first = rows[0]
    text = (
        "## Throughput and time to first token\n\n"
        f"Prompts of {first['prompt_tokens']} random tokens, no two alike, answers of {first['answer_tokens']} tokens, "
        "chosen greedily, streamed. Each client sends its next request when it has its answer. The servers took turns "
        "within each round, with the same prompts; a ratio is the median over the rounds of the ratio within a round. "
        "Tokens are those of answers that reached a client who stayed. Where clients hang up, every third request is "
        "given up at a moment drawn evenly from what a request takes, the same on each server. *Slot free*: from our "
        "server's noticing a hang-up to the slot being free, beside whatever the neighbours were doing, or to the "
        "request being out of the queue."
    )
    cells = []
    for row in rows:
        for name, of in row["servers"].items():
            ratios = row["ratios"].get(name)
            ttft, asked = of["ttft"], of["answered"] + of["hung_up"] + of["failed"]
            cells.append(
                [
                    f"{row['clients']} ({row['slots']} slots)",
                    f"{of['hung_up']} of {asked}" if row["hang_ups"] else "none",
                    name,
                    f"{of['throughput_median']:.1f}",
                    milliseconds(ttft["median"]) if ttft else "-",
                    milliseconds(ttft["p99"]) if ttft else "-",
                    *_times(of["freed"]),
                    ratio_text(ratios["throughput"]) if ratios else "",
                    f"{ratios['ttft_p99']:.2f}" if ratios else "",
                    str(of["failed"] + of["wrong_length"]),
                ]
            )
    head = ["Clients", "Hang-ups", "Server", "Tokens/s", "First token, median", "99 %", "Slot free, median", "99 %",
            "Throughput, ours / its", "First token 99 %, ours / its", "Failed"]  # fmt: skip
    return f"{text}\n\n{table(head, cells)}"


def freed_section(rows: list[Results]) -> str:
    """From hang-up to free slot, by phase."""
    text = (
        "## From a hang-up to a free slot\n\n"
        "Beside neighbours that generate in all the other slots, a client with a long prompt closes its connection. "
        "*By the page*: until the server's own `/slots` (for llama-server's queue: `/metrics`) first shows the slot "
        "free; asking takes its time, too. *Exact*: until the moment that our server keeps as the request's end, on "
        "the same machine's clock. *Of that, noticed to free*: what is left without noticing the hang-up."
    )
    cells = []
    for row in rows:
        for phase, of in row["phases"].items():
            cells.append([row["server"], phase, str(of["polled"]["n"]), *_times(of["polled"]), *_times(of["exact"]),
                          *_times(of["own"])])  # fmt: skip
    head = ["Server", "Phase", "Hang-ups", "By the page, median", "99 %", "Exact, median", "99 %",
            "Noticed to free, median", "99 %"]  # fmt: skip
    return f"{text}\n\n{table(head, cells)}"


def _times(spread: Results | None) -> list[str]:
    return [milliseconds(spread["median"]), milliseconds(spread["p99"])] if spread else ["-", "-"]


def _engine_section(rows: list[Results], loads: list[Results]) -> str:
    text = (
        "## What a step costs beside computing\n\n"
        "*Scheduler*: planning the step and handing out what came of it, the target's figure. *Filling and sampling*: "
        "the rest of what is not llama.cpp's computing. In the server, both include waiting for the event loop, which "
        "shares the interpreter."
    )
    named = [(f"engine alone, {row['work']}", row["slots"], row) for row in rows]
    for load in loads:
        for name, of in load["servers"].items():
            if of["engine"] and of["engine"]["steps"]:
                hang_ups = ", a third hanging up" if load["hang_ups"] else ""
                named.append((f"{name}, {load['clients']} clients{hang_ups}", load["slots"], of["engine"]))
    cells = []
    for name, slots, row in named:
        parts = shares(row)
        cells.append(
            [
                name,
                str(slots),
                f"{row['steps']:.0f}",
                milliseconds(parts["step"]),
                f"{parts['scheduler']:.1%} ({parts['schedule']:.1%} + {parts['commit']:.1%})",
                f"{parts['sampling']:.1%}",
            ]
        )
    head = ["Work", "Slots", "Steps", "Step", "Scheduler (planning + handing out)", "Filling and sampling"]
    return f"{text}\n\n{table(head, cells)}"


def _one_line(text: str) -> str:
    return " / ".join(text.split("\n"))
