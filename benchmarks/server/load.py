"""The clients of a load: each sends one request after another until there are none left."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llamacancel.conformance.prompts import of_words

from .ask import Answer, Asker, random_prompt

__all__ = ["LoadJob", "run_load"]


@dataclass(frozen=True)
class LoadJob:
    """A load.

    Attributes:
        url: The server.
        clients: How many at once.
        requests: Of each: the seed of its prompt, and the second after its sending at which its client hangs up (or
            None).
        prompt_tokens, answer_tokens: Lengths.
        vocabulary: Range of token ids.
        end_tokens: Tokens that end an answer.
        patience: Seconds after which it is given up.
        words: Prompts are text of so many words, for servers that take no tokens; None for tokens.
    """

    url: str
    clients: int
    requests: Sequence[tuple[Sequence[int], float | None]]
    prompt_tokens: int
    answer_tokens: int
    vocabulary: tuple[int, int]
    end_tokens: Sequence[int]
    patience: float = 300.0
    words: int | None = None


async def run_load(job: LoadJob) -> dict[str, Any]:
    """Send all requests.

    Returns:
        `seconds` from the first sending to the last end, and `answers`: what each client saw, in the order of
        `requests`.
    """
    asker = Asker(job.url, job.end_tokens)
    prompts: list[list[int] | str] = [
        of_words(job.words, str(seed)) if job.words else random_prompt(seed, job.prompt_tokens, job.vocabulary)
        for seed, _ in job.requests
    ]
    answers: list[Answer | None] = [None] * len(prompts)
    waiting = deque(range(len(prompts)))
    loop = asyncio.get_running_loop()

    async def client() -> None:
        while waiting:
            i = waiting.popleft()
            hang_up: asyncio.Future[None] = loop.create_future()
            after = job.requests[i][1]
            timer = None if after is None else loop.call_later(after, hang_up.set_result, None)
            answers[i] = await asker.ask(prompts[i], job.answer_tokens, hang_up=hang_up)
            if timer is not None:
                timer.cancel()

    begin = time.monotonic()
    clients = [asyncio.create_task(client()) for _ in range(job.clients)]
    _, late = await asyncio.wait(clients, timeout=job.patience)
    seconds = time.monotonic() - begin
    for task in late:
        task.cancel()
    await asyncio.gather(*clients, return_exceptions=bool(late))
    lost = Answer(begin, error=f"not answered in {job.patience:.0f} s")
    return {"seconds": seconds, "answers": [(answer or lost).asdict() for answer in answers]}
