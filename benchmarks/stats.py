"""Medians, percentiles, and ratios of samples that were taken in pairs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

import numpy as np

__all__ = ["Distribution", "Ratio", "alternate", "distribution", "median", "paired_ratio"]


class Ratio(TypedDict):
    """The median of per-pair ratios with the 95 % bootstrap interval of that median."""

    median: float
    low: float
    high: float
    n: int


class Distribution(TypedDict):
    """A sample in six numbers."""

    n: int
    median: float
    p90: float
    p99: float
    max: float
    mean: float


def median(values: Sequence[float]) -> float:
    """The median of a sample that is not empty."""
    return float(np.median(values))


def distribution(values: Sequence[float]) -> Distribution | None:
    """Sum up a sample; None if it is empty. Percentiles are samples that occurred, never a value between two."""
    if not len(values):
        return None
    p90, p99 = (float(np.percentile(values, p, method="higher")) for p in (90, 99))
    return {
        "n": len(values),
        "median": median(values),
        "p90": p90,
        "p99": p99,
        "max": float(np.max(values)),
        "mean": float(np.mean(values)),
    }


def paired_ratio(a: Sequence[float], b: Sequence[float], *, resamples: int = 4000) -> Ratio:
    """The median of `a[i] / b[i]`, where a[i] and b[i] were measured in one round, with its 95 % interval.

    Args:
        a, b: Times of the two variants, round by round.
        resamples: Bootstrap resamples; their seed is fixed, so that a report can be computed again.
    """
    ratios = np.asarray(a, float) / np.asarray(b, float)
    picks = np.random.default_rng(0).integers(0, len(ratios), (resamples, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), (2.5, 97.5))
    return {"median": median(ratios), "low": float(low), "high": float(high), "n": len(ratios)}


def alternate(
    variants: Mapping[str, Callable[[], float]],
    rng: np.random.Generator,
    *,
    rounds: tuple[int, int],
    budget: float,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, list[float]]:
    """Time variants in turn: each once in every round, in an order that is drawn anew for each round.

    What slows the machine for a while slows all variants of a round alike, so that ratios within a round
    stay true. A first round warms caches and is thrown away.

    Args:
        variants: By name, a function that brings the context to its starting state, times one sample and
            returns the seconds that the timed part took.
        rng: Draws the orders.
        rounds: Fewest and most rounds.
        budget: Seconds after which no round is begun that is beyond the fewest.
        progress: Told the share that is done.

    Returns:
        By name, the seconds of each round.
    """
    fewest, most = rounds
    samples: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for name in names:
        variants[name]()
    start = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for done in range(most):
            spent = time.perf_counter() - start
            if done >= fewest and spent >= budget:
                break
            progress(min(1.0, max(min(spent / budget, done / fewest), done / most)))
            for i in rng.permutation(len(names)):
                samples[names[i]].append(variants[names[i]]())
    finally:
        gc.enable()
    return samples
