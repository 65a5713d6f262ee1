"""`Engine.chat`: a conversation is rendered, answered and read, under one token; what it has to follow, it follows."""

from __future__ import annotations

import asyncio
import json
import random
from functools import cache
from typing import Any

import pytest

import llamacancel as lc
from llamacancel import aio
from llamacancel.chat import Chat
from tests.unit.chat_families import ASKED, FAMILIES, TEMPLATES, TOOLS, WEATHER, Family, chat_of
from tests.unit.engines import endless, engine, greedy, idle_slots, model
from tests.unit.test_chat_families import each_family, without_thinking

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
UNKNOWN = {"deepseek-ai-DeepSeek-V3.2", "google-gemma-4-31B-it", "LFM2.5-8B-A1B"}


@cache
def qwen() -> Chat:
    chat_of("Qwen-Qwen3-0.6B.jinja")
    return Chat(model("llama"), (TEMPLATES / "Qwen-Qwen3-0.6B.jinja").read_text())


def follows(constraint: object, text: str) -> bool:
    """Whether a text is all that a constraint allows."""
    sampler = lc.Sampler(temperature=0).constrained(constraint)  # type: ignore[arg-type]
    found = model("llama")

    def takes(token: int) -> bool:
        try:
            sampler.accept(int(token), model=found)
        except ValueError:
            return False
        return True

    if not all(map(takes, found.tokenize("\x02" + text, False)[len(found.tokenize("\x02", False)) :])):
        return False
    return takes(found.eos) or not any(map(takes, range(3, 1000)))  # nothing is taken where nothing can follow


@each_family
def test_a_call_that_is_demanded_has_the_familys_format(family: Family) -> None:
    chat = chat_of(family.template)
    if family.name in UNKNOWN:
        with pytest.raises(lc.ChatError, match="cannot be demanded"):
            chat.render(ASKED, TOOLS, "required")
        return
    if "▁" in family.calls([("", 0)]):
        pytest.skip("the test models' vocabulary takes this sign for a space")
    constraint = chat.render(ASKED, TOOLS, "required").constraint
    assert follows(constraint, without_thinking(family) + family.calls([("Bad Homburg", 3)]))
    assert not follows(constraint, without_thinking(family) + "Fine.")
    assert not follows(
        constraint, without_thinking(family) + family.calls([("Bonn", 3)]).replace("get_weather", "now2")
    )
    only_now = chat.render(ASKED, TOOLS, "now").constraint
    assert not follows(only_now, without_thinking(family) + family.calls([("Bonn", 3)]))


@pytest.mark.parametrize("family", [each for each in FAMILIES if each.think], ids=lambda family: family.name)
def test_what_follows_a_schema_may_be_thought_about_before(family: Family) -> None:
    assert family.think
    chat = chat_of(family.template)
    prompt = chat.render(ASKED, json_schema=SCHEMA)
    before, after = family.think
    final = {
        "openai-gpt-oss-120b": ("<|channel|>final<|message|>", ""),
        "CohereForAI-c4ai-command-r7b-12-2024-tool_use": ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    }.get(family.name, ("", ""))
    assert follows(prompt.constraint, f'{before}It is 5.{after}{final[0]}{{"a": 5}}{final[1]}')
    assert not follows(prompt.constraint, f'{before}It is 5.{after}{final[0]}{{"b": 5}}{final[1]}')


