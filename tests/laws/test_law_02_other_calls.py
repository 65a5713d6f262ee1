"""Law 2, identity, for the calls that are no decode: load, encode, saving and loading a state."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE

from .words import batch, cancelled, dead, decode, holds, one_more, same_bits, threads, tokens

NewContext = Callable[..., lc.Context]
ModelPath = Callable[[str], Path]


def _stale() -> list[lc.CancelToken]:
    """Tokens that are over in every way that there is."""
    return [dead(), dead().child(), lc.CancelToken.any_of(lc.CancelToken(), dead()), lc.CancelToken(timeout=0),
            lc.CancelToken(timeout=0).child(timeout=1000)]


@pytest.mark.parametrize("arch", [*GENERATIVE, "encdec", "embedding"])
def test_a_load_under_a_cancelled_token_does_not_begin(arch: str, model_path: ModelPath) -> None:
    for token in _stale():
        shares: list[float] = []
        with pytest.raises(lc.LoadCancelled) as caught:
            lc.Model.load(model_path(arch), progress=shares.append, token=token)
        assert caught.value.cause is token.cause
        assert shares in ([], [0.0])


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_cancel_after_the_load_does_not_reach_the_model(
    arch: str, model_path: ModelPath, new_context: NewContext
) -> None:
    token = lc.CancelToken()
    rows = batch((tokens(40), 0, 0))
    with lc.Model.load(model_path(arch), token=token) as model:
        assert token.cancel("too late")
        with model.context(n_ctx=1024, n_ubatch=32, n_threads=1) as context:
            assert same_bits(decode(context, rows, lc.CancelToken()), decode(new_context(arch), rows))


def test_an_encode_under_a_cancelled_token_starts_no_work(new_context: NewContext) -> None:
    context, twin = new_context("encdec"), new_context("encdec")
    text, first = batch((tokens(12), 0, 0)), batch(([1], 0, 0))
    for token in _stale():
        with pytest.raises(lc.DecodeCancelled) as caught:
            context.encode(text, token)
        assert caught.value.rows_done == 0
        with pytest.raises(lc.InvalidBatchError, match="encode"):
            context.decode(first)
    late = lc.CancelToken()
    context.encode(text, late)
    late.cancel()
    twin.encode(text)
    assert same_bits(decode(context, first), decode(twin, first))
    with pytest.raises(lc.DecodeCancelled):
        context.encode(batch((tokens(9, 5), 0, 0)), dead())
    assert same_bits(decode(context, batch(([7], 1, 0))), decode(twin, batch(([7], 1, 0))))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_state_is_not_saved_or_loaded_under_a_cancelled_token(
    arch: str, new_context: NewContext, tmp_path: Path
) -> None:
    context, twin = (new_context(arch, n_seq_max=2) for _ in range(2))
    for each in (context, twin):
        each.decode(batch((tokens(50), 0, 0), (tokens(20, 1), 0, 1)))
    saved = context.state.save(0)
    before, last, perf = holds(context), context.logits(-1), context.perf()
    for token in _stale():
        with pytest.raises(lc.DecodeCancelled):
            context.state.save(0, token)
        with pytest.raises(lc.DecodeCancelled):
            context.state.load(1, saved, token)
        with pytest.raises(lc.DecodeCancelled):
            context.state.save_file(tmp_path / "state", 0, token)
    assert list(tmp_path.iterdir()) == []
    assert holds(context) == before
    assert context.perf() == perf
    assert same_bits(context.logits(-1), last)
    assert context.state.save(0) == saved
    assert same_bits(one_more(context), one_more(twin))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_cancel_after_saving_and_loading_does_not_reach_the_state(arch: str, new_context: NewContext) -> None:
    context, twin = (new_context(arch, n_seq_max=2) for _ in range(2))
    for each in (context, twin):
        each.decode(batch((tokens(50), 0, 0)))
        saving, loading = lc.CancelToken(), lc.CancelToken()
        saved = each.state.save(0, saving)
        if each is context:
            saving.cancel()
        each.state.load(1, saved, loading)
        if each is context:
            loading.cancel()
    assert holds(context) == holds(twin)
    assert same_bits(one_more(context), one_more(twin))


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("on_cancel", ["rollback", "keep"])
def test_nothing_is_counted_or_changed_under_an_expired_token(
    arch: str, on_cancel: str, new_context: NewContext
) -> None:
    context = new_context(arch)
    context.decode(batch((tokens(20), 0, 0)))
    before, saved, last, perf = holds(context), context.state.save(0), context.logits(-1), context.perf()
    for token in _stale():
        error = cancelled(context, batch((tokens(100, 2), 20, 0)), token, on_cancel=on_cancel)
        assert error is not None
        assert error.rows_done == 0
        assert error.sequences[0].end == 20
    assert context.perf() == perf
    assert holds(context) == before
    assert context.state.save(0) == saved
    assert same_bits(context.logits(-1), last)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_second_cancel_in_flight_is_told_false_and_changes_nothing(arch: str, new_context: NewContext) -> None:
    context, token = new_context(arch, n_ubatch=8), lc.CancelToken()
    told: list[lc.DecodeCancelled | None] = []
    answers: list[bool] = []
    entered = threading.Event()

    def call() -> None:
        entered.set()
        told.append(cancelled(context, batch((tokens(900), 0, 0), logits="last"), token))

    with threads(call):
        entered.wait()
        answers += [token.cancel("first"), token.cancel("second", cause=lc.Cause.SHUTDOWN), token.cancel("third")]
    assert answers == [True, False, False]
    assert told[0] is not None
    assert (told[0].cause, told[0].reason) == (lc.Cause.CLIENT, "first")
    assert (token.cause, token.reason) == (lc.Cause.CLIENT, "first")


@pytest.mark.parametrize("arch", GENERATIVE)
def test_of_many_threads_that_cancel_at_once_one_is_the_first_and_the_call_tells_its_reason(
    arch: str, new_context: NewContext
) -> None:
    context, token = new_context(arch, n_ubatch=8), lc.CancelToken()
    told: list[lc.DecodeCancelled | None] = []
    answers: dict[int, bool] = {}
    gate = threading.Barrier(5)

    def call() -> None:
        gate.wait()
        told.append(cancelled(context, batch((tokens(900), 0, 0), logits="last"), token))

    def canceller(i: int) -> None:
        gate.wait()
        answers[i] = token.cancel(str(i))

    with threads(call, *(lambda i=i: canceller(i) for i in range(4))):
        pass
    winners = [i for i, first in answers.items() if first]
    assert len(winners) == 1
    assert told[0] is not None
    assert told[0].reason == token.reason == str(winners[0])
