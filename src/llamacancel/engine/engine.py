"""The engine: many requests at a time on one model, each of which can be cancelled alone."""

from __future__ import annotations

import functools
import sys
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike

from ..cancel import CancelToken
from ..chat import Chat
from ..errors import DecodeCancelled, InvalidBatchError
from ..llama import POOLING, Model, Sampler, integer, number
from .conversation import Conversation
from .desk import Desk
from .embedder import Embedder
from .generation import Embedding, EmbeddingWork, Generation, GenerationWork, Vocabulary
from .handle import Handle
from .runner import Runner, rules_of
from .scheduler import Limits, Request, Scheduler
from .thread import EngineThread
from .views import EngineSnapshot, RequestView
from .work import Registration

if TYPE_CHECKING:
    from ..llama import Context, Pooling

__all__ = ["Engine"]

H = TypeVar("H", bound=Handle[Any])

_INT32 = 2**31 - 1
_CTX_EACH = 4096  # cells for a slot if nobody says how many
LONG_TEXT = 4096
"""Characters from which on a text is turned into tokens under the request's own token, and beside an event loop."""


class Engine:
    """Runs many requests on one model: continuous batching in the slots of one context.

    Requests join and leave at every step, and the steps are kept short. Each has a token of its own, so that cancelling
    one stops that one alone, wherever it is: in the queue, in its prompt, between two tokens. What it has computed
    stays in memory as long as there is room, and a request that begins with the same tokens goes on from there.

    Safe to use from any thread. Close it, or use it in a `with` statement.

    Args:
        model: The model. It must not be closed before the engine.
        slots: Requests that run at the same time.
        queue_limit: Requests that may wait for a slot; a further one is refused with `QueueFullError`.
        n_ctx: Cells of memory of all slots. None: for each slot what the model was trained for, at most 4,096.
        kv_unified: True: all slots share one cache, so that a request may be longer than `n_ctx / slots`, and a common
            beginning is held once. False: each slot has a cache of its own, and no row looks at the cells of others,
            which with many slots is much faster. None: False for plain attention, where prefixes can be taken over
            all the same; True for the others. In a shared cache without flash attention numbers that overflow in one
            request (NaN) spoil those that run beside it: give False with `flash_attn=False`.
        n_batch: Most rows of a step, and most tokens of a text to embed.
        n_ubatch: Rows computed at a time. None: chosen from `cancel_latency`.
        n_threads, n_threads_batch: As for `Context`.
        cancel_latency: Seconds from a cancel to its slot being free to aim for, as for `Context`.
        step_seconds: What a step should take at most while requests generate: prompts are cut to fit beside them. None:
            a step takes as much as `n_batch` allows.
        stream_interval: Seconds within which those who wait for text are told of it once, while steps are shorter than
            that: telling them takes time from a fast model's steps. The first text of a request, and its end, are told
            at once. 0: with each step.
        prefix_cache: Let requests take over what others that began with the same tokens have computed.
        forced_tokens: Tokens that a constraint leaves no choice about are not sampled: several are computed in one
            step, where they are as many as slots or all slots share one cache. The text is the same, but once a
            sequence has 512 tokens two threads or more round several rows together otherwise than single ones, and
            another text may follow. Requests with `logprobs`, or with a sampler that has biases, have each token
            sampled.
        checkpoints: States of a model that cannot go back (a recurrent one, a sliding window) to keep for that, each
            as large as the state of a slot. None: as many as slots.
        aging: Seconds of waiting that are worth one level of priority.
        history: Finished requests that `snapshot()` remembers.
        pooling: How embeddings are pooled. None: as the model says, or "mean".
        context_params: Further arguments of `Context`. A `token` cancels the making of the engine, and nothing later.

    Raises:
        ContextError: If llama.cpp cannot make such a context.
        TypeError, ValueError: If an argument is none that it can be.
    """

    def __init__(
        self,
        model: Model,
        *,
        slots: int = 4,
        queue_limit: int = 64,
        n_ctx: int | None = None,
        n_batch: int = 2048,
        n_ubatch: int | None = None,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        cancel_latency: float | None = 0.02,
        step_seconds: float | None = 0.4,
        stream_interval: float = 1 / 30,
        kv_unified: bool | None = None,
        prefix_cache: bool = True,
        forced_tokens: bool = True,
        checkpoints: int | None = None,
        aging: float = 5.0,
        history: int = 256,
        pooling: Pooling | None = None,
        **context_params: Any,
    ) -> None:
        if not isinstance(model, Model):
            raise TypeError(f"model must be a Model, not {type(model).__name__}")
        self._model = model
        self._slots = integer("slots", slots, 1, 256)
        self._queue_limit = integer("queue_limit", queue_limit, 0, _INT32)
        integer("history", history, 0, _INT32)
        if checkpoints is not None:
            integer("checkpoints", checkpoints, 0, 256 - self._slots)
        if step_seconds is not None:
            number("step_seconds", step_seconds, 1e-4)
        number("stream_interval", stream_interval, 0)
        number("aging", aging, 1e-3)
        n_batch = max(integer("n_batch", n_batch, 1, _INT32), self._slots)
        longest = model.max_position_embeddings or _INT32
        if n_ctx is None:
            longest = min(longest, model.n_ctx_train)
            n_ctx = self._slots * min(longest, _CTX_EACH)
        self._generates = model.memory_kind != "none" and not model.has_encoder
        self._embeds = not (model.has_encoder and model.has_decoder)
        pooling = pooling or _pooling_of(model)
        self._ranks = pooling == "rank" or (pooling is None and _file_says(model) == str(POOLING["rank"]))
        if kv_unified is None:
            kv_unified = model.memory_kind != "attention"
        rules = rules_of(
            model,
            slots=self._slots,
            checkpoints=checkpoints if prefix_cache else 0,
            unified=kv_unified,
            swa_full=context_params.get("swa_full", False),
        )
        starting = context_params.pop("token", None)
        params = {
            "n_batch": max(n_batch, self._slots + rules.checkpoints),
            "n_threads": n_threads,
            "n_threads_batch": n_threads_batch,
            "cancel_latency": cancel_latency,
            "kv_unified": kv_unified,
            **context_params,
        }
        embed_rows = n_batch - n_batch % self._slots
        self._embed_most = min(embed_rows, model.n_ctx_train)
        make_context = functools.partial(
            _context_of, model, n_ctx=n_ctx, n_ubatch=n_ubatch, n_seq_max=self._slots + rules.checkpoints, **params
        )
        make_embedder = functools.partial(
            _context_of,
            model,
            n_seq_max=self._slots,
            embeddings=True,
            pooling=pooling,
            **{**params, "n_ctx": embed_rows, "n_batch": embed_rows, "kv_unified": True},
        )
        self._desk = desk = Desk(self._slots + self._queue_limit, self._queue_limit, history)
        embedder = Embedder(make_embedder, desk.texts, desk.box.put)
        # Where sequences have caches of their own, forced rows are computed apart from those of other slots: for that
        # they should be as many as those.
        least_forced = (self._slots if rules.by_sequence else 1) if forced_tokens else 0
        runner = Runner(make_context if self._generates else None, starting, least_forced)
        limits = Limits(
            slots=self._slots,
            queue_limit=self._queue_limit,
            n_ctx=min(runner.n_ctx, longest),
            n_batch=runner.n_batch,
            n_ubatch=runner.n_ubatch,
            step_seconds=step_seconds,
            aging=aging,
            embed_rows=embed_rows if self._embeds else 0,
            embed_sequences=self._slots,
            prefix_cache=prefix_cache,
        )
        self._n_ctx = limits.n_ctx
        scheduler = Scheduler(limits, replace(rules, cells=runner.cells))
        self._thread = EngineThread(scheduler, runner, embedder, desk, stream_interval)
        self._vocabulary = Vocabulary(model)
        self._thread.start()

    # -- requests

    def submit(
        self,
        prompt: str | ArrayLike,
        *,
        max_tokens: int | None = None,
        sampler: Sampler | None = None,
        timeout: float | None = None,
        token: CancelToken | None = None,
        priority: int = 0,
        stop: str | Iterable[str] = (),
        stop_tokens: Iterable[int] = (),
        shown_tokens: Iterable[int] = (),
        logprobs: int | None = None,
        request_id: str | None = None,
    ) -> Generation:
        """Queue a prompt to be continued.

        Args:
            prompt: Text, or token ids.
            max_tokens: Most tokens to generate; None: until the text ends or the context is full.
            sampler: Chooses the tokens; the generation gets a clone of it. None: `Sampler()`. One that is bound to no
                model is bound here, which takes its time where it has a large grammar.
                The first schema, expression or Lark grammar for a model stops all threads for about a second for each
                100,000 tokens of its vocabulary: make `Sampler(regex="a", model=model)` before, where nobody waits.
            timeout: Seconds from now for all of it: queue, prompt and generation.
            token: Cancels it, with others perhaps.
            priority: Higher goes first.
            stop: A string, or several, before which the text ends.
            stop_tokens: Tokens that end the text.
            shown_tokens: Control tokens whose names are part of the text, as `ChatPrompt.shown_tokens` has them.
            logprobs: Have each token told with its logarithmic probability and so many alternatives (0 to 20).
            request_id: A name for `cancel()`; None for a fresh one.

        Raises:
            QueueFullError: If as many wait as may.
            ClosedError: If the engine is closed.
            DecodeCancelled: If `token` was cancelled, or the time over, while a long text was turned into tokens.
            InvalidBatchError: If the prompt is empty or longer than the context.
            TypeError, ValueError: If an argument is none that it can be.
        """
        self._check_open()
        if not self._generates:
            raise ValueError(f"{self._model!r} does not generate: it is an encoder")
        own = token_of(token, timeout)
        tokens = self._tokens_of(prompt, own)
        if len(tokens) >= self._n_ctx:
            raise InvalidBatchError(f"the prompt has {len(tokens)} tokens, and the context has room for {self._n_ctx}")
        if max_tokens is not None:
            integer("max_tokens", max_tokens, 1, _INT32)
        if logprobs is not None:
            integer("logprobs", logprobs, 0, 20)
        if sampler is not None and not isinstance(sampler, Sampler):
            raise TypeError(f"sampler must be a Sampler, not {type(sampler).__name__}")
        request = Request(
            _id_of(request_id), tokens, max_tokens=max_tokens, priority=integer("priority", priority, -_INT32, _INT32)
        )
        own_sampler = sampler.clone() if sampler is not None else Sampler()
        with suppress(DecodeCancelled):  # its end is told as that of any other that is cancelled in the queue
            own_sampler.bind(self._model, own)  # here, and not at its first token on the engine's thread
        work = GenerationWork(
            request,
            CancelToken.any_of(own, self._desk.token),
            vocabulary=self._vocabulary,
            sampler=own_sampler,
            stop=_stops_of(stop),
            stop_tokens=frozenset(integer("a stop token", each, 0, _INT32) for each in stop_tokens),
            logprobs=logprobs,
            shown_tokens=frozenset(integer("a shown token", each, 0, _INT32) for each in shown_tokens),
        )
        return self._accept(Generation(work))

    def chat(
        self,
        messages: Iterable[Mapping[str, Any]],
        tools: Iterable[Mapping[str, Any]] = (),
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        json_schema: Any = None,
        reasoning: Literal["auto", "off", "none"] = "auto",
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        *,
        chat: Chat | None = None,
        sampler: Sampler | None = None,
        timeout: float | None = None,
        token: CancelToken | None = None,
        stop: str | Iterable[str] = (),
        **submit: Any,
    ) -> Conversation:
        """Queue a conversation to be answered.

        Args:
            messages, tools, tool_choice, parallel_tool_calls, json_schema, reasoning, continue_final_message,
                template_kwargs: As for `Chat.render`.
            chat: Renders it; None: the model's own.
            sampler, timeout, token, stop: As for `submit`. The time counts from now, and the token cancels the
                rendering, too.
            submit: Further arguments of `submit`.

        Raises:
            ChatError: If the model's template refuses the conversation.
            QueueFullError, ClosedError, DecodeCancelled, InvalidBatchError, TypeError, ValueError: As `submit`.
        """
        self._check_open()
        own = token_of(token, timeout)
        prompt = (chat or self._model.chat).render(
            messages,
            tools,
            tool_choice,
            parallel_tool_calls,
            json_schema,
            reasoning,
            continue_final_message,
            template_kwargs,
            token=own,
        )
        if prompt.constraint is not None:
            sampler = (Sampler() if sampler is None else sampler).constrained(prompt.constraint)
        generation = self.submit(
            prompt.tokens,
            sampler=sampler,
            token=own,
            stop=(*_stops_of(stop), *prompt.stops),
            shown_tokens=prompt.shown_tokens,
            **submit,
        )
        return Conversation(generation, prompt.reader())

    def embed(
        self,
        prompt: str | ArrayLike,
        *,
        timeout: float | None = None,
        token: CancelToken | None = None,
        priority: int = 0,
        request_id: str | None = None,
    ) -> Embedding:
        """Queue a text to be embedded. Args and Raises as for `submit`."""
        self._check_open()
        if not self._embeds:
            raise ValueError(f"{self._model!r} gives no embeddings: it is an encoder with a decoder")
        own = token_of(token, timeout)
        tokens = self._tokens_of(prompt, own)
        if len(tokens) > self._embed_most:
            raise InvalidBatchError(
                f"the text has {len(tokens)} tokens, and {self._embed_most} can be embedded at once"
            )
        request = Request(
            _id_of(request_id), tokens, kind="embedding", priority=integer("priority", priority, -_INT32, _INT32)
        )
        work = EmbeddingWork(request, CancelToken.any_of(own, self._desk.token))
        return self._accept(Embedding(work))

    def cancel(self, request_id: str, reason: str = "") -> bool:
        """Cancel an unfinished request by its id. False if there is none."""
        self._desk.check_process()
        work = self._desk.names.find(request_id)
        return work is not None and work.cancel(reason)

    def snapshot(self) -> EngineSnapshot:
        """Slots, queue and requests at this moment. From any thread, also after `close()`."""
        self._desk.check_process()
        return self._thread.snapshot()

    def add_listener(self, fn: Callable[[RequestView], object]) -> Registration:
        """Have `fn` called with a view of each request whose state has changed.

        It is called by the engine's thread, in the order of the changes. It must not block. What it raises goes to
        `sys.unraisablehook`, but for a `KeyboardInterrupt`, which the main thread gets, as with Ctrl-C.

        Returns:
            What to `remove()`.
        """
        return Registration(fn, self._thread.listeners)

    def close(self, drain: bool = True, timeout: float | None = 30.0) -> None:
        """Refuse new work at once, and stop. Idempotent; from any thread.

        Args:
            drain: Finish what was accepted first. False: end it with "shutdown".
            timeout: Seconds after which the rest ends with "shutdown", too; None for no limit.
        """
        if self._desk.is_foreign:
            return
        thread = self._thread
        if drain:
            thread.close()
            if self._desk.is_this_thread or thread.join(timeout):
                return
        thread.stop()
        if not self._desk.is_this_thread:
            thread.join(None)

    def stop(self) -> None:
        """Refuse new work, and end what was accepted with "shutdown". Waits for nothing; `close()` does."""
        if not self._desk.is_foreign:
            self._thread.stop()

    def __enter__(self) -> Engine:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(drain=error is None)

    def __del__(self) -> None:
        thread = getattr(self, "_thread", None)
        if thread is None or self._desk.is_foreign or sys.is_finalizing() or thread.stopped:
            return
        warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=1, source=self)
        thread.stop()

    def __repr__(self) -> str:
        return f"<Engine {'closed' if self.closed else 'open'}, {self._slots} slots, of {self._model!r}>"

    # -- facts

    @property
    def model(self) -> Model:
        """The model."""
        return self._model

    @property
    def closed(self) -> bool:
        """True once it takes no new work."""
        return self._desk.closing

    @property
    def failure(self) -> BaseException | None:
        """What ended it, where that was no `close()`: the loss of an RPC server, say."""
        return self._desk.failure

    @property
    def ranks(self) -> bool:
        """Whether the model ranks: what `embed()` gives then are scores, and no vector."""
        return self._ranks

    @property
    def slots(self) -> int:
        """Requests that run at the same time."""
        return self._slots

    @property
    def queue_limit(self) -> int:
        """Requests that may wait."""
        return self._queue_limit

    @property
    def n_ctx(self) -> int:
        """Most tokens of a request, prompt and answer."""
        return self._n_ctx

    # -- inside

    def _accept(self, handle: H) -> H:
        try:
            self._desk.submit(handle._work)
            return handle
        except BaseException:  # an interrupt may have come when it was accepted already
            handle._work.cancel("submit() was interrupted")
            raise

    def _tokens_of(self, prompt: str | ArrayLike, token: CancelToken) -> list[int]:
        if isinstance(prompt, str):
            tokens = self._model.tokenize(prompt, token=token if len(prompt) >= LONG_TEXT else None)
        else:
            tokens = np.asarray(prompt)
            if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
                raise TypeError(f"a prompt is text or token ids, not {tokens.dtype} of shape {tokens.shape}")
        n_vocab = self._model.n_vocab
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < n_vocab):
            raise InvalidBatchError(f"the prompt has tokens outside of the vocabulary (0 to {n_vocab - 1})")
        if not tokens.size:
            raise InvalidBatchError("the prompt is empty")
        return cast("list[int]", tokens.tolist())

    def _check_open(self) -> None:
        self._desk.check_process()
        self._desk.check_open()


def _context_of(model: Model, token: CancelToken | None, **params: Any) -> Context:
    return model.context(token=token, **params)


def token_of(above: CancelToken | None, timeout: float | None) -> CancelToken:
    """A request's own token: a deadline for all of it, and what the caller's token says."""
    return CancelToken(timeout=timeout) if above is None else CancelToken.any_of(above).child(timeout=timeout)


def _id_of(request_id: str | None) -> str:
    if request_id is None:
        return f"req-{uuid.uuid4().hex}"
    if not isinstance(request_id, str) or not request_id:
        raise TypeError(f"request_id must be text, not {request_id!r}")
    return request_id


def _stops_of(stop: str | Iterable[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for each in stops:
        if not isinstance(each, str):
            raise TypeError(f"a stop string is text, not {each!r}")
        if not each:
            raise ValueError("a stop string must not be empty")
    return stops


def _pooling_of(model: Model) -> Pooling | None:
    """None if the model's file says how to pool, else "mean"."""
    return "mean" if _file_says(model) is None else None


def _file_says(model: Model) -> str | None:
    """The number of the way to pool that a model's file has, if it has one."""
    return model.metadata.get(f"{model.metadata.get('general.architecture', '')}.pooling_type")
