"""The process of the strangers: makes its bodies, says so, and sends them once it is told to.

It is a process of its own, so that they and the neighbour never wait for the same interpreter.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections import Counter
from types import TracebackType
from typing import Any

from llamacancel.conformance.wire import Exchange, ExchangeError, Target

from .attacks import ATTACKS, Attack, Facts

__all__ = ["Strangers"]


class Strangers:
    """Runs that process; a context manager, on whose entry the bodies are ready.

    Args:
        url: The server.
        attack: What they send.
        facts: What it is made to measure for.
        seconds: For how long they send.
    """

    def __init__(self, url: str, attack: Attack, facts: Facts, seconds: float) -> None:
        job = {"url": url, "attack": attack.name, "facts": vars(facts), "seconds": seconds}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(job)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Strangers:
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            self._process.kill()
            raise RuntimeError("the strangers did not start")
        return self

    def go(self) -> None:
        """Have them send."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def answers(self) -> dict[str, int]:
        """Wait for their end: how often each status was seen, "left" for those who hung up."""
        out, _ = self._process.communicate(timeout=60)
        found: dict[str, int] = json.loads(out)
        return found

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


async def _send(job: dict[str, Any], attack: Attack, body: bytes) -> Counter[str]:
    target, seen = Target.parse(job["url"]), Counter[str]()
    until = time.monotonic() + job["seconds"]

    async def one() -> None:
        exchange: Exchange | None = None
        try:
            exchange = await Exchange.open(target)
            await exchange.send("POST", target.path + attack.path, body)
            head = await exchange.head()
            async for _ in exchange.body():
                pass
            seen[str(head.status)] += 1
        except ExchangeError:
            seen["broken off"] += 1
        finally:
            if exchange is not None:
                exchange.hang_up()

    async def client() -> None:
        while (left := until - time.monotonic()) > 0:
            try:
                await asyncio.wait_for(one(), min(left, attack.leaves or left))
            except asyncio.TimeoutError:
                seen["left"] += 1

    await asyncio.gather(*(client() for _ in range(attack.clients)))
    return seen


def main() -> None:
    """Do the job that the command line has."""
    job = json.loads(sys.argv[1])
    attack = next(each for each in ATTACKS if each.name == job["attack"])
    body = json.dumps(attack.fields(Facts(**job["facts"])), ensure_ascii=False).encode()
    print("ready", flush=True)
    sys.stdin.readline()
    with contextlib.suppress(KeyboardInterrupt):
        print(json.dumps(asyncio.run(_send(job, attack, body))))


if __name__ == "__main__":
    main()
