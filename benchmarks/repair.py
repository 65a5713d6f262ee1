"""What protection against a cancel costs for each kind of memory: the snapshot before, the repair after."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import llamacancel as lc

from .latency import cancel_during, uncancelled
from .stats import alternate, distribution, median
from .token_cost import timed_variants
from .workload import Settings, Start, Step, batch_of, prompt, same_bits, single_rows

__all__ = ["ARCHITECTURES", "steps"]

ARCHITECTURES = ("llama", "moe", "swa", "mamba", "hybrid", "hybrid-swa")
N_UBATCH = 64


def steps(settings: Settings) -> list[Step]:
    """A step for each architecture."""
    seconds = 0.8 if settings.quick else 6.0
    return [Step("snapshot and repair", arch, seconds, _runner(settings, arch)) for arch in ARCHITECTURES]


def _runner(settings: Settings, arch: str) -> Callable[..., dict[str, Any]]:
    return lambda progress: measure(settings, arch, progress)


def measure(settings: Settings, arch: str, progress: Callable[[float], None]) -> dict[str, Any]:
    """Snapshot and repair of one architecture, in a context that holds a history (a window that is full)."""
    rng = settings.rng("repair", arch)
    model = settings.models.get(arch, settings.small)
    history = prompt(model, 320 if settings.quick else 600, rng)
    rows = 128 if settings.quick else 256
    with model.context(n_ctx=1024, n_ubatch=N_UBATCH, n_threads=settings.threads) as context:
        start = Start(context, history)
        found = {"arch": arch, "memory_kind": context.memory.kind, "history": len(history), "rows": rows}
        found["single_row"] = _single_row(settings, start, rng, progress)
        progress(0.4)
        found["cancelled"] = _cancelled(settings, start, rows, rng)
    progress(0.7)
    with model.context(n_ctx=2048, n_ubatch=N_UBATCH, n_seq_max=2, n_threads=settings.threads) as context:
        found["one_of_two"] = _one_of_two(settings, Start(context, history, 2), rows, rng)
    return found


def _single_row(settings: Settings, start: Start, rng: Any, progress: Callable[[float], None]) -> dict[str, Any]:
    """The snapshot for one row, and what the guard takes per row: decode() less the bare C call, in pairs."""
    chain = 4 if settings.quick else 16
    tokens = prompt(start.context.model, chain, rng)
    batches = single_rows(tokens, start.pos)
    samples = alternate(
        timed_variants(start, batches, ("bare", "no token")),
        rng,
        rounds=(2, 2) if settings.quick else (8, 40),
        budget=0.2 if settings.quick else 2.0,
        progress=lambda share: progress(0.4 * share),
    )
    differences = [(a - b) / chain for a, b in zip(samples["no token"], samples["bare"], strict=True)]
    start.reset()
    result = start.context.decode(batches[0])
    return {
        "snapshot_bytes": result.snapshot_bytes,
        "snapshot_seconds": getattr(result, "snapshot_seconds", None),
        "guard_seconds": median(differences),
        "bare_seconds": median(samples["bare"]) / chain,
    }


def _cancelled(settings: Settings, start: Start, rows: int, rng: Any) -> dict[str, Any]:
    """A whole call cancelled in its second half: what was saved, how long the rollback took."""
    context = start.context
    batch = batch_of(prompt(context.model, rows, rng), start.pos)
    seconds, reference = uncancelled(start, batch)
    start.reset()
    result = context.decode(batch)
    start.reset()
    repairs: list[float] = []
    honoured = 0
    for _ in range(4 if settings.quick else 16):
        sample = cancel_during(context, batch, float(rng.uniform(0.5, 0.95)) * seconds)
        if sample is None:
            start.reset()
            continue
        honoured += 1
        if sample["repair"] is not None:
            repairs.append(sample["repair"])
    context.decode(batch)
    return {
        "n_ubatches": result.n_ubatches,
        "decode_seconds": seconds,
        "snapshot_bytes": result.snapshot_bytes,
        "snapshot_seconds": getattr(result, "snapshot_seconds", None),
        "honoured": honoured,
        "repair": distribution(repairs),
        "redone": 1,
        "wrong_bits": int(not same_bits(context.logits(), reference)),
    }


def _one_of_two(settings: Settings, start: Start, rows: int, rng: Any) -> dict[str, Any]:
    """Two sequences share a call and one is cancelled: the other goes on, the cancelled one is rolled back."""
    context = start.context
    batch = lc.Batch(rows)
    for seq in range(2):
        batch.add_sequence(prompt(context.model, rows // 2, rng), pos=start.pos, seq_id=seq)
    seconds, _ = uncancelled(start, batch)
    start.reset()
    whole = context.decode(batch)
    repairs: list[float] = []
    too_late = 0
    for _ in range(3 if settings.quick else 10):
        start.reset()
        token = lc.CancelToken()
        timer = threading.Timer(float(rng.uniform(0.6, 0.9)) * seconds, token.cancel)
        timer.start()
        try:
            result = context.decode(batch, {1: token})
        finally:
            timer.cancel()
            timer.join()
        if result.sequences[1].state == "rolled_back":
            repairs.append(result.repair_seconds)
        else:
            too_late += 1
    return {"snapshot_bytes": whole.snapshot_bytes, "too_late": too_late, "repair": distribution(repairs)}
