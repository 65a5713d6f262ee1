"""Law 1, scope: a cancel reaches the calls that got that token or a descendant of it, and nothing else.

In ik_llama.cpp the disconnect of a client in the queue killed the decode of the client that was being served.
"""

from __future__ import annotations

import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE

from .clock import FAR, NEVER, Flight, deadline_at
from .words import NewContext, Pair, batch, cancelled, dead, decode, far, holds, one_more, same_bits, tokens

ROWS = batch((tokens(60, 1), 0, 0), logits="last")
WAITING = batch((tokens(30, 2), 0, 1))


# ---- which calls -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_cancel_stops_the_call_that_got_the_token_and_no_neighbour_of_the_same_model(arch: str, pair: Pair) -> None:
    one, two = pair(arch)
    expected = decode(two, ROWS)
    family = far()
    for turn in range(3):
        one.memory.clear()
        two.memory.clear()
        mine, yours = family.child(), family.child()
        with (
            Flight(lambda mine=mine: cancelled(one, ROWS, mine)) as active,
            Flight(lambda yours=yours: decode(two, ROWS, yours)) as other,
        ):
            assert mine.cancel(f"turn {turn}")
        assert isinstance(active.told, lc.DecodeCancelled)
        assert active.told.reason == f"turn {turn}"
        assert same_bits(other.told, expected)
        assert not yours.cancelled
        assert not family.cancelled


def test_a_cancel_of_the_parent_or_of_its_parent_reaches_the_call(new_context: NewContext) -> None:
    for generations in range(4):
        root = token = far()
        for _ in range(generations):
            token = token.child()
        context = new_context("llama", n_ubatch=8)
        with Flight(lambda context=context, token=token: cancelled(context, ROWS, token)) as flight:
            root.cancel(f"from {generations} above")
        assert isinstance(flight.told, lc.DecodeCancelled)
        assert flight.told.reason == f"from {generations} above"
        assert flight.told.cause is lc.Cause.CLIENT


def test_a_cancel_of_a_child_or_of_a_sibling_does_not_reach_the_call(pair: Pair) -> None:
    context, twin = pair("llama")
    root = far()
    token = root.child()
    with Flight(lambda: decode(context, ROWS, token)) as flight:
        token.child().cancel("down there")
        root.child().cancel("over there")
        lc.CancelToken().cancel("elsewhere")
    assert same_bits(flight.told, decode(twin, ROWS))
    assert not token.cancelled
    assert not root.cancelled


def test_any_of_is_cancelled_by_each_of_its_tokens(new_context: NewContext) -> None:
    for which in range(3):
        context = new_context("llama", n_ubatch=8)
        sources = [lc.CancelToken(), lc.CancelToken().child(), far()]
        token = lc.CancelToken.any_of(*sources)
        with Flight(lambda context=context, token=token: cancelled(context, ROWS, token)) as flight:
            sources[which].cancel(f"source {which}")
        assert isinstance(flight.told, lc.DecodeCancelled)
        assert flight.told.reason == f"source {which}"
        assert [source.cancelled for source in sources] == [i == which for i in range(3)]


def test_a_cancel_of_any_of_does_not_reach_its_sources(new_context: NewContext) -> None:
    source = far()
    with Flight(lambda: cancelled(new_context("llama", n_ubatch=8), ROWS, source)) as flight:
        lc.CancelToken.any_of(source, lc.CancelToken()).cancel()
    assert flight.told is None
    assert not source.cancelled


def test_a_deadline_of_the_parent_bounds_the_child(new_context: NewContext) -> None:
    token = far().child(timeout=2 * FAR)
    with deadline_at(40):
        error = cancelled(new_context("llama", n_ubatch=8), ROWS, token)
    assert isinstance(error, lc.DeadlineExceeded)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_token_of_a_sequence_that_is_not_in_the_batch_is_named_and_reaches_nothing(arch: str, pair: Pair) -> None:
    context, twin = pair(arch)
    rows = batch((tokens(40), 0, 0), (tokens(30, 1), 0, 1))
    for when_shared in ("finish", "stop"):
        for token in (dead(), lc.CancelToken()):
            with pytest.raises(lc.InvalidBatchError, match="sequence 2"):
                context.decode(rows, {0: lc.CancelToken(), 2: token}, when_shared=when_shared)
            assert set(holds(context).values()) == {(-1, -1)}
    assert same_bits(decode(context, rows), decode(twin, rows))
    assert same_bits(one_more(context), one_more(twin))


