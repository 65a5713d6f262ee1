"""What a token costs: the same decode with a token, without one, and as the bare C call, in turn."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import llamacancel as lc

from .stats import alternate, median, paired_ratio
from .workload import Settings, Start, Step, batch_of, prompt, single_rows

__all__ = ["ARCHITECTURES", "VARIANTS", "steps", "timed_variants"]

ARCHITECTURES = ("llama", "moe", "swa", "mamba", "hybrid", "hybrid-swa")

VARIANTS = {
    "bare": "the C call itself, without guard and token",
    "no token": "decode() without a token",
    "token": "decode() with a token",
    "deadline": "decode() with a token that has a deadline",
}
RATIOS = (("token", "no token"), ("deadline", "no token"), ("no token", "bare"), ("token", "bare"))
WORKS = ("prefill", "single-token")
N_UBATCH = 128


def steps(settings: Settings) -> list[Step]:
    """A step for each architecture and kind of work."""
    found = []
    for arch in ARCHITECTURES:
        for work in WORKS:
            budget = 0.5 if settings.quick else 24.0
            run = _runner(settings, arch, work, budget)
            found.append(Step("cost of a token", f"{arch}, {work}", budget * 1.1, run))
    return found


def _runner(settings: Settings, arch: str, work: str, budget: float) -> Callable[..., dict[str, Any]]:
    return lambda progress: measure(settings, arch, work, budget, progress)


def measure(
    settings: Settings, arch: str, work: str, budget: float, progress: Callable[[float], None]
) -> dict[str, Any]:
    """Time the variants of one kind of work on one architecture.

    A prefill adds rows to a history that is there (a recurrent state or a full window has to be protected
    only then). Single tokens are added one after the other, each by the next variant in turn: what is compared lies
    milliseconds apart, in which a shared machine seldom changes.
    """
    rng = settings.rng("token", arch, work)
    model = settings.models.get(arch, settings.small)
    history = 320 if settings.quick else 600
    rows = 1 if work == "single-token" else 128 if settings.quick else 256
    with model.context(n_ctx=1024, n_ubatch=N_UBATCH, n_threads=settings.threads) as context:
        start = Start(context, prompt(model, history, rng))
        if work == "prefill":
            tokens = prompt(model, rows, rng)
            variants = timed_variants(start, [batch_of(tokens, start.pos)], tuple(VARIANTS))
        else:
            tokens = prompt(model, 16 if settings.quick else 400, rng)
            batches = single_rows(tokens, start.pos)
            variants = _one_by_one(start, batches)
        rounds = (2, 3) if settings.quick else (12, 120) if work == "prefill" else (100, 5000)
        samples = alternate(variants, rng, rounds=rounds, budget=budget, progress=progress)
        kind = context.memory.kind
    return {
        "arch": arch,
        "memory_kind": kind,
        "work": work,
        "rows": rows,
        "history": history,
        "n_ubatch": N_UBATCH,
        "seconds": {name: median(values) for name, values in samples.items()},
        "ratios": {f"{a} / {b}": paired_ratio(samples[a], samples[b]) for a, b in RATIOS},
        "samples": samples,
    }


def _one_by_one(start: Start, batches: Sequence[lc.Batch]) -> dict[str, Callable[[], float]]:
    """Functions that time the decode of the next of the batches, and begin again from the start after the last."""
    context = start.context
    left: list[lc.Batch] = []

    def timed(decode: Callable[[lc.Batch], object]) -> float:
        if not left:
            start.reset()
            left.extend(reversed(batches))
            context.decode(left.pop())  # the first one after a reset is no decode like the others
        batch = left.pop()
        begin = time.perf_counter()
        decode(batch)
        return time.perf_counter() - begin

    return {
        "bare": lambda: timed(context._decode_bare),
        "no token": lambda: timed(context.decode),
        "token": lambda: timed(functools.partial(context.decode, token=lc.CancelToken())),
        "deadline": lambda: timed(functools.partial(context.decode, token=lc.CancelToken(timeout=3600))),
    }


def timed_variants(start: Start, batches: Sequence[lc.Batch], names: Sequence[str]) -> dict[str, Callable[[], float]]:
    """Functions that reset the context, then time the decode of the batches one after the other.

    The batches are filled and the tokens are made before the clock starts.
    """
    context = start.context

    def bare() -> float:
        start.reset()
        begin = time.perf_counter()
        for batch in batches:
            if context._decode_bare(batch):
                raise RuntimeError("llama_decode() failed")
        return time.perf_counter() - begin

    def guarded(make_token: Callable[[], lc.CancelToken | None]) -> float:
        start.reset()
        token = make_token()
        begin = time.perf_counter()
        for batch in batches:
            context.decode(batch, token)
        return time.perf_counter() - begin

    variants: dict[str, Callable[[], float]] = {
        "bare": bare,
        "no token": lambda: guarded(lambda: None),
        "token": lambda: guarded(lc.CancelToken),
        "deadline": lambda: guarded(lambda: lc.CancelToken(timeout=3600)),
    }
    return {name: variants[name] for name in names}
