"""A real server on a free port, clients that hang up, and an engine that a test can hold between two steps."""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import uvicorn

import llamacancel as lc
from llamacancel.chat import prompt as chat_prompt
from llamacancel.engine.views import EngineSnapshot, RequestView
from llamacancel.server import create_app
from llamacancel.server.protocol import ListeningProtocol
from llamacancel.server.run import Server
from llamacancel.server.service import NOBODY

PATIENCE = 60.0
"""Seconds after which something that has to happen counts as never happening."""


def eventually(happened: Callable[[], Any], what: str = "it") -> Any:
    """Wait until `happened()` is true and return what it said."""
    end = time.monotonic() + PATIENCE
    while True:
        if found := happened():
            return found
        assert time.monotonic() < end, f"{what} never happened"
        time.sleep(0.002)


class Hold:
    """An engine that waits before a step."""

    def __init__(self, when: Callable[[EngineSnapshot], bool]) -> None:
        self._changed = threading.Condition()
        self._when: Callable[[EngineSnapshot], bool] | None = when
        self._reached = False

    def wait(self) -> None:
        """Wait until the engine has come there."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._reached, PATIENCE), "the engine never got there"

    def then(self, when: Callable[[EngineSnapshot], bool]) -> None:
        """Let the engine go on to another place, and wait until it has come there."""
        with self._changed:
            self._when, self._reached = when, False
            self._changed.notify_all()
        self.wait()

    def release(self) -> None:
        """Let the engine go on, and hold it no more."""
        with self._changed:
            self._when, self._reached = None, False
            self._changed.notify_all()

    def check(self, engine: lc.Engine) -> None:
        """For the engine's thread: wait if this is the place."""
        with self._changed:
            while self._when is not None and self._when(engine.snapshot()):
                self._reached = True
                self._changed.notify_all()
                assert self._changed.wait_for(lambda: not self._reached, PATIENCE), "the engine was never released"


class Reading:
    """Stands in for a server's model, and turns a text into tokens only once that was cancelled, or this has ended."""

    def __init__(self, model: lc.Model) -> None:
        self._model = model
        self._tokens: queue.Queue[lc.CancelToken] = queue.Queue()
        self._over = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def tokenize(self, text: str, add_special: bool, parse_special: bool, token: lc.CancelToken) -> Any:
        self._tokens.put(token)
        eventually(lambda: token.cancelled or self._over.is_set())
        return self._model.tokenize(text, add_special, parse_special, token)

    def token(self) -> lc.CancelToken:
        """The token of the next text, once that is being read."""
        return self._tokens.get(timeout=PATIENCE)

    def end(self) -> None:
        """Hold nobody any more."""
        self._over.set()


_LONG_TEXT = "Go on. " * 1000
LONG_TEXTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": _LONG_TEXT}),
    ("/v1/completions", {"prompt": _LONG_TEXT, "stream": True}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": _LONG_TEXT}]}),
    ("/v1/embeddings", {"input": _LONG_TEXT}),
    ("/tokenize", {"content": _LONG_TEXT}),
]
"""Endpoints, and bodies whose text is turned into tokens in a thread."""

_numbers = itertools.count()


def new_id(name: str) -> str:
    """An id that no other request has."""
    return f"{name}-{next(_numbers)}"


