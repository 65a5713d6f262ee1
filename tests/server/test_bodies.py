"""Whatever stands in a body, reading it holds up nobody else, and what cannot be done is told in words."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel

from llamacancel.server import bodies
from llamacancel.server.openai import prompts

from .served import PATIENCE, Served, events_of, greedy, new_id
from .test_limits import error_of

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LONG = "Go on. " * 5000
HELLO = {"role": "user", "content": "Hello"}


def a_list(of: str, times: int) -> str:
    return f"[{','.join([of] * times)}]"


OVERFULL: list[tuple[str, str]] = [
    (COMPLETIONS, f'{{"prompt": {a_list("0", 300_000)}}}'),
    (COMPLETIONS, f'{{"prompt": {a_list("[0]", 70_000)}}}'),
    (COMPLETIONS, f'{{"prompt": "x", "ignored": {a_list("{}", 70_000)}}}'),
    (COMPLETIONS, f'{{"prompt": "x", "ignored": {"[" * 70_000}{"]" * 70_000}}}'),
    (COMPLETIONS, '{"prompt": "x", "ignored": {' + ",".join(f'"{n}":0' for n in range(70_000)) + "}}"),
    (CHAT, f'{{"messages": {a_list(json.dumps(HELLO), 30_000)}}}'),
    ("/v1/embeddings", f'{{"input": {a_list(a_list("0", 1000), 1000)}}}'),
]
FAULTY: list[tuple[str, str]] = [
    (COMPLETIONS, f'{{"prompt": "x", "stop": {a_list("0", 60_000)}}}'),
    (COMPLETIONS, f'{{"prompt": {a_list("-1", 60_000)}}}'),
    (COMPLETIONS, f'{{"prompt": {a_list("[-1]", 60_000)}}}'),
    (COMPLETIONS, '{"prompt": "x", "logit_bias": {' + ",".join(f'"{n}":101' for n in range(60_000)) + "}}"),
    (COMPLETIONS, f'{{"prompt": "x", "ignored": {"[" * 30_000}{"]" * 30_000}}}'),
    (COMPLETIONS, f'{{"prompt": "x", "seed": {"1" * 60_000}}}'),
    (CHAT, f'{{"messages": {a_list("0", 60_000)}}}'),
    (CHAT, f'{{"messages": [{{"role": "user", "content": {a_list("0", 60_000)}}}]}}'),
    (CHAT, f'{{"messages": [{json.dumps(HELLO)}], "tools": {a_list("0", 60_000)}}}'),
    (CHAT, f'{{"messages": [{{"role": "assistant", "tool_calls": {a_list("0", 60_000)}}}]}}'),
    ("/detokenize", f'{{"tokens": {a_list("-1", 60_000)}}}'),
]


def ask(served: Served, path: str, body: str) -> Any:
    with served.client() as client:
        return client.post(path, content=body.encode(), headers={"Content-Type": "application/json"})


@pytest.mark.parametrize(("path", "body"), OVERFULL, ids=[body[:40] for _, body in OVERFULL])
def test_a_body_with_too_many_values_is_refused_before_it_is_parsed(
    llama: Served, path: str, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(*_: object) -> None:
        raise AssertionError("it was parsed")

    monkeypatch.setattr(BaseModel, "model_validate_json", parse)
    error = error_of(ask(llama, path, body), 413)
    assert error["code"] == "body_too_long"


@pytest.mark.parametrize(("path", "body"), FAULTY, ids=[f"{body[:40]}" for _, body in FAULTY])
def test_of_many_faults_a_few_are_found(llama: Served, path: str, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    of_validation = bodies.of_validation

    def counted(errors: Any) -> Any:
        found.append(len(errors))
        return of_validation(errors)

    monkeypatch.setattr(bodies, "of_validation", counted)
    error = error_of(ask(llama, path, body), 400)
    assert len(error["message"]) < 1000
    assert sum(found) < 10


def test_signs_in_a_text_are_no_values(llama: Served) -> None:
    text = '{"a": [1, "\\\\", {}]}, ' * 20_000
    told = ask(llama, "/tokenize", json.dumps({"content": text}))
    assert told.status_code == 200
    assert llama.post("/detokenize", {"tokens": told.json()["tokens"]}).json()["content"].strip() == text.strip()


class _Held:
    """Stands in for a function and waits in it, so that a test can see who else goes on meanwhile."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn
        self.entered, self.go = threading.Event(), threading.Event()

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.entered.set()
        assert self.go.wait(PATIENCE), "nobody let it go on"
        return self._fn(*args, **options)


