# distutils: language = c++
"""What every module of this library shares: the log, Ctrl-C, fork, and what a stopped call raises.

This extension is the only one that links llama.cpp. `model`, `context`, `memory` and `sampler` are compiled into the same
file, so that ggml's globals exist once; the room's `__init__.py` loads them from it.
"""

import atexit
import logging
import os
import signal
import threading

cimport cython
from cpython.exc cimport PyErr_CheckSignals, PyErr_ExceptionMatches, PyErr_WriteUnraisable
from cpython.pythread cimport PyThread_get_thread_ident
from cpython.ref cimport Py_DECREF, PyObject
from libcpp cimport bool as cbool
from posix.unistd cimport getpid, read, write

from .._native.cancel.clock cimport now_ns
from .._native.far.rpc cimport serve_rpc as serve_natively
from .._native.llama cimport *
from .._native.process.guard cimport LogLine, after_fork_in_child, begin_exit, initialize, next_log_line, parked
from .._native.process.status cimport Status

from ..cancel import Cause
from ..cancel.outcome import cancelled_error
from ..errors import ClosedError, ContextBusyError, DecodeFailedError, MemoryFullError

cdef extern from "Python.h":
    PyObject * PyObject_CallObject(object fn, object args)  # the caller's reference, or NULL with an exception set

initialize()


# ---- log -------------------------------------------------------------------------------------------------

_logger = logging.getLogger("llamacancel.llama")
_logger.addHandler(logging.NullHandler())
cdef dict _LEVELS = {
    GGML_LOG_LEVEL_DEBUG: logging.DEBUG,
    GGML_LOG_LEVEL_INFO: logging.INFO,
    GGML_LOG_LEVEL_WARN: logging.WARNING,
    GGML_LOG_LEVEL_ERROR: logging.ERROR,
}


cdef int drain_log() except -1:
    """Hands what llama.cpp logged to Python's logging. Called at the end of native calls, with the GIL."""
    cdef LogLine line
    while next_log_line(line):
        text = line.text.decode("utf-8", "replace").rstrip()
        if text:
            logged = PyObject_CallObject(_logger.log, (_LEVELS.get(line.level, logging.DEBUG), "%s", text))
            if logged != NULL:
                Py_DECREF(<object> logged)
            elif PyErr_ExceptionMatches(Exception):  # a filter's, say: what the call has to tell is not lost over it
                PyErr_WriteUnraisable(_logger)
            else:
                return -1
    return 0


@atexit.register
def _exit():
    """Daemon threads may be in the middle of a native call: they are stopped before the process goes down."""
    with nogil:
        begin_exit(10.0)
    drain_log()


def is_parked(ident):
    """Whether a thread was stopped for good in a native call, because the interpreter exits: it never ends."""
    return parked(<unsigned long> ident)


def build_info():
    """How the library was built: llama.cpp's version, its CPU features, and the devices that it sees.

    Returns:
        A dict: llama_cpp, system, gpu_offload, rpc, backends (names; whether there is a device for them or not),
        devices (each with name, description, memory in bytes, and kind: "cpu", "gpu", "igpu", "accel" or "meta").
    """
    cdef size_t free, total
    backends = [ggml_backend_reg_name(ggml_backend_reg_get(i)).decode() for i in range(ggml_backend_reg_count())]
    devices = []
    for i in range(ggml_backend_dev_count()):
        device = ggml_backend_dev_get(i)
        ggml_backend_dev_memory(device, &free, &total)
        devices.append({
            "name": ggml_backend_dev_name(device).decode("utf-8", "replace"),
            "description": ggml_backend_dev_description(device).decode("utf-8", "replace"),
            "memory": total,
            "kind": ("cpu", "gpu", "igpu", "accel", "meta")[<int> ggml_backend_dev_type(device)],
        })
    return {
        "llama_cpp": llama_version().decode("utf-8", "replace"),
        "system": llama_print_system_info().decode("utf-8", "replace"),
        "gpu_offload": any(device["kind"] in ("gpu", "igpu") for device in devices),
        "rpc": llama_supports_rpc(),
        "backends": backends,
        "devices": devices,
    }


def serve_rpc(endpoint, n_threads):
    """Serve this machine's devices as an RPC server; returns only if it cannot, and says why. For `rpc-server`."""
    cdef string address = endpoint.encode()
    cdef size_t threads = n_threads
    cdef string problem
    with nogil:
        problem = serve_natively(address, threads)
    drain_log()
    return text_of(problem)


# ---- Ctrl-C, fork ----------------------------------------------------------------------------------------

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
    after_fork_in_child()
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


cdef int _entered_in = 0  # the process in which a model was last loaded: llama.cpp's threads do not survive a fork


cdef int check_forked() except -1:
    """Refuses to load and to compute in a child that was forked from a process that has."""
    if _entered_in != 0 and _entered_in != getpid():
        raise ClosedError(
            f"process {getpid()} was forked from {_entered_in}, where llama.cpp was at work: its threads did not come "
            "along. Start workers with multiprocessing's 'spawn', or fork before the first load.")
    return 0


cdef void entered_process() noexcept:
    """A model was loaded in this process."""
    global _entered_in
    _entered_in = getpid()


# ---- verdicts to exceptions ------------------------------------------------------------------------------

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


cdef raise_status(Status status, str what, const string & message, invalid=ValueError):
    text = text_of(message)
    if status == Status.Invalid:
        raise invalid(text)
    if status == Status.Full:
        raise MemoryFullError(text)
    if status == Status.Busy:
        raise ContextBusyError(f"{what}: the context is in use; pass a token to wait under, or use a second one")
    if status == Status.NoMemory:
        raise MemoryError(f"{what}: {text}; the context is as before the call")
    raise DecodeFailedError(text)


cdef cause_of(const Verdict & verdict):
    return _CAUSES[<int> verdict.cause]


cdef error_of(str what, const Verdict & verdict, kind=None):
    cdef double latency = (now_ns() - verdict.at_ns) * 1e-9
    return cancelled_error(what, cause_of(verdict), verdict.reason.decode("utf-8", "replace"), latency, kind=kind)


cdef str text_of(const string & message):
    return message.decode("utf-8", "replace").strip()


cdef int check_process(int pid, str what) except -1:
    """Refuses an object that belongs to the process from which this one was forked."""
    if pid != getpid():
        raise ClosedError(f"{what} belongs to process {pid}, from which this one was forked: make a new one")
    return 0
