"""The client sees exactly what came, and says why when it is not a whole answer."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from llamacancel.conformance.api import Api, Request
from llamacancel.conformance.call import Call
from llamacancel.conformance.sse import EventReader
from llamacancel.conformance.wire import Exchange, ExchangeError, Target

from . import virtual

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nX-Request-Id: seven\r\n"
FIRST = b'data: {"choices": [{"text": "one", "finish_reason": null}]}\n\n'
LAST = b'data: {"choices": [{"text": "", "finish_reason": "length"}]}\n\n'


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[Target]:
    """A server that reads a request and leaves the rest to the handler."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.lower().partition(b"content-length:")[2].partition(b"\r")[0]
            await reader.readexactly(int(length or 0))
            await handler(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield Target("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()


def call_of(data: bytes, *, stream: bool = True) -> Call:
    """Send a request to a server that answers with these bytes and closes."""

    async def go() -> Call:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(data)
            await writer.drain()

        async with serving(handler) as target:
            call = Call(Api(target, "m"), Request("words", 4, stream))
            await call.until_end(10)
            await call.close()
            return call

    return virtual.run(go())


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


def test_a_stream_is_read_until_its_end() -> None:
    call = call_of(STREAM + b"transfer-encoding: chunked\r\n\r\n" + chunked(FIRST, LAST, b"data: [DONE]\n\n"))
    assert (call.answered, call.text, call.finish_reason, call.error) == (True, "one", "length", None)
    assert (call.request_id, len(call.pieces)) == ("seven", 1)


def test_a_stream_without_a_length_ends_with_the_connection() -> None:
    call = call_of(STREAM + b"\r\n" + FIRST + LAST)
    assert (call.answered, call.text) == (True, "one")


def test_a_stream_that_is_cut_off_is_no_answer() -> None:
    call = call_of(STREAM + b"transfer-encoding: chunked\r\n\r\n" + chunked(FIRST)[:-5])
    assert not call.answered
    assert call.error == "the server closed the connection in the middle of its answer"


def test_a_stream_that_ends_without_saying_so_is_no_answer() -> None:
    call = call_of(STREAM + b"transfer-encoding: chunked\r\n\r\n" + chunked(FIRST))
    assert not call.answered
    assert call.error is not None
    assert "without saying" in call.error


def test_an_error_in_the_middle_of_a_stream_is_no_answer() -> None:
    error = b'data: {"error": {"message": "out of memory"}}\n\n'
    call = call_of(STREAM + b"transfer-encoding: chunked\r\n\r\n" + chunked(FIRST, error, b"data: [DONE]\n\n"))
    assert (call.answered, call.error) == (False, "out of memory")


def test_a_connection_that_is_closed_at_once_is_no_answer() -> None:
    call = call_of(b"")
    assert (call.answered, call.error) == (False, "the server closed the connection without an answer")


def test_what_is_no_http_is_no_answer() -> None:
    call = call_of(b"220 mail.example ESMTP\r\n\r\n")
    assert not call.answered
    assert call.error is not None
    assert "no HTTP" in call.error


def whole(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 " + status + b"\r\ncontent-length: %d\r\n\r\n" % len(body) + body


def test_a_whole_answer_counts_its_tokens_by_usage() -> None:
    body = {
        "choices": [{"message": {"content": "one two"}, "finish_reason": "stop"}],
        "usage": {"completion_tokens": 2, "prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 5}},
    }
    call = call_of(whole(json.dumps(body).encode()), stream=False)
    assert (call.answered, call.text, call.n_tokens, call.cached_tokens) == (True, "one two", 2, 5)
    assert call.first_token is None


def test_an_error_status_is_no_answer_and_is_named() -> None:
    call = call_of(whole(b'{"error": {"message": "too long"}}', b"400 Bad Request"))
    assert (call.answered, call.status, call.error) == (False, 400, "HTTP 400: too long")


def test_a_body_that_is_no_json_is_no_answer() -> None:
    assert not call_of(whole(b"<html>"), stream=False).answered


def test_an_interim_answer_is_passed_over() -> None:
    assert call_of(b"HTTP/1.1 100 Continue\r\n\r\n" + whole(b'{"choices": [{"text": "x"}]}'), stream=False).answered


def test_no_server_is_an_error_and_no_exception() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))

        async def go() -> Call:
            call = Call(Api(Target("127.0.0.1", free.getsockname()[1]), "m"), Request("words", 4))
            await call.until_end(10)
            await call.close()
            return call

        call = virtual.run(go())
    assert call.error is not None
    assert "no connection" in call.error
    assert call.sent is None


def seen_by_server(act: Callable[[Call], Awaitable[None]]) -> tuple[bytes, Call]:
    """What a server reads after the request, while a client does something to its connection."""

    async def go() -> tuple[bytes, Call]:
        read: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(STREAM + b"\r\n" + FIRST)
            read.set_result(await reader.read())
            writer.write(LAST)
            await writer.drain()

        async with serving(handler) as target:
            call = Call(Api(target, "m"), Request("words", 4))
            await call.until_first_token(10)
            await act(call)
            found = await read
            await call.until_end(10)
            await call.close()
            return found, call

    return virtual.run(go())


def test_a_hang_up_is_seen_by_the_server_and_ends_the_call() -> None:
    async def act(call: Call) -> None:
        call.hang_up()

    data, call = seen_by_server(act)
    assert data == b""
    assert call.hung_up == call.ended is not None
    assert not call.answered


def test_a_half_closed_call_can_still_be_answered() -> None:
    async def act(call: Call) -> None:
        assert call.can_half_close()
        call.half_close()

    data, call = seen_by_server(act)
    assert data == b""
    assert call.answered
    assert call.hung_up is None


def test_a_trap_hangs_up_before_anything_more_is_read() -> None:
    async def go() -> Call:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(STREAM + b"\r\n" + FIRST * 3 + LAST)
            await reader.read()

        async with serving(handler) as target:
            call = Call(Api(target, "m"), Request("words", 4))
            call.hang_up_when(lambda seen: len(seen.pieces) >= 2)
            await call.until_end(10)
            await call.close()
            return call

    call = virtual.run(go())
    assert (len(call.pieces), call.answered) == (2, False)
    assert call.hung_up is not None


def test_what_a_client_leaves_unread_is_counted() -> None:
    async def go() -> tuple[int | None, str]:
        more = asyncio.Event()

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(STREAM + b"\r\n" + FIRST)
            await more.wait()
            writer.write(FIRST)
            await reader.read()

        async with serving(handler) as target:
            call = Call(Api(target, "m"), Request("words", 4), receive_buffer=4096)
            await call.until_first_token(10)
            call.stop_reading()
            more.set()
            while not call.unread_bytes():
                await asyncio.sleep(0.1)
            unread = call.unread_bytes()
            await call.close()
            return unread, call.text

    assert virtual.run(go()) == (len(FIRST), "one")


def test_an_answer_that_does_not_come_is_waited_for_no_longer_than_said() -> None:
    async def go() -> tuple[bool, float]:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()

        async with serving(handler) as target:
            call = Call(Api(target, "m"), Request("words", 4))
            came = await call.until_end(30)
            waited = asyncio.get_running_loop().time()
            await call.close()
            return came, waited

    came, waited = virtual.run(go())
    assert not came
    assert waited == pytest.approx(30, abs=1)


def test_a_reset_connection_is_an_exchange_error() -> None:
    async def go() -> None:
        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

        async with serving(handler) as target:
            exchange = await Exchange.open(target)
            await exchange.send("GET", "/")
            try:
                await exchange.head()
            finally:
                exchange.hang_up()

    with pytest.raises(ExchangeError):
        virtual.run(go())


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_events_are_the_same_however_their_bytes_are_cut(size: int, end: bytes) -> None:
    data = end.join([b": hello", b"data: one", b"data:two", b"", b"event: x", b"data: {}", b"", b"", b"data: rest"])
    reader = EventReader()
    found = [event for i in range(0, len(data), size) for event in reader.feed(data[i : i + size])]
    assert found == ["one\ntwo", "{}"]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8080/v1", Target("127.0.0.1", 8080, "/v1")),
        ("http://localhost/", Target("localhost", 80, "")),
        ("https://[::1]:8443/api/v1/", Target("::1", 8443, "/api/v1", True)),
    ],
)
def test_a_url_names_host_port_and_path(url: str, expected: Target) -> None:
    assert Target.parse(url) == expected


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://host/v1", "http:///v1", ""])
def test_what_is_no_http_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="not a URL"):
        Target.parse(url)


def test_loopback_is_told_from_other_hosts() -> None:
    assert Target("127.0.0.1", 1).is_loopback()
    assert Target("127.8.9.1", 1).is_loopback()
    assert Target("::1", 1).is_loopback()
    assert not Target("192.0.2.1", 1).is_loopback()
    assert not Target("0.0.0.0", 1).is_loopback()
