"""`POST /v1/completions`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from ...engine import Piece, TokenInfo
from ..bodies import body_of, described
from ..errors import ERRORS, GENERATION_ERRORS
from ..service import Group, Service, TimeoutHeader
from ..sse import event, json_of
from . import answers
from .answer import Choice, GenerationResponse, Job
from .logprobs import completion_logprobs
from .prompts import check_room, make_samplers, prompt_texts, prompt_tokens
from .schemas import CompletionBody

__all__ = ["router"]

ENDPOINT = "/v1/completions"
DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for completions."""

router = APIRouter(tags=["generate"])


@router.post(
    ENDPOINT,
    openapi_extra=described(CompletionBody),
    response_model=answers.Completion,
    responses=answers.STREAMED | ERRORS | GENERATION_ERRORS,
    summary="Continue a text",
)
async def create_completion(
    request: Request,
    body: Annotated[CompletionBody, Depends(body_of(CompletionBody))],
    x_request_timeout: TimeoutHeader = None,
) -> Response:
    """Continue one or several prompts. A client that hangs up cancels them."""
    service: Service = request.app.state.service
    timeout = service.timeout(body.timeout, x_request_timeout)

    async def prepare(group: Group) -> Job:
        prompts = await prompt_tokens(group, service.model, body.prompt, "prompt")
        count = len(prompts) * (body.n or 1)
        check_room(service.engine, prompts, count)
        if body.echo:
            form.echoes = await prompt_texts(group, service.model, body.prompt)
        return Job(
            prompts=prompts,
            samplers=await make_samplers(
                group,
                service.model,
                body,
                count,
                lambda: {"grammar": body.grammar},
                None if body.grammar is None else "grammar",
            ),
            max_tokens=None if body.max_tokens == -1 else body.max_tokens or DEFAULT_MAX_TOKENS,
            stop=body.stops,
            logprobs=body.logprobs,
            priority=body.priority or 0,
        )

    form = _CompletionForm(
        request.state.request_id,
        service.model_name,
        each=body.n or 1,
        logprobs=body.logprobs is not None,
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
    )
    return GenerationResponse(service, request, prepare, form, timeout=timeout, stream=bool(body.stream))


class _CompletionForm:
    """Answers as OpenAI's completions.

    Attributes:
        echoes: Text to put in front of the answers to each prompt; none: nothing.
    """

    endpoint = ENDPOINT

    def __init__(self, request_id: str, model: str, *, each: int, logprobs: bool, include_usage: bool) -> None:
        self.include_usage = include_usage
        self.echoes: list[str] = []
        self._each = each
        self.logprobs = logprobs
        self.head: dict[str, Any] = {
            "id": f"cmpl-{request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def choice(self, index: int) -> Choice:
        return _CompletionChoice(self, index, self.echoes[index // self._each] if self.echoes else "")

    def answer(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self.head, "choices": choices, "usage": usage}

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        return event({**self.head, "choices": [], "usage": usage})


class _CompletionChoice:
    """One of the answers."""

    def __init__(self, form: _CompletionForm, index: int, echo: str) -> None:
        self._form, self._index, self._echo, self._offset = form, index, echo, 0
        self._to_echo = echo  # what a stream has not told yet
        head = json_of({**form.head, "choices": []})
        self._start = f'data: {head[:-2]}{{"index":{index},"text":'
        self._end = "}]" + (',"usage":null' if form.include_usage else "") + "}\n\n"

    def _event(self, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> bytes:
        """What `event()` would make of it; most of it is the same for each piece."""
        probs = "null" if logprobs is None else json_of(logprobs)
        reason = "null" if finish_reason is None else f'"{finish_reason}"'
        words = json_of(text)
        return f'{self._start}{words},"logprobs":{probs},"finish_reason":{reason}{self._end}'.encode("utf-8", "replace")

    def feed(self, piece: Piece) -> Iterable[bytes]:
        if not piece and not self._form.logprobs:
            return
        logprobs = completion_logprobs(piece.tokens, self._offset) if self._form.logprobs else None
        self._offset += len(piece)
        yield self._event(self._with_echo(str(piece)), logprobs, None)

    def end(self, finish_reason: str) -> Iterable[bytes]:
        yield self._event(self._with_echo(""), None, finish_reason)

    def _with_echo(self, text: str) -> str:
        echo, self._to_echo = self._to_echo, ""
        return echo + text

    def whole(self, text: str, tokens: Sequence[TokenInfo], finish_reason: str) -> dict[str, Any]:
        return {
            "index": self._index,
            "text": self._echo + text,
            "logprobs": completion_logprobs(tokens, 0) if self._form.logprobs else None,
            "finish_reason": finish_reason,
        }
