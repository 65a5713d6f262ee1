"""Cancel tokens: say stop once, from any thread, to exactly the work that was given the token."""

import enum
import weakref

cimport cython
from cpython.exc cimport (
    PyErr_CheckSignals, PyErr_Clear, PyErr_ExceptionMatches, PyErr_SetInterrupt, PyErr_WriteUnraisable
)
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.stdint cimport int64_t, uint64_t
from libcpp.memory cimport shared_ptr
from libcpp.string cimport string
from libcpp.utility cimport move
from libcpp.vector cimport vector

from .._native.cancel.clock cimport kNever, now_ns
from .._native.cancel.token cimport NativeCause, TokenCore

from ..errors import DeadlineExceeded, DecodeCancelled
from .deadlines import Alarms

__all__ = ["CallbackHandle", "CancelToken", "Cause", "call_as_callback", "publish"]

# A thread that waits looks for Ctrl-C this often.
cdef int64_t SIGNAL_INTERVAL_NS = 50_000_000
cdef double NS_PER_S = 1e9


class Cause(enum.Enum):
    """Why a token was cancelled."""

    CLIENT = "client"  # somebody called cancel()
    DEADLINE = "deadline"  # a deadline passed
    INTERRUPT = "interrupt"  # Ctrl-C
    SHUTDOWN = "shutdown"  # the engine or the process closes


cdef dict CAUSE_TO_NATIVE = {
    Cause.CLIENT: <int> NativeCause.Client,
    Cause.DEADLINE: <int> NativeCause.Deadline,
    Cause.INTERRUPT: <int> NativeCause.Interrupt,
    Cause.SHUTDOWN: <int> NativeCause.Shutdown,
}
cdef dict CAUSE_FROM_NATIVE = {number: cause for cause, number in CAUSE_TO_NATIVE.items()}


cdef extern from "Python.h":
    PyObject * PyObject_CallNoArgs(object fn)  # a raw pointer: the caller looks for NULL


cdef extern from *:
    """
    namespace {

    // A CancelToken's entry in the callbacks of its TokenCore. Whoever takes it out of there owns it: the
    // thread that cancels, or the CancelToken's __dealloc__.
    struct Listener {
        PyObject * token_ref = nullptr;  // a weak reference to the CancelToken; owned
        Listener * next = nullptr;
    };

    // The listeners that a cancel on this thread has to tell, in order.
    struct Due {
        Listener * first = nullptr;
        Listener ** end = &first;
    };
    thread_local Due * due_here = nullptr;

    // Tells one listener, taking the GIL. Set when the module is imported.
    void (*tell_from_native)(Listener *) = nullptr;

    bool finalizing() noexcept {
    #if PY_VERSION_HEX >= 0x030D0000
        return Py_IsFinalizing();
    #else
        return _Py_IsFinalizing();
    #endif
    }

    // The core calls this in the middle of its noexcept frames. A daemon thread that asks for the GIL while
    // the interpreter exits is unwound by force, which would end the process there: so the listeners of a
    // cancel from Python are only collected here, and told when the core has returned.
    void on_cancel(void * arg) noexcept {
        Listener * const listener = static_cast<Listener *>(arg);
        if (due_here) {
            *due_here->end = listener;
            due_here->end = &listener->next;
        } else if (Py_IsInitialized() && !finalizing()) {
            tell_from_native(listener);
        }
    }

    bool cancel_collecting(llamacancel::TokenCore & token, llamacancel::Cause cause, std::string reason,
                           Listener *& listeners) noexcept {
        Due due;
        due_here = &due;
        const bool first = token.cancel(cause, std::move(reason));
        due_here = nullptr;
        listeners = due.first;
        return first;
    }

    void run_collecting(llamacancel::TokenCore & token, Listener *& listeners) noexcept {
        Due due;
        due_here = &due;
        token.run_callbacks();
        due_here = nullptr;
        listeners = due.first;
    }

    }  // namespace
    """
    cppclass Listener:
        Listener() except +
        PyObject * token_ref
        Listener * next

    void (*tell_from_native)(Listener *) noexcept
    void on_cancel(void * arg) noexcept nogil
    bint cancel_collecting(TokenCore & token, NativeCause cause, string reason, Listener *& listeners) noexcept nogil
    void run_collecting(TokenCore & token, Listener *& listeners) noexcept nogil


cdef void tell(Listener * listener) noexcept:
    cdef Listener * following
    while listener != NULL:
        following = listener.next
        reference = <object> listener.token_ref
        free_listener(listener)
        token = reference()
        if token is not None:
            (<CancelToken> token).run_callbacks()
        listener = following


cdef void tell_taking_gil(Listener * listener) noexcept with gil:
    tell(listener)


