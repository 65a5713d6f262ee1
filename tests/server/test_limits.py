"""Keys, origins, sizes, and errors in OpenAI's shape, also for what nobody expected."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from .served import PATIENCE, Served, greedy, serving

COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def guarded(model_of: Any) -> Iterator[Served]:
    """A server with keys, an origin, and a small body limit."""
    app = {"api_keys": ["first-key", "zweiter-Schlüssel"], "cors_origins": ["https://app.test"], "max_body_bytes": 2000}
    with serving(model_of("llama"), app=app) as served:
        yield served


KEY = {"Authorization": "Bearer first-key"}


def error_of(answer: httpx.Response, status: int) -> Any:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer first-ke"},
        {"Authorization": "Bearer first-key2"},
        {"Authorization": "Basic first-key"},
        {"Authorization": "first-key"},
        {"Authorization": "Bearer"},
        {"Authorization": b"Bearer \xff\xfe"},
    ],
    ids=str,
)
def test_without_a_key_there_is_no_answer(guarded: Served, headers: Any) -> None:
    for path in ("/v1/models", "/slots", "/metrics", "/events", "/openapi.json", "/nowhere"):
        answer = guarded.get(path, headers=headers)
        assert error_of(answer, 401)["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert guarded.post(COMPLETIONS, greedy("x", 1), headers=headers).status_code == 401
    assert guarded.get("/health", headers=headers).status_code == 200
    assert guarded.get("/", headers=headers).status_code == 200


@pytest.mark.parametrize("key", ["Bearer first-key", "bearer first-key", "Bearer zweiter-Schlüssel".encode()])
def test_any_of_the_keys_will_do(guarded: Served, key: Any) -> None:
    assert guarded.get("/v1/models", headers={"Authorization": key}).status_code == 200


def test_a_page_of_an_allowed_origin_may_ask(guarded: Served) -> None:
    preflight = {
        "Origin": "https://app.test",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    with guarded.client() as client:
        allowed = client.options(COMPLETIONS, headers=preflight)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://app.test"
        assert client.options(COMPLETIONS, headers={**preflight, "Origin": "https://evil.test"}).status_code == 400
    answer = guarded.get("/v1/models", headers={**KEY, "Origin": "https://app.test"})
    assert answer.headers["access-control-allow-origin"] == "https://app.test"
    assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
    other = guarded.get("/v1/models", headers={**KEY, "Origin": "https://evil.test"})
    assert "access-control-allow-origin" not in other.headers


def test_without_the_option_no_origin_may_ask(llama: Served) -> None:
    assert "access-control-allow-origin" not in llama.get("/health", headers={"Origin": "https://app.test"}).headers


def test_a_body_that_says_it_is_too_long_is_refused(guarded: Served) -> None:
    error = error_of(guarded.post(COMPLETIONS, greedy("x" * 3000), headers=KEY), 413)
    assert error["code"] == "body_too_long"
    assert guarded.post(COMPLETIONS, greedy("x" * 100, 1), headers=KEY).status_code == 200


def test_a_body_that_turns_out_too_long_is_refused(guarded: Served) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 100

    headers = {**KEY, "Content-Type": "application/json"}
    with httpx.Client(base_url=guarded.url, timeout=PATIENCE) as client:
        error_of(client.post(COMPLETIONS, content=chunks(), headers=headers), 413)
    small = json.dumps(greedy("x", 1)).encode()
    with httpx.Client(base_url=guarded.url, timeout=PATIENCE) as client:
        answer = client.post(COMPLETIONS, content=iter([small[:9], small[9:]]), headers=headers)
    assert answer.status_code == 200


def test_a_long_body_that_may_be_long_is_read(llama: Served) -> None:
    error = error_of(llama.post(COMPLETIONS, greedy("word " * 200_000)), 400)
    assert error["code"] == "context_length_exceeded"


def test_unknown_paths_and_methods_have_the_same_shape(llama: Served) -> None:
    assert error_of(llama.get("/v1/nothing"), 404)["type"] == "not_found_error"
    wrong = llama.get(COMPLETIONS)
    error_of(wrong, 405)
    assert wrong.headers["allow"] == "POST"


def test_what_nobody_expected_is_a_500_and_is_logged(llama: Served, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("nobody expected this")

    original = llama.service.timeout
    llama.service.timeout = fail
    try:
        answer = llama.post(COMPLETIONS, greedy("x", 1))
    finally:
        llama.service.timeout = original
    assert error_of(answer, 500)["type"] == "server_error"
    assert "nobody expected" not in answer.text
    assert "nobody expected this" in caplog.text
    assert answer.headers["x-request-id"]


def message(content: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content}], "max_tokens": 1}


BAD: list[tuple[str, Any, str | None]] = [
    (COMPLETIONS, b"", None),
    (COMPLETIONS, b"{", None),
    (COMPLETIONS, b"[1]", None),
    (COMPLETIONS, b"null", None),
    (COMPLETIONS, b'"text"', None),
    (COMPLETIONS, b"\xff\xfe", None),
    (COMPLETIONS, b"[" * 50_000, None),
    (COMPLETIONS, b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", None),
    (COMPLETIONS, b'{"prompt": "x", "temperature": NaN}', "temperature"),
    (COMPLETIONS, b'{"prompt": "x", "temperature": 1e999}', "temperature"),
    (COMPLETIONS, b'{"prompt": "\\ud800"}', None),
    (COMPLETIONS, {}, "prompt"),
    (COMPLETIONS, {"prompt": None}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt"),
    (COMPLETIONS, {"prompt": [1, "two"]}, "prompt"),
    (COMPLETIONS, {"prompt": [1.5]}, "prompt"),
    (COMPLETIONS, {"prompt": [True]}, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt"),
    (COMPLETIONS, {"prompt": [10**9]}, "prompt"),
    (COMPLETIONS, {"prompt": [2**40]}, "prompt"),
    (COMPLETIONS, {"prompt": {"a": 1}}, "prompt"),
    (COMPLETIONS, greedy("x", 0), "max_tokens"),
    (COMPLETIONS, greedy("x", -2), "max_tokens"),
    (COMPLETIONS, greedy("x", 2**31), "max_tokens"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": "5"}, "max_tokens"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 1.5}, "max_tokens"),
    (COMPLETIONS, {"prompt": "x", "max_tokens": True}, "max_tokens"),
    (COMPLETIONS, {"prompt": "x", "temperature": -0.1}, "temperature"),
    (COMPLETIONS, {"prompt": "x", "temperature": 1000.1}, "temperature"),
    (COMPLETIONS, {"prompt": "x", "temperature": "hot"}, "temperature"),
    (COMPLETIONS, {"prompt": "x", "top_p": 1.1}, "top_p"),
    (COMPLETIONS, {"prompt": "x", "top_k": -2}, "top_k"),
    (COMPLETIONS, {"prompt": "x", "min_p": -1}, "min_p"),
    (COMPLETIONS, {"prompt": "x", "frequency_penalty": 3}, "frequency_penalty"),
    (COMPLETIONS, {"prompt": "x", "presence_penalty": -3}, "presence_penalty"),
    (COMPLETIONS, {"prompt": "x", "repeat_penalty": 0}, "repeat_penalty"),
    (COMPLETIONS, {"prompt": "x", "seed": "seed"}, "seed"),
    (COMPLETIONS, {"prompt": "x", "seed": 2**63}, "seed"),
    (COMPLETIONS, {"prompt": "x", "n": 0}, "n"),
    (COMPLETIONS, {"prompt": "x", "n": 129}, "n"),
    (COMPLETIONS, {"prompt": "x", "stop": [1]}, "stop"),
    (COMPLETIONS, {"prompt": "x", "stop": ["a"] * 17}, "stop"),
    (COMPLETIONS, {"prompt": "x", "stream": "yes"}, "stream"),
    (COMPLETIONS, {"prompt": "x", "stream_options": 1}, "stream_options"),
    (COMPLETIONS, {"prompt": "x", "logprobs": True}, "logprobs"),
    (COMPLETIONS, {"prompt": "x", "logprobs": 21}, "logprobs"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"-1": 1}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"²": 1}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"999999999": 1}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"1": 101}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"1": True}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": [1]}, "logit_bias"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": {"1" * 5000: 1}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "x", "logit_bias": dict.fromkeys(map(str, range(7000)), 1), "n": 10}, "logit_bias"),
    (COMPLETIONS, {"prompt": "x", "grammar": "this is no grammar"}, "grammar"),
    (COMPLETIONS, {"prompt": "x", "grammar": 'root ::= "\x00"'}, "grammar"),
    (COMPLETIONS, {"prompt": "x", "grammar": ""}, "grammar"),
    (COMPLETIONS, {"prompt": "x", "timeout": 0}, "timeout"),
    (COMPLETIONS, {"prompt": "x", "timeout": -1}, "timeout"),
    (COMPLETIONS, {"prompt": "x", "echo": True, "logprobs": 0}, None),
    (COMPLETIONS, {"prompt": "x", "echo": "yes"}, "echo"),
    (COMPLETIONS, {"prompt": "x", "priority": 101}, "priority"),
    (COMPLETIONS, {"prompt": "x", "priority": -101}, "priority"),
    (COMPLETIONS, {"prompt": "x", "priority": 0.5}, "priority"),
    (COMPLETIONS, {"prompt": "x", "priority": "high"}, "priority"),
    (COMPLETIONS, {"prompt": "x", "suffix": "end"}, None),
    (COMPLETIONS, {"prompt": "x", "best_of": 2}, None),
    ("/v1/chat/completions", {"messages": []}, "messages"),
    ("/v1/chat/completions", {"messages": "Hello"}, "messages"),
    ("/v1/chat/completions", {"messages": [{}]}, "messages"),
    ("/v1/chat/completions", message("x", role="wizard"), "messages"),
    ("/v1/chat/completions", message(None), "messages"),
    ("/v1/chat/completions", message(1), "messages"),
    ("/v1/chat/completions", message([]), "messages"),
    ("/v1/chat/completions", message(None, role="assistant"), "messages"),
    ("/v1/chat/completions", {**message("x"), "top_logprobs": 2}, None),
    ("/v1/chat/completions", {**message("x"), "response_format": {"type": "xml"}}, "response_format"),
    ("/v1/chat/completions", {**message("x"), "response_format": {"type": "json_schema"}}, "response_format"),
    ("/v1/chat/completions", {**message("x"), "tools": [{}]}, "tools"),
    ("/v1/chat/completions", {**message("x"), "tool_choice": "required"}, None),
    (
        "/v1/chat/completions",
        {**message("x"), "tool_choice": {"type": "function", "function": {"name": "f"}}},
        None,
    ),
    (
        "/v1/chat/completions",
        {**message("x"), "grammar": 'root ::= "a"', "response_format": {"type": "json_object"}},
        None,
    ),
    ("/v1/embeddings", {"input": []}, "input"),
    ("/v1/embeddings", {"input": [10**9]}, "input"),
    ("/v1/embeddings", {"input": "x", "encoding_format": "hex"}, "encoding_format"),
    ("/v1/embeddings", {"input": "x", "dimensions": 0}, "dimensions"),
    ("/v1/embeddings", {"input": "x", "priority": 2**31}, "priority"),
    ("/v1/chat/completions", {**message("x"), "priority": True}, "priority"),
    ("/tokenize", {}, "content"),
    ("/tokenize", {"content": 1}, "content"),
    ("/detokenize", {"tokens": "x"}, "tokens"),
    ("/detokenize", {"tokens": [-1]}, "tokens"),
]


@pytest.mark.parametrize(("path", "body", "param"), BAD, ids=[f"{path[1:]} {str(body)[:60]}" for path, body, _ in BAD])
def test_a_bad_body_is_a_400_that_names_the_field(llama: Served, path: str, body: Any, param: str | None) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with llama.client() as client:
        answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
    error = error_of(answer, 400)
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param


def test_a_body_that_is_not_called_json_is_refused(llama: Served) -> None:
    with llama.client() as client:
        answer = client.post(COMPLETIONS, content=json.dumps(greedy("x", 1)), headers={"Content-Type": "text/plain"})
    assert "application/json" in error_of(answer, 400)["message"]


def test_whole_numbers_may_be_written_with_a_point(llama: Served) -> None:
    assert llama.post(COMPLETIONS, {"prompt": "x", "max_tokens": 2.0}).json()["usage"]["completion_tokens"] == 2
