"""Law 7, neighbours: in a batch that several requests share, cancelling some leaves the others their results."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE

from .clock import Clock, deadline_at, in_the_middle
from .every_poll import SHARED
from .words import (
    NewContext,
    Pair,
    Readings,
    batch,
    cancelled,
    close,
    dead,
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

pytestmark = pytest.mark.timeout(1800)  # on a slow and busy machine

Layout = Callable[..., lc.Batch]

CLOSE = 0.2  # of logits whose rows were cut in another way: a few are 0.07 apart behind a sliding window
SHARING = [arch for arch in GENERATIVE if arch != "mamba"]  # rows of two sequences need a cache
EVERY_SHARED = [(arch, name) for arch in GENERATIVE for name, shared in SHARED.items() if arch in shared[-1]]

layouts = pytest.mark.parametrize("layout", [batch, woven], ids=["one after the other", "woven"])


def _rows_of(rows: lc.Batch, seq: int) -> list[int]:
    return [row for row in range(len(rows)) if seq in rows.seq_ids(row)]


def _logits(context: lc.Context, rows: lc.Batch, *seqs: int) -> np.ndarray:
    """The logits of these sequences' rows, by the index that they have in the batch."""
    return np.stack([context.logits(row) for seq in seqs for row in _rows_of(rows, seq)])


def _agrees(context: lc.Context, told: Mapping[int, lc.SequenceOutcome]) -> bool:
    return all(context.memory.pos_max(seq) + 1 == outcome.end for seq, outcome in told.items())


def _past(context: lc.Context) -> None:
    decode(context, batch(*((tokens(20 + seq, seq), 0, seq) for seq in range(3))))


@pytest.mark.parametrize(("arch", "name"), EVERY_SHARED)
@pytest.mark.parametrize("on_cancel", ["rollback", "keep"])
def test_a_neighbour_goes_on_at_whatever_poll_the_other_is_cancelled(arch: str, name: str, on_cancel: str) -> None:
    told = swept(arch, f"neighbour-{on_cancel}", name)
    assert told["problems"] == []
    assert told["cancels"] > 3
    assert on_cancel == "keep" or told["rows_done"] == [0]


# ---- before the start ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GENERATIVE)
@layouts
@pytest.mark.parametrize("history", [False, True], ids=["new", "history"])
def test_a_sequence_cancelled_before_the_start_is_as_if_it_had_not_been_in_the_batch(
    arch: str, layout: Layout, history: bool, pair: Pair
) -> None:
    starts = [20, 21, 22] if history else [0, 0, 0]
    parts = [(tokens(20 + 3 * seq, 10 + seq), starts[seq], seq) for seq in range(3)]
    rows = layout(*parts)
    for gone in ((0,), (1,), (2,), (0, 2)):
        context, alone = pair(arch)
        if history:
            _past(context)
            _past(alone)
        left = [seq for seq in range(3) if seq not in gone]
        result = context.decode(rows, {seq: dead() if seq in gone else lc.CancelToken() for seq in range(3)})
        fewer = layout(*(parts[seq] for seq in left))
        alone.decode(fewer)
        assert result.survivors == left
        assert result.rows_done == len(fewer)
        for seq in range(3):
            end = starts[seq] + len(parts[seq][0])
            assert result.sequences[seq] == (
                lc.SequenceOutcome("rolled_back", starts[seq], starts[seq], True) if seq in gone
                else lc.SequenceOutcome("completed", starts[seq], end, False))  # fmt: skip
        assert same_bits(_logits(context, rows, *left), _logits(alone, fewer, *left))
        for row in _rows_of(rows, gone[0]):
            with pytest.raises(IndexError):
                context.logits(row)
        assert holds(context) == holds(alone)
        assert same_bits(one_more(context), one_more(alone))
        context.close()
        alone.close()


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("on_cancel", ["rollback", "keep"])
def test_a_sequence_cancelled_before_keeps_the_history_that_it_had(arch: str, on_cancel: str, pair: Pair) -> None:
    context, alone = pair(arch)
    _past(context)
    _past(alone)
    rows = woven((tokens(16, 3), 20, 0), (tokens(16, 4), 21, 1))
    result = context.decode(rows, {0: lc.CancelToken(), 1: dead()}, on_cancel=on_cancel)
    expected = decode(alone, batch((tokens(16, 3), 20, 0)))
    assert result.sequences[1] == lc.SequenceOutcome("rolled_back" if on_cancel == "rollback" else "kept", 21, 21, True)
    assert same_bits(_logits(context, rows, 0), expected)
    more = batch((tokens(16, 4), 21, 1))
    assert same_bits(decode(context, more), decode(alone, more))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_the_logits_of_survivors_are_read_by_their_row_in_the_batch(arch: str, pair: Pair) -> None:
    parts = [(tokens(20, seq), 0, seq) for seq in range(3)]
    for logits in ("last", "all"):
        context, alone = pair(arch)
        rows = batch(*parts, logits=logits)
        context.decode(rows, {1: dead()})
        expected = decode(alone, batch(parts[0], parts[2], logits=logits))
        wanted = [row for row in np.flatnonzero(rows.logits) if rows.seq_ids(row) != [1]]
        assert same_bits(np.stack([context.logits(int(row)) for row in wanted]), expected)
        assert same_bits(context.logits(-1), expected[-1])
        assert same_bits(context.logits(59), expected[-1])
        with pytest.raises(IndexError):
            context.logits(39)


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