def test_an_answer_of_tools_and_a_schema_is_a_call_or_follows_it() -> None:
    constraint = qwen().render(ASKED, TOOLS, json_schema=SCHEMA).constraint
    assert follows(constraint, '{"a": 5}')
    assert follows(constraint, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')
    assert not follows(constraint, "Fine.")


def sampler(seed: int) -> lc.Sampler:
    return lc.Sampler(temperature=1.0, seed=seed)


@pytest.mark.parametrize("seed", range(3))
def test_a_demanded_call_is_told_as_it_comes(seed: int) -> None:
    with engine() as e:
        weather = json.loads(json.dumps(WEATHER))
        weather["function"]["parameters"]["properties"]["city"]["enum"] = ["Bonn", "Mainz"]
        conversation = e.chat(
            ASKED, [weather], "required", False, chat=qwen(), reasoning="off", sampler=sampler(seed), max_tokens=200
        )
        deltas = list(conversation)
        message = conversation.message
        assert lc.ChatMessage.of(deltas) == message == conversation.result()
        (call,) = message.tool_calls
        assert json.loads(call.arguments)["city"] in ("Bonn", "Mainz")
        assert conversation.finish_reason == "tool_calls"
        assert not message.content.strip()


def test_an_answer_follows_its_schema() -> None:
    with engine() as e:
        schema = {
            "type": "object",
            "properties": {"a": {"enum": [1, 22]}},
            "required": ["a"],
            "additionalProperties": False,
        }
        conversation = e.chat(ASKED, json_schema=schema, sampler=sampler(1), max_tokens=100)
        assert json.loads(conversation.result().content)["a"] in (1, 22)
        assert conversation.finish_reason == "stop"
        with pytest.raises(ValueError, match="a constraint of its own"):
            e.chat(ASKED, json_schema=schema, sampler=lc.Sampler(regex="a"))


def test_a_conversation_is_cancelled_and_timed_as_any_generation() -> None:
    with engine(slots=1) as e:
        running = e.chat(ASKED, sampler=endless())
        next(running)
        assert running.cancel("no more")
        with pytest.raises(lc.DecodeCancelled, match="no more"):
            list(running)
        with pytest.raises(lc.DeadlineExceeded):
            e.chat(ASKED, sampler=endless(), timeout=0.05).result()
        token = lc.CancelToken()
        token.cancel()
        with pytest.raises(lc.DecodeCancelled):
            e.chat(ASKED, token=token)
        with e.chat(ASKED, sampler=endless()) as left:
            next(left)
        assert left.finish_reason == "cancelled"
        assert e.chat(ASKED, sampler=greedy(), max_tokens=3).result().role == "assistant"
        assert idle_slots(e) == 1


def test_control_tokens_are_shown_where_they_are_asked_for() -> None:
    found = model("llama")
    control = next(token for token in range(found.n_vocab) if found.is_control(token) and not found.is_eog(token))
    always = lc.Sampler(temperature=0, logit_bias={control: 1000.0})
    name = found.token_to_piece(control).decode()
    with engine() as e:
        assert e.submit([5, 6], sampler=always, max_tokens=2).result().text == ""
        assert e.submit([5, 6], sampler=always, max_tokens=2, shown_tokens=[control]).result().text == 2 * name


def test_a_conversation_is_answered_on_an_event_loop() -> None:
    async def main(e: lc.Engine) -> None:
        async with aio.Engine(e) as engine_:
            conversation = await engine_.chat(ASKED, json_schema=SCHEMA, sampler=sampler(2), max_tokens=100)
            deltas = [delta async for delta in conversation]
            assert lc.ChatMessage.of(deltas) == conversation.message == await conversation.result()
            async with await engine_.chat(ASKED, sampler=endless()) as left:
                await left.__anext__()
            assert left.finish_reason == "cancelled"
            task = asyncio.create_task((await engine_.chat(ASKED, sampler=endless())).result())
            await asyncio.sleep(0)  # it has begun to wait
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert idle_slots(e) == 2

    with engine() as e:
        asyncio.run(main(e))


def test_what_is_generated_at_random_under_a_demand_is_read_as_calls() -> None:
    choices: dict[str, Any] = {"type": "string", "enum": ["a", "bc"]}
    tools = [
        {
            "name": f"f{i}",
            "parameters": {
                "type": "object",
                "properties": {"x": choices, "n": {"type": "boolean"}},
                "required": ["x", "n"],
            },
        }
        for i in range(3)
    ]
    templates = [each.template for each in FAMILIES if each.name not in UNKNOWN]
    with engine(n_ctx=8192) as e:
        for template in random.Random(5).sample(templates, 6):
            chat_of(template)
            chat = Chat(model("llama"), (TEMPLATES / template).read_text())
            for seed in range(2):
                conversation = e.chat(
                    ASKED, tools, "required", False, chat=chat, reasoning="off", sampler=sampler(seed), max_tokens=300
                )
                message = conversation.result()
                if conversation.generation.finish_reason == "stop":
                    (call,) = message.tool_calls
                    assert json.loads(call.arguments)["x"] in ("a", "bc"), (template, message)
