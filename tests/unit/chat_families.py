"""How families of models write: the template of each, as llama.cpp's tree has it, and the texts that its models answer.

The templates come with the sources of llama.cpp and are not committed.
"""

# ruff: noqa: RUF001 (the markers of some families have such signs)

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from llamacancel.chat import Chat

TEMPLATES = Path(__file__).resolve().parents[2] / "vendor" / "llama.cpp" / "models" / "templates"

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}
NOW = {
    "type": "function",
    "function": {"name": "now", "description": "The time.", "parameters": {"type": "object", "properties": {}}},
}
TOOLS = [WEATHER, NOW]
ASKED = [{"role": "user", "content": "How is the weather?"}]

Calls = list[tuple[str, int]]  # the arguments of each call of get_weather


@dataclass(frozen=True)
class Family:
    """How a family writes calls of `get_weather`, and what stands round its thinking.

    Attributes:
        template: The file.
        calls: The text of calls.
        think: What stands before and after thinking; None: it does not think. The first part is "" where the prompt
            ends with it.
        close: The text that would end a call, which may stand in a string of its arguments.
        several: Whether an answer may have several calls.
    """

    template: str
    calls: Callable[[Calls], str]
    think: tuple[str, str] | None = None
    close: str = "</tool_call>"
    several: bool = True

    @property
    def name(self) -> str:
        return self.template.removesuffix(".jinja")


def _json(city: str, days: int) -> str:
    return json.dumps({"city": city, "days": days}, ensure_ascii=False)


def _each(
    begin: str, end: str, between: str = "", *, name: str = "name", arguments: str = "arguments"
) -> Callable[[Calls], str]:
    """Objects with a name and arguments between two texts."""
    return lambda calls: between.join(
        f'{begin}{{"{name}": "get_weather", "{arguments}": {_json(*call)}}}{end}' for call in calls
    )


def _named(begin: str, middle: str, end: str, before: str = "", after: str = "") -> Callable[[Calls], str]:
    """A name and arguments in JSON between texts; {i} is the number of the call."""
    return lambda calls: (
        before
        + "".join(
            begin.format(i=i) + "get_weather" + middle.format(i=i) + _json(*call) + end for i, call in enumerate(calls)
        )
        + after
    )


def _tagged(call: str, argument: str, between: str = "", before: str = "", after: str = "") -> Callable[[Calls], str]:
    """Arguments each between tags, strings without quotes."""

    def write(calls: Calls) -> str:
        texts = []
        for city, days in calls:
            arguments = "".join(
                argument % {"name": name, "value": value} for name, value in (("city", city), ("days", days))
            )
            texts.append(call % {"arguments": arguments})
        return before + between.join(texts) + after

    return write


QWEN = _each("<tool_call>\n", "\n</tool_call>", "\n")
CODER = _tagged(
    "<tool_call>\n<function=get_weather>\n%(arguments)s</function>\n</tool_call>",
    "<parameter=%(name)s>\n%(value)s\n</parameter>\n",
    "\n",
)
THINK = ("<think>", "</think>")
OPENED = ("", "</think>")  # the prompt ends with <think>

