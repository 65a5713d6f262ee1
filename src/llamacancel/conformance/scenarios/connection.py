"""Clients whose connection is in an odd state: half closed, or open and not read."""

from __future__ import annotations

from typing import Any

from ..answers import Answer
from ..bench import Bench, Broken, Missed, Unjudged
from ..call import Call
from ..judge import Played, against_control, see_active
from ..scenario import scenario

_SMALL_BUFFER = 4096


@scenario("half-closed")
async def half_closed(bench: Bench) -> dict[str, Any]:
    """A client that closes its sending side alone is answered or let go, and nobody else notices."""
    if bench.settings.target.tls:
        raise Unjudged("TLS connections are not half closed")
    request, following = bench.pooled(0), bench.pooled(1, tokens=16)
    reference, following_reference = await bench.reference(request), await bench.reference(following)
    tokens = max(16, bench.survivor_tokens() // 4)
    work = reference.seconds + 2 * tokens * bench.profile.seconds_per_token

    async def play(disturbed: bool) -> Played:
        survivors: list[tuple[Call, Answer]] = []
        figures: dict[str, Any] = {}
        if bench.has_neighbours():
            survivors.append((bench.start("survivor", request), reference))
            await survivors[0][0].until_first_token(bench.patience(work))
        for stream in (True, False):
            kind = "streaming" if stream else "not streaming"
            call = bench.start(f"half closes, {kind}", bench.fresh(bench.profile.short_words, tokens, stream=stream))
            await call.until(lambda seen: seen.sent is not None, bench.patience(work))
            if disturbed:
                if stream:
                    await call.until_first_token(bench.patience(work))
                if call.ended is not None:
                    raise Missed("the request was over before its connection was half closed")
                for survivor, expected in survivors:
                    see_active(survivor, expected, "the connection was half closed")
                call.half_close()
            await call.until_end(bench.patience(work))
            if disturbed:
                if call.ended is None:
                    raise Broken(f"after a half-close the server neither answers nor closes the connection ({kind})")
                figures[kind] = "answered" if call.answered else f"stopped after {len(call.pieces)} pieces of text"
        for survivor, _ in survivors:
            await survivor.until_end(bench.patience(work))
        survivors.append((await bench.ask("next", following, work), following_reference))
        return Played(survivors, figures)

    figures = await against_control(bench, play)
    return figures | {"slots afterwards": await bench.capacity()}


@scenario("stopped-reading")
async def stopped_reading(bench: Bench) -> dict[str, Any]:
    """A client that stops reading holds up nobody else, and its slot is free again once it has hung up."""
    request, following = bench.pooled(0), bench.pooled(1, tokens=16)
    reference, following_reference = await bench.reference(request), await bench.reference(following)
    tokens = int(1.5 * bench.survivor_tokens())
    work = 3 * reference.seconds

    async def play(disturbed: bool) -> Played:
        survivors: list[tuple[Call, Answer]] = []
        figures: dict[str, Any] = {}
        slow = bench.start(
            "stops reading",
            bench.fresh(bench.profile.short_words, tokens),
            receive_buffer=_SMALL_BUFFER if disturbed else None,
        )
        await slow.until_first_token(bench.patience(work))
        if disturbed:
            slow.stop_reading()
            figures["bytes left unread"] = await _filled(bench, slow, tokens)
        if bench.has_neighbours():
            survivors.append((await bench.ask("survivor", request, work), reference))
        if disturbed:
            slow.hang_up()
        else:
            await slow.until_end(bench.patience(work))
        survivors.append((await bench.ask("next", following, work), following_reference))
        return Played(survivors, figures)

    figures = await against_control(bench, play)
    return figures | {"slots afterwards": await bench.capacity()}


async def _filled(bench: Bench, call: Call, tokens: int) -> int:
    """Wait until the bytes that are left unread grow no more, long before the generation's end.

    Raises:
        Missed: The generation may have come to its end instead.
        Unjudged: The system does not tell how many bytes there are.
    """
    last, still = call.unread_bytes(), 0
    if call.ended is not None:
        raise Missed(f"the client that should stop reading had its end: {call.error or 'answered'}")
    if last is None:
        raise Unjudged("this system does not tell how much a connection holds unread")
    end = bench.now() + 0.7 * (tokens - len(call.pieces)) * bench.profile.seconds_per_token
    step = 4 * bench.profile.seconds_per_token
    while bench.now() < end:
        await bench.sleep(step)
        unread = call.unread_bytes() or 0
        still = still + 1 if unread == last else 0
        last = unread
        if still >= 8 and unread > 0:
            return unread
    raise Missed(f"{last} unread bytes do not fill the connection: the generation is too short")