cdef void free_listener(Listener * listener) noexcept:
    Py_DECREF(<object> listener.token_ref)
    del listener


cdef void call_and_report(object fn) noexcept:
    cdef PyObject * result = PyObject_CallNoArgs(fn)
    if result == NULL and PyErr_ExceptionMatches(KeyboardInterrupt):
        PyErr_Clear()
        PyErr_SetInterrupt()  # for the main thread, as soon as it is out of here
    elif result == NULL:
        PyErr_WriteUnraisable(fn)
    else:
        Py_DECREF(<object> result)


def call_as_callback(fn):
    """Calls somebody else's function; what it raises goes where it goes with a callback of a token."""
    call_and_report(fn)


def ring_deadline(CancelToken token not None):
    """Runs the callbacks of a token whose deadline has passed; false if it has not. For the deadline thread."""
    cdef Listener * listeners = NULL
    if not token.core.get().poll():
        return False
    with nogil:
        run_collecting(token.core.get()[0], listeners)
    tell(listeners)
    return True


tell_from_native = tell_taking_gil
alarms = Alarms(ring_deadline)


cdef double seconds(object value, str name) except? -1:
    """The float of a number of seconds, which may be infinite but not NaN."""
    cdef double number
    try:
        if isinstance(value, (str, bytes, bytearray)):
            raise TypeError
        number = float(value)
    except OverflowError:
        number = float("inf") if value > 0 else float("-inf")
    except TypeError:
        raise TypeError(f"{name} must be a number of seconds or None, not {type(value).__name__}") from None
    if number != number:
        raise ValueError(f"{name} must not be NaN")
    return number


cdef int64_t to_ns(double number) noexcept:
    """Nanoseconds, from 0 (a time that has passed) to kNever."""
    if number <= 0:
        return 0
    if number >= kNever / NS_PER_S:
        return kNever
    return <int64_t> (number * NS_PER_S)


cdef int64_t after_ns(object timeout) except -1:
    """The time on now_ns()'s clock that is `timeout` seconds from now; kNever for None."""
    if timeout is None:
        return kNever
    cdef int64_t left = to_ns(seconds(timeout, "timeout"))
    cdef int64_t now = now_ns()
    return kNever if left >= kNever - now else now + left


cdef int64_t earliest_ns(object timeout, object deadline) except -1:
    """The earlier of the two, on now_ns()'s clock; kNever if both are None."""
    cdef int64_t from_timeout = after_ns(timeout)
    cdef int64_t from_deadline = kNever if deadline is None else to_ns(seconds(deadline, "deadline"))
    return min(from_timeout, from_deadline)


cdef CancelToken wrap(shared_ptr[TokenCore] core):
    cdef CancelToken token = CancelToken.__new__(CancelToken)
    token.core = move(core)
    return token


cdef shared_ptr[TokenCore] core_of(object token) except *:
    if token is None:
        return shared_ptr[TokenCore]()
    if not isinstance(token, CancelToken):
        raise TypeError(f"token must be a CancelToken or None, not {type(token).__name__}")
    return (<CancelToken> token).core


