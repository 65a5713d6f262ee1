"""The bodies of requests and answers, for the checks and for the description of the API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from ..bodies import Body, TokenId

__all__ = [
    "Cancelled",
    "DetokenizeBody",
    "Detokenized",
    "Health",
    "ModelInfo",
    "ModelList",
    "Snapshot",
    "TokenizeBody",
    "Tokenized",
]


class TokenizeBody(Body):
    """Body of `POST /tokenize`."""

    content: str
    add_special: bool = Field(False, description="Add the tokens that the model wants at the beginning and end.")
    parse_special: bool = Field(True, description='Read "<|im_end|>" and the like as tokens, not as text.')
    with_pieces: bool = Field(False, description="Also tell each token's text.")


class DetokenizeBody(Body):
    """Body of `POST /detokenize`."""

    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


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
