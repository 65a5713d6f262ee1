"""Connections are bounded: whoever keeps the server waiting makes room, and work that goes on is never cut."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable, Iterator

import pytest

import llamacancel as lc
from llamacancel.server.ops import events
from llamacancel.server.protocol import ListeningProtocol

from .served import Served, any_step, eventually, greedy, new_id, serving

COMPLETIONS = "/v1/completions"
HEALTH = b"GET /health HTTP/1.1\r\nHost: test\r\n\r\n"


@pytest.fixture(scope="module")
def few(exact_model: Callable[[str], lc.Model]) -> Iterator[Served]:
    """A server that holds three connections at once."""
    with pytest.MonkeyPatch.context() as patch, serving(exact_model("llama")) as served:
        patch.setattr(ListeningProtocol, "most", 3)
        yield served


def status_on(connection: socket.socket) -> int:
    """Read an answer; its status."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    answer.read()
    return answer.status


def healthy(served: Served) -> socket.socket:
    """A connection that had an answer, and is idle since."""
    connection = served.connect()
    connection.sendall(HEALTH)
    assert status_on(connection) == 200
    return connection


def is_cut(connection: socket.socket) -> bool:
    """Whether the server ends a connection without a word."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
    finally:
        connection.close()


def test_one_connection_too_many_takes_the_place_of_the_longest_idle(few: Served) -> None:
    first, *others = [healthy(few) for _ in range(3)]
    newest = healthy(few)
    assert is_cut(first)
    for connection in (*others, newest):
        connection.sendall(HEALTH)
        assert status_on(connection) == 200
        connection.close()


def test_a_body_that_does_not_come_makes_room_and_work_goes_on(few: Served) -> None:
    name, slow = new_id("works"), new_id("slow")
    with few.held(any_step) as hold:
        working = few.send(COMPLETIONS, greedy("Go on", 3), name)
        few.wait_known(name)
        sending = [few.send(COMPLETIONS, greedy("Go on", 3), slow, part=0.5) for _ in range(2)]
        eventually(lambda: sum(each.cycle is not None for each in few.server.server_state.connections) == 3)
        newest = healthy(few)
        assert is_cut(sending[0])
        hold.release()
    assert status_on(working) == 200
    for connection in (working, sending[1], newest):
        connection.close()


def test_where_all_connections_are_at_work_a_further_one_is_told_so(few: Served) -> None:
    names = [new_id("works") for _ in range(3)]
    with few.held(any_step) as hold:
        working = [few.send(COMPLETIONS, greedy("Go on", 3), name) for name in names]
        few.wait_known(*names)
        refused = few.connect()
        assert status_on(refused) == 503
        refused.close()
        hold.release()
    for connection in working:
        assert status_on(connection) == 200
        connection.close()


def test_a_head_has_to_be_there_in_time_however_it_drips(
    exact_model: Callable[[str], lc.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ListeningProtocol, "head_seconds", 0.3)
    with serving(exact_model("llama")) as served:
        name = new_id("works")
        with served.held(any_step) as hold:
            working = served.send(COMPLETIONS, greedy("Go on", 3), name)
            served.wait_known(name)
            dripping = served.connect()
            dripping.sendall(HEALTH[:-2] + b"X-Drip: ")
            dripping.settimeout(0.02)

            def drip() -> bool:
                try:
                    dripping.sendall(b"x")
                    return dripping.recv(1) == b""
                except TimeoutError:
                    return False
                except OSError:
                    return True

            eventually(drip, "the end of the connection")
            dripping.close()
            hold.release()
        assert status_on(working) == 200, "who has sent its request waits for as long as that takes"
        working.close()


def test_one_reader_of_events_too_many_ends_the_oldest(llama: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MOST_READERS", 2)
    readers = []
    for number in range(3):
        connection = llama.connect()
        connection.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.readline().startswith(b"retry:"), number
        readers.append((connection, answer))
    readers[0][1].read()  # comes to its end
    assert len(llama.service.readers) == 2
    for connection, answer in readers:
        answer.close()
        connection.close()
    eventually(lambda: not llama.service.readers)
