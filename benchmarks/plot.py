"""One figure of what was measured, as SVG and PNG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

__all__ = ["COLOURS", "draw", "draw_panels", "legend"]

Results = dict[str, Any]

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f", "#8c564b"]
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "svg.hashsalt": "llamacancel",
}


def draw(results: Results, out: Path) -> list[Path]:
    """Draw what there is of: latencies, costs of a token, times of snapshot and repair.

    Returns:
        The files that were written; none if nothing was measured.
    """
    panels = [
        (draw_panel, results[section])
        for draw_panel, section in ((_latency, "latency"), (_token_cost, "token_cost"), (_repair, "repair"))
        if results[section]
    ]
    return draw_panels(results, panels, out)


def draw_panels(results: Results, panels: Sequence[tuple[Callable[[Axes, Any], None], Any]], out: Path) -> list[Path]:
    """Draw panels below each other, under a line that says what machine they are of.

    Args:
        results: Has the machine, the settings and whether it was quiet.
        panels: Functions that draw on axes, and what they draw.
        out: Folder for report.svg and report.png.
    """
    if not panels:
        return []
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(len(panels), 1, figsize=(10, 6 * len(panels)), layout="constrained", squeeze=False)
        for (draw_panel, rows), ax in zip(panels, axes[:, 0], strict=True):
            draw_panel(ax, rows)
        machine, settings = results["machine"], results["settings"]
        title = f"{machine['cpu']}, {settings['threads']} of {machine['cores']} cores"
        if settings["quick"]:
            title += " (--quick: the figures mean nothing)"
        elif results["watch"]["busy"]:
            title += " (the machine was busy: doubtful)"
        figure.suptitle(title, x=0.01, ha="left", color="#555555", fontsize=10)
        paths = [out / "report.svg", out / "report.png"]
        for path in paths:
            figure.savefig(path, dpi=140)
        plt.close(figure)
    return paths


def _latency(ax: Axes, cases: list[Results]) -> None:
    for i, case in enumerate(cases):
        times = np.sort([sample["python"] * 1e3 for sample in case["samples"]])
        if not len(times):
            continue
        share = np.arange(1, len(times) + 1) / len(times) * 100
        # The main cases, of 200 cancels, in bold; the ones to compare with are thin.
        bold = case["honoured"] >= 0.9 * max(c["honoured"] for c in cases)
        label = f"{case['about']} (99 %: {case['latency']['p99'] * 1e3:.1f} ms)"
        colour = COLOURS[i % len(COLOURS)]
        ax.step(
            times, share, where="post", label=label, color=colour, lw=2.4 if bold else 1.1, ls="-" if bold else "--"
        )
    ax.axhline(99, color="#999999", lw=0.8, ls=":")
    for wanted in (10, 20):
        ax.axvline(wanted, color="#999999", lw=0.8, ls=":")
        ax.annotate(f"{wanted} ms", (wanted, 2), color="#777777", fontsize=8, ha="right", rotation=90)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_ylim(0, 101)
    ax.set_title("How soon a cancel is honoured")
    ax.set_xlabel("milliseconds from cancel() to the return of the call, rollback included")
    ax.set_ylabel("% of cancels honoured by then")
    legend(ax, 2)


def _token_cost(ax: Axes, rows: list[Results]) -> None:
    series = (
        ("token / no token", "the token alone", COLOURS[0]),
        ("token / bare", "guard, protection and token", COLOURS[1]),
    )
    for i, row in enumerate(rows):
        for j, (pair, _, colour) in enumerate(series):
            ratio = row["ratios"][pair]
            y = i + (j - 0.5) * 0.26
            cost, low, high = ((ratio[key] - 1) * 100 for key in ("median", "low", "high"))
            ax.plot([low, high], [y, y], color=colour, lw=2, alpha=0.5)
            ax.plot([cost], [y], "o", color=colour, ms=6)
    for _, label, colour in series:
        ax.plot([], [], "o-", color=colour, label=label)
    # What is farther out than this is noise of a busy machine; it must not hide the rest.
    intervals = [(row["ratios"][pair][key] - 1) * 100 for row in rows for pair, *_ in series for key in ("low", "high")]
    ax.set_xlim(max(-12.0, min(intervals) - 0.5), min(15.0, max(3.0, *intervals) + 0.5))
    for limit in (1, 3):
        ax.axvline(limit, color="#999999", lw=0.8, ls=":")
    ax.axvline(0, color="#555555", lw=1)
    ax.set_yticks(range(len(rows)), [f"{row['arch']}, {row['work']}" for row in rows])
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_title("What a token costs")
    ax.set_xlabel("% more time than the same decode without (median, and the range that holds it with 95 % certainty)")
    legend(ax, 2)


def _repair(ax: Axes, rows: list[Results]) -> None:
    def micro(value: float | None) -> float:
        return max(value * 1e6, 0.1) if value is not None else float("nan")

    bars = [
        ("guard of one row, snapshot included", [micro(row["single_row"]["guard_seconds"]) for row in rows]),
        ("repair of a whole call", [micro((row["cancelled"]["repair"] or {}).get("median")) for row in rows]),
        ("repair of one of two sequences", [micro((row["one_of_two"]["repair"] or {}).get("median")) for row in rows]),
    ]
    width = 0.8 / len(bars)
    for j, (label, values) in enumerate(bars):
        x = np.arange(len(rows)) + (j - (len(bars) - 1) / 2) * width
        drawn = ax.bar(x, np.nan_to_num(values, nan=0.1), width * 0.92, label=label, color=COLOURS[j])
        texts = [f"{value:.0f}" if np.isfinite(value) else "?" for value in values]
        ax.bar_label(drawn, texts, fontsize=8, padding=2, color="#444444")
    ax.set_yscale("log")
    ax.set_ylim(bottom=0.5)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xticks(range(len(rows)), [f"{row['arch']}\n{row['memory_kind'].replace('_', ' ')}" for row in rows])
    ax.grid(axis="x", visible=False)
    ax.set_title("What protection takes, for each kind of memory")
    ax.set_ylabel("microseconds")
    legend(ax, 3)


def legend(ax: Axes, columns: int) -> None:
    """A legend below a panel."""
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=columns, fontsize=9)
