"""A client that hangs up in its prefill and at once asks the same again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..answers import Answer
from ..api import Request
from ..bench import Bench, Broken, Missed, Unjudged
from ..call import Call
from ..judge import Played, against_control
from ..scenario import scenario

_SHARE = 0.6  # of the prefill that is done when the client hangs up
_PAUSES = 0.0, 0.3  # between the hang-up and asking again, as a share of the prefill
_TOKENS = 16


@scenario("retry-answer")
async def answer(bench: Bench) -> dict[str, Any]:
    """A prompt that is asked again at once, or soon, after a hang-up in its prefill gets the right answer."""
    bench.need_prefill()
    work = 2 * bench.profile.long_ttft + _TOKENS * bench.profile.seconds_per_token

    async def play(disturbed: bool) -> Played:
        survivors: list[tuple[Call, Answer]] = []
        figures: dict[str, Any] = {}
        for pause in _PAUSES if disturbed else _PAUSES[:1]:
            request = _fresh(bench)
            first = await _first(bench, request, work, disturbed=disturbed)
            await bench.sleep(pause * bench.profile.long_ttft)
            again = await bench.ask("asks again" if pause == 0 else "asks again later", request, work)
            await bench.forget()
            reference = await bench.alone(replace(request, extra={}))
            survivors += [(again, reference)] if disturbed else [(first, reference), (again, reference)]
            figures[f"{again.name}: time to first token (s)"] = again.time_to_first_token
            if reference.time_to_first_token is not None:
                anew = reference.time_to_first_token > 0.6 * bench.profile.long_ttft
                figures["reference computed anew"] = anew and figures.get("reference computed anew", True)
        return Played(survivors, figures)

    return await against_control(bench, play)


@scenario("retry-prefix")
async def prefix(bench: Bench) -> dict[str, Any]:
    """What was computed of a prompt before a hang-up in its prefill is kept, as after a request that was finished.

    Asked again at once, the prompt may meet its old slot still busy and begin in another, which is no loss of the
    first: so a second try leaves the server a little time.
    """
    bench.need_prefill()
    work = 2 * bench.profile.long_ttft + _TOKENS * bench.profile.seconds_per_token
    bench.act("control")
    request = _fresh(bench)
    finished = await _first(bench, request, work, disturbed=False)
    again = await bench.ask("asks again", request, work)
    fresh = finished.time_to_first_token
    if fresh is None or again.time_to_first_token is None:
        raise Unjudged(f"already without any hang-up there is no answer: {finished.error or again.error}")
    figures: dict[str, Any] = {
        "fresh: time to first token (s)": fresh,
        "again after a finished request (s)": again.time_to_first_token,
    }
    if not _kept(again, fresh):
        raise Unjudged("the server keeps no prefix of a finished request either", **figures)

    for pause in _PAUSES:
        bench.act("hang-up")
        request = _fresh(bench)
        await _first(bench, request, work, disturbed=True)
        await bench.sleep(pause * bench.profile.long_ttft)
        again = await bench.ask("asks again", request, work)
        figures |= {
            "pause after the hang-up (s)": pause * bench.profile.long_ttft,
            "again after a hang-up (s)": again.time_to_first_token,
            "cached tokens": again.cached_tokens,
            "judged by": "time to first token" if again.cached_tokens is None else "cached_tokens",
        }
        if again.time_to_first_token is None:
            raise Broken(f"asked again, there was no answer: {again.error or 'nothing came'}", **figures)
        if _kept(again, fresh):
            await bench.afterwards()
            return figures
    raise Broken(f"the prompt was computed anew after a hang-up at {_SHARE:.0%} of its prefill", **figures)


def _fresh(bench: Bench) -> Request:
    request = bench.fresh(bench.profile.long_words, _TOKENS)
    return request.with_extra(cache_prompt=True) if "cache_prompt" in bench.profile.api.options else request


async def _first(bench: Bench, request: Request, work: float, *, disturbed: bool) -> Call:
    """Ask the first time: to the end, or with a hang-up in the prefill."""
    if not disturbed:
        return await bench.ask("finishes", request, work)
    call = bench.start("hangs up", request)
    await call.until_first_token(_SHARE * bench.profile.long_ttft)
    if call.pieces or call.ended is not None:
        raise Missed("the prefill was over before the hang-up")
    call.hang_up()
    return call


def _kept(again: Call, fresh: float) -> bool:
    """Whether a good part of the prompt was not computed again: as the server says, otherwise by the time."""
    prompt_tokens = (again.usage or {}).get("prompt_tokens")
    if again.cached_tokens is not None and isinstance(prompt_tokens, int):
        return again.cached_tokens >= 0.1 * prompt_tokens
    return again.time_to_first_token is not None and again.time_to_first_token < 0.75 * fresh
