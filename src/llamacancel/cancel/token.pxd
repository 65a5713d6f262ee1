cimport cython
from libc.stdint cimport uint64_t
from libcpp.memory cimport shared_ptr

from .._native.cancel.token cimport TokenCore


@cython.final
cdef class CancelToken:
    cdef object __weakref__
    # Never null. Native calls and derived tokens share it, and may outlive this object.
    cdef shared_ptr[TokenCore] core
    # Key -> function, in the order of registration; None until the first. Kept here and not in `core`, so
    # that the GC sees a function that refers back to its token.
    cdef dict callbacks
    cdef uint64_t last_key
    # The one entry of this object in the callbacks of `core`, once there is one: `listener` points to a Listener,
    # which is ours as long as remove_callback(listener_id) says so, and the cancelling thread's after that.
    cdef void * listener
    cdef uint64_t listener_id

    cdef void run_callbacks(self) noexcept


# The core of a CancelToken; null for None; TypeError for anything else.
cdef shared_ptr[TokenCore] core_of(object token) except *
