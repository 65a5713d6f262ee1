"""How soon a slot serves the next client after a hang-up."""

from __future__ import annotations

from typing import Any

from ..answers import shortfall
from ..bench import Bench, Broken, Missed, Unjudged
from ..scenario import scenario

_SHARE = 0.3  # of the prefill that is done when the client hangs up
_MOST = 0.5  # of the rest of the prefill that the next client may have to wait


@scenario("slot-freed")
async def slot_freed(bench: Bench) -> dict[str, Any]:
    """After a hang-up early in a long prefill the slot serves the next client before half of what was left is over."""
    slots, prefill = bench.profile.slots, bench.profile.long_ttft
    if slots is None:
        raise Unjudged(f"the next client has no slot to wait for: {bench.profile.slots_known_by}")
    bench.need_prefill()
    requests = [bench.pooled(i) for i in range(slots - 1)]
    references = [await bench.reference(request) for request in requests]
    work = prefill + sum(reference.seconds for reference in references)

    async def waited(disturbed: bool) -> float:
        """Perform it and return the next client's time to first token."""
        bench.act("hang-up" if disturbed else "control")
        others = [bench.start(f"active {i + 1}", request) for i, request in enumerate(requests)]
        for call in others:
            await call.until_first_token(bench.patience(work))
        victim = bench.start("hangs up", bench.fresh(bench.profile.long_words, 1))
        await victim.until_first_token(_SHARE * prefill)
        if victim.pieces or victim.ended is not None:
            raise Missed("the prefill was over before the hang-up")
        following = bench.start("next", bench.fresh(bench.profile.short_words, 4), queued=True)
        if disturbed:
            victim.hang_up()
        await following.until_first_token(bench.patience(work))
        for call in [*others, victim, following]:
            await call.until_end(bench.patience(work))
        for call, reference in zip(others, references, strict=True):
            if (said := shortfall(call, reference)) is not None:
                raise (Broken if disturbed else Unjudged)(said if disturbed else f"already without any hang-up, {said}")
        if following.first_token is None or following.time_to_first_token is None:
            said = f"the next client was not served: {following.error or 'nothing came'}"
            raise (Broken if disturbed else Unjudged)(said)
        if any(call.ended is not None and call.ended < following.first_token for call in others):
            raise Missed("another slot became free first")
        return following.time_to_first_token

    without = await waited(False)
    left = without - bench.profile.short_ttft
    figures: dict[str, Any] = {
        "prefill alone (s)": prefill,
        "next client without a hang-up (s)": without,
        "next client alone (s)": bench.profile.short_ttft,
    }
    if left < 0.25 * prefill:
        raise Missed("the next client did not have to wait for the prefill's end")
    with_it = await waited(True)
    share = max(0.0, with_it - bench.profile.short_ttft) / left
    figures |= {"next client after the hang-up (s)": with_it, "share of the rest waited": share}
    if share > _MOST:
        raise Broken(
            f"the next client waited {with_it:.2f} s after the hang-up, "
            f"{share:.0%} of what it waits when nobody hangs up",
            **figures,
        )
    await bench.afterwards()
    return figures
