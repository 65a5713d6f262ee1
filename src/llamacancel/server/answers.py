"""The bodies of answers, for the description of the API."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

__all__ = [
    "ERRORS",
    "GENERATION_ERRORS",
    "STREAMED",
    "TOKEN_ERRORS",
    "Cancelled",
    "ChatCompletion",
    "Completion",
    "Detokenized",
    "EmbeddingList",
    "Health",
    "ModelInfo",
    "ModelList",
    "Snapshot",
    "Tokenized",
]

FinishReason = Literal["stop", "length", "tool_calls", "cancelled", "deadline", "shutdown", "error"]


class Error(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error."""

    error: Error


class CachedTokens(BaseModel):
    """Part of the prompt that a slot still held."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class CompletionLogprobs(BaseModel):
    """Log probabilities, parallel lists."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(BaseModel):
    """Answer of `POST /v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(BaseModel):
    """A token that was likely."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log probabilities."""

    content: list[ChatLogprob]
    refusal: None


class CalledFunction(BaseModel):
    """A function with its arguments as JSON text."""

    name: str
    arguments: str


class CalledTool(BaseModel):
    """A tool call."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[CalledTool] | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """Answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class EmbeddingItem(BaseModel):
    """The vector of one input; base64 of little-endian float32 if that was asked for."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """Answer of `POST /v1/embeddings`."""

    object: Literal["list"]
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage


class ModelInfo(BaseModel):
    """The loaded model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    meta: dict[str, Any]


class ModelList(BaseModel):
    """Answer of `GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelInfo]


class Tokenized(BaseModel):
    """Answer of `POST /tokenize`."""

    tokens: list[int]
    pieces: list[str] | None = None


class Detokenized(BaseModel):
    """Answer of `POST /detokenize`."""

    content: str


class Health(BaseModel):
    """Answer of `GET /health`."""

    status: Literal["ok", "failed", "shutting down"]
    model: str
    error: str | None = Field(None, description="What the engine failed of.")


class Cancelled(BaseModel):
    """Answer of `DELETE /v1/requests/{id}`: the slots are free now."""

    id: str
    cancelled: Literal[True]
    cancel_latency: float | None


class SlotInfo(BaseModel):
    """A slot."""

    id: int
    state: Literal["idle", "prefill", "decode"]
    request_id: str | None
    n_past: int


class RequestInfo(BaseModel):
    """A request of the engine; times are Unix seconds. `id` is a name for all to see; `yours`: you may cancel it."""

    id: str
    kind: Literal["generation", "embedding"]
    state: Literal["queued", "prefill", "decode", "finished"]
    waits_for_memory: bool
    priority: int
    slot: int | None
    prompt_tokens: int
    prompt_done: int
    cached_tokens: int
    completion_tokens: int
    submitted_at: float
    started_at: float | None
    first_token_at: float | None
    finished_at: float | None
    finish_reason: str | None
    cause: str | None
    reason: str | None
    cancel_latency: float | None
    yours: bool


class Snapshot(BaseModel):
    """Answer of `GET /slots`."""

    now: float
    model: str
    complete: bool
    slots: list[SlotInfo]
    queue: list[RequestInfo]
    active: list[RequestInfo]
    recent: list[RequestInfo]
    steps: int
    queue_limit: int
    closing: bool
    cells_used: int | None
    cells: int | None
    schedule_seconds: float
    run_seconds: float
    commit_seconds: float
    decode_seconds: float


_Responses = dict[int | str, dict[str, Any]]


def _errors(words: dict[int, str]) -> _Responses:
    return {status: {"model": ErrorBody, "description": text} for status, text in words.items()}


ERRORS = _errors(
    {
        400: "Something is wrong with the request.",
        401: "The API key is missing or wrong.",
        413: "The body is too long.",
        500: "The server failed.",
    }
)
GENERATION_ERRORS = _errors(
    {
        408: "The request's time was over.",
        409: "A request with this id is not finished yet.",
        429: "The queue is full; Retry-After says when to try again.",
        499: "The request was cancelled.",
        503: "The server is shutting down.",
    }
)
TOKEN_ERRORS: _Responses = {status: GENERATION_ERRORS[status] for status in (408, 409, 499)}
STREAMED: _Responses = {
    200: {
        "description": "The answer; with `stream`, as events that end with `data: [DONE]`.",
        "content": {"text/event-stream": {}},
    }
}
