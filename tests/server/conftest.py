"""One server for each kind of memory that is tested, and the text that a request gives alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import llamacancel as lc
from llamacancel.commands.make_model import cached_model

from .served import Served, serving, steady, text_of

ARCHITECTURES = ["llama", "hybrid"]


@pytest.fixture(scope="session")
def exact_model() -> Iterator[Callable[[str], lc.Model]]:
    """Models of an architecture in F32."""
    with contextlib.ExitStack() as stack:
        models: dict[str, lc.Model] = {}

        def load(arch: str) -> lc.Model:
            if arch not in models:
                models[arch] = stack.enter_context(lc.Model.load(cached_model(arch, "tiny", quant="f32")))
            return models[arch]

        yield load


@pytest.fixture(scope="session")
def server_of(exact_model: Callable[[str], lc.Model]) -> Iterator[Callable[[str], Served]]:
    """A running server of an architecture, shared by all tests."""
    with contextlib.ExitStack() as stack:
        servers: dict[str, Served] = {}

        def start(arch: str) -> Served:
            if arch not in servers:
                servers[arch] = stack.enter_context(serving(exact_model(arch), app={"operator_key": "operator"}))
            return servers[arch]

        yield start


@pytest.fixture(params=ARCHITECTURES)
def served(request: pytest.FixtureRequest, server_of: Callable[[str], Served]) -> Iterator[Served]:
    """A server of each architecture, idle before and after the test."""
    server = server_of(request.param)
    server.wait_idle()
    yield server
    server.wait_idle()


@pytest.fixture
def llama(server_of: Callable[[str], Served]) -> Iterator[Served]:
    """The server of the attention model, for what has nothing to do with memory."""
    server = server_of("llama")
    server.wait_idle()
    yield server
    server.wait_idle()


@pytest.fixture(scope="session")
def known_text() -> Callable[..., tuple[dict[str, Any], str]]:
    """Completions with the text that they have alone: `known_text(served, n, seed, max_tokens)` gives both."""
    known: dict[tuple[int, ...], tuple[dict[str, Any], str]] = {}

    def ask(served: Served, n: int, seed: int, max_tokens: int) -> tuple[dict[str, Any], str]:
        key = served.port, n, seed, max_tokens
        if key not in known:
            served.wait_idle()
            body = steady(served, n, seed, max_tokens)
            known[key] = body, text_of(served.post("/v1/completions", body))
        return known[key]

    return ask
