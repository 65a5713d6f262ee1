"""What a Batch holds after it was filled; what it refuses is in test_bad_input.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import llamacancel as lc


def test_rows_are_kept_in_the_order_in_which_they_were_added() -> None:
    batch = lc.Batch(4, n_seq_max=3)
    assert batch.add(7, 0, 0) == 0
    assert batch.add(8, 5, [0, 2, 1], logits=True) == 1
    assert batch.add(np.int64(9), np.int32(6), np.int16(2)) == 2
    assert len(batch) == 3
    assert batch.tokens is not None
    assert batch.tokens.tolist() == [7, 8, 9]
    assert batch.positions.tolist() == [0, 5, 6]
    assert [batch.seq_ids(i) for i in range(3)] == [[0], [0, 2, 1], [2]]
    assert batch.logits.tolist() == [False, True, False]


def test_a_sequence_is_added_in_one_call() -> None:
    batch = lc.Batch(8, n_seq_max=2)
    batch.add(1, 3, 1)
    assert batch.add_sequence(np.array([4, 5, 6]), pos=10, seq_id=[0, 1]) == range(1, 4)
    assert batch.add_sequence([7]) == range(4, 5)
    assert batch.tokens is not None
    assert batch.tokens.tolist() == [1, 4, 5, 6, 7]
    assert batch.positions.tolist() == [3, 10, 11, 12, 0]
    assert [batch.seq_ids(i) for i in range(5)] == [[1], [0, 1], [0, 1], [0, 1], [0]]
    assert batch.logits.tolist() == [False, False, False, True, True]


@pytest.mark.parametrize(
    ("logits", "wanted", "of_one"),
    [
        ("last", [0, 0, 1], 1),
        ("all", [1, 1, 1], 1),
        (True, [1, 1, 1], 1),
        (np.True_, [1, 1, 1], 1),
        ("none", [0, 0, 0], 0),
        (False, [0, 0, 0], 0),
    ],
)
def test_logits_of_rows_are_asked_for_alike_one_by_one_and_together(
    logits: Any, wanted: list[int], of_one: int
) -> None:
    batch = lc.Batch(4)
    batch.add_sequence([1, 2, 3], logits=logits)
    batch.add(4, 3, 0, logits=logits)
    assert batch.logits.tolist() == [bool(w) for w in [*wanted, of_one]]


@pytest.mark.parametrize("logits", ["some", "", None, 0.5, [True]])
def test_what_says_nothing_of_logits_is_refused(logits: Any) -> None:
    batch = lc.Batch(2)
    with pytest.raises(lc.InvalidBatchError, match="logits must be True, False"):
        batch.add(1, 0, 0, logits=logits)
    with pytest.raises(lc.InvalidBatchError, match="logits must be True, False"):
        batch.add_sequence([1], logits=logits)
    assert len(batch) == 0


@pytest.mark.parametrize(
    "tokens", [[1, 2], (1, 2), np.array([1, 2], np.int8), np.array([1, 2], np.uint64), np.array([0, 1, 9, 2])[1::2]]
)
def test_tokens_come_as_any_row_of_integers(tokens: object) -> None:
    batch = lc.Batch(2)
    batch.add_sequence(tokens)  # type: ignore[arg-type]
    assert batch.tokens is not None
    assert batch.tokens.tolist() == [1, 2]
    assert batch.tokens.dtype == np.int32


def test_no_tokens_add_no_rows() -> None:
    batch = lc.Batch(2)
    assert batch.add_sequence([]) == range(0, 0)
    assert len(batch) == 0
    assert batch.logits.size == 0


def test_a_cleared_batch_can_be_filled_again() -> None:
    batch = lc.Batch(2, n_seq_max=2)
    batch.add(1, 0, [0, 1], logits=True)
    batch.add(2, 1, 1, logits=True)
    batch.clear()
    assert len(batch) == 0
    assert batch.capacity == 2
    batch.add_sequence([5, 6], seq_id=1, logits="none")
    assert [batch.seq_ids(0), batch.seq_ids(1)] == [[1], [1]]
    assert not batch.logits.any()


def test_rows_of_embeddings_are_kept() -> None:
    batch = lc.Batch(3, n_embd=2)
    batch.add([0.5, 1.5], 0, 0)
    assert batch.add_sequence(np.ones((2, 2), np.float64), pos=1) == range(1, 3)
    assert batch.tokens is None
    assert batch.positions.tolist() == [0, 1, 2]
    assert repr(batch) == "<Batch of 3 embeddings, capacity 3>"


def test_what_a_batch_gives_away_are_copies() -> None:
    batch = lc.Batch(2)
    batch.add(3, 0, 0)
    for array in (batch.tokens, batch.positions, batch.logits):
        assert array is not None
        array[:] = 1
    batch.seq_ids(0).append(9)
    assert batch.tokens is not None
    assert (batch.tokens[0], batch.positions[0], batch.logits[0], batch.seq_ids(0)) == (3, 0, False, [0])


def test_the_batch_says_how_full_it_is() -> None:
    batch = lc.Batch(5)
    batch.add(1, 0, 0)
    assert repr(batch) == "<Batch of 1 tokens, capacity 5>"


def test_integers_are_never_cut_to_32_bits() -> None:
    batch = lc.Batch(2)
    for token, pos in ((2**40 + 7, 0), (7, 2**40), (-(2**31) - 1, 0)):
        with pytest.raises(lc.InvalidBatchError, match="32"):
            batch.add(token, pos, 0)
    assert len(batch) == 0


def test_a_batch_whose_offsets_would_not_fit_is_refused_before_it_is_made() -> None:
    with pytest.raises(ValueError, match="65536 times 65536"):
        lc.Batch(65536, 65536)
