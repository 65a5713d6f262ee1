"""`llamacancel demo`: two prompts at once, one of them cancelled, and what became of both."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["add_arguments", "run"]

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
WIDTH = 48          # characters of a lane


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's arguments."""
    parser.add_argument("--model", type=Path, metavar="PATH", help="your own GGUF file (default: two small made models)")
    parser.add_argument("--tokens", type=int, default=1024, metavar="N", help="length of each prompt (default: 1024)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads for each prompt (default: half of the CPUs)")


def run(args: argparse.Namespace) -> int:
    """Show it; the exit status is 1 if something was not as it should be."""
    import llamacancel as lc
    from llamacancel._params import default_threads

    threads = args.threads or max(1, default_threads() // 2)
    print("llamacancel: what happens to a prompt that nobody wants any more\n")
    cases: list[tuple[str, Callable[[], Path]]]
    if args.model:
        cases = [("your model", lambda: args.model)]
    else:
        cases = [
            ("a model that remembers every token (attention)", lambda: _made("llama")),
            ("a model that keeps one running state (recurrent)", lambda: _made("mamba")),
        ]
    good = True
    for number, (words, path) in enumerate(cases, 1):
        print(f"{number}. With {words}")
        with _load(lc, path()) as model:
            good = _show(lc, model, args.tokens, threads) and good
        print()
    print("All as it should be." if good else "Something was not as it should be; see the lines marked with '!'.")
    return 0 if good else 1


def _made(arch: str) -> Path:
    from .make_model import cached_model

    with _Progress(f"making a small {arch} model with a real vocabulary (kept for next time)"):
        return cached_model(arch, "small")


def _load(lc: Any, path: Path) -> Any:
    with _Progress(f"loading {path.name}") as progress:
        return lc.Model.load(path, progress=progress.share)


def _show(lc: Any, model: Any, n_tokens: int, threads: int) -> bool:
    n_tokens = min(n_tokens, model.n_ctx_train - 8)
    tokens = model.tokenize(TEXT)
    prompts = {name: np.resize(np.roll(tokens, -shift), n_tokens).astype(np.int32) for name, shift in (("A", 0), ("B", 40))}
    print(f"   {model.description}; prompts of {n_tokens} tokens, {threads} thread{'s' * (threads > 1)} each")

    contexts = {name: model.context(n_ctx=n_tokens + 64, n_batch=n_tokens, n_threads=threads) for name in prompts}
    batches = {name: lc.Batch(n_tokens) for name in prompts}
    for name, batch in batches.items():
        batch.add_sequence(prompts[name])
    try:
        reference: dict[str, Any] = {}
        for name in prompts:
            with _Progress(f"reading prompt {name} alone, for comparison"):
                contexts[name].decode(batches[name])
                reference[name] = contexts[name].logits()
                contexts[name].memory.clear()

        # How long the two take side by side, so that the cancel comes in the middle.
        with _Progress("reading both at once, nobody cancels"):
            both = _side_by_side(lc, contexts, batches, cancel_after=None)
        whole = both["A"].seconds
        for name in prompts:
            contexts[name].memory.clear()
        with _Progress("reading both at once, A is cancelled on the way"):
            lanes = _side_by_side(lc, contexts, batches, cancel_after=whole * CANCEL_AFTER)
        _draw(lanes)
        a, b = lanes["A"], lanes["B"]
        good = True
        if a.error is None:
            print(f"   ! A was through before the cancel came, after {a.seconds:.2f} s; try a longer prompt (--tokens)")
            return False
        print(f"   A was cancelled after {a.cancelled_at:.2f} s and gave control back {a.latency * 1e3:.1f} ms later;")
        print(f"     reading on to the end would have taken another {whole - a.cancelled_at:.2f} s.")
        good &= _check("A's context is as it was before the call", contexts["A"].memory.pos_max(0) == -1)
        good &= _check("B never noticed: its result is the same to the last bit",
                       b.error is None and np.array_equal(contexts["B"].logits(), reference["B"]))

        with _Progress("reading A again"):
            contexts["A"].decode(batches["A"])
        good &= _check("A, read again, gives the same result to the last bit",
                       np.array_equal(contexts["A"].logits(), reference["A"]))
        contexts["A"].memory.clear()
        return good & _resume(lc, contexts["A"], prompts["A"], reference["A"])
    finally:
        for context in contexts.values():
            context.close()


def _resume(lc: Any, context: Any, prompt: Any, reference: Any) -> bool:
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
        print(f"   With on_cancel=\"keep\" a deadline stopped A at token {done} of {len(prompt)}; the rest took {seconds:.2f} s.")
        return _check("A, resumed, gives the same result to the last bit", np.array_equal(context.logits(), reference))
    print("   A was through before its deadline; nothing to resume.")
    return True


@dataclass
class _Lane:
    """What happened to one prompt; times in seconds from the common start."""

    seconds: float = 0.0
    cancelled_at: float = 0.0
    latency: float = 0.0
    error: Exception | None = None


def _side_by_side(lc: Any, contexts: Any, batches: Any, cancel_after: float | None) -> dict[str, _Lane]:
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


def _draw(lanes: dict[str, _Lane]) -> None:
    longest = max(lane.seconds for lane in lanes.values())
    print()
    for name, lane in lanes.items():
        bar = "█" * max(1, round(WIDTH * lane.seconds / longest))
        end = "✗ cancelled" if lane.error else "✓ done"
        print(f"     {name} │{bar}{end}  {lane.seconds:.2f} s")
    print()


def _check(words: str, holds: bool) -> bool:
    print(f"   {'✓' if holds else '!'} {words}{'' if holds else ': NOT SO'}")
    return holds


class _Progress:
    """A line that tells what is going on, for how long, and how far it is; it goes when the work is done."""

    def __init__(self, words: str) -> None:
        self._words = words
        self._share: float | None = None
        self._done = threading.Event()
        self._shown = sys.stderr.isatty()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def share(self, share: float) -> None:
        self._share = share

    def __enter__(self) -> _Progress:
        if self._shown:
            self._thread.start()
        else:
            print(f"   ... {self._words}", file=sys.stderr, flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._done.set()
            self._thread.join()
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _tick(self) -> None:
        start = time.perf_counter()
        while not self._done.wait(0.2):
            share = "" if self._share is None else f", {self._share:.0%}"
            elapsed = time.perf_counter() - start
            print(f"\r\x1b[K   ... {self._words} ({elapsed:.0f} s{share})", end="", file=sys.stderr, flush=True)
