"""Law 7, neighbours: in a batch that several requests share, cancelling some leaves the others their results."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE

from .every_poll import SHARED
from .words import (
    batch,
    cancelled,
    cancels_after,
    close,
    dead,
    decode,
    holds,
    one_more,
    same_bits,
    swept,
    tokens,
    woven,
)

NewContext = Callable[..., lc.Context]
EVERY_SHARED = [(arch, name) for arch in GENERATIVE for name, shared in SHARED.items() if arch in shared[-1]]


@pytest.mark.parametrize(("arch", "name"), EVERY_SHARED)
@pytest.mark.parametrize("on_cancel", ["rollback", "keep"])
def test_a_neighbour_goes_on_at_whatever_poll_the_other_is_cancelled(arch: str, name: str, on_cancel: str) -> None:
    told = swept(arch, f"neighbour-{on_cancel}", name)
    assert told["problems"] == []
    assert told["cancels"] > 3
    assert on_cancel == "keep" or told["rows_done"] == [0]


def _three(context: lc.Context) -> None:
    decode(context, batch(*((tokens(20 + seq, seq), 0, seq) for seq in range(3))))


def _rows(n: int = 24) -> lc.Batch:
    return batch(*((tokens(n, 10 + seq), 20 + seq, seq) for seq in range(3)))


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_sequence_cancelled_before_the_start_is_as_if_it_had_not_been_in_the_batch(
    arch: str, gone: int, new_context: NewContext
) -> None:
    context, twin = (new_context(arch, n_ubatch=8, n_seq_max=3) for _ in range(2))
    _three(context)
    _three(twin)
    result = context.decode(_rows(), {gone: dead(), (gone + 1) % 3: lc.CancelToken()})
    alone = batch(*((tokens(24, 10 + seq), 20 + seq, seq) for seq in range(3) if seq != gone))
    expected = decode(twin, alone)
    kept = [row for row in range(72) if row // 24 != gone]
    assert same_bits(np.stack([context.logits(row) for row in kept]), expected)
    with pytest.raises(IndexError):
        context.logits(gone * 24)
    assert holds(context) == holds(twin)
    assert same_bits(one_more(context), one_more(twin))
    assert result.survivors == [seq for seq in range(3) if seq != gone]
    assert result.sequences[gone] == lc.SequenceOutcome("rolled_back", 20 + gone, 20 + gone, True)
    assert result.rows_done == 48


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize(
    ("abort_when", "cancels", "stops"),
    [
        ("all", (0,), False),
        ("all", (0, 1), False),
        ("all", (0, 1, 2), True),
        ("majority", (0,), False),
        ("majority", (0, 1), True),
        ("majority", (1, 2), True),
        ("any", (), False),
        ("any", (2,), True),
    ],
)
def test_abort_when_decides_whether_the_whole_call_stops(
    arch: str, abort_when: str, cancels: tuple[int, ...], stops: bool, new_context: NewContext
) -> None:
    context, twin = (new_context(arch, n_ubatch=8, n_seq_max=3) for _ in range(2))
    _three(context)
    _three(twin)
    tokens_of = {seq: dead() if seq in cancels else lc.CancelToken() for seq in range(3)}
    if not stops:
        result = context.decode(_rows(), tokens_of, abort_when=abort_when)
        assert result.survivors == [seq for seq in range(3) if seq not in cancels]
        return
    error = cancelled(context, _rows(), tokens_of, abort_when=abort_when)
    assert error is not None
    assert error.survivors == [seq for seq in range(3) if seq not in cancels]
    assert holds(context) == holds(twin)
    assert same_bits(decode(context, _rows()), decode(twin, _rows()))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_majority_is_one_of_rows_not_of_sequences(arch: str, new_context: NewContext) -> None:
    rows = batch((tokens(50), 0, 0), (tokens(20, 1), 0, 1), (tokens(20, 2), 0, 2))
    context = new_context(arch, n_ubatch=8, n_seq_max=3)
    result = context.decode(rows, {1: dead(), 2: dead()}, abort_when="majority")
    assert result.survivors == [0]
    context = new_context(arch, n_ubatch=8, n_seq_max=3)
    error = cancelled(context, rows, {0: dead()}, abort_when="majority")
    assert error is not None
    assert error.survivors == [1, 2]
    half = batch((tokens(20), 0, 0), (tokens(20, 1), 0, 1))
    context = new_context(arch, n_ubatch=8, n_seq_max=3)
    assert context.decode(half, {1: dead()}, abort_when="majority").survivors == [0], "half is no majority"


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_row_without_a_token_is_never_cancelled(arch: str, new_context: NewContext) -> None:
    context = new_context(arch, n_ubatch=8, n_seq_max=3)
    result = context.decode(batch((tokens(20), 0, 0), (tokens(9), 0, 1)), {0: dead()}, abort_when="all")
    assert result.survivors == [1]
    assert holds(context)[0] == (-1, -1)
    assert holds(context)[1][1] == 8


@pytest.mark.parametrize("arch", ["llama", "swa", "moe", "hybrid"])
def test_a_row_of_several_sequences_goes_on_while_one_of_them_lives(arch: str, new_context: NewContext) -> None:
    context, twin = (new_context(arch, n_ubatch=8, n_seq_max=3) for _ in range(2))
    shared, own = tokens(20, 1), tokens(12, 2)
    rows = batch((shared, 0, [0, 1]), (own, 20, 0), (own, 20, 1))
    result = context.decode(rows, {0: dead(), 1: lc.CancelToken()})
    assert result.survivors == [1]
    assert holds(context)[0] == (-1, -1)
    expected = decode(twin, batch((shared, 0, 1), (own, 20, 1)))
    got = np.stack([context.logits(row) for row in (*range(20), *range(32, 44))])
    assert close(got, expected)
    assert close(one_more(context), one_more(twin))
    context.memory.clear()
    error = cancelled(context, rows, {0: dead(), 1: dead()})
    assert error is not None


@pytest.mark.parametrize("arch", GENERATIVE)
def test_survivors_of_a_stopped_call_are_computed_alone_as_if_nothing_had_been(
    arch: str, new_context: NewContext
) -> None:
    context, twin = (new_context(arch, n_ubatch=8, n_seq_max=3) for _ in range(2))
    _three(context)
    _three(twin)
    rows = batch(*((tokens(200, 10 + seq), 20 + seq, seq) for seq in range(3)))
    error = cancelled(context, rows, {0: lc.CancelToken(timeout=0.004), 1: lc.CancelToken()}, abort_when="any")
    assert error is not None
    assert error.survivors == [1, 2]
    again = batch(*((tokens(200, 10 + seq), 20 + seq, seq) for seq in error.survivors))
    assert same_bits(decode(context, again), decode(twin, again))
    assert same_bits(one_more(context), one_more(twin))


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("order", [batch, woven], ids=["one after the other", "woven"])
def test_cancels_at_random_moments_leave_the_others_their_results(
    arch: str, order: Any, new_context: NewContext
) -> None:
    rng = random.Random(arch)
    parts = [(tokens(60, 10 + seq), 20 + seq, seq) for seq in range(3)]
    with_all = new_context(arch, n_ubatch=8, n_seq_max=3)
    _three(with_all)
    expected = decode(with_all, order(*parts))
    rows = order(*parts)
    rows_of = {seq: [row for row in range(len(rows)) if rows.seq_ids(row) == [seq]] for seq in range(3)}
    after = one_more(with_all)
    hits = 0
    for turn in range(6):
        context = new_context(arch, n_ubatch=8, n_seq_max=3)
        _three(context)
        at_first = holds(context)
        gone = turn % 3
        with cancels_after(rng.uniform(0, 0.012)) as token:
            result = context.decode(rows, {gone: token, (gone + 1) % 3: lc.CancelToken()})
        outcome = result.sequences[gone]
        hits += outcome.cancelled
        for seq in result.survivors:
            assert result.sequences[seq].state == "completed"
            got = np.stack([context.logits(row) for row in rows_of[seq]])
            assert close(got, expected[rows_of[seq]])
        if outcome.cancelled:
            assert holds(context)[gone][1] == at_first[gone][1]
            context.decode(batch(parts[gone]))  # again, and alone
        assert context.dirty_sequences == []
        assert close(one_more(context), after)
        context.close()
    assert hits > 0


@pytest.mark.parametrize("arch", GENERATIVE)
def test_kept_sequences_can_be_resumed_beside_others(arch: str, new_context: NewContext) -> None:
    context, twin = (new_context(arch, n_ubatch=8, n_seq_max=3) for _ in range(2))
    _three(context)
    _three(twin)
    rows = batch(*((tokens(300, 10 + seq), 20 + seq, seq) for seq in range(3)))
    token = lc.CancelToken(timeout=0.01)
    result = context.decode(rows, {1: token}, on_cancel="keep")
    end = result.sequences[1].end
    assert result.sequences[1].state == "kept"
    assert holds(context)[1][1] == end - 1
    if end < 321:
        context.decode(batch((tokens(300, 11)[end - 21 :], end, 1)))
    twin.decode(rows)
    assert close(one_more(context), one_more(twin))
