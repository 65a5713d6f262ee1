"""OpenAI's own Python client finds everything where it expects it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from .served import PATIENCE, TOOLED, Served, any_step, eventually, in_state, new_id, serving


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", timeout=PATIENCE, max_retries=0) as opened:
        yield opened


MESSAGES: Any = [{"role": "user", "content": "Who are you?"}]


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="any", messages=MESSAGES, max_tokens=8, temperature=0, logprobs=True)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.content or ()) == 8
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens is not None


def test_chat_as_a_stream(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="any", messages=MESSAGES, max_tokens=8, temperature=0)
    text, usage = "", None
    for chunk in client.chat.completions.create(
        model="any", messages=MESSAGES, max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True}
    ):
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert usage is not None
    assert usage.completion_tokens == 8


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="any", prompt=["One", "Two"], max_tokens=4, temperature=0, logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.tokens or ()) == 4
    stream = client.completions.create(model="any", prompt="One", max_tokens=4, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_embeddings(client: openai.OpenAI) -> None:
    # The client asks for base64 by itself, and decodes it.
    answer = client.embeddings.create(model="any", input=["One", "Two"])
    plain = client.embeddings.create(model="any", input=["One", "Two"], encoding_format="float")
    for got, expected in zip(answer.data, plain.data, strict=True):
        assert np.allclose(got.embedding, expected.embedding, atol=1e-5)


def test_models(client: openai.OpenAI, served: Served) -> None:
    assert [model.id for model in client.models.list()] == [served.service.model_name]
    assert client.models.retrieve("whatever").id == served.service.model_name


def test_a_tool_call(model_of: Any) -> None:
    with (
        serving(model_of("llama"), app={"chat_template": TOOLED}) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", timeout=PATIENCE, max_retries=0) as client,
    ):
        _call_a_tool(client)


def _call_a_tool(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    call = '<tool_call>\n{"name": "look", "arguments": {"at": "it"}}\n</tool_call>'
    answer = client.chat.completions.create(
        model="any", messages=MESSAGES, tools=[tool], extra_body={"grammar": f"root ::= {json.dumps(call)}"}
    )
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls is not None
    assert message.tool_calls[0].type == "function"
    assert json.loads(message.tool_calls[0].function.arguments) == {"at": "it"}
    # What came back can be sent again.
    again: Any = [*MESSAGES, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "seen"}]
    assert client.chat.completions.create(model="any", messages=again, max_tokens=2).choices


def test_a_structured_answer(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="any",
        messages=MESSAGES,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}},
    )
    assert json.loads(answer.choices[0].message.content or "")["colour"] in ("red", "blue")


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="any", prompt="x", temperature=-7)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.get("/nothing", cast_to=object)


def test_a_deadline_is_not_tried_again(client: openai.OpenAI, served: Served) -> None:
    def answered() -> float:
        words = 'llamacancel_http_answers_total{endpoint="/v1/completions",status="408"} '
        lines = served.get("/metrics").text.splitlines()
        return sum(float(line.removeprefix(words)) for line in lines if line.startswith(words))

    before = answered()
    with pytest.raises(openai.APIStatusError) as late:
        client.with_options(max_retries=5).completions.create(
            model="any", prompt="x", max_tokens=1000, extra_body={"timeout": 1e-6}
        )
    assert late.value.status_code == 408
    assert answered() == before + 1


def test_leaving_a_stream_cancels_it(client: openai.OpenAI, served: Served) -> None:
    name = new_id("left")
    with served.held(in_state(name, "decode", written=20)) as hold:
        stream = client.completions.create(
            model="any", prompt="x", max_tokens=500, temperature=0, stream=True, extra_headers={"X-Request-Id": name}
        )
        assert stream.response.headers["x-request-id"] == name
        next(stream)
        hold.wait()
        stream.close()
        served.wait_noticed(name)
        hold.release()
    view = served.wait_finished(name)
    assert (view.finish_reason, view.reason) == ("cancelled", "the client hung up")


def test_a_client_that_gives_up_waiting_cancels_its_request(client: openai.OpenAI, served: Served) -> None:
    name = new_id("impatient")
    with served.held(any_step) as hold:
        with contextlib.closing(client.with_options(timeout=0.3)) as impatient, pytest.raises(openai.APITimeoutError):
            impatient.completions.create(model="any", prompt="x", extra_headers={"X-Request-Id": name})
        eventually(lambda: served.group(name) is None or served.group(name).disconnected)
        hold.release()
    eventually(lambda: served.group(name) is None)
    view = served.finished(name)
    assert view is None or view.finish_reason == "cancelled"
