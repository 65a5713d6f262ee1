"""The report of a check on a GPU: targets reached or missed, the laws, tables."""

from __future__ import annotations

from typing import Any

from ..report import milliseconds, ratio_text, table, targets_section
from .measures import AIM

__all__ = ["broken", "markdown", "targets"]

Results = dict[str, Any]

P99 = 0.010
PREFILL = 0.98
SINGLE_TOKEN = 0.99
NEIGHBOUR = 1.02  # of its time beside one that goes on


def targets(results: Results) -> list[dict[str, Any]]:
    """Compare what was measured with what the project wants to reach, as `benchmarks.report.targets` does."""
    steps = results["steps"]
    found: list[dict[str, Any]] = []

    def add(name: str, measured: float, limit: float, sense: str, unit: str, ratio: Results | None = None) -> None:
        doubt = "within the noise" if ratio and ratio["low"] <= limit <= ratio["high"] else ""
        reached = measured <= limit if sense == "at most" else measured >= limit
        found.append({"name": name, "measured": measured, "limit": limit, "sense": sense, "unit": unit,
                      "reached": reached, "note": doubt})  # fmt: skip

    if (case := steps.get("latency")) and case["latency"]:
        add(f"cancel to return, cancel_latency={AIM}, p99", case["latency"]["p99"], P99, "at most", "s")
    for name, limit in (("prefill", PREFILL), ("single-token", SINGLE_TOKEN)):
        if step := steps.get(name):
            ratio = step["of_bare"]["token"]
            add(f"{name} with a token, of the plain library's throughput", ratio["median"], limit, "at least", "share",
                ratio)  # fmt: skip
    if step := steps.get("two contexts"):
        ratio = step["cancelled_of_going_on"]
        add("a prefill beside one that is cancelled, of its time beside one that goes on", ratio["median"], NEIGHBOUR,
            "at most", "ratio", ratio)  # fmt: skip
        add(f"survivors on one device that got other bits (of {step['runs']})", step["wrong_bits"], 0, "at most",
            "count")  # fmt: skip
    redone, wrong = _redone(steps)
    if redone:
        add(f"cancelled calls that gave other bits when done again (of {redone})", wrong, 0, "at most", "count")
    return found


def broken(results: Results) -> bool:
    """Whether bits came out that should not have."""
    steps = results["steps"]
    return _redone(steps)[1] + steps.get("two contexts", {}).get("wrong_bits", 0) > 0


def _cases(steps: Results) -> list[Results]:
    found = [steps[name] for name in ("latency", "partial offload") if name in steps]
    return [*found, *steps.get("memory kinds", {}).get("kinds", [])]


def _redone(steps: Results) -> tuple[int, int]:
    cases = _cases(steps)
    return sum(case["redone"] for case in cases), sum(case["wrong_bits"] for case in cases)


def markdown(results: Results) -> str:
    """The report in words and tables."""
    target, machine, steps = results["target"], results["machine"], results["steps"]
    parts = [
        f"# llamacancel on {target['description']}, {results['date']}",
        "\n".join(
            [
                f"- Device: {target['name']}, {target['description']}; model: llama {target['size']}",
                f"- Machine: {machine['cpu'] or 'unknown CPU'}, {machine['cores']} cores, {machine['memory_gb']} GB",
                f"- llamacancel {machine['llamacancel']} (git {machine['git_commit'] or 'unknown'}), llama.cpp "
                f"{machine['llama_cpp_commit'] or machine['llama_cpp']}; {machine['cpu_features']}",
                f"- Backends: {', '.join(machine['backends'])}",
            ]
        ),
    ]
    if target["forced"]:
        parts.append("> **No GPU was used**: the CPU stood in for a device. The figures say nothing about one.")
    if target["quick"]:
        parts.append("> **This was a run with `--quick`**: it shows that everything runs. Its figures mean nothing.")
    if results["failures"]:
        rows = [f"- **{name}**: {why}" for name, why in results["failures"].items()]
        parts.append("## What failed\n\n" + "\n".join(rows))
    if rest := [name for name in results["left"] if name not in results["failures"]]:
        parts.append(f"> Not done yet: {', '.join(rest)}. Run it again to go on.")
    parts.append(targets_section(results))
    parts += [text for text in (_laws(steps), _latency(steps), _cost(steps), _two(steps)) if text]
    return "\n\n".join(parts) + "\n"


def _laws(steps: Results) -> str:
    laws = {name: step for name, step in steps.items() if name.startswith("test_")}
    if not laws:
        return ""
    rows = [[name, str(step["passed"]), str(step["skipped"]), f"{step['took']:.0f} s"]
            for name, step in laws.items()]  # fmt: skip
    head = ["tests/laws", "Passed", "Skipped", "Time of the last run"]
    return f"## The laws' tests on the device\n\n{table(head, rows)}"


def _latency(steps: Results) -> str:
    cases = _cases(steps)
    if not cases:
        return ""
    rows = []
    for case in cases:
        spread = case["latency"]
        times = [milliseconds(spread[key]) for key in ("median", "p90", "p99", "max")] if spread else ["-"] * 4
        rows.append([case["about"], f"{case['honoured']} + {case['too_late']} too late", *times,
                     f"{case['redone']} of which {case['wrong_bits']} wrong"])  # fmt: skip
    head = ["Work", "Cancels", "Median", "90 %", "99 %", "Worst", "Done again, compared bit for bit"]
    text = f"## From cancel to return\n\n{table(head, rows)}"
    if (case := steps.get("latency")) and (wait := case["plain"]["wait"]):
        text += (
            f"\n\nThe plain library's own call takes {milliseconds(case['plain']['whole'])} for this prefill and is "
            f"not stopped on a GPU: after the same cancels it would have gone on for {milliseconds(wait['median'])} at "
            f"the median, {milliseconds(wait['p99'])} at the 99th percentile. A full ubatch went to the device in "
            f"{case['n_pieces'] or 'one'} piece{'s' if case['n_pieces'] > 1 else ''}."
        )
    return text


def _cost(steps: Results) -> str:
    rows = []
    for name in ("prefill", "single-token"):
        if step := steps.get(name):
            speed = step["tokens_per_second"]
            rows.append([f"{name}, {step['rows']} rows", str(step["n_pieces"] or "whole"),
                         *(f"{speed[variant]:.1f}" for variant in ("bare", "no token", "token")),
                         ratio_text(step["of_bare"]["token"]), ratio_text(step["of_no_token"])])  # fmt: skip
    if not rows:
        return ""
    head = ["Work", "Pieces", "Tokens/s, plain library", "decode() without a token", "with one",
            "With one, of the plain library's", "of that without"]  # fmt: skip
    return f"## What a token costs\n\nIn turn, from the same state of one context.\n\n{table(head, rows)}"


def _two(steps: Results) -> str:
    step = steps.get("two contexts")
    if not step:
        return ""
    rows = [[name, milliseconds(seconds)] for name, seconds in step["seconds"].items()]
    head = [f"A prefill of {step['rows']} tokens", "Time"]
    text = f"## Two contexts on one device\n\n{table(head, rows)}"
    if spread := step["cancelled_latency"]:
        text += (f"\n\nThe other's cancels ({spread['n']}) were honoured within {milliseconds(spread['median'])} at "
                 f"the median, {milliseconds(spread['p99'])} at the 99th percentile.")  # fmt: skip
    return text
