"""Law 4, rollback: after a cancel the context is exactly as before the call; with "keep", what was done stays.

The sweeps of `every_poll.py` cancel at all polls of calls with all kinds of history; those here cancel in the middle.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

import llamacancel as lc
from llamacancel.commands.make_model import cached_model
from tests import device
from tests.conftest import GENERATIVE

from .clock import deadline_at, in_the_middle, readings_of
from .every_poll import ALL, LOADS, SCENARIOS
from .words import (
    NewContext,
    Pair,
    Readings,
    batch,
    cancelled,
    cancelled_at,
    close,
    decode,
    far,
    holds,
    one_more,
    outputs,
    same_bits,
    swept,
    tokens,
    woven,
)

EVERY_SCENARIO = [(arch, name) for arch in GENERATIVE for name, scenario in SCENARIOS.items() if arch in scenario.archs]
pytestmark = pytest.mark.timeout(1800)  # on a slow and busy machine

SHARES = (0.1, 0.5, 0.9)  # of a call


# ---- at every poll ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "name"), EVERY_SCENARIO)
def test_a_call_cancelled_at_any_poll_leaves_no_trace(arch: str, name: str) -> None:
    told = swept(arch, "rollback", name)
    assert told["problems"] == []
    assert told["cancels"] > 6


@pytest.mark.parametrize(("arch", "name"), EVERY_SCENARIO)
def test_what_a_call_cancelled_at_any_poll_keeps_can_be_resumed_with_the_same_bits(arch: str, name: str) -> None:
    told = swept(arch, "keep", name)
    assert told["problems"] == []
    assert told["cancels"] > 1
    if name == "a sequence with history":
        assert {0, 8, 16, 24} <= set(told["rows_done"]), "the cancels did not reach each ubatch"


@pytest.mark.parametrize("arch", ALL)
@pytest.mark.parametrize("into", LOADS)
def test_a_load_of_a_state_cancelled_at_any_poll_changes_nothing(arch: str, into: str) -> None:
    told = swept(arch, "load", into)
    assert told["problems"] == []
    assert told["cancels"] > 3


# ---- again and again -------------------------------------------------------------------------------------------


def _history(context: lc.Context) -> None:
    decode(context, batch((tokens(30, 1), 0, 0), (tokens(40, 2), 0, 1)))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_cancels_from_another_thread_at_random_moments_leave_no_trace(
    arch: str, pair: Pair, readings: Readings
) -> None:
    context, twin = pair(arch)
    rows = batch((tokens(24, 3), 30, 0), (tokens(24, 4), 40, 1))
    # On the main thread, which looks for Ctrl-C as well.
    whole = readings(arch, rows, _history)
    for each in (context, twin):
        _history(each)
    at_first = holds(context)
    rng = random.Random(arch)
    for _ in range(10):
        token = far()
        with in_the_middle(token.cancel, at=rng.randrange(10, whole * 9 // 10)):
            assert cancelled(context, rows, token) is not None
        assert holds(context) == at_first
    assert same_bits(decode(context, rows), decode(twin, rows))
    assert same_bits(one_more(context), one_more(twin))


def test_a_large_recurrent_state_which_several_threads_copy_is_put_back() -> None:
    rows = [batch((tokens(24, 3), 30, 0), (tokens(24, 4), 40, 1)), batch(([321], 30, 0), ([322], 40, 1))]
    with device.load(cached_model("mamba", "small")) as model:
        settings: dict[str, Any] = {"n_ctx": 256, "n_seq_max": 2, "n_ubatch": 32, **device.CONTEXT}
        with model.context(n_threads=2, **settings) as context, model.context(n_threads=1, **settings) as twin:
            for each in (context, twin):
                _history(each)
            at_first = holds(context)
            for call in rows:
                for reading in (5, 50) if device.GPU_LAYERS else (5, 50, 250):  # a device is handed 100 pieces
                    cancelled_at(context, call, reading)
                    assert holds(context) == at_first
                assert context.state.save(0) == twin.state.save(0)
            assert context.decode(rows[0]).snapshot_bytes > 1_000_000
            assert same_bits(outputs(context, rows[0]), decode(twin, rows[0]))
            assert same_bits(one_more(context), one_more(twin))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_hundred_cancels_in_a_row_leave_no_trace(arch: str, pair: Pair, readings: Readings) -> None:
    context, twin = pair(arch)
    rows = batch((tokens(32, 3), 40, 1))
    whole = readings(arch, rows, _history)
    for each in (context, twin):
        _history(each)
    rng = random.Random(1)
    for _ in range(100):
        cancelled_at(context, rows, rng.randrange(1, whole * 9 // 10))
    assert same_bits(decode(context, rows), decode(twin, rows))
    assert same_bits(one_more(context), one_more(twin))


BY_TURNS: list[tuple[str, dict[str, Any]]] = [
    *((arch, {}) for arch in GENERATIVE),
    *((arch, {"kv_unified": False}) for arch in ("llama", "swa", "hybrid")),
    *((arch, {"flash_attn": False}) for arch in ("llama", "swa")),
    ("swa", {"swa_full": True}),
]


@pytest.mark.parametrize(("arch", "params"), BY_TURNS, ids=str)
def test_cancel_and_redo_by_turns_far_beyond_the_window_stay_in_step_with_the_twin(
    arch: str, params: dict[str, Any], pair: Pair, readings: Readings
) -> None:
    made = {"n_seq_max": 2, "n_ctx": 2048, **params}
    context, twin = pair(arch, **made)
    whole = readings(arch, batch((tokens(60, 0), 0, 0), logits="last"), **made)
    rng = random.Random(2)
    ends = [0, 0]
    for turn in range(12):
        seq = turn % 2
        rows = batch((tokens(60, turn), ends[seq], seq), logits="last")
        before = holds(context)
        for _ in range(2):
            cancelled_at(context, rows, rng.randrange(1, whole * 9 // 10))
            assert holds(context) == before
        for each in (context, twin):
            each.decode(rows)
        ends[seq] += 60
        assert holds(context) == holds(twin)
        assert same_bits(outputs(context, rows), outputs(twin, rows))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_call_resumed_again_and_again_gives_the_bits_of_one_call(arch: str, pair: Pair) -> None:
    context, twin = pair(arch)
    ids = tokens(80, 3)
    expected = decode(twin, batch((ids, 0, 0)))
    got = np.zeros_like(expected)
    end, cancels, reading = 0, 0, 50
    while end < len(ids):
        rest = batch((ids[end:], end, 0))
        token = far()
        with deadline_at(reading):
            error = cancelled(context, rest, token, on_cancel="keep")
        done = len(rest) if error is None else error.rows_done
        if error is not None:
            cancels += 1
            assert error.sequences[0].state == "kept"
            assert error.sequences[0].end == end + done == context.memory.pos_max(0) + 1
        for row in range(done):
            got[end + row] = context.logits(row)
        if done == 0:
            reading = reading * 3 // 2
        end += done
    assert cancels > 2
    assert same_bits(got, expected)
    assert same_bits(one_more(context), one_more(twin))


# ---- copies ----------------------------------------------------------------------------------------------------


def _copied(context: lc.Context) -> None:
    decode(context, batch((tokens(40, 1), 0, 0)))
    context.memory.copy(0, 1)
    context.memory.copy(1, 2)


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("kv_unified", [True, False])
def test_a_sequence_and_its_copies_survive_each_other(
    arch: str, kv_unified: bool, pair: Pair, readings: Readings
) -> None:
    whole = readings(arch, batch((tokens(64, 3), 40, 0)), _copied, kv_unified=kv_unified)
    for who in range(3):
        context, twin = pair(arch, kv_unified=kv_unified)
        for each in (context, twin):
            _copied(each)
        cancelled_at(context, batch((tokens(64, 3), 40, who)), whole // 2)
        for seq in (2, 0, 1):
            more = batch((tokens(12, 10 + seq), 40, seq))
            assert same_bits(decode(context, more), decode(twin, more))
        assert same_bits(one_more(context), one_more(twin))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_copy_that_is_removed_after_a_cancel_takes_nothing_with_it(arch: str, pair: Pair, readings: Readings) -> None:
    context, twin = pair(arch)
    rows = batch((tokens(64, 3), 40, 1))
    whole = readings(arch, rows, _copied)
    for each in (context, twin):
        _copied(each)
    cancelled_at(context, rows, whole // 2)
    for each in (context, twin):
        each.memory.remove(1)
    assert holds(context)[1] == (-1, -1)
    assert same_bits(one_more(context), one_more(twin))


# ---- what moves ------------------------------------------------------------------------------------------------


def _moved(context: lc.Context) -> None:
    decode(context, woven(*((tokens(12, seq), 0, seq) for seq in range(4))))
    context.memory.remove(1)
    decode(context, batch((tokens(6, 5), 12, 3), (tokens(6, 6), 12, 0)))
    decode(context, batch((tokens(6, 7), 0, 1)))


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("seqs", [(0, 2), (3, 1), (2, 3), (1, 0), (0, 1, 2, 3), (3,)], ids=str)
def test_sequences_outside_of_a_cancelled_batch_keep_their_bits(
    arch: str, seqs: tuple[int, ...], pair: Pair, readings: Readings
) -> None:
    context, twin = pair(arch, n_seq_max=4)
    for each in (context, twin):
        _moved(each)
    ends = {seq: last + 1 for seq, (_, last) in holds(twin).items()}
    rows = batch(*((tokens(48 // len(seqs), 20 + seq), ends[seq], seq) for seq in seqs))
    whole = readings(arch, rows, _moved, n_seq_max=4)
    at_first = holds(context)
    for share in SHARES:
        cancelled_at(context, rows, int(share * whole))
        assert holds(context) == at_first
    assert same_bits(one_more(context), one_more(twin))
    ends = {seq: last + 1 for seq, (_, last) in holds(twin).items()}
    again = batch(*((tokens(20, 20 + seq), ends[seq], seq) for seq in seqs))
    assert same_bits(decode(context, again), decode(twin, again))
    assert same_bits(one_more(context), one_more(twin))


# ---- cells that are not in the order of their age ---------------------------------------------------------------

A, B, D = range(3)


def _gap(context: lc.Context) -> None:
    """A window's first positions, a gap of ten cells, and the rest up to position 30."""
    ids = tokens(31, 1)
    context.decode(batch((ids[:4], 0, A)))
    context.decode(batch((tokens(10, 2), 0, D)))
    for start in range(4, 31, 9):
        context.decode(batch((ids[start : start + 9], start, A)))
    context.memory.remove(D)


