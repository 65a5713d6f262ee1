"""What is measured on a device. A program: it runs one measurement and writes what it found to a file."""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llamacancel as lc
from llamacancel.commands.make_model import cached_model

from .. import machine
from ..latency import Case, cancel_during, measure
from ..report import rounded
from ..stats import alternate, distribution, median, paired_ratio
from ..token_cost import timed_variants
from ..workload import Models, Settings, Start, batch_of, prompt, same_bits, single_rows
from .target import Target, find

__all__ = ["AIM", "MEASURES", "ROWS"]

AIM = 0.005
ROWS = 8192
KINDS = ("llama", "moe", "swa", "mamba", "hybrid", "hybrid-swa")
KIND_PIECES = 16  # small models are done too soon to be handed over in pieces, and would not be stopped inside a graph

VARIANTS = ("bare", "no token", "token")
Progress = Callable[[float], None]


def _settings(target: Target, n_gpu_layers: int = -1) -> Settings:
    return Settings(target.threads, target.quick, target.seed, True, Models(**target.load(n_gpu_layers)))


def _rows(target: Target) -> int:
    return 256 if target.quick else 1024 if target.forced else ROWS


def _big(target: Target, n_ctx: int) -> dict[str, Any]:
    return target.context(n_ctx=n_ctx, n_batch=n_ctx, n_threads=target.threads, cancel_latency=AIM)


def weights(target: Target, _: Progress) -> dict[str, Any]:
    """Make the model; its file is kept for the next time."""
    begin = time.perf_counter()
    path = cached_model("llama", target.size)
    return {"seconds": time.perf_counter() - begin, "bytes": path.stat().st_size}


def latency(target: Target, progress: Progress) -> dict[str, Any]:
    """Cancels of a long prefill at random moments, and how long the plain library would have gone on after each."""
    settings, rows = _settings(target), _rows(target)
    with settings.models as models:
        params = _big(target, rows)
        cancels, redone = (6, 2) if target.quick else (20, 5) if target.forced else (120, 10)
        about = f"{target.size}, prefill of {rows} tokens, cancel_latency={AIM}"
        case = Case("prefill", "llama", target.size, params, cancels, rows, (0,), redone, about)
        found = measure(settings, case, progress)
        model = models.get("llama", target.size)
        with model.context(**params) as context:
            start = Start(context, prompt(model, 0, settings.rng()))
            batch = batch_of(prompt(model, rows, settings.rng("plain")))
            bare = timed_variants(start, [batch], ["bare"])["bare"]
            bare()
            whole = median([bare() for _ in range(3)])
            found["n_pieces"] = context.latency_plan.n_pieces
    waits = [max(0.0, whole - sample["moment"]) for sample in found["samples"]]
    return {**found, "plain": {"whole": whole, "wait": distribution(waits)}}


def prefill(target: Target, progress: Progress) -> dict[str, Any]:
    """The same prefill in turn as llama.cpp's own call, by decode() without a token, and with one."""
    return _cost(target, "prefill", _rows(target), 0, (4, 40), progress)


def single_token(target: Target, progress: Progress) -> dict[str, Any]:
    """Single tokens one after the other, likewise."""
    return _cost(target, "single-token", 8 if target.quick else 64, 64 if target.quick else 512, (8, 80), progress)


def _cost(
    target: Target, work: str, rows: int, history: int, rounds: tuple[int, int], progress: Progress
) -> dict[str, Any]:
    settings = _settings(target)
    rng = settings.rng("cost", work)
    with settings.models as models:
        model = models.get("llama", target.size)
        with model.context(**_big(target, history + rows)) as context:
            start = Start(context, prompt(model, history, rng))
            tokens = prompt(model, rows, rng)
            if work == "prefill":
                batches = [batch_of(tokens, start.pos)]
            else:
                batches = single_rows(tokens, start.pos)
            variants = timed_variants(start, batches, VARIANTS)
            budget = 0.5 if target.quick else 120.0
            samples = alternate(
                variants, rng, rounds=(2, 3) if target.quick else rounds, budget=budget, progress=progress
            )
            plan = context.latency_plan
    return {
        "work": work,
        "rows": rows,
        "history": history,
        "n_ubatch": plan.n_ubatch,
        "n_pieces": plan.n_pieces if work == "prefill" else 0,
        "tokens_per_second": {name: rows / median(times) for name, times in samples.items()},
        "of_bare": {name: paired_ratio(samples["bare"], samples[name]) for name in VARIANTS[1:]},
        "of_no_token": paired_ratio(samples["no token"], samples["token"]),
        "samples": samples,
    }


