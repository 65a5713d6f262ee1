# distutils: language = c++
"""The library itself: its log, how it was built, what it does at a fork and at the interpreter's exit.

This extension is the only one that links llama.cpp. The other modules of the room are compiled into the same file, so
that ggml's globals exist once; the room's `__init__.py` loads them from it.
"""

import atexit
import logging
import os

from cpython.exc cimport PyErr_ExceptionMatches, PyErr_WriteUnraisable
from cpython.ref cimport Py_DECREF, PyObject
from posix.unistd cimport getpid

from .._native.far.rpc cimport forget_servers_after_fork, serve_rpc as serve_natively
from .._native.llama cimport *
from .._native.process.assertions cimport catch_assertions
from .._native.process.exit cimport begin_exit, forget_calls_after_fork, parked
from .._native.process.log cimport LogLine, collect_log, forget_log_after_fork, next_log_line

from ..errors import ClosedError

cdef extern from "Python.h":
    PyObject * PyObject_CallObject(object fn, object args)  # the caller's reference, or NULL with an exception set

collect_log()
catch_assertions()
llama_backend_init()


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


# ---- fork ------------------------------------------------------------------------------------------------

def _after_fork_in_child():
    forget_calls_after_fork()
    forget_log_after_fork()
    forget_servers_after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)


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


cdef int check_process(int pid, str what) except -1:
    """Refuses an object that belongs to the process from which this one was forked."""
    if pid != getpid():
        raise ClosedError(f"{what} belongs to process {pid}, from which this one was forked: make a new one")
    return 0


cdef str text_of(const string & message):
    return message.decode("utf-8", "replace").strip()
