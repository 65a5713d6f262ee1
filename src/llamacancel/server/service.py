"""What the endpoints of an app share: the engine, its model's name and template, and the requests on their way."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Annotated, Protocol

import anyio
from fastapi import Header, Request
from pydantic import WithJsonSchema

from .. import aio
from ..cancel import CancelToken, Cause
from ..chat import Chat
from ..engine import Engine, RequestView
from ..errors import ChatError
from ..llama import Model
from .disconnect import watched
from .errors import NO_RETRY, ApiError, cancelled, time_over
from .ops.metrics import Metrics

__all__ = ["Group", "Service", "TimeoutHeader", "Work"]


TimeoutHeader = Annotated[
    float | None,
    Header(
        alias="X-Request-Timeout", gt=0, le=1e6, allow_inf_nan=False, description="Seconds, as `timeout` in the body."
    ),
    WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "maximum": 1e6}),
]


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks.

    Attributes:
        key: The digest of its key; empty where it has none.
        operator: Whether it may cancel everybody's requests.
    """

    key: bytes = b""
    operator: bool = False


NOBODY = Asker()
"""Who has no key: anyone, as far as is known."""


class Work(Protocol):
    """A generation or an embedding of the engine."""

    @property
    def id(self) -> str: ...
    def cancel(self, reason: str = "") -> bool: ...
    async def wait(self) -> object: ...
    def view(self) -> RequestView: ...


@dataclass
class Group:
    """An HTTP request on its way, and what it has the engine do: cancelled together, under the request's id.

    Attributes:
        id: What its client calls it: enough to cancel it, and told to its client alone.
        name: What the engine, and all who look at it, call it.
        owner: Whose it is.
        over: Set once it has ended, and another one may have its id.
        token: The parent of all that is done for it, from its arrival on; it has the request's deadline.
        size: Bytes of its body, which bound the work that making prompts of it can be.
        preparing: Who may make prompts in a thread at the same time.
        works: What the engine does.
        arrived: Set once the engine has all of it, or will get no more.
        disconnected: The client hung up.
    """

    id: str
    name: str
    owner: Asker
    endpoint: str
    token: CancelToken
    size: int
    preparing: anyio.CapacityLimiter
    works: list[Work] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    disconnected: bool = False

    def cancel(self, reason: str = "") -> bool:
        """Cancel all that is not finished; whether there was any.

        The last ones first: they may be waiting, and are not to be given a slot that the first ones leave.
        """
        cancelled = [work.cancel(reason) for work in reversed(self.works)]
        was_first = self.token.cancel(reason)
        return any(cancelled) or (was_first and not self.arrived.is_set())

    def hang_up(self) -> None:
        """Cancel because the client is gone."""
        self.disconnected = True
        self.cancel("the client hung up")

    async def settle(self) -> None:
        """Return when all is finished and the slots are free."""
        await self.arrived.wait()
        for work in self.works:
            await work.wait()

    def check(self) -> None:
        """Do nothing, unless the token was cancelled.

        Raises:
            ApiError: 408, if the time is over; 499, if the request was cancelled, by its client's hang-up perhaps.
        """
        if not self.token.cancelled:
            return
        if self.token.cause is Cause.DEADLINE:
            raise time_over()
        raise cancelled(self.token.reason or "")

    @property
    def cancel_latency(self) -> float | None:
        """Seconds from the cancel to its slots being free; of one that had none yet, to its being given up: now."""
        if self.works:
            views = [work.view() for work in self.works]
            return max((view.cancel_latency for view in views if view.cancel_latency is not None), default=None)
        since = self.token.cancelled_at
        return None if since is None else max(time.monotonic() - since, 0.0)