class Served:
    """A server, and what a test wants to know of it.

    Attributes:
        url: Where it is.
        engine: Its engine, which `held` can stop between two steps.
        app: Its app.
    """

    def __init__(self, engine: lc.Engine, *, opaque: bool = False, **options: Any) -> None:
        self.engine = engine
        self.app = create_app(engine, **{"drain_timeout": 20.0, **options})
        self.service = self.app.state.service
        if not opaque:
            self.service.name_of = lambda request_id: request_id  # so that a test finds its requests in the engine
        self._hold: Hold | None = None
        self._run = engine._thread.runner.run
        engine._thread.runner.run = self._gated
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32768)  # its connections have it, too
        self._listener.bind(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            self.app, http=ListeningProtocol, ws="none", lifespan="on", log_config=None, timeout_graceful_shutdown=30
        )
        self.server = Server(config, self.service)
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._listener]}, daemon=True)

    def start(self) -> None:
        self._thread.start()
        eventually(lambda: self.server.started, "the start")

    def stop(self) -> None:
        """Shut down and wait for it."""
        self.server.should_exit = True
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the server did not stop"

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.get(path, **options)

    # -- the engine

    def _gated(self, plan: Any) -> Any:
        hold = self._hold
        if hold is not None:
            hold.check(self.engine)
        return self._run(plan)

    @contextlib.contextmanager
    def held(self, when: Callable[[EngineSnapshot], bool]) -> Iterator[Hold]:
        """Within, the engine waits before the first step in which `when(snapshot)` is true, until it is released."""
        hold = self._hold = Hold(when)
        try:
            yield hold
        finally:
            self._hold = None
            hold.release()

    @contextlib.contextmanager
    def reading(self) -> Iterator[Reading]:
        """Within, a text that is turned into tokens takes until it is cancelled."""
        reading = Reading(self.engine.model)
        self.service.model = reading
        tokens_of = chat_prompt._tokens_of
        chat_prompt._tokens_of = lambda _, pieces, token: tokens_of(reading, pieces, token)
        try:
            yield reading
        finally:
            self.service.model = self.engine.model
            chat_prompt._tokens_of = tokens_of
            reading.end()

    def group(self, request_id: str) -> Any:
        """The request that its client, who has no key, calls so, if it is on its way."""
        return self.service.groups.get((NOBODY, request_id))

    def wait_known(self, *request_ids: str) -> None:
        """Wait until the engine has requests, which wait or run."""

        def known() -> bool:
            now = self.engine.snapshot()
            return set(request_ids) <= {view.id for view in (*now.queue, *now.active)}

        eventually(known, f"the arrival of {request_ids}")

    def active(self, request_id: str) -> RequestView | None:
        return next((view for view in self.engine.snapshot().active if view.id == request_id), None)

    def queued(self, request_id: str) -> bool:
        return any(view.id == request_id for view in self.engine.snapshot().queue)

    def finished(self, request_id: str) -> RequestView | None:
        """The request with this id, if it has ended."""
        return next((view for view in self.engine.snapshot().recent if view.id == request_id), None)

    def wait_finished(self, request_id: str) -> RequestView:
        view: RequestView = eventually(lambda: self.finished(request_id), f"the end of {request_id}")
        return view

    def wait_noticed(self, request_id: str) -> None:
        """Wait until the server knows that the client of a request it had begun is gone, and has cancelled it."""

        def noticed() -> bool:
            group = self.group(request_id)
            return group is None or (group.disconnected and group.token.cancelled)

        eventually(noticed, f"the hang-up of {request_id}")

    def wait_idle(self) -> None:
        """Wait until nothing is on its way."""

        def idle() -> bool:
            now = self.engine.snapshot()
            return not (now.queue or now.active or self.service.groups)

        eventually(idle, "the end of all requests")

    # -- raw clients

    def connect(self, buffer: int | None = None) -> socket.socket:
        """A connection, which takes in no more than some bytes that nobody reads."""
        connection = socket.socket()
        connection.settimeout(PATIENCE)
        if buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.connect(("127.0.0.1", self.port))
        return connection

    def send(
        self, path: str, body: Any, request_id: str, part: float = 1.0, buffer: int | None = None
    ) -> socket.socket:
        """Send a request, or the first part of it, on a connection of its own."""
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
            f"X-Request-Id: {request_id}\r\nContent-Length: {len(content)}\r\n\r\n"
        ).encode()
        data = head + content
        connection = self.connect(buffer)
        connection.sendall(data[: len(data) if part == 1.0 else int(len(head) + part * len(content))])
        return connection


def any_step(_: EngineSnapshot) -> bool:
    """A place to hold an engine: before any step."""
    return True


def in_state(request_id: str, state: str, done: int = 0, written: int = 0) -> Callable[[EngineSnapshot], bool]:
    """A place to hold an engine: a request is in a state, with so much of its prompt done and of its answer written."""
    return lambda now: any(
        view.id == request_id and view.state == state and view.prompt_done >= done and view.completion_tokens >= written
        for view in now.active
    )


