"""A neighbour's stream, alone and beside strangers: over HTTP from a server of ours, and from the engine alone."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import llamacancel as lc

from ..server.ask import Asker
from ..server.launch import Server, Shape, ours
from ..stats import median
from .attacks import Attack, Facts, engine_request
from .strangers import Strangers

__all__ = ["Settings", "beside_engine", "beside_server", "longest_gap"]

SLOTS = 4
NEIGHBOUR = [300, 301, 302, 303]


@dataclass(frozen=True)
class Settings:
    """What the command line asked for.

    Attributes:
        model: GGUF file.
        threads: Threads to compute with.
        seed: Seed of the orders.
        rounds: Measurements of each attack.
        seconds: How long each is, alone and beside.
        n_ctx: Tokens of a slot.
        facts: What attacks are made to measure for.
        end_tokens: Tokens that end an answer.
    """

    model: Path
    threads: int
    seed: int
    rounds: int
    seconds: float
    n_ctx: int
    facts: Facts
    end_tokens: tuple[int, ...]

    @classmethod
    def of(cls, path: Path, threads: int, seed: int, rounds: int, seconds: float, n_ctx: int) -> Settings:
        """Look into the model for its vocabulary."""
        with lc.Model.load(path) as model:
            ends = tuple(token for token in range(model.n_vocab) if model.is_eog(token))
            facts = Facts(model.n_vocab, min(n_ctx - 64, 2000, model.n_ctx_train))
        return cls(path, threads, seed, rounds, seconds, n_ctx, facts, ends)


def longest_gap(times: Sequence[float], begin: float, end: float) -> float:
    """The longest time between two of `times`, of which some part lies between `begin` and `end`.

    Raises:
        ValueError: There are none.
    """
    return max(after - before for before, after in itertools.pairwise(times) if after > begin and before < end)


Trial = Callable[[Attack], tuple[float, float, Counter[str]]]


def _rounds(settings: Settings, attacks: Sequence[Attack], where: str, trial: Trial) -> list[dict[str, Any]]:
    """Each attack in each round, in an order that is drawn anew."""
    rng = np.random.default_rng([settings.seed, len(where)])
    rows: dict[str, dict[str, Any]] = {
        attack.name: {"where": where, "attack": attack.name, "alone": [], "beside": [], "answers": Counter()}
        for attack in attacks
    }
    for number in range(settings.rounds):
        for i in rng.permutation(len(attacks)):
            row = rows[attacks[i].name]
            alone, beside, answers = trial(attacks[i])
            row["alone"].append(alone)
            row["beside"].append(beside)
            row["answers"] += answers
            text = f"{where}, round {number + 1}: {attacks[i].name}: {alone * 1e3:.0f} ms, beside {beside * 1e3:.0f} ms"
            print(text, dict(answers), file=sys.stderr, flush=True)
    return [_summed_up(row) for row in rows.values()]


def _summed_up(row: dict[str, Any]) -> dict[str, Any]:
    more = [beside - alone for alone, beside in zip(row["alone"], row["beside"], strict=True)]
    return {
        **row,
        "alone_median": median(row["alone"]),
        "beside_median": median(row["beside"]),
        "beside_worst": max(row["beside"]),
        "more_median": median(more),
        "more_worst": max(more),
    }


def beside_server(settings: Settings, attacks: Sequence[Attack]) -> list[dict[str, Any]]:
    """Over HTTP, from a server in a process of its own."""
    shape = Shape(settings.model, SLOTS, settings.n_ctx, settings.threads)
    with Server(ours(), shape) as server:
        return _rounds(settings, attacks, "server", lambda attack: asyncio.run(_at_server(settings, server, attack)))


async def _at_server(settings: Settings, server: Server, attack: Attack) -> tuple[float, float, Counter[str]]:
    asker = Asker(server.url, settings.end_tokens)
    times: list[float] = []
    begun, gone = asyncio.Event(), asyncio.get_running_loop().create_future()

    def note(_: object) -> None:
        times.append(time.monotonic())
        if len(times) >= 3:
            begun.set()

    stream = asyncio.create_task(asker.ask(NEIGHBOUR, settings.n_ctx, hang_up=gone, on_piece=note))
    with Strangers(server.url, attack, settings.facts, settings.seconds) as strangers:
        try:
            await asyncio.wait_for(begun.wait(), 60)
            alone = time.monotonic()
            await asyncio.sleep(settings.seconds)
            beside = time.monotonic()
            strangers.go()
            await asyncio.sleep(settings.seconds)
            end = time.monotonic()
            answers = await asyncio.to_thread(strangers.answers)
            while times[-1] < end and not stream.done():  # whatever holds it up is seen to its end
                await asyncio.sleep(0.01)
        finally:
            gone.set_result(None)
            answer = await stream
    if answer.error is not None:
        raise RuntimeError(f"the neighbour of {attack.name!r} was not answered: {answer.error}")
    server.check()
    return longest_gap(times, alone, beside), longest_gap(times, beside, end), Counter(answers)


def beside_engine(settings: Settings, attacks: Sequence[Attack]) -> list[dict[str, Any]]:
    """From an engine in this process, for which strangers' threads make samplers and submit."""
    params = {"slots": SLOTS, "n_ctx": SLOTS * settings.n_ctx, "n_threads": settings.threads, "queue_limit": 256}
    with lc.Model.load(settings.model) as model, lc.Engine(model, **params) as engine:
        works = [attack for attack in attacks if attack.in_engine]
        return _rounds(settings, works, "engine", lambda attack: _at_engine(settings, engine, attack))


