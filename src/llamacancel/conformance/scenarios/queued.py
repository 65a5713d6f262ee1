"""A client that hangs up while it waits for a slot."""

from __future__ import annotations

from typing import Any

from ..bench import TURNED_AWAY, Bench, Missed, Unjudged
from ..judge import Played, against_control
from ..scenario import scenario


@scenario("queued-hang-up")
async def queued_hang_up(bench: Bench) -> dict[str, Any]:
    """A queued client's hang-up reaches neither the active clients nor those who are queued behind it."""
    slots = bench.profile.slots
    if slots is None:
        raise Unjudged(f"no queue was met: {bench.profile.slots_known_by}")
    actives = [bench.pooled(i) for i in range(slots)]
    last = bench.pooled(slots, tokens=16)
    references = [await bench.reference(request) for request in actives]
    last_reference = await bench.reference(last)
    work = sum(reference.seconds for reference in references)

    async def play(disturbed: bool) -> Played:
        active = [bench.start(f"active {i + 1}", request) for i, request in enumerate(actives)]
        for call in active:
            await call.until_first_token(bench.patience(work))
        victim = bench.start("queued, hangs up", bench.fresh(bench.profile.short_words, 16), queued=True)
        behind = bench.start("queued behind", last, queued=True)
        await bench.sleep(max(4 * bench.profile.short_ttft, 0.1 * references[0].seconds))
        if victim.status in TURNED_AWAY or behind.status in TURNED_AWAY:
            raise Unjudged(f"the server turns clients away instead of queueing them: {victim.error or behind.error}")
        if any(call.ended is not None for call in active):
            raise Missed("an active client had finished before the queued one could hang up")
        if victim.pieces or victim.ended is not None:
            raise Missed("the client that should have been queued was served beside the active ones")
        if disturbed:
            victim.hang_up()
        for call in active:
            await call.until_end(bench.patience(work))
        await behind.until_end(bench.patience(work))
        if not disturbed:
            await victim.until_end(bench.patience(work))
            first_free = min(call.ended for call in active if call.ended is not None)
            if victim.first_token is not None and victim.first_token < first_free:
                raise Missed("the client that should have been queued was served while all slots were taken")
        survivors = [*zip(active, references, strict=True), (behind, last_reference)]
        return Played(survivors, {"active": slots, "queued": 2} if disturbed else {})

    return await against_control(bench, play)
