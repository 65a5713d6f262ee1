"""Law 1, scope: a cancel reaches the calls that got that token or a descendant of it, and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE

from .words import batch, cancelled, dead, decode, holds, one_more, same_bits, threads, tokens

NewContext = Callable[..., lc.Context]

LONG = 900  # rows: some 100 ms in ubatches of 8


def _long(seq: int = 0, pos: int = 0) -> lc.Batch:
    return batch((tokens(LONG, seq + 1), pos, seq), logits="last")


def _in_flight(context: lc.Context, token: lc.CancelToken, told: list[object]) -> threading.Thread:
    """Decodes in another thread; returns once the context is busy."""
    thread = threading.Thread(target=lambda: told.append(cancelled(context, _long(), token)))
    thread.start()
    while thread.is_alive():
        try:
            context.memory.pos_max(0)
        except lc.ContextBusyError:
            break
    return thread


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_cancel_stops_the_call_that_got_the_token(arch: str, new_context: NewContext) -> None:
    context, token, told = new_context(arch, n_ubatch=8), lc.CancelToken(), []
    thread = _in_flight(context, token, told)
    assert token.cancel("enough")
    thread.join(30)
    assert isinstance(told[0], lc.DecodeCancelled)
    assert told[0].reason == "enough"


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_cancel_does_not_reach_a_neighbour_context_of_the_same_model(arch: str, new_context: NewContext) -> None:
    one, two, twin = (new_context(arch, n_ubatch=8) for _ in range(3))
    expected = decode(twin, _long())
    mine, yours, told = lc.CancelToken(), lc.CancelToken(), []
    thread = _in_flight(one, mine, told)
    results = []
    with threads(lambda: results.append(decode(two, _long(), yours))):
        mine.cancel()
    thread.join(30)
    assert isinstance(told[0], lc.DecodeCancelled)
    assert same_bits(results[0], expected)
    assert not yours.cancelled


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_cancel_of_the_parent_or_of_its_parent_reaches_the_call(arch: str, new_context: NewContext) -> None:
    for generations in range(4):
        root = token = lc.CancelToken()
        for _ in range(generations):
            token = token.child()
        told: list[object] = []
        thread = _in_flight(new_context(arch, n_ubatch=8), token, told)
        root.cancel(f"from {generations} above")
        thread.join(30)
        assert isinstance(told[0], lc.DecodeCancelled)
        assert told[0].reason == f"from {generations} above"
        assert told[0].cause is lc.Cause.CLIENT


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_cancel_of_a_child_or_of_a_sibling_does_not_reach_the_call(arch: str, new_context: NewContext) -> None:
    root = lc.CancelToken()
    token = root.child()
    told: list[object] = []
    thread = _in_flight(new_context(arch, n_ubatch=8), token, told)
    token.child().cancel("down there")
    root.child().cancel("over there")
    thread.join(30)
    assert told == [None]
    assert not token.cancelled
    assert not root.cancelled


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_any_of_is_cancelled_by_each_of_its_tokens(arch: str, which: int, new_context: NewContext) -> None:
    sources = [lc.CancelToken(), lc.CancelToken().child(), lc.CancelToken(timeout=1000)]
    told: list[object] = []
    thread = _in_flight(new_context(arch, n_ubatch=8), lc.CancelToken.any_of(*sources), told)
    sources[which].cancel(f"source {which}")
    thread.join(30)
    assert isinstance(told[0], lc.DecodeCancelled)
    assert told[0].reason == f"source {which}"
    assert [source.cancelled for source in sources] == [i == which for i in range(3)]


def test_a_cancel_of_any_of_does_not_reach_its_sources(new_context: NewContext) -> None:
    source = lc.CancelToken()
    lc.CancelToken.any_of(source, lc.CancelToken()).cancel()
    assert not source.cancelled
    assert cancelled(new_context("llama"), batch((tokens(8), 0, 0)), source) is None


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_deadline_of_the_parent_bounds_the_child(arch: str, new_context: NewContext) -> None:
    token = lc.CancelToken(timeout=0.01).child(timeout=1000)
    error = cancelled(new_context(arch, n_ubatch=8), _long(), token)
    assert isinstance(error, lc.DeadlineExceeded)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_token_that_was_passed_to_nothing_reaches_nothing(arch: str, new_context: NewContext) -> None:
    context, twin = new_context(arch), new_context(arch)
    lc.CancelToken().cancel()
    rows = batch((tokens(40), 0, 0))
    assert same_bits(decode(context, rows), decode(twin, rows))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_token_of_a_sequence_that_is_not_in_the_batch_reaches_nothing(arch: str, new_context: NewContext) -> None:
    context, twin = (new_context(arch, n_seq_max=3) for _ in range(2))
    rows = batch((tokens(40), 0, 0), (tokens(30, 1), 0, 1))
    for abort_when in ("all", "majority", "any"):
        result = context.decode(rows, {2: dead()}, abort_when=abort_when)
        assert result.survivors == [0, 1]
        assert same_bits(context.logits(69), decode(twin, rows)[69])
        assert same_bits(one_more(context), one_more(twin))
        assert holds(context) == holds(twin)
        context.memory.clear()
        twin.memory.clear()


@pytest.mark.parametrize("arch", GENERATIVE)
def test_one_token_stops_all_calls_that_got_it(arch: str, new_context: NewContext) -> None:
    token = lc.CancelToken()
    told: list[object] = []
    flights = [_in_flight(new_context(arch, n_ubatch=8), token, told) for _ in range(2)]
    token.cancel("all of you")
    for thread in flights:
        thread.join(30)
    assert [type(each) for each in told] == [lc.DecodeCancelled] * 2
