"""`create_app(engine)` within somebody else's server: mounted, with middleware of theirs, on an engine of theirs."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.middleware.base import BaseHTTPMiddleware

import llamacancel as lc
from llamacancel.constraint import matcher
from llamacancel.server import create_app
from llamacancel.server.service import NOBODY

from .served import PATIENCE, eventually, greedy


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    """An app under plain uvicorn, as others would start it."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, ws="none", timeout_graceful_shutdown=20))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    eventually(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(PATIENCE)
    assert not thread.is_alive()


@pytest.fixture
def engine(model_of: Any) -> Iterator[lc.Engine]:
    with lc.Engine(model_of("llama"), slots=2, n_ctx=512, n_threads=1, n_ubatch=32) as opened:
        yield opened


def test_the_engine_is_closed_with_the_app_or_left_open(model_of: Any) -> None:
    for close_engine in (True, False):
        with lc.Engine(model_of("llama"), slots=1, n_ctx=256, n_threads=1) as engine:
            with running(create_app(engine, close_engine=close_engine)) as url:
                assert httpx.get(f"{url}/health").status_code == 200
            assert engine.closed is close_engine


def test_it_can_be_mounted_in_another_app(engine: lc.Engine) -> None:
    outer = FastAPI()
    outer.mount("/llm", create_app(engine, api_keys=["key"], model_name="inner"))

    @outer.get("/hello")
    async def hello() -> str:
        return "hello"

    with running(outer) as url:
        assert httpx.get(f"{url}/hello").json() == "hello"
        assert httpx.get(f"{url}/llm/health").status_code == 200
        assert httpx.get(f"{url}/llm/").status_code == 200
        assert httpx.get(f"{url}/llm/v1/models").status_code == 401
        headers = {"Authorization": "Bearer key"}
        answer = httpx.post(f"{url}/llm/v1/completions", json=greedy("Go on", 3), headers=headers, timeout=PATIENCE)
        assert answer.json()["model"] == "inner"
        metrics = httpx.get(f"{url}/llm/metrics", headers=headers).text
    assert 'llamacancel_http_answers_total{endpoint="/v1/completions",status="200"} 1.0' in metrics


def test_pieces_of_text_that_are_there_together_are_sent_together(model_of: Any) -> None:
    sent: list[bytes] = []
    with lc.Engine(model_of("llama"), slots=1, n_ctx=512, n_threads=1, stream_interval=1000) as engine:
        app = create_app(engine)

        async def noting(scope: Any, receive: Any, send: Any) -> None:
            async def noted(message: Any) -> None:
                sent.append(message.get("body", b""))
                await send(message)

            await app(scope, receive, noted)

        with running(noting) as url:
            body = greedy("Go on", 100, stream=True, ignore_eos=True)
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE)
    assert b"".join(sent) == answer.content
    assert answer.text.count("data: {") > 50
    assert sum(b"data: {" in part for part in sent) <= 4, "the first text, the rest, and the end"


def test_the_first_schema_finds_the_vocabulary_prepared(model_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = matcher._tokenizer

    def counted(pieces: Any, *args: Any) -> Any:
        made.append(len(pieces))
        return make(pieces, *args)

    monkeypatch.setattr(matcher, "_tokenizer", counted)
    with (
        lc.Model.load(model_path("llama")) as model,
        lc.Engine(model, slots=1, n_ctx=256, n_threads=1) as engine,
    ):
        app = create_app(engine)
        assert made == [model.n_vocab]
        with running(app) as url:
            schema = {"name": "yes", "schema": {"const": "yes"}}
            body = {
                "messages": [{"role": "user", "content": "Say it."}],
                "response_format": {"type": "json_schema", "json_schema": schema},
            }
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=PATIENCE)
        assert answer.json()["choices"][0]["message"]["content"] == '"yes"'
        assert made == [model.n_vocab]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_hang_up_is_noticed_through_the_middleware_of_others(engine: lc.Engine, stream: bool) -> None:
    async def passing(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    app = create_app(engine)
    app.add_middleware(BaseHTTPMiddleware, dispatch=passing)
    app.state.service.name_of = lambda request_id: request_id  # so that the engine's view of it is found
    name = f"quitter-{stream}"

    async def quit_halfway(url: str) -> None:
        async with httpx.AsyncClient(timeout=PATIENCE) as client:
            body = greedy("Go on", 480, stream=stream)
            asking = asyncio.create_task(
                client.post(f"{url}/v1/completions", json=body, headers={"X-Request-Id": name})
            )
            while not any(view.id == name for view in engine.snapshot().active):
                await asyncio.sleep(0.001)
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asking

    run, open_ = engine._thread.runner.run, threading.Event()

    def held(plan: Any) -> Any:
        assert open_.wait(PATIENCE)
        return run(plan)

    engine._thread.runner.run = held
    with running(app) as url:
        asyncio.run(quit_halfway(url))
        eventually(lambda: app.state.service.groups[NOBODY, name].disconnected)
        open_.set()
        eventually(lambda: (NOBODY, name) not in app.state.service.groups)
    assert [view.finish_reason for view in engine.snapshot().recent] == ["cancelled"]


def test_two_apps_can_serve_one_engine(engine: lc.Engine) -> None:
    first, second = create_app(engine, close_engine=False), create_app(engine, model_name="other", close_engine=False)
    with running(first) as one, running(second) as two:
        names = [
            httpx.post(f"{url}/v1/completions", json=greedy("Go on", 2), timeout=PATIENCE).json()["model"]
            for url in (one, two)
        ]
    assert names[1] == "other" != names[0]


def test_a_lifespan_of_ones_own_can_close_it(engine: lc.Engine) -> None:
    inner = create_app(engine)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await inner.state.service.close()

    outer = FastAPI(lifespan=lifespan)
    outer.mount("/", inner)
    with running(outer) as url:
        assert httpx.get(f"{url}/health").status_code == 200
    assert engine.closed
