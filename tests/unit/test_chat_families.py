"""Answers of thirty families of models are read: thinking, content and calls, whole and in pieces cut anywhere."""

# ruff: noqa: RUF001 (the markers of some families have such signs)

from __future__ import annotations

import json
import random

import pytest

from llamacancel.chat import ChatMessage, ChatPrompt
from tests.unit.chat_families import ASKED, FAMILIES, TEMPLATES, TOOLS, Calls, Family, chat_of

COHERE = "CohereForAI-c4ai-command-r7b-12-2024-tool_use"

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
each_thinker = pytest.mark.parametrize(
    "family", [each for each in FAMILIES if each.think], ids=lambda family: family.name
)


def told(message: ChatMessage) -> tuple[str, str, list[tuple[str, str]]]:
    """All of a message but the ids of its calls, which may be new each time."""
    return message.content, message.reasoning, [(call.name, call.arguments) for call in message.tool_calls]


def read(prompt: ChatPrompt, text: str, seed: int | None = None) -> ChatMessage:
    """What is read of a text at once, or in pieces."""
    reader = prompt.reader()
    deltas, at, pieces = [], 0, random.Random(seed)
    while at < len(text):
        n = len(text) if seed is None else pieces.choice((1, 1, 2, 3, 5, 20))
        deltas += reader.feed(text[at : at + n])
        at += n
    deltas += reader.end()
    assert ChatMessage.of(deltas) == reader.message
    for delta in deltas:
        assert delta.content or delta.reasoning or delta.tool_calls
    return reader.message


def same_however_cut(prompt: ChatPrompt, text: str) -> ChatMessage:
    whole = read(prompt, text)
    for seed in range(5):
        assert told(read(prompt, text, seed)) == told(whole)
    return whole


def calls_of(message: ChatMessage) -> Calls:
    assert all(call.name == "get_weather" for call in message.tool_calls)
    return [tuple(json.loads(call.arguments).values()) for call in message.tool_calls]


def without_thinking(family: Family) -> str:
    """What an answer begins with that has no thinking, where the prompt ends in the middle of it."""
    return family.think[1] if family.think and not family.think[0] else ""


@each_family
def test_a_plain_answer_is_content(family: Family) -> None:
    prompt = chat_of(family.template).render(ASKED, TOOLS)
    message = same_however_cut(prompt, without_thinking(family) + "Fine: 3 < 4, and {so} [on].\n\nAs ever.")
    assert message.content.strip() == "Fine: 3 < 4, and {so} [on].\n\nAs ever."
    assert not message.reasoning.strip()
    assert not message.tool_calls


@each_thinker
def test_thinking_is_told_apart(family: Family) -> None:
    assert family.think
    before, after = family.think
    prompt = chat_of(family.template).render(ASKED)
    final = {"openai-gpt-oss-120b": "<|channel|>final<|message|>", COHERE: "<|START_RESPONSE|>"}.get(family.name, "")
    message = same_however_cut(
        prompt, f"{before}Let me <see>\nNow.{after}{final}Fine.{'<|END_RESPONSE|>' if family.name == COHERE else ''}"
    )
    assert message.reasoning.strip() == "Let me <see>\nNow."
    assert message.content.strip() == "Fine."


@each_family
def test_a_call_is_read(family: Family) -> None:
    prompt = chat_of(family.template).render(ASKED, TOOLS)
    message = same_however_cut(prompt, without_thinking(family) + family.calls([("Bad Homburg", 3)]))
    assert calls_of(message) == [("Bad Homburg", 3)]
    assert not message.content.strip()


@each_thinker
def test_a_call_behind_thinking_is_read(family: Family) -> None:
    assert family.think
    before, after = family.think
    prompt = chat_of(family.template).render(ASKED, TOOLS)
    message = same_however_cut(prompt, f"{before}I need it.{after}{family.calls([('Bonn', 1)])}")
    assert calls_of(message) == [("Bonn", 1)]
    assert message.reasoning.strip() == "I need it."
    assert not message.content.strip()