class Service:
    """The state of an app.

    Args:
        engine: Does the work.
        model_name: What answers call the model.
        chat_template: A template to use in place of the model's own.
        request_timeout: Seconds for each request; those that ask for less get less.
        drain_timeout: Seconds that requests on their way have when the app shuts down.
        close_engine: Close the engine then.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        model_name: str,
        chat_template: str | None = None,
        request_timeout: float | None = None,
        drain_timeout: float = 30.0,
        close_engine: bool = True,
    ) -> None:
        self.engine = engine
        self.aio = aio.Engine(engine)
        self.model: Model = engine.model
        self.model_name = model_name
        self.created = int(time.time())
        self.request_timeout = request_timeout
        self.drain_timeout = drain_timeout
        self.metrics = Metrics(engine.snapshot)
        self.groups: dict[tuple[Asker, str], Group] = {}
        self.names: dict[str, Group] = {}
        self.name_of: Callable[[str], str] = lambda _: f"req-{secrets.token_hex(8)}"
        self.parsing = anyio.CapacityLimiter(1)
        self.preparing = anyio.CapacityLimiter(max(2, (os.cpu_count() or 1) // 2))
        self.closing = False
        self.readers: dict[Callable[[], None], None] = {}
        self._on_close: set[Callable[[], object]] = set()
        self._close_engine = close_engine
        self._close_task: asyncio.Task[None] | None = None
        self._chat_error: ChatError | None = None
        self._chat: Chat | None = None
        try:
            self._chat = Chat(self.model, chat_template)
        except ChatError as error:
            if chat_template is not None:
                raise
            self._chat_error = error

    @property
    def chat(self) -> Chat:
        """What renders conversations.

        Raises:
            ApiError: If the model's own template cannot be parsed.
        """
        if self._chat is None:
            raise ApiError(400, f"this model's chat cannot be used: {self._chat_error}", code="chat_template_error")
        return self._chat

    def timeout(self, body: float | None, header: float | None) -> float | None:
        """The seconds that a request has: the least of what its body, its header and the server say."""
        return min((value for value in (body, header, self.request_timeout) if value is not None), default=None)

    @contextlib.asynccontextmanager
    async def group(self, request: Request, endpoint: str, timeout: float | None) -> AsyncIterator[Group]:
        """A group for a request, known under its id for as long as it lasts, and cancelled when its client hangs up.

        It ends when the slots are free again, however it ends. The id of one that was cancelled is waited for: who
        tries again is not to be told that its first attempt has not ended yet.

        Args:
            request: The request; its body has been read.
            endpoint: What it asks.
            timeout: Seconds that it has from now on.

        Raises:
            ApiError: 409, if a request with this id is on its way.
        """
        token = CancelToken(timeout=timeout)
        owner: Asker = request.state.asker
        key = owner, request.state.request_id
        while (other := self.groups.get(key)) is not None:
            if not other.token.cancelled:
                raise ApiError(
                    409,
                    f"a request with the id {key[1]} is not finished yet",
                    param="X-Request-Id",
                    code="duplicate_request_id",
                    headers=NO_RETRY,
                )
            await other.over.wait()
        name = self.name_of(key[1])
        group = Group(key[1], name, owner, endpoint, token, request.state.body_size, self.preparing)
        self.groups[key] = self.names[name] = group
        try:
            async with watched(request.receive, group.hang_up):
                yield group
        except OSError:  # some servers tell a hang-up so when something is sent
            group.hang_up()
            raise
        finally:
            group.cancel("the request was given up")
            group.arrived.set()
            try:
                await group.settle()
                self.count(group)
            finally:
                del self.groups[key], self.names[name]
                group.over.set()

    def find(self, asker: Asker, request_id: str) -> tuple[Group, Work | None] | None:
        """The request that has an id, and that somebody may cancel; and its work, if it is one of several's id.

        A request is found by what its client calls it, for who asks with the same key. The name that is shown of it
        will do for the operator, and for the holder of the key that it came with.
        """
        for whole, index in ((request_id, ""), request_id.rpartition(".")[::2]):
            group = self.groups.get((asker, whole))
            if group is None and self.may_cancel(asker, whole):
                group = self.names.get(whole)
            if group is None:
                continue
            if not index:
                return group, None
            work = next((work for work in group.works if work.id == f"{group.name}.{index}"), None)
            return None if work is None else (group, work)
        return None

    def may_cancel(self, asker: Asker, name: str) -> bool:
        """Whether somebody may cancel the request that is shown under a name."""
        if asker.operator:
            return True
        group = self.names.get(name) or self.names.get(name.rpartition(".")[0])
        return group is not None and group.owner == asker != NOBODY

    def count(self, group: Group) -> None:
        """Count what became of a group that has ended."""
        views = [work.view() for work in group.works]
        if group.disconnected and (not views or any(view.finish_reason == "cancelled" for view in views)):
            self.metrics.disconnected(group.endpoint)
        for view in views:
            self.metrics.ended(group.endpoint, view)

    def retry_after(self) -> int:
        """Whole seconds after which the queue, as it is now, will probably have been served: 1 to 120."""
        now = self.engine.snapshot()
        seconds = [
            view.finished_at - view.started_at
            for view in now.recent[-32:]
            if view.started_at is not None and view.finished_at is not None
        ]
        mean = sum(seconds) / len(seconds) if seconds else 0.0
        return min(max(math.ceil(mean * len(now.queue) / max(len(now.slots), 1)), 1), 120)

    def on_close(self, call: Callable[[], object]) -> Callable[[], None]:
        """Have `call()` called when the app begins to shut down; returns what takes it back."""
        self._on_close.add(call)
        return lambda: self._on_close.discard(call)

    def cancel_all(self, reason: str) -> None:
        """Cancel every request, those of the engine that came from elsewhere, too."""
        for group in self.groups.values():
            group.cancel(reason)
        now = self.engine.snapshot()
        for view in (*now.queue, *now.active):
            self.engine.cancel(view.id, reason)

    async def close(self) -> None:
        """Refuse new requests, let those on their way finish in time, and close the engine if it is the app's."""
        if self._close_task is None:
            self.closing = True
            for call in list(self._on_close):
                call()
            self._close_task = asyncio.create_task(self._close())
        await asyncio.shield(self._close_task)

    async def _close(self) -> None:
        if self._close_engine:
            await self.aio.close(drain=True, timeout=self.drain_timeout)
