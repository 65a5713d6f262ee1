"""Who may do what: a request's id is known to its client alone, and is a right within one's own key's requests only."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from llamacancel.server.limits import NoPaths

from .served import Hold, Served, any_step, eventually, greedy, serving
from .test_limits import error_of

COMPLETIONS = "/v1/completions"
ANN, BOB, OPERATOR = ({"Authorization": f"Bearer {key}"} for key in ("key-of-ann", "key-of-bob", "operator"))


@pytest.fixture(scope="module")
def shared(model_of: Any) -> Iterator[Served]:
    """A server of which two clients have keys."""
    app = {"api_keys": ["key-of-ann", "key-of-bob"], "operator_key": "operator", "opaque": True}
    with serving(model_of("llama"), app=app, slots=4) as served:
        yield served


@pytest.fixture(scope="module")
def public(model_of: Any) -> Iterator[Served]:
    """A server without keys but the operator's, for two names."""
    app = {"operator_key": "operator", "opaque": True, "allowed_hosts": ["localhost", "our.test"]}
    with serving(model_of("llama"), app=app, slots=4) as served:
        yield served


class Asked:
    """A request that goes on until it is cancelled."""

    def __init__(self, served: Served, request_id: str, headers: dict[str, str], **fields: Any) -> None:
        body = json.dumps(greedy("Go on", 60, **fields)).encode()
        lines = [f"{name}: {value}" for name, value in {"X-Request-Id": request_id, **headers}.items()]
        head = "\r\n".join(
            [f"POST {COMPLETIONS} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *lines]
        )
        before = list(served.service.groups.values())
        self.connection = served.connect()
        self.connection.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        eventually(lambda: set(map(id, list(served.service.groups.values()))) - set(map(id, before)), "the arrival")

    def status(self) -> int:
        status = int(self.connection.recv(65536).split(b" ", 2)[1])
        self.connection.close()
        return status


def delete(served: Served, request_id: str, headers: dict[str, str]) -> int:
    with served.client() as client:
        return client.delete(f"/v1/requests/{request_id}", headers=headers).status_code


def delete_held(served: Served, hold: Hold, request_id: str, headers: dict[str, str]) -> int:
    """Cancel a request before the step that an engine waits for, and let it go on."""
    found: list[int] = []
    deleting = threading.Thread(target=lambda: found.append(delete(served, request_id, headers)))
    before = sum(group.token.cancelled for group in served.service.groups.values())
    deleting.start()
    try:
        eventually(lambda: found or sum(g.token.cancelled for g in list(served.service.groups.values())) > before)
    finally:
        hold.release()
        deleting.join()
    return found[0]


def test_an_id_is_a_right_with_its_own_key_only(shared: Served) -> None:
    with shared.held(any_step) as hold:
        asked = Asked(shared, "mine", ANN)
        assert delete(shared, "mine", BOB) == 404
        assert delete_held(shared, hold, "mine", ANN) == 200
    assert asked.status() == 499


def test_two_keys_may_use_the_same_id(shared: Served) -> None:
    with shared.held(any_step) as hold:
        of_ann, of_bob = Asked(shared, "same", ANN), Asked(shared, "same", BOB)
        assert delete_held(shared, hold, "same", BOB) == 200
    assert (of_ann.status(), of_bob.status()) == (200, 499)


def test_with_a_key_one_sees_which_requests_are_ones_own_and_may_cancel_them_by_name(shared: Served) -> None:
    with shared.held(any_step) as hold:
        asked = Asked(shared, "secret-of-ann", ANN)
        seen: dict[str, Any] = {}
        for who, headers in (("ann", ANN), ("bob", BOB), ("operator", OPERATOR)):
            told = shared.get("/slots", headers=headers)
            assert "secret-of-ann" not in told.text
            [seen[who]] = [*told.json()["queue"], *told.json()["active"]]
        assert [seen[who]["yours"] for who in ("ann", "bob", "operator")] == [True, False, True]
        name = seen["bob"]["id"]
        assert delete(shared, name, BOB) == 404
        assert delete_held(shared, hold, name, ANN) == 200
    assert asked.status() == 499


def test_without_keys_nobody_is_told_an_id_that_a_client_chose(
    public: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), public.held(any_step) as hold:
        asked = Asked(public, "chosen-by-me", {})
        told = public.get("/slots")
        [view] = [*told.json()["queue"], *told.json()["active"]]
        with public.client() as client, client.stream("GET", "/events") as events:
            event = next(line for line in events.iter_lines() if line.startswith("data: "))
        for text in (told.text, event, public.get("/metrics").text):
            assert "chosen-by-me" not in text
        assert view["yours"] is False
        assert delete(public, view["id"], {}) == 404, "what all are told is no right"
        assert delete_held(public, hold, view["id"], OPERATOR) == 200
    assert asked.status() == 499
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("llamacancel", "uvicorn"))]
    assert not any("chosen-by-me" in message for message in ours)


