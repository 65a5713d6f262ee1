"""Law 3, truth, for every way in which a cancel comes to a call, and for several sequences."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE

from .words import batch, cancelled, cancels_after, dead, holds, same_bits, tokens

NewContext = Callable[..., lc.Context]

LONG = batch((tokens(900), 0, 0), logits="last")


def _itself() -> tuple[lc.CancelToken, lc.CancelToken]:
    token = lc.CancelToken()
    return token, token


def _parent() -> tuple[lc.CancelToken, lc.CancelToken]:
    token = lc.CancelToken()
    return token, token.child(timeout=1000).child()


def _any_of() -> tuple[lc.CancelToken, lc.CancelToken]:
    token = lc.CancelToken()
    return token, lc.CancelToken.any_of(lc.CancelToken(timeout=1000), token)


def _parent_of_one_of() -> tuple[lc.CancelToken, lc.CancelToken]:
    token = lc.CancelToken()
    return token, lc.CancelToken.any_of(lc.CancelToken(), token.child()).child(timeout=1000)


SOURCES = [_itself, _parent, _any_of, _parent_of_one_of]


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("source", SOURCES, ids=lambda each: each.__name__.strip("_"))
@pytest.mark.parametrize("cause", [lc.Cause.CLIENT, lc.Cause.SHUTDOWN])
def test_the_call_tells_the_cause_and_reason_of_where_the_cancel_came_from(
    arch: str, source: Any, cause: lc.Cause, new_context: NewContext
) -> None:
    origin, token = source()
    origin.cancel("they left", cause=cause)
    error = cancelled(new_context(arch), LONG, token)
    assert type(error) is lc.DecodeCancelled
    assert (error.cause, error.reason) == (token.cause, token.reason) == (cause, "they left")
    assert cause.value in str(error)
    assert "they left" in str(error)


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("on_cancel", ["rollback", "keep"])
def test_a_deadline_that_was_inherited_in_the_middle_of_a_call_is_told_as_one(
    arch: str, on_cancel: str, new_context: NewContext
) -> None:
    context = new_context(arch, n_ubatch=8)
    for make in (lambda each: each.child(), lambda each: lc.CancelToken.any_of(lc.CancelToken(), each),
                 lambda each: each.child(timeout=1000)):
        token = make(lc.CancelToken(timeout=0.01))
        error = cancelled(context, LONG, token, on_cancel=on_cancel)
        assert isinstance(error, lc.DeadlineExceeded)
        assert isinstance(error, TimeoutError)
        assert error.cause is lc.Cause.DEADLINE
        assert "deadline" in str(error)
        context.memory.clear()


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("on_cancel", ["rollback", "keep"])
def test_latency_is_not_longer_than_the_time_around_it_and_holds_the_repair(
    arch: str, on_cancel: str, new_context: NewContext
) -> None:
    context = new_context(arch, n_ubatch=8)
    for _ in range(4):
        before = time.monotonic()
        with cancels_after(0.008) as token:
            error = cancelled(context, LONG, token, on_cancel=on_cancel)
            after = time.monotonic()
        assert error is not None
        assert 0 <= error.repair_seconds <= error.latency <= after - before
        assert f"{error.latency * 1e3:.1f} ms" in str(error)
        context.memory.clear()


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("on_cancel", ["rollback", "keep"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=str)
def test_several_sequences_one_after_the_other_are_told_apart(
    arch: str, on_cancel: str, order: tuple[int, ...], new_context: NewContext
) -> None:
    context = new_context(arch, n_ubatch=8, n_seq_max=4, n_ctx=2048)
    middle = False
    for share in (0.002, 0.005, 0.01, 0.02, 0.04, 0.08):
        context.memory.clear()
        context.decode(batch((tokens(30, 1), 0, 0), (tokens(20, 2), 0, 1), (tokens(10, 3), 0, 3)))
        starts = {0: 30, 1: 20, 2: 0}
        rows = batch(*((tokens(300, 7 + seq), starts[seq], seq) for seq in order), logits="last")
        error = cancelled(context, rows, lc.CancelToken(timeout=share), on_cancel=on_cancel)
        if error is None:
            break
        held = holds(context)
        assert set(error.sequences) == {0, 1, 2}
        for seq, outcome in error.sequences.items():
            assert outcome.start == starts[seq]
            assert outcome.end == held[seq][1] + 1
            assert outcome.state == ("rolled_back" if on_cancel == "rollback" else "kept")
            assert on_cancel == "keep" or outcome.end == starts[seq]
        assert held[3][1] == 9
        assert error.rows_done == sum(outcome.end - outcome.start for outcome in error.sequences.values())
        middle = middle or error.rows_done > 0
    assert on_cancel == "rollback" or middle


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_shared_call_that_went_on_says_who_was_dropped_and_where(arch: str, new_context: NewContext) -> None:
    context, alone = (new_context(arch, n_ubatch=8, n_seq_max=3) for _ in range(2))
    gone = lc.CancelToken()
    gone.cancel()
    rows = batch((tokens(20, 1), 0, 0), (tokens(30, 2), 0, 1))
    result = context.decode(rows, {0: gone, 1: lc.CancelToken()})
    assert result.survivors == [1]
    assert result.sequences[0] == lc.SequenceOutcome("rolled_back", 0, 0, True)
    assert result.sequences[1] == lc.SequenceOutcome("completed", 0, 30, False)
    assert result.rows_done == 30
    assert holds(context)[0] == (-1, -1)
    assert holds(context)[1][1] == 29
    alone.decode(batch((tokens(30, 2), 0, 1)))
    assert same_bits(context.logits(49), alone.logits(29))
    with pytest.raises(IndexError):
        context.logits(19)


@pytest.mark.parametrize("cause", [lc.Cause.CLIENT, lc.Cause.SHUTDOWN])
def test_a_load_and_a_state_tell_the_truth_too(
    cause: lc.Cause, model_path: Callable[[str], Path], new_context: NewContext
) -> None:
    context = new_context("llama")
    context.decode(batch((tokens(20), 0, 0)))
    token = lc.CancelToken()
    token.cancel("they left", cause=cause)
    calls = {
        "load": lambda: lc.Model.load(model_path("llama"), token=token),
        "saving": lambda: context.state.save(0, token),
        "loading": lambda: context.state.load(0, context.state.save(0), token),
    }
    for what, call in calls.items():
        with pytest.raises(lc.DecodeCancelled) as caught:
            call()
        assert (caught.value.cause, caught.value.reason) == (cause, "they left")
        assert what in str(caught.value)
        assert cause.value in str(caught.value)
        assert caught.value.latency >= 0
        assert caught.value.sequences == {}


def test_a_state_under_a_deadline_that_passed_is_a_timeout(new_context: NewContext) -> None:
    context = new_context("llama")
    context.decode(batch((tokens(20), 0, 0)))
    with pytest.raises(TimeoutError):
        context.state.save(0, lc.CancelToken(timeout=0))
    assert cancelled(context, batch((tokens(5), 20, 0)), dead()) is not None
    assert holds(context)[0] == (0, 19)
