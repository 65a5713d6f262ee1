"""llama.cpp's Jinja renders as jinja2 does, as the Hugging Face libraries set it up, wherever that one can render."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.unit.chat_families import TEMPLATES, chat_of

jinja2 = pytest.importorskip("jinja2")
sandbox = pytest.importorskip("jinja2.sandbox")

PLAIN = [
    {"role": "user", "content": "How is <it>?"},
    {"role": "assistant", "content": "Fine & well."},
    {"role": "user", "content": "And you?\n"},
]
DATES = ("date_string", "strftime_now")
TRIMMED = {"StepFun3.5-Flash.jinja"}  # llama.cpp gives it contents without white space round them, which it loops over


def rendered(source: str, messages: list[dict[str, Any]]) -> str:
    """What jinja2 makes of a template."""

    def refuse(words: str) -> None:
        raise jinja2.TemplateError(words)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = refuse
    text: str = environment.from_string(source).render(
        messages=messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=True, enable_thinking=True
    )
    return text


@pytest.mark.parametrize("template", sorted(path.name for path in TEMPLATES.glob("*.jinja")))
def test_a_plain_conversation_is_rendered_as_by_jinja2(template: str) -> None:
    source = (TEMPLATES / template).read_text()
    if any(word in source for word in DATES):
        pytest.skip("the template shows the date")
    try:
        given = [
            {**each, "content": each["content"].strip() if template in TRIMMED else each["content"]} for each in PLAIN
        ]
        wanted = rendered(source, given)
    except (jinja2.TemplateError, TypeError, AttributeError, ValueError) as error:
        pytest.skip(f"jinja2 cannot render it: {error}")
    assert chat_of(template).render(PLAIN).text == wanted
