"""Runs what an HTTP request asks for and answers it, whole or as a stream, while watching whether its client is there.

Each request has a group from its arrival on, with a token that reaches all of it: the reading of its text, too.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import anyio.to_thread
from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ... import aio
from ...engine import LONG_TEXT, Piece
from ...errors import ChatError, ClosedError, DecodeCancelled, QueueFullError
from ...llama import Sampler
from ..errors import ApiError, cancelled, time_over
from ..service import Group, Service
from ..sse import DONE, EventStream, event, json_of

__all__ = ["Choice", "Form", "GenerationResponse", "Job", "failure", "refusals"]

MANY_LOGPROBS = 2000
"""Log probabilities from which on an answer is written beside the event loop: it takes some milliseconds."""
LONG_ANSWER = 16_384
"""Characters from which on it is read there: so do the arguments of a call."""


@dataclass
class Job:
    """What the engine is to do: each prompt as often as there are samplers for it, in this order."""

    prompts: Sequence[Sequence[int]]
    samplers: Sequence[Sampler]
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    shown_tokens: Iterable[int] = ()
    logprobs: int | None = None
    priority: int = 0

    @property
    def each(self) -> int:
        """Answers for each prompt."""
        return len(self.samplers) // len(self.prompts)


class Choice(Protocol):
    """One of the answers of a request, in the form of its endpoint."""

    def feed(self, piece: Piece) -> Iterable[bytes]:
        """The events of a piece of text."""

    def end(self, finish_reason: str) -> Iterable[bytes]:
        """The last events."""

    def whole(self, text: str, tokens: Sequence[Any], finish_reason: str) -> dict[str, Any]:
        """The answer in one."""


class Form(Protocol):
    """How an endpoint answers."""

    endpoint: str
    include_usage: bool

    def choice(self, index: int) -> Choice:
        """The form of an answer."""

    def answer(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        """The body of all answers."""

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        """The event that tells the usage of a stream."""


@contextlib.contextmanager
def refusals(service: Service) -> Iterator[None]:
    """Tells a refusal of the engine's as what it is over HTTP."""
    try:
        yield
    except QueueFullError as error:
        headers = {"retry-after": str(service.retry_after())}
        raise ApiError(429, str(error), code="queue_full", headers=headers) from error
    except ClosedError as error:
        raise unavailable(error) from error
    except ValueError as error:
        raise ApiError(400, str(error)) from error


def usage_of(generations: Sequence[aio.Generation], each: int) -> dict[str, Any]:
    """The usage of a request: a prompt with several answers counts once."""
    firsts = [generation.usage for generation in generations[::each]]
    prompt = sum(usage.prompt_tokens for usage in firsts)
    completion = sum(generation.usage.completion_tokens for generation in generations)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in firsts)},
    }


@dataclass
class _Run:
    """The generations of a request and the forms of their answers."""

    group: Group
    job: Job
    generations: list[aio.Generation] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)


