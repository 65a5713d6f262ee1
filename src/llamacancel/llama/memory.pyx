# distutils: language = c++
"""What a context holds of its sequences: `context.memory`."""

cimport cython
from libcpp.string cimport string

from .._native.cancel.call cimport Call
from .._native.guard.context cimport ContextBox
from .._native.llama cimport llama_pos, llama_seq_id
from .._native.memory.memory cimport name_of
from .._native.process.status cimport Status
from ..cancel.token cimport core_of
from .call cimport Interrupt, check_status, watch_signals
from .context cimport Context

from ..errors import ContextError
from .params import integer


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
            DecodeCancelled: If `token` was cancelled first; nothing was changed. A cancel that comes later leaves part
                of the zeroing to the next `clear`.
        """
        cdef string problem
        cdef Status status
        cdef Call call = Call(core_of(token))
        cdef Interrupt interrupt = watch_signals(call)
        box = self._enter("clear", token, &call, interrupt)
        try:
            with nogil:
                status = box.clear(call, problem)
        finally:
            box.release()
        if status != Status.Cancelled and interrupt.error is not None:
            raise interrupt.error
        check_status(status, "clear", problem, &call, interrupt)

    def remove(self, seq_id, p0=0, p1=-1):
        """Forget positions p0 to p1 (without it; negative: the end) of a sequence. What nobody else holds is zeroed.

        Returns:
            True: it was done. llama.cpp answers False to what cannot be done, which raises here.

        Raises:
            ValueError: If that cannot be done: part of a recurrent state, or so much of a sliding window that what is
                left could not be continued. Nothing was changed. A whole sequence can always be removed.
            DecodeFailedError: If it lies on an RPC server to which the connection was lost.
        """
        cdef llama_pos first = integer("p0", p0, -2**31, 2**31 - 1)
        cdef llama_pos last = integer("p1", p1, -2**31, 2**31 - 1)
        cdef llama_seq_id seq = self.context._check_seq(seq_id)
        cdef string problem
        cdef Status status
        box = self._enter("remove")
        try:
            with nogil:
                status = box.remove(seq, first, last, problem)
        finally:
            box.release()
        check_status(status, "remove", problem, NULL, None)
        return True

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
        cdef llama_pos first = integer("p0", p0, -2**31, 2**31 - 1)
        cdef llama_pos last = integer("p1", p1, -2**31, 2**31 - 1)
        cdef llama_seq_id source = self.context._check_seq(src), target = self.context._check_seq(dst)
        cdef Call call = Call(core_of(token))
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
        check_status(status, "copy", problem, &call, interrupt)

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
