"""Law 7, neighbours: in a batch that several requests share, cancelling some leaves the others their results."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE

from .words import batch, cancelled, cancels_after, dead, decode, holds, one_more, outputs, same_bits, tokens, woven

NewContext = Callable[..., lc.Context]
Layout = Callable[..., lc.Batch]

CLOSE = 0.2  # of logits whose rows were cut in another way: a few are 0.07 apart behind a sliding window
SHARING = [arch for arch in GENERATIVE if arch != "mamba"]  # rows of two sequences need a cache


def _alive(*seqs: int) -> dict[int, lc.CancelToken]:
    return {seq: lc.CancelToken() for seq in seqs}


def _rows_of(rows: lc.Batch, seq: int) -> list[int]:
    return [row for row in range(len(rows)) if seq in rows.seq_ids(row)]


def _logits(context: lc.Context, rows: lc.Batch, *seqs: int) -> np.ndarray:
    """The logits of these sequences' rows, by the index that they have in the batch."""
    return np.stack([context.logits(row) for seq in seqs for row in _rows_of(rows, seq)])


def _agrees(context: lc.Context, told: Mapping[int, lc.SequenceOutcome]) -> bool:
    return all(context.memory.pos_max(seq) + 1 == outcome.end for seq, outcome in told.items())


def _stopped_midway(context: lc.Context, run: Callable[[float], Any], fresh: Callable[[], object]) -> Any:
    """What `run` tells of a shared batch with a deadline that passed neither before its first row nor after its last."""
    fresh()
    started = time.perf_counter()
    run(1e6)
    duration = time.perf_counter() - started
    for attempt in range(60):
        fresh()
        told = run(duration * (0.2 + 0.6 * (attempt % 7) / 7))
        if told is not None:
            return told
    pytest.fail("no cancel came in the middle of the batch")


# ---- before the start --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("layout", [batch, woven])
@pytest.mark.parametrize("gone", [(0,), (1,), (2,), (0, 2), (0, 1)], ids=str)
def test_rows_of_a_sequence_cancelled_before_are_left_out_and_the_others_get_the_bits_they_get_alone(
    arch: str, layout: Layout, gone: tuple[int, ...], new_context: NewContext
) -> None:
    context, alone = (new_context(arch, n_seq_max=3, n_ubatch=8) for _ in range(2))
    parts = [(tokens(40 + 5 * seq, seq), 0, seq) for seq in range(3)]
    left = [seq for seq in range(3) if seq not in gone]
    rows = layout(*parts)
    result = context.decode(rows, {seq: dead() if seq in gone else lc.CancelToken() for seq in range(3)})
    fewer = layout(*(parts[seq] for seq in left))
    expected = decode(alone, fewer)
    assert result.survivors == left
    assert result.rows_done == len(fewer)
    assert same_bits(_logits(context, rows, *left), _logits(alone, fewer, *left))
    assert expected.shape[0] == len(fewer)
    assert holds(context) == holds(alone)
    assert same_bits(one_more(context), one_more(alone))


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("on_cancel", ["rollback", "keep"])
def test_a_sequence_cancelled_before_keeps_the_history_that_it_had(
    arch: str, on_cancel: str, new_context: NewContext
) -> None:
    context, alone = (new_context(arch, n_seq_max=2, n_ubatch=8) for _ in range(2))
    for each in (context, alone):
        decode(each, batch((tokens(20, 1), 0, 0), (tokens(30, 2), 0, 1)))
    rows = woven((tokens(16, 3), 20, 0), (tokens(16, 4), 30, 1))
    result = context.decode(rows, {0: lc.CancelToken(), 1: dead()}, on_cancel=on_cancel)
    expected = decode(alone, batch((tokens(16, 3), 20, 0)))
    assert result.sequences[1].cancelled
    assert result.sequences[1].state == ("rolled_back" if on_cancel == "rollback" else "kept")
    assert result.sequences[1].end == 30
    assert result.sequences[0].state == "completed"
    assert same_bits(_logits(context, rows, 0), expected)
    more = batch((tokens(16, 4), 30, 1))
    assert same_bits(decode(context, more), decode(alone, more))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_rows_that_were_left_out_have_no_logits(arch: str, new_context: NewContext) -> None:
    context = new_context(arch, n_seq_max=2)
    rows = woven((tokens(6, 1), 0, 0), (tokens(6, 2), 0, 1))
    context.decode(rows, {0: dead(), 1: lc.CancelToken()})
    for row in range(len(rows)):
        if rows.seq_ids(row) == [0]:
            with pytest.raises(IndexError):
                context.logits(row)
        else:
            assert np.isfinite(context.logits(row)).all()


