# distutils: language = c++
"""How Python makes a native call: it hears Ctrl-C meanwhile, and is told by an exception what stopped it."""

import os
import signal
import threading

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.pythread cimport PyThread_get_thread_ident
from libcpp cimport bool as cbool
from libcpp.string cimport string
from posix.unistd cimport getpid, read, write

from .._native.cancel.call cimport Call
from .._native.cancel.clock cimport now_ns
from .._native.cancel.token cimport Verdict
from .._native.process.status cimport Status
from ._llama cimport text_of

from ..cancel import Cause, cancelled_error
from ..errors import ContextBusyError, DecodeFailedError, MemoryFullError


# ---- Ctrl-C ----------------------------------------------------------------------------------------------

cdef extern from "poll.h" nogil:
    struct pollfd:
        int fd
        short events
    int POLLIN
    int poll(pollfd * fds, unsigned long n, int timeout)


cdef unsigned long _main_thread = threading.main_thread().ident
cdef int _wakeup_read = -1   # a pipe, made when the first call needs it: Python's C-level signal handler
cdef int _wakeup_write = -1  # writes to it, so that a signal is known of without asking for the GIL
cdef object _set_wakeup_fd = signal.set_wakeup_fd


cdef int _foreign_wakeup = -1  # whose wakeup fd ours has replaced, while it has; -1 for nobody's


def _after_fork_in_child():
    global _main_thread, _wakeup_read, _wakeup_write
    _main_thread = threading.main_thread().ident
    if _wakeup_read >= 0:  # shared with the parent
        current = _set_wakeup_fd(-1)
        if current == _wakeup_write:  # a call was under way: the child must not write to whatever gets this number
            current = _foreign_wakeup
        os.close(_wakeup_read)
        os.close(_wakeup_write)
        _wakeup_read = _wakeup_write = -1
        if current >= 0:
            _set_wakeup_fd(current)


os.register_at_fork(after_in_child=_after_fork_in_child)


@cython.no_gc
cdef class Interrupt:
    """Runs Python's signal handlers in the middle of a native call, and keeps what one of them raised."""

    cdef int arm(self) except -1:
        global _wakeup_read, _wakeup_write, _foreign_wakeup
        if _wakeup_read < 0:
            reader, writer = os.pipe()
            os.set_blocking(reader, False)
            os.set_blocking(writer, False)
            _wakeup_read, _wakeup_write = reader, writer
        self.previous_fd = _set_wakeup_fd(_wakeup_write)
        if self.previous_fd != _wakeup_write:
            _foreign_wakeup = self.previous_fd
        self.pid = getpid()
        self.armed = True
        return 0

    def __dealloc__(self):
        if self.armed and self.pid == getpid():  # a forked child has got back whose it was before
            self.collect()
            _set_wakeup_fd(self.previous_fd)
            if self.received is not None and self.previous_fd >= 0 and self.previous_fd != _wakeup_write:
                write(self.previous_fd, <char *> self.received, len(self.received))

    cdef void collect(self):
        cdef char buffer[64]
        cdef ssize_t n = read(_wakeup_read, buffer, sizeof(buffer))
        while n > 0:
            self.received = (self.received or b"") + buffer[:n]
            n = read(_wakeup_read, buffer, sizeof(buffer))


cdef cbool _check_signals(void * arg) noexcept nogil:
    cdef pollfd waiting
    waiting.fd = _wakeup_read
    waiting.events = POLLIN
    return poll(&waiting, 1, 0) > 0 and _run_handlers(arg)


# A function of its own: Cython takes the GIL on entry, and the check above must not.
cdef cbool _run_handlers(void * arg) noexcept with gil:
    (<Interrupt> arg).collect()
    try:
        PyErr_CheckSignals()
    except BaseException as error:
        (<Interrupt> arg).error = error
        return True
    return False


cdef Interrupt watch_signals(Call & call):
    """On the main thread, makes the call look for signals; elsewhere Python runs no handlers."""
    cdef Interrupt interrupt = Interrupt()
    if PyThread_get_thread_ident() == _main_thread:
        interrupt.arm()
        PyErr_CheckSignals()  # of one that came just before nothing is written to the pipe
        call.set_interrupt(_check_signals, <void *> interrupt)
    return interrupt


# ---- exceptions ------------------------------------------------------------------------------------------

cdef tuple _CAUSES = (None, Cause.CLIENT, Cause.DEADLINE, Cause.INTERRUPT, Cause.SHUTDOWN)


cdef raise_cancelled(str what, Call & call, Interrupt interrupt, kind=None, sequences=None):
    """Raises what stopped a call that has computed nothing."""
    cdef const Verdict * verdict = call.verdict()
    if call.stopped_by_interrupt():
        error = cancelled_error(what, Cause.INTERRUPT, "", 0.0, kind=kind)
    elif verdict == NULL:
        error = cancelled_error(what, Cause.SHUTDOWN, "the interpreter exits", 0.0, kind=kind)
    else:
        error = error_of(what, verdict[0], kind)
    if sequences is not None:
        error.sequences = sequences
        error.survivors = [seq for seq, outcome in sequences.items() if not outcome.cancelled]
    if call.stopped_by_interrupt():
        raise interrupt.error from error
    raise error


cdef int check_call(str what, Call & call, Interrupt interrupt) except -1:
    """Looks at the call's token where Python works for it."""
    if call.should_stop():
        raise_cancelled(what, call, interrupt)
    return 0


cdef int check_status(Status status, str what, const string & message, Call * call, Interrupt interrupt, str said="",
                      invalid=ValueError, failed=DecodeFailedError, cancelled=None, sequences=None) except -1:
    if status == Status.Done:
        return 0
    if status == Status.Cancelled:
        raise_cancelled(what, call[0], interrupt, cancelled, sequences)
    if status == Status.Busy:
        raise ContextBusyError(f"{what}: the context is in use; pass a token to wait under, or use a second one")
    text = text_of(message) or "llama.cpp gave no reason"
    if status == Status.NoMemory:
        raise MemoryError(f"{what}: {text}; the context is as before the call")
    raise (MemoryFullError if status == Status.Full else invalid if status == Status.Invalid else failed)(said + text)


cdef cause_of(const Verdict & verdict):
    return _CAUSES[<int> verdict.cause]


cdef error_of(str what, const Verdict & verdict, kind=None):
    cdef double latency = (now_ns() - verdict.at_ns) * 1e-9
    return cancelled_error(what, cause_of(verdict), verdict.reason.decode("utf-8", "replace"), latency, kind=kind)
