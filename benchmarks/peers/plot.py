"""The figure: how soon a prefill is stopped, what that costs, and the servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..plot import COLOURS, draw_panels, legend
from ..server import plot as server_plot

__all__ = ["draw"]

Results = dict[str, Any]


def draw(results: Results, out: Path) -> list[Path]:
    """Draw what there is; the files that were written."""
    panels: list[Any] = []
    if any(row["stop"] for rows in results["libraries"].values() for row in rows):
        panels.append((_stops, results["libraries"]))
    if any(row["cost"] for rows in results["libraries"].values() for row in rows):
        panels.append((_costs, results["libraries"]))
    if results["conformance"]:
        panels.append((_conformance, results["conformance"]))
    panels += server_plot.panels({"load": results["load"], "freed": []})
    return draw_panels(results, panels, out)


def _named(libraries: dict[str, list[Results]], part: str) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["peer"], way) for rows in libraries.values() for row in rows for way in row[part]))


def _stops(ax: Axes, libraries: dict[str, list[Results]]) -> None:
    names = _named(libraries, "stop")
    for j, (arch, rows) in enumerate(libraries.items()):
        colour = COLOURS[j % len(COLOURS)]
        for row in rows:
            for way, of in row["stop"].items():
                y = names.index((row["peer"], way)) + (j - (len(libraries) - 1) / 2) * 0.3
                for sample in of["samples"]:
                    right = sample["next"] == sample["again"] == "right"
                    style: Any = {"marker": "o", "alpha": 0.6} if right else {"marker": "x", "mew": 2}
                    ax.plot(max(sample["latency"] * 1e3, 0.01), y, ms=6, color=colour, **style)
                if of["rest"]:
                    ax.plot(of["rest"]["median"] * 1e3, y, "|", ms=16, mew=2, color="#777777")
        ax.plot([], [], "o", color=colour, label=arch)
    ax.plot([], [], "|", ms=12, mew=2, color="#777777", label="rest of the prefill, median")
    ax.plot([], [], "x", mew=2, color="#333333", label="a later call on the object was wrong")
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_yticks(range(len(names)), [f"{peer}\n{way}" for peer, way in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.set_title("Asked to stop in a prefill: farther left is better")
    ax.set_xlabel("milliseconds from asking to having control back")
    legend(ax, 4)


def _costs(ax: Axes, libraries: dict[str, list[Results]]) -> None:
    names = _named(libraries, "cost")
    for j, (arch, rows) in enumerate(libraries.items()):
        widths, spans = [np.nan] * len(names), [(0.0, 0.0)] * len(names)
        for row in rows:
            for way, of in row["cost"].items():
                i, ratio = names.index((row["peer"], way)), of["ratios"]["busy"]
                widths[i] = ratio["median"]
                spans[i] = (ratio["median"] - ratio["low"], ratio["high"] - ratio["median"])
        y = np.arange(len(names)) + (j - (len(libraries) - 1) / 2) * 0.35
        drawn = ax.barh(y, widths, 0.32, label=arch, color=COLOURS[j % len(COLOURS)])
        ax.bar_label(drawn, [f"{v:.2f}" if np.isfinite(v) else "" for v in widths], fontsize=8, label_type="center")
        ax.errorbar(widths, y, xerr=np.array(spans).T, fmt="none", ecolor="#333333", lw=1, capsize=3)
    ax.axvline(1, color="#555555", lw=1)
    ax.set_yticks(range(len(names)), [f"{peer}\n{way}" for peer, way in names])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.set_title("What it costs to be stoppable beside a busy Python thread: 1 is nothing")
    ax.set_xlabel("time of a prefill against one that cannot be stopped (median of pairs, and its 95 % range)")
    legend(ax, 4)


def _conformance(ax: Axes, rows: list[Results]) -> None:
    outcomes = (("passed", COLOURS[2]), ("could not be judged", "#bbbbbb"), ("failed", COLOURS[1]))
    left = np.zeros(len(rows))
    for outcome, colour in outcomes:
        counts = np.array([sum(s["outcome"] == outcome for s in row["scenarios"]) for row in rows])
        drawn = ax.barh(range(len(rows)), counts, 0.6, left=left, label=outcome, color=colour)
        ax.bar_label(drawn, [str(c) if c else "" for c in counts], label_type="center", fontsize=9)
        left = left + counts
    for i, row in enumerate(rows):
        if not row["scenarios"]:
            ax.annotate("could not be judged: see the report", (0.2, i), va="center", color="#777777")
    ax.set_yticks(range(len(rows)), [row["server"] for row in rows])
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_title("Scenarios of the conformance suite")
    legend(ax, 3)
