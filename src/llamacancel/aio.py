"""The engine for asyncio: `async for` over a generation, and cancelling a task stops the native work.

A task that is cancelled while it waits here, in the queue, in a silent prompt or between two pieces, cancels its
request, waits until the slot is free, and goes on its way with the `CancelledError`. So `asyncio.timeout()`, task
groups and anyio's cancel scopes do what they say. Nothing here takes a thread for a request that waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import engine as _engine
from .cancel import CancelToken, Cause
from .chat import ChatDelta, ChatMessage
from .engine import (
    EngineSnapshot,
    FinishReason,
    GenerationResult,
    Handle,
    Piece,
    Registration,
    RequestState,
    RequestView,
    TokenInfo,
    Usage,
)
from .engine import Generation as _Generation
from .llama import Model, Sampler

__all__ = ["Conversation", "Engine", "Generation"]

T = TypeVar("T")

_Handle = Handle[Any]
_REASON = "the asyncio task was cancelled"
_LONG_ANSWER = 1000  # pieces from which on a part of an answer may take a millisecond to read


class _Bell:
    """Wakes an event loop: once for all the requests that have news at the same time."""

    _of_loops: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Bell]] = weakref.WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._with_news: deque[_Waiting] = deque()
        self._rung = False  # a wake-up is on its way to the loop
        self.ring = self._ring  # always the same object

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> _Bell:
        """The bell of the running loop."""
        bell = cls._of_loops.get(loop)
        if bell is None:
            bell = cls._of_loops[loop] = cls(loop)
        return bell

    def add(self, waiting: _Waiting) -> None:
        """Have it woken with the next ring. From any thread."""
        self._with_news.append(waiting)

    def _ring(self) -> None:
        loop = self._loop()
        if self._with_news and not self._rung and loop is not None:
            self._rung = True
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits any more
                loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._rung = False
        while self._with_news:
            self._with_news.popleft().wake()


class _Waiting:
    """Lets tasks of one event loop wait for news of a request.

    The request knows it, and so it must not know the request: one for which no task waits is to be forgotten.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._bell: _Bell | None = None
        self._futures: list[asyncio.Future[None]] = []
        self._told = False  # the bell has it, and will wake it

    async def until(self, work: _Handle, ready: Callable[[], bool]) -> None:
        """Waits. A task that is cancelled meanwhile ends the request first, and waits for its slot to be free."""
        try:
            await self._until(work, ready)
        except asyncio.CancelledError:
            work.cancel(_REASON)
            await self.shielded(work, lambda: work.ended)
            raise

    async def shielded(self, work: _Handle, ready: Callable[[], bool]) -> None:
        """Waits, whatever happens. What it waits for is sure to come soon."""
        with _anyio_shield():
            while not ready():
                with contextlib.suppress(asyncio.CancelledError):
                    await self._until(work, ready)

    async def _until(self, work: _Handle, ready: Callable[[], bool]) -> None:
        if ready():
            return
        work._check_process()
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop, self._bell = loop, _Bell.of(loop)
            work.add_notify(self._ring, self._bell.ring)
        elif self._loop is not loop:
            raise RuntimeError(f"{work!r} is waited for in another event loop")
        while not ready():
            future = loop.create_future()
            self._futures.append(future)
            try:
                if not ready():  # may have come before the future was there to be found
                    await future
            finally:
                self._futures.remove(future)

    def _ring(self) -> None:
        if not self._told and self._bell is not None:
            self._told = True
            self._bell.add(self)

    def wake(self) -> None:
        """Lets those who wait look again. On the event loop."""
        self._told = False
        for future in self._futures:
            if not future.done():
                future.set_result(None)


