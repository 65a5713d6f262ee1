"""Clients that hang up at every phase: their work stops, their slot is free, the neighbour's answer is the same."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from llamacancel.engine.views import RequestView

from .served import (
    LONG_TEXTS,
    PATIENCE,
    Hold,
    Served,
    any_step,
    eventually,
    greedy,
    in_state,
    new_id,
    read_events,
    text_of,
    tokens,
)

PATH = "/v1/completions"
KnownText = Callable[..., tuple[dict[str, Any], str]]

# How a client goes: an orderly close, a reset, or only its sending half closed.
WAYS: dict[str, Callable[[socket.socket], None]] = {}


def way(go: Callable[[socket.socket], None]) -> Callable[[socket.socket], None]:
    WAYS[go.__name__] = go
    return go


@way
def close(connection: socket.socket) -> None:
    connection.close()


@way
def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@way
def half_close(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)


every_way = pytest.mark.parametrize("go", WAYS.values(), ids=WAYS)


class Asking(threading.Thread):
    """A client in a thread of its own, which reads its answer to the end."""

    def __init__(self, served: Served, body: dict[str, Any], request_id: str) -> None:
        super().__init__(daemon=True)
        self._served, self._body, self._id = served, body, request_id
        self.answer: httpx.Response | None = None
        self.start()

    def run(self) -> None:
        self.answer = self._served.post(PATH, self._body, headers={"X-Request-Id": self._id})

    def text(self) -> str:
        self.join(PATIENCE)
        assert self.answer is not None, "the neighbour was never answered"
        return text_of(self.answer)


@contextmanager
def neighbour(served: Served, known_text: KnownText) -> Iterator[Hold]:
    """Within, another client is in the middle of its answer, which must be what it is alone. The engine is held."""
    body, expected = known_text(served, 40, 11, 120)
    name = new_id("neighbour")
    with served.held(in_state(name, "decode", written=3)) as hold:
        asking = Asking(served, body, name)
        hold.wait()
        yield hold
        hold.release()
        assert asking.text() == expected


def hang_up_at(
    served: Served,
    hold: Hold,
    body: dict[str, Any],
    go: Callable[[socket.socket], None],
    place: dict[str, Any],
    events: int = 0,
) -> RequestView:
    """Ask, and hang up when the engine has come to a place, beside whoever it holds; what became of it."""
    quitter = new_id("quitter")
    connection = served.send(PATH, body, quitter)
    served.wait_known(quitter)
    hold.then(in_state(quitter, **place))
    assert len(served.engine.snapshot().active) == 2, "it should not be alone"
    if events:
        read_events(connection, events)
    go(connection)
    served.wait_noticed(quitter)
    hold.release()
    view = served.wait_finished(quitter)
    connection.close()
    return view


@every_way
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_in_a_silent_prompt(
    served: Served, known_text: KnownText, go: Callable[[socket.socket], None], stream: bool
) -> None:
    body = greedy(tokens(served, 900, seed=23), 10, stream=stream)
    with neighbour(served, known_text) as hold:
        view = hang_up_at(served, hold, body, go, {"state": "prefill", "done": 32})
    assert (view.finish_reason, view.cause, view.reason) == ("cancelled", "client", "the client hung up")
    assert view.completion_tokens == 0
    assert view.cancel_latency is not None


@every_way
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_after_the_first_token(
    served: Served, known_text: KnownText, go: Callable[[socket.socket], None], stream: bool
) -> None:
    body = greedy(tokens(served, 20, seed=5), 400, stream=stream)
    with neighbour(served, known_text) as hold:
        view = hang_up_at(served, hold, body, go, {"state": "decode", "written": 1})
    assert view.finish_reason == "cancelled"
    assert 1 <= view.completion_tokens <= 3


@every_way
def test_in_the_middle_of_a_stream(served: Served, known_text: KnownText, go: Callable[[socket.socket], None]) -> None:
    body = greedy(tokens(served, 20, seed=6), 400, stream=True)
    with neighbour(served, known_text) as hold:
        view = hang_up_at(served, hold, body, go, {"state": "decode", "written": 30}, events=1)
    assert view.finish_reason == "cancelled"
    assert 30 <= view.completion_tokens <= 33


@every_way
def test_in_the_queue(served: Served, known_text: KnownText, go: Callable[[socket.socket], None]) -> None:
    other, expected = known_text(served, 30, 3, 100)
    quitter = new_id("quitter")
    with neighbour(served, known_text) as hold:
        second = new_id("second")
        asking = Asking(served, other, second)
        served.wait_known(second)
        hold.then(in_state(second, "decode", written=1))
        connection = served.send(PATH, greedy("never begun"), quitter)
        eventually(lambda: served.queued(quitter))
        go(connection)
        # It is gone from the queue although the engine does nothing at all.
        view = served.wait_finished(quitter)
        connection.close()
        hold.release()
        assert asking.text() == expected
    assert view.finish_reason == "cancelled"
    assert view.started_at is None


@pytest.mark.parametrize("part", [0.0, 0.5], ids=["after the headers", "in the body"])
def test_before_the_body_is_complete(served: Served, known_text: KnownText, part: float) -> None:
    quitter = new_id("quitter")
    with neighbour(served, known_text):
        served.send(PATH, greedy(tokens(served, 400, seed=9), 10), quitter, part=part).close()
        assert served.get("/health").status_code == 200
    served.wait_idle()
    assert served.finished(quitter) is None


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_takes_all_answers_of_a_request_along(served: Served, stream: bool) -> None:
    quitter = new_id("quitter")
    ids = [f"{quitter}.{index}" for index in range(3)]  # two run, one waits
    with served.held(any_step) as hold:
        connection = served.send(PATH, greedy(tokens(served, 20, seed=8), 400, n=3, stream=stream), quitter)
        served.wait_known(*ids)
        hold.then(lambda now: sum(view.state == "decode" for view in now.active) == 2)
        connection.close()
        served.wait_noticed(quitter)
        hold.release()
        views = [served.wait_finished(each) for each in ids]
    assert [view.finish_reason for view in views] == ["cancelled"] * 3
    assert views[2].started_at is None


@pytest.mark.parametrize(
    "stray", [b"\r\n", b"GET /health HTTP/1.1\r\nHost: test\r\n\r\n" * 3], ids=["line", "requests"]
)
def test_after_bytes_that_follow_the_request(served: Served, stray: bytes) -> None:
    quitter = new_id("quitter")
    with served.held(in_state(quitter, "prefill", done=32)) as hold:
        connection = served.send(PATH, greedy(tokens(served, 900, seed=29), 10), quitter)
        hold.wait()
        connection.sendall(stray)
        connection.close()
        served.wait_noticed(quitter)
        hold.release()
        assert served.wait_finished(quitter).finish_reason == "cancelled"


def test_of_a_client_that_stopped_reading(served: Served, known_text: KnownText) -> None:
    lazy = new_id("lazy")
    with neighbour(served, known_text) as hold:
        # Its answer, with many alternatives to each token, is longer than what sockets hold back for it.
        body = greedy(tokens(served, 20, seed=31), 300, stream=True, logprobs=20, n=4)
        connection = served.send(PATH, body, lazy, buffer=4096)
        served.wait_known(f"{lazy}.0")
        hold.release()
        views = [served.wait_finished(f"{lazy}.{index}") for index in range(4)]
        assert [view.finish_reason for view in views] == ["length"] * 4
        assert served.group(lazy) is not None, "its answer is still being sent"
        assert text_of(served.post(PATH, greedy("And others?", 4)))
        connection.close()


def test_again_and_again_leaves_the_prompt_for_a_retry(served: Served) -> None:
    body = greedy(tokens(served, 900, seed=37), 6)
    for turn in range(3):
        quitter = new_id("quitter")
        with served.held(in_state(quitter, "prefill", done=200 * (turn + 1))) as hold:
            connection = served.send(PATH, body, quitter)
            hold.wait()
            connection.close()
            served.wait_noticed(quitter)
        assert served.wait_finished(quitter).finish_reason == "cancelled"
    answer = served.post(PATH, body).json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 500


def test_gives_the_slot_to_the_next_in_line(served: Served, known_text: KnownText) -> None:
    body = greedy(tokens(served, 20, seed=41), 400)
    short, expected = known_text(served, 10, 43, 8)
    with served.held(any_step) as hold:
        names = [new_id("quitter"), new_id("quitter")]
        quitters = [served.send(PATH, body, name) for name in names]
        served.wait_known(*names)
        hold.then(lambda now: sum(view.state == "decode" for view in now.active) == 2)
        waiting = new_id("waiting")
        asking = Asking(served, short, waiting)
        served.wait_known(waiting)
        quitters[0].close()
        served.wait_noticed(names[0])
        hold.then(in_state(waiting, "decode"))
        assert served.active(names[1]), "the other one goes on"
        hold.release()
        assert asking.text() == expected
        quitters[1].close()
    assert served.wait_finished(names[0]).finish_reason == "cancelled"


@pytest.mark.parametrize(("path", "body"), LONG_TEXTS)
def test_while_a_long_text_is_turned_into_tokens(llama: Served, path: str, body: dict[str, Any]) -> None:
    quitter = new_id("quitter")
    with llama.reading() as reading:
        connection = llama.send(path, body, quitter)
        token = reading.token()
        connection.close()
        llama.wait_noticed(quitter)
        assert token.wait(PATIENCE)
    llama.wait_idle()
    assert token.reason == "the client hung up"
    assert llama.finished(quitter) is None
