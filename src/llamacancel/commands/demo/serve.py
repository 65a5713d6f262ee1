"""A server in a thread of this process, on a free port, as `llamacancel serve` runs it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn

from ...engine import Engine
from ...server.app import create_app
from ...server.protocol import ListeningProtocol

__all__ = ["serving"]

PATIENCE = 30.0


@contextlib.contextmanager
def serving(engine: Engine) -> Iterator[str]:
    """Serve an engine; gives the server's address. Closes both at the end, whatever is still running."""
    app = create_app(engine, drain_timeout=0.0)
    app.state.service.name_of = lambda request_id: request_id  # so that the stage finds its clients
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, http=ListeningProtocol, ws="none", lifespan="on", log_config=None, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        end = time.monotonic() + PATIENCE
        while not server.started:
            if not thread.is_alive() or time.monotonic() > end:
                raise OSError("the server did not start")
            time.sleep(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        listener.close()
        engine.close(drain=False)