@pytest.mark.parametrize("params", [{}, {"flash_attn": False}], ids=str)
def test_a_window_whose_cells_a_survivor_took_is_put_back_and_the_survivor_runs_alone(
    params: dict[str, Any], new_context: NewContext
) -> None:
    made = {"n_ctx": 256, "n_ubatch": 10, "n_seq_max": 4, **params}
    rows = batch((tokens(10, 3), 31, A), (tokens(2, 4), 0, B))
    context, twin = new_context("swa", **made), new_context("swa", **made)
    tried = new_context("swa", **made)
    _gap(tried)
    token = far()
    whole = readings_of(lambda: tried.decode(rows, {A: token}))
    again = 0
    for reading in range(1, whole + 1, max(1, whole // 30)):
        for each in (context, twin):
            each.memory.clear()
            _gap(each)
        before = context.state.save(A)
        token = far()
        with deadline_at(reading):
            told = context.decode(rows, {A: token})
        if not told.sequences[A].cancelled:
            assert reading > whole - 100
            continue
        again += told.n_ubatches > 2
        assert told.survivors == [B]
        assert context.state.save(A) == before
        assert same_bits(context.logits(10), decode(twin, batch((tokens(2, 4), 0, B)))[0])
        assert holds(context) == holds(twin)
        assert same_bits(one_more(context), one_more(twin))
    assert again > 2, "no cancel came while the survivor held the other's cells"


def _zeroed(context: lc.Context) -> None:
    """An empty state that lay between two that were computed: llama.cpp has zeroed it, and trusts that it is zero."""
    for seq in (0, 2, 1):
        context.decode(batch((tokens(5, seq), 0, seq)))
    context.memory.remove(2)
    context.decode(batch((tokens(3, 3), 5, 0), (tokens(3, 4), 5, 1)))


@pytest.mark.parametrize("on_cancel", ["rollback", "keep"])
@pytest.mark.parametrize("arch", ["mamba", "hybrid", "hybrid-conv", "hybrid-swa"])
def test_a_sequence_that_begins_after_a_cancel_begins_with_nothing(
    arch: str, on_cancel: Any, pair: Pair, readings: Readings
) -> None:
    context, twin = pair(arch)
    for each in (context, twin):
        _zeroed(each)
    rows, fresh = batch((tokens(8, 5), 0, 2)), batch((tokens(1, 6), 0, 2))
    cancelled_at(context, rows, readings(arch, rows, _zeroed, on_cancel=on_cancel) // 2, on_cancel=on_cancel)
    assert same_bits(decode(context, fresh), decode(twin, fresh))
    assert context.state.save(2) == twin.state.save(2), "a zero has another sign"
    assert same_bits(one_more(context), one_more(twin))


# ---- outputs, states, embeddings -------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("n_ubatch", [8, 64])
def test_the_outputs_of_the_call_before_can_be_read_after_a_cancel(
    arch: str, n_ubatch: int, new_context: NewContext, readings: Readings
) -> None:
    first = batch((tokens(40, 1), 0, 0))
    context = new_context(arch, n_ubatch=n_ubatch)
    context.decode(first)
    before = outputs(context, first)
    for logits in ("last", "all", "none"):
        rows = batch((tokens(100, 2), 40, 0), logits=logits)
        whole = readings(arch, rows, lambda context: context.decode(first), n_ubatch=n_ubatch)
        for share in SHARES:
            cancelled_at(context, rows, int(share * whole))
            assert same_bits(outputs(context, first), before)
            with pytest.raises(IndexError):
                context.logits(99)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_embeddings_of_the_call_before_can_be_read_after_a_cancel(
    arch: str, new_context: NewContext, readings: Readings
) -> None:
    made: dict[str, Any] = {"n_seq_max": 1, "embeddings": True, "pooling": "none"}
    context = new_context(arch, n_ubatch=8, **made)
    first, rows = batch((tokens(20, 1), 0, 0)), batch((tokens(64, 2), 20, 0))
    context.decode(first)
    before = np.stack([context.embeddings(i) for i in range(20)])
    cancelled_at(context, rows, readings(arch, rows, lambda context: context.decode(first), **made) // 2)
    assert same_bits(np.stack([context.embeddings(i) for i in range(20)]), before)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_state_saved_after_a_cancel_is_the_state_saved_before(arch: str, pair: Pair, readings: Readings) -> None:
    context, other = pair(arch)
    first, rows = batch((tokens(50, 1), 0, 0)), batch((tokens(64, 2), 50, 0))
    decode(context, first)
    before = context.state.save(0)
    cancelled_at(context, rows, readings(arch, rows, lambda context: context.decode(first)) // 2)
    after = context.state.save(0)
    assert after == before
    other.state.load(1, after)
    assert holds(other)[1][1] == holds(context)[0][1]
    more = tokens(10, 3)
    assert close(decode(context, batch((more, 50, 0))), decode(other, batch((more, 50, 1))))


@pytest.mark.parametrize("pooling", ["mean", "cls", "none"])
def test_an_embedding_model_gives_the_same_vectors_after_a_cancel(
    pooling: str, new_context: NewContext, readings: Readings
) -> None:
    made: dict[str, Any] = {"n_ubatch": None, "n_seq_max": 4, "embeddings": True, "pooling": pooling}
    context, twin = (new_context("embedding", **made) for _ in range(2))
    rows = batch((tokens(60, 1), 0, 0), (tokens(50, 2), 0, 1), (tokens(40, 3), 0, 2))

    def vectors(each: lc.Context) -> np.ndarray:
        if pooling == "none":
            return np.stack([each.embeddings(row) for row in range(len(rows))])
        return np.stack([each.pooled_embeddings(seq) for seq in range(3)])

    context.decode(batch((tokens(40, 9), 0, 0), (tokens(40, 8), 0, 1), (tokens(70, 7), 0, 2)))
    before = vectors(context)
    whole = readings("embedding", rows, **made)
    for share in SHARES:
        cancelled_at(context, rows, int(share * whole))
        assert same_bits(vectors(context), before)
    for each in (context, twin):
        each.decode(rows)
    assert same_bits(vectors(context), vectors(twin))


# ---- what never began ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "swa", "hybrid", "moe"])
@pytest.mark.parametrize("on_cancel", ["rollback", "keep"])
def test_a_batch_for_which_there_is_no_room_leaves_no_trace(arch: str, on_cancel: str, pair: Pair) -> None:
    context, twin = pair(arch, n_ctx=256)
    for each in (context, twin):
        decode(each, batch((tokens(100, 1), 0, 0)))
        decode(each, batch((tokens(100, 2), 0, 1)))
    at_first, last = holds(context), context.logits(-1)
    for _ in range(3):
        with pytest.raises(lc.MemoryFullError):
            context.decode(batch((tokens(30, 3), 100, 0), (tokens(70, 4), 0, 2)), on_cancel=on_cancel)
        assert holds(context) == at_first
        assert same_bits(context.logits(-1), last)
    rows = batch((tokens(30, 3), 100, 0))
    assert same_bits(decode(context, rows), decode(twin, rows))
    assert same_bits(one_more(context), one_more(twin))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_batch_that_is_refused_leaves_no_trace(arch: str, pair: Pair) -> None:
    context, twin = pair(arch)
    for each in (context, twin):
        _history(each)
    at_first = holds(context)
    for rows in (batch((tokens(4), 31, 0)), batch((tokens(4), 0, 7)), batch(([10**6], 30, 0)), lc.Batch(1)):
        with pytest.raises(lc.InvalidBatchError):
            context.decode(rows)
    assert holds(context) == at_first
    assert same_bits(one_more(context), one_more(twin))
