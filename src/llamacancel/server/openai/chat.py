"""`POST /v1/chat/completions`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from ...cancel import CancelToken
from ...engine import Piece, TokenInfo
from ..bodies import body_of, described
from ..errors import ERRORS, GENERATION_ERRORS, ApiError
from ..service import Group, Service, TimeoutHeader
from ..sse import event, json_of
from ..threads import under_token
from . import answers
from .answer import Choice, GenerationResponse, Job
from .logprobs import chat_logprobs
from .prompts import check_room, make_samplers
from .schemas import ChatBody, JsonSchemaFormat, Message, NamedTool, TextPart
from .templates import TemplateFailed, chat_tokens
from .tools import ToolCall, ToolCallReader, tool_calls

__all__ = ["router"]

ENDPOINT = "/v1/chat/completions"

router = APIRouter(tags=["generate"])


@router.post(
    ENDPOINT,
    openapi_extra=described(ChatBody),
    response_model=answers.ChatCompletion,
    response_model_exclude_unset=True,
    responses=answers.STREAMED | ERRORS | GENERATION_ERRORS,
    summary="Answer a conversation",
)
async def create_chat_completion(
    request: Request,
    body: Annotated[ChatBody, Depends(body_of(ChatBody))],
    x_request_timeout: TimeoutHeader = None,
) -> Response:
    """Answer messages through the model's chat template. A client that hangs up cancels the answer."""
    service: Service = request.app.state.service
    timeout = service.timeout(body.timeout, x_request_timeout)

    async def prepare(group: Group) -> Job:
        prompt = await _prompt(group, service, body)
        count = body.n or 1
        most = body.max_completion_tokens or body.max_tokens
        check_room(service.engine, [prompt], count)
        return Job(
            prompts=[prompt],
            samplers=await make_samplers(
                group, service.model, body, count, lambda: _constraint(body), _constrained_by(body)
            ),
            max_tokens=None if most == -1 else most,
            stop=body.stops,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            priority=body.priority or 0,
        )

    form = _ChatForm(
        request.state.request_id,
        service.model_name,
        logprobs=bool(body.logprobs),
        tools=[tool.function.name for tool in body.tools or ()] if body.tool_choice != "none" else [],
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
    )
    return GenerationResponse(service, request, prepare, form, timeout=timeout, stream=bool(body.stream))


async def _prompt(group: Group, service: Service, body: ChatBody) -> list[int]:
    """The messages as tokens."""
    template = service.template

    def make(token: CancelToken) -> list[int]:
        messages = [_template_message(message, template.knows_developer) for message in body.messages]
        tools = [tool.model_dump(exclude_unset=True) for tool in body.tools or ()] if body.tool_choice != "none" else []
        text = template.render(messages, tools=tools or None, variables=body.chat_template_kwargs)
        return chat_tokens(service.model, text, token)

    try:
        return await under_token(group, make)
    except TemplateFailed as error:
        raise ApiError(400, str(error), param="messages", code="chat_template_error") from error
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from error


def _template_message(message: Message, knows_developer: bool) -> dict[str, Any]:
    """A message as templates expect it: content as text, a call's arguments as an object."""
    given = message.model_dump(exclude_unset=True)
    content = message.content
    if content is None or isinstance(content, str):
        given["content"] = content or ""
    else:
        given["content"] = "\n".join(part.text for part in content if isinstance(part, TextPart))
    if message.role == "developer" and not knows_developer:
        given["role"] = "system"
    for call in given.get("tool_calls") or ():
        try:
            arguments = json.loads(call["function"]["arguments"])
        except (ValueError, RecursionError):
            continue
        if isinstance(arguments, dict):
            call["function"]["arguments"] = arguments
    return given


def _constraint(body: ChatBody) -> dict[str, Any]:
    """What the answer has to follow, as arguments of its sampler. Raises ValueError, TypeError for what is none."""
    wanted = body.response_format
    if isinstance(body.tool_choice, NamedTool) or body.tool_choice == "required":
        tools = body.tools or []
        if isinstance(body.tool_choice, NamedTool):
            tools = [tool for tool in tools if tool.function.name == body.tool_choice.function.name]
        return {"lark": tool_calls(tools, several=body.parallel_tool_calls is True)}
    if isinstance(wanted, JsonSchemaFormat):
        return {"json_schema": wanted.json_schema.schema_}
    if wanted is not None and wanted.type == "json_object":
        return {"json_schema": {"type": "object"}}
    return {"grammar": body.grammar}


