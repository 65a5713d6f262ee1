"""Starts servers as processes of their own, and stops them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Kind", "Server", "ServerFailed", "Shape", "llama_server_kind", "ours"]


class ServerFailed(Exception):
    """A server did not start or died; the message has its last lines."""


@dataclass(frozen=True)
class Shape:
    """How every server is started.

    Attributes:
        model: GGUF file.
        slots: Requests at once.
        n_ctx: Tokens of context for each of them.
        threads: Threads to compute with.
    """

    model: Path
    slots: int
    n_ctx: int
    threads: int


@dataclass(frozen=True)
class Kind:
    """A kind of server: its name in reports, and how to run it.

    Attributes:
        name: Its name.
        command: Makes the command line from a shape and a port.
        view: How its state is asked for: "llamacancel", "llama-server", or None if it tells nothing.
        env: Variables of its environment.
    """

    name: str
    command: Callable[[Shape, int], list[str]]
    view: str | None = None
    env: dict[str, str] = field(default_factory=dict)


def ours() -> Kind:
    """Our server, as `llamacancel serve` starts it."""

    def command(shape: Shape, port: int) -> list[str]:
        return [
            *(sys.executable, "-m", "llamacancel", "serve", "--model", str(shape.model), "--port", str(port)),
            *("--slots", str(shape.slots), "--ctx-size", str(shape.slots * shape.n_ctx)),
            *("--threads", str(shape.threads), "--queue-limit", "256"),
        ]

    return Kind("llamacancel", command, "llamacancel")


def llama_server_kind(path: Path, name: str = "llama-server", *options: str) -> Kind:
    """llama.cpp's own server. Its cache of prompts in RAM is off: it would only cost time here."""

    def command(shape: Shape, port: int) -> list[str]:
        return [
            *(str(path), "--model", str(shape.model), "--host", "127.0.0.1", "--port", str(port)),
            *("--parallel", str(shape.slots), "--ctx-size", str(shape.slots * shape.n_ctx)),
            *("--threads", str(shape.threads), "--threads-batch", str(shape.threads)),
            *("--slots", "--metrics", "--cache-ram", "0", "--fit", "off", *options),
        ]

    return Kind(name, command, "llama-server")


class Server:
    """A running server; a context manager that starts and stops it.

    Args:
        kind: Which.
        shape: How.
        patience: Seconds to wait for it to be ready.
    """

    def __init__(self, kind: Kind, shape: Shape, patience: float = 120.0) -> None:
        self.kind, self.shape = kind, shape
        self.root = ""
        self._patience = patience
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by stop)

    @property
    def url(self) -> str:
        """The address of its API."""
        return f"{self.root}/v1"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Server:
        port = _free_port()
        self.root = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            self.kind.command(self.shape, port),
            stdout=self._log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **self.kind.env},
        )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Tell it to stop, and make it."""
        if self._process is not None:
            for number in (signal.SIGTERM, signal.SIGKILL):
                if self._process.poll() is None:
                    self._process.send_signal(number)
                try:
                    self._process.wait(15)
                    break
                except subprocess.TimeoutExpired:
                    continue
        self._log.close()

    def check(self) -> None:
        """Raise if it has died.

        Raises:
            ServerFailed: It has.
        """
        if self._process is not None and (status := self._process.poll()) is not None:
            raise ServerFailed(f"{self.kind.name} ended with status {status}:\n{self.last_lines()}")

    def last_lines(self, count: int = 12) -> str:
        """The end of what it printed."""
        self._log.seek(0)
        return "\n".join(self._log.read().decode("utf-8", "replace").strip().splitlines()[-count:])

    def get(self, path: str) -> Any:
        """JSON from one of its pages.

        Raises:
            OSError: It gave none.
        """
        with urllib.request.urlopen(self.root + path, timeout=30) as answer:
            return json.load(answer)

    def _wait(self) -> None:
        deadline = time.monotonic() + self._patience
        while time.monotonic() < deadline:
            self.check()
            for path in ("/health", "/v1/models"):
                try:
                    with urllib.request.urlopen(self.root + path, timeout=5) as answer:
                        if answer.status == 200:
                            return
                except urllib.error.HTTPError as error:
                    if error.code == 503:  # llama-server says so while it loads
                        break
                except OSError:
                    break
            time.sleep(0.1)
        raise ServerFailed(f"{self.kind.name} was not ready in {self._patience:.0f} s:\n{self.last_lines()}")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