def test_one_token_stops_all_calls_that_got_it(new_context: NewContext) -> None:
    token = far()
    contexts = [new_context(arch, n_ubatch=8) for arch in ("llama", "mamba", "swa")]
    flights = [Flight(lambda context=context: cancelled(context, ROWS, token)) for context in contexts]
    token.cancel("all of you")
    assert [type(flight.lands()) for flight in flights] == [lc.DecodeCancelled] * 3


# ---- calls that wait for one context ---------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_cancel_of_a_waiting_call_does_not_touch_the_active_one(arch: str, pair: Pair) -> None:
    context, twin = pair(arch)
    for each in (context, twin):
        each.decode(WAITING)
    saved = context.state.save(1)
    more = batch((tokens(9, 3), 30, 1))
    calls = (
        lambda token: context.decode(more, token),
        lambda token: context.state.save(1, token),
        lambda token: context.state.load(1, saved, token),
    )
    with Flight(lambda: decode(context, ROWS, far())) as active:
        for call in calls:
            for token in (lc.CancelToken(timeout=0.002), dead()):
                with pytest.raises(lc.DecodeCancelled, match=r"waiting|loading a state") as caught:
                    call(token)
                assert isinstance(caught.value, lc.DeadlineExceeded) == (token.cause is lc.Cause.DEADLINE)
                assert caught.value.rows_done == 0
            token = far()
            waiting = Flight(lambda call=call, token=token: call(token), at=NEVER)
            waiting.waits()
            token.cancel("hung up")
            error = waiting.lands()
            assert type(error) is lc.DecodeCancelled
            assert error.reason == "hung up"
    assert same_bits(active.told, decode(twin, ROWS))
    assert holds(context) == holds(twin)
    assert same_bits(one_more(context), one_more(twin))


def test_many_clients_that_hang_up_in_the_queue_do_not_touch_the_active_call(pair: Pair) -> None:
    context, twin = pair("llama")
    parked = [far() for _ in range(6)]
    with Flight(lambda: decode(context, ROWS, far())) as active:
        queue = [Flight(lambda each=each: cancelled(context, WAITING, each), at=NEVER) for each in parked]
        for each in queue:
            each.waits()
        for token in parked:
            token.cancel("hung up")
        errors = [each.lands() for each in queue]
    assert [error.reason for error in errors] == ["hung up"] * 6
    assert same_bits(active.told, decode(twin, ROWS))
    assert holds(context) == holds(twin)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_cancel_of_the_active_call_does_not_touch_the_waiting_one_which_then_runs(arch: str, pair: Pair) -> None:
    context, twin = pair(arch)
    token = far()
    active = Flight(lambda: cancelled(context, ROWS, token))
    waiting = Flight(lambda: context.decode(WAITING, far()), at=NEVER)
    waiting.waits()
    token.cancel("enough")
    assert isinstance(active.lands(), lc.DecodeCancelled)
    assert waiting.lands().rows_done == len(WAITING)
    twin.decode(WAITING)
    assert holds(context) == holds(twin)
    assert all(same_bits(context.logits(row), twin.logits(row)) for row in range(len(WAITING)))
    assert same_bits(one_more(context), one_more(twin))


def test_a_call_without_a_token_does_not_wait_and_touches_nothing(pair: Pair) -> None:
    context, twin = pair("llama")
    with Flight(lambda: decode(context, ROWS, far())) as active, pytest.raises(lc.ContextBusyError):
        context.decode(WAITING)
    assert same_bits(active.told, decode(twin, ROWS))
