"""Cancelling by a request's id, where the server has that."""

from __future__ import annotations

from typing import Any

from ..bench import Bench, Broken, Missed, Unjudged
from ..judge import Played, against_control, see_active
from ..scenario import scenario
from ..wire import ExchangeError


@scenario("cancel-by-id")
async def cancel_by_id(bench: Bench) -> dict[str, Any]:
    """A cancel by id ends the request that it names, and says so; repeated, late or with an unknown id it is inert."""
    request, following = bench.pooled(0), bench.pooled(1)
    reference, following_reference = await bench.reference(request), await bench.reference(following)
    tokens = max(16, bench.survivor_tokens() // 2)
    work = reference.seconds + tokens * bench.profile.seconds_per_token

    async def play(disturbed: bool) -> Played:
        survivors = []
        figures: dict[str, Any] = {}
        if bench.has_neighbours():
            survivors.append((bench.start("survivor", request), reference))
            await survivors[0][0].until_first_token(bench.patience(work))
        victim = bench.start("cancelled by id", bench.fresh(bench.profile.short_words, tokens))
        await victim.until(lambda call: len(call.pieces) >= max(tokens // 4, 2), bench.patience(work))
        if victim.request_id is None:
            raise Unjudged("answers carry no X-Request-Id header")
        if disturbed:
            if victim.ended is not None:
                raise Missed("the request had its end before it could be cancelled")
            for survivor, expected in survivors:
                see_active(survivor, expected, "the cancel")
            asked = bench.now()
            status = await _delete(bench, victim.request_id)
            if status in (404, 405, 501):
                raise Unjudged(f"the server has no cancel by id: DELETE gave HTTP {status}")
            if not 200 <= status < 300:
                raise Broken(f"a cancel of an active request gave HTTP {status}")
            await victim.until_end(bench.patience(work))
            if victim.ended is None:
                raise Broken("a request that was cancelled by its id never ended")
            figures |= {
                "ended after the cancel (s)": victim.ended - asked,
                "ended as": victim.finish_reason or victim.error,
                "tokens": victim.n_tokens,
            }
            if victim.n_tokens >= tokens:
                raise Broken("a cancel by id was accepted and did nothing: all tokens were generated", **figures)
            if victim.answered and victim.finish_reason in ("stop", "length"):
                raise Broken(f"a cancelled request says that it ended as {victim.finish_reason!r}", **figures)
        await victim.until_end(bench.patience(work))
        after = bench.start("next", following)
        await after.until_first_token(bench.patience(work))
        if disturbed:
            figures["the same id again"] = f"HTTP {await _delete(bench, victim.request_id)}"
            unknown = await _delete(bench, "no-such-request")
            figures["an unknown id"] = f"HTTP {unknown}"
            if unknown >= 500:
                raise Broken(f"a cancel with an unknown id gave HTTP {unknown}", **figures)
            see_active(after, following_reference, "the late cancel")
        survivors.append((after, following_reference))
        for call, _ in survivors:
            await call.until_end(bench.patience(work))
        return Played(survivors, figures)

    return await against_control(bench, play)


async def _delete(bench: Bench, request_id: str) -> int:
    try:
        return await bench.cancel_by_id(request_id)
    except ExchangeError as error:
        raise Broken(f"a cancel by id was not answered: {error}") from error