# ---- when_shared -----------------------------------------------------------------------------------------------

# Rows of sequences 0, 1, 2; the sequences without a token; those cancelled; and what stops the call.
GONE: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], set[str]]] = [
    ((8, 8, 8), (), (), set()),
    ((8, 8, 8), (), (1,), {"stop"}),
    ((8, 8, 8), (), (0, 2), {"stop"}),
    ((8, 8, 8), (), (0, 1, 2), {"stop", "finish"}),
    ((20, 3, 3), (), (0,), {"stop"}),  # however many rows are gone
    ((20, 3, 3), (), (1, 2), {"stop"}),
    ((8, 8, 8), (2,), (0, 1), {"stop"}),  # without a token, never cancelled
    ((3, 3, 20), (2,), (0, 1), {"stop"}),
    ((8, 8, 8), (0, 1, 2), (), set()),
]


@pytest.mark.parametrize("arch", ["llama", "mamba"])
@pytest.mark.parametrize("when_shared", ["finish", "stop"])
def test_a_shared_call_goes_on_for_those_who_stay_or_stops(
    arch: str, when_shared: str, new_context: NewContext
) -> None:
    context = new_context(arch, n_seq_max=3, n_ubatch=8)
    for sizes, without, gone, stops in GONE:
        context.memory.clear()
        rows = batch(*((tokens(n, seq), 0, seq) for seq, n in enumerate(sizes)), logits="last")
        given = {seq: dead() if seq in gone else lc.CancelToken() for seq in range(3) if seq not in without}
        left = [seq for seq in range(3) if seq not in gone]
        if when_shared in stops:
            error = cancelled(context, rows, given, when_shared=when_shared)
            assert error is not None
            assert error.survivors == left
            assert error.rows_done == 0
            assert all(outcome.state == "rolled_back" for outcome in error.sequences.values())
            assert set(holds(context).values()) == {(-1, -1)}
        else:
            result = context.decode(rows, given, when_shared=when_shared)
            assert result.survivors == left
            assert result.rows_done == sum(sizes[seq] for seq in left)
            assert {seq: last for seq, (_, last) in holds(context).items()} == {
                seq: -1 if seq in gone else sizes[seq] - 1 for seq in range(3)
            }


@pytest.mark.parametrize("when_shared", ["finish", "stop"])
def test_one_token_for_all_sequences_stops_the_whole_call(when_shared: str, new_context: NewContext) -> None:
    context, token = new_context("llama", n_seq_max=2), dead()
    rows = batch((tokens(8), 0, 0), (tokens(8), 0, 1))
    error = cancelled(context, rows, {0: token, 1: token}, when_shared=when_shared)
    assert error is not None
    assert error.survivors == []
    assert error.reason == "long ago"


