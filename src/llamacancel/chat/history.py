"""Messages and tools as clients really send them, brought into the one form that templates are given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import ChatError

__all__ = ["as_json", "messages_of", "short_id", "systems_first", "tools_of"]

DEEPEST = 200
"""Levels of objects and arrays within each other: llama.cpp and Python's json follow them with their stacks."""


def as_json(what: str, value: Any) -> str:
    """JSON text of a value that is not too deep.

    Raises:
        ChatError: If it is too deep, or no JSON.
    """
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        level = [
            each
            for outer in level
            if isinstance(outer, (Mapping, list, tuple))
            for each in (outer.values() if isinstance(outer, Mapping) else outer)
        ]
        if not level:
            break
    else:
        raise ChatError(f"{what}: nested deeper than {DEEPEST}")
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise ChatError(f"{what}: no JSON: {error}") from None


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__}")


def messages_of(messages: Iterable[Mapping[str, Any]], *, short_ids: bool) -> list[dict[str, Any]]:
    """Messages with a role and content, as text or as parts of text.

    Content that is None or without parts is "", calls that are None are none, arguments are JSON text of an object.
    What a model wrote instead of one stays, as the value of "arguments".

    Args:
        messages: In OpenAI's form.
        short_ids: The template wants ids of nine letters and digits: others are mapped to such.

    Raises:
        ChatError: If they are none; says which, and why.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise ChatError(f"messages must be a list of messages, not {type(messages).__name__}")
    made = [_message(f"messages[{i}]", message, short_ids) for i, message in enumerate(messages)]
    if not made:
        raise ChatError("messages must not be empty")
    return made


def _message(where: str, message: object, short_ids: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ChatError(f"{where} must be an object, not {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ChatError(f"{where}.role must be a text")
    made: dict[str, Any] = {
        "role": "tool" if role == "function" else role,
        "content": _content(f"{where}.content", message.get("content")),
    }
    for name in ("name", "tool_call_id"):
        if message.get(name) is not None:
            made[name] = _text(f"{where}.{name}", message[name])
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(reasoning, str):
        made["reasoning_content"] = reasoning
    given = message.get("tool_calls")
    if given is None and message.get("function_call") is not None:
        given = [{"function": message["function_call"]}]
    if given:
        if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
            raise ChatError(f"{where}.tool_calls must be a list, not {type(given).__name__}")
        made["tool_calls"] = [_call(f"{where}.tool_calls[{i}]", call, i) for i, call in enumerate(given)]
    if short_ids:
        for holder, key in [(made, "tool_call_id"), *((call, "id") for call in made.get("tool_calls", ()))]:
            if key in holder:
                holder[key] = short_id(holder[key])
    return made


def _text(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise ChatError(f"{where} must be a text, not {type(value).__name__}")
    return value


def _content(where: str, content: object) -> str | list[dict[str, str]]:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise ChatError(f"{where} must be a text or a list of parts, not {type(content).__name__}")
    parts = [_part(f"{where}[{i}]", part) for i, part in enumerate(content)]
    return [{"type": "text", "text": part} for part in parts] or ""


def _part(where: str, part: object) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ChatError(f"{where} must be an object, not {type(part).__name__}")
    kind = part.get("type", "text")
    if kind not in ("text", "input_text", "output_text", "refusal"):
        raise ChatError(f"{where}: a part of type {str(kind)[:40]!r} is no text")
    return _text(f"{where}.text", part.get("refusal") if kind == "refusal" else part.get("text"))


def _call(where: str, call: object, index: int) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise ChatError(f"{where} must be an object, not {type(call).__name__}")
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ChatError(f"{where} has no function with a name")
    id = call.get("id")
    return {
        "id": _text(f"{where}.id", id) if id else f"call_{index}",
        "type": "function",
        "function": {
            "name": function["name"],
            "arguments": _arguments(f"{where}.function.arguments", function.get("arguments")),
        },
    }


def _arguments(where: str, arguments: object) -> str:
    if isinstance(arguments, str):
        try:
            read = json.loads(arguments) if arguments.strip() else None
        except (ValueError, RecursionError):
            read = arguments
        if isinstance(read, dict):
            as_json(where, read)
            return arguments
        arguments = read
    if arguments is None:
        return "{}"
    return as_json(where, arguments if isinstance(arguments, Mapping) else {"arguments": arguments})


def short_id(id: str) -> str:
    """An id of nine letters and digits: itself, if it is one; else always the same for the same one."""
    if len(id) == 9 and id.isascii() and id.isalnum():
        return id
    return hashlib.sha256(id.encode("utf-8", "replace")).hexdigest()[:9]


def systems_first(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The messages with all that the system says in one message at the beginning; None if it is so already."""
    systems = [message for message in messages if message["role"] in ("system", "developer")]
    if not systems or (len(systems) == 1 and messages[0] is systems[0]):
        return None

    def text(content: str | list[dict[str, str]]) -> str:
        return content if isinstance(content, str) else "\n".join(part["text"] for part in content)

    others = [message for message in messages if message["role"] not in ("system", "developer")]
    return [{"role": "system", "content": "\n\n".join(text(each["content"]) for each in systems)}, *others]


def tools_of(tools: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tools with a name, a description and a schema of parameters, in OpenAI's form.

    Raises:
        ChatError: If they are none; says which, and why.
    """
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Iterable):
        raise ChatError(f"tools must be a list of tools, not {type(tools).__name__}")
    made: dict[str, dict[str, Any]] = {}
    for i, tool in enumerate(tools):
        read = _tool(f"tools[{i}]", tool)
        name = read["function"]["name"]
        if name in made:
            raise ChatError(f"tools[{i}]: there is one of the name {name[:60]!r} before")
        made[name] = read
    return list(made.values())


def _tool(where: str, tool: object) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise ChatError(f"{where} must be an object, not {type(tool).__name__}")
    if tool.get("type", "function") != "function":
        raise ChatError(f"{where}: tools of type {str(tool['type'])[:40]!r} are not known; 'function' is")
    function = tool.get("function", tool)
    if not isinstance(function, Mapping):
        raise ChatError(f"{where}.function must be an object, not {type(function).__name__}")
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise ChatError(f"{where} has no function with a name")
    description = function.get("description")
    parameters = function.get("parameters")
    if parameters is None or parameters == {} or parameters is True:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping):
        raise ChatError(f"{where}.function.parameters must be a schema, an object, not {type(parameters).__name__}")
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": "" if description is None else _text(f"{where}.function.description", description),
            "parameters": dict(parameters),
        },
    }
