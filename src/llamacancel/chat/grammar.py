"""Constraints of answers: that they call a tool, or follow a schema, in the words of the model's family.

How a family writes is known from its parser: what a form below gives is tried on it, and the first form that it reads
as it was meant is the family's. llguidance follows the grammar that is made of it; llama.cpp's own converter of schemas
recurses without end on some, and is not linked.
"""

# ruff: noqa: RUF001 (the markers of some families have such signs)

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..constraint import JSON_OPTIONS, Source, checked_schema
from ..errors import ChatError

if TYPE_CHECKING:
    from .message import ChatMessage
    from .template import Controls

__all__ = ["constraint_of"]

MOST_TOOLS = 200
"""Tools among which a call may be demanded: llguidance follows their rules with its stack."""


@dataclass(frozen=True)
class CallForm:
    """How calls are written: {name} is the function's, {i} the number of the call.

    Attributes:
        begin, end: Before and after the arguments of a call.
        argument: Before and after each argument's value, where they are not one JSON object; {key} is its name.
        before, between, after: Round the calls of an answer.
    """

    begin: str
    end: str
    argument: tuple[str, str] | None = None
    before: str = ""
    between: str = ""
    after: str = ""


CALL_FORMS = (
    CallForm('<tool_call>\n{"name": "{name}", "arguments": ', "}\n</tool_call>", between="\n"),  # Qwen, Hermes, ...
    CallForm('{"name": "{name}", "parameters": ', "}"),  # Llama 3
    CallForm("[TOOL_CALLS]{name}[ARGS]", ""),  # Ministral, Devstral
    CallForm('{"name": "{name}", "arguments": ', ', "id": "12345678{i}"}', before="[TOOL_CALLS][", after="]"),  # Nemo
    CallForm('{"name": "{name}", "arguments": ', "}", before=" functools[", after="]"),  # FireFunction
    CallForm("<function={name}>", "</function>"),  # Functionary 3.1
    CallForm('{"{name}": ', "}", before="<|tools_prefix|>[", between=", ", after="]<|tools_suffix|>"),  # Apertus
    CallForm("<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>", ""),  # gpt-oss
    CallForm("<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>", "<｜tool▁call▁end｜>",
             before="<｜tool▁calls▁begin｜>", after="<｜tool▁calls▁end｜>"),  # DeepSeek V3.1
    CallForm("<|tool_call_begin|>functions.{name}:{i}<|tool_call_argument_begin|>", "<|tool_call_end|>",
             before="<|tool_calls_section_begin|>", after="<|tool_calls_section_end|>"),  # Kimi K2
    CallForm('{"tool_call_id": "{i}", "tool_name": "{name}", "parameters": ', "}",
             before="<|START_ACTION|>[\n    ", after="\n]<|END_ACTION|>"),  # Command R7B
    CallForm("<tool_call>\n<function={name}>\n", "</function>\n</tool_call>",
             ("<parameter={key}>\n", "\n</parameter>\n"), between="\n"),  # Qwen3-Coder, Qwen 3.5, Nemotron 3
    CallForm("<seed:tool_call>\n<function={name}>\n", "</function>\n</seed:tool_call>",
             ("<parameter={key}>", "</parameter>\n"), between="\n"),  # Seed-OSS
    CallForm("<tool_call>{name}\n", "</tool_call>",
             ("<arg_key>{key}</arg_key>\n<arg_value>", "</arg_value>\n"), between="\n"),  # GLM 4.6, Ling 3
    CallForm("<tool_call>{name}", "</tool_call>", ("<arg_key>{key}</arg_key><arg_value>", "</arg_value>")),  # GLM 4.7
    CallForm('<invoke name="{name}">\n', "</invoke>\n", ('<parameter name="{key}">', "</parameter>\n"),
             before="<minimax:tool_call>\n", after="</minimax:tool_call>"),  # MiniMax M2
)  # fmt: skip

CONTENT_FORMS = (
    ("<|channel|>final<|message|>", ""),  # gpt-oss
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),  # Command R
    ("", ""),
)
AFTER_THINKING = ("", "<|start|>assistant")


