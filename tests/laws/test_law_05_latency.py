"""Law 5, latency: a context says how it cuts its work, and every cancel says how long it took. No time is asserted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE

from .words import batch, cancelled, cancels_after, dead, decode, one_more, outputs, same_bits, tokens

NewContext = Callable[..., lc.Context]


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


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("n_ubatch", [1, 7, 64])
def test_an_explicit_n_ubatch_is_honoured(arch: str, n_ubatch: int, new_context: NewContext) -> None:
    context = new_context(arch, n_ubatch=n_ubatch, cancel_latency=0.001)
    assert context.n_ubatch == context.latency_plan.n_ubatch == n_ubatch
    assert context.latency_plan.target is None
    result = context.decode(batch((tokens(70), 0, 0)))
    assert result.n_ubatches == math.ceil(70 / n_ubatch)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_tighter_aim_never_makes_larger_pieces(arch: str, new_context: NewContext) -> None:
    sizes = [new_context(arch, n_ubatch=None, cancel_latency=aim).n_ubatch for aim in (0.0001, 0.001, 0.01, 1.0)]
    assert sizes == sorted(sizes)
    assert new_context(arch, n_ubatch=None, cancel_latency=None).latency_plan.target is None


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("aim", [0.0001, 0.001, 0.02])
def test_two_contexts_with_the_same_aim_give_the_same_bits(arch: str, aim: float, new_context: NewContext) -> None:
    one, two = (new_context(arch, n_ubatch=None, cancel_latency=aim) for _ in range(2))
    assert one.latency_plan == two.latency_plan
    rows = batch((tokens(300), 0, 0), logits="last")
    assert same_bits(decode(one, rows), decode(two, rows))
    assert same_bits(one_more(one), one_more(two))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_call_that_was_cut_for_its_latency_is_done_again_with_the_same_bits(
    arch: str, new_context: NewContext
) -> None:
    context, twin = (new_context(arch, n_ubatch=None, cancel_latency=0.0005) for _ in range(2))
    rows = batch((tokens(500), 0, 0))
    for share in (0.1, 0.3, 0.5):
        assert cancelled(context, rows, lc.CancelToken(timeout=0.02 * share)) is not None
    context.decode(rows)
    twin.decode(rows)
    assert same_bits(outputs(context, rows), outputs(twin, rows))


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize(
    "aim", [{"n_ubatch": 8}, {"n_ubatch": 512}, {"n_ubatch": None, "cancel_latency": 0.001}], ids=str
)
def test_every_cancel_reports_a_latency_that_agrees_with_the_clock(
    arch: str, aim: dict[str, Any], new_context: NewContext
) -> None:
    context = new_context(arch, **aim)
    rows = batch((tokens(900), 0, 0))
    for on_cancel in ("rollback", "keep"):
        with cancels_after(0.004) as token:
            error = cancelled(context, rows, token, on_cancel=on_cancel)
            now = time.monotonic()
        assert error is not None
        assert token.cancelled_at is not None
        assert 0 <= error.latency <= now - token.cancelled_at
        context.memory.clear()
        token = lc.CancelToken(timeout=0.004)
        error = cancelled(context, rows, token, on_cancel=on_cancel)
        now = time.monotonic()
        assert error is not None
        assert token.deadline is not None
        assert 0 <= error.latency <= now - token.deadline
        context.memory.clear()


@pytest.mark.parametrize("arch", GENERATIVE)
def test_the_latency_of_a_stale_token_counts_from_its_cancel(arch: str, new_context: NewContext) -> None:
    token = dead()
    time.sleep(0.02)
    error = cancelled(new_context(arch), batch((tokens(8), 0, 0)), token)
    assert error is not None
    assert error.latency >= 0.02


def test_nonsense_is_no_aim(new_context: NewContext) -> None:
    for aim in (0, -1, float("nan"), float("inf"), "soon"):
        with pytest.raises((ValueError, TypeError), match="cancel_latency"):
            new_context("llama", n_ubatch=None, cancel_latency=aim)
    for n_ubatch in (0, -5, 2**40):
        with pytest.raises(ValueError, match="n_ubatch"):
            new_context("llama", n_ubatch=n_ubatch)
