"""Two prompts at once, one of them cancelled, and what became of both."""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import llamacancel as lc

from ...conformance.lanes import Lane
from ...llama import default_threads
from .show import Progress, check, named, say, text_lanes

__all__ = ["TEXT", "load", "made", "show_decode"]

TEXT = """\
A reader opens a chat window, pastes a report of forty pages and asks for a summary. The server begins to read:
token after token of the report goes through every layer of the model before the first word of an answer can be
written. Then the reader sees that it was the wrong report and closes the window. Nobody wants the work any more,
but most servers go on reading for as long as the report lasts, and everybody who asked after this reader waits.
Some servers do stop, and take the work of the neighbours down with it, since they all look at one flag. Others stop
and forget to tidy up: half of the report stays in the model's memory, and the next answer is about the wrong pages.
Stopping is easy to ask for and hard to get right. It has to reach the one piece of work that was meant, at once, in
the middle of a computation, and afterwards everything has to be as if that work had never begun.
"""
CANCEL_AFTER = 0.4  # of the time that the prompt takes
ATTEMPTS = 20


def show_decode(args: argparse.Namespace) -> bool:
    """Show what a cancelled `decode` leaves; whether all was as it should be."""
    threads = args.threads or max(1, default_threads() // 2)
    cases: list[tuple[str, Callable[[], Path]]]
    if args.model:
        cases = [("your model", lambda: args.model)]
    else:
        cases = [
            ("a model that remembers every token (attention)", lambda: made("llama", args.size)),
            ("a model that keeps one running state (recurrent)", lambda: made("mamba", args.size)),
        ]
    good = True
    for number, (words, path) in enumerate(cases, 1):
        say(f"{number}. With {words}")
        with load(path()) as model:
            good = _show(model, args.tokens, threads) and good
        say()
    return good


def made(arch: str, size: str) -> Path:
    """The file of a made model, which is kept."""
    from ..make_model import cached_model

    with Progress(f"making a {size} {arch} model with a real vocabulary (kept for next time)"):
        return cached_model(arch, size)


def load(path: Path) -> lc.Model:
    """Load a model, and tell how far it is."""
    with Progress(f"loading {path.name}") as progress:
        return lc.Model.load(path, progress=progress.share)


def _show(model: lc.Model, n_tokens: int, threads: int) -> bool:
    n_tokens = min(n_tokens, model.n_ctx_train - 8)
    tokens = model.tokenize(TEXT)
    prompts = {
        name: np.resize(np.roll(tokens, -shift), n_tokens).astype(np.int32) for name, shift in (("A", 0), ("B", 40))
    }
    say(f"   {named(model)}; prompts of {n_tokens} tokens, {threads} thread{'s' * (threads > 1)} each")

    contexts = {name: model.context(n_ctx=n_tokens + 64, n_batch=n_tokens, n_threads=threads) for name in prompts}
    batches = {name: lc.Batch(n_tokens) for name in prompts}
    for name, batch in batches.items():
        batch.add_sequence(prompts[name])
    try:
        reference: dict[str, Any] = {}
        for name in prompts:
            with Progress(f"reading prompt {name} alone, for comparison"):
                contexts[name].decode(batches[name])
                reference[name] = contexts[name].logits()
                contexts[name].memory.clear()

        # How long the two take side by side, so that the cancel comes in the middle.
        with Progress("reading both at once, nobody cancels"):
            both = _side_by_side(contexts, batches, cancel_after=None)
        whole = both["A"].seconds
        for name in prompts:
            contexts[name].memory.clear()
        with Progress("reading both at once, A is cancelled on the way"):
            for attempt in range(ATTEMPTS):  # this machine may be faster now than it was before
                lanes = _side_by_side(contexts, batches, cancel_after=whole * CANCEL_AFTER / 2**attempt)
                if lanes["A"].error is not None:
                    break
                for context in contexts.values():
                    context.memory.clear()
        say("\n" + "".join(f"     {line}\n" for line in text_lanes([_lane_of(*item) for item in lanes.items()])))
        a, b = lanes["A"], lanes["B"]
        good = True
        if a.error is None:
            check("A is cancelled on the way", False)
            say(f"     A was through before the cancel came, after {a.seconds:.2f} s; try a longer prompt (--tokens)")
            return False
        say(f"   A was cancelled after {a.cancelled_at:.2f} s and gave control back {a.latency * 1e3:.1f} ms later;")
        say(f"     reading on to the end would have taken another {whole - a.cancelled_at:.2f} s.")
        good &= check("A's context is as it was before the call", contexts["A"].memory.pos_max(0) == -1)
        good &= check(
            "B never noticed: its result is the same to the last bit",
            b.error is None and np.array_equal(contexts["B"].logits(), reference["B"]),
        )

        with Progress("reading A again"):
            contexts["A"].decode(batches["A"])
        good &= check(
            "A, read again, gives the same result to the last bit",
            np.array_equal(contexts["A"].logits(), reference["A"]),
        )
        contexts["A"].memory.clear()
        return good & _resume(contexts["A"], prompts["A"], reference["A"])
    finally:
        for context in contexts.values():
            context.close()


def _resume(context: Any, prompt: Any, reference: Any) -> bool:
    """Cancel once more, keep what is done, and go on from there."""
    batch = lc.Batch(len(prompt))
    batch.add_sequence(prompt)
    start = time.perf_counter()
    context.decode(batch)
    whole = time.perf_counter() - start
    context.memory.clear()
    try:
        context.decode(batch, lc.CancelToken(timeout=whole / 2), on_cancel="keep")
    except lc.DeadlineExceeded as error:
        done = error.sequences[0].end
        rest = lc.Batch(len(prompt))
        rest.add_sequence(prompt[done:], pos=done)
        start = time.perf_counter()
        context.decode(rest)
        seconds = time.perf_counter() - start
        say(
            f'   With on_cancel="keep" a deadline stopped A at token {done} of {len(prompt)}; '
            f"the rest took {seconds:.2f} s."
        )
        return check("A, resumed, gives the same result to the last bit", np.array_equal(context.logits(), reference))
    say("   A was through before its deadline; nothing to resume.")
    return True


@dataclass
class _Lane:
    """What happened to one prompt; times in seconds from the common start."""

    seconds: float = 0.0
    cancelled_at: float = 0.0
    latency: float = 0.0
    error: Exception | None = None


def _side_by_side(contexts: Any, batches: Any, cancel_after: float | None) -> dict[str, _Lane]:
    """Decode every batch in its context, each in a thread; cancel A after so many seconds."""
    lanes = {name: _Lane() for name in batches}
    tokens = {name: lc.CancelToken() for name in batches}
    start = time.perf_counter()

    def read(name: str) -> None:
        lane = lanes[name]
        try:
            contexts[name].decode(batches[name], tokens[name])
        except lc.DecodeCancelled as error:
            lane.error, lane.latency = error, error.latency
        lane.seconds = time.perf_counter() - start

    threads = [threading.Thread(target=read, args=(name,)) for name in batches]
    for thread in threads:
        thread.start()
    if cancel_after is not None:
        time.sleep(cancel_after)
        lanes["A"].cancelled_at = time.perf_counter() - start
        tokens["A"].cancel("the reader closed the window")
    for thread in threads:
        thread.join()
    return lanes


def _lane_of(name: str, lane: _Lane) -> Lane:
    if lane.error is None:
        return Lane(name, [("prefill", 0, lane.seconds)], [("answered", lane.seconds, "")])
    return Lane(name, [("prefill", 0, lane.seconds)], [("hang-up", lane.cancelled_at, "")])