def test_several_answers_are_cancelled_alone_by_the_ids_of_their_client(public: Served) -> None:
    with public.held(any_step) as hold:
        asked = Asked(public, "pair", {}, n=2)
        eventually(lambda: public.service.groups and len(next(iter(public.service.groups.values())).works) == 2)
        assert delete(public, "pair.2", {}) == 404
        works = next(iter(public.service.groups.values())).works
        deleting = threading.Thread(target=delete, args=(public, "pair.1", {}))
        deleting.start()
        eventually(lambda: works[1].generation._token.cancelled, "the cancel")
        hold.release()
        deleting.join()
    assert asked.status() == 200
    assert [work.finish_reason for work in works] == ["length", "cancelled"]


def test_work_from_beside_the_server_is_the_operators_to_cancel(public: Served) -> None:
    with public.held(any_step) as hold:
        work = public.engine.submit([1, 2, 3], max_tokens=400, request_id="beside")
        assert delete(public, "beside", {}) == 404
        assert delete(public, "beside", OPERATOR) == 200
        hold.release()
        assert work.wait(60)
    assert work.finish_reason == "cancelled"


def test_who_tries_again_while_its_first_attempt_is_being_cancelled_gets_an_answer(public: Served) -> None:
    with public.held(any_step) as hold:
        first = Asked(public, "again", {})
        first.connection.close()
        eventually(lambda: all(group.disconnected for group in public.service.groups.values()), "the hang-up")
        with public.client() as client:
            request = client.build_request("POST", COMPLETIONS, json=greedy("x", 1), headers={"X-Request-Id": "again"})
            body = request.read()
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            second = public.connect()
            second.sendall(f"{head}X-Request-Id: again\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            assert client.get("/health").status_code == 200
        hold.release()
    assert second.recv(4096).startswith(b"HTTP/1.1 200 ")
    second.close()
    with public.held(any_step) as hold:
        going_on = Asked(public, "again", {})
        refused = public.post(COMPLETIONS, greedy("x", 1), headers={"X-Request-Id": "again"})
        assert error_of(refused, 409)["code"] == "duplicate_request_id"
        assert delete_held(public, hold, "again", {}) == 200
    assert going_on.status() == 499


@pytest.mark.parametrize("host", ["evil.test", "evil.test:80", "localhost.evil.test", ""])
def test_without_keys_a_name_that_is_not_the_servers_is_refused(public: Served, host: str) -> None:
    assert error_of(public.get("/slots", headers={"Host": host}), 403)["code"] == "host_not_allowed"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8080", "our.test.", "127.0.0.1:1", "[::1]:8080", "10.0.0.7"])
def test_the_servers_own_names_and_addresses_are_taken(public: Served, host: str) -> None:
    assert public.get("/slots", headers={"Host": host}).status_code == 200


def test_with_keys_any_name_will_do(shared: Served) -> None:
    assert shared.get("/slots", headers={"Host": "evil.test", **ANN}).status_code == 200


def test_the_log_of_accesses_tells_no_id() -> None:
    arguments = ("1.2.3.4:5", "DELETE", "/v1/requests/chosen-by-me", "1.1", 404)
    record = logging.LogRecord("uvicorn.access", 20, "", 0, '%s - "%s %s HTTP/%s" %d', arguments, None)
    assert NoPaths().filter(record)
    assert "chosen-by-me" not in record.getMessage()
