"""Fake servers: a right one, and others that each have one bug that real servers had."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import zlib
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from llamacancel.conformance.wire import Target

WORD = 0.002  # seconds of prefill for a word
TOKEN = 0.04  # seconds of generation for a token
PADDING = "f" * 400  # of each event, so that few of them fill a connection
CHUNK = 24  # words that are computed in one piece


@dataclass
class Job:
    """A request in the server."""

    id: str
    words: list[str]
    body: dict[str, Any]
    writer: asyncio.StreamWriter
    deadline: float | None
    phase: str = "queued"
    stop: str = ""  # why it is to stop, once it is
    dropped: bool = False  # whether its connection is cut instead of an end
    salt: str = ""  # changes its text, as a damaged memory does
    slot: Slot | None = None
    tokens: int = 0
    cached: int = 0
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self, why: str, *, dropped: bool = False) -> None:
        self.stop, self.dropped = self.stop or why, self.dropped or dropped
        self.wake.set()


@dataclass
class Slot:
    """A place to compute in, with the prompt that it remembers."""

    kept: list[str] = field(default_factory=list)
    salt: str = ""
    job: Job | None = None


class Server:
    """A right server: a hang-up reaches its own request only, within a chunk, and keeps what was computed."""

    n_slots = 2
    context = 3000
    word = WORD
    ids = True
    deletes = True
    deadlines = True
    usage = True
    chat = True
    completions = True
    send_buffer = 0  # of a connection, in bytes; 0 for the system's choice

    def __init__(self) -> None:
        self.slots = [Slot() for _ in range(self.n_slots)]
        self.queue: deque[Job] = deque()
        self.jobs: dict[str, Job] = {}
        self.hang_ups = 0
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._freed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Target]:
        """Serve on a free port of the loopback."""
        sock = socket.socket()
        if self.send_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.send_buffer)
        sock.bind(("127.0.0.1", 0))
        self._server = await asyncio.start_server(self._connected, sock=sock)
        try:
            yield Target("127.0.0.1", sock.getsockname()[1])
        finally:
            self._server.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    # What the bugs change

    def hung_up(self, job: Job) -> None:
        """A client's connection is gone."""
        job.end("client", dropped=True)

    async def after_prompt(self, job: Job, done: int) -> None:
        """The prompt's first `done` words are computed, or it was given up there."""
        assert job.slot is not None
        job.slot.kept = job.words[:done]

    def deadline_passed(self, job: Job) -> None:
        job.end("deadline")

    def cancelled_by_id(self, job: Job) -> None:
        job.end("cancelled")

    async def send(self, job: Job, data: bytes) -> None:
        job.writer.write(data)
        drained = asyncio.ensure_future(job.writer.drain())
        woken = asyncio.ensure_future(job.wake.wait())
        await asyncio.wait([drained, woken], return_when=asyncio.FIRST_COMPLETED)
        for future in (drained, woken):
            future.cancel()
        await asyncio.gather(drained, woken, return_exceptions=True)

    def token(self, job: Job) -> str:
        assert job.slot is not None
        seed = f"{' '.join(job.words)}|{job.tokens}|{job.salt}|{job.slot.salt}"
        return f" {zlib.crc32(seed.encode()) % 100_000}"

    def refused(self, body: dict[str, Any]) -> str | None:
        """Why a request is refused, if it is."""
        return None

    def full(self) -> bool:
        """Whether a request is turned away."""
        return False

    def free(self, job: Job) -> None:
        """Give its slot back."""
        if job.slot is not None:
            job.slot.job = None

    def others(self, job: Job, *phases: str) -> list[Job]:
        return [other for other in self.jobs.values() if other is not job and other.phase in phases]

    # The server

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        writer.transport.set_write_buffer_limits(0)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, path, _ = head.split(" ", 2)
            length = next((int(line[15:]) for line in head.lower().split("\r\n") if line[:15] == "content-length:"), 0)
            body = json.loads(await reader.readexactly(length)) if length else {}
            await self._answer(method, path, body, reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    async def _answer(
        self, method: str, path: str, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if path == "/v1/models":
            await _whole(writer, 200, {"data": [{"id": "fake"}]})
        elif method == "DELETE" and self.deletes:
            job = self.jobs.get(path.rpartition("/")[2])
            if job is not None and not job.stop:
                self.cancelled_by_id(job)
            await _whole(writer, 404 if job is None else 200, {"cancelled": job is not None})
        elif (path == "/v1/completions" and self.completions) or (path == "/v1/chat/completions" and self.chat):
            text = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
            now = asyncio.get_running_loop().time()
            deadline = now + body["timeout"] if self.deadlines and "timeout" in body else None
            job = Job(f"job-{next(self._numbers)}", text.split(), body, writer, deadline)
            if (said := self.refused(body)) is not None:
                await _whole(writer, 400, {"error": {"message": said}})
                return
            if self.full():
                await _whole(writer, 503, {"error": {"message": "all slots are taken"}})
                return
            if len(job.words) + body["max_tokens"] > self.context:
                await _whole(writer, 400, {"error": {"message": "the prompt is too long"}})
                return
            await self._work(job, reader)
        else:
            await _whole(writer, 404, {"error": {"message": "there is no such thing here"}})

    async def _work(self, job: Job, reader: asyncio.StreamReader) -> None:
        self.jobs[job.id] = job
        watch = asyncio.ensure_future(self._watch(job, reader))
        try:
            await self._compute(job)
            if not job.dropped:
                await self._end(job)
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            self.free(job)
            if job in self.queue:
                self.queue.remove(job)
            job.phase = "over"
            self._freed.set()
            del self.jobs[job.id]

    async def _watch(self, job: Job, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while await reader.read(1000):
                pass
        if job.phase != "ending":
            self.hang_ups += 1
            self.hung_up(job)

    async def _compute(self, job: Job) -> None:
        self.queue.append(job)
        while job.slot is None:
            if job.stop:
                return
            free = [slot for slot in self.slots if slot.job is None]
            if free and self.queue[0] is job:
                self.queue.popleft()
                job.slot = max(free, key=lambda slot: _shared(slot.kept, job.words))
                job.slot.job = job
                self._freed.set()
            else:
                self._freed.clear()
                await self._until(job, self._freed.wait())
        job.phase = "prefill"
        done = 0 if job.body.get("cache_prompt") is False else _shared(job.slot.kept, job.words[:-1])
        job.cached = done
        while done < len(job.words) and not job.stop:
            step = min(CHUNK, len(job.words) - done)
            await self._pass(job, step * self.word)
            done += 0 if job.stop else step
        await self.after_prompt(job, done)
        if job.stop:
            return
        job.phase = "generation"
        text = ""
        if job.body.get("stream"):
            await self._head(job)
        while job.tokens < job.body["max_tokens"] and not job.stop:
            await self._pass(job, TOKEN)
            if not job.stop:
                piece = self.token(job)
                text += piece
                job.tokens += 1
                if job.body.get("stream"):
                    await self.send(job, _event(_choice(job, piece, None)))
        job.body["text"] = text

    async def _pass(self, job: Job, seconds: float) -> None:
        """Compute for a time; a stop comes through after it, a deadline between two."""
        await asyncio.sleep(seconds)
        if job.deadline is not None and asyncio.get_running_loop().time() > job.deadline and not job.stop:
            self.deadline_passed(job)

    async def _until(self, job: Job, waiting: Any) -> None:
        futures = [asyncio.ensure_future(waiting), asyncio.ensure_future(job.wake.wait())]
        await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        for future in futures:
            future.cancel()
        await asyncio.gather(*futures, return_exceptions=True)

    async def _head(self, job: Job) -> None:
        lines = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n"
        lines += f"x-request-id: {job.id}\r\n" if self.ids else ""
        await self.send(job, f"{lines}transfer-encoding: chunked\r\n\r\n".encode())

    async def _end(self, job: Job) -> None:
        reason = job.stop or "length"
        usage = {
            "prompt_tokens": len(job.words),
            "completion_tokens": job.tokens,
            "prompt_tokens_details": {"cached_tokens": job.cached},
        }
        if not job.body.get("stream"):
            job.phase = "ending"
            found = _choice(job, job.body.get("text", ""), reason)
            await _whole(job.writer, 200, {**found, "usage": usage} if self.usage else found)
            return
        if job.phase != "generation":
            await self._head(job)
        job.wake.clear()
        job.phase = "ending"
        tail = _event(_choice(job, "", reason))
        if self.usage:
            tail += _event({"choices": [], "usage": usage})
        await self.send(job, tail + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


def _shared(kept: list[str], words: list[str]) -> int:
    return next((i for i, (a, b) in enumerate(zip(kept, words, strict=False)) if a != b), min(len(kept), len(words)))


def _choice(job: Job, text: str, reason: str | None) -> dict[str, Any]:
    if "messages" in job.body:
        return {
            "choices": [{"delta" if job.body.get("stream") else "message": {"content": text}, "finish_reason": reason}]
        }
    return {"choices": [{"text": text, "finish_reason": reason}]}


def _event(data: dict[str, Any]) -> bytes:
    return _chunk(b"data: " + json.dumps({**data, "system_fingerprint": PADDING}).encode() + b"\n\n")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def _whole(writer: asyncio.StreamWriter, status: int, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    head = f"HTTP/1.1 {status} Fake\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    await writer.drain()


# One bug each


class GlobalFlag(Server):
    """A queued client's hang-up sets a flag that all active work looks at."""

    def hung_up(self, job: Job) -> None:
        if job.phase == "queued":
            for other in self.others(job, "prefill", "generation"):
                other.end("client", dropped=True)
        super().hung_up(job)


class KillsNeighbours(Server):
    """An active client's hang-up cuts off whoever else generates."""

    def hung_up(self, job: Job) -> None:
        if job.phase in ("prefill", "generation"):
            for other in self.others(job, "generation"):
                other.end("client", dropped=True)
        super().hung_up(job)


class ForgetsNeighbours(Server):
    """An active client's hang-up leaves whoever else generates without any further word, the connection open."""

    def hung_up(self, job: Job) -> None:
        for other in self.others(job, "generation") if job.phase in ("prefill", "generation") else []:
            other.end("lost")
        super().hung_up(job)

    async def _end(self, job: Job) -> None:
        if job.stop == "lost":
            await asyncio.sleep(1e6)
        await super()._end(job)


class EndsNeighboursAsIfComplete(Server):
    """An active client's hang-up ends whoever else generates with what there is, as if that were all."""

    def hung_up(self, job: Job) -> None:
        for other in self.others(job, "generation") if job.phase in ("prefill", "generation") else []:
            other.end("stop")
        super().hung_up(job)


class DamagesNeighbours(Server):
    """An active client's hang-up leaves a wrong memory to whoever else is active."""

    def hung_up(self, job: Job) -> None:
        for other in self.others(job, "prefill", "generation") if job.phase in ("prefill", "generation") else []:
            other.salt = "damaged"
        super().hung_up(job)


class KillsPrefills(Server):
    """A hang-up in a generation cuts off whoever is in the prefill."""

    def hung_up(self, job: Job) -> None:
        for other in self.others(job, "prefill") if job.phase == "generation" else []:
            other.end("client", dropped=True)
        super().hung_up(job)


class LosesSlotsInTheQueue(Server):
    """Two clients that hang up in the queue within a tenth of a second cost a slot for ever."""

    last = -1.0

    def hung_up(self, job: Job) -> None:
        now = asyncio.get_running_loop().time()
        if job.phase == "queued":
            if now - self.last < 0.1 and len(self.slots) > 1:
                idle = [slot for slot in self.slots if slot.job is None] or self.slots
                self.slots.remove(idle[-1])
            self.last = now
        super().hung_up(job)


class LateCancel(Server):
    """A hang-up in the last tokens stays behind in the slot and ends the next request there."""

    pending = False

    def hung_up(self, job: Job) -> None:
        if job.phase == "generation" and job.tokens >= job.body["max_tokens"] - 2:
            self.pending = True
        super().hung_up(job)

    async def after_prompt(self, job: Job, done: int) -> None:
        await super().after_prompt(job, done)
        if self.pending and not job.stop:
            self.pending = False
            job.end("client", dropped=True)


class WrongRetry(Server):
    """A prompt that was given up leaves words behind that were never computed."""

    async def after_prompt(self, job: Job, done: int) -> None:
        assert job.slot is not None
        if job.stop:
            job.slot.salt = "dirty"
        elif job.cached == 0:
            job.slot.salt = ""
        await super().after_prompt(job, done)


class WrongRetryOneSlot(WrongRetry):
    """The same where a prompt that is asked again can only come to the same slot."""

    n_slots = 1


class ForgetsPrefixes(Server):
    """What was computed of a prompt that was given up is thrown away."""

    async def after_prompt(self, job: Job, done: int) -> None:
        await super().after_prompt(job, 0 if job.stop else done)


class KeepsNoPrefix(Server):
    """Nothing is ever kept of a prompt. This is no bug."""

    async def after_prompt(self, job: Job, done: int) -> None:
        await super().after_prompt(job, 0)


class IgnoresHangUps(Server):
    """A prompt is computed to its end whether somebody wants it or not."""

    def hung_up(self, job: Job) -> None:
        if job.phase == "queued":
            super().hung_up(job)
        else:
            job.dropped = True

    async def after_prompt(self, job: Job, done: int) -> None:
        if job.dropped:
            job.stop = "client"
        await super().after_prompt(job, done)

    async def send(self, job: Job, data: bytes) -> None:
        if job.dropped:
            job.stop = "client"
        else:
            await super().send(job, data)


class LyingDeadline(Server):
    """A deadline cuts the answer short and calls that its natural end."""

    def deadline_passed(self, job: Job) -> None:
        job.end("length")


class LateDeadline(Server):
    """A deadline is looked at between tokens only, not in the prefill."""

    def deadline_passed(self, job: Job) -> None:
        if job.phase == "generation":
            super().deadline_passed(job)


class DeadlineForAll(Server):
    """A deadline ends whoever is active."""

    def deadline_passed(self, job: Job) -> None:
        for other in self.others(job, "generation"):
            other.end("deadline")
        super().deadline_passed(job)


class HangsHalfClosed(Server):
    """A half-closed connection is neither answered nor closed, and keeps its slot."""

    def hung_up(self, job: Job) -> None:
        job.stop = "hangs"

    async def _end(self, job: Job) -> None:
        if job.stop == "hangs":
            await asyncio.sleep(1e6)
        await super()._end(job)


class OneWriter(Server):
    """Everybody's answers go out one after another: who does not read holds up all."""

    send_buffer = 4096

    def __init__(self) -> None:
        super().__init__()
        self.lock = asyncio.Lock()

    async def send(self, job: Job, data: bytes) -> None:
        async with self.lock:
            await super().send(job, data)


class CancelsByPlace(Server):
    """A cancel by id reaches whoever sits in the slot, also when the request that it names is long over."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, Slot] = {}

    async def after_prompt(self, job: Job, done: int) -> None:
        await super().after_prompt(job, done)
        assert job.slot is not None
        self.places[job.id] = job.slot

    async def _answer(self, method: str, path: str, body: Any, reader: Any, writer: Any) -> None:
        place = self.places.get(path.rpartition("/")[2]) if method == "DELETE" else None
        if place is not None and place.job is not None:
            place.job.end("cancelled")
            await _whole(writer, 200, {"cancelled": True})
        else:
            await super()._answer(method, path, body, reader, writer)


class CancelsNothing(Server):
    """A cancel by id is accepted and forgotten."""

    def cancelled_by_id(self, job: Job) -> None:
        pass


class LyingCancel(Server):
    """A cancelled request says that it had come to its natural end."""

    def cancelled_by_id(self, job: Job) -> None:
        job.end("stop")


class WearsOut(Server):
    """After twelve hang-ups every answer is wrong."""

    def token(self, job: Job) -> str:
        return super().token(job) if self.hang_ups <= 12 else " worn"


class Dies(Server):
    """A hang-up in a prefill ends the process."""

    def hung_up(self, job: Job) -> None:
        if job.phase == "prefill" and self._server is not None:
            self._server.close()
            for other in list(self.jobs.values()):
                other.end("died", dropped=True)
        super().hung_up(job)


# No bugs, but little to judge by


class OneSlot(Server):
    """One request at a time."""

    n_slots = 1


class ManySlots(Server):
    """More slots than anybody fills."""

    n_slots = 64


class Plain(Server):
    """Neither ids, nor deadlines, nor usage."""

    ids = deletes = deadlines = usage = False


class ChatOnly(Server):
    """No plain completions."""

    completions = False


class Strict(Server):
    """Fields that it does not know are refused."""

    known = frozenset({"model", "prompt", "max_tokens", "stream", "temperature", "seed"})

    def refused(self, body: dict[str, Any]) -> str | None:
        unknown = body.keys() - self.known
        return f"unknown fields: {sorted(unknown)}" if unknown else None


class NoDelete(Server):
    """Requests have ids, but cannot be cancelled by them."""

    deletes = False


class TurnsAway(Server):
    """Who finds no free slot is turned away."""

    def full(self) -> bool:
        return all(slot.job is not None for slot in self.slots)


class PrefillsInNoTime(Server):
    """A prompt costs next to nothing: nobody can hang up in the middle of it."""

    word = 1e-9


class SlowInCompany(Server):
    """A prompt takes two and a half times as long while another request generates."""

    async def _pass(self, job: Job, seconds: float) -> None:
        slow = job.phase == "prefill" and self.others(job, "generation")
        await super()._pass(job, 2.5 * seconds if slow else seconds)


class NeverTheSame(Server):
    """Every answer is different."""

    async def after_prompt(self, job: Job, done: int) -> None:
        await super().after_prompt(job, done)
        job.salt = job.id


class DependsOnNeighbours(Server):
    """An answer depends on how many others are active: the batch is not computed the same way."""

    def token(self, job: Job) -> str:
        return super().token(job) + "b" * bool(self.others(job, "prefill", "generation"))


class CutsOffUndisturbed(Server):
    """Whoever is active beside another is cut off, hang-up or not."""

    async def after_prompt(self, job: Job, done: int) -> None:
        await super().after_prompt(job, done)
        for other in self.others(job, "generation") if len(job.words) > 100 else []:
            other.end("error", dropped=True)