def two_contexts(target: Target, progress: Progress) -> dict[str, Any]:
    """Two contexts prefill at once on the device: one goes on to its end, the other is left alone or cancelled."""
    settings, rows = _settings(target), _rows(target) // 2
    rng = settings.rng("two contexts")
    cancelled: list[float] = []
    wrong = runs = 0
    with settings.models as models:
        model = models.get("llama", target.size)
        with (
            model.context(**_big(target, rows)) as survivor,
            model.context(**_big(target, 2 * rows)) as other,
        ):
            batch = batch_of(prompt(model, rows, rng))
            longer = batch_of(prompt(model, 2 * rows, rng))  # so that it does not end first
            survivor.decode(batch)
            reference = survivor.logits().copy()
            survivor.memory.clear()
            begin = time.perf_counter()
            survivor.decode(batch)
            alone = time.perf_counter() - begin

            def beside(cancel_within: float | None) -> float:
                nonlocal wrong, runs
                survivor.memory.clear()
                other.memory.clear()

                def neighbour() -> None:
                    if cancel_within is None:
                        other.decode(longer, lc.CancelToken())
                    elif sample := cancel_during(other, longer, float(rng.uniform(0, cancel_within))):
                        cancelled.append(sample["python"])

                thread = threading.Thread(target=neighbour, daemon=True)
                thread.start()
                start = time.perf_counter()
                survivor.decode(batch, lc.CancelToken())
                seconds = time.perf_counter() - start
                thread.join()
                runs += 1
                wrong += not same_bits(survivor.logits(), reference)
                return seconds

            def by_itself() -> float:
                survivor.memory.clear()
                start = time.perf_counter()
                survivor.decode(batch, lc.CancelToken())
                return time.perf_counter() - start

            variants: dict[str, Callable[[], float]] = {
                "alone": by_itself,
                "beside one that goes on": lambda: beside(None),
                "beside one that is cancelled": lambda: beside(alone),
            }
            rounds = (2, 3) if target.quick else (4, 8) if target.forced else (20, 60)
            samples = alternate(variants, rng, rounds=rounds, budget=120.0, progress=progress)
    goes_on, is_cancelled = samples["beside one that goes on"], samples["beside one that is cancelled"]
    return {
        "rows": rows,
        "seconds": {name: median(times) for name, times in samples.items()},
        "cancelled_of_going_on": paired_ratio(is_cancelled, goes_on),
        "runs": runs,
        "wrong_bits": wrong,
        "cancelled_latency": distribution(cancelled),
        "samples": samples,
    }


def partial_offload(target: Target, progress: Progress) -> dict[str, Any]:
    """Cancels of a prefill whose graph has splits on the device and on the CPU."""
    with Models(vocab_only=True) as models:
        n_layer = int(models.get("llama", target.size).metadata["llama.block_count"])
    settings, rows = _settings(target, n_layer // 2), 256 if target.quick else 1024
    cancels, redone = (4, 2) if target.quick else (20, 5)
    about = f"{target.size}, {n_layer // 2} of {n_layer} layers on the device, prefill of {rows} tokens"
    case = Case("partial", "llama", target.size, _big(target, rows), cancels, rows, (0,), redone, about)
    with settings.models:
        return measure(settings, case, progress)


def memory_kinds(target: Target, progress: Progress) -> dict[str, Any]:
    """Cancels inside a graph for every kind of memory, each done again and compared bit for bit."""
    settings = _settings(target)
    rows, cancels = (128, 4) if target.quick else (1024, 24)
    params = {"n_ctx": 2048, "n_batch": 2048, "_n_pieces": KIND_PIECES}
    found = []
    with settings.models:
        for i, arch in enumerate(KINDS):
            history = 64 if target.quick else 600
            case = Case(arch, arch, settings.small, params, cancels, rows, (0, history), cancels, f"{arch}")

            def share(done: float, i: int = i) -> None:
                progress((i + done) / len(KINDS))

            found.append(measure(settings, case, share))
    return {"kinds": found}


MEASURES: dict[str, Callable[[Target, Progress], dict[str, Any]]] = {
    "weights": weights,
    "latency": latency,
    "prefill": prefill,
    "single-token": single_token,
    "two contexts": two_contexts,
    "partial offload": partial_offload,
    "memory kinds": memory_kinds,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what is checked, for the check and for a single measurement."""
    parser.add_argument("--device", help="the device, as `llamacancel info` names it (the first GPU)")
    parser.add_argument("--forced", action="store_true", help="let the CPU stand in for a device: tries the steps")
    parser.add_argument("--quick", action="store_true", help="tiny models, few samples: shows that everything runs")
    parser.add_argument("--size", choices=("8b", "1b", "small"), help="the model (8b where there is room, else 1b)")
    parser.add_argument("--threads", type=int, default=machine.cores(), help="threads to compute with (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts, orders and moments")


def target_of(args: argparse.Namespace) -> Target:
    """The target that the arguments ask for."""
    return find(args.device, forced=args.forced, size=args.size, quick=args.quick, threads=args.threads, seed=args.seed)


def main() -> None:
    """Run one measurement and write its result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.measures", description=main.__doc__)
    parser.add_argument("name", choices=list(MEASURES))
    parser.add_argument("--out", type=Path, required=True)
    add_arguments(parser)
    args = parser.parse_args()
    shown = time.monotonic()

    def progress(share: float) -> None:
        nonlocal shown
        if time.monotonic() - shown > 20:
            shown = time.monotonic()
            print(f"  {share:.0%}", file=sys.stderr, flush=True)

    found = MEASURES[args.name](target_of(args), progress)
    args.out.write_text(json.dumps(rounded(found)), encoding="utf-8")


if __name__ == "__main__":
    main()