def _at_engine(settings: Settings, engine: lc.Engine, attack: Attack) -> tuple[float, float, Counter[str]]:
    bias = dict.fromkeys(settings.end_tokens, -100.0)
    request = engine_request(attack, settings.facts)
    answers: Counter[str] = Counter()
    with engine.submit(NEIGHBOUR, sampler=lc.Sampler(temperature=0, logit_bias=bias)) as stream:
        times = [time.monotonic() for _ in zip(range(3), stream, strict=False)]
        alone = time.monotonic()
        beside = alone + settings.seconds
        end = beside + settings.seconds
        times += _times_until(stream, beside)
        clients = [
            threading.Thread(target=_stranger, args=(engine, attack, request, end, answers))
            for _ in range(attack.clients)
        ]
        for client in clients:
            client.start()
        times += _times_until(stream, end)
    for client in clients:
        client.join()
    return longest_gap(times, alone, beside), longest_gap(times, beside, end), answers


def _times_until(stream: Iterator[object], end: float) -> Iterator[float]:
    for _ in stream:
        now = time.monotonic()
        yield now
        if now >= end:
            return


def _stranger(engine: lc.Engine, attack: Attack, request: tuple[Any, ...], end: float, answers: Counter[str]) -> None:
    kind, arguments, options = request
    while (left := end - time.monotonic()) > 0:
        token = lc.CancelToken(timeout=min(left, attack.leaves or left))
        works: list[lc.Generation | lc.Embedding] = []
        try:
            if kind == "embed":
                prompt = arguments["prompt"]
                for each in prompt if isinstance(prompt[0], str) else [prompt]:
                    works.append(_embed(engine, each, token))
            else:
                given = {key: value for key, value in arguments.items() if key != "n"}
                sampler = lc.Sampler(**options, model=engine.model)
                works = [engine.submit(**given, sampler=sampler, token=token) for _ in range(arguments["n"])]
            for work in works:
                work.result()
            answers["answered"] += 1
        except lc.DecodeCancelled:
            answers["left"] += 1
        except (ValueError, lc.LlamaCancelError) as error:
            answers[type(error).__name__] += 1
        for work in works:
            work.cancel()
            work.wait()


def _embed(engine: lc.Engine, text: str | list[int], token: lc.CancelToken) -> lc.Embedding:
    """Asks again while the queue is full."""
    while True:
        with contextlib.suppress(lc.QueueFullError):
            return engine.embed(text, token=token)
        token.wait(0.01)
        token.raise_if_cancelled()
