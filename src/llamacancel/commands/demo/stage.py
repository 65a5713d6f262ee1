"""An engine behind a server, its clients, and what each request gives alone."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import Engine, Model, Sampler
from ...conformance.lanes import Lane
from ...engine import RequestView
from .client import Client
from .decode import TEXT
from .serve import serving

__all__ = ["ANSWER", "ATTEMPTS", "PROMPT", "Answer", "NotSo", "Stage", "lanes_of"]

ANSWER = 48
"""Tokens of an answer."""
PROMPT = 64
"""Tokens of a short prompt."""
ATTEMPTS = 5
"""How often a play is played until the client hangs up at the right moment."""
MARGIN = 0.06
"""How much likelier each token of an answer has to be than the next one, as a difference of logarithms. Rows that are
computed beside others differ in their last bits, which would decide between tokens that are nearly as likely."""
CANDIDATES = 12
PATIENCE = 600.0


class NotSo(Exception):
    """Something did not come as it had to."""


@dataclass(frozen=True)
class Answer:
    """What a request gives alone: its body, and the text that has to come of it in company, too."""

    body: dict[str, Any]
    text: str
    n_tokens: int


class Stage:
    """Opens servers of a model, and keeps the prompts.

    Args:
        model: The model.
        n_tokens: Length of a long prompt.
        threads: For the engine; None for what it takes by itself.

    Attributes:
        n_long: Length of a long prompt, as the model allows.
        most: Length of the longest.
    """

    def __init__(self, model: Model, n_tokens: int, threads: int | None) -> None:
        self._model = model
        self._threads = threads
        self._tokens = model.tokenize(TEXT)
        self._bias = {token: -100.0 for token in range(model.n_vocab) if model.is_eog(token)}
        self._sampler = Sampler(temperature=0, logit_bias=self._bias)
        self.n_long = max(min(n_tokens, model.n_ctx_train - 2 * ANSWER), 4 * PROMPT)
        self.most = max(min(self.n_long << (ATTEMPTS - 1), model.n_ctx_train - 2 * ANSWER), self.n_long)
        self._count = 0

    @contextlib.contextmanager
    def open(self, slots: int) -> Iterator[None]:
        """Within, there is a server with so many slots."""
        n_ctx = self.most + 8 * (4 * PROMPT + ANSWER)
        engine = Engine(
            self._model, slots=slots, n_ctx=n_ctx, n_threads=self._threads, kv_unified=True, prefix_cache=False
        )
        with engine, serving(engine) as url:
            self._engine, self._url = engine, url
            yield

    def body(self, n_prompt: int, shift: int, max_tokens: int = ANSWER) -> dict[str, Any]:
        """A completion of so many tokens of text, which begins so far into it: always the same answer."""
        prompt = np.resize(np.roll(self._tokens, -shift), n_prompt).tolist()
        bias = {str(token): value for token, value in self._bias.items()}
        return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "logit_bias": bias}

    def alone(self, shift: int) -> Answer:
        """A request that is answered while there is no other, and that has the same answer in company.

        It is the first of some on whose way no two tokens are nearly as likely as each other, or the longest such way.
        """
        best: tuple[dict[str, Any], dict[str, Any]] = {}, {}
        longest, text = -1, ""
        for candidate in range(CANDIDATES):
            body = self.body(PROMPT, shift + 13 * candidate)
            submit = {"prompt": body["prompt"], "sampler": self._sampler, "logprobs": 8}
            result = self._engine.submit(**submit, max_tokens=ANSWER).result()
            clear = [self._is_clear(token.top) for token in result.tokens]
            steady = (*clear, False).index(False)
            if steady > longest:
                best, longest, text = (body, submit), steady, result.text
            if steady == ANSWER:
                break
        body, submit = best
        n_tokens = max(longest, 1)
        if n_tokens < ANSWER:
            text = self._engine.submit(**submit, max_tokens=n_tokens).result().text
        return Answer({**body, "max_tokens": n_tokens}, text, n_tokens)

    def _is_clear(self, top: tuple[tuple[int, bytes, float], ...]) -> bool:
        likely = [logprob for token, _, logprob in top if token not in self._bias]
        return len(likely) > 1 and likely[0] - likely[1] >= MARGIN

    # -- clients

    def ask(self, name: str, body: dict[str, Any]) -> Client:
        """Let a client come. Within an event loop."""
        self._count += 1
        return Client(name, self._url, f"{name}-{self._count}", body)

    def view(self, client: Client) -> RequestView | None:
        """What the engine knows of a client's request; None before it has come there."""
        now = self._engine.snapshot()
        every = (*now.queue, *now.active, *reversed(now.recent))
        return next((view for view in every if view.id == client.request_id), None)

    async def until(self, fact: Callable[[RequestView], bool], client: Client, *others: Client) -> None:
        """Wait until a fact holds of a client's request, or the request has ended.

        Raises:
            NotSo: It never came to that.
        """
        end = time.monotonic() + PATIENCE
        while True:
            view = self.view(client)
            if view is not None and (view.state == "finished" or fact(view)):
                return
            for each in (client, *others):
                each.raise_if_failed()
            if time.monotonic() > end:
                raise NotSo(f"the request of {client.name} got nowhere within {PATIENCE:.0f} s")
            await asyncio.sleep(0.002)

    async def ended(self, client: Client) -> RequestView:
        """Wait until a request has ended."""
        await self.until(lambda view: False, client)
        view = self.view(client)
        assert view is not None
        return view


def lanes_of(cast: list[tuple[Client, RequestView]]) -> list[Lane]:
    """What became of clients, in seconds since the first of them came."""
    start = min(client.sent_at for client, _ in cast)
    return [_lane_of(client, view, start) for client, view in cast]


def _lane_of(client: Client, view: RequestView, start: float) -> Lane:
    assert view.finished_at is not None
    gone = min(client.hung_up_at or view.finished_at, view.finished_at)
    ends = [view.submitted_at, view.started_at or gone, view.first_token_at or gone, gone]
    spans = [
        (kind, begin - start, end - start)
        for kind, begin, end in zip(("queued", "prefill", "streaming"), ends, ends[1:], strict=False)
        if end > begin
    ]
    if view.finished_at > gone:
        spans.append(("rest", gone - start, view.finished_at - start))
    marks = [("answered", view.finished_at - start, "")]
    if client.hung_up_at is not None:
        marks = [("hang-up", client.hung_up_at - start, "")]
    return Lane(client.name, spans, marks)
