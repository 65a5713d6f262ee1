"""One server for each kind of memory that is tested, and the text that a request gives alone."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import llamacancel as lc
from llamacancel.make_model import cached_model

from .served import Served, serving, text_of

ARCHITECTURES = ["llama", "hybrid"]


@pytest.fixture(scope="session")
def exact_model() -> Iterator[Callable[[str], lc.Model]]:
    """Models of an architecture in F32, whose greedy text does not depend on the company."""
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
                servers[arch] = stack.enter_context(serving(exact_model(arch)))
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
def alone() -> Callable[[Served, dict[str, Any]], str]:
    """The text that a completion has when nothing else is going on."""
    known: dict[tuple[int, str], str] = {}

    def ask(served: Served, body: dict[str, Any]) -> str:
        key = served.port, json.dumps(body, sort_keys=True)
        if key not in known:
            served.wait_idle()
            known[key] = text_of(served.post("/v1/completions", body))
        return known[key]

    return ask
