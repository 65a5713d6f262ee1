"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from ...cancel import CancelToken
from ...chat import ChatDelta, ChatPrompt, ToolCallDelta
from ...engine import LONG_TEXT, Piece, TokenInfo
from ...errors import ChatError
from ..bodies import body_of, described
from ..errors import ERRORS, GENERATION_ERRORS, ApiError
from ..service import Group, Service, TimeoutHeader
from ..sse import event, json_of
from ..threads import under_token
from . import answers
from .answer import Choice, GenerationResponse, Job
from .logprobs import chat_logprobs
from .prompts import check_room, make_samplers
from .schemas import ChatBody, JsonSchemaFormat, NamedTool

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
        form.prompt = prompt = await _prompt(group, service, body)
        count = body.n or 1
        most = body.max_completion_tokens or body.max_tokens
        check_room(service.engine, [prompt.tokens], count)
        return Job(
            prompts=[prompt.tokens],
            samplers=await make_samplers(
                group,
                service.model,
                body,
                count,
                lambda: {"grammar": body.grammar} if prompt.constraint is None else {"lark": prompt.constraint},
                _constrained_by(body),
            ),
            max_tokens=None if most == -1 else most,
            stop=(*body.stops, *prompt.stops),
            shown_tokens=prompt.shown_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            priority=body.priority or 0,
        )

    form = _ChatForm(
        request.state.request_id,
        service.model_name,
        logprobs=bool(body.logprobs),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
    )
    return GenerationResponse(service, request, prepare, form, timeout=timeout, stream=bool(body.stream))


async def _prompt(group: Group, service: Service, body: ChatBody) -> ChatPrompt:
    """The messages as a prompt. Rendering takes some milliseconds, also that of a short conversation."""
    chat, param = service.chat, _constrained_by(body)

    def make(token: CancelToken) -> ChatPrompt:
        return chat.render(
            [message.model_dump(exclude_unset=True) for message in body.messages],
            [tool.model_dump(exclude_unset=True) for tool in body.tools or ()],
            body.tool_choice.model_dump() if isinstance(body.tool_choice, NamedTool) else body.tool_choice or "auto",
            body.parallel_tool_calls is not False,
            _schema_of(body),
            template_kwargs=body.chat_template_kwargs,
            token=token,
        )

    try:
        return await under_token(group, make, size=LONG_TEXT)
    except ChatError as error:
        raise ApiError(400, str(error), param="messages", code="chat_template_error") from error
    except (ValueError, TypeError) as error:
        raise ApiError(400, str(error), param=param or "messages") from error


def _schema_of(body: ChatBody) -> dict[str, Any] | None:
    """What the content has to follow."""
    if isinstance(body.response_format, JsonSchemaFormat):
        return body.response_format.json_schema.schema_
    if body.response_format is not None and body.response_format.type == "json_object":
        return {"type": "object"}
    return None


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

    def __init__(self, request_id: str, model: str, *, logprobs: bool, include_usage: bool) -> None:
        self.include_usage = include_usage
        self.logprobs = logprobs
        self.prompt: ChatPrompt | None = None  # before the first choice
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
        assert form.prompt is not None
        self._reader = form.prompt.reader()
        self._calls = False
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

    def _delta(self, delta: ChatDelta) -> str:
        if delta.tool_calls:
            self._calls = True
            return json_of({"tool_calls": [_call_delta(call) for call in delta.tool_calls]})
        if delta.reasoning:
            return f'{{"reasoning_content":{json_of(delta.reasoning)}}}'
        return f'{{"content":{json_of(delta.content)}}}'

    def _begin(self) -> Iterable[bytes]:
        if not self._begun:
            self._begun = True
            yield self._event('{"role":"assistant","content":""}')

    def feed(self, piece: Piece) -> Iterable[bytes]:
        if not piece and not self._form.logprobs:
            return
        yield from self._begin()
        deltas = self._reader.feed(str(piece))
        logprobs = chat_logprobs(piece.tokens) if self._form.logprobs else None
        if logprobs and not deltas:
            deltas = [ChatDelta()]
        for delta in deltas:
            yield self._event(self._delta(delta), logprobs)
            logprobs = None

    def end(self, finish_reason: str) -> Iterable[bytes]:
        yield from self._begin()
        for delta in self._reader.end():
            yield self._event(self._delta(delta))
        yield self._event("{}", None, self._reason(finish_reason))

    def _reason(self, finish_reason: str) -> str:
        return "tool_calls" if self._calls and finish_reason == "stop" else finish_reason

    def whole(self, text: str, tokens: Sequence[TokenInfo], finish_reason: str) -> dict[str, Any]:
        self._reader.feed(text)
        self._reader.end()
        read = self._reader.message
        message: dict[str, Any] = {"role": "assistant", "content": read.content, "refusal": None}
        if read.reasoning:
            message["reasoning_content"] = read.reasoning
        if read.tool_calls:
            self._calls = True
            message.update(
                content=read.content.strip() or None, tool_calls=[call.as_dict() for call in read.tool_calls]
            )
        return {
            "index": self._index,
            "message": message,
            "logprobs": chat_logprobs(tokens) if self._form.logprobs else None,
            "finish_reason": self._reason(finish_reason),
        }


def _call_delta(call: ToolCallDelta) -> dict[str, Any]:
    """What became known of a call, in OpenAI's form."""
    if call.id:
        function = {"name": call.name, "arguments": call.arguments}
        return {"index": call.index, "id": call.id, "type": "function", "function": function}
    return {"index": call.index, "function": {"arguments": call.arguments}}