def constraint_of(
    read: Callable[[str], ChatMessage],
    rendering: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]],
    controls: Controls | None,
    *,
    demanded: bool,
    several: bool,
    json_schema: Any,
    may_think: bool,
) -> Source | None:
    """What an answer has to follow, or None.

    Args:
        read: Gives the message that a whole answer is read as.
        rendering: What the template made of the conversation.
        tools: Those that may be called.
        controls: The model's control tokens.
        demanded: Whether a tool has to be called.
        several: Whether an answer may have several calls.
        json_schema: What content has to follow.
        may_think: Whether it may think before.

    Raises:
        ChatError: If the family's way to call is not known, or there are too many tools.
        TypeError, ValueError: If a schema is out of bounds.
    """
    if not demanded and json_schema is None:
        return None
    lark = _Lark(controls)
    thought, begun = _thinking(read, rendering, lark, may_think)
    ways = []
    if tools:
        if len(tools) > MOST_TOOLS:
            raise ChatError(f"{len(tools)} tools are more than the {MOST_TOOLS} among which a call can be demanded")
        form = _call_form(read, tools, begun)
        if form is None and demanded:
            raise ChatError("tool_choice: how this model's family writes a call cannot be demanded; 'auto' asks for it")
        if form is not None:
            ways.append(_calls(lark, form, tools, several))
    if not demanded:
        before, after = _content_form(read, begun)
        ways.append(f"{lark.text(before)} {lark.json(json_schema)} {lark.text(after)}")
    if len(lark.rules) > MOST_RULES:
        raise ChatError(f"the tools have {len(lark.rules)} parameters and more; {MOST_RULES} are the most for a demand")
    rules = [f"start: {thought} answer", f"answer: {' | '.join(ways)}", *lark.rules]
    what = "the schema of the tools" if demanded else "the JSON schema"
    return Source(what, json.dumps({"grammars": [{"lark_grammar": "\n".join(rules)}]}))


MOST_RULES = 1_000


class _Lark:
    """Collects the rules of a grammar in llguidance's dialect of Lark."""

    def __init__(self, controls: Controls | None) -> None:
        self._controls = controls
        self.rules: list[str] = []

    def text(self, text: str) -> str:
        """A text as an expression: what is a control token has to be one."""
        parts = []
        for found in self._controls.findall(text) if self._controls is not None else ():
            before, _, text = text.partition(found)
            parts += [json.dumps(before, ensure_ascii=False)] if before else []
            parts.append(f"<[{self._controls.tokens[found]}]>")  # type: ignore[union-attr]
        return " ".join([*parts, *([json.dumps(text, ensure_ascii=False)] if text else [])])

    def json(self, schema: Any) -> str:
        return self._rule("value", "%json " + json.dumps({**checked_schema(schema), "x-guidance": JSON_OPTIONS}))

    def until(self, end: str) -> str:
        """Any text, up to and with its end."""
        if self._controls is not None and end in self._controls.tokens:
            return f"{self._rule('text', '/(?s:.*)/')} {self.text(end)}"
        return self._rule("text", f"/(?s:.*){_escaped(end)}/", "[lazy]")

    def _rule(self, name: str, body: str, attributes: str = "") -> str:
        name = f"{name}{len(self.rules)}"
        self.rules.append(f"{name}{attributes}: {body}")
        return name


def _escaped(text: str) -> str:
    """A text as a part of an expression. Not each sign may be escaped: an escaped < is the beginning of a word."""
    return re.sub(r"[][\\/.+*?(){}|^$&~#-]", lambda found: f"\\{found[0]}", text).replace("\n", "\\n")


def _thinking(
    read: Callable[[str], ChatMessage], rendering: Mapping[str, Any], lark: _Lark, may_think: bool
) -> tuple[str, str]:
    """The expression of what may be thought before an answer, and the least that has to come before one."""
    start, ends = rendering["thinking_start"], rendering["thinking_ends"]
    if not start or not ends:
        return "", ""
    is_begun = rendering["generation_prompt"].rstrip().endswith(start)
    end = ends[0].strip()
    first = "" if is_begun else start
    for after in AFTER_THINKING if is_begun or may_think else ():
        before, behind = _content_form(read, f"{first}x{end}{after}")
        message = read(f'{first}x{end}{after}{before}{{"x": 1}}{behind}')
        if message.reasoning.strip() == "x" and message.content.strip() == '{"x": 1}':
            lark.rules.append(r"SPACES: /\s{0,4}/")
            thought = f"{lark.text(first)} {lark.until(end)} {lark.text(after)} SPACES"
            return (thought, end) if is_begun else (f"({thought})?", "")
    return "", ""


