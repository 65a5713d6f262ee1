cimport cython
from libc.stddef cimport size_t
from libc.stdint cimport int32_t
from libcpp.vector cimport vector

from .._native.guard.context cimport DecodeReport, SequenceResult


@cython.final
cdef class DecodeResult:
    cdef readonly int32_t rows_done, n_ubatches
    cdef readonly double seconds, repair_seconds
    cdef readonly size_t snapshot_bytes
    cdef vector[SequenceResult] told
    cdef dict outcomes  # made of `told` when somebody asks: a loop for single tokens never does

cdef DecodeResult result_of(DecodeReport & report)
cdef dict outcomes_of(vector[SequenceResult] & told)
cdef list survivors_of(dict outcomes)
# What a call that never had its turn leaves of its batch's sequences: all, as it was.
cdef dict untouched(batch, token)
