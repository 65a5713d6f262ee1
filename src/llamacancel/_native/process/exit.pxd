# Declarations of exit.hpp.

from libcpp cimport bool


cdef extern from "process/exit.hpp" namespace "llamacancel" nogil:
    void begin_exit(double most_seconds) noexcept
    bool parked(unsigned long thread) noexcept
    cdef cppclass InFlight:
        InFlight() noexcept
    void forget_calls_after_fork() noexcept
