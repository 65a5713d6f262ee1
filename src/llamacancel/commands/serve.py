"""The options of `llamacancel serve`; knows nothing of what the server needs to run."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import count, interval, port, seconds, whole

__all__ = ["add_arguments", "run"]

EPILOG = """\
try it:
  llamacancel serve --model model.gguf
  curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
       -d '{"messages": [{"role": "user", "content": "Hello"}], "stream": true}'
and open http://127.0.0.1:8080/ to see the slots at work. Any OpenAI client works with
base_url="http://127.0.0.1:8080/v1". Ctrl-C lets the answers on their way finish; again, it stops at once.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `llamacancel serve` to a parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("--model", "-m", type=Path, required=True, metavar="PATH", help="GGUF file to serve")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, only this machine)"
    )
    parser.add_argument(
        "--port", type=port, default=8080, help="port (default: 8080); 0 takes a free one and says which"
    )

    work = parser.add_argument_group("work")
    work.add_argument("--slots", type=count, default=4, metavar="N", help="requests that run at once (default: 4)")
    work.add_argument(
        "--queue-limit", type=whole, default=64, metavar="N", help="requests that may wait; more get 429 (default: 64)"
    )
    work.add_argument(
        "--ctx-size", "-c", type=count, metavar="N",
        help="tokens that all slots hold together (default: what the model was trained for, at most 4096, for each)",
    )  # fmt: skip
    work.add_argument(
        "--kv-unified", action="store_true", default=None,
        help="one cache for all slots, so that a request may use what others do not (slower with many slots; "
        "default: each slot has its own share where the model has plain attention)",
    )  # fmt: skip
    work.add_argument("--threads", "-t", type=count, metavar="N", help="CPU threads (default: all)")
    work.add_argument(
        "--cancel-latency", type=seconds, default=0.02, metavar="SECONDS",
        help="how soon a cancel is to be honoured (default: 0.02)",
    )  # fmt: skip
    work.add_argument(
        "--n-gpu-layers", "-ngl", type=int, default=0, metavar="N", help="layers on the GPU; -1: all (default: 0)"
    )
    work.add_argument(
        "--rpc", action="append", default=[], metavar="HOST:PORT",
        help="RPC server that takes layers of the model; may be repeated. Wants --n-gpu-layers",
    )  # fmt: skip
    work.add_argument(
        "--stream-interval", type=interval, default=1 / 30, metavar="SECONDS",
        help="pieces of text that come within this time are sent together, but for the first; 0: each token at once "
        "(default: a thirtieth)",
    )  # fmt: skip
    work.add_argument("--timeout", type=seconds, metavar="SECONDS", help="for each request; it may ask for less")

    api = parser.add_argument_group("API")
    api.add_argument("--alias", metavar="NAME", help="what answers call the model (default: the file's name)")
    api.add_argument(
        "--api-key", action="append", default=[], metavar="KEY",
        help="key that requests need; may be repeated. Also from the environment: LLAMACANCEL_API_KEY, with commas",
    )  # fmt: skip
    api.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME",
        help="further name by which requests may call this server while there is no key, or *; may be repeated",
    )  # fmt: skip
    api.add_argument(
        "--cors-origin", action="append", default=[], metavar="ORIGIN",
        help="origin whose web pages may use the API, or *; may be repeated",
    )  # fmt: skip
    api.add_argument("--chat-template", type=Path, metavar="PATH", help="Jinja template in place of the model's own")
    api.add_argument(
        "--max-body",
        type=count,
        default=4 * 2**20,
        metavar="BYTES",
        help="longest request (default: 4 MiB, a million tokens of English)",
    )
    api.add_argument(
        "--drain-timeout", type=whole, default=30, metavar="SECONDS",
        help="how long Ctrl-C or SIGTERM waits for answers on their way (default: 30)",
    )  # fmt: skip
    parser.add_argument("--verbose", "-v", action="store_true", help="log every request, and what llama.cpp says")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes; the exit status."""
    try:
        from ..server import run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("llamacancel"):
            raise
        raise ImportError(f"the server needs {error.name}: pip install 'llamacancel[server]'") from error
    return run.run(args)
