"""From a client's hang-up to its slot being free, in each phase of a request, beside neighbours that generate."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llamacancel.conformance.wire import Exchange, ExchangeError, Target

from .ask import Answer, Asker, random_prompt

__all__ = ["PHASES", "FreedJob", "run_freed"]

PHASES = ("queue", "prefill", "first token", "streaming", "not streaming")


@dataclass(frozen=True)
class FreedJob:
    """What to measure.

    Attributes:
        url, root: The server's API, and what is above it.
        view: How its state is asked for: "llamacancel" or "llama-server".
        slots: How many it has; all but one have neighbours that generate.
        trials: Hang-ups in each phase.
        prompt_tokens: Of the one that hangs up.
        neighbour_tokens: Of a neighbour's answer.
        vocabulary, end_tokens: As for a load.
        seed: Of prompts and moments.
        patience: Seconds to wait for a slot.
    """

    url: str
    root: str
    view: str
    slots: int
    trials: int
    prompt_tokens: int
    neighbour_tokens: int
    vocabulary: tuple[int, int]
    end_tokens: Sequence[int]
    seed: int = 0
    patience: float = 60.0
    phases: Sequence[str] = PHASES


@dataclass
class _State:
    """What a server tells of itself."""

    active: int
    queued: int
    ended: dict[str, tuple[float, float | None]] = field(default_factory=dict)


@dataclass
class _Neighbour:
    """A client whose answer goes on and on."""

    task: asyncio.Task[Answer]
    hang_up: asyncio.Future[None]
    pieces: int = 0


class _Bench:
    def __init__(self, job: FreedJob) -> None:
        self.job = job
        self.asker = Asker(job.url, job.end_tokens)
        self.target = Target.parse(job.root + "/v1")
        self.rng = random.Random(f"freed {job.seed}")
        self.neighbours: list[_Neighbour] = []
        self.counter = 0
        self.epoch = time.time() - time.monotonic()

    def prompt(self, length: int) -> list[int]:
        self.counter += 1
        return random_prompt([self.job.seed, 77, self.counter], length, self.job.vocabulary)

    # -- the server's state

    async def page(self, path: str) -> bytes:
        exchange = await Exchange.open(self.target)
        try:
            await exchange.send("GET", path)
            head = await exchange.head()
            data = b"".join([part async for part in exchange.body()])
        finally:
            exchange.hang_up()
        if head.status != 200:
            raise ExchangeError(f"GET {path}: HTTP {head.status}")
        return data

    async def state(self) -> _State:
        if self.job.view == "llamacancel":
            found = json.loads(await self.page("/slots"))
            ended = {view["id"]: (view["finished_at"] - self.epoch, view["cancel_latency"]) for view in found["recent"]}
            return _State(len(found["active"]), len(found["queue"]), ended)
        slots = json.loads(await self.page("/slots"))
        deferred = re.search(r"^llamacpp:requests_deferred (\d+)", (await self.page("/metrics")).decode(), re.MULTILINE)
        return _State(sum(bool(slot["is_processing"]) for slot in slots), int(deferred[1]) if deferred else 0)

    async def until(self, active: int, queued: int) -> _State:
        """Ask until so many are active and queued.

        Raises:
            TimeoutError: That did not come about, or not before all neighbours had their answers.
        """
        deadline = time.monotonic() + self.job.patience
        while True:
            state = await self.state()
            if (state.active, state.queued) == (active, queued):
                return state
            ended = bool(self.neighbours) and all(neighbour.task.done() for neighbour in self.neighbours)
            if ended or time.monotonic() > deadline:
                when = "when all neighbours had their answers" if ended else f"after {self.job.patience:.0f} s"
                raise TimeoutError(
                    f"{state.active} active and {state.queued} queued instead of {active} and {queued} {when}"
                )
            await asyncio.sleep(0.001)

    # -- neighbours

    async def surround(self, count: int) -> None:
        """Have so many neighbours in the middle of their answers, and nobody else."""
        least = self.job.neighbour_tokens // 2
        gone = [n for n in self.neighbours if n.task.done() or n.pieces > least or len(self.neighbours) > count]
        for neighbour in gone:
            self.neighbours.remove(neighbour)
            if not neighbour.hang_up.done():
                neighbour.hang_up.set_result(None)
            await asyncio.wait([neighbour.task])
        if gone:
            await self.until(len(self.neighbours), 0)
        while len(self.neighbours) < count:
            self.neighbours.append(self.neighbour())
        deadline = time.monotonic() + self.job.patience
        while any(neighbour.pieces == 0 for neighbour in self.neighbours):
            if time.monotonic() > deadline or any(neighbour.task.done() for neighbour in self.neighbours):
                raise TimeoutError("a neighbour got no answer")
            await asyncio.sleep(0.005)
        await self.until(count, 0)

    def neighbour(self) -> _Neighbour:
        hang_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def count(answer: Answer) -> None:
            made.pieces = answer.pieces

        work = self.asker.ask(self.prompt(16), self.job.neighbour_tokens, hang_up=hang_up, on_piece=count)
        made = _Neighbour(asyncio.create_task(work), hang_up)
        return made

    # -- hang-ups

    async def usual(self) -> tuple[float, float]:
        """Seconds to the first token of the one that is to hang up, and from there to its end."""
        found = []
        for _ in range(3):
            await self.surround(self.job.slots - 1)
            answer = await self.asker.ask(self.prompt(self.job.prompt_tokens), 64)
            if answer.error or answer.first is None or answer.ended is None:
                raise ExchangeError(answer.error or "no text came")
            found.append((answer.first - answer.sent, answer.ended - answer.first))
        return sorted(found)[1]

    async def trial(self, phase: str, usual: tuple[float, float]) -> dict[str, Any] | None:
        """One hang-up; None if it came too late."""
        beside = self.job.slots if phase == "queue" else self.job.slots - 1
        await self.surround(beside)
        hang_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        known = (await self.state()).ended
        first, rest = usual
        pieces = {"first token": 1, "streaming": self.rng.randint(2, 48)}.get(phase)
        after = {
            "queue": self.rng.uniform(0.02, 0.2),
            "prefill": self.rng.uniform(0.05, 0.9) * first,
            "not streaming": self.rng.uniform(0.05, 0.9) * (first + rest),
        }.get(phase)
        task = asyncio.create_task(
            self.asker.ask(
                self.prompt(self.job.prompt_tokens),
                64,
                stream=phase != "not streaming",
                hang_up=hang_up,
                leave=None if pieces is None else lambda answer: answer.pieces >= pieces,
            )
        )
        if after is not None:
            if phase == "queue":
                await self.until(beside, 1)
            await asyncio.sleep(after)
            if phase == "prefill" and task.done():
                return None
            hang_up.set_result(None)
        answer = await task
        if answer.hung_up is None or (phase == "prefill" and answer.first is not None):
            if answer.error:
                raise ExchangeError(answer.error)
            return None
        state = await self.until(beside, 0)
        polled = time.monotonic() - answer.hung_up
        found: dict[str, Any] = {"phase": phase, "polled": polled, "exact": None, "own": None}
        if new := state.ended.keys() - known.keys():  # nobody else has ended; what it is called is not told
            ended, own = state.ended[new.pop()]
            exact = ended - answer.hung_up
            if own is None:
                return None  # it was complete before its client had gone
            if not -0.002 <= exact <= polled + 0.002:
                raise ExchangeError(f"the server's clock is not ours: {exact:.4f} s of {polled:.4f} s")
            found |= {"exact": max(exact, 0.0), "own": own}
        return found


async def run_freed(job: FreedJob) -> dict[str, Any]:
    """Hang up `trials` times in each phase.

    Returns:
        `samples`: of each hang-up its phase, `polled` (seconds until the server's own page showed the slot free),
        `exact` (seconds until the server's own record of it says that it was; None if it keeps none) and `own`
        (the server's figure from noticing to free); `too_late`, `failures`, and the `usual` times.
    """
    bench = _Bench(job)
    samples: list[dict[str, Any]] = []
    failures: list[str] = []
    too_late = 0
    try:
        usual = await bench.usual()
        for phase in job.phases:
            done = attempts = 0
            while done < job.trials and attempts < 3 * job.trials + 5:
                attempts += 1
                try:
                    sample = await bench.trial(phase, usual)
                except (ExchangeError, TimeoutError, asyncio.TimeoutError) as error:
                    failures.append(f"{phase}: {error}")
                    if len(failures) > 5:
                        raise
                    continue
                if sample is None:
                    too_late += 1
                else:
                    samples.append(sample)
                    done += 1
    except (ExchangeError, TimeoutError, asyncio.TimeoutError) as error:
        return {"samples": samples, "too_late": too_late, "failures": [*failures, f"given up: {error}"], "usual": None}
    finally:
        for neighbour in bench.neighbours:
            if not neighbour.hang_up.done():
                neighbour.hang_up.set_result(None)
        await asyncio.gather(*(neighbour.task for neighbour in bench.neighbours), return_exceptions=True)
    return {"samples": samples, "too_late": too_late, "failures": failures, "usual": usual}
