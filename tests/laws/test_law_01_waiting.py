"""Law 1, scope, where calls wait for one context: a cancel of the one that waits leaves the one that runs alone.

In ik_llama.cpp the disconnect of a client in the queue killed the decode of the client that was being served.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE

from .words import batch, cancelled, cancels_after, decode, holds, one_more, same_bits, tokens

NewContext = Callable[..., lc.Context]

ACTIVE = batch((tokens(900, 1), 0, 0), logits="last")
WAITING = batch((tokens(40, 2), 0, 1))


@pytest.fixture
def pair(new_context: NewContext) -> Callable[[str], tuple[lc.Context, lc.Context]]:
    """A context, and its twin for what is right."""
    return lambda arch: tuple(new_context(arch, n_ubatch=8, n_ctx=2048, n_seq_max=2) for _ in range(2))


class Flight:
    """A call in a thread of its own; made once the call has the context."""

    def __init__(self, context: lc.Context, call: Callable[[], Any]) -> None:
        self.told: Any = None
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        while self._thread.is_alive() and not is_busy(context):
            pass

    def _run(self) -> None:
        try:
            self.told = self._call()
        except BaseException as error:
            self.told = error

    def lands(self) -> Any:
        self._thread.join(60)
        assert not self._thread.is_alive(), "the call hangs"
        return self.told


def is_busy(context: lc.Context) -> bool:
    try:
        context.memory.pos_max(0)
    except lc.ContextBusyError:
        return True
    return False


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_cancel_of_a_waiting_call_does_not_touch_the_active_one(arch: str, pair: Any) -> None:
    context, twin = pair(arch)
    active = Flight(context, lambda: decode(context, ACTIVE, lc.CancelToken()))
    with cancels_after(0.005) as token:
        error = cancelled(context, WAITING, token)
    assert error is not None
    assert "waiting" in str(error)
    assert error.rows_done == 0
    assert same_bits(active.lands(), decode(twin, ACTIVE))
    assert holds(context) == holds(twin)
    assert same_bits(one_more(context), one_more(twin))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_many_clients_that_hang_up_in_the_queue_do_not_touch_the_active_call(arch: str, pair: Any) -> None:
    context, twin = pair(arch)
    active = Flight(context, lambda: decode(context, ACTIVE, lc.CancelToken()))
    parked = [lc.CancelToken() for _ in range(6)]
    errors: list[lc.DecodeCancelled | None] = []
    queue = [threading.Thread(target=lambda each=each: errors.append(cancelled(context, WAITING, each)))
             for each in parked]
    for thread in queue:
        thread.start()
    for token in parked:
        token.cancel("hung up")
    for thread in queue:
        thread.join(60)
    assert len(errors) == 6
    assert all(error is not None and error.reason == "hung up" for error in errors)
    assert same_bits(active.lands(), decode(twin, ACTIVE))
    assert holds(context) == holds(twin)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_cancel_of_the_active_call_does_not_touch_the_waiting_one_which_then_runs(arch: str, pair: Any) -> None:
    context, twin = pair(arch)
    token = lc.CancelToken()
    active = Flight(context, lambda: cancelled(context, ACTIVE, token))
    entered = threading.Event()
    results: list[Any] = []

    def wait() -> None:
        entered.set()
        results.append(context.decode(WAITING, lc.CancelToken()))

    waiting = threading.Thread(target=wait)
    waiting.start()
    entered.wait()
    token.cancel("enough")
    waiting.join(60)
    assert isinstance(active.lands(), lc.DecodeCancelled)
    assert len(results) == 1
    assert results[0].rows_done == len(WAITING)
    twin.decode(WAITING)
    assert holds(context) == holds(twin)
    assert all(same_bits(context.logits(row), twin.logits(row)) for row in range(len(WAITING)))
    assert same_bits(one_more(context), one_more(twin))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_deadline_that_passes_in_the_queue_ends_the_waiting_only(arch: str, pair: Any) -> None:
    context, twin = pair(arch)
    active = Flight(context, lambda: decode(context, ACTIVE, lc.CancelToken()))
    error = cancelled(context, WAITING, lc.CancelToken(timeout=0.005))
    assert isinstance(error, lc.DeadlineExceeded)
    assert "waiting" in str(error)
    assert same_bits(active.lands(), decode(twin, ACTIVE))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_state_that_waits_to_be_saved_or_loaded_can_be_cancelled_alone(arch: str, pair: Any) -> None:
    context, twin = pair(arch)
    for each in (context, twin):
        each.decode(WAITING)
    saved = context.state.save(1)
    active = Flight(context, lambda: decode(context, ACTIVE, lc.CancelToken()))
    with pytest.raises(lc.DeadlineExceeded, match="waiting"):
        context.state.save(1, lc.CancelToken(timeout=0.003))
    with pytest.raises(lc.DeadlineExceeded, match="waiting"):
        context.state.load(1, saved, lc.CancelToken(timeout=0.003))
    assert same_bits(active.lands(), decode(twin, ACTIVE))
    assert holds(context) == holds(twin)
    assert same_bits(one_more(context), one_more(twin))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_call_without_a_token_does_not_wait_and_touches_nothing(arch: str, pair: Any) -> None:
    context, twin = pair(arch)
    active = Flight(context, lambda: decode(context, ACTIVE, lc.CancelToken()))
    with pytest.raises(lc.ContextBusyError):
        context.decode(WAITING)
    assert same_bits(active.lands(), decode(twin, ACTIVE))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_cancelling_one_of_two_contexts_at_work_leaves_the_other_its_bits_every_time(arch: str, pair: Any) -> None:
    one, two = pair(arch)
    rows = batch((tokens(300, 3), 0, 0), logits="last")
    expected = decode(two, rows)
    family = lc.CancelToken()
    for turn in range(5):
        one.memory.clear()
        two.memory.clear()
        mine, yours = family.child(), family.child()
        other = Flight(two, lambda yours=yours: decode(two, rows, yours))
        flight = Flight(one, lambda mine=mine: cancelled(one, ACTIVE, mine))
        mine.cancel(f"turn {turn}")
        error = flight.lands()
        assert isinstance(error, lc.DecodeCancelled)
        assert error.reason == f"turn {turn}"
        assert same_bits(other.lands(), expected)
        assert not yours.cancelled
        assert not family.cancelled