@cython.final
cdef class CancelToken:
    """Says stop to the work that it is given to.

    Pass a token to any number of calls, in any thread. A cancel reaches those calls, and the calls given a
    token derived from it, and nothing else. The first cause wins; a cancelled token stays cancelled.

    Args:
        timeout: Seconds from now after which the token counts as cancelled. None or infinity: never; zero
            or less: at once.
        deadline: The same as a time on `time.monotonic()`'s clock, in seconds. If both are given, the
            earlier counts.

    Raises:
        TypeError: `timeout` or `deadline` is not a number.
        ValueError: `timeout` or `deadline` is NaN.
    """

    def __cinit__(self, timeout=None, deadline=None):
        self.core = TokenCore.make(earliest_ns(timeout, deadline))

    def __dealloc__(self):
        # By now the weak references are cleared: a thread that tells the listener meanwhile finds nobody.
        cdef bint ours = False
        with nogil:
            if self.listener_id != 0:
                ours = self.core.get().remove_callback(self.listener_id)
            self.core.reset()
        if ours:
            free_listener(<Listener *> self.listener)

    def cancel(self, reason="", *, cause=Cause.CLIENT):
        """Cancels the token and those derived from it. May be called from any thread.

        Callbacks run on this thread before the call returns, once everything cancelled can see it.

        Args:
            reason: Text for the one whose work is stopped; it comes back in the exception.
            cause: The `Cause` that the work is told.

        Returns:
            True for the first cancel. False if the token was cancelled already, or its deadline has passed:
            then nothing happens.

        Raises:
            TypeError: `reason` is not a string, or `cause` is not a `Cause`.
        """
        if not isinstance(reason, str):
            raise TypeError(f"reason must be a str, not {type(reason).__name__}")
        if not isinstance(cause, Cause):
            raise TypeError(f"cause must be a Cause, not {type(cause).__name__}")
        cdef NativeCause number = <NativeCause> <int> CAUSE_TO_NATIVE[cause]
        cdef string text = reason.encode("utf-8", "surrogatepass")
        cdef Listener * listeners = NULL
        cdef bint first
        with nogil:
            first = cancel_collecting(self.core.get()[0], number, move(text), listeners)
        tell(listeners)
        return first

    @property
    def cancelled(self):
        """True once the token is cancelled or its deadline has passed. Takes no lock."""
        return self.core.get().poll()

    @property
    def cause(self):
        """The `Cause`, or None while the token is live."""
        if not self.core.get().poll():
            return None
        return CAUSE_FROM_NATIVE[<int> self.core.get().verdict().cause]

    @property
    def reason(self):
        """The text given to `cancel()`, "" if there was none, or None while the token is live."""
        if not self.core.get().poll():
            return None
        return (<bytes> self.core.get().verdict().reason).decode("utf-8", "surrogatepass")

    @property
    def cancelled_at(self):
        """When `cancel()` was called or which deadline passed, in `time.monotonic()` seconds; None while live."""
        if not self.core.get().poll():
            return None
        return self.core.get().verdict().at_ns / NS_PER_S

    @property
    def deadline(self):
        """The deadline in `time.monotonic()` seconds, its own or one it was derived under; None without one."""
        cdef int64_t deadline = self.core.get().deadline_ns()
        return None if deadline == kNever else deadline / NS_PER_S

    def remaining(self):
        """Seconds left until the deadline, 0.0 once it has passed; None without one."""
        cdef int64_t deadline = self.core.get().deadline_ns()
        return None if deadline == kNever else max(deadline - now_ns(), 0) / NS_PER_S

    def child(self, timeout=None, deadline=None):
        """A token that is cancelled with this one, and can be cancelled alone.

        Args:
            timeout: Seconds from now, as for `CancelToken`.
            deadline: `time.monotonic()` seconds, as for `CancelToken`. This token's own deadline holds too.

        Returns:
            The new token. If this one is cancelled it is born cancelled, with the same cause and reason.

        Raises:
            TypeError: `timeout` or `deadline` is not a number.
            ValueError: `timeout` or `deadline` is NaN.
        """
        cdef vector[shared_ptr[TokenCore]] parents
        parents.push_back(self.core)
        return wrap(TokenCore.derive(parents, earliest_ns(timeout, deadline)))

    @staticmethod
    def any_of(*tokens):
        """A token that is cancelled as soon as one of `tokens` is, with its cause and reason.

        Args:
            tokens: One or more tokens; the earliest of their deadlines holds. If some are cancelled already,
                the first of those in the order given lends its cause.

        Returns:
            The new token. Cancelling it reaches none of `tokens`.

        Raises:
            TypeError: One of `tokens` is not a CancelToken.
            ValueError: No tokens were given.
        """
        cdef vector[shared_ptr[TokenCore]] parents
        if not tokens:
            raise ValueError("any_of() needs at least one token")
        for token in tokens:
            if not isinstance(token, CancelToken):
                raise TypeError(f"any_of() takes CancelTokens, not {type(token).__name__}")
            parents.push_back((<CancelToken> token).core)
        return wrap(TokenCore.derive(parents, kNever))

    def raise_if_cancelled(self):
        """Raises if the token is cancelled; does nothing while it is live.

        Raises:
            DeadlineExceeded: A deadline has passed.
            DecodeCancelled: The token was cancelled. Both carry cause and reason, and as `latency` the
                seconds since then.
        """
        cdef int64_t at
        if not self.core.get().poll():
            return
        at = self.core.get().verdict().at_ns
        cause, reason = self.cause, self.reason
        exception = DeadlineExceeded if cause is Cause.DEADLINE else DecodeCancelled
        text = f"cancelled: {cause.value} {reason!r}" if reason else f"cancelled: {cause.value}"
        raise exception(text, cause=cause, reason=reason, latency=max(now_ns() - at, 0) / NS_PER_S)

    def wait(self, timeout=None):
        """Waits, without the GIL, until the token is cancelled. Ctrl-C ends the wait on the main thread.

        Args:
            timeout: Seconds to wait at most; None or infinity for no limit.

        Returns:
            True if the token is cancelled, False if the timeout came first.

        Raises:
            TypeError: `timeout` is not a number.
            ValueError: `timeout` is NaN.
        """
        cdef int64_t until = after_ns(timeout)
        cdef int64_t now
        cdef bint cancelled
        while True:
            now = now_ns()
            with nogil:
                cancelled = self.core.get().wait_until(min(until, now + SIGNAL_INTERVAL_NS))
            if cancelled:
                return True
            if now_ns() >= until:
                return False
            PyErr_CheckSignals()

    def add_callback(self, fn):
        """Has `fn()` called once when the token is cancelled.

        It is called by the thread that cancels, or at a deadline by a daemon thread; at once, here, if the
        token is cancelled already. What it raises goes to `sys.unraisablehook`, but for a KeyboardInterrupt,
        which the main thread gets as soon as it can, as with Ctrl-C. The function is released after it has
        run. The token owns it: if the CancelToken dies, or is garbage with it, it is never called, even if
        native work or a derived token goes on.

        In a forked child, callbacks wait for their deadline only from the first `add_callback()` there on.

        Args:
            fn: A callable without arguments.

        Returns:
            A handle with which to take the callback back.

        Raises:
            TypeError: `fn` cannot be called.
        """
        cdef Listener * listener
        cdef uint64_t key, listener_id
        if not callable(fn):
            raise TypeError(f"fn must be callable, not {type(fn).__name__}")
        if self.callbacks is None:
            self.callbacks = {}
        self.last_key += 1
        key = self.last_key
        # Entered first, looked at second: a cancel that comes between is seen by at least one side, and
        # only one of them finds the entry.
        self.callbacks[key] = fn
        if self.core.get().poll():
            if self.callbacks.pop(key, None) is not None:
                call_and_report(fn)
        elif self.listener == NULL:
            listener = new Listener()
            reference = weakref.ref(self)
            Py_INCREF(reference)
            listener.token_ref = <PyObject *> reference
            self.listener = listener
            with nogil:
                listener_id = self.core.get().add_callback(on_cancel, listener)
            if listener_id == 0:
                free_listener(listener)
                self.run_callbacks()
            else:
                self.listener_id = listener_id
                if self.core.get().deadline_ns() != kNever:
                    try:
                        alarms.add(self, self.core.get().deadline_ns())
                    except BaseException:  # no thread could be started
                        self.callbacks.pop(key, None)
                        raise
        return CallbackHandle.__new__(CallbackHandle, self, key)

    cdef void run_callbacks(self) noexcept:
        cdef dict callbacks = self.callbacks
        while callbacks:
            call_and_report(callbacks.pop(next(iter(callbacks))))

    def __repr__(self):
        if self.core.get().poll():
            reason = self.reason
            text = f"cancelled: {self.cause.value} {reason!r}" if reason else f"cancelled: {self.cause.value}"
        elif self.core.get().deadline_ns() == kNever:
            text = "live"
        else:
            text = f"live, {self.remaining():.1f} s left"
        return f"<CancelToken {text}>"

    def __reduce__(self):
        raise TypeError("a CancelToken cannot be pickled or copied: it belongs to the process that made it")