def _constrained_by(body: ChatBody) -> str | None:
    """The field that says what the answer has to follow."""
    formatted = body.response_format is not None and body.response_format.type != "text"
    if isinstance(body.tool_choice, NamedTool) or body.tool_choice == "required":
        if body.grammar is not None or formatted:
            raise ApiError(
                400, "tool_choice demands a call: give no grammar and no response_format", param="tool_choice"
            )
        return "tools"
    return "response_format" if formatted else "grammar" if body.grammar is not None else None


class _ChatForm:
    """Answers as OpenAI's chat completions."""

    endpoint = ENDPOINT

    def __init__(
        self, request_id: str, model: str, *, logprobs: bool, tools: Sequence[str], include_usage: bool
    ) -> None:
        self.include_usage = include_usage
        self.logprobs = logprobs
        self.tools = tools
        self.head: dict[str, Any] = {
            "id": f"chatcmpl-{request_id}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
        }
        self.chunk_head = {**self.head, "object": "chat.completion.chunk"}

    def choice(self, index: int) -> Choice:
        return _ChatChoice(self, index)

    def answer(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self.head, "choices": choices, "usage": usage}

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        return event({**self.chunk_head, "choices": [], "usage": usage})


class _ChatChoice:
    """One of the answers."""

    def __init__(self, form: _ChatForm, index: int) -> None:
        self._form, self._index = form, index
        self._reader = ToolCallReader(form.tools) if form.tools else None
        self._calls = 0
        self._begun = False
        head = json_of({**form.chunk_head, "choices": []})
        self._start = f'data: {head[:-2]}{{"index":{index},"delta":'
        self._end = "}]" + (',"usage":null' if form.include_usage else "") + "}\n\n"

    def _event(self, delta: str, logprobs: dict[str, Any] | None = None, finish_reason: str | None = None) -> bytes:
        """What `event()` would make of a delta, which is JSON; most of it is the same for each piece."""
        probs = "null" if logprobs is None else json_of(logprobs)
        reason = "null" if finish_reason is None else f'"{finish_reason}"'
        text = f'{self._start}{delta},"logprobs":{probs},"finish_reason":{reason}{self._end}'
        return text.encode("utf-8", "replace")

    def _delta(self, part: str | ToolCall) -> str:
        if isinstance(part, str):
            return f'{{"content":{json_of(part)}}}'
        self._calls += 1
        return json_of({"tool_calls": [{"index": self._calls - 1, **part.body}]})

    def _begin(self) -> Iterable[bytes]:
        if not self._begun:
            self._begun = True
            yield self._event('{"role":"assistant","content":""}')

    def feed(self, piece: Piece) -> Iterable[bytes]:
        if not piece and not self._form.logprobs:
            return
        yield from self._begin()
        parts: list[str | ToolCall] = [str(piece)] if self._reader is None else list(self._reader.feed(str(piece)))
        logprobs = chat_logprobs(piece.tokens) if self._form.logprobs else None
        if logprobs and not parts:
            parts = [""]
        for part in parts:
            yield self._event(self._delta(part), logprobs)
            logprobs = None

    def end(self, finish_reason: str) -> Iterable[bytes]:
        yield from self._begin()
        for part in self._reader.end() if self._reader else ():
            yield self._event(self._delta(part))
        yield self._event("{}", None, self._reason(finish_reason))

    def _reason(self, finish_reason: str) -> str:
        return "tool_calls" if self._calls and finish_reason == "stop" else finish_reason

    def whole(self, text: str, tokens: Sequence[TokenInfo], finish_reason: str) -> dict[str, Any]:
        parts: list[str | ToolCall] = [text]
        if self._reader is not None:
            parts = [*self._reader.feed(text), *self._reader.end()]
        calls = [part.body for part in parts if isinstance(part, ToolCall)]
        content = "".join(part for part in parts if isinstance(part, str))
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            self._calls = len(calls)
            message.update(content=content.strip() or None, tool_calls=calls)
        return {
            "index": self._index,
            "message": message,
            "logprobs": chat_logprobs(tokens) if self._form.logprobs else None,
            "finish_reason": self._reason(finish_reason),
        }
