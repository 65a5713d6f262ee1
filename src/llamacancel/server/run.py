"""`llamacancel serve`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import logging
import math
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn

from .. import Engine, Model
from .app import create_app
from .limits import NoPaths
from .protocol import ListeningProtocol
from .service import Service

__all__ = ["run"]

logger = logging.getLogger("llamacancel.server")

LAST_WORDS = 2.0
"""Seconds that clients have to read how their answers ended, before their connections are cut."""
QUIET = 60.0
"""Seconds between two lines of the log that tell that no connection can be taken."""
NO_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Server(uvicorn.Server):
    """uvicorn, which begins to drain the engine as soon as it is told to stop, and exits without a signal."""

    def __init__(self, config: uvicorn.Config, service: Service, operator_key: str | None = None) -> None:
        super().__init__(config)
        self._service, self._operator_key = service, operator_key
        self._told_at = -math.inf

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._on_error)
        await super().startup(sockets)
        engine = self._service.engine
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            at = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            print(
                f"serving {self._service.model_name} on {at} ({engine.slots} slots, {engine.n_ctx} tokens of context)",
                flush=True,
            )
            if self._operator_key is not None:
                print(
                    f"the live page, with the right to cancel any request: {at}/#key={self._operator_key}", flush=True
                )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if not self.force_exit:
            print("stopping: what is on its way gets its answer (Ctrl-C again stops at once)", file=sys.stderr)
        closing = asyncio.create_task(self._service.close())
        cutting = asyncio.create_task(self._cut_late())
        await super().shutdown(sockets)
        if self.force_exit:
            await cutting
            await self.lifespan.shutdown()
        cutting.cancel()
        await closing

    async def _cut_late(self) -> None:
        """When it is to stop at once, or the time is over: end every request, so that none is broken off."""
        loop = asyncio.get_running_loop()
        end = loop.time() + (self.config.timeout_graceful_shutdown or math.inf) - 2 * LAST_WORDS
        while not self.force_exit and loop.time() < end:
            await asyncio.sleep(0.1)
        self._service.cancel_all("the server was stopped")
        for cut in (False, True):
            if cut:
                for connection in list(self.server_state.connections):
                    connection.transport.abort()
            if tasks := set(self.server_state.tasks):
                await asyncio.wait(tasks, timeout=LAST_WORDS)

    def _on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """For the loop. It tells of each connection that it could not take, with a traceback; a line will do."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in NO_ROOM:
            loop.default_exception_handler(context)
        elif loop.time() >= self._told_at + QUIET:
            self._told_at = loop.time()
            logger.error("no connection can be taken: %s", error.strerror)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._on_signal) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True


def run(args: argparse.Namespace) -> int:
    """Load the model and serve it until a signal comes; the exit status."""
    _set_up_logging(args.verbose)
    listener = _bind(args.host, args.port)
    with listener, _load(args) as model:
        engine = Engine(
            model,
            slots=args.slots,
            queue_limit=args.queue_limit,
            n_ctx=args.ctx_size,
            kv_unified=args.kv_unified,
            n_threads=args.threads,
            cancel_latency=args.cancel_latency,
            stream_interval=args.stream_interval,
        )
        with engine:
            given_key = os.environ.get("LLAMACANCEL_OPERATOR_KEY", "").strip()
            operator_key = given_key or secrets.token_urlsafe(16)
            app = create_app(
                engine,
                model_name=args.alias,
                api_keys=_keys(args.api_key),
                operator_key=operator_key,
                allowed_hosts=_hosts(args.host, args.allowed_host),
                cors_origins=args.cors_origin,
                max_body_bytes=args.max_body,
                request_timeout=args.timeout,
                chat_template=args.chat_template.read_text(encoding="utf-8") if args.chat_template else None,
                drain_timeout=args.drain_timeout,
            )
            config = uvicorn.Config(
                app,
                http=ListeningProtocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=args.verbose,
                server_header=False,
                timeout_keep_alive=65,
                backlog=256,
                timeout_graceful_shutdown=math.ceil(args.drain_timeout) + 5,
            )
            Server(config, app.state.service, None if given_key else operator_key).run(sockets=[listener])
    return 0


def _bind(host: str, port: int) -> socket.socket:
    """Take the address before the model is loaded: if somebody has it, that is told at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise OSError(f"cannot listen on {host}:{port}: {error}") from error
    return listener


def _load(args: argparse.Namespace) -> Model:
    """Load the model, and say how far it is. Ctrl-C stops it."""
    shown = -1

    def progress(share: float) -> None:
        nonlocal shown
        percent = int(share * 100)
        if percent != shown and (sys.stderr.isatty() or percent in (0, 100)):
            shown = percent
            end = "\n" if percent == 100 or not sys.stderr.isatty() else ""
            start = "\r" if sys.stderr.isatty() else ""
            print(f"{start}loading {args.model}: {percent} %", end=end, file=sys.stderr, flush=True)

    try:
        return Model.load(args.model, n_gpu_layers=args.n_gpu_layers, rpc_servers=args.rpc, progress=progress)
    except BaseException:
        if sys.stderr.isatty():
            print(file=sys.stderr)
        raise


def _hosts(host: str, allowed: list[str]) -> list[str]:
    """The names that requests may call the server by. An address is always one: no page can be served from it."""
    return ["localhost", host, socket.gethostname(), socket.getfqdn(), *allowed]


def _keys(given: list[str]) -> list[str]:
    from_environment = os.environ.get("LLAMACANCEL_API_KEY", "")
    return [key for key in [*given, *from_environment.split(",")] if key.strip()]


def _set_up_logging(verbose: bool) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("uvicorn.access").addFilter(NoPaths())
