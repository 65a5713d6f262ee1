"""The figure: throughput, time to first token, and how soon a slot is free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ..plot import COLOURS, draw_panels, legend

__all__ = ["draw", "panels"]

Results = dict[str, Any]


def draw(results: Results, out: Path) -> list[Path]:
    """Draw what there is; the files that were written."""
    return draw_panels(results, panels(results), out)


def panels(results: Results) -> list[Any]:
    """The panels and what they draw."""
    found: list[Any] = []
    if any(row["servers"] for row in results["load"]):
        found += [(_throughput, results["load"]), (_ttft, results["load"])]
    if any(row["phases"] for row in results["freed"]):
        found.append((_freed, results["freed"]))
    return found


def _bars(ax: Axes, rows: list[Results], value: Any) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row["servers"]))
    width = 0.8 / max(len(names), 1)
    for j, name in enumerate(names):
        x = np.arange(len(rows)) + (j - (len(names) - 1) / 2) * width
        heights = [value(row["servers"][name]) if name in row["servers"] else np.nan for row in rows]
        drawn = ax.bar(x, heights, width * 0.92, label=name, color=COLOURS[j % len(COLOURS)])
        ax.bar_label(drawn, [f"{v:.3g}" if np.isfinite(v) else "" for v in heights], fontsize=8, padding=2)
    ax.set_xticks(
        range(len(rows)),
        [f"{row['clients']} clients" + ("\na third hangs up" if row["hang_ups"] else "") for row in rows],
    )
    ax.grid(axis="x", visible=False)
    legend(ax, 3)


def _throughput(ax: Axes, rows: list[Results]) -> None:
    _bars(ax, rows, lambda of: of["throughput_median"])
    ax.set_title("Throughput: more is better")
    ax.set_ylabel("tokens per second to clients who stayed")


def _ttft(ax: Axes, rows: list[Results]) -> None:
    _bars(ax, rows, lambda of: of["ttft"]["p99"] * 1e3 if of["ttft"] else np.nan)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_title("Time to first token, 99th percentile: less is better")
    ax.set_ylabel("milliseconds")


def _freed(ax: Axes, rows: list[Results]) -> None:
    styles = ("-", "--", ":", "-.")
    for i, row in enumerate(rows):
        for j, phase in enumerate(row["phases"]):
            times = np.sort([s["polled"] * 1e3 for s in row["samples"] if s["phase"] == phase])
            share = np.arange(1, len(times) + 1) / len(times) * 100
            ax.step(times, share, where="post", color=COLOURS[j % len(COLOURS)], ls=styles[i % len(styles)],
                    label=f"{row['server']}, {phase}")  # fmt: skip
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_ylim(0, 101)
    ax.set_title("How soon a slot is free after its client has hung up: farther left is better")
    ax.set_xlabel("milliseconds from the hang-up until the server's own page shows the slot free")
    ax.set_ylabel("% of hang-ups")
    legend(ax, 3)
