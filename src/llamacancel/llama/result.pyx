# distutils: language = c++
"""What a decode tells of the sequences in its batch."""

import numpy as np

cimport cython
from libc.stddef cimport size_t
from libc.stdint cimport int32_t
from libcpp.vector cimport vector

from .._native.guard.context cimport DecodeReport, SequenceResult

from ..errors import SequenceOutcome

cdef tuple _FATES = ("completed", "rolled_back", "kept", "dirty")  # in the order of the native Fate


@cython.final
cdef class DecodeResult:
    """A decode that ran to its end, for every sequence or for those that were not cancelled.

    Attributes:
        rows_done: Rows of the batch that the context now holds.
        n_ubatches: Pieces in which they were computed.
        seconds: Time that the native call took.
        repair_seconds: Part of it spent on rolling back cancelled sequences.
        snapshot_bytes: What was saved so that the call could have been rolled back.
        sequences: For each sequence id of the batch, what the context now holds of it.
        survivors: Sequence ids that were not cancelled.
    """

    def __init__(self):
        raise TypeError("a DecodeResult is what Context.decode() returns")

    @property
    def sequences(self):
        if self.outcomes is None:
            self.outcomes = outcomes_of(self.told)
        return self.outcomes

    @property
    def survivors(self):
        return survivors_of(self.sequences)

    def __reduce__(self):
        return _restored, (self.rows_done, self.n_ubatches, self.seconds, self.repair_seconds, self.snapshot_bytes,
                           self.sequences)

    def __repr__(self):
        return (f"DecodeResult(rows_done={self.rows_done}, n_ubatches={self.n_ubatches}, seconds={self.seconds}, "
                f"repair_seconds={self.repair_seconds}, snapshot_bytes={self.snapshot_bytes}, "
                f"sequences={self.sequences}, survivors={self.survivors})")


cdef DecodeResult _made(int32_t rows_done, int32_t n_ubatches, double seconds, double repair_seconds,
                        size_t snapshot_bytes):
    cdef DecodeResult result = DecodeResult.__new__(DecodeResult)
    result.rows_done = rows_done
    result.n_ubatches = n_ubatches
    result.seconds = seconds
    result.repair_seconds = repair_seconds
    result.snapshot_bytes = snapshot_bytes
    return result


cdef DecodeResult result_of(DecodeReport & report):
    cdef DecodeResult result = _made(report.rows_done, report.n_ubatches, report.seconds, report.repair_seconds,
                                     report.snapshot_bytes)
    result.told.swap(report.sequences)
    return result


def _restored(rows_done, n_ubatches, seconds, repair_seconds, snapshot_bytes, sequences):
    """A result that was pickled."""
    cdef DecodeResult result = _made(rows_done, n_ubatches, seconds, repair_seconds, snapshot_bytes)
    result.outcomes = sequences
    return result


cdef dict outcomes_of(vector[SequenceResult] & told):
    return {
        item.seq: SequenceOutcome(_FATES[<int> item.fate], item.start, item.end, item.cancelled) for item in told
    }


cdef list survivors_of(dict outcomes):
    return [seq for seq, outcome in outcomes.items() if not outcome.cancelled]


cdef dict untouched(batch, token):
    """What a call that never had its turn leaves of its batch's sequences: all, as it was."""
    seqs, first = np.unique(batch._seq_id[: batch._seq_offset[len(batch)]], return_index=True)
    rows = np.searchsorted(batch._seq_offset[: len(batch) + 1], first, side="right") - 1
    outcomes = {}
    for seq, start in zip(seqs.tolist(), batch._pos[rows].tolist()):
        own = token.get(seq) if isinstance(token, dict) else token
        outcomes[seq] = SequenceOutcome("rolled_back", start, start, own is not None and own.cancelled)
    return outcomes
