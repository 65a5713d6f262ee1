"""Chat templates are rendered as the Hugging Face libraries do, and no template gets out of its sandbox."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

import llamacancel as lc
from llamacancel.server.openai.templates import CHATML, ChatTemplate, TemplateFailed, chat_tokens

HELLO = [{"role": "user", "content": "Hello"}]


def render(source: str | None, **given: Any) -> str:
    variables = given.pop("of_model", {})
    return ChatTemplate(source, variables=variables).render(given.pop("messages", HELLO), **given)


def test_without_a_template_it_is_chatml() -> None:
    assert render(None) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert render(None, add_generation_prompt=False) == "<|im_start|>user\nHello<|im_end|>\n"
    assert render(CHATML) == render(None)


def test_blocks_leave_no_white_space_of_their_own() -> None:
    source = (
        "{% for message in messages %}\n    {% if message.role == 'user' %}\n{{ message.content }}\n    {% endif %}\n"
        "{% endfor %}\nend"
    )
    assert render(source) == "Hello\nend"


def test_loops_can_be_left() -> None:
    source = (
        "{% for n in range(9) %}{% if n == 1 %}{% continue %}{% endif %}"
        "{% if n == 3 %}{% break %}{% endif %}{{ n }}{% endfor %}"
    )
    assert render(source) == "02"


def test_json_is_not_escaped_for_html() -> None:
    messages = [{"role": "user", "content": "<a href='x'>&</a> é"}]
    assert render("{{ messages[0] | tojson }}", messages=messages) == (
        '{"role": "user", "content": "<a href=\'x\'>&</a> é"}'
    )
    assert (
        render("{{ {'b': 1, 'a': [2]} | tojson(indent=2, sort_keys=true) }}") == '{\n  "a": [\n    2\n  ],\n  "b": 1\n}'
    )


def test_a_template_can_refuse() -> None:
    with pytest.raises(TemplateFailed, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_a_template_knows_the_date() -> None:
    assert render("{{ strftime_now('%Y') }}") in (str(datetime.now().year), str(datetime.now().year - 1))


def test_a_generation_tag_is_plain_text() -> None:
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}!") == "Hello!"


def test_special_tokens_and_further_variables_are_there() -> None:
    source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ extra }}{{ tools is none }}"
    assert (
        render(source, of_model={"bos_token": "<s>", "eos_token": "</s>"}, variables={"extra": 1})
        == "<s>Hello</s>1True"
    )


def test_variables_of_a_request_cannot_replace_the_messages() -> None:
    assert render("{{ messages[0].content }}", variables={"messages": []}) == "Hello"


def test_tools_have_a_template_of_their_own_where_the_model_has_one() -> None:
    template = ChatTemplate("plain", tool_source="{{ tools[0].function.name }}")
    assert template.render(HELLO) == "plain"
    assert template.render(HELLO, tools=[{"type": "function", "function": {"name": "f"}}]) == "f"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ range(10**9) }}",
        "{{ 'a' + 1 }}",
        "{{ 1 / 0 }}",
        "{{ nothing.there }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_what_a_template_must_not_or_cannot_do_is_an_error(source: str) -> None:
    with pytest.raises(TemplateFailed):
        render(source)


def test_a_template_that_cannot_be_parsed_is_named_at_once() -> None:
    with pytest.raises(TemplateFailed, match="cannot be parsed"):
        ChatTemplate("{% if %}")


def test_special_tokens_are_read_as_such_and_the_beginning_comes_once(model_of: Any) -> None:
    model: lc.Model = model_of("llama")
    assert model.adds_bos
    assert model.bos is not None
    bos = model.token_to_piece(model.bos).decode()
    plain = chat_tokens(model, "Hello</s>")
    assert plain.count(model.bos) == 1
    assert plain[0] == model.bos
    assert plain[-1] == model.eos
    assert chat_tokens(model, bos + "Hello</s>") == plain


def test_the_models_own_template_is_used(model_of: Any) -> None:
    model: lc.Model = model_of("llama")
    assert model.chat_template
    assert ChatTemplate.of_model(model).render(HELLO).startswith("<|im_start|>user\nHello")
    assert ChatTemplate.of_model(model, "{{ bos_token }}").render(HELLO) == "<s>"
