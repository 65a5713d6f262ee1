"""Law 5, latency: a long call is stopped in its middle, whatever the other threads do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE

from .words import batch, cancelled, cancels_after, tokens

NewContext = Callable[..., lc.Context]

N_UBATCH = 8
LONG = batch((tokens(1600), 0, 0), logits="last")


def hold_the_gil() -> tuple[float, float]:
    """One long operation in C that never lets go of the GIL; when it began and when it ended.

    At its end who waited for the GIL may get it before the clock is read: what did not wait was over by half time.
    """
    began = time.monotonic()
    sum(range(25_000_000))
    return began, time.monotonic()


def wait_until_busy(context: lc.Context) -> None:
    for _ in range(10_000_000):
        try:
            context.memory.pos_max(0)
        except lc.ContextBusyError:
            return
    raise AssertionError("the context was never busy")


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_cancel_in_the_middle_of_a_long_batch_stops_it_before_it_is_through(
    arch: str, new_context: NewContext
) -> None:
    context = new_context(arch, n_ubatch=N_UBATCH, n_ctx=2048)
    seconds = 0.004
    while True:
        with cancels_after(seconds) as token:
            error = cancelled(context, LONG, token, on_cancel="keep")
        assert error is not None, "no cancel came in the middle"
        if error.rows_done > 0:
            break
        seconds *= 2
    assert error.rows_done % N_UBATCH == 0
    assert error.rows_done // N_UBATCH < len(LONG) // N_UBATCH
    assert context.memory.pos_max(0) == error.rows_done - 1
    assert context.perf()["prompt_tokens"] < len(LONG)


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("how", ["a cancel", "a deadline"])
@pytest.mark.parametrize("params", [{"n_ubatch": None, "cancel_latency": 0.002}, {"n_ubatch": 512}], ids=str)
def test_every_kind_of_cut_is_stopped_and_reports_its_latency(
    arch: str, how: str, params: dict[str, Any], new_context: NewContext
) -> None:
    context = new_context(arch, n_ctx=2048, **params)
    with cancels_after(0.004) as token:
        if how == "a deadline":
            token = lc.CancelToken(timeout=0.004)
        error = cancelled(context, LONG, token, on_cancel="keep")
    assert error is not None
    assert error.latency > 0
    assert error.rows_done < len(LONG)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_deadline_is_honoured_while_another_thread_computes_in_python(arch: str, new_context: NewContext) -> None:
    context, over = new_context(arch, n_ubatch=N_UBATCH, n_ctx=2048), threading.Event()

    def busy() -> None:
        n = 0
        while not over.is_set():
            n += 1

    thread = threading.Thread(target=busy, daemon=True)
    thread.start()
    try:
        error = cancelled(context, LONG, lc.CancelToken(timeout=0.02), on_cancel="keep")
    finally:
        over.set()
        thread.join(60)
    assert isinstance(error, lc.DeadlineExceeded)
    assert error.rows_done < len(LONG)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_deadline_is_honoured_before_the_thread_that_holds_the_gil_lets_go_of_it(
    arch: str, new_context: NewContext
) -> None:
    context, token = new_context(arch, n_ubatch=N_UBATCH, n_ctx=2048), lc.CancelToken(timeout=0.1)
    told: list[lc.DecodeCancelled | None] = []
    thread = threading.Thread(target=lambda: told.append(cancelled(context, LONG, token)))
    thread.start()
    wait_until_busy(context)
    began, let_go = hold_the_gil()
    thread.join(60)
    assert isinstance(told[0], lc.DeadlineExceeded)
    assert token.deadline is not None
    assert token.deadline + told[0].latency < (began + let_go) / 2


def test_a_deadline_on_the_main_thread_does_not_wait_for_the_gil(new_context: NewContext) -> None:
    assert threading.current_thread() is threading.main_thread()
    context, token = new_context("llama", n_ubatch=N_UBATCH, n_ctx=2048), lc.CancelToken(timeout=0.15)
    held: list[tuple[float, float]] = []

    def hold() -> None:
        wait_until_busy(context)
        held.append(hold_the_gil())

    thread = threading.Thread(target=hold)
    thread.start()
    error = cancelled(context, LONG, token)
    thread.join(60)
    assert isinstance(error, lc.DeadlineExceeded)
    assert token.deadline is not None
    assert token.deadline + error.latency < sum(held[0]) / 2, "the poll waited for the GIL"


def test_no_aim_cuts_by_size_alone(new_context: NewContext) -> None:
    plan = new_context("llama", n_ubatch=None, cancel_latency=None).latency_plan
    assert (plan.target, plan.node_seconds, plan.attention_seconds) == (None, None, None)
    assert plan.n_ubatch == 512
