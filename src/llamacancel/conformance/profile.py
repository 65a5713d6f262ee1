"""What a server is like: how it is spoken to, how fast it is, how long its prompts may be, how many slots it has."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from .api import Api, Request
from .call import Call
from .prompts import asking_for_much
from .settings import Settings
from .wire import Exchange, ExchangeError, Target

__all__ = ["Profile", "ServerUnreachable", "get", "measure", "measure_again"]

# Fields that make answers repeatable and long. Not every server takes every one.
_OPTIONS: dict[str, Any] = {
    "temperature": 0,
    "seed": 1,
    "stream_options": {"include_usage": True},
    "ignore_eos": True,
    "cache_prompt": False,
}
_SHORT_WORDS = 12
_MOST_SLOTS = 32
_MOST_WORDS = 100_000
# Leaves room for the answer, and for neighbours where slots share one context.
_SHARE_OF_LIMIT = 0.6


class ServerUnreachable(Exception):
    """There is no server, or none that answers a completion."""


@dataclass(frozen=True)
class Profile:
    """What was measured, on a server that did nothing else.

    Args:
        api: How it is spoken to.
        short_words: Length of a short prompt, in words.
        short_ttft: Time to first token of one, in seconds.
        long_words: Length of a long prompt.
        long_ttft: Time to first token of one.
        word_limit: The longest prompt that was seen to be taken; None if no limit was met.
        seconds_per_token: Of a generation.
        slots: How many requests are worked on at once; None for more than could be told.
        slots_known_by: Where that number comes from.
        hints: What the server said of itself.
    """

    api: Api
    short_words: int
    short_ttft: float
    long_words: int
    long_ttft: float
    word_limit: int | None
    seconds_per_token: float
    slots: int | None
    slots_known_by: str
    hints: dict[str, Any]

    @property
    def words_per_second(self) -> float:
        return self.long_words / self.long_ttft

    def tokens_in(self, seconds: float) -> int:
        """How many tokens are generated in that time; at least eight."""
        return max(8, round(seconds / self.seconds_per_token))

    def describe(self) -> dict[str, Any]:
        """What a report says of it."""
        return {
            "model": self.api.model,
            "endpoint": self.api.path,
            "options": self.api.options,
            "prompt words per second": round(self.words_per_second, 1),
            "tokens per second": round(1 / self.seconds_per_token, 1),
            "long prompt (words)": self.long_words,
            "long prompt's prefill (s)": round(self.long_ttft, 3),
            "longest prompt taken (words)": self.word_limit,
            "slots": self.slots,
            "slots known by": self.slots_known_by,
            "server": self.hints.get("server"),
        }


async def get(target: Target, path: str, headers: dict[str, str], timeout: float, method: str = "GET") -> Any:
    """Ask for something small and return (status, headers, JSON or None).

    Raises:
        ExchangeError: There was no answer.
    """

    async def ask() -> Any:
        exchange = await Exchange.open(target)
        try:
            await exchange.send(method, path, headers=headers)
            head = await exchange.head()
            data = b"".join([part async for part in exchange.body()])
        finally:
            exchange.hang_up()
        try:
            return head.status, head.headers, json.loads(data)
        except ValueError:
            return head.status, head.headers, None

    try:
        return await asyncio.wait_for(ask(), timeout)
    except asyncio.TimeoutError:
        raise ExchangeError(f"{method} {path} was not answered in {timeout:g} s") from None


class _Probe:
    """Asks a server one thing after another until its profile is known."""

    def __init__(self, api: Api, settings: Settings, say: Callable[[str], None], seed: str = "") -> None:
        self.api = api
        self.settings = settings
        self.say = say
        self._seed = f"{settings.seed} profile {seed}"
        self._seeds = itertools.count()

    async def ask(self, words: int, tokens: int, *, stream: bool = True) -> Call:
        """Send one fresh request and see it through."""
        prompt = asking_for_much(words, f"{self._seed} {next(self._seeds)}")
        call = Call(self.api, Request(prompt, tokens, stream))
        await call.until_end(self.settings.longest)
        await call.close()
        return call

    async def find_api(self) -> None:
        """Find the endpoint and the options that the server takes."""
        tried = []
        for chat in (False, True) if self.settings.endpoint == "auto" else (self.settings.endpoint == "chat",):
            options = dict(_OPTIONS)
            while True:
                self.api = replace(self.api, chat=chat, options=options)
                call = await self.ask(8, 4)
                if call.answered:
                    return
                tried.append(f"{self.api.path}: {call.error or 'no answer'}")
                if call.status is None:
                    raise ServerUnreachable(tried[-1])
                if call.status not in (400, 422) or not options:
                    break
                options.popitem()
        raise ServerUnreachable("; ".join(tried))

    async def find_prefill(self) -> tuple[int, float, int | None]:
        """Find a prompt whose prefill takes about the wanted time: (words, seconds, longest taken)."""
        wanted = self.settings.prefill
        good, seconds, words = 0, 0.0, 64
        refused: int | None = None
        while refused is None and seconds < 0.7 * wanted and good < _MOST_WORDS:
            took = await self.time_prefill(words)
            if took is None:
                refused = words
            else:
                good, seconds = words, took
                words = int(words * min(max(wanted / seconds, 1.2), 2))
        while refused is not None and refused - good > max(good // 8, 8):
            words = (good + refused) // 2
            took = await self.time_prefill(words)
            if took is None:
                refused = words
            else:
                good, seconds = words, took
        if not good:
            raise ServerUnreachable(f"not even a prompt of {refused} words is taken")
        limit = None if refused is None else good
        words = int(good * min(wanted / seconds, 1.0))
        if limit is not None:
            words = min(words, int(_SHARE_OF_LIMIT * limit))
        times = [took for took in [await self.time_prefill(words) for _ in range(2)] if took is not None]
        if not times:
            raise ServerUnreachable(f"a prompt of {words} words was taken once and then refused")
        return words, min(times), limit

    async def time_prefill(self, words: int) -> float | None:
        """Return the time to first token of a fresh prompt; None if the server refuses its length."""
        call = await self.ask(words, 1)
        if not call.answered and call.status is None:
            raise ServerUnreachable(f"a prompt of {words} words: {call.error or 'no answer'}")
        return (call.time_to_first_token or call.seconds) if call.answered else None

    async def find_generation(self, word_limit: int | None) -> float:
        """Measure the time for a generated token."""
        tokens, seconds = 16, 0.0
        while True:
            call = await self.ask(_SHORT_WORDS, tokens)
            if not call.answered or len(call.pieces) < 2:
                if seconds:
                    return seconds
                raise ServerUnreachable(f"no stream of {tokens} tokens: {call.error or 'it has no two pieces'}")
            span = call.pieces[-1] - call.pieces[0]
            seconds = max(span / max(call.n_tokens - 1, 1), 1e-5)
            full = call.n_tokens >= 0.8 * tokens
            if span > 0.2 * self.settings.prefill or not full or (word_limit and 4 * tokens > word_limit):
                return seconds
            tokens *= 2

    async def find_slots(self, seconds_per_token: float, hint: int | None) -> tuple[int | None, str]:
        """Find how many requests are worked on at once: those that had a token before any had its end."""
        if self.settings.slots is not None:
            return self.settings.slots, "--slots"
        tokens = max(16, round(0.3 * self.settings.prefill / seconds_per_token))
        at_once = max(4, (hint or 0) + 1)
        while True:
            active = 0
            for _ in range(2):
                active = max(active, await self.count_active(at_once, tokens))
            if active < at_once:
                return max(active, 1), f"{at_once} requests at once"
            if at_once >= _MOST_SLOTS:
                return None, f"{at_once} requests at once were all active"
            at_once = min(2 * at_once, _MOST_SLOTS)

    async def count_active(self, at_once: int, tokens: int) -> int:
        calls = [
            Call(
                self.api,
                Request(asking_for_much(_SHORT_WORDS, f"{self._seed} slot {next(self._seeds)}"), tokens),
            )
            for _ in range(at_once)
        ]
        for call in calls:
            await call.until_end(self.settings.longest)
        for call in calls:
            await call.close()
        return overlapping(calls)

    async def hints(self) -> tuple[dict[str, Any], int | None]:
        """What the server says of itself, to know where to begin."""
        headers = self.api.headers()
        found: dict[str, Any] = {}
        slots: int | None = None
        for path in ("/props", "/slots"):
            with suppress(ExchangeError):
                status, answer_headers, body = await get(
                    self.api.target, self.api.target.root + path, headers, self.settings.grace
                )
                found["server"] = answer_headers.get("server", found.get("server"))
                if status == 200 and isinstance(body, dict) and isinstance(body.get("total_slots"), int):
                    slots = body["total_slots"]
                if status == 200 and isinstance(body, list):
                    slots = len(body)
        found["slots"] = slots
        return found, slots


def overlapping(calls: list[Call]) -> int:
    """Count the streams that had their first token before any of them had its end."""
    ends = [call.ended for call in calls if call.answered and call.ended is not None]
    first_end = min(ends, default=None)
    return sum(
        1
        for call in calls
        if first_end is not None and call.answered and call.first_token is not None and call.first_token < first_end
    )


async def model_name(target: Target, headers: dict[str, str], timeout: float) -> str:
    """Return the first model that the server lists, or "default"."""
    status, _, body = await get(target, target.path + "/models", headers, timeout)
    if status == 200 and isinstance(body, dict) and isinstance(body.get("data"), list):
        for entry in body["data"]:
            if isinstance(entry, dict) and isinstance(entry.get("id"), str):
                return str(entry["id"])
    return "default"


async def measure(settings: Settings, say: Callable[[str], None]) -> Profile:
    """Learn what a server is like.

    Args:
        settings: What was asked for.
        say: Takes lines about the progress.

    Raises:
        ServerUnreachable: It cannot be reached, or gives no completions.
    """
    api = Api(settings.target, settings.model or "", key=settings.key)
    try:
        name = settings.model or await model_name(settings.target, api.headers(), settings.grace)
    except ExchangeError as error:
        raise ServerUnreachable(str(error)) from error
    probe = _Probe(replace(api, model=name), settings, say)
    await probe.find_api()
    say(f"{probe.api.path} with {', '.join(probe.api.options) or 'no options'}")
    hints, hinted_slots = await probe.hints()
    words, seconds, limit = await probe.find_prefill()
    say(f"a prompt of {words} words takes {seconds:.3f} s" + (f"; {limit} words fit" if limit else ""))
    per_token = await probe.find_generation(limit)
    say(f"{1 / per_token:.1f} tokens/s")
    short = [await probe.ask(_SHORT_WORDS, 2) for _ in range(3)]
    times = sorted(call.time_to_first_token for call in short if call.time_to_first_token is not None)
    if not times:
        raise ServerUnreachable(f"a short prompt brings no text: {short[-1].error or 'none came'}")
    slots, known_by = await probe.find_slots(per_token, hinted_slots)
    say(f"{slots or 'unlimited'} slots, known by {known_by}")
    return Profile(
        probe.api, _SHORT_WORDS, times[len(times) // 2], words, seconds, limit, per_token, slots, known_by, hints
    )


async def measure_again(profile: Profile, settings: Settings, seed: str) -> Profile:
    """Measure the speed once more, on a server that may have become faster or slower, and fit the long prompt to it.

    Args:
        profile: What was measured before; endpoint, limit and slots stay.
        settings: What was asked for.
        seed: Of prompts that the server has not seen.

    Raises:
        ServerUnreachable: There is no answer any more.
    """
    probe = _Probe(profile.api, settings, lambda line: None, seed)
    took = await probe.time_prefill(profile.long_words)
    words = profile.long_words
    if took is not None:
        words = int(words * min(max(settings.prefill / took, 0.25), 4))
        if profile.word_limit is not None:
            words = min(words, int(_SHARE_OF_LIMIT * profile.word_limit))
        if abs(words - profile.long_words) > 0.1 * profile.long_words:
            took = await probe.time_prefill(words)
    if took is None:
        return profile
    per_token = await probe.find_generation(profile.word_limit)
    short = await probe.time_prefill(profile.short_words)
    return replace(
        profile,
        long_words=words,
        long_ttft=took,
        seconds_per_token=per_token,
        short_ttft=profile.short_ttft if short is None else short,
    )
