"""Law 3, truth: a cancelled call raises, says why and how fast, and what the context now holds."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE
from tests.device import load

from .clock import FAR, Flight, deadline_at, readings_of
from .words import (
    ModelPath,
    NewContext,
    Pair,
    batch,
    cancelled,
    dead,
    decode,
    far,
    holds,
    same_bits,
    tokens,
    woven,
)

SHARES = (0.05, 0.3, 0.55, 0.8, 0.95)  # of a call


def _readings(context: lc.Context, rows: lc.Batch) -> int:
    """How often a whole call reads the clock; the context is empty afterwards."""
    readings = readings_of(lambda: context.decode(rows, far()))
    context.memory.clear()
    return readings


# ---- why -------------------------------------------------------------------------------------------------------


def _sources() -> dict[str, tuple[lc.CancelToken, lc.CancelToken]]:
    """Tokens to cancel, and those of the call: itself, a descendant, one of several."""
    tokens = [far() for _ in range(4)]
    return {
        "itself": (tokens[0], tokens[0]),
        "its parent's parent": (tokens[1], tokens[1].child(timeout=FAR).child()),
        "one of several": (tokens[2], lc.CancelToken.any_of(lc.CancelToken(timeout=FAR), tokens[2])),
        "a parent of one of several": (
            tokens[3], lc.CancelToken.any_of(lc.CancelToken(), tokens[3].child()).child(timeout=FAR)),
    }  # fmt: skip


@pytest.mark.parametrize("cause", [lc.Cause.CLIENT, lc.Cause.SHUTDOWN, lc.Cause.INTERRUPT])
def test_the_call_tells_the_cause_and_reason_of_where_the_cancel_came_from(
    cause: lc.Cause, new_context: NewContext
) -> None:
    context, rows = new_context("llama", n_ubatch=8), batch((tokens(60), 0, 0), logits="last")
    for origin, token in _sources().values():
        with Flight(lambda token=token: cancelled(context, rows, token)) as flight:
            origin.cancel("the client häng up", cause=cause)
        for error in (flight.told, cancelled(context, rows, token)):
            assert type(error) is lc.DecodeCancelled
            assert (error.cause, error.reason) == (token.cause, token.reason) == (cause, "the client häng up")
            assert cause.value in str(error)
            assert "the client häng up" in str(error)


@pytest.mark.parametrize("on_cancel", ["rollback", "keep"])
def test_a_deadline_raises_deadline_exceeded_which_is_a_timeout_error(on_cancel: str, new_context: NewContext) -> None:
    context, rows = new_context("llama", n_ubatch=8), batch((tokens(60), 0, 0), logits="last")
    for at, token in (
        (40, far()), (40, far().child()), (40, lc.CancelToken.any_of(lc.CancelToken(), far())),
        (40, far().child(timeout=2 * FAR)), (0, lc.CancelToken(deadline=time.monotonic() - 1)),
    ):  # fmt: skip
        with deadline_at(at), pytest.raises(TimeoutError) as caught:
            context.decode(rows, token, on_cancel=on_cancel)
        assert isinstance(caught.value, lc.DeadlineExceeded)
        assert caught.value.cause is token.cause is lc.Cause.DEADLINE
        assert "deadline" in str(caught.value)
        context.memory.clear()


def test_a_cancel_before_the_deadline_is_no_deadline(new_context: NewContext) -> None:
    token = far()
    token.cancel()
    error = cancelled(new_context("llama"), batch((tokens(10), 0, 0)), token)
    assert type(error) is lc.DecodeCancelled
    assert error.cause is lc.Cause.CLIENT


@pytest.mark.parametrize(("when_shared", "stopped_by"), [("stop", "0"), ("finish", "2")])
def test_the_verdict_of_a_stopped_shared_call_is_that_of_the_first_cancel_or_of_the_one_that_left_nobody(
    when_shared: str, stopped_by: str, new_context: NewContext
) -> None:
    three = [lc.CancelToken() for _ in range(3)]
    for i, token in enumerate(three):
        token.cancel(str(i), cause=lc.Cause.SHUTDOWN if str(i) == stopped_by else lc.Cause.CLIENT)
        time.sleep(0.002)  # the clock moves on
    for order in itertools.permutations(range(3)):
        context = new_context("llama", n_seq_max=3)
        rows = batch(*((tokens(9), 0, seq) for seq in range(3)))
        error = cancelled(context, rows, {seq: three[i] for seq, i in enumerate(order)}, when_shared=when_shared)
        assert error is not None
        assert (error.cause, error.reason) == (lc.Cause.SHUTDOWN, stopped_by)


@pytest.mark.parametrize("cause", [lc.Cause.CLIENT, lc.Cause.SHUTDOWN])
def test_a_load_and_a_state_tell_the_truth_too(cause: lc.Cause, model_path: ModelPath, new_context: NewContext) -> None:
    context = new_context("llama")
    context.decode(batch((tokens(20), 0, 0)))
    saved = context.state.save(0)
    token = lc.CancelToken()
    token.cancel("they left", cause=cause)
    calls: dict[str, Callable[[lc.CancelToken], object]] = {
        "load": lambda token: load(model_path("llama"), token=token),
        "saving": lambda token: context.state.save(0, token),
        "loading": lambda token: context.state.load(0, saved, token),
    }
    for what, call in calls.items():
        with pytest.raises(lc.DecodeCancelled) as caught:
            call(token)
        assert (caught.value.cause, caught.value.reason) == (cause, "they left")
        assert what in str(caught.value)
        assert cause.value in str(caught.value)
        assert caught.value.latency >= 0
        assert caught.value.sequences == {}
    for what in ("saving", "loading"):
        with pytest.raises(TimeoutError):
            calls[what](lc.CancelToken(timeout=0))
    assert holds(context)[0] == (0, 19)


# ---- what the context holds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("on_cancel", ["rollback", "keep"])
def test_a_cancelled_call_never_returns_as_if_it_were_complete(
    arch: str, on_cancel: str, new_context: NewContext
) -> None:
    context, rows = new_context(arch, n_ubatch=8), batch((tokens(60), 0, 0))
    readings = _readings(context, rows)
    for share in SHARES:
        with deadline_at(int(share * readings)), pytest.raises(lc.DecodeCancelled):
            context.decode(rows, far(), on_cancel=on_cancel)
        context.memory.clear()


def _one_after_the_other(*parts: Any) -> lc.Batch:
    return batch(*parts, logits="last")


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("on_cancel", ["rollback", "keep"])
@pytest.mark.parametrize("layout", [_one_after_the_other, woven], ids=["one after the other", "woven"])
def test_what_the_exception_says_of_each_sequence_is_what_the_context_holds(
    arch: str, on_cancel: str, layout: Callable[..., lc.Batch], new_context: NewContext
) -> None:
    context = new_context(arch, n_ubatch=8, n_seq_max=4)
    starts = {2: 0, 0: 30, 1: 20}
    past = batch((tokens(30, 1), 0, 0), (tokens(20, 2), 0, 1), (tokens(10, 3), 0, 3))
    rows = layout(*((tokens(40, 7 + seq), start, seq) for seq, start in starts.items()))
    context.decode(past)
    readings = _readings(context, rows)
    done = []
    for share in SHARES:
        context.memory.clear()
        context.decode(past)
        with deadline_at(int(share * readings)):
            error = cancelled(context, rows, far(), on_cancel=on_cancel)
        assert error is not None
        held = holds(context)
        assert set(error.sequences) == {0, 1, 2}
        assert error.survivors == []
        for seq, outcome in error.sequences.items():
            assert outcome.cancelled
            assert outcome.start == starts[seq]
            assert outcome.end == held[seq][1] + 1
            assert outcome.state == ("rolled_back" if on_cancel == "rollback" else "kept")
        assert held[3][1] == 9
        assert error.rows_done == sum(outcome.end - outcome.start for outcome in error.sequences.values())
        done.append(error.rows_done)
    assert done == sorted(done)
    assert (done[-1] > 0) == (on_cancel == "keep")


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_completed_call_says_what_it_did(arch: str, new_context: NewContext) -> None:
    context = new_context(arch, n_ubatch=8, n_seq_max=2)
    result = context.decode(batch((tokens(32), 0, 0), (tokens(16), 0, 1)), lc.CancelToken())
    assert result.rows_done == 48
    assert result.n_ubatches >= 6
    assert result.seconds > 0
    assert result.survivors == [0, 1]
    for seq, end in ((0, 32), (1, 16)):
        assert result.sequences[seq] == lc.SequenceOutcome("completed", 0, end, False)
        assert holds(context)[seq][1] == end - 1


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_shared_call_that_went_on_says_who_was_dropped_and_where(arch: str, pair: Pair) -> None:
    context, alone = pair(arch)
    rows = batch((tokens(20, 1), 0, 0), (tokens(30, 2), 0, 1))
    result = context.decode(rows, {0: dead(), 1: lc.CancelToken()})
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


@pytest.mark.parametrize("on_cancel", ["rollback", "keep"])
def test_a_row_that_the_context_does_not_hold_is_no_output(on_cancel: Any, pair: Pair) -> None:
    context, twin = pair("llama")
    rows = batch((tokens(6, 1), 0, 0), (tokens(12, 2), 0, 1))
    whole = readings_of(lambda: twin.decode(rows, {1: far()}))
    twin.memory.clear()
    token = far()
    with deadline_at(whole // 2):
        told = context.decode(rows, {1: token}, on_cancel=on_cancel)
    assert told.survivors == [0]
    done = [*range(6), *range(6, 6 + told.sequences[1].end)]
    assert len(done) < len(rows)
    for row in range(done[-1] + 1, len(rows)):
        with pytest.raises(IndexError, match="cancelled"):
            context.logits(row)
    assert same_bits(context.logits(-1), context.logits(done[-1]))
    assert same_bits(context.logits(-len(done)), context.logits(0))
    with pytest.raises(IndexError):
        context.logits(-len(done) - 1)


def test_a_shared_call_that_is_stopped_names_the_survivors(new_context: NewContext) -> None:
    context = new_context("llama", n_ubatch=8, n_seq_max=3)
    rows = batch((tokens(20), 0, 0), (tokens(20), 0, 1), (tokens(20), 0, 2))
    living = lc.CancelToken()
    error = cancelled(context, rows, {0: dead(), 1: living, 2: dead()}, when_shared="stop")
    assert error is not None
    assert error.survivors == [1]
    assert {seq: outcome.cancelled for seq, outcome in error.sequences.items()} == {0: True, 1: False, 2: True}
    assert all(outcome.state == "rolled_back" for outcome in error.sequences.values())
    assert not living.cancelled


# ---- exceptions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "bases"),
    [
        (lc.DecodeCancelled, (lc.LlamaCancelError,)),
        (lc.DeadlineExceeded, (lc.DecodeCancelled, TimeoutError)),
        (lc.LoadCancelled, (lc.DecodeCancelled,)),
        (lc.InvalidBatchError, (lc.LlamaCancelError, ValueError)),
        (lc.MemoryFullError, (lc.LlamaCancelError,)),
        (lc.ContextBusyError, (lc.LlamaCancelError,)),
        (lc.ClosedError, (lc.LlamaCancelError,)),
        (lc.DirtySequenceError, (lc.LlamaCancelError,)),
    ],
)
def test_each_exception_is_what_people_would_catch(kind: type[Exception], bases: tuple[Any, ...]) -> None:
    assert all(issubclass(kind, base) for base in bases)


def test_a_wrong_argument_is_named(new_context: NewContext) -> None:
    context = new_context("llama")
    rows = batch((tokens(4), 0, 0))
    with pytest.raises(ValueError, match="on_cancel"):
        context.decode(rows, on_cancel="forget")
    with pytest.raises(ValueError, match="when_shared"):
        context.decode(rows, {}, when_shared="some")
    with pytest.raises(TypeError, match="token"):
        context.decode(rows, "now")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sequence 0"):
        context.decode(rows, {0: "now"})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="Batch"):
        context.decode([1, 2, 3])  # type: ignore[arg-type]
    assert decode(context, rows).shape[0] == 4
