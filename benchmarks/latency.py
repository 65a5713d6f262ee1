"""How soon a cancel is honoured: prefills cancelled from another thread at random moments."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import llamacancel as lc

from .stats import alternate, distribution, median, paired_ratio
from .workload import Settings, Start, Step, batch_of, prompt, same_bits

__all__ = ["Case", "cancel_during", "cases", "steps", "uncancelled"]


@dataclass(frozen=True)
class Case:
    """A model, a context and how often to cancel it.

    Attributes:
        key: Name in the report.
        arch, size: The model.
        params: Of the context; either `cancel_latency` or `n_ubatch`.
        cancels: Cancels that have to be honoured.
        rows: Rows of the prompt that is cancelled.
        histories: Tokens that the context holds before; the cancels are shared out among these.
        redone: How many of the cancelled calls are done again and compared bit for bit.
        about: What it is, in words.
    """

    key: str
    arch: str
    size: str
    params: dict[str, Any]
    cancels: int
    rows: int
    histories: tuple[int, ...]
    redone: int
    about: str


def cases(settings: Settings) -> list[Case]:
    """What is cancelled. `--quick` has the same cases with tiny models."""
    quick = settings.quick
    small, big = ("tiny", "tiny") if quick else ("small", "1b")
    histories = (0, 256) if quick else (0, 1024)
    few, some, many = (4, 8, 8) if quick else (20, 50, 200)
    redone = 2 if quick else 10
    rows, big_rows = (256, 256) if quick else (512, 160)
    name = "tiny model" if quick else "small model"
    big_name = "tiny model for the 1 B shape" if quick else "1 B shape"
    found = [
        Case("small llama", "llama", small, {}, many, rows, histories, redone, f"{name}, plain attention"),
        Case("small swa", "swa", small, {}, some, rows, histories, redone, f"{name}, sliding window"),
        Case("small mamba", "mamba", small, {}, some, rows, histories, redone, f"{name}, recurrent"),
        Case("small hybrid", "hybrid", small, {}, some, rows, histories, redone, f"{name}, hybrid"),
    ]
    if settings.with_1b:
        for target in (0.02, 0.01):
            about = f"{big_name}, cancel_latency={target}"
            params = {"cancel_latency": target}
            few_redone = min(redone, 6)
            found.append(Case(f"1b aim {target}", "llama", big, params, many, big_rows, histories, few_redone, about))
        for n_ubatch in (512, 128, 64):
            found.append(
                Case(
                    f"1b n_ubatch {n_ubatch}",
                    "llama",
                    big,
                    {"n_ubatch": n_ubatch},
                    few,
                    max(big_rows, n_ubatch),
                    (0,),
                    min(redone, 3),
                    f"{big_name}, fixed n_ubatch={n_ubatch}",
                )
            )
    return found


def steps(settings: Settings) -> list[Step]:
    """A step for each case, and one for the throughput of the 1 B shape."""
    found = []
    for case in cases(settings):
        # A cancelled prefill takes half of its time; the 1 B shape computes about 140 tokens/s on two cores.
        rate = 140 if case.size == "1b" else 1500
        seconds = 1.0 if settings.quick else ((case.cancels / 2 + case.redone) * case.rows + sum(case.histories)) / rate
        found.append(Step("latency of a cancel", case.about, seconds, _runner(settings, case)))
    if settings.with_1b:
        name = "throughput of the 1 B shape for each cut"
        seconds = 1.0 if settings.quick else 95.0
        found.append(Step("throughput", name, seconds, lambda progress: throughput(settings, progress)))
    return found


def _runner(settings: Settings, case: Case) -> Callable[..., dict[str, Any]]:
    return lambda progress: measure(settings, case, progress)


def measure(settings: Settings, case: Case, progress: Callable[[float], None]) -> dict[str, Any]:
    """Cancel a prefill again and again, each time at a moment drawn evenly from the time that it takes."""
    rng = settings.rng("latency", case.key)
    model = settings.models.get(case.arch, case.size)
    samples: list[dict[str, Any]] = []
    too_late = wrong_bits = redone = 0
    prefill: dict[int, float] = {}
    with model.context(**{"n_ctx": 2048, "n_threads": settings.threads, **case.params}) as context:
        plan = context.latency_plan
        for part, history in enumerate(case.histories):
            start = Start(context, prompt(model, history, rng))
            batch = batch_of(prompt(model, case.rows, rng), start.pos)
            seconds, reference = uncancelled(start, batch)
            prefill[history] = seconds
            wanted = case.cancels // len(case.histories)
            checks = -(-case.redone // len(case.histories))
            check_after = {round((i + 1) * wanted / checks) for i in range(checks)}
            honoured = attempts = 0
            start.reset()
            while honoured < wanted:
                if attempts == 3 * wanted + 20:
                    break  # prefills got that much faster that most cancels come too late
                attempts += 1
                sample = cancel_during(context, batch, float(rng.uniform(0, seconds)))
                if sample is None:
                    too_late += 1
                    start.reset()
                    continue
                honoured += 1
                samples.append({"history": history, **sample})
                progress((part + honoured / wanted) / len(case.histories))
                if honoured in check_after:
                    context.decode(batch)
                    redone += 1
                    wrong_bits += not same_bits(context.logits(), reference)
                    start.reset()
    latencies = [sample["python"] for sample in samples]
    shares = [s["repair"] / s["native"] for s in samples if s["repair"] is not None and s["native"]]
    repairs = [s["repair"] for s in samples if s["repair"] is not None]
    return {
        "key": case.key,
        "about": case.about,
        "arch": case.arch,
        "size": case.size,
        "params": case.params,
        "rows": case.rows,
        "n_ubatch": plan.n_ubatch,
        "aim": plan.target,
        "prefill_seconds": prefill,
        "honoured": len(samples),
        "too_late": too_late,
        "redone": redone,
        "wrong_bits": wrong_bits,
        "latency": distribution(latencies),
        "native_latency": distribution([sample["native"] for sample in samples]),
        "repair": distribution(repairs),
        "repair_share": distribution(shares),
        "samples": samples,
    }


def uncancelled(start: Start, batch: lc.Batch) -> tuple[float, np.ndarray]:
    """The median time of the decode when nobody cancels it, and its logits."""
    times = []
    for _ in range(3):
        start.reset()
        begin = time.perf_counter()
        start.context.decode(batch, lc.CancelToken())
        times.append(time.perf_counter() - begin)
    return median(times), start.context.logits()


def cancel_during(context: lc.Context, batch: lc.Batch, delay: float) -> dict[str, Any] | None:
    """Decode in this thread; another thread cancels it after `delay` seconds.

    Returns:
        `moment` (when it was cancelled, from the start), `python` (seconds from just before `cancel()` to
        the return of the call), `native` (the exception's own figure) and `repair` (seconds of the rollback,
        None if this build does not tell). None if the decode was through before: the cancel came too late.
    """
    token = lc.CancelToken()
    called: list[float] = []
    start = time.perf_counter()

    def cancel() -> None:
        time.sleep(max(0.0, start + delay - time.perf_counter()))
        called.append(time.perf_counter())
        token.cancel("benchmark")

    thread = threading.Thread(target=cancel, daemon=True)
    thread.start()
    try:
        context.decode(batch, token)
        return None
    except lc.DecodeCancelled as error:
        returned = time.perf_counter()
        return {
            "moment": called[0] - start,
            "python": returned - called[0],
            "native": error.latency,
            "repair": getattr(error, "repair_seconds", None),
        }
    finally:
        thread.join()


def throughput(settings: Settings, progress: Callable[[float], None]) -> dict[str, Any]:
    """Time the same prompt with each cut in turn: the bare C call, and decode() with a token and an aim."""
    rng = settings.rng("throughput")
    model = settings.models.get("llama", "tiny" if settings.quick else "1b")
    rows = 512
    batch = batch_of(prompt(model, rows, rng))
    contexts: list[lc.Context] = []
    variants: dict[str, Callable[[], float]] = {}
    cuts: dict[str, int] = {}

    def add(name: str, bare: bool, **params: Any) -> None:
        context = model.context(n_ctx=rows, n_threads=settings.threads, **params)
        contexts.append(context)
        cuts[name] = context.latency_plan.n_ubatch

        def sample() -> float:
            context.memory.clear()
            token = lc.CancelToken()
            begin = time.perf_counter()
            if bare:
                if context._decode_bare(batch):
                    raise RuntimeError("llama_decode() failed")
            else:
                context.decode(batch, token)
            return time.perf_counter() - begin

        variants[name] = sample

    try:
        for n_ubatch in (512, 128, 64):
            add(f"bare, n_ubatch {n_ubatch}", True, n_ubatch=n_ubatch)
        for target in (0.02, 0.01):
            add(f"aim {target}", False, cancel_latency=target)
        rounds = (2, 2) if settings.quick else (4, 8)
        samples = alternate(variants, rng, rounds=rounds, budget=1.0 if settings.quick else 75.0, progress=progress)
    finally:
        for context in contexts:
            context.close()
    base = samples["bare, n_ubatch 512"]
    return {
        "rows": rows,
        "variants": [
            {
                "name": name,
                "n_ubatch": cuts[name],
                "tokens_per_second": rows / median(values),
                "of_512": paired_ratio(base, values),
            }
            for name, values in samples.items()
        ],
        "samples": samples,
    }
