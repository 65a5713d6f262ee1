"""`llamacancel rpc-server`: a worker process that computes layers of models for others (llama.cpp's RPC backend)."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
import time

from . import arguments as _arguments

__all__ = ["add_arguments", "run"]

EPILOG = """\
example, one model over two workers:
  llamacancel rpc-server --port 50052 &
  llamacancel rpc-server --port 50053 &
  llamacancel serve --model model.gguf --n-gpu-layers -1 --rpc 127.0.0.1:50052 --rpc 127.0.0.1:50053
The protocol knows neither passwords nor encryption, and whoever reaches the port can make the worker do what it likes:
leave it on 127.0.0.1 or in a network that only you are in. A worker serves one client process at a time.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `llamacancel rpc-server` to a parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "--host", default="127.0.0.1", help="IPv4 address to listen on (default: 127.0.0.1, only this machine)"
    )
    parser.add_argument(
        "--port", type=_arguments.port, default=50052, help="port (default: 50052); 0 takes a free one and says which"
    )
    parser.add_argument("--threads", "-t", type=_arguments.count, metavar="N", help="CPU threads (default: all)")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes; the exit status."""
    from ..llama import default_threads, serve_rpc

    host, port = _free(args.host, args.port)
    threads = args.threads or default_threads()
    here = host.startswith("127.")
    if not here:
        print(f"llamacancel: anyone who reaches {host}:{port} can use and take over this process: the protocol has no "
              "authentication", file=sys.stderr)  # fmt: skip
    ended: list[str] = []
    # llama.cpp's server cannot be asked to stop. It has nothing to clean up: the process ends under it.
    serving = threading.Thread(target=lambda: ended.append(serve_rpc(f"{host}:{port}", threads)), daemon=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    serving.start()
    if _listens(host, port, serving):
        reach = "for this machine only" if here else "for whoever reaches it"
        print(f"llamacancel: RPC server on {host}:{port}, {reach}; {threads} threads; Ctrl-C stops it", flush=True)
    while serving.is_alive():
        serving.join(1)
    raise OSError(ended[0] if ended else f"cannot serve on {host}:{port}")


def _stop(number: int, _: object) -> None:
    sys.stdout.flush()
    os._exit(0)


def _free(host: str, port: int) -> tuple[str, int]:
    """The address as llama.cpp wants it, if it can be listened on. It would say no more than that it cannot."""
    try:
        address = socket.gethostbyname(host)
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
            return address, int(listener.getsockname()[1])
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error}") from error


def _listens(host: str, port: int, serving: threading.Thread) -> bool:
    """Wait until somebody can connect. A client that says nothing and leaves does no harm."""
    while serving.is_alive():
        try:
            socket.create_connection((host, port), timeout=1).close()
            return True
        except OSError:
            time.sleep(0.02)
    return False
