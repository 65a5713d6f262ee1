"""The report: targets reached or missed, tables in Markdown, everything in JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = [
    "machine_section",
    "markdown",
    "milliseconds",
    "ratio_text",
    "rounded",
    "table",
    "targets",
    "targets_section",
    "verified",
    "write",
]

Results = dict[str, Any]

# The figures that the project wants to reach. Ratios are medians, times are the 99th percentile.
TOKEN_RATIO = 1.01
GUARD_RATIO = {"attention": 1.01}  # against the bare C call, rollback protection included
GUARD_RATIO_OTHER = 1.03
SMALL_P99 = 0.010
STOPS = 0.98  # of the throughput that is left with stops between pieces of a graph
AIMS = {0.02: (0.020, 0.97), 0.01: (0.010, 0.94)}  # aim: p99, share of the throughput of n_ubatch=512


def targets(results: Results) -> list[dict[str, Any]]:
    """Compare what was measured with what the project wants to reach.

    Returns:
        For each target whose measurement was run: name, measured, limit, "at most" or "at least", unit, reached.
    """
    found: list[dict[str, Any]] = []

    def add(name: str, measured: float | None, limit: float, sense: str, unit: str, note: str = "") -> None:
        if measured is None:
            return
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

    for row in results["token_cost"]:
        for pair, limit in (("token / no token", TOKEN_RATIO), ("token / bare", guard_limit(row))):
            ratio = row["ratios"][pair]
            # The median is what counts; the interval tells how much of it may be chance.
            doubt = "within the noise" if ratio["low"] <= limit <= ratio["high"] else ""
            name = f"{_words(pair)}, {row['arch']} ({_words(row['memory_kind'])}), {row['work']}"
            add(name, ratio["median"], limit, "at most", "ratio", doubt)

    latency = {case["key"]: case for case in results["latency"]}
    if case := latency.get("small llama"):
        add("cancel to return, small model, p99", _p99(case), SMALL_P99, "at most", "s")
    for aim, (p99, share) in AIMS.items():
        if case := latency.get(f"1b aim {aim}"):
            add(f"cancel to return, 1 B shape, cancel_latency={aim}, p99", _p99(case), p99, "at most", "s")
        for variant in (results["throughput"] or {}).get("variants", ()):
            if variant["name"] == f"aim {aim}":
                ratio = variant["of_512"]
                doubt = "within the noise" if ratio["low"] <= share <= ratio["high"] else ""
                name = f"throughput of n_ubatch=512 that is left, 1 B shape, cancel_latency={aim}"
                add(name, ratio["median"], share, "at least", "share", doubt)
    for row in results["pieces"]:
        ratio = row["throughput"]["chosen"]
        limit = STOPS if row["work"] == "prefill" else 1 / TOKEN_RATIO
        doubt = "within the noise" if ratio["low"] <= limit <= ratio["high"] else ""
        name = f"throughput left with the graph in pieces (cancel_latency={row['aim']}), {row['model']}, {row['work']}"
        add(name, ratio["median"], limit, "at least", "share", doubt)
    redone, wrong = verified(results)
    if redone:
        add(f"cancelled calls that gave other bits when done again (of {redone})", wrong, 0, "at most", "count")
    return found


def guard_limit(row: Results) -> float:
    """What decode() with a token may cost against the bare C call, for this memory."""
    return GUARD_RATIO.get(row["memory_kind"], GUARD_RATIO_OTHER)


def verified(results: Results) -> tuple[int, int]:
    """How many cancelled calls were done again, and how many of these gave other bits."""
    rows = [*results["latency"], *(row["cancelled"] for row in results["repair"])]
    return sum(row["redone"] for row in rows), sum(row["wrong_bits"] for row in rows)


def write(results: Results, out: Path) -> str:
    """Write report.md and report.json; returns the Markdown."""
    text = markdown(results)
    (out / "report.md").write_text(text, encoding="utf-8")
    (out / "report.json").write_text(json.dumps(rounded(results), indent=1) + "\n", encoding="utf-8")
    return text


def markdown(results: Results) -> str:
    """The report in words and tables."""
    parts = ["# What llamacancel costs, and how soon it stops", machine_section(results)]
    if results["settings"]["quick"]:
        parts.append(
            "> **This was a run with `--quick`**: tiny models and a handful of samples. It shows that everything "
            "runs. Its figures mean nothing, the targets included."
        )
    if results["interrupted"]:
        parts.append("> **The run was stopped** before its end: what it had measured by then follows.")
    parts.append(targets_section(results))
    if results["token_cost"]:
        parts.append(_token_cost(results["token_cost"]))
    if results["latency"]:
        parts.append(_latency(results["latency"]))
    if results["throughput"]:
        parts.append(_throughput(results["throughput"]))
    if results["repair"]:
        parts.append(_repair(results["repair"]))
    if results["pieces"]:
        parts.append(_pieces(results["pieces"]))
    return "\n\n".join(parts) + "\n"


def machine_section(results: Results) -> str:
    """What it was measured on, and whether that was quiet."""
    machine, watch, settings = results["machine"], results["watch"], results["settings"]
    build = machine["build"] or {}
    lines = [
        f"- Machine: {machine['cpu'] or 'unknown CPU'}, {machine['cores']} cores, "
        f"{machine['memory_gb']} GB of memory, {machine['system']}",
        f"- Threads used: {settings['threads']}",
        f"- Build: {', '.join(build.values()) or 'unknown'}",
        f"- CPU features in use: {machine['cpu_features']}",
        f"- llamacancel {machine['llamacancel']} (git {machine['git_commit'] or 'unknown'}), llama.cpp "
        f"{machine['llama_cpp']} (commit {machine['llama_cpp_commit'] or 'unknown'}), Python {machine['python']}, "
        f"NumPy {machine['numpy']}",
        f"- Load average before {_load(watch['load_before'])}, after {_load(watch['load_after'])} (our own work "
        "included)",
        f"- Started {results['started']}, took {results['seconds'] / 60:.1f} minutes; seed {settings['seed']}; "
        f"command: `{results['command']}`",
    ]
    if watch["busy"]:
        lines.append(
            f"\n> **WARNING: the machine was busy** ({'; '.join(watch['busy'])}). Latencies and ratios are doubtful; "
            "repeat this on a quiet machine."
        )
    elif watch["others_cores_during"] is not None:
        lines.append(f"- Other processes used {watch['others_cores_during']:.2f} cores meanwhile: quiet enough.")
    return "\n".join(lines)


def targets_section(results: Results) -> str:
    """The targets that were compared, and how many were reached."""
    rows = []
    for target in results["targets"]:
        value, limit = (_value(target[key], target["unit"]) for key in ("measured", "limit"))
        verdict = "reached" if target["reached"] else "**missed**"
        note = f" ({target['note']})" if target["note"] else ""
        rows.append([target["name"], value, f"{target['sense']} {limit}", verdict + note])
    missed = sum(not target["reached"] for target in results["targets"])
    head = f"{len(rows) - missed} of {len(rows)} reached." if rows else "Nothing was measured that has a target."
    if not rows:
        return f"## Targets\n\n{head}"
    return f"## Targets\n\n{head}\n\n" + table(["What", "Measured", "Wanted", ""], rows)


def _token_cost(rows: list[Results]) -> str:
    first = rows[0]
    text = (
        "## What a token costs\n\n"
        "The same decode was done in turn as the bare C call (`llama_decode()`, nothing else), by `decode()` without a "
        "token, with one, and with one that has a deadline: once each in every round, in an order drawn anew each "
        "time: a prefill from the same state of the same context, single tokens one after the other along one "
        "sequence. A ratio is the median over the rounds of the ratio within a round; in brackets, the range that "
        "holds this median with 95 % certainty. 1.000 means no cost.\n\n"
        f"Every decode adds to a history of {first['history']} tokens (so that a sliding window is full and a "
        f"recurrent state is there to be protected), with n_ubatch={first['n_ubatch']}. `no token / bare` is what the "
        "guard and the protection for a rollback cost; `token / no token` is what the token alone costs. The bare call "
        "is of the same build and context, so ggml asks an abort callback there too, which has nothing to look at."
    )
    cells = []
    for row in rows:
        rounds = row["ratios"]["token / bare"]["n"]
        cells.append(
            [
                f"{row['arch']} ({_words(row['memory_kind'])})",
                row["work"] if row["rows"] == 1 else f"{row['work']}, {row['rows']} rows",
                f"{row['rows'] / row['seconds']['bare']:.0f}",
                *(ratio_text(row["ratios"][pair]) for pair in row["ratios"]),
                str(rounds),
            ]
        )
    head = ["Model", "Work", "Tokens/s, bare", *(_words(pair) for pair in first["ratios"]), "Rounds"]
    return f"{text}\n\n{table(head, cells)}"


def _latency(cases: list[Results]) -> str:
    text = (
        "## From cancel to return\n\n"
        "A prefill runs in one thread; another thread cancels it at a moment drawn evenly from the time that the "
        "prefill takes. The latency runs from just before `cancel()` in the one thread to the return of the call "
        "in the "
        "other, rollback included, on the clock of Python. Half of the cancels come in an empty context and half "
        "behind a history (all in an empty one where n_ubatch is fixed). *Too late* are cancels that found the "
        "prefill done. *Rollback* is the part of the latency "
        "in which the memory is put back."
    )
    if all(case["repair"] is None for case in cases):
        text += " This build does not tell how long the rollback of a cancelled call took."
    cells = []
    for case in cases:
        spread, share = case["latency"], case["repair_share"]
        times = [milliseconds(spread[key]) for key in ("median", "p90", "p99", "max")] if spread else ["-"] * 4
        rollback = "-"
        if share:
            rollback = f"{milliseconds(case['repair']['median'])} ({share['median']:.1%}, at most {share['max']:.1%})"
        cells.append(
            [
                case["about"],
                str(case["n_ubatch"]),
                f"{case['honoured']} + {case['too_late']} too late",
                *times,
                milliseconds(case["native_latency"]["p99"]) if case["native_latency"] else "-",
                rollback,
                f"{case['redone']} of which {case['wrong_bits']} wrong",
            ]
        )
    head = ["Model", "n_ubatch", "Cancels", "Median", "90 %", "99 %", "Worst", "99 % by the library's own clock",
            "Rollback (share)", "Done again, compared bit for bit"]  # fmt: skip
    return f"{text}\n\n{table(head, cells)}"


def _throughput(found: Results) -> str:
    text = (
        "## What a shorter latency costs in throughput\n\n"
        f"The 1 B shape computes the same {found['rows']} tokens, in turn: as the bare C call with a fixed "
        "n_ubatch, and by "
        "`decode()` with a token in contexts that chose their cut from `cancel_latency`. The share compares with "
        "the bare "
        "C call at n_ubatch=512, round by round. The latencies of the fixed cuts are in the table above: a cancel "
        "there is looked at after each node, as llama.cpp's abort callback does for a C program."
    )
    cells = [
        [row["name"], str(row["n_ubatch"]), f"{row['tokens_per_second']:.1f}", ratio_text(row["of_512"])]
        for row in found["variants"]
    ]
    return f"{text}\n\n{table(['Cut', 'n_ubatch', 'Tokens/s', 'Share of n_ubatch=512'], cells)}"


def _repair(rows: list[Results]) -> str:
    first = rows[0]
    text = (
        "## Snapshot and repair\n\n"
        "What is saved before a decode so that it can be undone, and how long the undoing takes, for each kind of "
        "memory, "
        f"behind a history of {first['history']} tokens. Plain attention saves nothing: new rows go to free cells. "
        "The time "
        "of the guard for one row is `decode()` less the bare C call, in pairs: an upper bound for the snapshot, "
        "which is a part of it. *Whole call*: a prefill was cancelled in its second half and rolled back. *One of "
        "two*: two "
        "sequences shared a call, one was cancelled and rolled back, the other got its results."
    )
    cells = []
    for row in rows:
        one, cancelled, shared = row["single_row"], row["cancelled"], row["one_of_two"]
        snapshots = [part["snapshot_seconds"] for part in (one, cancelled)]
        cells.append(
            [
                f"{row['arch']} ({_words(row['memory_kind'])})",
                _bytes(one["snapshot_bytes"]) + (f" in {_us(snapshots[0])}" if snapshots[0] is not None else ""),
                f"{_us(one['guard_seconds'])} of {_us(one['bare_seconds'])}",
                _bytes(cancelled["snapshot_bytes"]) + (f" in {_us(snapshots[1])}" if snapshots[1] is not None else ""),
                _us(cancelled["repair"]["median"]) if cancelled["repair"] else "-",
                _us(cancelled["repair"]["max"]) if cancelled["repair"] else "-",
                _us(shared["repair"]["median"]) if shared["repair"] else "-",
            ]
        )
    head = ["Model", "Saved for one row", "Guard for one row, of the decode", f"Saved for {first['rows']} rows",
            "Repair, whole call, median", "worst", "Repair, one of two, median"]  # fmt: skip
    return f"{text}\n\n{table(head, cells)}"


def _pieces(rows: list[Results]) -> str:
    text = (
        "## What stops between pieces of a graph cost\n\n"
        "A GPU cannot be stopped inside a graph: it is handed the graph in pieces, with a look at the token before "
        "each. Here the CPU stands in for it, and computes each piece to its end. The same decode under a token was "
        "done in turn with the graph as a whole (where the CPU's kernels look at the token) and in pieces: as many as "
        f"`cancel_latency={rows[0]['aim']}` chooses for a device that takes as long for the ubatch, and the most that "
        "there can be. A single token goes to a device as a whole; here it goes in one piece, which is a look more."
    )
    cells = []
    for row in rows:
        for variant, ratio in row["throughput"].items():
            cells.append(
                [
                    row["model"],
                    f"{row['work']}, {row['rows']} rows",
                    f"{row['pieces'][variant]} ({variant})",
                    f"{row['tokens_per_second']['whole']:.1f}",
                    f"{row['tokens_per_second'][variant]:.1f}",
                    ratio_text(ratio),
                ]
            )
    head = ["Model", "Work", "Pieces", "Tokens/s, whole", "Tokens/s, in pieces", "Share of the throughput left"]
    return f"{text}\n\n{table(head, cells)}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    padded = ((cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in lines)
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def _words(text: str) -> str:
    return text.replace("_", " ").replace(" / ", " against ")


def ratio_text(ratio: Results) -> str:
    """A ratio with the range that holds it."""
    return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"


def _value(value: float, unit: str) -> str:
    return {"s": f"{value * 1e3:.1f} ms", "count": f"{value:.0f}", "share": f"{value:.1%}"}.get(unit, f"{value:.3f}")


def milliseconds(seconds: float) -> str:
    """A time in milliseconds."""
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-4 else f"{seconds * 1e3:.3f} ms"


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs"


def _bytes(count: int) -> str:
    if count < 1000:
        return f"{count} B" if count else "nothing"
    return f"{count / 1e3:.0f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"


def _load(load: list[float] | None) -> str:
    return " / ".join(f"{value:.2f}" for value in load) if load else "unknown"


def _p99(case: Results) -> float | None:
    return float(case["latency"]["p99"]) if case["latency"] else None


def rounded(value: Any) -> Any:
    """The same with floats of six digits, which is more than anything here is worth."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value
