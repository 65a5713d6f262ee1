"""Law 2, identity: a late, repeated or stale cancel is inert; a cancelled token starts no work."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import numpy as np
import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE

from .words import batch, cancelled, dead, decode, holds, one_more, same_bits, threads, tokens

NewContext = Callable[..., lc.Context]


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_cancel_after_the_call_does_not_reach_the_next_one(arch: str, new_context: NewContext) -> None:
    context, twin = new_context(arch, n_ubatch=8), new_context(arch, n_ubatch=8)
    for turn in range(12):
        rows = batch((tokens(16, turn), 16 * turn, 0))
        token = lc.CancelToken()
        a, b = decode(context, rows, token), decode(twin, rows)
        assert same_bits(a, b)
        assert token.cancel("too late")


@pytest.mark.parametrize("arch", GENERATIVE)
def test_the_token_of_an_earlier_call_cancelled_within_a_later_one_does_not_reach_it(
    arch: str, new_context: NewContext
) -> None:
    context, twin = new_context(arch, n_ubatch=8), new_context(arch, n_ubatch=8)
    stale = [lc.CancelToken() for _ in range(40)]
    for turn, token in enumerate(stale):
        context.decode(batch(([400 + turn], turn, 0)), token)
        twin.decode(batch(([400 + turn], turn, 0)))
    rows = batch((tokens(600, 1), 40, 0), logits="last")
    results = []
    with threads(lambda: results.append(decode(context, rows, lc.CancelToken()))):
        for token in stale:
            token.cancel("stale")
    assert same_bits(results[0], decode(twin, rows))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_cancel_storm_on_finished_tokens_changes_nothing(arch: str, new_context: NewContext) -> None:
    context, twin = new_context(arch, n_ubatch=8), new_context(arch, n_ubatch=8)
    done: list[lc.CancelToken] = []
    over = threading.Event()

    def storm() -> None:
        while not over.is_set():
            for token in list(done):
                token.cancel("again")
            over.wait(0.0002)

    with threads(storm):
        try:
            for turn in range(60):
                rows = batch((tokens(16, turn), 16 * turn, 0))
                token = lc.CancelToken()
                context.decode(rows, token)
                done.append(token)
                twin.decode(rows)
                assert same_bits(context.logits(-1), twin.logits(-1))
        finally:
            over.set()
    assert all(token.cancelled for token in done[:-1])


@pytest.mark.parametrize("arch", GENERATIVE)
def test_an_already_cancelled_token_starts_no_work(arch: str, new_context: NewContext) -> None:
    context = new_context(arch, n_seq_max=2)
    decode(context, batch((tokens(20), 0, 0)))
    before, last, perf = holds(context), context.logits(-1), context.perf()
    for token in (dead(), dead().child(), lc.CancelToken.any_of(lc.CancelToken(), dead()), lc.CancelToken(timeout=0)):
        error = cancelled(context, batch((tokens(300), 20, 0)), token)
        assert error is not None
        assert error.rows_done == 0
    error = cancelled(context, batch((tokens(9), 20, 0), (tokens(9), 0, 1)), {0: dead(), 1: dead()})
    assert error is not None
    assert context.perf() == perf, "llama.cpp computed something"
    assert holds(context) == before
    assert same_bits(context.logits(-1), last)


def test_an_embedding_model_starts_no_work_under_a_cancelled_token(new_context: NewContext) -> None:
    context = new_context("embedding", n_ubatch=None, embeddings=True)
    context.decode(batch((tokens(20), 0, 0)))
    before = context.pooled_embeddings(0)
    assert cancelled(context, batch((tokens(30, 1), 0, 0)), dead()) is not None
    assert same_bits(context.pooled_embeddings(0), before)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_token_may_serve_one_call_after_the_other_until_it_is_cancelled(arch: str, new_context: NewContext) -> None:
    context, token = new_context(arch), lc.CancelToken()
    for turn in range(5):
        context.decode(batch((tokens(10, turn), 10 * turn, 0)), token)
    token.cancel()
    for _ in range(3):
        assert cancelled(context, batch((tokens(10), 50, 0)), token) is not None
    context.decode(batch((tokens(10), 50, 0)), lc.CancelToken())


@pytest.mark.parametrize("arch", GENERATIVE)
def test_the_first_cause_stays(arch: str, new_context: NewContext) -> None:
    token = lc.CancelToken(timeout=1000)
    assert token.cancel("first") is True
    assert token.cancel("second", cause=lc.Cause.SHUTDOWN) is False
    error = cancelled(new_context(arch), batch((tokens(10), 0, 0)), token)
    assert error is not None
    assert (error.cause, error.reason) == (lc.Cause.CLIENT, "first")


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_new_token_at_the_address_of_an_old_one_is_a_new_token(arch: str, new_context: NewContext) -> None:
    context, twin = new_context(arch), new_context(arch)
    for turn in range(50):
        gone = dead()
        assert cancelled(context, batch(([500], turn, 0)), gone) is not None
        del gone
        if turn % 10 == 0:
            gc.collect()
        rows = batch(([500 + turn], turn, 0))
        assert same_bits(decode(context, rows, lc.CancelToken()), decode(twin, rows))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_cancels_that_race_with_the_end_of_a_call_reach_that_call_or_none(arch: str, new_context: NewContext) -> None:
    context, twin = new_context(arch, n_ubatch=8), new_context(arch, n_ubatch=8)
    rng = np.random.default_rng(3)
    rows = batch((tokens(16, 1), 0, 0))
    expected = decode(twin, rows)
    after = one_more(twin)
    hits = 0
    for _ in range(60):
        token = lc.CancelToken()
        timer = threading.Timer(rng.uniform(0, 0.004), token.cancel)
        timer.start()
        hit = cancelled(context, rows, token) is not None
        hits += hit
        if hit:
            assert token.cancelled
            assert holds(context)[0] == (-1, -1)
            assert same_bits(decode(context, rows), expected)
        assert same_bits(one_more(context), after)
        timer.join()
        context.memory.clear()
