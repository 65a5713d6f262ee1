"""Many rounds of random hang-ups, repeatable by seed."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Any

from ..answers import Answer, flaw, shortfall
from ..api import Request
from ..bench import TURNED_AWAY, Bench, Broken, Missed, Unjudged
from ..call import Call
from ..judge import how_compared
from ..scenario import scenario

_CONTROLS = 4


@dataclass(frozen=True)
class _Client:
    """One client of a round: what it asks, when it comes, when it hangs up, and what it must get if it does not."""

    request: Request
    after: float
    hangs_up_after: float | None
    reference: Answer | None


@scenario("random-rounds")
async def random_rounds(bench: Bench) -> dict[str, Any]:
    """Rounds of random hang-ups leave everyone else's answers right, and the server answering exactly as before."""
    tokens = bench.profile.tokens_in(0.1 * bench.settings.prefill * bench.stretch)
    pool = [bench.pooled(i, tokens=tokens) for i in range(min(bench.slots + 2, 6))]
    references = [await bench.reference(request) for request in pool]
    choose = random.Random(bench.settings.seed)
    exact = bench.repeats_alone and bench.repeats_beside
    hit = served = same = planned = turned_away = 0
    for n in range(bench.settings.rounds):
        plan = _plan(bench, choose, pool, references)
        planned += sum(client.hangs_up_after is not None for client in plan)
        calls = await _perform(bench, plan, hang_up=True)
        hit += sum(call.hung_up is not None for call in calls)
        for call, client in zip(calls, plan, strict=True):
            if client.hangs_up_after is not None or client.reference is None:
                continue
            if call.status in TURNED_AWAY:
                turned_away += 1
                continue
            served += 1
            same += bench.as_undisturbed(call)
            if (said := shortfall(call, client.reference)) is not None:
                raise Broken(f"in round {n + 1}, {said}", rounds=n + 1, **{"hang-ups": hit})
            if exact and (said := flaw(call, client.reference)) is not None:
                exact = await _repeats(bench, plan, calls)
                if exact:
                    raise Broken(
                        f"in round {n + 1}, {said} ({_CONTROLS} rounds without hang-ups did not)",
                        rounds=n + 1,
                        **{"hang-ups": hit},
                    )
        if (n + 1) % 10 == 0:
            bench.say(f"{n + 1} of {bench.settings.rounds} rounds, {hit} hang-ups, {served} others answered")
    figures: dict[str, Any] = {
        "rounds": bench.settings.rounds,
        "hang-ups": hit,
        "others answered": served,
        "others turned away": turned_away or None,
        "compared": how_compared(exact, same, served),
    }
    if 2 * hit < planned:
        raise Missed(f"only {hit} of {planned} hang-ups came before the answer's end")
    for request, reference in zip(pool, references, strict=True):
        call = await bench.ask("a client", request, reference.seconds)
        said = shortfall(call, reference) or (flaw(call, reference) if bench.repeats_alone else None)
        if said is not None:
            raise Broken(f"after all rounds, {said}", **figures)
    figures["slots afterwards"] = await bench.capacity()
    await bench.afterwards()
    return figures


def _plan(bench: Bench, choose: random.Random, pool: list[Request], references: list[Answer]) -> list[_Client]:
    """Draw the clients of a round; one at least hangs up."""
    plan = []
    for i in range(choose.randint(2, min(bench.slots, 6) + 2)):
        hangs_up = i == 0 or choose.random() < 0.5
        come = choose.random() * 0.5 * bench.profile.short_ttft
        which = choose.randrange(len(pool))
        stream = choose.random() < 0.6
        request = Request(pool[which].prompt, pool[which].max_tokens, stream)
        seconds = references[which].seconds
        if hangs_up and choose.random() < 0.6:
            words = choose.randint(bench.profile.short_words, max(bench.profile.long_words // 8, 32))
            request = bench.fresh(words, pool[which].max_tokens, stream=stream)
            seconds += words / bench.profile.words_per_second
        leave = choose.uniform(0.02, 0.9) * seconds if hangs_up else None
        plan.append(_Client(request, come, leave, None if hangs_up else references[which]))
    return plan


async def _perform(bench: Bench, plan: list[_Client], *, hang_up: bool) -> list[Call]:
    """Send a round's requests, hang up where that is planned, and see all to their ends."""
    bench.acts.clear()
    bench.act("hang-up" if hang_up else "control")
    work = sum(client.reference.seconds if client.reference else bench.profile.long_ttft for client in plan)

    async def client(i: int, planned: _Client) -> Call:
        await bench.sleep(planned.after)
        leaves = planned.hangs_up_after is not None
        call = bench.start(f"hangs up {i + 1}" if leaves else f"stays {i + 1}", planned.request)
        if hang_up and planned.hangs_up_after is not None:
            await call.until_end(planned.hangs_up_after)
            call.hang_up()
        await call.until_end(bench.patience(work))
        return call

    calls = list(await asyncio.gather(*(client(i, planned) for i, planned in enumerate(plan))))
    for call in calls:
        await call.close()
    return calls


async def _repeats(bench: Bench, plan: list[_Client], seen: list[Call]) -> bool:
    """Whether the round's answers are as their references every time that nobody hangs up.

    Every second time, requests that were hung up on are cut so that they come to their own end at about that time.
    """
    early = {call.name: call for call in seen if call.hung_up is not None}
    for i in range(_CONTROLS):
        bench.shortened = early if i % 2 else {}
        try:
            calls = await _perform(bench, plan, hang_up=False)
        finally:
            bench.shortened = {}
        for call, client in zip(calls, plan, strict=True):
            if client.reference is not None and call.status not in TURNED_AWAY:
                if (said := shortfall(call, client.reference)) is not None:
                    raise Unjudged(f"already without any hang-up, {said}")
                if flaw(call, client.reference) is not None:
                    await bench.afterwards()  # what differs alone, too, is not the company's doing
                    return False
    return True