@each_family
def test_two_calls_are_read(family: Family) -> None:
    if not family.several:
        pytest.skip("one call at a time is written, or read")
    prompt = chat_of(family.template).render(ASKED, TOOLS)
    message = same_however_cut(prompt, without_thinking(family) + family.calls([("Bonn", 1), ("Köln", 2)]))
    assert calls_of(message) == [("Bonn", 1), ("Köln", 2)]
    assert not message.content.strip()
    assert len({call.id for call in message.tool_calls}) == 2


@each_family
def test_a_string_may_hold_what_ends_a_call(family: Family) -> None:
    city = f'a {family.close} "b" {{c'
    if family.close in ("</parameter>", "</｜DSML｜invoke>") or "<arg_value>" in family.calls([("", 0)]):
        city = f"a {family.close} b"  # strings without quotes
    prompt = chat_of(family.template).render(ASKED, TOOLS)
    message = same_however_cut(prompt, without_thinking(family) + family.calls([(city, 3)]))
    assert calls_of(message) == [(city, 3)]


@each_family
def test_a_call_that_a_limit_cuts_is_told_as_far_as_it_goes(family: Family) -> None:
    prompt = chat_of(family.template).render(ASKED, TOOLS)
    text = without_thinking(family) + family.calls([("Bad Homburg", 3)])
    cut = same_however_cut(prompt, text[: text.index("Homburg")])
    assert not cut.content.strip()
    for call in cut.tool_calls:
        assert call.name == "get_weather"
        assert json.dumps({"city": "Bad Homburg", "days": 3}).startswith(call.arguments.rstrip().replace('":"', '": "'))


@each_family
def test_the_deltas_of_a_call_begin_with_its_name(family: Family) -> None:
    reader = chat_of(family.template).render(ASKED, TOOLS).reader()
    deltas = [delta for char in without_thinking(family) + family.calls([("Bonn", 1)]) for delta in reader.feed(char)]
    first, *rest = [call for delta in [*deltas, *reader.end()] for call in delta.tool_calls]
    assert first.name == "get_weather"
    assert first.id
    assert not any(each.name or each.id for each in rest)
    assert {each.index for each in rest} <= {0}


@each_family
def test_what_calls_no_tool_is_content(family: Family) -> None:
    prompt = chat_of(family.template).render(ASKED, TOOLS)
    text = family.calls([("Bonn", 1)]).replace("get_weather", "no_such_tool")
    message = same_however_cut(prompt, without_thinking(family) + text)
    assert not message.tool_calls
    assert "no_such_tool" in message.content


def _histories() -> dict[str, tuple[list[dict[str, object]], bool]]:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Bonn", "days": 1}'},
    }
    result = {"role": "tool", "tool_call_id": "call_1", "name": "get_weather", "content": "sunny"}
    return {
        "plain": ([{"role": "system", "content": "Be kind."}, *ASKED], False),
        "developer": ([{"role": "developer", "content": "Be kind."}, *ASKED], False),
        "parts": (
            [{"role": "user", "content": [{"type": "text", "text": "How is"}, {"type": "text", "text": "it?"}]}],
            False,
        ),
        "tools": (ASKED, True),
        "a loop with content null": (
            [*ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}, result],
            True,
        ),
        "a loop with text": ([*ASKED, {"role": "assistant", "content": "I see.", "tool_calls": [call]}, result], True),
    }


REFUSE_LOOPS = {"google-gemma-2-2b-it.jinja"}  # "Conversation roles must alternate"


@pytest.mark.parametrize("template", sorted(path.name for path in TEMPLATES.glob("*.jinja")))
def test_every_template_of_llama_cpps_renders_the_basic_histories(template: str) -> None:
    chat = chat_of(template)
    for name, (messages, with_tools) in _histories().items():
        if template in REFUSE_LOOPS and "loop" in name:
            with pytest.raises(ValueError, match="roles must alternate"):
                chat.render(messages, TOOLS)
            continue
        prompt = chat.render(messages, TOOLS if with_tools else ())
        assert "How is" in prompt.text