def meanwhile(served: Served, held: _Held, path: str, body: str) -> Any:
    """Ask something that waits in `held`, see that another is answered meanwhile, and return the first one's answer."""
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(ask(served, path, body)))
    asking.start()
    try:
        assert held.entered.wait(PATIENCE), "it never got there"
        with served.client() as other:
            other.timeout = 10
            assert other.get("/health").status_code == 200
    finally:
        held.go.set()
        asking.join(PATIENCE)
    return answers[0]


def test_a_long_body_is_parsed_beside_the_event_loop(llama: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    held = _Held(bodies._parse)
    monkeypatch.setattr(bodies, "_parse", held)
    answer = meanwhile(llama, held, COMPLETIONS, json.dumps({"prompt": LONG, "max_tokens": 1}))
    assert error_of(answer, 400)["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f", "description": LONG}}]},
        {"messages": [HELLO, {"role": "assistant", "reasoning_content": LONG, "content": "Yes"}, HELLO]},
        {
            "messages": [
                HELLO,
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": json.dumps({"a": LONG})}}],
                },
                HELLO,
            ]
        },
        {"chat_template_kwargs": {"enable_thinking": LONG}},
    ],
    ids=["a tool's description", "reasoning", "arguments", "a variable of the template"],
)
def test_any_long_text_of_a_chat_is_rendered_beside_the_event_loop(
    llama: Served, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = llama.service.chat
    held = _Held(template.render)
    monkeypatch.setattr(template, "render", held)
    answer = meanwhile(llama, held, CHAT, json.dumps({"messages": [HELLO], "max_tokens": 1, **fields}))
    assert answer.status_code in (200, 400)


def test_many_biases_are_taken_in_beside_the_event_loop(llama: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    held = _Held(prompts.Sampler)
    monkeypatch.setattr(prompts, "Sampler", held)
    bias = {str(n): -1 for n in range(6000)}
    answer = meanwhile(llama, held, COMPLETIONS, json.dumps(greedy("x", 1, logit_bias=bias, n=10)))
    assert answer.status_code == 200


def test_who_is_cancelled_while_waiting_for_a_thread_waits_no_more(
    llama: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    with llama.reading() as reading:
        names = [new_id("reading") for _ in range(int(llama.service.preparing.total_tokens) + 1)]
        connections = []
        for name in names[:-1]:
            connections.append(llama.send(COMPLETIONS, {"prompt": LONG}, name))
            reading.token()
        connections.append(llama.send(COMPLETIONS, {"prompt": LONG}, names[-1]))
        with llama.client() as client:
            while client.delete(f"/v1/requests/{names[-1]}").status_code != 200:
                pass
        assert b" 499 " in connections[-1].recv(4096)
        reading.end()
    for connection in connections:
        connection.close()


NOTHING_LEFT = 'root ::= "a" [z-a]'


def test_a_grammar_that_allows_nothing_is_a_400_with_its_words(llama: Served) -> None:
    answer = llama.post(COMPLETIONS, greedy("x", 4, grammar=NOTHING_LEFT))
    assert "no token of the vocabulary is left" in error_of(answer, 400)["message"]


def test_a_stream_that_fails_says_so_and_ends_as_a_stream_does(llama: Served) -> None:
    answer = llama.post(COMPLETIONS, greedy("x", 4, grammar=NOTHING_LEFT, stream=True))
    events = events_of(answer.text)
    assert "".join(event["choices"][0]["text"] for event in events if "choices" in event) == "a"
    assert events[-2]["choices"][0]["finish_reason"] == "error"
    assert "no token of the vocabulary is left" in events[-1]["error"]["message"]
    assert events[-1]["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_that_nobody_foresaw_is_told_of_its_own_request(
    llama: Served, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(*_: object) -> None:
        raise IndexError("a fault of the server")

    monkeypatch.setattr("llamacancel.engine.generation.GenerationWork.take", take)
    answer = llama.post(COMPLETIONS, greedy("x", 4, stream=stream))
    error = events_of(answer.text)[-1]["error"] if stream else error_of(answer, 500)
    assert error["message"] == "the generation failed: a fault of the server"
    assert error["code"] == "generation_failed"
