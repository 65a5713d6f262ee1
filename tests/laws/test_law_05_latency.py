"""Law 5, latency: a context says how it cuts its work, a long call is stopped in its middle whatever the other threads
do, and every cancel says how long it took. No time is asserted: the clock is one that tests move."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE
from tests.device import GPU_LAYERS, load

from .clock import FAR, Clock, Flight, deadline_at, in_the_middle, readings_of
from .words import NewContext, batch, cancelled, dead, decode, one_more, outputs, same_bits, tokens

LONG = batch((tokens(160), 0, 0), logits="last")
BY = 1000  # seconds by which the clock jumps


def _readings(context: lc.Context, rows: lc.Batch) -> int:
    """How often a whole call reads the clock on this thread, under a token with a deadline."""
    readings = readings_of(lambda: context.decode(rows, lc.CancelToken(timeout=FAR)))
    context.memory.clear()
    return readings


# ---- the plan --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GENERATIVE)
def test_the_plan_says_what_the_context_chose(arch: str, new_context: NewContext) -> None:
    context = new_context(arch, n_ubatch=None, cancel_latency=0.01)
    plan = context.latency_plan
    assert plan.target == 0.01
    assert plan.n_ubatch == context.n_ubatch >= 1
    assert plan.max_outputs >= 1
    assert plan.node_seconds is not None
    assert plan.node_seconds > 0
    assert math.isfinite(plan.node_seconds)


def test_no_aim_cuts_by_size_alone(new_context: NewContext) -> None:
    plan = new_context("llama", n_ubatch=None, cancel_latency=None).latency_plan
    assert (plan.target, plan.node_seconds, plan.attention_seconds) == (None, None, None)
    assert plan.n_ubatch == 512


@pytest.mark.parametrize("n_ubatch", [1, 7, 64])
def test_an_explicit_n_ubatch_is_honoured(n_ubatch: int, new_context: NewContext) -> None:
    for arch in GENERATIVE:
        context = new_context(arch, n_ubatch=n_ubatch, cancel_latency=0.001)
        assert context.n_ubatch == context.latency_plan.n_ubatch == n_ubatch
        if not GPU_LAYERS:  # where a graph goes in pieces, the aim says in how many
            assert context.latency_plan.target is None
        result = context.decode(batch((tokens(70), 0, 0)))
        assert result.n_ubatches == math.ceil(70 / n_ubatch)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_tighter_aim_never_makes_larger_pieces(arch: str, new_context: NewContext) -> None:
    sizes = [new_context(arch, n_ubatch=None, cancel_latency=aim).n_ubatch for aim in (0.0001, 0.001, 0.01, 1.0)]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_two_contexts_with_the_same_aim_give_the_same_bits(arch: str, new_context: NewContext) -> None:
    rows = batch((tokens(300), 0, 0), logits="last")
    for aim in (0.0001, 0.02):
        one, two = (new_context(arch, n_ubatch=None, cancel_latency=aim) for _ in range(2))
        assert one.latency_plan == two.latency_plan
        assert same_bits(decode(one, rows), decode(two, rows))
        assert same_bits(one_more(one), one_more(two))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_call_that_was_cut_for_its_latency_is_done_again_with_the_same_bits(
    arch: str, new_context: NewContext
) -> None:
    context, twin = (new_context(arch, n_ubatch=None, cancel_latency=0.0005) for _ in range(2))
    rows = batch((tokens(200), 0, 0))
    readings = _readings(context, rows)
    for share in (0.1, 0.5, 0.9):
        with deadline_at(int(share * readings)):
            assert cancelled(context, rows, lc.CancelToken(timeout=FAR)) is not None
    context.decode(rows)
    twin.decode(rows)
    assert same_bits(outputs(context, rows), outputs(twin, rows))


def test_nonsense_is_no_aim(new_context: NewContext) -> None:
    for aim in (0, -1, float("nan"), float("inf"), "soon"):
        with pytest.raises((ValueError, TypeError), match="cancel_latency"):
            new_context("llama", n_ubatch=None, cancel_latency=aim)
    for n_ubatch in (0, -5, 2**40):
        with pytest.raises(ValueError, match="n_ubatch"):
            new_context("llama", n_ubatch=n_ubatch)


@pytest.mark.skipif(GPU_LAYERS != 0, reason="a device's ubatches are measured")
@pytest.mark.parametrize("arch", GENERATIVE)
def test_the_cut_on_a_cpu_follows_from_the_model_and_the_threads_alone(
    arch: str, model_path: Callable[[str], Path]
) -> None:
    plans = []
    for _ in range(2):
        with load(model_path(arch)) as model, model.context(n_ctx=64, n_threads=1, cancel_latency=1e-4) as context:
            plans.append(context.latency_plan)
    assert plans[0] == plans[1]


# ---- in the middle ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_cancel_in_the_middle_of_a_long_batch_stops_it_before_it_is_through(
    arch: str, new_context: NewContext
) -> None:
    context, token = new_context(arch, n_ubatch=8), lc.CancelToken(timeout=FAR)
    middle = _readings(context, LONG) // 2
    context.perf(reset=True)
    with in_the_middle(token.cancel, at=middle):
        error = cancelled(context, LONG, token, on_cancel="keep")
    assert error is not None
    assert 0 < error.rows_done < len(LONG)
    assert error.rows_done % 8 == 0
    assert context.memory.pos_max(0) == error.rows_done - 1
    assert context.perf()["prompt_tokens"] < len(LONG)


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("params", [{"n_ubatch": None, "cancel_latency": 0.002}, {"n_ubatch": 512}], ids=str)
def test_every_kind_of_cut_is_stopped(arch: str, params: dict[str, Any], new_context: NewContext) -> None:
    context, token = new_context(arch, **params), lc.CancelToken(timeout=FAR)
    rows = batch((tokens(600), 0, 0), logits="last")
    middle = _readings(context, rows) // 3
    with in_the_middle(token.cancel, at=middle):
        error = cancelled(context, rows, token, on_cancel="keep")
    assert error is not None
    assert error.rows_done < len(rows)
    context.memory.clear()
    with deadline_at(middle):
        error = cancelled(context, rows, lc.CancelToken(timeout=FAR), on_cancel="keep")
    assert isinstance(error, lc.DeadlineExceeded)
    assert error.rows_done < len(rows)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_deadline_is_honoured_before_the_thread_that_holds_the_gil_lets_go_of_it(
    arch: str, new_context: NewContext
) -> None:
    context = new_context(arch, n_ubatch=8)
    middle = _readings(context, LONG) // 4
    flight = Flight(
        lambda: cancelled(context, LONG, lc.CancelToken(timeout=FAR), on_cancel="keep"), at=10, jump_at=middle
    )
    assert flight.clock.hold_the_gil_until(middle), "a poll waited for the GIL"
    error = flight.lands()
    assert isinstance(error, lc.DeadlineExceeded)
    assert error.rows_done < len(LONG)


def test_a_deadline_on_the_main_thread_does_not_wait_for_the_gil(new_context: NewContext) -> None:
    assert threading.current_thread() is threading.main_thread()
    context = new_context("llama", n_ubatch=8)
    middle = _readings(context, LONG) // 2
    held: list[bool] = []
    with in_the_middle(lambda: held.append(clock.hold_the_gil_until(middle)), at=10, jump_at=middle) as clock:
        error = cancelled(context, LONG, lc.CancelToken(timeout=FAR), on_cancel="keep")
    assert held == [True], "a poll waited for the GIL"
    assert isinstance(error, lc.DeadlineExceeded)
    assert 0 < error.rows_done < len(LONG)


# ---- what is reported ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_cancel", ["rollback", "keep"])
@pytest.mark.parametrize("params", [{"n_ubatch": 8}, {"n_ubatch": 512}], ids=str)
def test_latency_counts_from_the_cancel_to_the_return_and_holds_the_repair(
    params: dict[str, Any], on_cancel: str, new_context: NewContext
) -> None:
    for arch in GENERATIVE:
        context, token = new_context(arch, **params), lc.CancelToken()
        # The clock jumps between the cancel and the next look at the token.
        with in_the_middle(token.cancel, at=30, jump_at=31, by=BY):
            error = cancelled(context, LONG, token, on_cancel=on_cancel)
        assert error is not None
        assert BY <= error.latency < 2 * BY
        assert 0 <= error.repair_seconds < BY
        assert f"{error.latency * 1e3:.1f} ms" in str(error)


@pytest.mark.parametrize("on_cancel", ["rollback", "keep"])
def test_latency_counts_from_the_deadline(on_cancel: str, new_context: NewContext) -> None:
    context = new_context("hybrid", n_ubatch=8)
    with Clock(jump_at=30, by=2 * BY):
        error = cancelled(context, LONG, lc.CancelToken(timeout=BY), on_cancel=on_cancel)
    assert isinstance(error, lc.DeadlineExceeded)
    assert BY <= error.latency < 2 * BY


def test_the_latency_of_a_stale_token_counts_from_its_cancel(new_context: NewContext) -> None:
    context, token = new_context("llama"), dead()
    time.sleep(0.01)
    error = cancelled(context, batch((tokens(8), 0, 0)), token)
    assert error is not None
    assert error.latency >= 0.01
