"""Law 2, identity: a late, repeated or stale cancel is inert; a cancelled token starts no work."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE
from tests.device import CONTEXT, load

from .clock import Flight, in_the_middle, readings_of
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
    one_more,
    same_bits,
    stale,
    threads,
    tokens,
)

ROWS = batch((tokens(60, 1), 0, 0), logits="last")


# ---- late ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_cancel_after_the_call_does_not_reach_the_next_one(arch: str, pair: Pair) -> None:
    context, twin = pair(arch)
    for turn in range(6):
        rows = batch((tokens(16, turn), 16 * turn, 0))
        token = lc.CancelToken()
        assert same_bits(decode(context, rows, token), decode(twin, rows))
        assert token.cancel("too late")


@pytest.mark.parametrize("arch", GENERATIVE)
def test_the_tokens_of_earlier_calls_cancelled_within_a_later_one_do_not_reach_it(arch: str, pair: Pair) -> None:
    context, twin = pair(arch)
    past = [lc.CancelToken() for _ in range(12)]
    for turn, token in enumerate(past):
        for each in (context, twin):
            each.decode(batch(([400 + turn], turn, 0)), token)
    rows = batch((tokens(60, 1), len(past), 0), logits="last")
    with Flight(lambda: decode(context, rows, far())) as flight:
        for token in past:
            assert token.cancel("stale")
    assert same_bits(flight.told, decode(twin, rows))


@pytest.mark.parametrize("arch", ["llama", "mamba"])
def test_a_cancel_storm_on_finished_tokens_changes_nothing(arch: str, pair: Pair) -> None:
    context, twin = pair(arch)
    done: list[lc.CancelToken] = []
    over = threading.Event()

    def storm() -> None:
        while not over.is_set():
            for token in list(done):
                token.cancel("again")
            over.wait(0.0002)

    with threads(storm):
        try:
            for turn in range(40):
                rows = batch((tokens(16, turn), 16 * turn, 0))
                token = lc.CancelToken()
                context.decode(rows, token)
                done.append(token)
                twin.decode(rows)
                assert same_bits(context.logits(-1), twin.logits(-1))
        finally:
            over.set()


@pytest.mark.parametrize("arch", GENERATIVE)
def test_cancels_that_race_with_the_end_of_a_call_reach_that_call_or_none(arch: str, pair: Pair) -> None:
    context, twin = pair(arch)
    rows = batch((tokens(16, 1), 0, 0))
    expected, after = decode(twin, rows), one_more(twin)

    def whole() -> int:
        context.memory.clear()
        return readings_of(lambda: context.decode(rows, far()))

    readings = min(whole() for _ in range(4))  # a device's driver may read the clock, too, now and then
    for at in range(readings - 7, readings + 1):
        context.memory.clear()
        token = far()
        with in_the_middle(token.cancel, at=at):
            hit = cancelled(context, rows, token) is not None
        assert token.cancelled
        assert holds(context)[0][1] == (-1 if hit else 15)
        if hit:
            assert same_bits(decode(context, rows), expected)
        assert same_bits(one_more(context), after)


@pytest.mark.parametrize("arch", ["llama", "mamba"])
def test_a_cancel_after_the_load_does_not_reach_the_model(
    arch: str, model_path: ModelPath, new_context: NewContext
) -> None:
    token = lc.CancelToken()
    rows = batch((tokens(40), 0, 0))
    with load(model_path(arch), token=token) as model:
        assert token.cancel("too late")
        with model.context(n_ctx=1024, n_ubatch=32, n_threads=1, **CONTEXT) as context:
            assert same_bits(decode(context, rows, lc.CancelToken()), decode(new_context(arch), rows))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_cancel_after_saving_and_loading_does_not_reach_the_state(arch: str, pair: Pair) -> None:
    context, twin = pair(arch)
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


# ---- stale -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GENERATIVE)
def test_an_already_cancelled_token_starts_no_work(arch: str, new_context: NewContext) -> None:
    context = new_context(arch, n_seq_max=2)
    decode(context, batch((tokens(20), 0, 0)))
    before, saved, last, perf = holds(context), context.state.save(0), context.logits(-1), context.perf()
    for on_cancel in ("rollback", "keep"):
        for token in stale():
            error = cancelled(context, batch((tokens(100, 2), 20, 0)), token, on_cancel=on_cancel)
            assert error is not None
            assert error.rows_done == 0
            assert error.sequences[0].end == 20
        rows = batch((tokens(9), 20, 0), (tokens(9), 0, 1))
        assert cancelled(context, rows, {0: dead(), 1: dead()}, on_cancel=on_cancel) is not None
    assert context.perf() == perf, "llama.cpp computed something"
    assert holds(context) == before
    assert context.state.save(0) == saved
    assert same_bits(context.logits(-1), last)


def test_a_batch_is_not_looked_at_under_a_cancelled_token(new_context: NewContext) -> None:
    context = new_context("llama")
    error = cancelled(context, batch((tokens(4), 7, 0)), dead())  # that does not follow on an empty context
    assert error is not None
    assert error.sequences == {0: lc.SequenceOutcome("rolled_back", 7, 0, True)}


@pytest.mark.timeout(40)  # the cube of the sequences for each row would take minutes
def test_what_a_batch_of_shared_rows_costs_to_check_is_bounded_by_its_size(new_context: NewContext) -> None:
    context = new_context("llama", n_ctx=16384, n_batch=16384, n_seq_max=256)
    rows = lc.Batch(16384, n_seq_max=256)
    rows.add_sequence(tokens(16383), seq_id=range(256))
    rows.add(400, 16383, 256)
    with pytest.raises(lc.InvalidBatchError, match="row 16383: sequence id 256"):
        context.decode(rows)


def test_an_embedding_model_starts_no_work_under_a_cancelled_token(new_context: NewContext) -> None:
    context = new_context("embedding", n_ubatch=None, embeddings=True)
    context.decode(batch((tokens(20), 0, 0)))
    before = context.pooled_embeddings(0)
    for token in stale():
        assert cancelled(context, batch((tokens(30, 1), 0, 0)), token) is not None
    assert same_bits(context.pooled_embeddings(0), before)


def test_a_load_under_a_cancelled_token_does_not_begin(model_path: ModelPath) -> None:
    for arch in (*GENERATIVE, "encdec", "embedding"):
        for token in stale():
            shares: list[float] = []
            with pytest.raises(lc.LoadCancelled) as caught:
                load(model_path(arch), progress=shares.append, token=token)
            assert caught.value.cause is token.cause
            assert shares == []


def test_an_encode_under_a_cancelled_token_starts_no_work(new_context: NewContext) -> None:
    context, twin = new_context("encdec"), new_context("encdec")
    text, first = batch((tokens(12), 0, 0)), batch(([1], 0, 0))
    for token in stale():
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
    for each in (context, twin):
        each.memory.clear()
    with pytest.raises(lc.DecodeCancelled):
        context.encode(batch((tokens(9, 5), 0, 0)), dead())
    assert same_bits(decode(context, first), decode(twin, first))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_state_is_not_saved_or_loaded_under_a_cancelled_token(arch: str, pair: Pair, tmp_path: Path) -> None:
    context, twin = pair(arch)
    for each in (context, twin):
        each.decode(batch((tokens(50), 0, 0), (tokens(20, 1), 0, 1)))
    saved = context.state.save(0)
    before, last, perf = holds(context), context.logits(-1), context.perf()
    for token in stale():
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


# ---- repeated --------------------------------------------------------------------------------------------------


def test_a_token_may_serve_one_call_after_the_other_until_it_is_cancelled(new_context: NewContext) -> None:
    context, token = new_context("llama"), lc.CancelToken()
    for turn in range(5):
        context.decode(batch((tokens(10, turn), 10 * turn, 0)), token)
    token.cancel()
    for _ in range(3):
        assert cancelled(context, batch((tokens(10), 50, 0)), token) is not None
    context.decode(batch((tokens(10), 50, 0)), lc.CancelToken())


def test_the_first_cause_stays_and_a_second_cancel_in_flight_is_told_false(new_context: NewContext) -> None:
    context, token = new_context("llama", n_ubatch=8), far()
    with Flight(lambda: cancelled(context, ROWS, token)) as flight:
        answers = [token.cancel("first"), token.cancel("second", cause=lc.Cause.SHUTDOWN), token.cancel("third")]
    assert answers == [True, False, False]
    for error in (flight.told, cancelled(context, ROWS, token)):
        assert type(error) is lc.DecodeCancelled
        assert (error.cause, error.reason) == (token.cause, token.reason) == (lc.Cause.CLIENT, "first")


def test_of_many_threads_that_cancel_at_once_one_is_the_first_and_the_call_tells_its_reason(
    new_context: NewContext,
) -> None:
    context = new_context("llama", n_ubatch=8)
    for _ in range(5):
        token, answers, gate = far(), dict[int, bool](), threading.Barrier(4)

        def canceller(
            i: int, token: lc.CancelToken = token, answers: dict[int, bool] = answers, gate: threading.Barrier = gate
        ) -> None:
            gate.wait()
            answers[i] = token.cancel(str(i))

        with (
            Flight(lambda token=token: cancelled(context, ROWS, token)) as flight,
            threads(*(lambda i=i, canceller=canceller: canceller(i) for i in range(4))),
        ):
            pass
        winners = [i for i, first in answers.items() if first]
        assert len(winners) == 1
        assert flight.told.reason == token.reason == str(winners[0])


@pytest.mark.parametrize("arch", ["llama", "mamba"])
def test_a_new_token_at_the_address_of_an_old_one_is_a_new_token(arch: str, pair: Pair) -> None:
    context, twin = pair(arch)
    for turn in range(50):
        gone = dead()
        assert cancelled(context, batch(([500], turn, 0)), gone) is not None
        del gone
        if turn % 10 == 0:
            gc.collect()
        rows = batch(([500 + turn], turn, 0))
        assert same_bits(decode(context, rows, lc.CancelToken()), decode(twin, rows))
