"""Law 11 for chat: a template that never ends or is nested too deep ends with an error, and so does such an answer.

All of it stops under its token, and costs no more than in proportion to what was given.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

import llamacancel as lc
from llamacancel.chat import Chat

USER = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}

LONG = (
    "{% for a in range(1000) %}{% for b in range(1000) %}{% for c in range(1000) %}x"
    "{% endfor %}{% endfor %}{% endfor %}"
)


def again(times: int, first: str, step: str, shown: str) -> str:
    """A template that goes on from `x = first` to `step`, so many times."""
    loop = f"{{% for a in range({times}) %}}{{% set ns.x = {step} %}}{{% endfor %}}"
    return f"{{% set ns = namespace(x={first}) %}}{loop}{{{{ {shown} }}}}"


NEVER_ENDING = {
    "loops within loops": LONG,
    "a range of 10^18": "{% for a in range(1000000000000000000) %}{% endfor %}",
    "a text that doubles": again(200, "'a'", "ns.x ~ ns.x", "ns.x"),
    "a text repeated": "{{ 'abc' * 1000000000000 }}",
    "replacements": "{% set a = 'a' * 100000 %}{{ a | replace('a', a) | replace('a', a) }}",
    "replacements of nothing": "{% set a = 'a' * 100000 %}{{ a | replace('', a) | replace('', a) }}",
    "joins": "{% set a = 'a' * 1000000 %}{{ range(1000000) | list | join(a) }}",
    "an indent": "{{ 'a' | indent(1000000000000, true) }}",
    "lists that double": again(200, "[1]", "ns.x + ns.x", "1"),
    "a macro that calls itself": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "two macros": "{% macro f(x) %}{{ g(x) }}{% endmacro %}{% macro g(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "lists within lists": again(100_000, "[]", "[ns.x]", "ns.x"),
    "lists within lists, as JSON": again(100_000, "[]", "[ns.x]", "ns.x | tojson"),
    "objects within objects": again(100_000, "{}", "{'a': ns.x}", "ns.x | tojson"),
    "a list within itself": "{% set x = [] %}{% set y = x.append(x) %}{{ x }}{{ x | tojson }}",
}


@pytest.mark.parametrize("source", NEVER_ENDING.values(), ids=NEVER_ENDING.keys())
def test_a_template_that_never_ends_ends_with_an_error(source: str) -> None:
    with pytest.raises((lc.ChatError, MemoryError)):
        Chat.from_template(source).render(USER)


DEEP = {
    "parentheses": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "lists": "{{ " + "[" * 100_000 + "]" * 100_000 + " }}",
    "conditions": "{% if a %}" * 20_000 + "{% endif %}" * 20_000,
    "alternatives": "{% if a %}" + "{% elif b %}" * 20_000 + "{% endif %}",
    "negations": "{{ " + "not " * 100_000 + "a }}",
    "signs": "{{ " + "-" * 100_000 + "1 }}",
    "attributes": "{{ a" + ".b" * 100_000 + " }}",
    "sums": "{{ 1" + " + 1" * 100_000 + " }}",
    "filters": "{{ 1" + "|abs" * 100_000 + " }}",
    "tests": "{{ 1" + " is odd" * 100_000 + " }}",
    "a megabyte": "x" * 2**21,
}


@pytest.mark.parametrize("source", DEEP.values(), ids=DEEP.keys())
def test_a_template_that_is_nested_too_deep_or_too_large_is_refused(source: str) -> None:
    with pytest.raises(lc.ChatError):
        Chat.from_template(source).render(USER)


def test_a_template_stops_under_its_token() -> None:
    chat = Chat.from_template("{{ messages[0].content }}{% if long %}" + LONG + "{% endif %}")
    token = lc.CancelToken(timeout=0.05)
    with pytest.raises(lc.DeadlineExceeded):
        chat.render(USER, template_kwargs={"long": True}, token=token)
    assert chat.render(USER).text == "Hi"


def test_a_token_that_is_cancelled_before_starts_nothing() -> None:
    token = lc.CancelToken()
    token.cancel()
    chat = Chat.from_template("{{ messages[0].content }}")
    reader = chat.render(USER).reader()
    with pytest.raises(lc.DecodeCancelled):
        Chat.from_template("a", token=token)
    with pytest.raises(lc.DecodeCancelled):
        chat.render(USER, token=token)
    with pytest.raises(lc.DecodeCancelled):
        reader.feed("a", token)
    assert reader.feed("b") + reader.end()
    assert reader.message.content == "ab"


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = {"a": [value]}
    return value


def test_values_that_are_nested_too_deep_are_refused() -> None:
    chat = Chat.from_template("{{ messages[0].content }}")
    for given in (
        {"template_kwargs": {"a": nested(100_000)}},
        {"tools": [{"name": "f", "parameters": {"a": nested(100_000)}}]},
    ):
        with pytest.raises(lc.ChatError, match="deeper"):
            chat.render(USER, **given)  # type: ignore[arg-type]
    call = {"function": {"name": "f", "arguments": nested(100_000)}}
    with pytest.raises(lc.ChatError, match="deeper"):
        chat.render([{"role": "assistant", "tool_calls": [call]}])


QWEN_LIKE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("inside", ["[" * 200_000, '{"a":' * 100_000])
def test_an_answer_that_is_nested_too_deep_ends_with_an_error(inside: str) -> None:
    reader = Chat.from_template(QWEN_LIKE).render(USER, [TOOL]).reader()
    text = '<tool_call>\n{"name": "f", "arguments": {"a": ' + inside
    with pytest.raises(lc.ChatError, match="nested too deep"):
        reader.feed(text)


SCHEMAS = {
    "itself": {"$defs": {"A": {"$ref": "#/$defs/A"}}, "allOf": [{"$ref": "#/$defs/A"}]},
    "in circles": {"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"anyOf": [{"$ref": "#/$defs/A"}]}}},
    "elsewhere": {"properties": {"a": {"$ref": "https://example.org/schema"}}},
    "nowhere": {"properties": {"a": {"$ref": "#/$defs/B"}}},
    "no schema": {"properties": {"a": True, "b": 5, "c": {"type": "no such type"}, "d": {"enum": []}}},
    "a long name": {"properties": {"n" * 1_000_000: {}}},
    "many": {"properties": {f"a{i}": {"type": "string"} for i in range(1000)}},
    "half of a reference": {"properties": {"a": {"$ref": "#/$defs/A"}}, "additionalProperties": 5, "$defs": {"A": {}}},
    "a chain": {
        "properties": {"a": {"$ref": "#/$defs/A0"}},
        "$defs": {f"A{i}": {"$ref": f"#/$defs/A{i + 1}"} for i in range(20_000)},
    },
}


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS.keys())
@pytest.mark.parametrize("source", [QWEN_LIKE, "tagged"], ids=["json", "tagged"])
def test_a_schema_of_a_tool_ends_at_most_its_request(schema: object, source: str) -> None:
    if source == "tagged":
        source = QWEN_LIKE + "{# <tool_call> <function= <parameter= #}"
    chat = Chat.from_template(source)
    try:
        prompt = chat.render(USER, [{"name": "f", "parameters": schema}])
    except (lc.ChatError, MemoryError):
        return
    reader = prompt.reader()
    reader.feed('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>')
    reader.end()


def steps_of(text: str, size: int) -> int:
    """Steps that the reader takes for an answer in pieces of `size`."""
    reader = Chat.from_template(QWEN_LIKE).render(USER, [TOOL]).reader()
    for at in range(0, len(text), size):
        reader.feed(text[at : at + size])
    reader.end()
    return reader.steps


@pytest.mark.parametrize("what", ["content", "arguments"])
def test_reading_takes_steps_in_proportion_to_the_answer(what: str) -> None:
    def text(n: int) -> str:
        words = "a word\n" * n
        return (
            words if what == "content" else '<tool_call>\n{"name": "f", "arguments": {"a": "' + words.replace("\n", " ")
        )

    once, twice = steps_of(text(4000), 4), steps_of(text(8000), 4)
    assert twice < 2.5 * once


def test_a_template_that_is_nested_leaves_threads_with_small_stacks_alone() -> None:
    code = """
        import threading
        from llamacancel.chat import Chat
        threading.stack_size(256 * 1024)
        def work():
            for source in ("{{ " + "[" * 100_000, "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"):
                try:
                    Chat.from_template(source).render([{"role": "user", "content": "Hi"}])
                except ValueError:
                    print("refused")
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["refused", "refused"], done.stderr


@pytest.mark.parametrize("step", [-(2**63), 2**63 - 1, -(2**63) + 1])
def test_a_slice_ends_whatever_its_step(step: int) -> None:
    chat = Chat.from_template(f"{{{{ (messages[::{step}]) | length }}}}")
    assert chat.render([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]).text == "1"
