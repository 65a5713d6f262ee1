cimport cython
from libc.stdint cimport uint64_t
from libcpp.memory cimport shared_ptr

from .._native.cancel.token cimport TokenState


@cython.final
cdef class CancelToken:
    cdef object __weakref__
    # Never null. Native calls and derived tokens share it, and may outlive this object.
    cdef shared_ptr[TokenState] state
    # Key -> function, in the order of registration; None until the first. Kept here and not in `state`, so
    # that the GC sees a function that refers back to its token.
    cdef dict callbacks
    cdef uint64_t last_key
    # The one entry of this object in the callbacks of `state`, once there is one: `bell` points to a Bell,
    # which is ours as long as remove_callback(bell_id) says so, and the cancelling thread's after that.
    cdef void * bell
    cdef uint64_t bell_id

    cdef void run_callbacks(self) noexcept


# The state of a CancelToken; null for None; TypeError for anything else.
cdef shared_ptr[TokenState] state_of(object token) except *
