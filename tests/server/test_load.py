"""Five hundred requests, a third of which their clients give up at a random moment: nobody else notices."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import pytest

from .served import PATIENCE, Served, serving, steady, text_of

PATH = "/v1/completions"
REQUESTS = 500
CLIENTS = 12
MODELS = ["llama", "hybrid"]
MiB = 2**20


@dataclass
class Known:
    """A request, with the text that it has alone."""

    body: dict[str, Any]
    text: str


def known_requests(served: Served) -> list[Known]:
    """Short and long prompts and answers. Each is asked for often, so that prefixes are taken over all the time."""
    bodies = [
        steady(served, n, seed, max_tokens)
        for seed, (n, max_tokens) in enumerate(itertools.product((3, 20, 70, 300), (2, 8, 16, 30)))
    ]
    return [Known(body, text_of(served.post(PATH, body))) for body in bodies]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", MODELS)
def test_survivors_get_what_they_would_get_alone(exact_model: Callable[[str], Any], arch: str) -> None:
    with serving(exact_model(arch), slots=4, queue_limit=CLIENTS) as served:
        requests = known_requests(served)
        process = psutil.Process()
        load = Load(served, requests, seed=2026)
        asyncio.run(load.run(REQUESTS // 5))
        served.wait_idle()
        gc.collect()
        before = process.memory_info().rss
        asyncio.run(load.run(REQUESTS - REQUESTS // 5))
        served.wait_idle()
        gc.collect()
        grown = process.memory_info().rss - before

        assert load.wrong == []
        assert sum(load.ends.values()) == REQUESTS
        assert load.ends["answered"] >= REQUESTS // 2
        assert load.ends["gave up"] >= REQUESTS // 5, load.ends
        now = served.engine.snapshot()
        assert {slot.state for slot in now.slots} == {"idle"}
        assert (now.queue, now.active, served.service.groups) == ((), (), {})
        assert not served.server.server_state.tasks
        assert grown < 64 * MiB
        # And afterwards each request still gives what it gives.
        for known in requests[::3]:
            assert text_of(served.post(PATH, known.body)) == known.text


class Load:
    """Clients that ask, and give up now and then.

    Attributes:
        ends: How many requests ended how.
        wrong: What should not have been.
    """

    def __init__(self, served: Served, requests: list[Known], seed: int) -> None:
        self._served = served
        self._requests = requests
        self._random = random.Random(seed)
        self.ends: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def run(self, count: int) -> None:
        jobs = iter([(self._random.choice(self._requests), self._plan()) for _ in range(count)])
        async with httpx.AsyncClient(base_url=self._served.url, timeout=PATIENCE) as client:
            await asyncio.gather(*(self._client(client, jobs) for _ in range(CLIENTS)))

    def _plan(self) -> tuple[bool, str, int]:
        """Whether it streams, how it is given up ("" for not at all), and after how many events or moments."""
        way = self._random.choice(["leave", "leave", "delete"]) if self._random.random() < 1 / 3 else ""
        return self._random.random() < 0.6, way, self._random.choice([0, 0, 1, 2, 3, 5, 8, 13])

    async def _client(self, client: httpx.AsyncClient, jobs: Any) -> None:
        for known, (streamed, way, moment) in jobs:
            ask = self._stream if streamed else self._whole
            end, text, finish_reason = await ask(client, known, way, moment)
            self.ends[end] += 1
            if end == "answered" and (text, finish_reason) != (known.text, "length"):
                self.wrong.append(f"{text!r} ({finish_reason}) is not {known.text!r}")
            elif not known.text.startswith(text):
                self.wrong.append(f"{text!r} is no beginning of {known.text!r}")

    async def _stream(self, client: httpx.AsyncClient, known: Known, way: str, moment: int) -> tuple[str, str, str]:
        """Ask for a stream, and give it up after some events."""
        lines: list[str] = []
        async with client.stream("POST", PATH, json={**known.body, "stream": True}) as answer:
            assert answer.status_code == 200, await answer.aread()
            if way and moment == 0:
                await self._give_up(client, answer.headers["x-request-id"], way)
                if way == "leave":
                    return "gave up", "", ""
            async for line in answer.aiter_lines():
                lines.append(line)
                if way and len(lines) == 2 * moment:
                    await self._give_up(client, answer.headers["x-request-id"], way)
                    if way == "leave":
                        return "gave up", _text(lines), ""
        assert lines[-2:] == ["data: [DONE]", ""]
        reason = json.loads(lines[-4][6:])["choices"][0]["finish_reason"]
        return ("gave up" if reason == "cancelled" and way else "answered"), _text(lines[:-2]), reason

    async def _whole(self, client: httpx.AsyncClient, known: Known, way: str, moment: int) -> tuple[str, str, str]:
        """Ask for a whole answer, and give it up some time later."""
        name = f"load-{next(_names)}"
        asking = asyncio.create_task(client.post(PATH, json=known.body, headers={"X-Request-Id": name}))
        if way:
            await asyncio.sleep(0.002 * moment)
            if way == "delete":
                await self._give_up(client, name, way)
            else:
                asking.cancel()
        try:
            answer = await asking
        except asyncio.CancelledError:
            return "gave up", "", ""
        if answer.status_code == 499 and way == "delete":
            return "gave up", "", ""
        choice = answer.json()["choices"][0]
        return "answered", choice["text"], choice["finish_reason"]

    async def _give_up(self, client: httpx.AsyncClient, name: str, way: str) -> None:
        if way == "delete":
            gone = await client.delete(f"/v1/requests/{name}")
            assert gone.status_code in (200, 404)  # not begun, or ended just now


_names = itertools.count()


def _text(lines: list[str]) -> str:
    """The text of a stream's lines."""
    return "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith("data: {"))
