"""Chat: through the model's template, with tools, formats and log probabilities."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from .served import THINKING, TOOLED, Served, events_of, greedy, serving

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"enum": ["Oslo", "Rome"]}},
            "required": ["place"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def tooled(model_of: Any) -> Iterator[Served]:
    with serving(model_of("llama"), app={"chat_template": TOOLED}) as served:
        yield served


@pytest.fixture(scope="module")
def thinking(model_of: Any) -> Iterator[Served]:
    with serving(model_of("llama"), app={"chat_template": THINKING}) as served:
        yield served


def chat(max_tokens: int = 12, **fields: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, "max_tokens": max_tokens, "temperature": 0, **fields}


def test_an_answer_has_openais_shape(served: Served) -> None:
    body = served.post(PATH, chat(model="gpt-4o")).json()
    assert body["object"] == "chat.completion"
    assert body["model"] == served.service.model_name
    assert body["id"].startswith("chatcmpl-")
    choice = body["choices"][0]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    assert choice["message"]["refusal"] is None
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 12


def test_the_messages_go_through_the_models_template(served: Served) -> None:
    rendered = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
    )
    whole = served.post(PATH, chat()).json()
    raw = served.post("/v1/completions", greedy(rendered, 12)).json()
    assert raw["choices"][0]["text"] == whole["choices"][0]["message"]["content"]
    assert raw["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]


def test_a_stream_begins_with_the_role_and_brings_the_same_text(served: Served) -> None:
    whole = served.post(PATH, chat()).json()["choices"][0]["message"]["content"]
    events = events_of(served.post(PATH, chat(stream=True, stream_options={"include_usage": True})).text)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 12
    deltas = [event["choices"][0]["delta"] for event in events[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == whole
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 2) + ["length"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}


def test_content_may_come_in_parts(llama: Served) -> None:
    def content_of(given: Any) -> str:
        body = chat(messages=[{"role": "user", "content": given}])
        return str(llama.post(PATH, body).json()["choices"][0]["message"]["content"])

    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "World"}]
    assert content_of(parts) == content_of("Hello\nWorld")
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    refused = llama.post(PATH, chat(messages=[{"role": "user", "content": [image]}]))
    assert refused.status_code == 400


def test_max_completion_tokens_comes_before_max_tokens(llama: Served) -> None:
    assert llama.post(PATH, chat(9, max_completion_tokens=3)).json()["usage"]["completion_tokens"] == 3


def test_logprobs_come_in_the_form_of_chat(served: Served) -> None:
    choice = served.post(PATH, chat(5, logprobs=True, top_logprobs=2)).json()["choices"][0]
    told = choice["logprobs"]["content"]
    assert len(told) == 5
    for each in told:
        assert each["logprob"] <= 0
        assert bytes(each["bytes"]).decode("utf-8", "replace") == each["token"]
        assert [top["logprob"] for top in each["top_logprobs"]] == sorted(
            (top["logprob"] for top in each["top_logprobs"]), reverse=True
        )
        assert len(each["top_logprobs"]) == 2
        assert each["top_logprobs"][0]["logprob"] == each["logprob"]
    events = events_of(served.post(PATH, chat(5, logprobs=True, top_logprobs=2, stream=True)).text)
    parts = [event["choices"][0]["logprobs"] for event in events if event["choices"][0]["logprobs"]]
    streamed = [each for part in parts for each in part["content"]]
    assert [each["token"] for each in streamed] == [each["token"] for each in told]
    assert [each["logprob"] for each in streamed] == pytest.approx([each["logprob"] for each in told], abs=1e-3)


def test_several_answers_come_in_one_body_and_in_one_stream(served: Served) -> None:
    whole = served.post(PATH, chat(n=3)).json()
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert len(set(texts)) == 1  # the likeliest, three times
    streamed = [""] * 3
    for event in events_of(served.post(PATH, chat(n=3, stream=True)).text):
        choice = event["choices"][0]
        streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == texts


def test_a_template_that_refuses_is_told_in_its_words(model_of: Any) -> None:
    template = (
        "{{ messages }}{% if 'Who' in messages[-1].content %}{{ raise_exception('no questions here') }}{% endif %}"
    )
    with serving(model_of("llama"), app={"chat_template": template}) as served:
        refused = served.post(PATH, chat())
        assert refused.status_code == 400
        assert "no questions here" in refused.json()["error"]["message"]
        assert refused.json()["error"]["code"] == "chat_template_error"
        assert served.post(PATH, chat(messages=MESSAGES[:1])).status_code == 200


def test_a_developer_is_the_system_for_templates_that_know_no_other(llama: Served) -> None:
    as_developer = [{"role": "developer", "content": "Be brief."}, MESSAGES[1]]
    assert llama.post(PATH, chat(messages=as_developer)).json()["choices"] == llama.post(PATH, chat()).json()["choices"]


def test_tools_calls_and_thinking_reach_the_template(thinking: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    render = thinking.service.chat.render

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(render(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(thinking.service.chat, "render", spy)
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Oslo"}'}}
    messages = [
        MESSAGES[1],
        {"role": "assistant", "content": None, "reasoning_content": "Where?", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "<rain & wind>"},
    ]
    body = chat(messages=messages, tools=[WEATHER])
    assert thinking.post(PATH, body).status_code == 200
    assert thinking.post(PATH, {**body, "tool_choice": "none"}).status_code == 200
    assert json.dumps(WEATHER) in seen[0].text
    assert '"arguments": {"place": "Oslo"}' in seen[0].text
    assert "<think>\nWhere?" in seen[0].text
    assert "<rain & wind>" in seen[0].text
    assert "# Tools" not in seen[1].text


CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Oslo"}}\n</tool_call>'


def forced(text: str) -> str:
    """A grammar of which `text` is the only one."""
    return f"root ::= {json.dumps(text)}"


def test_a_call_in_the_answer_is_told_as_one(tooled: Served) -> None:
    body = chat(200, tools=[WEATHER], grammar=forced(f"I look.\n{CALL}\n{CALL}"))
    choice = tooled.post(PATH, body).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I look."
    calls = choice["message"]["tool_calls"]
    assert [call["function"]["name"] for call in calls] == ["weather", "weather"]
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"place": "Oslo"}] * 2
    assert len({call["id"] for call in calls}) == 2


def test_a_call_in_a_stream_comes_with_its_name_first(tooled: Served) -> None:
    body = chat(200, tools=[WEATHER], grammar=forced(f"I look.\n{CALL}"), stream=True)
    events = events_of(tooled.post(PATH, body).text)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content") or "" for delta in deltas) == "I look.\n"
    first, *rest = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert (first["index"], first["type"], first["function"]["name"]) == (0, "function", "weather")
    assert first["id"]
    assert not any("id" in call or "name" in call["function"] for call in rest)
    arguments = "".join(call["function"]["arguments"] for call in [first, *rest])
    assert json.loads(arguments) == {"place": "Oslo"}
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_thinking_is_told_apart(thinking: Served) -> None:
    body = chat(200, grammar=forced("<think>\nHm.\n</think>\n\nIt is so."))
    message = thinking.post(PATH, body).json()["choices"][0]["message"]
    assert (message["reasoning_content"].strip(), message["content"].strip()) == ("Hm.", "It is so.")
    deltas = [event["choices"][0]["delta"] for event in events_of(thinking.post(PATH, {**body, "stream": True}).text)]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == message["reasoning_content"]
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"]


def test_a_call_cannot_be_demanded_of_a_template_that_shows_no_tools(served: Served) -> None:
    refused = served.post(PATH, chat(tools=[WEATHER], tool_choice="required"))
    assert refused.status_code == 400
    assert "cannot be demanded" in refused.json()["error"]["message"]


def test_without_tools_the_same_answer_is_text(tooled: Served) -> None:
    for extra in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        choice = tooled.post(PATH, chat(200, grammar=forced(CALL), **extra)).json()["choices"][0]
        assert choice["message"]["content"] == CALL
        assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_is_demanded_is_made(tooled: Served, choice: Any) -> None:
    other = {"type": "function", "function": {"name": "other", "parameters": {"const": {}}}}
    body = chat(400, tools=[WEATHER, other], tool_choice=choice)
    message = tooled.post(PATH, body).json()["choices"][0]
    assert message["finish_reason"] == "tool_calls"
    call = message["message"]["tool_calls"][0]["function"]
    assert call["name"] in (["weather"] if isinstance(choice, dict) else ["weather", "other"])
    if call["name"] == "weather":
        assert json.loads(call["arguments"])["place"] in ("Oslo", "Rome")


def test_an_answer_follows_a_json_schema(served: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Ada", "Alan"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    answer = json.loads(served.post(PATH, chat(100, response_format=wanted)).json()["choices"][0]["message"]["content"])
    assert answer["name"] in ("Ada", "Alan")
    assert 0 <= answer["age"] <= 99


def test_an_answer_can_be_any_json_object(served: Served) -> None:
    # The model says nonsense without end, so the end has to come from without: what there is begins as an object does.
    content = served.post(PATH, chat(20, response_format={"type": "json_object"})).json()["choices"][0]["message"][
        "content"
    ]
    assert content.lstrip().startswith("{")


@pytest.mark.parametrize("schema", [
    {"$ref": "#/nowhere"}, {"type": "string", "pattern": "^[z-a]$"}, {"type": "string", "pattern": r"^[^\s\S]$"},
    {"enum": []},
])  # fmt: skip
def test_a_schema_that_cannot_be_used_is_refused(schema: dict[str, Any], llama: Served) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    refused = llama.post(PATH, chat(response_format=wanted))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "response_format"


def test_text_is_a_format_like_none(llama: Served) -> None:
    assert (
        llama.post(PATH, chat(response_format={"type": "text"})).json()["choices"]
        == llama.post(PATH, chat()).json()["choices"]
    )
