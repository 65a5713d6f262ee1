"""Many hang-ups at once, and hang-ups at the very end of an answer."""

from __future__ import annotations

from typing import Any

from ..answers import Answer
from ..bench import Bench, Missed
from ..call import Call
from ..judge import Played, against_control
from ..scenario import scenario

_CLIENTS = 8
_ROUNDS = 6


@scenario("hang-ups-in-a-burst")
async def burst(bench: Bench) -> dict[str, Any]:
    """Eight clients that hang up at one moment leave the active client, the next one and every slot unharmed."""
    request, following = bench.pooled(0), bench.pooled(1, tokens=16)
    reference, following_reference = await bench.reference(request), await bench.reference(following)
    tokens = max(8, bench.survivor_tokens() // 4)
    words = bench.profile.short_words, max(bench.profile.long_words // 6, bench.profile.short_words)
    work = reference.seconds + _CLIENTS * (
        words[1] / bench.profile.words_per_second + tokens * bench.profile.seconds_per_token
    )

    async def play(disturbed: bool) -> Played:
        survivor = bench.start("survivor", request)
        await survivor.until_first_token(bench.patience(work))
        crowd = [
            bench.start(f"hangs up {i + 1}", bench.fresh(words[i // 2 % 2], tokens, stream=i % 2 == 0))
            for i in range(_CLIENTS)
        ]
        figures = {}
        await bench.sleep(max(3 * bench.profile.short_ttft, 0.1 * reference.seconds))
        if disturbed:
            if survivor.ended is not None:
                raise Missed("the survivor had its end before the hang-ups")
            open_calls = [call for call in crowd if call.ended is None]
            if len(open_calls) < 0.75 * _CLIENTS:
                raise Missed(f"only {len(open_calls)} of {_CLIENTS} clients were still open to hang up")
            for call in open_calls:
                call.hang_up()
            figures["hang-ups"] = len(open_calls)
        after = await bench.ask("next", following, work)
        for call in [survivor, *crowd]:
            await call.until_end(bench.patience(work))
        return Played([(survivor, reference), (after, following_reference)], figures)

    figures = await against_control(bench, play)
    return figures | {"slots afterwards": await bench.capacity()}


@scenario("hang-up-in-the-last-token")
async def last_token(bench: Bench) -> dict[str, Any]:
    """A hang-up in the last token does not reach the request that follows at once."""
    ending, following = bench.pooled(0, tokens=16), bench.pooled(1, tokens=16)
    reference, following_reference = await bench.reference(ending), await bench.reference(following)
    work = reference.seconds + following_reference.seconds

    async def play(disturbed: bool) -> Played:
        survivors: list[tuple[Call, Answer]] = []
        hits = 0
        for i in range(_ROUNDS):
            call = bench.start(f"hangs up {i + 1}", ending)
            if disturbed:
                at = reference.n_pieces - 1 + i % 2
                call.hang_up_when(lambda seen, at=at: len(seen.pieces) >= at and not seen.answered)  # type: ignore[misc]
            await call.until_end(bench.patience(work))
            hits += call.hung_up is not None
            survivors.append((await bench.ask(f"next {i + 1}", following, work), following_reference))
        if disturbed and hits < _ROUNDS // 2:
            raise Missed(f"only {hits} of {_ROUNDS} hang-ups came between the last but one token and the end")
        return Played(survivors, {"hang-ups": hits} if disturbed else {})

    return await against_control(bench, play)
