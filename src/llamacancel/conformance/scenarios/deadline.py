"""A deadline that the request carries."""

from __future__ import annotations

from typing import Any

from ..answers import Answer
from ..bench import Bench, Broken, Unjudged
from ..call import Call
from ..judge import Played, against_control, see_active
from ..scenario import scenario

_SHARE = 0.4  # of the undisturbed request, when the deadline comes
_MOST = 0.5  # of what is left then that the request may run on


@scenario("deadline")
async def deadline(bench: Bench) -> dict[str, Any]:
    """A request's `timeout` ends it in its generation and in its prefill, says so, and reaches nobody else."""
    bench.need_prefill()
    tokens = max(16, bench.survivor_tokens() // 3)
    request = bench.pooled(0)
    reference = await bench.reference(request)
    work = reference.seconds + bench.profile.long_ttft
    await _needs_the_field(bench, tokens)
    alone = {"generation": 0.0, "prefill": 0.0}

    async def play(disturbed: bool) -> Played:
        survivors: list[tuple[Call, Answer]] = []
        figures: dict[str, Any] = {}
        for phase in alone:
            survivor = bench.start(f"survivor, {phase}", request) if bench.has_neighbours() else None
            if survivor is not None:
                await survivor.until_first_token(bench.patience(work))
                survivors.append((survivor, reference))
            words = bench.profile.long_words if phase == "prefill" else bench.profile.short_words
            timed = bench.fresh(words, 8 if phase == "prefill" else tokens)
            given = _SHARE * (bench.profile.long_ttft if phase == "prefill" else alone["generation"])
            call = bench.start(f"deadline, {phase}", timed.with_extra(timeout=given) if disturbed else timed)
            await call.until_end(bench.patience(work))
            if disturbed and survivor is not None:
                see_active(survivor, reference, "the deadline came")
            if survivor is not None:
                await survivor.until_end(bench.patience(work))
            if not disturbed:
                alone[phase] = _undisturbed(call, phase)
            else:
                figures |= _judged(call, phase, given, alone[phase])
        return Played(survivors, figures)

    return await against_control(bench, play)


async def _needs_the_field(bench: Bench, tokens: int) -> None:
    """Raise Unjudged where the server refuses or ignores `timeout`."""
    whole = await bench.alone(bench.fresh(bench.profile.short_words, tokens))
    bench.act("does it take a timeout?")
    timed = bench.fresh(bench.profile.short_words, tokens).with_extra(timeout=_SHARE * whole.seconds)
    call = await bench.ask("deadline", timed, whole.seconds)
    if call.status in (400, 422):
        raise Unjudged(f"the server refuses `timeout`: {call.error}")
    if call.answered and call.n_tokens >= 0.8 * whole.n_tokens:
        raise Unjudged(
            "the server ignores `timeout`",
            **{"timeout (s)": _SHARE * whole.seconds, "ended after (s)": call.seconds},
        )


def _undisturbed(call: Call, phase: str) -> float:
    taken = call.time_to_first_token if phase == "prefill" else call.seconds
    if not call.answered or taken is None:
        raise Unjudged(f"without a deadline the request has no answer: {call.error or 'nothing came'}")
    return taken


def _judged(call: Call, phase: str, given: float, alone: float) -> dict[str, Any]:
    """Return the figures of a request with a deadline, or raise Broken."""
    figures = {
        f"{phase}: timeout (s)": given,
        f"{phase}: ended after (s)": call.seconds,
        f"{phase}: without (s)": alone,
        f"{phase}: ended as": call.finish_reason or call.error,
    }
    if call.seconds is None:
        raise Broken(f"a request with a deadline of {given:.2f} s in its {phase} never ended", **figures)
    short = call.n_tokens < call.request.max_tokens
    if short and call.answered and call.finish_reason in ("stop", "length"):
        raise Broken(
            f"a request that its deadline cut short at {call.n_tokens} of {call.request.max_tokens} tokens "
            f"says that it ended as {call.finish_reason!r}",
            **figures,
        )
    if call.seconds - given > _MOST * max(alone - given, 0.0) or (phase == "prefill" and call.pieces):
        raise Broken(f"a deadline of {given:.2f} s ended a {phase} after {call.seconds:.2f} s", **figures)
    return figures