def test_an_embedding_batch_leaves_out_a_cancelled_sequence(new_context: NewContext) -> None:
    params: dict[str, Any] = {"n_ubatch": None, "n_seq_max": 3, "embeddings": True, "pooling": "mean"}
    context, alone = (new_context("embedding", **params) for _ in range(2))
    parts = [(tokens(30, seq), 0, seq) for seq in range(3)]
    result = context.decode(batch(*parts), {0: dead(), 1: lc.CancelToken(), 2: lc.CancelToken()})
    alone.decode(batch(*parts[1:]))
    assert result.survivors == [1, 2]
    for seq in (1, 2):
        assert same_bits(context.pooled_embeddings(seq), alone.pooled_embeddings(seq))
    with pytest.raises(IndexError):
        context.pooled_embeddings(0)


# ---- abort_when --------------------------------------------------------------------------------------------------

# Rows of sequences 0, 1, 2; the sequences without a token; those cancelled; and what stops the call.
COUNTS = [
    ((8, 8, 8), (), (), set()),
    ((8, 8, 8), (), (1,), {"any"}),
    ((8, 8, 8), (), (0, 2), {"any", "majority"}),
    ((8, 8, 8), (), (0, 1, 2), {"any", "majority", "all"}),
    ((20, 3, 3), (), (0,), {"any", "majority"}),  # rows are counted, not sequences
    ((20, 3, 3), (), (1, 2), {"any"}),
    ((10, 5, 5), (), (0,), {"any"}),  # half is no majority
    ((10, 5, 4), (), (0,), {"any", "majority"}),
    ((8, 8, 8), (2,), (0, 1), {"any", "majority"}),  # without a token, never cancelled
    ((3, 3, 20), (2,), (0, 1), {"any"}),
    ((8, 8, 8), (0, 1, 2), (), set()),
]


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("abort_when", ["all", "majority", "any"])
@pytest.mark.parametrize(("sizes", "without", "gone", "stops"), COUNTS)
def test_the_rows_of_cancelled_sequences_decide_whether_the_call_stops(
    arch: str, abort_when: str, sizes: tuple[int, ...], without: tuple[int, ...], gone: tuple[int, ...],
    stops: set[str], new_context: NewContext,
) -> None:
    context = new_context(arch, n_seq_max=3, n_ubatch=8)
    rows = batch(*((tokens(n, seq), 0, seq) for seq, n in enumerate(sizes)))
    given = {seq: dead() if seq in gone else lc.CancelToken() for seq in range(3) if seq not in without}
    left = [seq for seq in range(3) if seq not in gone]
    if abort_when in stops:
        error = cancelled(context, rows, given, abort_when=abort_when)
        assert error is not None
        assert error.survivors == left
        assert error.rows_done == 0
        assert all(outcome.state == "rolled_back" for outcome in error.sequences.values())
        assert set(holds(context).values()) == {(-1, -1)}
    else:
        result = context.decode(rows, given, abort_when=abort_when)
        assert result.survivors == left
        assert result.rows_done == sum(sizes[seq] for seq in left)
        assert {seq: last for seq, (_, last) in holds(context).items()} == {
            seq: -1 if seq in gone else sizes[seq] - 1 for seq in range(3)
        }


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_token_for_a_sequence_that_is_not_in_the_batch_counts_for_nothing(arch: str, new_context: NewContext) -> None:
    context = new_context(arch, n_seq_max=3)
    result = context.decode(batch((tokens(8), 0, 0)), {0: lc.CancelToken(), 2: dead()}, abort_when="any")
    assert result.survivors == [0]
    assert list(result.sequences) == [0]


@pytest.mark.parametrize("abort_when", ["all", "majority", "any"])
def test_one_token_for_all_sequences_stops_the_whole_call(abort_when: str, new_context: NewContext) -> None:
    context, token = new_context("llama", n_seq_max=2), dead()
    rows = batch((tokens(8), 0, 0), (tokens(8), 0, 1))
    error = cancelled(context, rows, {0: token, 1: token}, abort_when=abort_when)
    assert error is not None
    assert error.survivors == []
    assert error.reason == "long ago"


