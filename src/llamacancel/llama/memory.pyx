# distutils: language = c++
"""What a context holds of its sequences: `context.memory`, and saving it: `context.state`."""

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
from libcpp cimport bool as cbool
from libcpp.string cimport string
from libcpp.vector cimport vector

from .._native.cancel.call cimport Call
from .._native.guard.context cimport ContextBox
from .._native.llama cimport llama_pos, llama_seq_id
from .._native.memory.memory cimport name_of
from .._native.process.status cimport Status
from ..cancel.token cimport state_of
from ._llama cimport Interrupt, check_call, drain_log, raise_cancelled, raise_status, text_of, watch_signals
from .context cimport Context
from .model cimport LoraAdapter

from ..errors import ContextError, DecodeFailedError, StateError
from . import params as _params
from .context import _register


@cython.final
cdef class Memory:
    """What a context holds of its sequences: `context.memory`."""
    cdef Context context

    def __cinit__(self, Context context not None):
        self.context = context

    cdef ContextBox * _enter(self, str what, token=None, Call * call=NULL, Interrupt interrupt=None) except NULL:
        if token is None:
            call = NULL  # it does not wait
        self.context._acquire(call, interrupt, what)
        cdef ContextBox * box = self.context.box.get()
        if box.memory().memory == NULL:
            box.release()
            raise ContextError("the model computes without a memory: its contexts have none")
        return box

    def clear(self, token=None):
        """Forget all sequences. Costs what the cache held since it was last cleared, which is zeroed.

        Raises:
            DecodeCancelled: If `token` was cancelled first; nothing was changed. A cancel that comes later leaves part of
                the zeroing to the next `clear`.
        """
        cdef string problem
        cdef Status status
        cdef Call call = Call(state_of(token))
        cdef Interrupt interrupt = watch_signals(call)
        box = self._enter("clear", token, &call, interrupt)
        try:
            with nogil:
                status = box.clear(call, problem)
        finally:
            box.release()
        if status == Status.Cancelled:
            raise_cancelled("clear", call, interrupt)
        if interrupt.error is not None:
            raise interrupt.error
        if status != Status.Done:
            raise_status(status, "clear", problem)

    def remove(self, seq_id, p0=0, p1=-1):
        """Forget positions p0 to p1 (without it; negative: the end) of a sequence. What nobody else holds is zeroed.

        Returns:
            False, with nothing changed, if that cannot be done: part of a recurrent state, or so much of a
            sliding window that what is left could not be continued. A whole sequence can always be removed.
        """
        cdef llama_pos first = _params.integer("p0", p0, -2**31, 2**31 - 1)
        cdef llama_pos last = _params.integer("p1", p1, -2**31, 2**31 - 1)
        cdef llama_seq_id seq = self.context._check_seq(seq_id)
        cdef cbool removed
        box = self._enter("remove")
        try:
            with nogil:
                removed = box.remove(seq, first, last)
            return removed
        finally:
            box.release()

    def copy(self, src, dst, p0=0, p1=-1, token=None):
        """Give sequence `dst` the positions p0 to p1 of `src` (negative: the end), without computing them again.

        Costs nothing where they share a cache, and a copy of what `src` holds where each has its own.

        Raises:
            DecodeCancelled: If `token` was cancelled first; nothing was changed.
            ValueError: If this memory cannot share that part, or `dst` holds other positions.
            DirtySequenceError: If `src` or `dst` is dirty.
        """
        cdef string problem
        cdef Status status
        cdef llama_pos first = _params.integer("p0", p0, -2**31, 2**31 - 1)
        cdef llama_pos last = _params.integer("p1", p1, -2**31, 2**31 - 1)
        cdef llama_seq_id source = self.context._check_seq(src), target = self.context._check_seq(dst)
        cdef Call call = Call(state_of(token))
        cdef Interrupt interrupt = watch_signals(call)
        box = self._enter("copy", token, &call, interrupt)
        try:
            dirty = [seq for seq in (source, target) if box.dirty().count(seq)]
            if dirty:
                self.context._raise_dirty(dirty)
            with nogil:
                status = box.copy(source, target, first, last, call, problem)
        finally:
            box.release()
        if status == Status.Cancelled:
            raise_cancelled("copy", call, interrupt)
        if status != Status.Done:
            raise_status(status, "copy", problem)

    def keep(self, seq_id):
        """Forget all sequences but one."""
        cdef llama_seq_id seq = self.context._check_seq(seq_id)
        box = self._enter("keep")
        try:
            with nogil:
                box.keep(seq)
        finally:
            box.release()

    def pos_min(self, seq_id):
        """The smallest position held of a sequence; -1 if none is."""
        cdef llama_seq_id seq = self.context._check_seq(seq_id)
        box = self._enter("pos_min")
        try:
            return box.memory().pos_min(seq)
        finally:
            box.release()

    def pos_max(self, seq_id):
        """The largest position held of a sequence; -1 if none is."""
        cdef llama_seq_id seq = self.context._check_seq(seq_id)
        box = self._enter("pos_max")
        try:
            return box.memory().pos_max(seq)
        finally:
            box.release()

    @property
    def kind(self):
        """How the context remembers: "attention", "sliding_window", "recurrent", "hybrid", "none", ..."""
        self.context._check_open()
        return name_of(self.context.box.get().memory().kind).decode()

    def __repr__(self):
        return f"<Memory of {self.context!r}>"


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
        cdef Call call = Call(state_of(token))
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
        if status == Status.Cancelled:
            raise_cancelled("saving a state", call, interrupt)
        if status != Status.Done:
            raise self._error("saved", message)

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
            StateError: If `data` is damaged, does not fit, or was saved for other weights (of the model's or of adapters: a
                file may have another name), other RoPE parameters or another kind of cache. Nothing was changed.
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

        cdef Call call = Call(state_of(token))
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
        if status == Status.Cancelled:
            raise_cancelled("loading a state", call, interrupt)
        if status != Status.Done:
            raise self._error("loaded", message)

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

    cdef object _error(self, str what, const string & message):
        """What to raise: a state that llama.cpp refuses is at fault itself, unless a device has gone."""
        kind = StateError if self.context.box.get().model().get().lost_server().empty() else DecodeFailedError
        return kind(f"the state cannot be {what}: {text_of(message)}")

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


_register(Memory, State)
