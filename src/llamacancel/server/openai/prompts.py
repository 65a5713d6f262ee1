"""From a body to what the engine takes: prompts as tokens, and a sampler for each answer."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from typing import Any

from ...cancel import CancelToken
from ...engine import LONG_TEXT, Engine
from ...llama import Model, Sampler
from ..errors import ApiError
from ..service import Group
from ..threads import under_token
from .schemas import GenerationBody, Prompt

__all__ = ["check_room", "make_samplers", "prepare_constraints", "prompt_texts", "prompt_tokens"]

MOST_BIAS = 2**16
"""Entries of `logit_bias`, times the answers that each get them all."""


async def prompt_tokens(group: Group, model: Model, prompt: Prompt, param: str) -> list[list[int]]:
    """The prompts of a body, which has them in a field `param`, as token ids.

    Text gets the special tokens that the model wants, a BOS only once, and its own special tokens are read as such.

    Raises:
        ApiError: 400, if a prompt is empty, cannot be tokenized, or has tokens that the model does not know; as
            `under_token`.
    """
    given = _each_of(prompt)

    def tokenize(token: CancelToken) -> list[list[int]]:
        return [
            _text_tokens(model, each, param, token) if isinstance(each, str) else _known(model, each, param)
            for each in given
        ]

    return await under_token(group, tokenize)


async def prompt_texts(group: Group, model: Model, prompt: Prompt) -> list[str]:
    """The prompts of a body as text. Token ids give theirs, with the names of special tokens."""
    given = _each_of(prompt)

    def texts(_: CancelToken) -> list[str]:
        return [each if isinstance(each, str) else model.detokenize(each, unparse_special=True) for each in given]

    return await under_token(group, texts)


def _each_of(prompt: Prompt) -> list[Any]:
    """The prompts of a body, each of them a text or token ids."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


def _text_tokens(model: Model, text: str, param: str, token: CancelToken) -> list[int]:
    try:
        tokens: list[int] = model.tokenize(text, add_special=True, parse_special=True, token=token).tolist()
    except ValueError as error:
        raise ApiError(400, str(error), param=param) from error
    if model.bos is not None and tokens[:2] == [model.bos, model.bos]:
        del tokens[0]
    if not tokens:
        raise ApiError(400, "the prompt is empty, and this model has no token to begin with", param=param)
    return tokens


def _known(model: Model, tokens: list[int], param: str) -> list[int]:
    highest = max(tokens)
    if highest >= model.n_vocab:
        raise ApiError(400, f"token {highest} is outside of the vocabulary (0 to {model.n_vocab - 1})", param=param)
    return tokens


def prepare_constraints(model: Model) -> None:
    """Have what llguidance needs of a model's vocabulary made now: it holds the interpreter's lock while it makes it.

    A vocabulary that it cannot use is told to whoever asks for a schema.
    """
    if model.memory_kind != "none" and not model.has_encoder:
        with contextlib.suppress(ValueError, ImportError):
            Sampler(regex="a", model=model)


def check_room(engine: Engine, prompts: Sequence[Sequence[int]], count: int) -> None:
    """Refuse prompts that do not fit into the context, and more generations than slots and queue ever have room for.

    Raises:
        ApiError: 400.
    """
    if engine.model.memory_kind == "none":
        raise ApiError(400, "this model is an encoder: it embeds text and generates none", code="model_not_supported")
    longest = max(len(prompt) for prompt in prompts)
    if longest >= engine.n_ctx:
        raise ApiError(
            400,
            f"the prompt has {longest} tokens; with an answer, {engine.n_ctx} is the most that fits",
            param="prompt",
            code="context_length_exceeded",
        )
    if count > engine.slots + engine.queue_limit:
        raise ApiError(
            400, f"{count} at once are more than slots and queue ever have room for", param="n", code="too_many"
        )


async def make_samplers(
    group: Group,
    model: Model,
    body: GenerationBody,
    count: int,
    constraint: Callable[[], dict[str, Any]],
    constrained_by: str | None,
) -> list[Sampler]:
    """Samplers for so many answers, each with a state and a seed of its own.

    What a body leaves out is as llama.cpp's own tools have it (temperature 0.8, top_k 40, top_p 0.95, min_p 0.05).

    Args:
        group: The request's.
        model: Whose vocabulary they choose from.
        body: The request.
        count: How many answers.
        constraint: Gives the arguments of a sampler that say what they follow; called beside the event loop.
        constrained_by: The field of the body that says so, if one does.

    Raises:
        ApiError: 400, if the constraint cannot be used or a bias names no token.
    """
    names = (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repeat_penalty",
        "frequency_penalty",
        "presence_penalty",
    )
    options = {name: value for name in names if (value := getattr(body, name)) is not None}
    if options.get("top_k") == -1:
        options["top_k"] = 0
    given_bias = body.logit_bias or {}
    if len(given_bias) * count > MOST_BIAS:
        raise ApiError(
            400,
            f"logit_bias: {len(given_bias)} entries for {count} answers are more than {MOST_BIAS}",
            param="logit_bias",
        )
    first = random.getrandbits(32) if body.seed in (None, -1) else body.seed

    def make(token: CancelToken) -> list[Sampler]:
        only = Sampler(
            **options,
            logit_bias=_logit_bias(model, given_bias),
            **constraint(),
            seed=first % (2**32 - 1),
            model=model,
            token=token,
        )
        return [only, *(only.clone(seed=(first + k) % (2**32 - 1)) for k in range(1, count))]

    try:
        size = LONG_TEXT if constrained_by is not None else len(given_bias) * count
        return await under_token(group, make, size=size)
    except (ValueError, TypeError) as error:
        raise ApiError(400, str(error), param=constrained_by) from error


def _logit_bias(model: Model, given: dict[str, float]) -> dict[int, float]:
    bias = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < model.n_vocab):
            raise ApiError(
                400, f"logit_bias: {key[:40]!r} is no token id (0 to {model.n_vocab - 1})", param="logit_bias"
            )
        bias[int(key)] = value
    return bias
