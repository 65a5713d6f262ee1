"""The context for embeddings, which is made beside the engine's thread: generations do not wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ..cancel import CancelToken, for_a_reader
from ..llama import Batch, Context, is_parked
from .scheduler import Request

__all__ = ["Embedder"]


class Embedder:
    """Makes the context for one request, on a thread of its own and under the request's token.

    What goes wrong ends that request alone, and the next one has it made again. All methods are the engine's thread's.

    Args:
        make: Makes it, given a token.
        tell: Called by the thread that makes it, once that has ended.

    Attributes:
        context: The context; None as long as there is none.
        batch: One that fits it.
    """

    def __init__(self, make: Callable[[CancelToken | None], Context], tell: Callable[[], object]) -> None:
        self.context: Context | None = None
        self.batch: Batch | None = None
        self._make = make
        self._tell = tell
        self._closing = CancelToken()
        self._thread: threading.Thread | None = None
        self._for: Request | None = None
        self._made: tuple[Context, Batch] | BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether it is being made, or was made and not taken."""
        return self._for is not None

    def begin(self, request: Request) -> None:
        """Have it made for `request`."""
        self._for = request
        try:
            token = CancelToken.any_of(request.owner.token, self._closing)
            thread = threading.Thread(target=self._main, args=(token,), name="llamacancel-embedder", daemon=True)
            thread.start()
            self._thread = thread
        except BaseException as error:  # no more threads, say
            self._made = error

    def _main(self, token: CancelToken) -> None:
        try:
            context = self._make(token)
            try:
                self._made = context, Batch(context.n_batch)
            except BaseException:
                context.close()
                raise
        except BaseException as error:
            self._made = error
        finally:
            self._tell()

    def take(self) -> tuple[Request, Exception] | None:
        """Take what was made, if something was. If it could not be made: for whom, and why."""
        made, request = self._made, self._for
        if made is None or request is None:
            return None
        self._made = self._for = None
        if isinstance(made, BaseException):
            return request, for_a_reader(made)
        self.context, self.batch = made
        return None

    def drop(self) -> None:
        """Close the context; another one is made when it is needed."""
        context, self.context = self.context, None
        if context is not None:
            context.close()

    def close(self) -> None:
        """Close the context. One that is being made is given up, and its thread waited for unless the exit holds it."""
        self._closing.cancel("the engine closes")
        while (thread := self._thread) is not None and thread.is_alive() and not is_parked(thread.ident or 0):
            thread.join(0.1)
        self.take()
        self.drop()
