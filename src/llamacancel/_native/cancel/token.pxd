# Declarations of token.hpp.

from libc.stdint cimport int64_t, uint8_t, uint64_t
from libcpp cimport bool
from libcpp.memory cimport shared_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector


cdef extern from "cancel/token.hpp" namespace "llamacancel" nogil:
    # Named so that a module can hold a Python `Cause` beside it.
    enum class NativeCause "llamacancel::Cause" (uint8_t):
        NoCause "None"
        Client
        Deadline
        Interrupt
        Shutdown

    cppclass Verdict:
        NativeCause cause
        string reason
        int64_t at_ns  # when cancel() was called, or the deadline that passed

    cppclass TokenCore:
        @staticmethod
        shared_ptr[TokenCore] make(int64_t deadline_ns) except +

        @staticmethod
        shared_ptr[TokenCore] derive(const vector[shared_ptr[TokenCore]] & parents, int64_t deadline_ns) except +

        bool poll() noexcept
        bool cancel(NativeCause cause, string reason) noexcept  # runs callbacks on this thread
        const Verdict & verdict() noexcept  # only after poll() was true
        int64_t deadline_ns() noexcept
        bool wait_until(int64_t until_ns) except +
        uint64_t add_callback(void (*fn)(void *) noexcept, void * arg) except +  # 0: cancelled already
        bool remove_callback(uint64_t id) noexcept
        void run_callbacks() noexcept