class GenerationResponse(Response):
    """Prepares and submits a job when it is sent, and answers with what comes of it.

    Args:
        service: The app's.
        request: The HTTP request.
        prepare: Tells what to generate, under the request's token.
        form: How to tell it.
        timeout: Seconds for all of it.
        stream: As events, or whole.
    """

    def __init__(
        self,
        service: Service,
        request: Request,
        prepare: Callable[[Group], Awaitable[Job]],
        form: Form,
        *,
        timeout: float | None,
        stream: bool,
    ) -> None:
        super().__init__()
        self._service, self._request, self._prepare, self._form = service, request, prepare, form
        self._timeout, self._stream = timeout, stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(OSError):
            async with self._service.group(self._request, self._form.endpoint, self._timeout) as group:
                run = _Run(group, await self._prepare(group))
                group.check()
                with refusals(self._service):
                    await self._submit(run)
                await (self._send_stream(run, send) if self._stream else self._send_whole(run, send))

    async def _submit(self, run: _Run) -> None:
        """Queue every generation, or none: whoever is refused takes those before it along."""
        job = run.job
        several = len(job.samplers) > 1
        for index, sampler in enumerate(job.samplers):
            if index and len(job.prompts[index // job.each]) >= LONG_TEXT:
                await asyncio.sleep(0)  # a long prompt is copied, for each of its answers
            generation = self._service.aio.submit(
                job.prompts[index // job.each],
                max_tokens=job.max_tokens,
                sampler=sampler,
                token=run.group.token,
                priority=job.priority,
                stop=job.stop,
                shown_tokens=job.shown_tokens,
                logprobs=job.logprobs,
                request_id=f"{run.group.name}.{index}" if several else run.group.name,
            )
            run.generations.append(generation)
            run.group.works.append(generation)
            run.choices.append(self._form.choice(index))
        run.group.arrived.set()

    # -- whole

    async def _send_whole(self, run: _Run, send: Send) -> None:
        for generation in run.generations:
            with contextlib.suppress(Exception):  # told below
                await generation.result()
        if run.group.disconnected:
            return
        error = failure(run.generations, partial=True)
        if error is not None:
            raise error
        usage = usage_of(run.generations, run.job.each)

        def make() -> bytes:
            choices = [
                choice.whole(generation.text, generation.tokens, generation.finish_reason or "error")
                for choice, generation in zip(run.choices, run.generations, strict=True)
            ]
            return json_of(self._form.answer(choices, usage), yielding=is_long).encode("utf-8", "replace")

        n_chars = sum(len(generation.text) for generation in run.generations)
        told = 0 if run.job.logprobs is None else usage["completion_tokens"] * (1 + run.job.logprobs)
        is_long = told >= MANY_LOGPROBS or n_chars >= LONG_ANSWER
        try:
            data = await anyio.to_thread.run_sync(make) if is_long else make()
        except ChatError as failed:
            raise failed_with(failed) from failed
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data})

    # -- stream

    async def _send_stream(self, run: _Run, send: Send) -> None:
        stream = EventStream(send)
        await stream.start()
        try:
            if len(run.generations) == 1:
                await self._pump(stream, run.generations[0], run.choices[0])
            else:
                await _all_of(
                    [
                        asyncio.create_task(self._pump(stream, generation, choice))
                        for generation, choice in zip(run.generations, run.choices, strict=True)
                    ]
                )
            last = b""
            if self._form.include_usage:
                last = self._form.usage_event(usage_of(run.generations, run.job.each))
            await stream.end(last + DONE)
        finally:
            stream.stop()

    async def _pump(self, stream: EventStream, generation: aio.Generation, choice: Choice) -> None:
        """Send the pieces of one generation as they come, and how it ended."""
        error: Exception | None = None
        n_chars = 0
        try:
            async for piece in generation:
                pieces = [piece]
                while (more := generation.poll()) is not None:
                    pieces.append(more)
                n_chars += sum(map(len, pieces))

                def read(pieces: list[Piece] = pieces) -> list[bytes]:
                    return [each for piece in pieces for each in choice.feed(piece)]

                events = await anyio.to_thread.run_sync(read) if n_chars >= LONG_ANSWER else read()
                if events:
                    await stream.write(b"".join(events))
        except DecodeCancelled:
            pass
        except Exception as failed:
            error = failed
            generation.cancel(f"the answer cannot be told: {failed}")
        reason = "error" if error is not None else generation.finish_reason or "error"
        events = []
        try:
            ends: Callable[[], list[bytes]] = lambda: list(choice.end(reason))  # noqa: E731
            events = await anyio.to_thread.run_sync(ends) if n_chars >= LONG_ANSWER else ends()
        except ChatError as failed:
            error, reason = failed, "error"
        if reason == "error":
            events.append(event(failed_with(error).body))
        await stream.write(b"".join(events))


def failed_with(error: Exception | None) -> ApiError:
    """What to tell of a generation that failed: what its request wanted cannot be done, or the server cannot do it."""
    if isinstance(error, ClosedError):
        return unavailable(error)
    words = f"{error}" or type(error).__name__
    if isinstance(error, (ValueError, TypeError)):
        return ApiError(400, words, code="generation_failed")
    return ApiError(500, f"the generation failed: {words}", code="generation_failed")


def unavailable(error: ClosedError) -> ApiError:
    """What to tell where the engine takes no work: that it failed, and of what, or that it is being closed."""
    if error.__cause__ is not None:
        return ApiError(503, str(error), code="engine_failed")
    return ApiError(503, "the server is shutting down", code="shutting_down")


async def _all_of(tasks: list[asyncio.Task[None]]) -> None:
    """Wait for all tasks; if one fails or this one is cancelled, for the others' end, too."""
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


class _Ended(Protocol):
    """A generation or embedding that has ended."""

    @property
    def finish_reason(self) -> str | None: ...
    @property
    def error(self) -> Exception | None: ...
    @property
    def reason(self) -> str: ...


def failure(works: Sequence[_Ended], *, partial: bool) -> ApiError | None:
    """What to answer if a request did not come to its end; None if it can be answered.

    Args:
        works: What it had the engine do, ended.
        partial: Whether there is an answer if only some of it was cancelled.
    """
    reasons = [work.finish_reason for work in works]
    if "error" in reasons:
        return failed_with(works[reasons.index("error")].error)
    if "shutdown" in reasons:
        return ApiError(503, "the server shut down before the answer was complete", code="shutting_down")
    if "deadline" in reasons:
        return time_over()
    given_up = [work for work in works if work.finish_reason == "cancelled"]
    if len(given_up) == len(works) or (given_up and not partial):
        return cancelled(given_up[0].reason)
    return None
