"""Prompts of conversations: what clients send is taken, what is none is refused in words, and markers stay markers."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import llamacancel as lc
from llamacancel.chat import Chat
from tests.unit.engines import model

SHOWS_ALL = """
{%- for message in messages -%}
[{{ message.role }}]{{ message.content }}
{%- for call in message.tool_calls or [] -%}
({{ call.id }} {{ call.function.name }} {{ call.function.arguments | tojson }})
{%- endfor -%}
{%- if message.tool_call_id %}<{{ message.tool_call_id }}>{% endif -%}
{%- if message.reasoning_content %}~{{ message.reasoning_content }}~{% endif -%}
{%- endfor -%}
{%- if tools %}{{ tools | tojson }}{% endif -%}
{%- if add_generation_prompt %}[assistant]{% endif -%}
"""


def shown(*messages: Any, **rest: Any) -> str:
    return Chat.from_template(SHOWS_ALL).render(list(messages), **rest).text


USER = {"role": "user", "content": "Hi"}


def call(arguments: object, **rest: object) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}, **rest}]}


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (USER, "[user]Hi"),
        ({"role": "user", "content": None}, "[user]"),
        ({"role": "user", "content": []}, "[user]"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]},
            "[user]a\nb",
        ),
        ({"role": "user", "content": ["a", "b"]}, "[user]a\nb"),
        ({"role": "assistant", "content": "a", "tool_calls": None}, "[assistant]a"),
        ({"role": "assistant", "content": "a", "tool_calls": []}, "[assistant]a"),
        ({"role": "assistant", "content": "a", "reasoning_content": "b"}, "[assistant]a~b~"),
        ({"role": "function", "name": "f", "content": "5"}, "[tool]5"),
        (call('{"a": 1}', id="x"), '[assistant](x f {"a": 1})'),
        (call({"a": 1}, id="x"), '[assistant](x f {"a": 1})'),
        (call(""), "[assistant](call_0 f {})"),
        (call("null"), "[assistant](call_0 f {})"),
        (call(None), "[assistant](call_0 f {})"),
        (call('{"a": '), '[assistant](call_0 f {"arguments": "{\\"a\\": "})'),
        ({"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}, "[assistant](call_0 f {})"),
        ({"role": "user", "content": "\ud800"}, "[user]?"),
    ],
    ids=repr,
)
def test_messages_are_taken_as_clients_send_them(message: dict[str, Any], text: str) -> None:
    assert shown(USER, message) == f"[user]Hi{text}[assistant]"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "must not be empty"),
        ("Hi", "list of messages"),
        ([5], r"messages\[0\] must be an object, not int"),
        ([USER, {"content": "x"}], r"messages\[1\].role"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            r"content\[0\]: a part of type 'image_url' is no text",
        ),
        ([{"role": "assistant", "tool_calls": [{}]}], r"tool_calls\[0\] has no function"),
        ([{"role": "assistant", "tool_calls": 7}], "must be a list"),
    ],
    ids=repr,
)
def test_what_is_no_message_is_refused_with_its_place(messages: Any, said: str) -> None:
    with pytest.raises(lc.ChatError, match=said):
        Chat.from_template(SHOWS_ALL).render(messages)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}


@pytest.mark.parametrize(
    "tool",
    [TOOL, TOOL["function"], {"name": "f"}, {"type": "function", "function": {"name": "f", "parameters": None}}],
    ids=repr,
)
def test_tools_need_no_description_and_no_parameters(tool: dict[str, Any]) -> None:
    text = shown(USER, tools=[tool])
    assert '"name": "f"' in text
    assert '"description": ""' in text
    assert '"type": "object"' in text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tools": [{"type": "web_search"}]}, "'web_search' are not known"),
        ({"tools": [{"function": {}}]}, r"tools\[0\] has no function with a name"),
        ({"tools": [TOOL, TOOL]}, r"tools\[1\]: there is one of the name 'f' before"),
        ({"tools": [{"name": "f", "parameters": 5}]}, "parameters must be a schema"),
        ({"tools": "f"}, "list of tools"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [TOOL], "tool_choice": "g"}, "there is no tool of the name 'g'"),
        ({"tools": [TOOL], "tool_choice": 5}, "tool_choice must be"),
        ({"reasoning": "much"}, "reasoning must be"),
        ({"continue_final_message": True}, "no assistant's"),
        ({"template_kwargs": {"a": object()}}, "no JSON"),
        ({"template_kwargs": {"a": float("nan")}}, "no JSON"),
    ],
    ids=repr,
)
def test_what_cannot_be_asked_is_refused_in_words(given: dict[str, Any], said: str) -> None:
    with pytest.raises(lc.ChatError, match=said):
        Chat.from_template(SHOWS_ALL).render([USER], **given)


def test_with_the_choice_none_there_are_no_tools() -> None:
    assert shown(USER, tools=[TOOL], tool_choice="none") == "[user]Hi[assistant]"


def test_variables_reach_the_template() -> None:
    chat = Chat.from_template("{{ messages[0].content }}{{ much.more[1] }}")
    assert chat.render([USER], template_kwargs={"much": {"more": [1, "x"]}}).text == "Hix"


def test_ids_are_mapped_where_a_template_wants_nine_letters() -> None:
    source = "{% if id|length != 9 %}{% endif %}" + SHOWS_ALL
    messages = [
        USER,
        call("{}", id="call_of_a_stranger"),
        {"role": "tool", "tool_call_id": "call_of_a_stranger", "content": "5"},
    ]
    text = Chat.from_template(source).render(messages).text
    first, second = text.split("(")[1].split()[0], text.split("<")[1].split(">")[0]
    assert first == second
    assert len(first) == 9
    assert first.isalnum()
    kept = Chat.from_template(source).render([USER, call("{}", id="abcdefgh9")]).text
    assert "(abcdefgh9 f" in kept


def test_several_messages_of_the_system_are_one_where_the_template_wants_it_first() -> None:
    source = (
        "{% for message in messages %}{% if message.role == 'system' and not loop.first %}"
        "{{ raise_exception('the system comes first') }}{% endif %}{% endfor %}" + SHOWS_ALL
    )
    messages = [{"role": "system", "content": "a"}, USER, {"role": "developer", "content": "b"}]
    assert Chat.from_template(source).render(messages).text == "[system]a\n\nb[user]Hi[assistant]"
    assert shown(*messages) == "[system]a[user]Hi[system]b[assistant]"


def test_what_a_template_says_is_told() -> None:
    with pytest.raises(lc.ChatError, match="no users here"):
        Chat.from_template("{{ raise_exception('no users here') }}").render([USER])


@pytest.mark.parametrize("source", ["", " ", "{{", "{% for %}", "{% no_such_tag %}", "{% if a %}"])
def test_what_is_no_template_is_refused(source: str) -> None:
    with pytest.raises(lc.ChatError):
        Chat.from_template(source)


def test_a_continued_message_is_open_at_its_end() -> None:
    prompt = chatml().render([USER, {"role": "assistant", "content": "The sky is"}], continue_final_message=True)
    assert prompt.text.endswith("<|im_start|>assistant\nThe sky is")
    reader = prompt.reader()
    assert "".join(delta.content for delta in [*reader.feed(" blue"), *reader.end()]).endswith(" blue")


def chatml() -> Chat:
    return model("llama").chat


def test_a_model_without_a_template_speaks_chatml() -> None:
    prompt = chatml().render([{"role": "system", "content": "Be kind."}, USER])
    assert (
        prompt.text == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.tokens == model("llama").tokenize(prompt.text, True, True).tolist()


def _control() -> str:
    """The text of a control token of the test models."""
    found = model("llama")
    return next(
        text.decode()
        for token in range(found.n_vocab)
        if found.is_control(token) and len(text := found.token_to_piece(token)) > 2
    )


@pytest.mark.parametrize("role", ["user", "tool"])
def test_what_looks_like_a_control_token_in_the_text_of_a_stranger_is_text(role: str) -> None:
    found, control = model("llama"), _control()
    token = found.tokenize(control, False, True).tolist()
    assert len(token) == 1
    prompt = chatml().render([{"role": role, "content": f"a {control}b\ue0000:"}])
    assert f"a {control}b\ue0000:" in prompt.text
    assert token[0] not in prompt.tokens[1:]
    assert found.detokenize(prompt.tokens, unparse_special=True).endswith(prompt.text)
    in_parts = chatml().render([{"role": role, "content": [{"type": "text", "text": f"a {control}b\ue0000:"}]}])
    assert in_parts.tokens == prompt.tokens
    # What the operator says may have markers.
    assert token[0] in chatml().render([{"role": "system", "content": control}, USER]).tokens[1:]


def test_a_prompt_without_a_model_has_no_tokens() -> None:
    with pytest.raises(lc.ChatError, match="no tokens"):
        Chat.from_template(SHOWS_ALL).render([USER]).tokens  # noqa: B018


def test_nothing_follows_the_end_of_an_answer() -> None:
    reader = chatml().render([USER]).reader()
    reader.feed("a")
    assert reader.end() == []
    assert reader.end() == []
    with pytest.raises(ValueError, match="ended"):
        reader.feed("b")
    assert reader.message == lc.ChatMessage("a")
    assert reader.message.as_dict() == {"role": "assistant", "content": "a"}


def test_a_template_is_used_from_many_threads() -> None:
    chat = chatml()
    wanted = chat.render([USER]).text
    texts: list[str] = []

    def work() -> None:
        texts.extend(chat.render([USER]).text for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [wanted] * 80
