"""Law 6, cost: what can be shown without a stopwatch. `benchmarks/` has the rest."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE

from .words import batch, cancelled, decode, one_more, same_bits, threads, tokens

NewContext = Callable[..., lc.Context]


@pytest.mark.parametrize("arch", GENERATIVE)
def test_with_a_token_or_without_the_bits_are_the_same(arch: str, new_context: NewContext) -> None:
    many = lc.CancelToken()
    for _ in range(50):
        many = many.child(timeout=1000)
    contexts = []
    for token in (None, lc.CancelToken(), lc.CancelToken(timeout=1000), many, {}, {0: lc.CancelToken()},
                  {0: lc.CancelToken(timeout=1000), 1: lc.CancelToken()}):
        context = new_context(arch, n_ubatch=8, n_seq_max=2)
        contexts.append(context)
        rows = batch((tokens(40), 0, 0), (tokens(24, 1), 0, 1))
        values = decode(context, rows, token)
        if context is contexts[0]:
            expected = values
        assert same_bits(values, expected)
    after = [one_more(context) for context in contexts]
    assert all(same_bits(each, after[0]) for each in after)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_keep_costs_no_bits(arch: str, new_context: NewContext) -> None:
    one, two = new_context(arch, n_ubatch=8), new_context(arch, n_ubatch=8)
    for turn in range(6):
        rows = batch((tokens(60, turn), 60 * turn, 0))
        assert same_bits(decode(one, rows, lc.CancelToken(), on_cancel="keep"), decode(two, rows))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_deadline_stops_a_call_while_another_thread_holds_the_gil(arch: str, new_context: NewContext) -> None:
    context = new_context(arch, n_ubatch=8)
    entered = threading.Event()
    rows = batch((tokens(1000), 0, 0))
    told: list[lc.DecodeCancelled | None] = []

    def call() -> None:
        entered.set()
        told.append(cancelled(context, rows, lc.CancelToken(timeout=0.01)))

    with threads(call):
        entered.wait()
        while not told:
            try:
                context.memory.pos_max(0)
            except lc.ContextBusyError:
                break
        # One long operation in C that never lets go of the GIL: half a second and more.
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            sum(range(2_000_000))
    assert told[0] is not None
    assert isinstance(told[0], lc.DeadlineExceeded)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_call_on_the_main_thread_is_cancelled_while_others_are_busy_with_python(
    arch: str, new_context: NewContext
) -> None:
    context, over = new_context(arch, n_ubatch=8), threading.Event()

    def busy() -> None:
        while not over.is_set():
            sum(range(1000))

    with threads(busy, busy):
        try:
            error = cancelled(context, batch((tokens(1000), 0, 0)), lc.CancelToken(timeout=0.01))
        finally:
            over.set()
    assert error is not None


@pytest.mark.parametrize("arch", GENERATIVE)
def test_other_threads_run_python_while_a_call_computes(arch: str, new_context: NewContext) -> None:
    context, over, turns = new_context(arch, n_ubatch=8), threading.Event(), [0]

    def count() -> None:
        while not over.is_set():
            turns[0] += 1
            time.sleep(0.0005)

    with threads(count):
        try:
            before = turns[0]
            context.decode(batch((tokens(1000), 0, 0), logits="last"), lc.CancelToken())
            assert turns[0] > before
        finally:
            over.set()


@pytest.mark.parametrize("arch", ["llama", "moe"])
def test_a_new_stretch_of_plain_attention_needs_no_snapshot(arch: str, new_context: NewContext) -> None:
    context = new_context(arch, n_ubatch=8)
    for turn in range(3):
        result = context.decode(batch((tokens(100, turn), 100 * turn, 0)), lc.CancelToken())
        assert result.snapshot_bytes == 0
        assert result.repair_seconds == 0


@pytest.mark.parametrize("arch", ["mamba", "hybrid"])
def test_a_snapshot_of_a_recurrent_state_does_not_grow_with_the_history(arch: str, new_context: NewContext) -> None:
    context = new_context(arch, n_ubatch=8)
    sizes = [context.decode(batch((tokens(100, turn), 100 * turn, 0)), lc.CancelToken()).snapshot_bytes
             for turn in range(5)]
    assert sizes[0] == 0, "an empty sequence needs none"
    assert sizes[1] > 0
    assert len(set(sizes[1:])) == 1
