"""From a body to what the engine takes: prompts as tokens, and a sampler for each answer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import anyio.to_thread

from .._cancel import CancelToken
from .._model import Model
from .._sampler import Sampler
from ..engine import LONG_TEXT, Engine
from ..errors import DecodeCancelled
from .errors import ApiError
from .schemas import GenerationBody, Prompt
from .service import Group

__all__ = ["check_room", "in_thread_if_long", "make_samplers", "prompt_texts", "prompt_tokens", "under_token"]

_T = TypeVar("_T")


async def in_thread_if_long(size: int, work: Callable[[], _T]) -> _T:
    """Do work on text of a size, beside the event loop if it may take long: other clients' streams must not wait."""
    return work() if size < LONG_TEXT else await anyio.to_thread.run_sync(work)


async def under_token(group: Group, size: int, work: Callable[[CancelToken], _T]) -> _T:
    """Do work on text of a size as `in_thread_if_long`, under the token of a request.

    Args:
        group: The request's.
        size: Characters of the text.
        work: Takes the token.

    Raises:
        ApiError: As `Group.check`.
    """
    group.check()
    try:
        done = await in_thread_if_long(size, lambda: work(group.token))
    except DecodeCancelled:
        group.check()
        raise
    group.check()
    return done


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

    return await under_token(group, sum(len(each) for each in given if isinstance(each, str)), tokenize)


async def prompt_texts(model: Model, prompt: Prompt) -> list[str]:
    """The prompts of a body as text. Token ids give theirs, with the names of special tokens."""
    given = _each_of(prompt)

    def texts() -> list[str]:
        return [each if isinstance(each, str) else model.detokenize(each, unparse_special=True) for each in given]

    return await in_thread_if_long(sum(len(each) for each in given if not isinstance(each, str)), texts)


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
    model: Model, body: GenerationBody, count: int, grammar: str | None = None, grammar_root: str = "root"
) -> list[Sampler]:
    """Samplers for so many answers, each with a state and a seed of its own.

    What a body leaves out is as llama.cpp's own tools have it (temperature 0.8, top_k 40, top_p 0.95, min_p 0.05).

    Args:
        model: Whose vocabulary they choose from.
        body: The request.
        count: How many answers.
        grammar: GBNF that they follow, from its rule `grammar_root`.

    Raises:
        ApiError: 400, if the grammar cannot be parsed or a bias names no token.
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
    bias = _logit_bias(model, body.logit_bias or {})
    first = random.getrandbits(32) if body.seed is None else body.seed

    def make() -> list[Sampler]:
        return [
            Sampler(
                **options,
                logit_bias=bias,
                grammar=grammar,
                grammar_root=grammar_root,
                seed=(first + k) % (2**32 - 1),
                model=model,
            )
            for k in range(count)
        ]

    try:
        return await in_thread_if_long(0 if grammar is None else LONG_TEXT, make)
    except (ValueError, TypeError) as error:
        raise ApiError(400, str(error), param="grammar" if grammar is not None else None) from error


def _logit_bias(model: Model, given: dict[str, float]) -> dict[int, float]:
    bias = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and int(key) < model.n_vocab):
            raise ApiError(
                400, f"logit_bias: {key[:40]!r} is no token id (0 to {model.n_vocab - 1})", param="logit_bias"
            )
        bias[int(key)] = value
    return bias