def _template(thinking: str) -> str:
    """A template as Qwen's, which shows tools and calls, and what was thought."""
    return (
        "{% if tools %}<|im_start|>system\n# Tools\n<tools>"
        "{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools><|im_end|>\n{% endif %}"
        f"{{% for message in messages %}}<|im_start|>{{{{ message.role }}}}\n{thinking}"
        "{{ message.content or '' }}{% for call in message.tool_calls or [] %}\n<tool_call>\n"
        '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
        "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


TOOLED = _template("")
THINKING = _template(
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
)


@contextlib.contextmanager
def serving(model: lc.Model, *, app: dict[str, Any] | None = None, **engine: Any) -> Iterator[Served]:
    """A server of a model with small steps: two slots, one thread, pieces of 32 rows; and as exact as it gets."""
    settings: dict[str, Any] = {"slots": 2, "queue_limit": 8, "n_ctx": 2048, "n_ubatch": 32, "n_batch": 64}
    exact: dict[str, Any] = {"n_threads": 1, "type_k": "f32", "type_v": "f32", "flash_attn": False}
    served = Served(lc.Engine(model, **{**settings, **exact, **engine}), **(app or {}))
    served.start()
    try:
        yield served
    finally:
        served.stop()


@contextlib.contextmanager
def short_of_memory(model: lc.Model) -> Iterator[tuple[Served, str]]:
    """A held server in which one request writes, and another, the first in line, finds no memory beside it: its id."""
    writing, waiting = new_id("writing"), new_id("waiting")
    with serving(model, n_ctx=512, kv_unified=True) as served:
        with served.held(in_state(writing, "decode", written=1)) as hold:
            first = served.engine.submit(tokens(served, 300, 1), max_tokens=8, request_id=writing)
            hold.wait()
            second = served.engine.submit(tokens(served, 300, 2), max_tokens=2, request_id=waiting)
            hold.then(in_state(writing, "decode", written=3))
            yield served, waiting
        first.result(PATIENCE)
        second.result(PATIENCE)


def read_events(connection: socket.socket, count: int) -> list[str]:
    """Read a stream's head and so many of its events from a raw connection."""
    data = b""
    while data.count(b"\n\n") < count:
        more = connection.recv(4096)
        assert more, f"the stream ended: {data!r}"
        data += more
    return [line[6:].decode() for line in data.split(b"\n") if line.startswith(b"data: ")]


def events_of(text: str) -> list[dict[str, Any]]:
    """The JSON of a stream's events, which have to end with [DONE]."""
    found = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert found[-1] == "[DONE]"
    return [json.loads(each) for each in found[:-1]]


def greedy(prompt: Any, max_tokens: int = 24, **fields: Any) -> dict[str, Any]:
    """The body of a completion that is the same every time."""
    return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **fields}


def tokens(served: Served, n: int, seed: int) -> list[int]:
    """A prompt of random tokens, which has nothing in common with that of another seed."""
    chosen: list[int] = np.random.default_rng([seed, n]).integers(300, served.engine.model.n_vocab, n).tolist()
    return chosen


def steady(served: Served, n: int, seed: int, max_tokens: int) -> dict[str, Any]:
    """The body of a completion whose text does not depend on the company it is computed in.

    Rows that are computed together with others differ in their last bits. So this looks for a prompt on whose greedy
    way no token is nearly as likely as the one that is chosen; "nearly" is some hundred times such a difference.
    """
    for attempt in range(1000):
        given = tokens(served, n, seed + 1000 * attempt)
        sampler = lc.Sampler(temperature=0)
        result = served.engine.submit(given, max_tokens=max_tokens, sampler=sampler, logprobs=2).result()
        if all(token.top[0][2] - token.top[1][2] > 0.005 for token in result.tokens):
            return greedy(given, max_tokens)
    raise AssertionError("there is no such prompt")


def text_of(response: httpx.Response) -> str:
    """The text of a completion."""
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text