FAMILIES = [
    Family("Qwen-Qwen2.5-7B-Instruct.jinja", QWEN),
    Family("Qwen-Qwen3-0.6B.jinja", QWEN, THINK),
    Family("Qwen-QwQ-32B.jinja", QWEN, OPENED),
    Family("Qwen3-Coder.jinja", CODER, close="</parameter>"),
    Family("Qwen3.5-4B.jinja", CODER, OPENED, close="</parameter>"),
    Family("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16.jinja", CODER, OPENED, close="</parameter>"),
    Family("StepFun3.5-Flash.jinja", CODER, OPENED, close="</parameter>"),
    Family("MiMo-VL.jinja", QWEN),
    Family("NousResearch-Hermes-3-Llama-3.1-8B-tool_use.jinja", _each("<tool_call>\n", "\n</tool_call>", "\n")),
    Family("ibm-granite-granite-4.0.jinja", QWEN),
    Family("meta-llama-Llama-3.1-8B-Instruct.jinja", _each("", "", arguments="parameters"), several=False),
    Family("meta-llama-Llama-3.3-70B-Instruct.jinja", _each("", "", arguments="parameters"), several=False),
    Family(
        "fireworks-ai-llama-3-firefunction-v2.jinja",
        lambda calls: " functools[" + ", ".join(_each("", "")([call]) for call in calls) + "]",
        close="]",
    ),
    Family("meetkai-functionary-medium-v3.1.jinja", _named("<function=", ">", "</function>"), close="</function>"),
    Family(
        "mistralai-Mistral-Nemo-Instruct-2407.jinja",
        lambda calls: (
            "[TOOL_CALLS]["
            + ", ".join(
                f'{{"name": "get_weather", "arguments": {_json(*call)}, "id": "12345678{i}"}}'
                for i, call in enumerate(calls)
            )
            + "]"
        ),
        close="]",
    ),
    Family(
        "mistralai-Ministral-3-14B-Reasoning-2512.jinja",
        _named("[TOOL_CALLS]", "[ARGS]", ""),
        ("[THINK]", "[/THINK]"),
        close="[TOOL_CALLS]",
    ),
    Family(
        "openai-gpt-oss-120b.jinja",
        lambda calls: "<|start|>assistant".join(
            f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{_json(*call)}"
            for call in calls
        ),
        ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
        close="<|call|>",
        several=False,
    ),
    Family(
        "deepseek-ai-DeepSeek-V3.1.jinja",
        _named(
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
        ),
        OPENED,
        close="<｜tool▁call▁end｜>",
    ),
    Family(
        "deepseek-ai-DeepSeek-V3.2.jinja",
        lambda calls: (
            "<｜DSML｜function_calls>\n"
            + "".join(
                '<｜DSML｜invoke name="get_weather">\n'
                f'<｜DSML｜parameter name="city" string="true">{city}</｜DSML｜parameter>\n'
                f'<｜DSML｜parameter name="days" string="false">{days}</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
                for city, days in calls
            )
            + "</｜DSML｜function_calls>"
        ),
        OPENED,
        close="</｜DSML｜invoke>",
    ),
    Family(
        "GLM-4.6.jinja",
        _tagged(
            "<tool_call>get_weather\n%(arguments)s</tool_call>",
            "<arg_key>%(name)s</arg_key>\n<arg_value>%(value)s</arg_value>\n",
            "\n",
        ),
    ),
    Family(
        "GLM-4.7-Flash.jinja",
        _tagged(
            "<tool_call>get_weather%(arguments)s</tool_call>",
            "<arg_key>%(name)s</arg_key><arg_value>%(value)s</arg_value>",
        ),
        OPENED,
    ),
    Family(
        "Kimi-K2-Thinking.jinja",
        _named(
            "<|tool_call_begin|>functions.",
            ":{i}<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
            "<|tool_calls_section_begin|>",
            "<|tool_calls_section_end|>",
        ),
        THINK,
        close="<|tool_call_end|>",
    ),
    Family(
        "MiniMax-M2.jinja",
        _tagged(
            '<invoke name="get_weather">\n%(arguments)s</invoke>\n',
            '<parameter name="%(name)s">%(value)s</parameter>\n',
            before="<minimax:tool_call>\n",
            after="</minimax:tool_call>",
        ),
        OPENED,
        close="</invoke>",
        several=False,
    ),  # llama.cpp's parser of it reads one
    Family(
        "ByteDance-Seed-OSS.jinja",
        _tagged(
            "<seed:tool_call>\n<function=get_weather>\n%(arguments)s</function>\n</seed:tool_call>",
            "<parameter=%(name)s>%(value)s</parameter>\n",
            "\n",
        ),
        ("<seed:think>", "</seed:think>"),
        close="</seed:tool_call>",
    ),
    Family(
        "google-gemma-4-31B-it.jinja",
        lambda calls: "".join(
            f'<|tool_call>call:get_weather{{city:<|"|>{city}<|"|>,days:{days}}}<tool_call|>' for city, days in calls
        ),
        close="<tool_call|>",
    ),
    Family(
        "LFM2.5-8B-A1B.jinja",
        lambda calls: (
            "<|tool_call_start|>["
            + ", ".join(f"get_weather(city={json.dumps(city)}, days={days})" for city, days in calls)
            + "]<|tool_call_end|>"
        ),
        THINK,
        close="<|tool_call_end|>",
    ),
    Family(
        "CohereForAI-c4ai-command-r7b-12-2024-tool_use.jinja",
        lambda calls: (
            "<|START_ACTION|>[\n"
            + ",\n".join(
                f'    {{"tool_call_id": "{i}", "tool_name": "get_weather", "parameters": {_json(*call)}}}'
                for i, call in enumerate(calls)
            )
            + "\n]<|END_ACTION|>"
        ),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        close="<|END_ACTION|>",
    ),
    Family(
        "Apertus-8B-Instruct.jinja",
        lambda calls: (
            "<|tools_prefix|>["
            + ", ".join(f'{{"get_weather": {_json(*call)}}}' for call in calls)
            + "]<|tools_suffix|>"
        ),
        close="<|tools_suffix|>",
    ),
    Family(
        "inclusionai-ling-3.0-flash.jinja",
        _tagged(
            "<tool_call>get_weather\n%(arguments)s</tool_call>",
            "<arg_key>%(name)s</arg_key>\n<arg_value>%(value)s</arg_value>\n",
            "\n",
        ),
        OPENED,
    ),
]


@cache
def chat_of(template: str) -> Chat:
    """The chat of a template; skips the test where the sources have none."""
    path = TEMPLATES / template
    if not path.exists():
        pytest.skip("the templates of llama.cpp's tree are not there: vendor/fetch.py brings them")
    return Chat.from_template(path.read_text(), bos="<s>", eos="</s>")
