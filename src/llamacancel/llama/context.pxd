cimport cython
from libc.stdint cimport int32_t
from libcpp.memory cimport shared_ptr

from .._native.cancel.call cimport Call
from .._native.guard.context cimport ContextBox, OnCancel
from .._native.guard.cut cimport BatchView
from .call cimport Interrupt
from .model cimport Model


@cython.final
cdef class Context:
    cdef object __weakref__
    cdef shared_ptr[ContextBox] box  # null once closed; a call in flight holds it, too
    cdef int pid                     # the process that made it
    cdef readonly Model model        # the Python model, for its vocabulary; the native one is held by the box
    cdef tuple _lora                 # the adapters in use, kept alive

    cdef int _check_open(self) except -1
    cdef int _acquire(self, Call * call, Interrupt interrupt, str what, batch=*, token=*) except -1
    cdef int _check_seq(self, seq_id) except -1
    cdef object _raise_dirty(self, seq_ids)
    cdef dict _untouched(self, batch, token, OnCancel keep)
    cdef object _run(self, batch, token, on_cancel, when_shared, bint encoding)
    # The output row's logits; valid until the next call. The caller holds the context.
    cdef const float * _logits_of(self, int32_t i) except NULL
