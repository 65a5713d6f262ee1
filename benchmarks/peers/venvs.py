"""Brings peers by name into environments of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..server.build import cache_folder
from ..server.launch import Kind, Shape

__all__ = ["PEERS", "NotInstalled", "Peer", "bring", "run_peer_python"]

DRIVERS = Path(__file__).parent / "drivers"


class NotInstalled(Exception):
    """A peer could not be installed; the message has pip's last lines."""


@dataclass(frozen=True)
class Peer:
    """A peer.

    Attributes:
        name: As on PyPI; "llamacancel" for ourselves, who need no environment.
        module: What to import.
        requirement: What pip installs.
        library: Its driver, a file in `drivers/`; None for a server alone.
        serve: Makes the command line of its server from its Python, a shape and a port.
        view: How its server's state is asked for.
        pip: Further arguments of pip.
        env: Variables of pip's environment.
    """

    name: str
    module: str
    requirement: str
    library: str | None
    serve: Callable[[Path, Shape, int], list[str]]
    view: str | None = None
    pip: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)

    def kind(self, python: Path) -> Kind:
        """Its server."""
        return Kind(self.name, lambda shape, port: self.serve(python, shape, port), self.view)


def _llama_cpp_python(python: Path, shape: Shape, port: int) -> list[str]:
    threads = str(shape.threads)
    return [
        *(str(python), "-m", "llama_cpp.server", "--model", str(shape.model), "--port", str(port)),
        # It has no slots: requests take turns on one context.
        *("--n_ctx", str(shape.n_ctx), "--n_threads", threads, "--n_threads_batch", threads),
        *("--n_batch", "2048", "--n_ubatch", "512", "--flash_attn", "true"),
        # By default it computes the logits of each token of a prompt.
        *("--logits_all", "false"),
        # By default a request that comes in ends the one that runs.
        *("--interrupt_requests", "false"),
    ]


def _script(name: str, python: Path, shape: Shape, port: int, n_ctx: int) -> list[str]:
    script = str(DRIVERS / name)
    return [str(python), script, str(shape.model), str(port), str(shape.slots), str(n_ctx), str(shape.threads)]


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "llama-cpp-python",
            "llama_cpp",
            "llama-cpp-python[server]",
            "llama_cpp_python.py",
            _llama_cpp_python,
            # PyPI has its sources alone: it is always built here, for this CPU.
            env={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"},
        ),
        Peer(
            "cyllama",
            "cyllama",
            "cyllama",
            "cyllama_library.py",
            lambda python, shape, port: _script("serve_cyllama.py", python, shape, port, shape.n_ctx),
        ),
        Peer(
            "xllamacpp",
            "xllamacpp",
            "xllamacpp",
            "xllamacpp_library.py",
            lambda python, shape, port: _script("serve_xllamacpp.py", python, shape, port, shape.n_ctx * shape.slots),
            "llama-server",
            # Its sources need Rust and an hour; its own wheel is what people get.
            pip=("--only-binary", "xllamacpp"),
        ),
    )
}


def bring(peer: Peer) -> Path:
    """The Python of an environment that has the peer; made the first time.

    Raises:
        NotInstalled: It cannot be installed, or not imported.
    """
    folder = cache_folder() / "peers" / peer.name
    python = folder / "bin" / "python"
    if python.exists() and _imports(python, peer.module) is None:
        return python
    print(f"installing {peer.requirement} in {folder}", file=sys.stderr, flush=True)
    try:
        subprocess.run(
            [sys.executable, "-m", "venv", "--clear", str(folder)], check=True, capture_output=True, text=True
        )
    except subprocess.CalledProcessError as error:
        raise NotInstalled(f"no environment: {_tail(error.stdout + error.stderr)}") from error
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *peer.pip, peer.requirement]
    env = {**os.environ, **peer.env}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise NotInstalled(f"pip failed: {_tail(done.stdout + done.stderr)}")
    if (message := _imports(python, peer.module)) is not None:
        raise NotInstalled(f"it cannot be imported: {message}")
    return python


def run_peer_python(python: Path, script: str, given: str) -> subprocess.Popen[str]:
    """Start a driver in a peer's environment, with its job on stdin."""
    process = subprocess.Popen(
        [str(python), str(DRIVERS / script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(given)
    process.stdin.close()
    return process


def _imports(python: Path, module: str) -> str | None:
    """None if it can be imported; else why not."""
    done = subprocess.run([str(python), "-c", f"import {module}"], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else _tail(done.stderr)


def _tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-6:])
