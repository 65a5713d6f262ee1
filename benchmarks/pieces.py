"""What stops between pieces of a graph cost: the CPU stands in for a device that is handed its work in pieces."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import llamacancel as lc

from .stats import alternate, median, paired_ratio
from .workload import Settings, Start, Step, batch_of, prompt, single_rows

__all__ = ["AIM", "pieces_for", "steps"]

AIM = 0.02
N_UBATCH = 512
MOST = 256


def steps(settings: Settings) -> list[Step]:
    """A step for each size of model and kind of work."""
    sizes = [settings.small, *(["tiny" if settings.quick else "1b"] if settings.with_1b else [])]
    found = []
    for size, name in zip(sizes, ("small model", "1 B shape"), strict=False):
        for work in ("prefill", "single-token"):
            seconds = 1.0 if settings.quick else 90.0 if (name, work) == ("1 B shape", "prefill") else 20.0
            run = _runner(settings, size, name, work, seconds)
            found.append(Step("pieces of a graph", f"{name}, {work}", seconds, run))
    return found


def pieces_for(seconds: float, aim: float = AIM) -> int:
    """The pieces that a context chooses for a ubatch that takes so long on a device (`Cut::pieces_at` in cut.cpp)."""
    share = seconds / (0.8 * aim)
    return 0 if share <= 1 else min(MOST, math.ceil(3 * share))


def _runner(settings: Settings, size: str, name: str, work: str, budget: float) -> Callable[..., dict[str, Any]]:
    return lambda progress: measure(settings, size, name, work, budget, progress)


def measure(
    settings: Settings, size: str, name: str, work: str, budget: float, progress: Callable[[float], None]
) -> dict[str, Any]:
    """Time a decode under a token in contexts that differ in the number of pieces only.

    A prefill is one full ubatch, in as many pieces as `cancel_latency=0.02` would choose if the ubatch ran on a device
    that takes as long for it, and in the most that there can be. A single token is never cut on a device: it is handed
    over in one piece here, and the look before it is more than a device gets.
    """
    rng = settings.rng("pieces", size, work)
    model = settings.models.get("llama", size)
    rows = N_UBATCH if work == "prefill" else 8 if settings.quick else 32
    tokens = prompt(model, rows, rng)
    batches = [batch_of(tokens)] if work == "prefill" else single_rows(tokens)
    contexts: list[lc.Context] = []
    variants: dict[str, Callable[[], float]] = {}

    def add(variant: str, **params: Any) -> Start:
        context = model.context(n_ctx=1024, n_ubatch=N_UBATCH, n_threads=settings.threads, **params)
        contexts.append(context)
        start = Start(context, tokens[:0])

        def sample() -> float:
            start.reset()
            token = lc.CancelToken()
            begin = time.perf_counter()
            for batch in batches:
                context.decode(batch, token)
            return time.perf_counter() - begin

        variants[variant] = sample
        return start

    try:
        add("whole")
        variants["whole"]()
        whole_seconds = median([variants["whole"]() for _ in range(3)])
        chosen = pieces_for(whole_seconds) if work == "prefill" else 0
        counts = {"chosen": max(chosen, 1), "most": MOST} if work == "prefill" else {"chosen": 1}
        for variant, n_pieces in counts.items():
            add(variant, _n_pieces=n_pieces)
        rounds = (2, 3) if settings.quick else (12, 120)
        samples = alternate(variants, rng, rounds=rounds, budget=budget, progress=progress)
    finally:
        for context in contexts:
            context.close()
    return {
        "model": name,
        "size": size,
        "work": work,
        "rows": rows,
        "aim": AIM,
        "pieces": counts,
        "tokens_per_second": {variant: rows / median(times) for variant, times in samples.items()},
        "throughput": {variant: paired_ratio(samples["whole"], samples[variant]) for variant in counts},
        "samples": samples,
    }
