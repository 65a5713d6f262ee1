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
cdef raise_cancelled(str what, Call & call, Interrupt interrupt, kind=*, sequences=*)
cdef int check_call(str what, Call & call, Interrupt interrupt) except -1
# The one place where what a native operation came to turns into an exception, unless it was done. `what` it was, `said`
# before the native message; the kinds for what it cannot take, for a failure and for a cancel, and the cancelled
# sequences. `call` may be NULL where nothing can be cancelled.
cdef int check_status(Status status, str what, const string & message, Call * call, Interrupt interrupt, str said=*,
                      invalid=*, failed=*, cancelled=*, sequences=*) except -1
cdef cause_of(const Verdict & verdict)
cdef error_of(str what, const Verdict & verdict, kind=*)
