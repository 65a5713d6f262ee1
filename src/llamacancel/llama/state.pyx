# distutils: language = c++
"""Saving and loading the state of sequences: `context.state`."""

import errno
import os
import stat
import struct
import tempfile
import zlib

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t
from libc.string cimport memcpy
from libcpp.string cimport string
from libcpp.vector cimport vector

from .._native.cancel.call cimport Call
from .._native.guard.context cimport ContextBox
from .._native.llama cimport llama_seq_id
from .._native.process.status cimport Status
from ..cancel.token cimport core_of
from ._llama cimport drain_log
from .call cimport Interrupt, check_call, check_status, watch_signals
from .context cimport Context
from .model cimport LoraAdapter

from ..errors import ContextError, DecodeFailedError, StateError

_STATE_MAGIC = b"lcstate1"
_STATE_HEADER = struct.Struct("<8sIIQ")  # magic, length of the context's description, CRC-32 and size of the data
_PIECE = 4 << 20  # bytes that are handled between two looks at a token


@cython.final
cdef class State:
    """Saving and loading the state of single sequences: `context.state`."""
    cdef Context context

    def __cinit__(self, Context context not None):
        self.context = context

    cdef bytes _description(self):
        """What two contexts must have in common for the state of one to be of use in the other."""
        self.context._check_open()
        cdef bytes said = self.context.box.get().description()
        adapters = sorted((<LoraAdapter> adapter).identity + f"*{scale:.9g}".encode()
                          for adapter, scale in self.context._lora)
        return said + b"adapters=" + b",".join(adapters)

    def save(self, seq_id=0, token=None):
        """The state of a sequence as bytes, for `load` in a context of the same model.

        Raises:
            DecodeCancelled: If `token` was cancelled first.
            DirtySequenceError: If the sequence is dirty.
            StateError: If the model has an encoder and a decoder: what the encoder made is no part of a sequence.
            DecodeFailedError: If it lies on an RPC server to which the connection was lost.
        """
        cdef llama_seq_id seq = self.context._check_seq(seq_id)
        cdef Call call = Call(core_of(token))
        cdef Interrupt interrupt = watch_signals(call)
        cdef vector[uint8_t] data
        cdef string message
        cdef Status status
        about = self._description()
        cdef ContextBox * box = self._enter(&call, interrupt, "saving a state")
        try:
            if box.dirty().count(seq):
                self.context._raise_dirty([seq])
            with nogil:
                status = box.save_state(seq, call, data, message)
        finally:
            box.release()
        drain_log()
        if status != Status.Done:
            self._raise("saving a state", "the state cannot be saved: ", status, message, &call, interrupt)

        cdef size_t n_before = _STATE_HEADER.size + len(about), n = data.size(), done = 0, piece
        cdef bytes result = PyBytes_FromStringAndSize(NULL, n_before + n)
        cdef char * to = PyBytes_AS_STRING(result)
        view = memoryview(result)
        checksum = 0
        while done < n:
            check_call("saving a state", call, interrupt)
            piece = min(<size_t> _PIECE, n - done)
            with nogil:
                memcpy(to + n_before + done, data.data() + done, piece)
            checksum = zlib.crc32(view[n_before + done : n_before + done + piece], checksum)
            done += piece
        cdef bytes header = _STATE_HEADER.pack(_STATE_MAGIC, len(about), checksum, n) + about
        memcpy(to, PyBytes_AS_STRING(header), n_before)
        return result

    def load(self, seq_id, data, token=None):
        """Replace what the context holds of a sequence by a saved state.

        Raises:
            StateError: If `data` is damaged, does not fit, or was saved for other weights (of the model's or of
                adapters: a file may have another name), other RoPE parameters or another kind of cache. Nothing was
                changed.
            DecodeCancelled: If `token` was cancelled first. Nothing was changed.
            DecodeFailedError: If it would lie on an RPC server to which the connection was lost.
        """
        cdef llama_seq_id seq = self.context._check_seq(seq_id)
        buffer = memoryview(data).cast("B")
        if len(buffer) < _STATE_HEADER.size:
            raise StateError(f"{len(buffer)} bytes are no saved state")
        magic, n_about, checksum, size = _STATE_HEADER.unpack_from(buffer)
        if magic != _STATE_MAGIC or len(buffer) != _STATE_HEADER.size + n_about + size:
            raise StateError("the bytes are no saved state, or part of one")
        about = bytes(buffer[_STATE_HEADER.size : _STATE_HEADER.size + n_about])
        mine = self._description()
        if about != mine:
            raise StateError(f"the state was saved elsewhere: {_differences(about, mine)}")

        cdef Call call = Call(core_of(token))
        cdef Interrupt interrupt = watch_signals(call)
        payload = buffer[_STATE_HEADER.size + n_about :]
        found = 0
        for start in range(0, size, _PIECE):
            check_call("loading a state", call, interrupt)
            found = zlib.crc32(payload[start : start + _PIECE], found)
        if found != checksum:
            raise StateError("the state was damaged: its checksum is wrong")

        cdef const uint8_t[::1] view = payload
        cdef const uint8_t * begin = &view[0] if size else NULL
        cdef size_t n = size
        cdef string message
        cdef Status status
        cdef ContextBox * box = self._enter(&call, interrupt, "loading a state")
        try:
            with nogil:
                status = box.load_state(seq, begin, n, call, message)
                if status != Status.Done:
                    box.wrote_everywhere()
        finally:
            box.release()
        drain_log()
        if status != Status.Done:
            self._raise("loading a state", "the state cannot be loaded: ", status, message, &call, interrupt)

    def save_file(self, path, seq_id=0, token=None):
        """Save a sequence's state to a file, which appears whole or not at all, also if the machine fails. As `save`.

        A symbolic link stays, and the file that it leads to is written. A file that is replaced hands down its mode; a
        new one is for its owner alone.

        Raises:
            OSError: If the file cannot be written, or `path` is a device, a pipe or the like.
        """
        self.context._check_open()
        path = os.path.realpath(os.fspath(path))
        _mode_of(path)
        data = memoryview(self.save(seq_id, token))
        folder = os.path.dirname(path)
        handle, partial = tempfile.mkstemp(dir=folder, suffix=b".partial" if isinstance(path, bytes) else ".partial")
        try:
            with open(handle, "wb") as file:
                for start in range(0, len(data), _PIECE):
                    if token is not None:
                        token.raise_if_cancelled()
                    file.write(data[start : start + _PIECE])
                mode = _mode_of(path)
                if mode is not None:
                    os.fchmod(file.fileno(), mode)
                file.flush()
                os.fsync(file.fileno())
            if token is not None:
                token.raise_if_cancelled()
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
        _sync_folder(folder)

    def load_file(self, path, seq_id=0, token=None):
        """Load a sequence's state from a file. As `load`."""
        pieces = bytearray()
        with open(path, "rb") as file:
            while piece := file.read(_PIECE):
                if token is not None:
                    token.raise_if_cancelled()
                pieces += piece
        self.load(seq_id, pieces, token)

    cdef ContextBox * _enter(self, Call * call, Interrupt interrupt, str what) except NULL:
        self.context._acquire(call, interrupt, what)
        cdef ContextBox * box = self.context.box.get()
        if box.memory().memory == NULL:
            box.release()
            raise ContextError("the model computes without a memory: its contexts have no state")
        return box

    cdef int _raise(self, str what, str said, Status status, const string & message, Call * call,
                    Interrupt interrupt) except -1:
        """A state that llama.cpp refuses is at fault itself, unless a device has gone."""
        kind = StateError if self.context.box.get().model().get().lost_server().empty() else DecodeFailedError
        return check_status(status, what, message, call, interrupt, said, kind, kind)

    def __repr__(self):
        return f"<State of {self.context!r}>"


def _mode_of(path):
    """The permissions of the file that is there, or None if none is; what is no file cannot be replaced by one."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "a state is saved to a file, and this is none", path)
    return stat.S_IMODE(found.st_mode)


def _sync_folder(folder):
    """Has the folder's new entry survive a crash, where the file system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def _differences(about, mine):
    """What two descriptions do not have in common, in words."""
    there, here = (dict(line.partition("=")[::2] for line in text.decode("utf-8", "replace").splitlines())
                   for text in (about, mine))
    return "; ".join(f"{name} was {there.get(name) or 'none'}, and is {here.get(name) or 'none'} here"
                     for name in dict.fromkeys([*here, *there]) if there.get(name) != here.get(name))