def _schema_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    schema: Mapping[str, Any] = tool["function"]["parameters"]
    return schema


def _properties(tool: Mapping[str, Any]) -> dict[str, Any]:
    properties = _schema_of(tool).get("properties")
    return dict(properties) if isinstance(properties, Mapping) else {}


def _required(tool: Mapping[str, Any]) -> set[str]:
    required = _schema_of(tool).get("required")
    return {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()


def _filled(text: str, **values: object) -> str:
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


def _call_form(read: Callable[[str], ChatMessage], tools: Sequence[Mapping[str, Any]], begun: str) -> CallForm | None:
    """The form in which the family's parser reads a call of the first tool."""
    tool = tools[0]
    name = tool["function"]["name"]
    wanted: dict[str, Any] = {}
    for key in [key for key in _properties(tool) if key in _required(tool)]:
        wanted[key] = "x" if _is_text(_properties(tool)[key]) else _example(_properties(tool)[key])
    for form in CALL_FORMS:
        if form.argument is None:
            arguments = json.dumps(wanted)
        else:
            before, after = form.argument
            arguments = "".join(
                _filled(before, key=key) + (value if isinstance(value, str) else json.dumps(value)) + after
                for key, value in wanted.items()
            )
        call = _filled(form.begin, name=name, i=0) + arguments + _filled(form.end, name=name, i=0)
        message = read(f"{begun}{form.before}{call}{form.after}")
        if len(message.tool_calls) == 1 and not message.content.strip():
            found = message.tool_calls[0]
            try:
                if found.name == name and json.loads(found.arguments) == wanted:
                    return form
            except ValueError:
                continue
    return None


def _content_form(read: Callable[[str], ChatMessage], begun: str) -> tuple[str, str]:
    """What stands round content."""
    for before, after in CONTENT_FORMS:
        message = read(f'{begun}{before}{{"x": 1}}{after}')
        if message.content.strip() == '{"x": 1}':
            return before, after
    return "", ""


def _is_text(schema: Any) -> bool:
    return isinstance(schema, Mapping) and schema.get("type") == "string"


def _example(schema: Any) -> Any:
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    examples: dict[Any, Any] = {"boolean": True, "array": [], "object": {}, "null": None}
    return examples.get(kind, 1) if isinstance(kind, str) else 1


def _calls(lark: _Lark, form: CallForm, tools: Sequence[Mapping[str, Any]], several: bool) -> str:
    """The expression of the calls of an answer."""
    calls = []
    for tool in tools:
        begin = lark.text(_filled(form.begin, name=tool["function"]["name"], i=0))
        calls.append(f"{begin} {_arguments(lark, form, tool)} {lark.text(_filled(form.end, i=0))}")
    lark.rules.append("call: " + " | ".join(calls))
    more = f" ({lark.text(form.between)} call)*" if several and "{i}" not in form.begin + form.end else ""
    return f"{lark.text(form.before)} call{more} {lark.text(form.after)}"


def _arguments(lark: _Lark, form: CallForm, tool: Mapping[str, Any]) -> str:
    if form.argument is None:
        return lark.json(_schema_of(tool))
    checked_schema(_schema_of(tool))
    before, after = form.argument
    definitions = {key: value for key, value in _schema_of(tool).items() if key in ("$defs", "definitions")}
    parts = []
    for key, schema in _properties(tool).items():
        if _is_text(schema):
            choices = schema.get("enum")
            if isinstance(choices, list) and choices and all(isinstance(each, str) and each for each in choices):
                value = "(" + " | ".join(map(lark.text, choices)) + f") {lark.text(after)}"
            else:
                value = lark.until(after)
        else:
            given = {**definitions, **schema} if isinstance(schema, Mapping) else schema
            value = f"{lark.json(given)} {lark.text(after)}"
        part = f"{lark.text(_filled(before, key=key))} {value}"
        parts.append(part if key in _required(tool) else f"({part})?")
    return " ".join(parts)
