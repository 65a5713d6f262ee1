"""The report: tables in Markdown, everything in JSON."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from ..report import machine_section, milliseconds, ratio_text, rounded, table
from ..server.report import load_section

__all__ = ["markdown", "summed_up", "write"]

Results = dict[str, Any]
OUTCOMES = ("passed", "failed", "could not be judged")


def write(results: Results, out: Path) -> str:
    """Write report.md and report.json; returns the Markdown."""
    text = markdown(results)
    (out / "report.md").write_text(text, encoding="utf-8")
    (out / "report.json").write_text(json.dumps(rounded(results), indent=1) + "\n", encoding="utf-8")
    return text


def summed_up(runs: list[Results]) -> Results:
    """Of all the runs that were added up: command, start, seconds, whether one was stopped, what else went on."""

    def most(name: str) -> float | None:
        return max((run["watch"][name] for run in runs if run["watch"][name] is not None), default=None)

    # The busiest run speaks for all of them: one that was disturbed makes the whole doubtful.
    watch = {name: most(name) for name in ("others_cores_before", "others_cores_during", "stolen_share")}
    return {
        "command": "; ".join(run["command"] for run in runs),
        "started": runs[0]["started"],
        "seconds": sum(run["seconds"] for run in runs),
        "interrupted": any(run["interrupted"] for run in runs),
        "watch": {
            **watch,
            "load_before": runs[0]["watch"]["load_before"],
            "load_after": runs[-1]["watch"]["load_after"],
            "busy": max((run["watch"] for run in runs), key=lambda of: of["others_cores_during"] or 0)["busy"],
        },
    }


def markdown(results: Results) -> str:
    """The report in words and tables: first what fits on a page, then everything."""
    parts = ["# llamacancel and its peers"]
    if results["settings"]["quick"]:
        parts.append("> **This was a run with `--quick`**: it shows that everything runs; its figures mean nothing.")
    if results["interrupted"]:
        parts.append("> **The run was stopped** before its end: what it had measured by then follows.")
    parts += [_libraries_in_short(results), _servers_in_short(results), _failures(results), _versions(results)]
    parts.append(f"## The machine\n\n{machine_section(results)}")
    for arch, rows in results["libraries"].items():
        parts.append(_stops(arch, rows))
        parts.append(_costs(arch, rows))
    if results["conformance"]:
        parts.append(_conformance(results["conformance"]))
    if results["load"]:
        parts.append(load_section(results["load"]))
    return "\n\n".join(part for part in parts if part) + "\n"


# -- in short


def _libraries_in_short(results: Results) -> str:
    """A row for each way to stop each peer, with a column for each model."""
    models = results["libraries"]
    if not models:
        return ""
    ways = dict.fromkeys((row["peer"], way) for rows in models.values() for row in rows for way in row["ways"])
    cells = []
    for peer, way in ways:
        stops = [_of(rows, peer, "stop", way) for rows in models.values()]
        costs = [_of(rows, peer, "cost", way) for rows in models.values()]
        cells.append(
            [
                peer,
                way,
                *(_soon(stop) for stop in stops),
                _counted([sample["said"] for stop in stops if stop for sample in stop["samples"]]),
                *(_right(stop) for stop in stops),
                _cost([cost["ratios"]["busy"]["median"] for cost in costs if cost]),
            ]
        )
    cells += [[name, "**could not be brought**"] + ["-"] * (2 * len(models) + 2) for name in _not_brought(results)]
    names = [arch.split("(")[-1].rstrip(")") for arch in models]
    head = ["Library", "Stopped by", *(f"Control back, {name}" for name in names), "The stopped call",
            *(f"Calls right afterwards, {name}" for name in names), "Cost beside a busy thread"]  # fmt: skip
    text = (
        "## As libraries, in short\n\n"
        "A stop is asked for in the middle of a prefill. *Control back*: median and worst time until the call "
        "returned; in brackets what the rest of the prefill would have taken. *Calls right afterwards*: next prompts "
        "on the same object, and the stopped prompt again, that gave what they give when nobody stops anything. "
        "*Cost*: time of a prefill that can be stopped against one that cannot, beside a thread that computes in "
        "Python."
    )
    return f"{text}\n\n{table(head, cells)}"


def _not_brought(results: Results) -> list[str]:
    return [text.split(" could not be ")[0] for text in results["failures"].get("bring", [])]


def _of(rows: list[Results], peer: str, part: str, way: str) -> Results | None:
    return next((row[part][way] for row in rows if row["peer"] == peer and way in row[part]), None)


def _soon(stop: Results | None) -> str:
    if stop is None or not stop["latency"]:
        return "-"
    latency, rest = stop["latency"], stop["rest"]
    return f"{milliseconds(latency['median'])}, {milliseconds(latency['max'])} ({milliseconds(rest['median'])})"


def _right(stop: Results | None) -> str:
    if stop is None or not stop["samples"]:
        return "**failed**" if stop and stop.get("broken") else "-"
    given = [sample[name] for sample in stop["samples"] for name in ("next", "again")]
    right, broken = given.count("right"), stop.get("broken", False)
    text = f"{right} of {len(given)}{', then it broke off' if broken else ''}"
    return text if right == len(given) and not broken else f"**{text}**"


def _cost(ratios: list[float]) -> str:
    return ", ".join(f"{ratio:.2f}" for ratio in ratios) if ratios else "-"


def _servers_in_short(results: Results) -> str:
    """A row for each server."""
    loads = [row for row in results["load"] if row["clients"] == max(row["clients"] for row in results["load"])]
    names = dict.fromkeys(
        [row["server"] for row in results["conformance"]] + [name for row in loads for name in row["servers"]]
    )
    if not names:
        return ""
    cells = []
    for name in names:
        suite = next((row for row in results["conformance"] if row["server"] == name), None)
        counts = Counter(scenario["outcome"] for scenario in suite["scenarios"]) if suite else None
        if suite and not suite["scenarios"]:
            judged = ["**could not be judged**", "-", "-"]
        elif counts is None:
            judged = ["-", "-", "-"]
        else:
            judged = [f"**{counts[of]}**" if of == "failed" and counts[of] else str(counts[of]) for of in OUTCOMES]
        failed = [text for text in results["failures"].get("load", []) if text.startswith(f"{name},")]
        missing = "**failed**" if failed else "-"
        figures = [_load_in_short(row["servers"].get(name), missing) for row in loads]
        cells.append([name, *judged, *(cell for pair in figures for cell in pair)])
    width = 3 + 2 * len(loads)
    cells += [[name, "**could not be brought**"] + ["-"] * (width - 1) for name in _not_brought(results)]
    head = ["Server", "Scenarios passed", "failed", "not judged"]
    for row in loads:
        who = f"{row['clients']} clients{', a third hanging up' if row['hang_ups'] else ''}"
        head += [f"Tokens/s, {who}", "First token, 99 %"]
    text = (
        "## As servers, in short\n\n"
        "The scenarios are those of `llamacancel conformance`. *Tokens/s* are those of answers that reached a client "
        "who stayed."
    )
    return f"{text}\n\n{table(head, cells)}"


def _load_in_short(of: Results | None, missing: str) -> tuple[str, str]:
    if of is None:
        return missing, "-"
    bad = of["failed"] + of["wrong_length"]
    failed = f" (**{bad} failed**)" if bad else ""
    ttft = of["ttft"]
    return f"{of['throughput_median']:.0f}{failed}", milliseconds(ttft["p99"]) if ttft else "-"


# -- in full


def _failures(results: Results) -> str:
    texts = [text for of in results["failures"].values() for text in of]
    texts += [f"{row['server']}, conformance: {row['failure']}" for row in results["conformance"] if row["failure"]]
    if not texts:
        return ""
    return "## Failures\n\n" + "\n".join(f"- {_cell(text)}" for text in texts)


def _versions(results: Results) -> str:
    cells = [
        [name, _cell("; ".join(f"{key} {value}" for key, value in of.items()))]
        for name, of in results["versions"].items()
    ]
    asked = dict.fromkeys(
        f"{', '.join(f'{key}={value}' for key, value in settings.items())}"
        for rows in results["libraries"].values()
        for row in rows
        for settings in row["settings"].values()
    )
    text = f"\n\nThe libraries computed, by what each of them said, with {' and with '.join(asked)}." if asked else ""
    return "## Who took part\n\n" + table(["Peer", "What it is"], cells) + text


def _stops(arch: str, rows: list[Results]) -> str:
    text = (
        f"## Stopped in a prefill, as libraries: {arch}\n\n"
        "Another thread asks for a stop at a random moment of the prefill of about 1,024 tokens. *Control back*: from "
        "asking to the call's return; waiting for the interpreter in order to ask is included. *Rest of the prefill*: "
        "what was left of it at that moment, had it gone on. *Next call*: another, shorter prompt on the same object; "
        "*next turn*: the same where both began with a conversation that the object had computed before; *same again*: "
        "the prompt that was stopped; all compared with what another object of the same peer gives for the same calls "
        "when nobody stops one. *Asked before*: a stop asked for just before a call."
    )
    cells = []
    for row in rows:
        for way, of in row["stop"].items():
            count, latency, rest = len(of["samples"]), of["latency"], of["rest"]
            unsure = "" if of["repeats"] is not False else " (undisturbed, it does not repeat itself either)"
            cells.append(
                [
                    row["peer"],
                    way,
                    f"{count}{f' ({late} more came too late)' if (late := of['too_late']) else ''}",
                    *(([milliseconds(latency["median"]), milliseconds(latency["max"])]) if latency else ["-", "-"]),
                    milliseconds(rest["median"]) if rest else "-",
                    _counted([sample["said"] for sample in of["samples"]]),
                    _counted([sample["next"] for sample in of["samples"] if not sample["history"]]) + unsure,
                    _counted([sample["next"] for sample in of["samples"] if sample["history"]]) + unsure,
                    _counted([sample["again"] for sample in of["samples"]]) + unsure,
                    _cell(of["early"] or "-"),
                ]
            )
    head = ["Peer", "Way", "Stops", "Control back, median", "worst", "Rest of the prefill, median", "The call",
            "Next call", "Next turn", "Same again", "Asked before"]  # fmt: skip
    said = {(row["peer"], way): about for row in rows for way, about in row["ways"].items() if way in row["stop"]}
    about = "\n".join(f"- {peer}, {way}: {_cell(words)}" for (peer, way), words in said.items())
    return f"{text}\n\n{table(head, cells)}\n\n{about}" if cells else ""


def _costs(arch: str, rows: list[Results]) -> str:
    text = (
        f"## What it costs that a prefill can be stopped: {arch}\n\n"
        "Prefills with the way to stop against prefills without, in pairs of the same prompt: alone, and beside one "
        "thread that computes in Python. A ratio is the median of the pairs; in brackets, the range that holds it with "
        "95 % certainty. Ours without is a bare `decode()`, for the engine, too."
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
    reasons = [
        f"- {row['server']}, {scenario['name']}, {scenario['outcome']}: {_cell(scenario['why'])}"
        for row in rows
        for scenario in row["scenarios"]
        if scenario["outcome"] != "passed" and scenario["why"] != row["failure"]
    ]
    parts = [
        "## Conformance, as servers\n\n`llamacancel conformance` against each; `--list` tells what a scenario claims.",
        table(["Scenario", *(row["server"] for row in rows)], cells) if cells else "",
        "\n".join(f"- {row['server']}: {_cell(row['failure'])}" for row in rows if row["failure"]),
        "\n".join(reasons),
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
    often = {1: "once"}
    return "; ".join(f"{often.get(count, f'{count} times')} {_cell(text)}" for text, count in counts.most_common())


def _cell(text: str) -> str:
    return " / ".join(str(text).split("\n")).replace("|", "\\|")