@cython.final
@cython.no_gc_clear  # the cycle through a callback is broken in the token; `token` is never None
cdef class CallbackHandle:
    """A callback of a token, as `CancelToken.add_callback()` returns it. Keeps the token."""

    cdef CancelToken token
    cdef uint64_t key

    def __cinit__(self, CancelToken token not None, uint64_t key):
        self.token = token
        self.key = key

    def remove(self):
        """Takes the callback back.

        Returns:
            True if it will not be called; False if it has been called, is being called, or was removed before.
        """
        callbacks = self.token.callbacks
        return callbacks is not None and callbacks.pop(self.key, None) is not None

    @property
    def done(self):
        """True once the callback has been taken up to be called, or was removed."""
        callbacks = self.token.callbacks
        return callbacks is None or self.key not in callbacks

    def __repr__(self):
        return f"<CallbackHandle {'done' if self.done else 'pending'} of {self.token!r}>"

    def __reduce__(self):
        raise TypeError("a CallbackHandle cannot be pickled or copied: it belongs to the process that made it")


# ---- public names ----------------------------------------------------------------------------------------

cdef extern from "Python.h":
    ctypedef struct PyTypeObject:
        const char * tp_name
        unsigned long tp_flags
    unsigned long Py_TPFLAGS_HEAPTYPE

cdef list _PUBLISHED = []  # the names that types point to


def publish(cls, str module not None):
    """Has a class show the module from which it is imported, in tracebacks, `help()` and pickles.

    A compiled class cannot be told otherwise than by its C name, from which Python takes its module.
    """
    cdef PyTypeObject * compiled = <PyTypeObject *> cls
    cdef bytes name
    if compiled.tp_flags & Py_TPFLAGS_HEAPTYPE:
        cls.__module__ = module
    else:
        name = f"{module}.{cls.__name__}".encode()
        _PUBLISHED.append(name)
        compiled.tp_name = name