# ---- on the way --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("on_cancel", ["rollback", "keep"])
@pytest.mark.parametrize("history", [0, 24])
def test_a_sequence_cancelled_on_the_way_is_undone_or_kept_and_the_others_go_on(
    arch: str, on_cancel: str, history: int, new_context: NewContext
) -> None:
    context, twin = (new_context(arch, n_seq_max=2, n_ubatch=8) for _ in range(2))
    rows = woven((tokens(300, 3), history, 0), (tokens(300, 4), history, 1))

    def fresh(each: lc.Context = context) -> None:
        each.memory.clear()
        if history:
            decode(each, batch((tokens(history, 1), 0, 0), (tokens(history, 2), 0, 1)))

    def run(timeout: float) -> lc.DecodeResult | None:
        given = {0: lc.CancelToken(), 1: lc.CancelToken(timeout=timeout)}
        told = context.decode(rows, given, on_cancel=on_cancel)
        return told if told.sequences[1].cancelled and told.n_ubatches > 38 else None

    result = _stopped_midway(context, run, fresh)
    assert result.n_ubatches < 76
    assert result.survivors == [0]
    assert result.sequences[0].state == "completed"
    assert result.sequences[1].state == ("rolled_back" if on_cancel == "rollback" else "kept")
    assert _agrees(context, result.sequences)
    end = result.sequences[1].end
    assert end == history if on_cancel == "rollback" else history < end < history + 300
    assert result.rows_done == 300 + end - history

    fresh(twin)
    expected = decode(twin, batch((tokens(300, 3), history, 0)))
    assert np.allclose(_logits(context, rows, 0), expected, atol=CLOSE)
    if on_cancel == "keep":
        done = _rows_of(rows, 1)[: end - history]
        kept = np.stack([context.logits(row) for row in done])
    rest = batch((tokens(300, 4)[end - history :], end, 1))
    got = decode(context, rest)
    expected = decode(twin, batch((tokens(300, 4), history, 1)))
    if on_cancel == "keep":
        got = np.concatenate([kept, got])
    assert np.allclose(got, expected, atol=CLOSE)
    if arch == "swa":  # how much that has left the window is still there depends on the calls, which differ
        assert [last for _, last in holds(context).values()] == [last for _, last in holds(twin).values()]
    else:
        assert holds(context) == holds(twin)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_sequence_redone_after_a_cancel_on_the_way_has_the_bits_of_a_sequence_that_saw_none(
    arch: str, new_context: NewContext
) -> None:
    context, twin = (new_context(arch, n_seq_max=2, n_ubatch=8, kv_unified=False) for _ in range(2))
    rows = batch((tokens(20, 3), 0, 0), (tokens(300, 4), 0, 1))
    hits = 0
    for step in range(5):
        context.memory.clear()
        with cancels_after(0.008 * step) as token:
            result = context.decode(rows, {0: lc.CancelToken(), 1: token})
        if not result.sequences[1].cancelled:
            continue
        hits += 1
        assert _agrees(context, result.sequences)
        assert holds(context)[1] == (-1, -1)
        twin.memory.clear()
        first = batch((tokens(20, 3), 0, 0))
        twin.decode(first)
        again = batch((tokens(300, 4), 0, 1))
        assert same_bits(decode(context, again), decode(twin, again))
    assert hits > 0


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("logits", ["last", "all"])
def test_the_logits_of_survivors_are_read_by_their_row_in_the_batch(
    arch: str, logits: str, new_context: NewContext
) -> None:
    context, alone = (new_context(arch, n_seq_max=3, n_ubatch=8) for _ in range(2))
    parts = [(tokens(20, seq), 0, seq) for seq in range(3)]
    rows = batch(*parts, logits=logits)
    context.decode(rows, {1: dead()})
    fewer = batch(parts[0], parts[2], logits=logits)
    expected = decode(alone, fewer)
    wanted = [row for row in np.flatnonzero(rows.logits) if rows.seq_ids(row) != [1]]
    assert same_bits(np.stack([context.logits(int(row)) for row in wanted]), expected)
    assert same_bits(context.logits(-1), expected[-1])
    assert same_bits(context.logits(59), expected[-1])
    with pytest.raises(IndexError):
        context.logits(39)


