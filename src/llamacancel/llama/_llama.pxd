from libcpp.string cimport string

from .._native.cancel.call cimport Call
from .._native.cancel.token cimport Verdict
from .._native.process.status cimport Status


cdef class Interrupt:
    cdef object error        # what a signal handler raised in the middle of the call; None if none did
    cdef bint armed          # on the main thread: the wakeup fd is ours for the life of this object
    cdef int pid             # the process whose wakeup fd it is
    cdef int previous_fd     # whose it was before
    cdef bytes received      # signal numbers to pass on to it, if there were any

    cdef int arm(self) except -1
    cdef void collect(self)

cdef Interrupt watch_signals(Call & call)
cdef int drain_log() except -1
cdef int check_forked() except -1
cdef void entered_process() noexcept
cdef int check_process(int pid, str what) except -1
cdef raise_cancelled(str what, Call & call, Interrupt interrupt, kind=*, sequences=*)
cdef int check_call(str what, Call & call, Interrupt interrupt) except -1
# What a native call came to that was neither done nor cancelled; `invalid`: the exception for what it cannot take.
cdef raise_status(Status status, str what, const string & message, invalid=*)
cdef cause_of(const Verdict & verdict)
cdef error_of(str what, const Verdict & verdict, kind=*)
cdef str text_of(const string & message)
