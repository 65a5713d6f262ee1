"""Cancels that come as requests, deadlines, a full queue, ids that are taken, and the end of the server."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import pytest

import llamacancel as lc

from .served import (
    LONG_TEXTS,
    PATIENCE,
    Served,
    any_step,
    events_of,
    eventually,
    greedy,
    in_state,
    new_id,
    serving,
    tokens,
)

COMPLETIONS = "/v1/completions"


class Asking(threading.Thread):
    """A client in a thread of its own."""

    def __init__(self, served: Served, path: str, body: dict[str, Any], request_id: str, **headers: str) -> None:
        super().__init__(daemon=True)
        self._ask = lambda: served.post(path, body, headers={"X-Request-Id": request_id, **headers})
        self._answer: httpx.Response | None = None
        self.start()

    def run(self) -> None:
        self._answer = self._ask()

    def answer(self) -> httpx.Response:
        self.join(PATIENCE)
        assert self._answer is not None, "there was no answer"
        return self._answer


def delete(served: Served, request_id: str, **headers: str) -> httpx.Response:
    with served.client() as client:
        return client.delete(f"/v1/requests/{request_id}", headers=headers)


@pytest.mark.parametrize(
    ("path", "extra"),
    [
        (COMPLETIONS, {"prompt": "Go on"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Go on"}]}),
    ],
    ids=["completions", "chat"],
)
def test_delete_cancels_a_request_and_tells_its_client(served: Served, path: str, extra: dict[str, Any]) -> None:
    name = new_id("named")
    with served.held(in_state(name, "decode", written=2)) as hold:
        asking = Asking(served, path, {"max_tokens": 400, "temperature": 0, **extra}, name)
        hold.wait()
        deleting = threading.Thread(target=lambda: found.append(delete(served, name)), daemon=True)
        found: list[httpx.Response] = []
        deleting.start()
        eventually(lambda: _cancelled(served, name))
        hold.release()
        deleting.join(PATIENCE)
    answer = asking.answer()
    assert answer.status_code == 499
    assert answer.json()["error"]["type"] == "cancelled"
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["x-request-id"] == name
    told = found[0].json()
    assert (told["id"], told["cancelled"]) == (name, True)
    assert told["cancel_latency"] == served.wait_finished(name).cancel_latency
    assert delete(served, name).status_code == 404


def test_delete_ends_a_stream_with_its_reason(served: Served) -> None:
    name = new_id("named")
    with served.held(in_state(name, "decode", written=4)) as hold:
        asking = Asking(served, COMPLETIONS, greedy("Go on", 400, stream=True), name)
        hold.wait()
        threading.Thread(target=delete, args=(served, name), daemon=True).start()
        eventually(lambda: _cancelled(served, name))
        hold.release()
    events = events_of(asking.answer().text)
    assert events[-1]["choices"][0]["finish_reason"] == "cancelled"
    assert "".join(event["choices"][0]["text"] for event in events)


def test_delete_reaches_the_queue(llama: Served) -> None:
    with llama.held(any_step) as hold:
        names = [new_id("named") for _ in range(3)]
        askings = []
        for name in names:
            askings.append(Asking(llama, COMPLETIONS, greedy("Go on", 30), name))
            llama.wait_known(name)
        assert delete(llama, names[2]).json()["cancelled"] is True
        assert askings[2].answer().status_code == 499
        hold.release()
    assert [asking.answer().status_code for asking in askings] == [200, 200, 499]


@pytest.mark.parametrize(("path", "body"), LONG_TEXTS)
def test_delete_reaches_a_text_that_is_turned_into_tokens(llama: Served, path: str, body: dict[str, Any]) -> None:
    name = new_id("named")
    with llama.reading() as reading:
        asking = Asking(llama, path, body, name)
        token = reading.token()
        told = delete(llama, name)
    assert token.reason == "cancelled by DELETE"
    assert told.json() == {"id": name, "cancelled": True, "cancel_latency": told.json()["cancel_latency"]}
    assert told.json()["cancel_latency"] >= 0
    answer = asking.answer()
    assert (answer.status_code, answer.json()["error"]["code"]) == (499, "cancelled")
    assert delete(llama, name).status_code == 404
    assert llama.finished(name) is None, "the engine never knew it"


@pytest.mark.parametrize(("path", "body"), LONG_TEXTS)
def test_the_time_of_a_text_that_is_turned_into_tokens_ends(llama: Served, path: str, body: dict[str, Any]) -> None:
    with llama.reading():
        answer = llama.post(path, body, headers={"X-Request-Timeout": "0.05"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "deadline")


def test_the_time_of_tokens_that_are_turned_into_text_ends(llama: Served) -> None:
    answer = llama.post("/detokenize", {"tokens": [300] * 5000}, headers={"X-Request-Timeout": "0.000001"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "deadline")


def test_an_id_is_in_use_from_its_arrival_on(llama: Served) -> None:
    name = new_id("twice")
    with llama.reading() as reading:
        asking = Asking(llama, "/tokenize", {"content": "Go on. " * 1000}, name)
        reading.token()
        assert llama.post(COMPLETIONS, greedy([300], 2), headers={"X-Request-Id": name}).status_code == 409
    assert asking.answer().status_code == 200


def test_delete_can_take_one_of_several_answers(llama: Served) -> None:
    name = new_id("named")
    with llama.held(in_state(f"{name}.1", "decode", written=1)) as hold:
        asking = Asking(llama, COMPLETIONS, greedy("Go on", 40, n=2), name)
        hold.wait()
        threading.Thread(target=delete, args=(llama, f"{name}.1"), daemon=True).start()
        eventually(lambda: llama.group(name).works[1].generation._token.cancelled)
        hold.release()
    choices = asking.answer().json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["length", "cancelled"]
    assert choices[0]["text"].startswith(choices[1]["text"])


def test_delete_of_an_unknown_request_is_404(llama: Served) -> None:
    answer = delete(llama, "nobody")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "request_not_found"


def test_delete_reaches_what_others_have_the_engine_do(llama: Served) -> None:
    name = new_id("beside")
    with llama.held(any_step) as hold:
        generation = llama.engine.submit("Beside the server", request_id=name)
        hold.wait()
        assert delete(llama, name, Authorization="Bearer operator").status_code == 200
        hold.release()
        assert generation.wait(PATIENCE)
    assert generation.finish_reason == "cancelled"


@pytest.mark.parametrize("way", ["body", "header"])
def test_a_request_whose_time_is_over_gets_408(served: Served, way: str) -> None:
    name = new_id("late")
    body = greedy(tokens(served, 900, seed=51), 10)
    headers = {"X-Request-Timeout": "0.05"} if way == "header" else {}
    if way == "body":
        body["timeout"] = 0.05
    with served.held(any_step) as hold:
        asking = Asking(served, COMPLETIONS, body, name, **headers)
        eventually(lambda: _cancelled(served, name))
        hold.release()
    answer = asking.answer()
    assert answer.status_code == 408
    assert answer.json()["error"]["code"] == "deadline"
    assert answer.headers["x-should-retry"] == "false"
    assert served.wait_finished(name).finish_reason == "deadline"


def test_a_stream_whose_time_is_over_ends_with_that_reason(served: Served) -> None:
    name = new_id("late")
    with served.held(in_state(name, "decode", written=3)) as hold:
        asking = Asking(served, COMPLETIONS, greedy("Go on", 400, stream=True, timeout=0.3), name)
        eventually(lambda: _cancelled(served, name))
        hold.release()
    events = events_of(asking.answer().text)
    assert events[-1]["choices"][0]["finish_reason"] == "deadline"


def _cancelled(served: Served, name: str) -> bool:
    """Whether a request has been told to end, or has ended."""
    group = served.group(name)
    if group is None or not group.works:
        return served.finished(name) is not None
    return all(work.generation._token.cancelled for work in group.works)


def test_the_shortest_of_all_timeouts_counts(llama: Served) -> None:
    service = llama.service
    assert service.timeout(None, None) is None
    assert service.timeout(5.0, None) == 5.0
    assert service.timeout(5.0, 2.5) == 2.5
    service.request_timeout = 1.0
    try:
        assert service.timeout(5.0, 2.5) == 1.0
        assert service.timeout(None, None) == 1.0
        assert service.timeout(0.5, None) == 0.5
    finally:
        service.request_timeout = None


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", ""])
def test_a_timeout_header_that_is_no_time_is_refused(llama: Served, value: str) -> None:
    answer = llama.post(COMPLETIONS, greedy("Hello", 1), headers={"X-Request-Timeout": value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "X-Request-Timeout"


def test_a_full_queue_is_429_with_the_time_to_come_back(llama: Served) -> None:
    with llama.held(any_step) as hold:
        room = llama.engine.slots + llama.engine.queue_limit
        askings = []
        for _ in range(room):
            name = new_id("waiting")
            askings.append(Asking(llama, COMPLETIONS, greedy("Go on", 2), name))
            llama.wait_known(name)
        for stream in (False, True):
            refused = llama.post(COMPLETIONS, greedy("Go on", 2, stream=stream))
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "queue_full"
        # One of two answers would have room, but not both: then none is begun.
        delete(llama, name)
        assert askings[-1].answer().status_code == 499
        before = len(llama.engine.snapshot().queue)
        assert llama.post(COMPLETIONS, greedy("Go on", 2, n=2)).status_code == 429
        assert len(llama.engine.snapshot().queue) == before
        hold.release()
        assert [asking.answer().status_code for asking in askings[:-1]] == [200] * (room - 1)


def test_more_answers_than_there_will_ever_be_room_for_are_400(llama: Served) -> None:
    answer = llama.post(COMPLETIONS, greedy("Go on", 2, n=llama.engine.slots + llama.engine.queue_limit + 1))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "too_many"


def test_an_id_that_is_in_use_is_409(llama: Served) -> None:
    name = new_id("twice")
    with llama.held(any_step) as hold:
        asking = Asking(llama, COMPLETIONS, greedy("Go on", 2), name)
        llama.wait_known(name)
        answer = llama.post(COMPLETIONS, greedy("Go on", 2), headers={"X-Request-Id": name})
        assert answer.status_code == 409
        assert answer.json()["error"]["code"] == "duplicate_request_id"
        hold.release()
    assert asking.answer().status_code == 200
    assert llama.post(COMPLETIONS, greedy("Go on", 2), headers={"X-Request-Id": name}).status_code == 200


def test_every_answer_has_an_id(llama: Served) -> None:
    for path in ("/health", "/v1/models", "/nowhere"):
        assert llama.get(path).headers["x-request-id"].startswith("req-")
    assert llama.get("/health", headers={"X-Request-Id": "mine"}).headers["x-request-id"] == "mine"
    refused = llama.get("/health", headers={"X-Request-Id": "no good"})
    assert refused.status_code == 400
    assert refused.headers["x-request-id"].startswith("req-")


def test_the_id_comes_before_the_first_token(served: Served) -> None:
    name = new_id("early")
    with (
        served.held(in_state(name, "prefill", done=32)) as hold,
        served.client() as client,
        client.stream(
            "POST",
            COMPLETIONS,
            json=greedy(tokens(served, 900, seed=61), 3, stream=True),
            headers={"X-Request-Id": name},
        ) as answer,
    ):
        hold.wait()
        assert answer.status_code == 200
        assert answer.headers["x-request-id"] == name
        hold.release()
        assert len(events_of(answer.read().decode())) >= 1


def test_shutting_down_answers_what_is_on_its_way_and_refuses_the_rest(model_of: Any) -> None:
    model = model_of("llama")
    with serving(model) as served, served.client() as other:
        assert other.get("/health").json()["status"] == "ok"
        whole, stream = new_id("whole"), new_id("stream")
        with served.held(any_step) as hold:
            askings = [
                Asking(served, COMPLETIONS, greedy("Go on", 20), whole),
                Asking(served, COMPLETIONS, greedy("Go on", 20, stream=True), stream),
            ]
            served.wait_known(whole, stream)
            closing = threading.Thread(target=served.engine.close, daemon=True)
            closing.start()
            eventually(lambda: served.engine.closed)
            refused = other.post(COMPLETIONS, json=greedy("Too late", 2))
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "shutting_down"
            health = other.get("/health")
            assert (health.status_code, health.json()["status"]) == (503, "shutting down")
            stopping = threading.Thread(target=served.stop, daemon=True)
            stopping.start()
            eventually(lambda: served.service.closing)
            hold.release()
        assert askings[0].answer().json()["choices"][0]["finish_reason"] == "length"
        assert events_of(askings[1].answer().text)[-1]["choices"][0]["finish_reason"] == "length"
        stopping.join(PATIENCE)


def test_what_does_not_drain_in_time_ends_with_shutdown(model_of: Any) -> None:
    with serving(model_of("llama"), app={"drain_timeout": 0.0}) as served:
        whole, stream = new_id("whole"), new_id("stream")
        with served.held(any_step) as hold:
            askings = [
                Asking(served, COMPLETIONS, greedy("Go on", 400), whole),
                Asking(served, COMPLETIONS, greedy("Go on", 400, stream=True), stream),
            ]
            served.wait_known(whole, stream)
            stopping = threading.Thread(target=served.stop, daemon=True)
            stopping.start()
            eventually(lambda: _cancelled(served, whole) and _cancelled(served, stream), "the shutdown")
            hold.release()
        answer = askings[0].answer()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        assert events_of(askings[1].answer().text)[-1]["choices"][0]["finish_reason"] == "shutdown"
        stopping.join(PATIENCE)


def test_a_failure_of_the_engine_is_told_as_an_error(model_of: Any) -> None:
    with serving(model_of("llama")) as served:
        error = lc.DecodeFailedError("a made failure")

        def fail(_: Any) -> Any:
            raise error

        served._run = fail
        answer = served.post(COMPLETIONS, greedy("Go on", 4))
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        assert "a made failure" in answer.json()["error"]["message"]
