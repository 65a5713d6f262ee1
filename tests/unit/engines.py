"""Engines for tests: on tiny models whose answers do not depend on how rows were cut, with hooks between steps."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

import llamacancel as lc
from llamacancel.commands.make_model import cached_model
from llamacancel.engine.scheduler import Outcome, Plan, Request

GENERATIVE = ["llama", "swa", "mamba", "hybrid", "moe"]
WHOLE_ONLY = ["swa", "mamba", "hybrid"]  # a state that cannot be cut back

# In f32 and without flash attention, the same rows give logits that agree to 1e-5, however they were cut and wherever
# their cells lie. A sliding window's model computes its activation from a table of f16, which leaves 1e-2.
EXACT: dict[str, Any] = {
    "n_ctx": 1024,
    "n_threads": 1,
    "type_k": "f32",
    "type_v": "f32",
    "flash_attn": False,
    "kv_unified": True,
}
CLOSE = {"swa": 0.02}


@functools.cache
def model(arch: str) -> lc.Model:
    """The tiny model of an architecture, in f32."""
    return lc.Model.load(cached_model(arch, "tiny", quant="f32"))


def engine(arch: str = "llama", **params: Any) -> lc.Engine:
    """An engine on it that tells of every token, for a `with` statement."""
    return lc.Engine(model(arch), **{**EXACT, "slots": 2, "stream_interval": 0, **params})


def greedy() -> lc.Sampler:
    return lc.Sampler(temperature=0)


@functools.cache
def _ends() -> tuple[int, ...]:
    return tuple(token for token in range(model("llama").n_vocab) if model("llama").is_eog(token))


def endless() -> lc.Sampler:
    """Chooses as `greedy()`, and never ends a text; all test models have the same vocabulary."""
    return lc.Sampler(temperature=0, logit_bias=dict.fromkeys(_ends(), -1000.0))


def ids(n: int, seed: int = 0) -> list[int]:
    """`n` token ids; another seed gives others."""
    return [int(token) for token in np.random.default_rng(seed).integers(300, 30000, n)]


def answer(arch: str, prompt: Sequence[int], max_tokens: int) -> list[tuple[int, float]]:
    """What the model alone says to a prompt: tokens and their logprobs, in a context that nothing else ever used."""
    return list(_answer(arch, tuple(prompt), max_tokens))


@functools.cache
def _answer(arch: str, prompt: tuple[int, ...], max_tokens: int) -> tuple[tuple[int, float], ...]:
    told = []
    with model(arch).context(**EXACT) as context:
        batch, sampler, pos = lc.Batch(max(len(prompt), 1)), greedy(), 0
        batch.add_sequence(np.asarray(prompt))
        while True:
            pos += len(batch)
            context.decode(batch)
            token = sampler.sample(context)
            if model(arch).is_eog(token):
                break
            logits = context.logits().astype(np.float64)
            told.append((token, float(logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum()))))
            if len(told) == max_tokens:
                break
            batch.clear()
            batch.add(token, pos, 0, True)
    return tuple(told)


def same_answer(
    arch: str, generation: lc.Generation, expected: Sequence[tuple[int, float]], *, part: bool = False
) -> bool:
    """Whether a generation (with `logprobs=2`) said what the model alone says; with `part`, the beginning of it.

    Where two tokens are equally likely up to rounding either may be chosen, and what follows is not compared.
    """
    close = CLOSE.get(arch, 1e-3)
    given = generation.tokens
    for token, (wanted, logprob) in zip(given, expected, strict=False):
        if token.id != wanted:
            (_, _, best), (_, _, second) = token.top[:2]
            return best - second < close
        assert token.logprob is not None
        if abs(token.logprob - logprob) > close:
            return False
    return part or len(given) == len(expected)


def before_step(engine: lc.Engine, fn: Callable[[int, Plan], object]) -> None:
    """Calls `fn(number, plan)` on the engine's thread before each step that computes, counted from 0 here."""
    runner, count = engine._thread.runner, iter(range(1 << 60))
    run = runner.run

    def hooked(plan: Plan) -> Outcome:
        if plan.rows:
            fn(next(count), plan)
        return run(plan)

    runner.run = hooked  # type: ignore[method-assign]


def when_pieces(generation: lc.Generation, n: int, fn: Callable[[], object]) -> None:
    """Calls `fn` on the engine's thread once the generation has `n` tokens."""
    called = threading.Event()

    def look() -> None:
        if len(generation.tokens) >= n and not called.is_set():
            called.set()
            fn()

    generation.add_notify(look)


@contextlib.contextmanager
def together(engine: lc.Engine) -> Iterator[None]:
    """What is submitted or cancelled inside comes to the engine's thread all at once."""
    core, open_ = engine._thread, threading.Event()
    schedule = core.scheduler.plan

    def plan(now: float) -> Plan:
        assert open_.wait(60)
        core._empty_box(now)
        return schedule(now)

    core.scheduler.plan = plan  # type: ignore[method-assign]
    try:
        yield
    finally:
        core.scheduler.plan = schedule  # type: ignore[method-assign]
        open_.set()


def before_batch(engine: lc.Engine, fn: Callable[[int, list[Request]], object]) -> None:
    """Calls `fn(number, texts)` on the embedder's thread before each batch of texts, counted from 0 here."""
    embedder, count = engine._thread.embedder, iter(range(1 << 60))
    run = embedder._run

    def hooked(texts: list[Request], stop: lc.CancelToken) -> Outcome:
        fn(next(count), texts)
        return run(texts, stop)

    embedder._run = hooked  # type: ignore[method-assign]


class Gate:
    """Holds the engine's thread before a step, until it is opened or its `with` statement ends.

    With `texts` it holds the embedder's thread, before a batch of texts.
    """

    def __init__(self, engine: lc.Engine, at: int = 0, *, texts: bool = False) -> None:
        self.reached, self._open = threading.Event(), threading.Event()

        def hold(number: int, _: object) -> None:
            if number == at:
                self.reached.set()
                assert self._open.wait(60), "nobody opened the gate"

        (before_batch if texts else before_step)(engine, hold)

    def open(self) -> None:
        self._open.set()

    def wait(self) -> None:
        """Waits until the step has come."""
        assert self.reached.wait(60), "the step never came"

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *exc: object) -> None:
        self.open()


def stalled(engine: lc.Engine, at: int = 5, **arguments: Any) -> lc.Generation:
    """A generation that is sure to be unfinished when it is cancelled: the engine waits for that before step `at`."""
    gate = Gate(engine, at)
    generation = engine.submit(ids(10), sampler=endless(), **arguments)
    generation._token.add_callback(gate.open)
    return generation


def idle_slots(engine: lc.Engine) -> int:
    return sum(slot.state == "idle" for slot in engine.snapshot().slots)
