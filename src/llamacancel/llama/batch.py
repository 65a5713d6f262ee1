"""A batch of tokens or embeddings, filled from Python or NumPy and handed to `Context.decode`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InvalidBatchError
from .params import integer

__all__ = ["Batch"]

_INT32 = np.iinfo(np.int32)

Wanted = Literal["last", "all", "none"]


class Batch:
    """Rows for one `decode` or `encode`: a token (or embedding), its position and its sequences.

    The arrays are allocated once; `clear()` makes a batch ready to be filled again.

    Args:
        capacity: Most rows that the batch can hold.
        n_seq_max: Most sequences that one row can belong to.
        n_embd: Width of a row when the batch carries embeddings instead of tokens; 0 for tokens.

    Raises:
        ValueError: If a size is not positive.
    """

    def __init__(self, capacity: int, n_seq_max: int = 1, *, n_embd: int = 0) -> None:
        self._capacity = capacity = integer("capacity", capacity, 1, _INT32.max)
        self._n_seq_max = n_seq_max = integer("n_seq_max", n_seq_max, 1, _INT32.max)
        n_embd = integer("n_embd", n_embd, 0, _INT32.max)
        if capacity * n_seq_max > _INT32.max:
            raise ValueError(f"capacity times n_seq_max must be at most {_INT32.max}, not {capacity} times {n_seq_max}")
        self._n = 0
        self._token: NDArray[np.int32] | None = None if n_embd else np.zeros(capacity, np.int32)
        self._embd: NDArray[np.float32] | None = np.zeros((capacity, n_embd), np.float32) if n_embd else None
        self._pos = np.zeros(capacity, np.int32)
        self._seq_offset = np.zeros(capacity + 1, np.int32)
        self._seq_id = np.zeros(capacity * n_seq_max, np.int32)
        self._output = np.zeros(capacity, np.int8)
        self._view: Any = None  # the arrays as the native core reads them, made by the first call

    def add(self, token: int | ArrayLike, pos: int, seq_ids: int | Iterable[int], logits: bool | Wanted = False) -> int:
        """Add one row.

        Args:
            token: A token id, or a row of `n_embd` floats in a batch of embeddings.
            pos: Position in its sequences.
            seq_ids: The sequence, or the sequences that share the row.
            logits: Whether the row's output is wanted; in `add_sequence`'s words, "last" and "all" say yes, "none" no.

        Returns:
            The row's index.

        Raises:
            InvalidBatchError: If the batch is full or being decoded, or a value is none that a row can have.
        """
        self._check_unread()
        wanted = _wanted(logits)
        ids = self._sequence_ids(seq_ids)
        row = self._n
        first = int(self._seq_offset[row])
        self._room(1)
        try:
            if self._token is not None:
                self._token[row] = _token_id(token)
            else:
                assert self._embd is not None
                self._embd[row] = _float_rows(token, self._embd.shape[1:])
            self._pos[row] = _position(pos)
            self._seq_id[first : first + len(ids)] = ids
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidBatchError(f"row {row}: {error}") from error
        self._seq_offset[row + 1] = first + len(ids)
        self._output[row] = wanted != "none"
        self._n += 1
        return row

    def add_sequence(
        self,
        tokens: ArrayLike,
        pos: int = 0,
        seq_id: int | Iterable[int] = 0,
        logits: bool | Wanted = "last",
    ) -> range:
        """Add consecutive rows of one sequence (or of sequences that share them) in one call.

        Args:
            tokens: Token ids of shape (n,), or floats of shape (n, n_embd) in a batch of embeddings.
            pos: Position of the first row.
            seq_id: The sequence, or the sequences that share the rows.
            logits: Whose outputs are wanted: that of the "last" row, those of "all" (or True), or "none" (or False).

        Returns:
            The rows' indices.

        Raises:
            InvalidBatchError: If the rows do not fit, the batch is being decoded, or a value is none that a row can
                have.
        """
        self._check_unread()
        wanted = _wanted(logits)
        ids = self._sequence_ids(seq_id)
        values: NDArray[Any]
        if self._embd is None:
            values = _token_ids(tokens)
        else:
            values = _float_rows(tokens, (None, self._embd.shape[1]))
        n = len(values)
        self._room(n)
        if not 0 <= _position(pos) <= _INT32.max - n:
            raise InvalidBatchError(f"pos must be a position of 0 or more, not {pos!r}")
        rows = slice(self._n, self._n + n)
        first = int(self._seq_offset[self._n])
        self._seq_id[first : first + n * len(ids)] = np.tile(np.asarray(ids, np.int32), n)
        if self._token is not None:
            self._token[rows] = values
        else:
            assert self._embd is not None
            self._embd[rows] = values
        self._pos[rows] = np.arange(pos, pos + n, dtype=np.int32)
        self._seq_offset[self._n + 1 : self._n + n + 1] = first + len(ids) * np.arange(1, n + 1, dtype=np.int32)
        self._output[rows] = wanted == "all"
        if n and wanted == "last":
            self._output[self._n + n - 1] = 1
        self._n += n
        return range(rows.start, rows.stop)

    def clear(self) -> None:
        """Forget all rows; the capacity stays.

        Raises:
            InvalidBatchError: If a call is reading them.
        """
        self._check_unread()
        self._n = 0

    def __len__(self) -> int:
        return self._n

    @property
    def capacity(self) -> int:
        """Most rows that the batch can hold."""
        return self._capacity

    @property
    def tokens(self) -> NDArray[np.int32] | None:
        """The rows' token ids, shape (n,); None in a batch of embeddings."""
        return None if self._token is None else self._token[: self._n].copy()

    @property
    def positions(self) -> NDArray[np.int32]:
        """The rows' positions, shape (n,)."""
        return self._pos[: self._n].copy()

    @property
    def logits(self) -> NDArray[np.bool_]:
        """Which rows' outputs are wanted, shape (n,)."""
        return self._output[: self._n].astype(np.bool_)

    def seq_ids(self, row: int) -> list[int]:
        """The sequences that row `row` belongs to."""
        if not 0 <= row < self._n:
            raise IndexError(f"row {row} of a batch of {self._n}")
        return [int(seq) for seq in self._seq_id[self._seq_offset[row] : self._seq_offset[row + 1]]]

    def __repr__(self) -> str:
        kind = "tokens" if self._embd is None else "embeddings"
        return f"<Batch of {self._n} {kind}, capacity {self._capacity}>"

    def _sequence_ids(self, seq_ids: Any) -> list[int]:
        ids = list(seq_ids) if isinstance(seq_ids, Iterable) and not isinstance(seq_ids, (str, bytes)) else [seq_ids]
        if not 1 <= len(ids) <= self._n_seq_max:
            raise InvalidBatchError(f"a row belongs to 1 to {self._n_seq_max} sequences, not {len(ids)} (n_seq_max)")
        for seq_id in ids:
            if not _is_integer(seq_id) or not _INT32.min <= seq_id <= _INT32.max:
                raise InvalidBatchError(f"row {self._n}: seq_id: a sequence is an integer of 32 bits, not {seq_id!r}")
        return ids

    def _check_unread(self) -> None:
        # What was checked must not change under llama.cpp, which would end the process on some of it.
        if self._view is not None and self._view.readers:
            raise InvalidBatchError("the batch is being decoded: fill another one, or wait for the call")

    def _room(self, n: int) -> None:
        if self._n + n > self._capacity:
            raise InvalidBatchError(f"{n} more rows do not fit: the batch holds {self._n} of {self._capacity}")


