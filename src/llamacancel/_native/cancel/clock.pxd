# Declarations of clock.hpp.

from libc.stdint cimport int64_t


cdef extern from "cancel/clock.hpp" namespace "llamacancel" nogil:
    const int64_t kNever  # "no deadline"

    int64_t now_ns() noexcept