# ---- stopped and run again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("layout", [batch, woven])
@pytest.mark.parametrize("abort_when", ["any", "majority"])
def test_a_stopped_call_tells_the_survivors_who_alone_get_their_bits_when_it_is_run_again(
    arch: str, layout: Layout, abort_when: str, new_context: NewContext
) -> None:
    context, twin = (new_context(arch, n_seq_max=3, n_ubatch=8) for _ in range(2))
    parts = [(tokens(80, 10), 16, 0), (tokens(240, 11), 16, 1), (tokens(80, 12), 16, 2)]

    def fresh(each: lc.Context = context) -> None:
        each.memory.clear()
        decode(each, batch(*((tokens(16, seq), 0, seq) for seq in range(3))))

    def run(timeout: float) -> lc.DecodeCancelled | None:
        given = {**_alive(0, 2), 1: lc.CancelToken(timeout=timeout)}
        return cancelled(context, layout(*parts), given, abort_when=abort_when)

    error = _stopped_midway(context, run, fresh)
    assert isinstance(error, lc.DeadlineExceeded)
    assert error.survivors == [0, 2]
    assert [outcome.cancelled for outcome in error.sequences.values()] == [False, True, False]
    assert _agrees(context, error.sequences)
    fresh(twin)
    assert holds(context) == holds(twin)
    again = layout(*(parts[seq] for seq in error.survivors))
    assert same_bits(decode(context, again), decode(twin, again))
    assert same_bits(one_more(context), one_more(twin))


# ---- shared rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", SHARING)
@pytest.mark.parametrize("gone", [0, 1])
def test_rows_that_two_sequences_share_survive_with_one_of_them(arch: str, gone: int, new_context: NewContext) -> None:
    context, alone = (new_context(arch, n_seq_max=2, n_ubatch=8) for _ in range(2))
    left = 1 - gone
    rows = batch((tokens(24, 1), 0, (0, 1)), (tokens(9, 2), 24, 0), (tokens(9, 3), 24, 1))
    result = context.decode(rows, {gone: dead(), left: lc.CancelToken()})
    assert result.survivors == [left]
    assert result.rows_done == 33
    assert _agrees(context, result.sequences)
    expected = decode(alone, batch((tokens(24, 1), 0, left), (tokens(9, 2 + left), 24, left)))
    assert np.allclose(_logits(context, rows, left), expected, atol=CLOSE)
    assert holds(context) == holds(alone)
    assert np.allclose(one_more(context), one_more(alone), atol=CLOSE)


@pytest.mark.parametrize("arch", SHARING)
@pytest.mark.parametrize("gone", [0, 1])
def test_shared_rows_survive_when_one_of_their_sequences_is_cancelled_on_the_way(
    arch: str, gone: int, new_context: NewContext
) -> None:
    context, alone = (new_context(arch, n_seq_max=2, n_ubatch=8) for _ in range(2))
    left = 1 - gone
    rows = batch((tokens(200, 1), 0, (0, 1)), (tokens(50, 2), 200, 0), (tokens(50, 3), 200, 1))

    def run(timeout: float) -> lc.DecodeResult | None:
        told = context.decode(rows, {gone: lc.CancelToken(timeout=timeout), left: lc.CancelToken()})
        return told if told.sequences[gone].cancelled else None

    result = _stopped_midway(context, run, context.memory.clear)
    assert result.survivors == [left]
    assert result.rows_done >= 250
    assert _agrees(context, result.sequences)
    expected = decode(alone, batch((tokens(200, 1), 0, left), (tokens(50, 2 + left), 200, left)))
    assert np.allclose(_logits(context, rows, left), expected, atol=CLOSE)
    assert holds(context) == holds(alone)
    again = batch((tokens(60, 5), 0, gone))
    assert np.allclose(decode(context, again), decode(alone, again), atol=CLOSE)


@pytest.mark.parametrize("arch", SHARING)
def test_shared_rows_count_as_cancelled_only_when_all_their_sequences_are(arch: str, new_context: NewContext) -> None:
    context = new_context(arch, n_seq_max=3)
    rows = batch((tokens(24, 1), 0, (0, 1)), (tokens(4, 2), 0, 2))
    result = context.decode(rows, {0: dead(), 1: lc.CancelToken(), 2: dead()}, abort_when="majority")
    assert result.survivors == [1]
    assert {seq: last for seq, (_, last) in holds(context).items()} == {0: -1, 1: 23, 2: -1}
    context.memory.clear()
    error = cancelled(context, rows, {0: dead(), 1: dead(), 2: lc.CancelToken()}, abort_when="majority")
    assert error is not None
    assert error.survivors == [2]
    context.memory.clear()
    result = context.decode(rows, {0: dead(), 2: lc.CancelToken()}, abort_when="any")  # 1 has no token
    assert result.survivors == [1, 2]
    assert outputs(context, rows).shape[0] == 28
