"""A client that hangs up while it is worked on, beside another that is worked on too."""

from __future__ import annotations

from typing import Any

from ..bench import Bench, Missed, Unjudged
from ..call import Call
from ..judge import Played, against_control
from ..scenario import scenario


@scenario("prefill-hang-up-streaming")
async def prefill_streaming(bench: Bench) -> dict[str, Any]:
    """A hang-up in a streamed request's prefill leaves an active neighbour its whole, right answer."""
    return await _beside_a_generation(bench, in_prefill=True, stream=True)


@scenario("prefill-hang-up")
async def prefill_not_streaming(bench: Bench) -> dict[str, Any]:
    """A hang-up in the prefill of a request that is not streamed leaves an active neighbour its whole, right answer."""
    return await _beside_a_generation(bench, in_prefill=True, stream=False)


@scenario("generation-hang-up-streaming")
async def generation_streaming(bench: Bench) -> dict[str, Any]:
    """A hang-up in a streamed generation leaves an active neighbour its whole, right answer."""
    return await _beside_a_generation(bench, in_prefill=False, stream=True)


@scenario("generation-hang-up")
async def generation_not_streaming(bench: Bench) -> dict[str, Any]:
    """A hang-up in a generation that is not streamed leaves an active neighbour its whole, right answer."""
    return await _beside_a_generation(bench, in_prefill=False, stream=False)


async def _beside_a_generation(bench: Bench, *, in_prefill: bool, stream: bool) -> dict[str, Any]:
    bench.need_neighbours()
    if in_prefill:
        bench.need_prefill()
    request = bench.pooled(0)
    reference = await bench.reference(request)
    tokens = max(8, bench.survivor_tokens() // 3)
    work = reference.seconds + bench.profile.long_ttft
    undisturbed = 0.0  # how long the victim takes beside the survivor when it does not hang up

    async def play(disturbed: bool) -> Played:
        nonlocal undisturbed
        survivor = bench.start("survivor", request)
        await survivor.until_first_token(bench.patience(work))
        words, wanted = (bench.profile.long_words, 8) if in_prefill else (bench.profile.short_words, tokens)
        victim = bench.start("hangs up", bench.fresh(words, wanted, stream=stream))
        if not disturbed:
            await victim.until_end(bench.patience(work))
            await survivor.until_end(bench.patience(work))
            _was_active_beside(victim, survivor)
            undisturbed = victim.seconds or 0.0
            return Played([(survivor, reference)], {"victim's request (s)": undisturbed})
        if in_prefill:
            await victim.until_first_token(0.4 * bench.profile.long_ttft)
        elif stream:
            await victim.until(lambda call: len(call.pieces) >= max(wanted // 3, 2), bench.patience(work))
        else:
            await victim.until_end(0.5 * undisturbed)
        _hang_up_in_time(victim, survivor, in_prefill=in_prefill)
        at = len(survivor.pieces)
        await survivor.until_end(bench.patience(work))
        return Played([(survivor, reference)], {"survivor's tokens at the hang-up": at})

    return await against_control(bench, play)


@scenario("hang-up-beside-prefill")
async def beside_a_prefill(bench: Bench) -> dict[str, Any]:
    """A hang-up in a generation leaves a neighbour that is in its prefill its whole, right answer."""
    bench.need_neighbours()
    bench.need_prefill()
    tokens = bench.survivor_tokens()
    work = bench.profile.long_ttft + tokens * bench.profile.seconds_per_token

    async def play(disturbed: bool) -> Played:
        victim = bench.start("hangs up", bench.fresh(bench.profile.short_words, tokens))
        await victim.until_first_token(bench.patience(work))
        request = bench.fresh(bench.profile.long_words, 16)
        survivor = bench.start("survivor", request)
        await survivor.until_first_token(0.4 * bench.profile.long_ttft)
        if survivor.pieces or survivor.ended is not None:
            raise Missed("the survivor's prefill was over before the hang-up")
        if disturbed:
            if victim.ended is not None:
                raise Missed("the victim had finished before it could hang up")
            victim.hang_up()
        await survivor.until_end(bench.patience(work))
        await victim.until_end(bench.patience(work))
        if not disturbed and not bench.shortened:
            _was_active_beside(survivor, victim)
        await bench.forget()
        return Played([(survivor, await bench.alone(request))])

    return await against_control(bench, play)


def _was_active_beside(late: Call, early: Call) -> None:
    """See that the later request was served while the earlier one was still under way."""
    for call in (early, late):
        if not call.answered:
            said = call.error or "nothing more came"
            raise Unjudged(f"already without any hang-up, {call.name} got no whole answer: {said}")
    served = late.first_token if late.request.stream else late.ended
    if served is None or (early.ended is not None and served > early.ended):
        raise Missed(f"{late.name} was served only when {early.name} had its end: they were not active side by side")


def _hang_up_in_time(victim: Call, survivor: Call, *, in_prefill: bool) -> None:
    """Hang up, if the victim is where it should be and the survivor still under way."""
    if victim.ended is not None:
        raise Missed("the victim had its end before it could hang up")
    if in_prefill and victim.pieces:
        raise Missed("the victim's prefill was over before it could hang up")
    if survivor.ended is not None:
        raise Missed("the survivor had its end before the hang-up")
    victim.hang_up()
