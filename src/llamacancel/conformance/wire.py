"""One HTTP/1.1 exchange on a connection of its own, whose socket the owner may treat badly.

`h11` does the protocol, asyncio's streams the bytes. Every exchange has its own connection, so that a hang-up is the
hang-up of exactly one request.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import h11

__all__ = ["Exchange", "ExchangeError", "Head", "Target"]

_READ = 65536


class ExchangeError(Exception):
    """The exchange ended in a way that HTTP does not allow: refused, reset, cut off, or not HTTP."""


@dataclass(frozen=True)
class Target:
    """A server's address, with the path that all requests begin with.

    Args:
        host: Name or address.
        port: TCP port.
        path: What comes before `/completions`, as "/v1"; "" for none.
        tls: Whether to speak https.
    """

    host: str
    port: int
    path: str = "/v1"
    tls: bool = False

    @classmethod
    def parse(cls, url: str) -> Target:
        """Read "http://host:port/v1".

        Raises:
            ValueError: It is no http or https URL.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not a URL of the form http://host:port/v1")
        tls = parts.scheme == "https"
        return cls(parts.hostname, parts.port or (443 if tls else 80), parts.path.rstrip("/"), tls)

    @property
    def root(self) -> str:
        """The path above the version, where servers keep what is not OpenAI's: "/v1" gives ""."""
        return self.path.removesuffix("/v1")

    @property
    def netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def is_loopback(self) -> bool:
        """Tell whether every address of the host is this machine's loopback."""
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except OSError:
            return False
        addresses = {str(entry[4][0]).partition("%")[0] for entry in found}
        return bool(addresses) and all(ipaddress.ip_address(address).is_loopback for address in addresses)


@dataclass(frozen=True)
class Head:
    """Status and headers of an answer; header names are lower case."""

    status: int
    headers: dict[str, str]


class Exchange:
    """One request and its answer on one connection."""

    def __init__(self, target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._target = target
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.CLIENT)
        self._begun = False

    @classmethod
    async def open(cls, target: Target, *, receive_buffer: int | None = None) -> Exchange:
        """Connect.

        Args:
            target: Where to.
            receive_buffer: Size of the socket's receive buffer in bytes, set before the connection is made, so that
                the window that is offered to the server is as small. None leaves it to the system.

        Raises:
            ExchangeError: No connection could be made.
        """
        context = ssl.create_default_context() if target.tls else None
        try:
            if receive_buffer is None:
                reader, writer = await asyncio.open_connection(target.host, target.port, ssl=context)
            else:
                sock = await _connect(target, receive_buffer)
                name = target.host if target.tls else None
                reader, writer = await asyncio.open_connection(
                    sock=sock, ssl=context, server_hostname=name, limit=max(receive_buffer, 1024)
                )
        except OSError as error:
            raise ExchangeError(f"no connection: {error}") from error
        return cls(target, reader, writer)

    async def send(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        """Send the whole request.

        Raises:
            ExchangeError: The connection broke.
        """
        lines = {
            "host": self._target.netloc,
            "accept": "*/*",
            "connection": "close",
            **({"content-type": "application/json", "content-length": str(len(body))} if body else {}),
            **(headers or {}),
        }
        data = self._http.send(h11.Request(method=method, target=path, headers=list(lines.items()))) or b""
        if body:
            data += self._http.send(h11.Data(data=body)) or b""
        data += self._http.send(h11.EndOfMessage()) or b""
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise ExchangeError(f"the connection broke while the request was sent: {error}") from error

    async def head(self) -> Head:
        """Wait for status and headers.

        Raises:
            ExchangeError: The connection ended first.
        """
        while True:
            event = await self._event()
            if isinstance(event, h11.Response):
                self._begun = True
                headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers}
                return Head(event.status_code, headers)
            if not isinstance(event, h11.InformationalResponse):
                raise ExchangeError("the connection was closed without an answer")

    async def body(self) -> AsyncIterator[bytes]:
        """Yield the body's pieces as they come, until its end.

        Raises:
            ExchangeError: The connection ended before the body did.
        """
        while True:
            event = await self._event()
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            else:
                return

    async def _event(self) -> Any:
        data: bytes | None = None
        while True:
            try:
                event = self._http.next_event()
                if event is h11.NEED_DATA:
                    data = await self._reader.read(_READ)
                    self._http.receive_data(data)
                    continue
            except h11.RemoteProtocolError as error:
                if data == b"":
                    where = "in the middle of its answer" if self._begun else "without an answer"
                    raise ExchangeError(f"the server closed the connection {where}") from error
                raise ExchangeError(f"what came is no HTTP: {error}") from error
            except OSError as error:
                raise ExchangeError(f"the connection broke: {error}") from error
            return event

    def hang_up(self) -> None:
        """Close the connection at once, both ways, as the system does for a process that died."""
        self._writer.transport.abort()

    def can_half_close(self) -> bool:
        return self._writer.can_write_eof()

    def half_close(self) -> None:
        """Close the client's sending side alone: the server reads an end of file, and can still send."""
        self._writer.write_eof()

    def stop_reading(self) -> None:
        """Take nothing more out of the socket: what the server sends piles up."""
        self._writer.transport.pause_reading()  # type: ignore[attr-defined]

    def unread_bytes(self) -> int | None:
        """How many bytes wait in the socket's receive buffer; None where the system does not tell."""
        try:
            import fcntl
            import termios
        except ImportError:
            return None
        sock = self._writer.get_extra_info("socket")
        raw = fcntl.ioctl(sock.fileno(), termios.FIONREAD, b"\0" * 4)
        return int.from_bytes(raw, sys.byteorder)


async def _connect(target: Target, receive_buffer: int) -> socket.socket:
    """Connect a socket whose receive buffer was made small first."""
    loop = asyncio.get_running_loop()
    error: OSError = OSError(f"no address for {target.host}")
    for family, address in await _addresses(target):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            sock.setblocking(False)
            await loop.sock_connect(sock, address)
        except OSError as failed:
            error = failed
            sock.close()
        else:
            return sock
    raise error


async def _addresses(target: Target) -> list[tuple[int, Any]]:
    """Return (family, address) of the host: at once if it is an address, from the resolver if it is a name."""
    try:
        version = ipaddress.ip_address(target.host).version
    except ValueError:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
        return [(entry[0], entry[4]) for entry in found]
    return [(socket.AF_INET if version == 4 else socket.AF_INET6, (target.host, target.port))]