class Generation:
    """Text that is being generated. Made by `Engine.submit`.

    `async for` gives the pieces of text as they become final; `result()` waits for all of it.
    """

    def __init__(self, generation: _Generation) -> None:
        self._generation = generation
        self._waiting = _Waiting()

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        """The next piece. Raises as `lc.Generation` does at its end."""
        generation = self._generation
        await self._waiting.until(generation, lambda: generation.readable or generation.ended)
        piece = generation.poll()
        if piece is not None:
            return piece
        generation.raise_if_failed()
        raise StopAsyncIteration

    async def result(self) -> GenerationResult:
        """Wait for the end, and tell all of it. Raises as `lc.Generation.result` does."""
        await self._waiting.until(self._generation, lambda: self._generation.ended)
        return self._generation.result()

    async def wait(self) -> None:
        """Wait until it is finished and its slot is free."""
        await self._waiting.until(self._generation, lambda: self._generation.ended)

    def cancel(self, reason: str = "") -> bool:
        """Stop it. True for the first cancel of an unfinished generation."""
        return self._generation.cancel(reason)

    async def aclose(self) -> None:
        """Cancel it if it is not finished, and wait until its slot is free."""
        self._generation.cancel("closed")
        await self._waiting.shielded(self._generation, lambda: self._generation.ended)

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def poll(self) -> Piece | None:
        """The next piece if there is one now; None if not, see `finished`."""
        return self._generation.poll()

    def view(self) -> RequestView:
        """A picture of this moment."""
        return self._generation.view()

    @property
    def generation(self) -> _Generation:
        """The `lc.Generation` that this one waits for."""
        return self._generation

    @property
    def id(self) -> str:
        """Its name."""
        return self._generation.id

    @property
    def state(self) -> RequestState:
        """ "queued", "prefill", "decode" or "finished"."""
        return self._generation.state

    @property
    def finished(self) -> bool:
        """True once it has ended and all pieces were read."""
        return self._generation.finished

    @property
    def finish_reason(self) -> FinishReason | None:
        """How it ended; None while it has not."""
        return self._generation.finish_reason

    @property
    def cause(self) -> Cause | None:
        """Who cancelled it, if that is how it ended."""
        return self._generation.cause

    @property
    def reason(self) -> str:
        """The text given to `cancel()`, or ""."""
        return self._generation.reason

    @property
    def cancel_latency(self) -> float | None:
        """Seconds from the cancel to its slot being free; None if it was not cancelled."""
        return self._generation.cancel_latency

    @property
    def error(self) -> Exception | None:
        """Why it failed, or None."""
        return self._generation.error

    @property
    def stop_sequence(self) -> str | None:
        """The stop string that ended it, if one did."""
        return self._generation.stop_sequence

    @property
    def text(self) -> str:
        """The text so far."""
        return self._generation.text

    @property
    def tokens(self) -> tuple[TokenInfo, ...]:
        """The tokens of the text so far."""
        return self._generation.tokens

    @property
    def usage(self) -> Usage:
        """Tokens and seconds so far."""
        return self._generation.usage

    def __repr__(self) -> str:
        return f"<aio.{repr(self._generation)[1:]}"


class Conversation:
    """An answer that is being written. Made by `Engine.chat`; `async for` gives its deltas."""

    def __init__(self, conversation: _engine.Conversation) -> None:
        self._conversation = conversation
        self._generation = Generation(conversation.generation)
        self._deltas: deque[ChatDelta] = deque()
        self._ended = False

    def __aiter__(self) -> AsyncIterator[ChatDelta]:
        return self

    async def __anext__(self) -> ChatDelta:
        """The next delta. Raises as `lc.Conversation` does."""
        while not self._deltas:
            if self._ended:
                raise StopAsyncIteration
            try:
                piece = await self._generation.__anext__()
            except StopAsyncIteration:
                self._ended = True
                self._deltas += await self._read(self._conversation.end)
            else:
                self._deltas += await self._read(functools.partial(self._conversation.take, piece))
        return self._deltas.popleft()

    async def _read(self, read: Callable[[], list[ChatDelta]]) -> list[ChatDelta]:
        """Reads on: beside the event loop where that may take some milliseconds."""
        generation = self._generation.generation
        if len(generation._work.pieces) < _LONG_ANSWER:
            return read()
        try:
            return await _beside(generation._token, read)
        except asyncio.CancelledError:
            await self._generation.aclose()
            raise

    async def result(self) -> ChatMessage:
        """Wait for the end, and give the message. Raises as `lc.Conversation.result` does."""
        async for _ in self:
            pass
        return self.message

    def cancel(self, reason: str = "") -> bool:
        """Stop it. True for the first cancel of an unfinished one."""
        return self._conversation.cancel(reason)

    async def aclose(self) -> None:
        """Cancel it if it is not finished, and wait until its slot is free."""
        await self._generation.aclose()

    async def __aenter__(self) -> Conversation:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def generation(self) -> Generation:
        """The text below it."""
        return self._generation

    @property
    def message(self) -> ChatMessage:
        """The message as far as it was read."""
        return self._conversation.message

    @property
    def id(self) -> str:
        """Its name."""
        return self._conversation.id

    @property
    def finish_reason(self) -> str | None:
        """As for `lc.Conversation`."""
        return self._conversation.finish_reason

    def __repr__(self) -> str:
        return f"<aio.{repr(self._conversation)[1:]}"


async def _beside(token: CancelToken, fn: Callable[..., T], /, *args: Any, **named: Any) -> T:
    """What a function gives that runs in a thread, under a token that a cancelled task cancels."""
    done = asyncio.get_running_loop().run_in_executor(None, functools.partial(fn, *args, **named))
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        token.cancel(_REASON)
        with _anyio_shield():
            while not done.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([done])
        done.exception()  # is known
        raise


