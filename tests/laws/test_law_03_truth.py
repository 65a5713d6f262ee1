"""Law 3, truth: a cancelled call raises, says why and how fast, and what the context now holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE

from .words import batch, cancelled, cancels_after, dead, decode, holds, tokens, woven

NewContext = Callable[..., lc.Context]


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("on_cancel", ["rollback", "keep"])
def test_a_cancelled_call_never_returns_as_if_it_were_complete(
    arch: str, on_cancel: str, new_context: NewContext
) -> None:
    context = new_context(arch, n_ubatch=8)
    for share in (0.0, 0.1, 0.4, 0.8):
        with pytest.raises(lc.DecodeCancelled):
            context.decode(batch((tokens(800), 0, 0)), lc.CancelToken(timeout=share * 0.008), on_cancel=on_cancel)
        context.memory.clear()


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("cause", [lc.Cause.CLIENT, lc.Cause.SHUTDOWN, lc.Cause.INTERRUPT])
def test_the_exception_says_why(arch: str, cause: lc.Cause, new_context: NewContext) -> None:
    token = lc.CancelToken().child()
    token.cancel("the client häng up", cause=cause)
    error = cancelled(new_context(arch), batch((tokens(10), 0, 0)), token)
    assert type(error) is lc.DecodeCancelled
    assert (error.cause, error.reason) == (cause, "the client häng up")
    assert cause.value in str(error)
    assert "the client häng up" in str(error)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_deadline_raises_deadline_exceeded_which_is_a_timeout_error(arch: str, new_context: NewContext) -> None:
    context = new_context(arch, n_ubatch=8)
    for token in (lc.CancelToken(timeout=0.005), lc.CancelToken(deadline=time.monotonic() - 1)):
        with pytest.raises(TimeoutError) as caught:
            context.decode(batch((tokens(800), 0, 0)), token)
        assert isinstance(caught.value, lc.DeadlineExceeded)
        assert caught.value.cause is lc.Cause.DEADLINE
        assert token.cause is lc.Cause.DEADLINE


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_cancel_before_the_deadline_is_no_deadline(arch: str, new_context: NewContext) -> None:
    token = lc.CancelToken(timeout=1000)
    token.cancel()
    error = cancelled(new_context(arch), batch((tokens(10), 0, 0)), token)
    assert type(error) is lc.DecodeCancelled
    assert error.cause is lc.Cause.CLIENT


@pytest.mark.parametrize("arch", GENERATIVE)
def test_latency_lies_between_the_cancel_and_the_return(arch: str, new_context: NewContext) -> None:
    context = new_context(arch, n_ubatch=8)
    for _ in range(5):
        with cancels_after(0.005) as token:
            error = cancelled(context, batch((tokens(900), 0, 0)), token)
            returned = time.monotonic()
        assert error is not None
        assert token.cancelled_at is not None
        assert 0 <= error.latency <= returned - token.cancelled_at


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("on_cancel", ["rollback", "keep"])
def test_what_the_exception_says_of_each_sequence_is_what_the_context_holds(
    arch: str, on_cancel: str, new_context: NewContext
) -> None:
    context = new_context(arch, n_ubatch=8, n_seq_max=4, n_ctx=2048)
    decode(context, batch(*((tokens(5 + seq, seq), 0, seq) for seq in range(3))))
    ends = [6 + seq - 1 for seq in range(3)]
    for turn in range(8):
        rows = woven((tokens(150, turn), ends[0], 0), (tokens(150, turn + 1), ends[2], 2))
        error = cancelled(context, rows, lc.CancelToken(timeout=0.002 + 0.0007 * turn), on_cancel=on_cancel)
        assert error is not None
        assert sorted(error.sequences) == [0, 2]
        assert error.survivors == []
        held = holds(context)
        for seq, outcome in error.sequences.items():
            assert outcome.start == ends[seq]
            assert outcome.end == held[seq][1] + 1
            assert outcome.cancelled
            assert outcome.state == ("rolled_back" if on_cancel == "rollback" else "kept")
        assert held[1][1] == 5
        assert error.rows_done == sum(outcome.end - outcome.start for outcome in error.sequences.values())
        ends = [held[seq][1] + 1 for seq in range(3)]
        context.decode(batch(([300], ends[0], 0), ([300], ends[2], 2)))
        ends[0] += 1
        ends[2] += 1


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
    assert holds(context) == {0: (holds(context)[0][0], 31), 1: (holds(context)[1][0], 15)}


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_shared_call_that_is_stopped_names_the_survivors(arch: str, new_context: NewContext) -> None:
    context = new_context(arch, n_ubatch=8, n_seq_max=3)
    rows = batch((tokens(20), 0, 0), (tokens(20), 0, 1), (tokens(20), 0, 2))
    living = lc.CancelToken()
    error = cancelled(context, rows, {0: dead(), 1: living, 2: dead()}, abort_when="majority")
    assert error is not None
    assert error.survivors == [1]
    assert {seq: outcome.cancelled for seq, outcome in error.sequences.items()} == {0: True, 1: False, 2: True}
    assert all(outcome.state == "rolled_back" for outcome in error.sequences.values())
    assert not living.cancelled


@pytest.mark.parametrize("arch", GENERATIVE)
def test_the_verdict_of_a_stopped_shared_call_is_that_of_the_first_cancel(arch: str, new_context: NewContext) -> None:
    first, second = lc.CancelToken(), lc.CancelToken()
    first.cancel("first", cause=lc.Cause.SHUTDOWN)
    time.sleep(0.002)
    second.cancel("second")
    for tokens_of in ({0: first, 1: second}, {0: second, 1: first}):
        error = cancelled(new_context(arch, n_seq_max=2), batch((tokens(9), 0, 0), (tokens(9), 0, 1)), tokens_of)
        assert error is not None
        assert (error.cause, error.reason) == (lc.Cause.SHUTDOWN, "first")


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
    with pytest.raises(ValueError, match="abort_when"):
        context.decode(rows, {}, abort_when="some")
    with pytest.raises(TypeError, match="token"):
        context.decode(rows, "now")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sequence 0"):
        context.decode(rows, {0: "now"})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="Batch"):
        context.decode([1, 2, 3])  # type: ignore[arg-type]
    assert holds(context)[0] == (-1, -1)