def _wanted(logits: Any) -> str:
    """Whose outputs are wanted, in words."""
    if isinstance(logits, str) and logits in ("last", "all", "none"):
        return logits
    if isinstance(logits, (bool, np.bool_, int)):
        return "all" if logits else "none"
    raise InvalidBatchError(f'logits must be True, False, "last", "all" or "none", not {logits!r}')


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _position(pos: Any) -> int:
    if not _is_integer(pos):
        raise InvalidBatchError(f"pos must be an integer, not {pos!r}")
    if not _INT32.min <= pos <= _INT32.max:
        raise InvalidBatchError(f"pos must be an integer of 32 bits, not {pos!r}")
    return int(pos)


def _token_id(token: Any) -> int:
    if not _is_integer(token):
        raise TypeError(f"a token is an integer, not {token!r}")
    if not _INT32.min <= token <= _INT32.max:
        raise ValueError(f"token {token!r} is no 32-bit integer")
    return int(token)


def _token_ids(tokens: ArrayLike) -> NDArray[np.int32]:
    try:
        values = np.asarray(tokens)
    except ValueError as error:
        raise InvalidBatchError(f"tokens are integers of shape (n,): {error}") from error
    if values.size == 0:
        values = values.astype(np.int32)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise InvalidBatchError(f"tokens are integers of shape (n,), not {values.dtype} of shape {values.shape}")
    outside = values[(values < _INT32.min) | (values > _INT32.max)]
    if outside.size:
        raise InvalidBatchError(f"token {outside[0]} is no 32-bit integer")
    return values.astype(np.int32, copy=False)


def _float_rows(rows: Any, shape: tuple[int | None, ...]) -> NDArray[np.float32]:
    try:
        with np.errstate(over="ignore"):  # told below
            values = np.asarray(rows, np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidBatchError(f"embeddings are floats: {error}") from error
    if values.ndim != len(shape) or any(want not in (None, n) for want, n in zip(shape, values.shape, strict=True)):
        wanted = ", ".join("n" if size is None else str(size) for size in shape)
        raise InvalidBatchError(f"embeddings have shape ({wanted}), not {values.shape}")
    if not np.isfinite(values).all():
        raise InvalidBatchError("embeddings must be finite")
    return values
