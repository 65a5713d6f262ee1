# Declarations of call.hpp.

from libc.stdint cimport uint8_t
from libcpp cimport bool
from libcpp.memory cimport shared_ptr

from .token cimport TokenCore, Verdict


cdef extern from "cancel/call.hpp" namespace "llamacancel" nogil:
    enum class WhenShared (uint8_t):
        Finish
        Stop

    cppclass Call:
        Call() noexcept
        Call(shared_ptr[TokenCore] token) except +
        void set_interrupt(bool (*hook)(void *) noexcept, void * arg) noexcept
        bool should_stop() noexcept
        bool stopped_by_interrupt() noexcept
        const Verdict * verdict() noexcept