# ---- on the way ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("on_cancel", ["rollback", "keep"])
@pytest.mark.parametrize("history", [0, 24])
def test_a_sequence_cancelled_on_the_way_is_undone_or_kept_and_the_others_go_on(
    arch: str, on_cancel: str, history: int, pair: Pair, readings: Readings
) -> None:
    context, twin = pair(arch, n_seq_max=2)
    mine, other = (tokens(80, 3), history, 0), (tokens(80, 4), history, 1)
    rows = woven(mine, other)

    def past(each: lc.Context) -> None:
        if history:
            decode(each, batch((tokens(history, 1), 0, 0), (tokens(history, 2), 0, 1)))

    whole = readings(arch, rows, past, {0: lc.CancelToken(), 1: far()}, on_cancel, n_seq_max=2)
    past(context)
    past(twin)
    given = {0: lc.CancelToken(), 1: far()}
    with deadline_at(whole // 2):
        result = context.decode(rows, given, on_cancel=on_cancel)
    assert 10 < result.n_ubatches < 20
    assert result.survivors == [0]
    assert result.sequences[0].state == "completed"
    assert result.sequences[1].state == ("rolled_back" if on_cancel == "rollback" else "kept")
    assert result.sequences[1].cancelled
    assert _agrees(context, result.sequences)
    end = result.sequences[1].end
    assert end == history if on_cancel == "rollback" else history < end < history + 80
    assert result.rows_done == 80 + end - history

    expected = decode(twin, batch(mine))
    assert np.allclose(_logits(context, rows, 0), expected, atol=CLOSE)
    done = _rows_of(rows, 1)[: end - history]
    kept = [context.logits(row) for row in done]
    rest = decode(context, batch((other[0][end - history :], end, 1)))
    assert np.allclose(np.concatenate([*(row[None] for row in kept), rest]), decode(twin, batch(other)), atol=CLOSE)
    if arch == "swa":  # how much that has left the window is still there depends on the calls, which differ
        assert [last for _, last in holds(context).values()] == [last for _, last in holds(twin).values()]
    else:
        assert holds(context) == holds(twin)
    assert close(one_more(context), one_more(twin))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_sequence_redone_after_a_cancel_on_the_way_has_the_bits_of_a_sequence_that_saw_none(
    arch: str, pair: Pair, readings: Readings
) -> None:
    made = {"n_seq_max": 2, "kv_unified": False}
    context, twin = pair(arch, **made)
    rows = batch((tokens(20, 3), 0, 0), (tokens(60, 4), 0, 1))
    whole = readings(arch, rows, token={0: lc.CancelToken(), 1: far()}, **made)
    for share in (0.1, 0.4, 0.6, 0.8):
        context.memory.clear()
        twin.memory.clear()
        given = {0: lc.CancelToken(), 1: far()}
        with deadline_at(int(share * whole)):
            result = context.decode(rows, given)
        assert result.sequences[1].cancelled
        assert _agrees(context, result.sequences)
        assert holds(context)[1] == (-1, -1)
        twin.decode(batch((tokens(20, 3), 0, 0)))
        again = batch((tokens(60, 4), 0, 1))
        assert same_bits(decode(context, again), decode(twin, again))


@pytest.mark.parametrize("arch", GENERATIVE)
@layouts
def test_cancels_by_others_at_random_moments_leave_the_survivors_their_results(
    arch: str, layout: Layout, new_context: NewContext, readings: Readings
) -> None:
    rng = random.Random(arch)
    parts = [(tokens(30, 10 + seq), 20 + seq, seq) for seq in range(3)]
    rows = layout(*parts)
    with_all = new_context(arch, n_ubatch=8, n_seq_max=3)
    _past(with_all)
    expected, after = decode(with_all, rows), one_more(with_all)
    whole = readings(arch, rows, _past, {0: far(), 1: lc.CancelToken()})
    for gone in (0, 1, 2):
        context = new_context(arch, n_ubatch=8, n_seq_max=3)
        _past(context)
        at_first, token = holds(context), far()
        given = {gone: token, (gone + 1) % 3: lc.CancelToken()}
        with in_the_middle(token.cancel, at=rng.randrange(10, whole * 3 // 5)):
            result = context.decode(rows, given)
        outcome = result.sequences[gone]
        for seq in result.survivors:
            assert result.sequences[seq].state == "completed"
            assert close(_logits(context, rows, seq), expected[_rows_of(rows, seq)])
        assert len(result.survivors) == 3 - outcome.cancelled
        if outcome.cancelled:  # its rows may all have been done before
            assert holds(context)[gone][1] == at_first[gone][1]
            context.decode(batch(parts[gone]))  # again, and alone
        assert context.dirty_sequences == []
        assert close(one_more(context), after)
        context.close()


# ---- a ubatch that nobody wants, and one that somebody wants ---------------------------------------------------

FEW = 12  # readings of the clock between a cancel and the call's return, if it stops at the next look


@pytest.mark.parametrize("arch", GENERATIVE)
def test_with_keep_a_ubatch_that_nobody_wants_is_stopped_at_once_and_the_call_goes_on_for_the_others(
    arch: str, pair: Pair
) -> None:
    context, twin = pair(arch, n_seq_max=2)
    mine, other = (tokens(1, 3), 0, 0), (tokens(40, 4), 0, 1)
    rows = batch(mine, other)  # behind the first ubatch all rows are the other's
    with Clock() as clock:
        expected = decode(twin, rows, {0: lc.CancelToken(), 1: lc.CancelToken()}, on_cancel="keep")
    after = one_more(twin)
    ends = set()
    for at in range(clock.readings // 3, clock.readings * 4 // 5, clock.readings // 9):
        context.memory.clear()
        token = lc.CancelToken()
        with in_the_middle(token.cancel, at=at) as clock:
            result = context.decode(rows, {0: lc.CancelToken(), 1: token}, on_cancel="keep")
        assert clock.readings - at < FEW
        assert result.survivors == [0]
        assert result.sequences[0] == lc.SequenceOutcome("completed", 0, 1, False)
        assert result.sequences[1].state == "kept"
        assert _agrees(context, result.sequences)
        end = result.sequences[1].end
        assert result.rows_done == 1 + end < 41
        assert same_bits(_logits(context, rows, 0), expected[:1])
        ends.add(end)
        rest = decode(context, batch((other[0][end:], end, 1)), on_cancel="keep")
        assert same_bits(rest, expected[1 + end :])
        assert same_bits(one_more(context), after)
    assert len(ends) > 2


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_call_that_stops_after_a_ubatch_loses_nothing_that_somebody_wants(arch: str, pair: Pair) -> None:
    context, twin = pair(arch, n_seq_max=2)
    rows = woven((tokens(40, 3), 0, 0), (tokens(40, 4), 0, 1))
    stops: dict[str, Any] = {"on_cancel": "keep", "when_shared": "stop"}
    with Clock() as clock:
        expected = decode(twin, rows, {0: lc.CancelToken(), 1: lc.CancelToken()}, **stops)
    after = one_more(twin)

    def stopped(at: int, *gone: int) -> tuple[lc.DecodeCancelled, int]:
        context.memory.clear()
        given = {seq: lc.CancelToken() for seq in range(2)}
        with in_the_middle(lambda: [given[seq].cancel() for seq in gone], at=at) as clock:
            error = cancelled(context, rows, given, **stops)
        assert error is not None
        assert error.survivors == [seq for seq in range(2) if seq not in gone]
        assert _agrees(context, error.sequences)
        return error, clock.readings - at

    for at in range(clock.readings // 9, clock.readings * 4 // 5, clock.readings // 7):
        all_gone, looks = stopped(at, 0, 1)
        assert looks < FEW
        later, _ = stopped(at, 1)
        assert later.rows_done == all_gone.rows_done + 8
        ends = {seq: outcome.end for seq, outcome in later.sequences.items()}
        kept = [row for row in range(80) if rows.positions[row] < ends[rows.seq_ids(row)[0]]]
        assert len(kept) == later.rows_done
        assert same_bits(np.stack([context.logits(row) for row in kept]), expected[kept])
        rest = woven(*((tokens(40, 3 + seq)[end:], end, seq) for seq, end in ends.items()))
        assert same_bits(decode(context, rest), np.delete(expected, kept, axis=0))
        assert same_bits(one_more(context), after)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_call_that_keeps_nothing_waits_for_no_ubatch(arch: str, pair: Pair) -> None:
    context, twin = pair(arch)
    rows = woven((tokens(20, 3), 20, 0), (tokens(20, 4), 21, 1))
    _past(context)
    _past(twin)
    token = lc.CancelToken()
    with in_the_middle(token.cancel) as clock:
        error = cancelled(context, rows, {0: lc.CancelToken(), 1: token}, when_shared="stop")
    assert error is not None
    assert clock.readings - 40 < FEW
    assert (error.survivors, error.rows_done) == ([0], 0)
    assert holds(context) == holds(twin)
    assert same_bits(decode(context, rows), decode(twin, rows))


@pytest.mark.parametrize("arch", SHARING)
def test_a_call_that_finds_no_room_behind_a_ubatch_that_was_stopped_is_rolled_back_to_the_bit(
    arch: str, pair: Pair
) -> None:
    context, twin = pair(arch, n_ctx=256)
    for each in (context, twin):
        _past(each)
        each.decode(batch((tokens(120, 9), 22, 2), logits="last"))
    rows = batch((tokens(8, 3), 21, 1), (tokens(120, 4), 20, 0), logits="last")
    token = lc.CancelToken()
    with in_the_middle(token.cancel), pytest.raises(lc.MemoryFullError):
        context.decode(rows, {0: lc.CancelToken(), 1: token}, on_cancel="keep")
    assert token.cancelled
    assert holds(context) == holds(twin)
    assert same_bits(one_more(context), one_more(twin))
    again = batch((tokens(8, 3), 22, 1), (tokens(9, 4), 21, 0))
    assert same_bits(decode(context, again), decode(twin, again))


def test_texts_that_are_computed_in_one_piece_stop_with_the_last_of_them(new_context: NewContext) -> None:
    params: dict[str, Any] = {"n_ubatch": None, "n_seq_max": 2, "embeddings": True, "pooling": "mean"}
    context, alone = (new_context("embedding", **params) for _ in range(2))
    rows = batch((tokens(30, 1), 0, 0), (tokens(30, 2), 0, 1))
    given = [lc.CancelToken() for _ in range(2)]
    with in_the_middle(lambda: [token.cancel() for token in given], at=10) as clock:
        error = cancelled(context, rows, dict(enumerate(given)), on_cancel="keep")
    assert error is not None
    assert (clock.readings - 10 < FEW, error.rows_done) == (True, 0)
    context.decode(rows, dict(enumerate(lc.CancelToken() for _ in range(2))), on_cancel="keep")
    alone.decode(rows)
    for seq in range(2):
        assert same_bits(context.pooled_embeddings(seq), alone.pooled_embeddings(seq))


# ---- stopped and run again -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GENERATIVE)
@layouts
def test_a_stopped_call_tells_the_survivors_who_alone_get_their_bits_when_it_is_run_again(
    arch: str, layout: Layout, pair: Pair, readings: Readings
) -> None:
    context, twin = pair(arch)
    parts = [(tokens(20, 10), 20, 0), (tokens(60, 11), 21, 1), (tokens(16, 12), 22, 2)]
    rows = layout(*parts)
    given = {0: lc.CancelToken(), 1: far(), 2: lc.CancelToken()}
    whole = readings(arch, rows, _past, given)
    _past(context)
    _past(twin)
    with deadline_at(whole // 2):
        error = cancelled(context, rows, given, when_shared="stop")
    assert isinstance(error, lc.DeadlineExceeded)
    assert error.survivors == [0, 2]
    assert [outcome.cancelled for outcome in error.sequences.values()] == [False, True, False]
    assert _agrees(context, error.sequences)
    assert holds(context) == holds(twin)
    again = layout(*(parts[seq] for seq in error.survivors))
    assert same_bits(decode(context, again), decode(twin, again))
    assert same_bits(one_more(context), one_more(twin))


# ---- shared rows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", SHARING)
@pytest.mark.parametrize("gone", [0, 1])
def test_rows_that_two_sequences_share_survive_with_one_of_them(
    arch: str, gone: int, pair: Pair, readings: Readings
) -> None:
    left = 1 - gone
    for n, on_the_way in ((24, False), (60, True)):
        context, alone = pair(arch, n_seq_max=2)
        rows = batch((tokens(n, 1), 0, (0, 1)), (tokens(9, 2), n, 0), (tokens(9, 3), n, 1))
        given = {gone: far() if on_the_way else dead(), left: lc.CancelToken()}
        # The deadline passes among the shared rows, which are not cancelled, so the cancel is seen behind them.
        whole = readings(arch, rows, token={gone: far(), left: lc.CancelToken()}, n_seq_max=2)
        with deadline_at(whole // 2 if on_the_way else 0):
            result = context.decode(rows, given)
        assert result.survivors == [left]
        assert result.rows_done == n + 9
        assert _agrees(context, result.sequences)
        expected = decode(alone, batch((tokens(n, 1), 0, left), (tokens(9, 2 + left), n, left)))
        assert np.allclose(_logits(context, rows, left), expected, atol=CLOSE)
        assert holds(context) == holds(alone)
        assert close(one_more(context), one_more(alone))
        again = batch((tokens(30, 5), 0, gone))
        assert np.allclose(decode(context, again), decode(alone, again), atol=CLOSE)


@pytest.mark.parametrize("arch", SHARING)
def test_shared_rows_count_as_cancelled_only_when_all_their_sequences_are(arch: str, new_context: NewContext) -> None:
    context = new_context(arch, n_seq_max=3)
    rows = batch((tokens(24, 1), 0, (0, 1)), (tokens(4, 2), 0, 2))
    rows_of_0_and_1 = batch((tokens(24, 1), 0, (0, 1)))
    result = context.decode(rows_of_0_and_1, {0: dead(), 1: lc.CancelToken()}, when_shared="stop")
    assert result.survivors == [1]
    assert {seq: last for seq, (_, last) in holds(context).items()} == {0: -1, 1: 23, 2: -1}
    context.memory.clear()
    error = cancelled(context, rows, {0: dead(), 1: dead(), 2: lc.CancelToken()}, when_shared="stop")
    assert error is not None
    assert error.survivors == [2]
    result = context.decode(rows_of_0_and_1, {0: dead()}, when_shared="stop")  # 1 has no token
    assert result.survivors == [1]
    assert outputs(context, rows_of_0_and_1).shape[0] == 24