class Engine:
    """An `lc.Engine` for asyncio.

    Args:
        engine: The engine; or a model, of which one is made with the parameters that follow. One that was made here is
            closed at the end of `async with`.
        parameters: As for `lc.Engine`.
    """

    def __init__(self, engine: _engine.Engine | Model, **parameters: Any) -> None:
        if isinstance(engine, _engine.Engine):
            if parameters:
                raise TypeError(f"an engine that is there already takes no {', '.join(parameters)}")
            self._engine, self._ours = engine, False
        else:
            self._engine, self._ours = _engine.Engine(engine, **parameters), True

    @property
    def engine(self) -> _engine.Engine:
        """The `lc.Engine`."""
        return self._engine

    def submit(
        self,
        prompt: str | ArrayLike,
        *,
        max_tokens: int | None = None,
        sampler: Sampler | None = None,
        timeout: float | None = None,
        token: CancelToken | None = None,
        priority: int = 0,
        stop: str | Iterable[str] = (),
        stop_tokens: Iterable[int] = (),
        shown_tokens: Iterable[int] = (),
        logprobs: int | None = None,
        request_id: str | None = None,
    ) -> Generation:
        """Queue a prompt to be continued, or refuse it at once. As `lc.Engine.submit`.

        A text is turned into tokens at once, while the event loop waits: give it to `tokenize` first if it is long.
        """
        return Generation(
            self._engine.submit(
                prompt,
                max_tokens=max_tokens,
                sampler=sampler,
                timeout=timeout,
                token=token,
                priority=priority,
                stop=stop,
                stop_tokens=stop_tokens,
                shown_tokens=shown_tokens,
                logprobs=logprobs,
                request_id=request_id,
            )
        )

    async def tokenize(
        self, text: str, *, timeout: float | None = None, token: CancelToken | None = None
    ) -> NDArray[np.int32]:
        """The tokens of a text, for `submit`: made in a thread, while the event loop goes on.

        Args:
            text: The text.
            timeout: Seconds that it may take.
            token: Cancels it, with others perhaps.

        Raises:
            DecodeCancelled: If `token` was cancelled, or the time over.
            ClosedError: If the engine is closed.
            ValueError: As `Model.tokenize`.
        """
        self._engine._check_open()
        own = _engine.token_of(token, timeout)
        return await _beside(own, self._engine.model.tokenize, text, token=own)

    async def chat(
        self,
        messages: Iterable[Mapping[str, Any]],
        *arguments: Any,
        timeout: float | None = None,
        token: CancelToken | None = None,
        **named: Any,
    ) -> Conversation:
        """Queue a conversation to be answered. As `lc.Engine.chat`; it is rendered in a thread."""
        own = _engine.token_of(token, timeout)
        return Conversation(await _beside(own, self._engine.chat, messages, *arguments, token=own, **named))

    async def embed(
        self,
        prompt: str | ArrayLike,
        *,
        timeout: float | None = None,
        token: CancelToken | None = None,
        priority: int = 0,
        request_id: str | None = None,
    ) -> NDArray[np.float32]:
        """The embedding of a text, float32 of shape (n_embd,). As `lc.Engine.embed`; a long text is turned into tokens
        in a thread, as with `tokenize`.
        """
        own = _engine.token_of(token, timeout)
        if isinstance(prompt, str) and len(prompt) >= _engine.LONG_TEXT:
            prompt = await self.tokenize(prompt, token=own)
        embedding = self._engine.embed(prompt, token=own, priority=priority, request_id=request_id)
        await _Waiting().until(embedding, lambda: embedding.ended)
        return embedding.result()

    def cancel(self, request_id: str, reason: str = "") -> bool:
        """Cancel an unfinished request by its id. False if there is none."""
        return self._engine.cancel(request_id, reason)

    def snapshot(self) -> EngineSnapshot:
        """Slots, queue and requests at this moment."""
        return self._engine.snapshot()

    def add_listener(self, fn: Callable[[RequestView], object]) -> Registration:
        """As `lc.Engine.add_listener`: `fn` is not called by the event loop's thread alone."""
        return self._engine.add_listener(fn)

    async def close(self, drain: bool = True, timeout: float | None = 30.0) -> None:
        """Refuse new work at once, and stop. As `lc.Engine.close`; when the task is cancelled, it drains no longer."""
        loop = asyncio.get_running_loop()
        closed = loop.create_future()

        def told(error: BaseException | None) -> None:
            if not closed.done():
                closed.set_result(None) if error is None else closed.set_exception(error)

        def close() -> None:
            error: BaseException | None = None
            try:
                self._engine.close(drain, timeout)
            except BaseException as problem:
                error = problem
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(told, error)

        threading.Thread(target=close, name="llamacancel-close", daemon=True).start()
        try:
            await asyncio.shield(closed)
        except asyncio.CancelledError:
            self._engine.stop()
            with _anyio_shield():
                while not closed.done():
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.shield(closed)
            raise

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._ours:
            await self.close(drain=error is None)

    def __repr__(self) -> str:
        return f"<aio.Engine of {self._engine!r}>"


def _anyio_shield() -> contextlib.AbstractContextManager[Any]:
    """Keeps anyio from telling a task at every turn of the loop that it is cancelled, which we know."""
    anyio = sys.modules.get("anyio")
    if anyio is None:
        return contextlib.nullcontext()
    return anyio.CancelScope(shield=True)  # type: ignore[no-any-return]
