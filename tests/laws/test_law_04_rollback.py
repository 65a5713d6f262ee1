"""Law 4, rollback: after a cancel the context is exactly as before the call; with "keep", what was done stays.

The sweeps of `every_poll.py` cancel at chosen polls, those here from other threads and by real deadlines.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE

from .every_poll import ALL, LOADS, SCENARIOS
from .words import (
    batch,
    cancelled,
    cancels_after,
    close,
    dead,
    decode,
    holds,
    one_more,
    outputs,
    same_bits,
    swept,
    tokens,
    woven,
)

NewContext = Callable[..., lc.Context]
EVERY_SCENARIO = [(arch, name) for arch in GENERATIVE for name, scenario in SCENARIOS.items() if arch in scenario.archs]


# ---- at every poll ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "name"), EVERY_SCENARIO)
def test_a_call_cancelled_at_any_poll_leaves_no_trace(arch: str, name: str) -> None:
    told = swept(arch, "rollback", name)
    assert told["problems"] == []
    assert told["cancels"] >= min(8, told["polls"] - 8)


@pytest.mark.parametrize(("arch", "name"), EVERY_SCENARIO)
def test_what_a_call_cancelled_at_any_poll_keeps_can_be_resumed_with_the_same_bits(arch: str, name: str) -> None:
    told = swept(arch, "keep", name)
    assert told["problems"] == []
    assert told["cancels"] > 2
    if name == "a sequence with history":
        assert {0, 8, 16, 24} <= set(told["rows_done"]), "the cancels did not reach each ubatch"


@pytest.mark.parametrize("arch", ALL)
@pytest.mark.parametrize("into", LOADS)
def test_a_load_of_a_state_cancelled_at_any_poll_changes_nothing(arch: str, into: str) -> None:
    told = swept(arch, "load", into)
    assert told["problems"] == []
    assert told["cancels"] > 3


# ---- at any moment ---------------------------------------------------------------------------------------------


def _history(context: lc.Context) -> None:
    decode(context, batch((tokens(30, 1), 0, 0), (tokens(40, 2), 0, 1)))


@pytest.fixture
def pair(new_context: NewContext) -> Callable[..., tuple[lc.Context, lc.Context]]:
    """A context, and its twin that will see no cancel."""

    def make(arch: str, **params: Any) -> tuple[lc.Context, lc.Context]:
        settings = {"n_ubatch": 8, "n_seq_max": 3, **params}
        return new_context(arch, **settings), new_context(arch, **settings)

    return make


@pytest.mark.parametrize("arch", GENERATIVE)
def test_cancels_from_another_thread_at_random_moments_leave_no_trace(arch: str, pair: Any) -> None:
    context, twin = pair(arch)
    rows = batch((tokens(48, 3), 30, 0), (tokens(48, 4), 40, 1))
    for each in pair_of(context, twin):
        _history(each)
    started = time.perf_counter()
    expected = decode(twin, rows)
    duration = time.perf_counter() - started
    at_first = holds(context)
    rng = random.Random(arch)
    hits = 0
    for _ in range(25):
        with cancels_after(rng.uniform(0, 0.8 * duration)) as token:
            error = cancelled(context, rows, token)
        if error is None:
            context.memory.clear()
            _history(context)
            continue
        hits += 1
        assert holds(context) == at_first
    assert hits > 0
    assert same_bits(decode(context, rows), expected)
    assert same_bits(one_more(context), one_more(twin))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_deadlines_from_none_to_the_whole_duration_leave_no_trace(arch: str, pair: Any) -> None:
    context, twin = pair(arch)
    rows = batch((tokens(64, 3), 30, 0))
    for each in pair_of(context, twin):
        _history(each)
    started = time.perf_counter()
    expected = decode(twin, rows)
    duration = time.perf_counter() - started
    at_first = holds(context)
    hits = 0
    for step in range(40):
        token = lc.CancelToken(timeout=duration * step / 40)
        error = cancelled(context, rows, token)
        if error is None:
            context.memory.clear()
            _history(context)
            continue
        hits += 1
        assert isinstance(error, lc.DeadlineExceeded)
        assert holds(context) == at_first
    assert hits > 4
    assert same_bits(decode(context, rows), expected)
    assert same_bits(one_more(context), one_more(twin))


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("on_cancel", ["rollback", "keep"])
def test_a_cancel_before_the_start_does_nothing_at_all(arch: str, on_cancel: str, pair: Any) -> None:
    context, twin = pair(arch)
    for each in pair_of(context, twin):
        _history(each)
    at_first, last = holds(context), context.logits(-1)
    rows = batch((tokens(20, 3), 30, 0), (tokens(20, 4), 0, 2))
    error = cancelled(context, rows, dead(), on_cancel=on_cancel)
    assert error is not None
    assert {seq: outcome.end for seq, outcome in error.sequences.items()} == {0: 30, 2: 0}
    assert error.rows_done == 0
    assert holds(context) == at_first
    assert same_bits(context.logits(-1), last)
    assert same_bits(decode(context, rows), decode(twin, rows))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_hundred_cancels_in_a_row_leave_no_trace(arch: str, pair: Any) -> None:
    context, twin = pair(arch)
    for each in pair_of(context, twin):
        _history(each)
    rows = batch((tokens(64, 3), 40, 1))
    rng = random.Random(1)
    hits = 0
    for _ in range(100):
        token = lc.CancelToken(timeout=rng.uniform(0, 0.004))
        if cancelled(context, rows, token) is None:
            context.memory.clear()
            _history(context)
        else:
            hits += 1
    assert hits > 10
    assert same_bits(decode(context, rows), decode(twin, rows))
    assert same_bits(one_more(context), one_more(twin))


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("params", [{}, {"swa_full": True}, {"kv_unified": False}, {"flash_attn": False}], ids=str)
def test_cancel_and_redo_by_turns_far_beyond_the_window_stay_in_step_with_the_twin(
    arch: str, params: dict[str, Any], pair: Any
) -> None:
    context, twin = pair(arch, n_seq_max=2, n_ctx=2048, **params)
    rng = random.Random(2)
    ends = [0, 0]
    hits = 0
    for turn in range(14):
        seq = turn % 2
        rows = batch((tokens(60, turn), ends[seq], seq), logits="last")
        for _ in range(3):
            before = holds(context)
            if cancelled(context, rows, lc.CancelToken(timeout=rng.uniform(0, 0.006))) is None:
                break
            hits += 1
            assert holds(context) == before
        else:
            context.decode(rows)
        twin.decode(rows)
        ends[seq] += 60
        assert holds(context) == holds(twin)
        assert same_bits(outputs(context, rows), outputs(twin, rows))
    assert hits > 5


# ---- copies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("who", [0, 1, 2])
@pytest.mark.parametrize("kv_unified", [True, False])
def test_a_sequence_and_its_copies_survive_each_other(arch: str, who: int, kv_unified: bool, pair: Any) -> None:
    context, twin = pair(arch, kv_unified=kv_unified)
    for each in pair_of(context, twin):
        decode(each, batch((tokens(40, 1), 0, 0)))
        each.memory.copy(0, 1)
        each.memory.copy(1, 2)
    rows = batch((tokens(512, 3), 40, who))
    assert cancelled_within(context, rows)
    for seq in (2, 0, 1):
        more = batch((tokens(12, 10 + seq), 40, seq))
        assert same_bits(decode(context, more), decode(twin, more))
    assert same_bits(one_more(context), one_more(twin))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_copy_that_is_removed_after_a_cancel_takes_nothing_with_it(arch: str, pair: Any) -> None:
    context, twin = pair(arch)
    for each in pair_of(context, twin):
        decode(each, batch((tokens(40, 1), 0, 0)))
        each.memory.copy(0, 1)
    assert cancelled_within(context, batch((tokens(512, 3), 40, 1)))
    for each in pair_of(context, twin):
        assert each.memory.remove(1)
    assert holds(context)[1] == (-1, -1)
    assert same_bits(one_more(context), one_more(twin))


# ---- what moves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("seqs", [(0, 2), (3, 1), (2, 3), (1, 0), (0, 1, 2, 3), (3,)], ids=str)
def test_sequences_outside_of_a_cancelled_batch_keep_their_bits(arch: str, seqs: tuple[int, ...], pair: Any) -> None:
    context, twin = pair(arch, n_seq_max=4)
    for each in pair_of(context, twin):
        decode(each, woven(*((tokens(12, seq), 0, seq) for seq in range(4))))
        each.memory.remove(1)
        decode(each, batch((tokens(6, 5), 12, 3), (tokens(6, 6), 12, 0)))
        decode(each, batch((tokens(6, 7), 0, 1)))
    ends = {seq: last + 1 for seq, (_, last) in holds(twin).items()}
    rows = batch(*((tokens(400 // len(seqs), 20 + seq), ends[seq], seq) for seq in seqs))
    at_first = holds(context)
    for share in (0.2, 0.5, 0.8):
        assert cancelled_within(context, rows, share)
        assert holds(context) == at_first
    assert same_bits(one_more(context), one_more(twin))
    ends = {seq: last + 1 for seq, (_, last) in holds(twin).items()}
    again = batch(*((tokens(20, 20 + seq), ends[seq], seq) for seq in seqs))
    assert same_bits(decode(context, again), decode(twin, again))
    assert same_bits(one_more(context), one_more(twin))


# ---- outputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("n_ubatch", [8, 64])
@pytest.mark.parametrize("logits", ["last", "all", "none"])
def test_the_outputs_of_the_call_before_can_be_read_after_a_cancel(
    arch: str, n_ubatch: int, logits: str, new_context: NewContext
) -> None:
    context = new_context(arch, n_ubatch=n_ubatch)
    rows = batch((tokens(40, 1), 0, 0))
    context.decode(rows)
    before = outputs(context, rows)
    for share in (0.0, 0.3, 0.6, 0.9):
        assert cancelled_within(context, batch((tokens(512, 2), 40, 0), logits=logits), share)
        assert same_bits(outputs(context, rows), before)
        with pytest.raises(IndexError):
            context.logits(500)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_embeddings_of_the_call_before_can_be_read_after_a_cancel(arch: str, new_context: NewContext) -> None:
    context = new_context(arch, n_ubatch=8, embeddings=True, pooling="none")
    rows = batch((tokens(20, 1), 0, 0))
    context.decode(rows)
    before = np.stack([context.embeddings(i) for i in range(20)])
    assert cancelled_within(context, batch((tokens(512, 2), 20, 0)))
    assert same_bits(np.stack([context.embeddings(i) for i in range(20)]), before)


# ---- keep ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_call_resumed_again_and_again_gives_the_bits_of_one_call(arch: str, pair: Any) -> None:
    context, twin = pair(arch)
    ids = tokens(160, 3)
    expected = decode(twin, batch((ids, 0, 0)))
    got = np.zeros_like(expected)
    end, cancels = 0, 0
    timeout = 0.001
    while end < len(ids):
        rest = batch((ids[end:], end, 0))
        error = cancelled(context, rest, lc.CancelToken(timeout=timeout), on_cancel="keep")
        done = len(rest) if error is None else error.rows_done
        if error is not None:
            cancels += 1
            assert error.sequences[0].state == "kept"
            assert error.sequences[0].end == end + done == context.memory.pos_max(0) + 1
        for row in range(done):
            got[end + row] = context.logits(row)
        if done == 0:
            timeout += 0.001
        end += done
    assert cancels > 1
    assert same_bits(got, expected)
    assert same_bits(one_more(context), one_more(twin))


# ---- no room ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "swa", "hybrid", "moe"])
@pytest.mark.parametrize("on_cancel", ["rollback", "keep"])
def test_a_batch_for_which_there_is_no_room_leaves_no_trace(arch: str, on_cancel: str, pair: Any) -> None:
    context, twin = pair(arch, n_ctx=256)
    for each in pair_of(context, twin):
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
def test_a_batch_that_is_refused_leaves_no_trace(arch: str, pair: Any) -> None:
    context, twin = pair(arch)
    for each in pair_of(context, twin):
        _history(each)
    at_first = holds(context)
    for rows in (batch((tokens(4), 31, 0)), batch((tokens(4), 0, 7)), batch(([10**6], 30, 0)), lc.Batch(1)):
        with pytest.raises(lc.InvalidBatchError):
            context.decode(rows)
    assert holds(context) == at_first
    assert same_bits(one_more(context), one_more(twin))


# ---- states and embeddings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_state_saved_after_a_cancel_is_the_state_saved_before(arch: str, new_context: NewContext) -> None:
    context, other = (new_context(arch, n_ubatch=8, n_seq_max=2) for _ in range(2))
    decode(context, batch((tokens(50, 1), 0, 0)))
    before = context.state.save(0)
    assert cancelled_within(context, batch((tokens(512, 2), 50, 0)))
    after = context.state.save(0)
    assert after == before
    other.state.load(1, after)
    assert holds(other)[1][1] == holds(context)[0][1]
    more = tokens(10, 3)
    a = decode(context, batch((more, 50, 0)))
    b = decode(other, batch((more, 50, 1)))
    assert close(a, b)


@pytest.mark.parametrize("pooling", ["mean", "cls", "none"])
def test_an_embedding_model_gives_the_same_vectors_after_a_cancel(pooling: str, new_context: NewContext) -> None:
    context, twin = (new_context("embedding", n_ubatch=None, n_seq_max=4, embeddings=True, pooling=pooling)
                     for _ in range(2))
    rows = batch((tokens(200, 1), 0, 0), (tokens(150, 2), 0, 1), (tokens(100, 3), 0, 2))

    def vectors(each: lc.Context) -> np.ndarray:
        if pooling == "none":
            return np.stack([each.embeddings(row) for row in range(len(rows))])
        return np.stack([each.pooled_embeddings(seq) for seq in range(3)])

    first = batch((tokens(64, 9), 0, 0), (tokens(64, 8), 0, 1), (tokens(322, 7), 0, 2))
    context.decode(first)
    before = vectors(context)
    hits = 0
    for share in np.linspace(0, 4, 12):
        if cancelled_within(context, rows, float(share)):
            hits += 1
        else:
            context.decode(first)
        assert same_bits(vectors(context), before)
    assert hits > 3
    context.decode(rows)
    twin.decode(rows)
    assert same_bits(vectors(context), vectors(twin))


# ---- words -----------------------------------------------------------------------------------------------------


def pair_of(context: lc.Context, twin: lc.Context) -> tuple[lc.Context, lc.Context]:
    return context, twin


def cancelled_within(context: lc.Context, rows: lc.Batch, share: float = 0.5) -> bool:
    """Cancels a long decode by a deadline that passes early in it; whether it was cancelled."""
    return cancelled(context, rows, lc.CancelToken(timeout=share * len(rows) * 1e-5)) is not None
