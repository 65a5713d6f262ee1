"""The workbench of a scenario: clients to start, references to compare with, and what the server is like."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .answers import Answer, flaw, shortfall
from .api import Request
from .call import Call
from .profile import Profile, get, overlapping
from .prompts import asking_for_much
from .settings import Settings

__all__ = ["TURNED_AWAY", "Act", "Bench", "Broken", "Missed", "Unjudged"]


TURNED_AWAY = (429, 503)
# Room for several survivors at once where slots share one context.
_SHARE_OF_LIMIT = 0.2


class Broken(Exception):
    """The claim is false: the reason, and figures."""

    def __init__(self, why: str, **figures: Any) -> None:
        super().__init__(why)
        self.figures = figures


class Unjudged(Exception):
    """The claim cannot be judged on this server: the reason, and figures."""

    def __init__(self, why: str, **figures: Any) -> None:
        super().__init__(why)
        self.figures = figures


class Missed(Exception):
    """The situation did not come about this time; longer work may bring it about."""


@dataclass
class Act:
    """One performance of a scenario: its clients, in the order in which they came."""

    name: str
    calls: list[Call] = field(default_factory=list)
    waiting: set[str] = field(default_factory=set)


class Bench:
    """What a scenario works with.

    Args:
        settings: What was asked for.
        profile: What the server is like.
        say: Takes lines about the progress.

    Attributes:
        stretch: How much longer the work is than usual: doubled when a situation was missed.
        repeats_alone: Whether undisturbed answers to the same request were the same, one after another.
        repeats_beside: Whether they were the same beside each other, too.
        acts: The performances of the scenario that runs.
        shortened: Calls that ended early, by name. A request under such a name is cut so that it comes to its own end
            at about that time: the same company for the others, without a hang-up.
    """

    def __init__(self, settings: Settings, profile: Profile, say: Callable[[str], None]) -> None:
        self.settings = settings
        self.profile = profile
        self.say = say
        self.stretch = 1.0
        self.repeats_alone = True
        self.repeats_beside = True
        self.acts: list[Act] = []
        self.shortened: Mapping[str, Call] = {}
        self._seeds = itertools.count()
        self._undisturbed: dict[tuple[str, int], set[str]] = {}
        self._references: dict[tuple[str, int, bool], Answer] = {}

    # Time

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(max(seconds, 0.0))

    def patience(self, expected: float) -> float:
        """How long to wait for what should take `expected` seconds before it counts as hanging."""
        return self.settings.patience * expected + self.settings.grace

    # Requests

    def fresh(self, words: int, tokens: int, *, stream: bool = True) -> Request:
        """A request whose prompt the server has not seen."""
        return Request(asking_for_much(words, f"{self.settings.seed} fresh {next(self._seeds)}"), tokens, stream)

    def pooled(self, i: int, *, tokens: int | None = None, stream: bool = True) -> Request:
        """A request with a known reference: the same prompt for the same `i`."""
        prompt = asking_for_much(self.profile.short_words, f"{self.settings.seed} pool {i}")
        return Request(prompt, self.survivor_tokens() if tokens is None else tokens, stream)

    def survivor_tokens(self) -> int:
        """How many tokens outlast the prefill of a long prompt, as far as the context has room for them."""
        seconds = max(1.6 * self.profile.long_ttft, 0.3 * self.settings.prefill)
        most = max(int(_SHARE_OF_LIMIT * (self.profile.word_limit or 1_000_000)), 16)
        return min(self.profile.tokens_in(seconds * self.stretch), most)

    @property
    def slots(self) -> int:
        """How many slots there are at least."""
        return self.profile.slots or 4

    def has_neighbours(self) -> bool:
        return self.slots > 1

    def need_neighbours(self) -> None:
        """Raise Unjudged where the server works on one request at a time."""
        if not self.has_neighbours():
            raise Unjudged("the server works on one request at a time: an active client has no active neighbour")

    def need_prefill(self) -> None:
        """Raise Unjudged where even a long prompt brings its first token about as soon as a short one."""
        if self.profile.long_ttft < 3 * self.profile.short_ttft:
            raise Unjudged(
                f"no prefill is long enough to hang up in: {self.profile.long_words} words take "
                f"{self.profile.long_ttft:.3f} s to the first token, {self.profile.short_words} take "
                f"{self.profile.short_ttft:.3f} s"
            )

    # Clients

    def act(self, name: str) -> Act:
        """Begin a performance."""
        act = Act(name)
        self.acts.append(act)
        return act

    def start(self, name: str, request: Request, *, queued: bool = False, receive_buffer: int | None = None) -> Call:
        """Send a request as a client of the current performance."""
        if name in self.shortened:
            request = self._cut(request, self.shortened[name])
        call = Call(self.profile.api, request, name, receive_buffer=receive_buffer)
        if not self.acts:
            self.act("")
        self.acts[-1].calls.append(call)
        if queued:
            self.acts[-1].waiting.add(name)
        return call

    def _cut(self, request: Request, early: Call) -> Request:
        """Give a request as much work as another had done when it ended."""
        end = early.hung_up if early.hung_up is not None else early.ended
        done = end - early.sent if end is not None and early.sent is not None else 0.0
        words = request.prompt.split()
        prefill = len(words) / self.profile.words_per_second
        if early.pieces or done > prefill:
            tokens = len(early.pieces) or round((done - prefill) / self.profile.seconds_per_token)
            return replace(request, max_tokens=min(max(tokens, 1), request.max_tokens))
        kept = words[: max(round(len(words) * done / prefill), 1)]
        return replace(request, prompt=" ".join(kept), max_tokens=1)

    async def ask(self, name: str, request: Request, expected: float) -> Call:
        """Send a request and wait for its end."""
        call = self.start(name, request)
        await call.until_end(self.patience(expected))
        return call

    async def close(self) -> None:
        """Hang up on what is still open."""
        for act in self.acts:
            for call in act.calls:
                await call.close()

    # References

    async def reference(self, request: Request) -> Answer:
        """What the request gives when nothing else is going on and nothing is kept of its prompt.

        It is asked twice, to see whether that is always the same.

        Raises:
            Unjudged: The server does not answer it.
        """
        key = (request.prompt, request.max_tokens, request.stream)
        if key not in self._references:
            first = await self.alone(request)
            await self.forget()
            second = await self.alone(request)
            if second.text != first.text:
                self.repeats_alone = False
            self._references[key] = first
            self.note_undisturbed(request, first.text, second.text)
        return self._references[key]

    def note_undisturbed(self, request: Request, *texts: str) -> None:
        """Remember answers that a request was given when nobody hung up."""
        self._undisturbed.setdefault((request.prompt, request.max_tokens), set()).update(texts)

    def as_undisturbed(self, call: Call) -> bool:
        """Whether an answer is one that the same request was given when nobody hung up."""
        return call.text in self._undisturbed.get((call.request.prompt, call.request.max_tokens), ())

    async def alone(self, request: Request) -> Answer:
        """Ask once, with nothing else going on, outside of the performance's picture."""
        call = Call(self.profile.api, request, "reference")
        expected = self.profile.long_ttft + request.max_tokens * self.profile.seconds_per_token
        await call.until_end(self.patience(expected))
        await call.close()
        if not call.answered:
            raise Unjudged(f"the server did not answer an undisturbed request: {call.error or 'nothing came'}")
        return Answer.of(call)

    async def forget(self) -> None:
        """Fill every slot with something else, so that no prompt of ours is left there.

        A prompt that is partly there already is computed in pieces of other sizes, which changes the last bits and,
        now and then, a token. Servers that keep prompts elsewhere, too, are told not to by `cache_prompt`.
        """
        calls = [Call(self.profile.api, self.fresh(self.profile.short_words, 2)) for _ in range(self.slots)]
        for call in calls:
            await call.until_end(self.patience(self.slots * self.profile.long_ttft))
            await call.close()

    async def undisturbed(self) -> None:
        """See whether the server's answers are always the same when nobody hangs up: alone and beside each other."""
        requests = [self.pooled(i) for i in range(min(max(self.slots, 2), 4))]
        references = [await self.reference(request) for request in requests]
        for company in (2, len(requests)):
            await self.forget()
            calls = [self.start(f"undisturbed {i}", request) for i, request in enumerate(requests[:company])]
            for call, reference in zip(calls, references[:company], strict=True):
                await call.until_end(self.patience(len(requests) * reference.seconds))
                if (said := shortfall(call, reference)) is not None:
                    raise Unjudged(f"already undisturbed, {said}")
                self.note_undisturbed(call.request, call.text)
                if flaw(call, reference) is not None:
                    self.repeats_beside = False
        await self.reference(self._probe())

    def _probe(self) -> Request:
        return self.pooled(0, tokens=16)

    async def afterwards(self) -> None:
        """See that the server answers as before.

        Raises:
            Broken: It does not.
        """
        request = self._probe()
        reference = self._references[request.prompt, request.max_tokens, request.stream]
        await self.forget()
        call = Call(self.profile.api, request, "a client")
        work = self.profile.long_ttft + request.max_tokens * self.profile.seconds_per_token
        await call.until_end(self.patience(work))
        await call.close()
        wrong = shortfall(call, reference)
        if wrong is None and self.repeats_alone:
            wrong = flaw(call, reference)
        if wrong is not None:
            raise Broken(f"afterwards, {wrong}")

    async def capacity(self) -> int | None:
        """See that as many requests as before are worked on at once; return how many.

        Raises:
            Broken: There are fewer.
        """
        if self.profile.slots is None:
            return None
        tokens = max(16, self.profile.tokens_in(0.3 * self.settings.prefill))
        best = 0
        for _ in range(3):
            calls = [
                Call(self.profile.api, self.fresh(self.profile.short_words, tokens)) for _ in range(self.profile.slots)
            ]
            for call in calls:
                await call.until_end(self.patience(tokens * self.profile.seconds_per_token * self.profile.slots))
            for call in calls:
                await call.close()
            best = max(best, overlapping(calls))
            if best >= self.profile.slots:
                return best
            await self.sleep(0.5 * self.profile.long_ttft)
        raise Broken(f"afterwards, {best} requests were worked on at once instead of {self.profile.slots}")

    async def alive(self) -> bool:
        """Whether the server answers a small request at all; while it turns clients away, it is asked again."""
        deadline = self.now() + self.patience(self.profile.long_ttft)
        while True:
            call = Call(self.profile.api, self.fresh(8, 4), "health")
            await call.until_end(deadline - self.now())
            await call.close()
            if call.status not in TURNED_AWAY or self.now() > deadline:
                return call.answered
            await self.sleep(0.1 * self.profile.long_ttft + 0.01)

    async def cancel_by_id(self, request_id: str) -> int:
        """Ask the server to cancel a request by its id and return the HTTP status.

        Raises:
            ExchangeError: There was no answer.
        """
        api = self.profile.api
        path = f"{api.target.path}/requests/{request_id}"
        status, _, _ = await get(api.target, path, api.headers(), self.patience(self.profile.short_ttft), "DELETE")
        return int(status)
