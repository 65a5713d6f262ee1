"""What is beside generation: models, tokens, health, slots, events, metrics, the page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import llamacancel as lc
from llamacancel.server.sse import event, json_of

from .served import Served, any_step, eventually, greedy, new_id, serving, short_of_memory, tokens

COMPLETIONS = "/v1/completions"


def test_models_lists_the_one_that_answers(served: Served) -> None:
    listed = served.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == [served.service.model_name]
    one = served.get("/v1/models/any/other:name").json()
    assert one == listed["data"][0]
    assert one["meta"]["n_vocab"] == served.engine.model.n_vocab
    assert one["meta"]["n_ctx"] == served.engine.n_ctx


def test_tokens_go_there_and_back(served: Served) -> None:
    model = served.engine.model
    text = "Hello wörld, 你好"
    told = served.post("/tokenize", {"content": text, "with_pieces": True}).json()
    assert told["tokens"] == model.tokenize(text, add_special=False, parse_special=True).tolist()
    assert len(told["pieces"]) == len(told["tokens"])
    assert served.post("/detokenize", {"tokens": told["tokens"]}).json()["content"].strip() == text


def test_slots_tells_who_waits_for_memory(exact_model: Callable[[str], lc.Model]) -> None:
    with short_of_memory(exact_model("llama")) as (served, waiting):
        now = served.get("/slots").json()
        assert [slot["state"] for slot in now["slots"]].count("idle") == 1
        assert [(view["id"], view["waits_for_memory"]) for view in now["queue"]] == [(waiting, True)]
        assert [view["waits_for_memory"] for view in now["active"]] == [False]
    assert [view.waits_for_memory for view in served.engine.snapshot().recent] == [False, False]


def test_special_tokens_are_added_and_read_as_asked(llama: Served) -> None:
    model = llama.engine.model

    def tokens_of(**fields: Any) -> list[int]:
        found: list[int] = llama.post("/tokenize", {"content": "a</s>", **fields}).json()["tokens"]
        return found

    assert tokens_of()[-1] == model.eos
    assert tokens_of(parse_special=False)[-1] != model.eos
    assert tokens_of(add_special=True) == [model.bos, *tokens_of()]


def test_tokens_that_do_not_exist_are_refused(llama: Served) -> None:
    refused = llama.post("/detokenize", {"tokens": [llama.engine.model.n_vocab]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tokens")
    assert llama.post("/detokenize", {"tokens": []}).json() == {"content": ""}


def test_health_is_ok(llama: Served) -> None:
    assert llama.get("/health").json() == {"status": "ok", "model": llama.service.model_name}
    with llama.client() as client:
        head = client.head("/health")
    assert (head.status_code, head.content) == (200, b"")


def test_health_says_what_an_engine_failed_of(exact_model: Callable[[str], lc.Model]) -> None:
    with serving(exact_model("llama")) as served:

        def lose(*_: Any) -> None:
            raise error

        error = lc.DecodeFailedError("the connection to the RPC server 10.0.0.7:50052 was lost")
        served.engine._thread.runner.run = lose
        served.engine._thread.runner.upset = lose
        failed = served.post(COMPLETIONS, greedy("Go on", 3))
        assert (failed.status_code, failed.json()["error"]["code"]) == (503, "engine_failed")
        health = served.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert "10.0.0.7:50052 was lost" in health.json()["error"]
        again = served.post(COMPLETIONS, greedy("Go on", 3))
        assert (again.status_code, again.json()["error"]["code"]) == (503, "engine_failed")
        assert "10.0.0.7:50052" in again.json()["error"]["message"]


def test_json_is_one_line_for_everybody_and_has_no_numbers_that_json_has_not() -> None:
    text = "a\u2028b\u2029c\nd"
    told = event({"text": text})
    assert told.count(b"\n") == 2
    assert len(told.decode().splitlines()) == 2, "some clients take these signs for the end of a line"
    assert json.loads(told.removeprefix(b"data: ")) == {"text": text}
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            json_of([number])


def test_slots_tell_what_runs_waits_and_ran(served: Served) -> None:
    with served.held(any_step) as hold:
        names = [new_id("shown") for _ in range(3)]
        connections = []
        for name in names:
            connections.append(served.send(COMPLETIONS, greedy("Go on", 3), name))
            served.wait_known(name)
        eventually(lambda: served.active(names[0]))
        told = served.get("/slots").json()
        assert len(told["slots"]) == served.engine.slots
        shown = {view["id"]: view for view in (*told["active"], *told["queue"])}
        assert set(names) <= set(shown)
        assert told["queue"][-1]["id"] == names[2]
        assert told["queue"][-1]["started_at"] is None
        assert abs(shown[names[0]]["submitted_at"] - told["now"]) < 3600, "Unix seconds, both"
        assert told["queue_limit"] == served.engine.queue_limit
        hold.release()
        for name, connection in zip(names, connections, strict=True):
            served.wait_finished(name)
            connection.close()
    recent = {view["id"]: view for view in served.get("/slots").json()["recent"]}
    assert recent[names[0]]["finish_reason"] == "length"
    assert recent[names[0]]["completion_tokens"] == 3


def read_snapshots(response: Any) -> Any:
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line[6:])


def test_events_tell_every_change_and_each_end_once(served: Served) -> None:
    names = [new_id("watched") for _ in range(3)]
    with served.client() as client, client.stream("GET", "/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        snapshots = read_snapshots(response)
        first = next(snapshots)
        assert first["complete"] is True
        for name in names:
            served.post(COMPLETIONS, greedy("Go on", 5), headers={"X-Request-Id": name})
        ended: list[str] = []
        while not set(names) <= set(ended):
            state = next(snapshots)
            assert state["complete"] is False
            ended += [view["id"] for view in state["recent"]]
        assert [ended.count(name) for name in names] == [1, 1, 1]


def test_events_show_progress_within_a_prompt(llama: Served) -> None:
    name = new_id("watched")
    with llama.client() as client, client.stream("GET", "/events") as response:
        snapshots = read_snapshots(response)
        next(snapshots)
        with llama.held(lambda now: any(view.prompt_done > 100 for view in now.active if view.id == name)) as hold:
            connection = llama.send(COMPLETIONS, greedy(tokens(llama, 800, seed=71), 3), name)
            hold.wait()
            while not any(view["id"] == name and view["prompt_done"] > 100 for view in next(snapshots)["active"]):
                pass
            hold.release()
        llama.wait_finished(name)
        connection.close()


def test_the_page_is_served(llama: Served) -> None:
    page = llama.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    for name in re.findall(r'(?:src|href)="(page/[^"]+)"', page.text):
        assert llama.get(f"/{name}").status_code == 200, name


def test_beside_the_page_there_are_no_files(llama: Served) -> None:
    for path in ("/page/", "/page/nothing.js", "/page/..%2fapp.py", "/page/%2e%2e/app.py", "/page/app.py"):
        assert llama.get(path).status_code == 404, path


def metrics_of(served: Served) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    answer = served.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_metrics_move(served: Served) -> None:
    def value(name: str, **labels: str) -> float:
        return after.get((name, frozenset(labels.items())), 0) - before.get((name, frozenset(labels.items())), 0)

    before = metrics_of(served)
    body = served.post(COMPLETIONS, greedy(tokens(served, 50, seed=81), 7)).json()
    served.post(COMPLETIONS, greedy(tokens(served, 50, seed=81), 7))
    served.post(COMPLETIONS, {"prompt": 1})
    with served.held(any_step) as hold:
        name = new_id("quitter")
        connection = served.send(COMPLETIONS, greedy("Go on", 50), name)
        served.wait_known(name)
        during = metrics_of(served)
        connection.close()
        served.wait_noticed(name)
        hold.release()
    served.wait_idle()
    after = metrics_of(served)
    assert value("llamacancel_requests_total", endpoint=COMPLETIONS, finish_reason="length") == 2
    assert value("llamacancel_requests_total", endpoint=COMPLETIONS, finish_reason="cancelled") == 1
    assert value("llamacancel_disconnects_total", endpoint=COMPLETIONS) == 1
    assert value("llamacancel_http_answers_total", endpoint=COMPLETIONS, status="200") == 2
    assert value("llamacancel_http_answers_total", endpoint=COMPLETIONS, status="400") == 1
    assert value("llamacancel_cancel_latency_seconds_count", cause="client") == 1
    assert value("llamacancel_queue_seconds_count") == 3
    assert value("llamacancel_first_token_seconds_count") == 2
    assert value("llamacancel_generated_tokens_total") == 2 * body["usage"]["completion_tokens"]
    assert value("llamacancel_prompt_tokens_total") >= 100
    assert value("llamacancel_cached_tokens_total") >= 1
    assert value("llamacancel_steps_total") > 7
    assert after["llamacancel_slots", frozenset()] == served.engine.slots
    assert after["llamacancel_slots_busy", frozenset()] == 0
    assert during["llamacancel_slots_busy", frozenset()] + during["llamacancel_queue_length", frozenset()] == 1
