# Declarations of status.hpp.

from libc.stdint cimport uint8_t


cdef extern from "process/status.hpp" namespace "llamacancel" nogil:
    enum class Status (uint8_t):
        Done
        Cancelled
        Invalid
        Full
        Failed
        Busy
        NoMemory
