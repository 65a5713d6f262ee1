"""Telling what a hang-up did from what would have happened anyway."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from .answers import Answer, flaw, shortfall
from .bench import Bench, Broken, Missed, Unjudged
from .call import Call

__all__ = ["Played", "against_control", "how_compared", "see_active"]

_REPEATS = 2


@dataclass
class Played:
    """How a performance went for those who must not notice anything.

    Args:
        survivors: Their calls, each with its reference.
        figures: What else was measured.
    """

    survivors: list[tuple[Call, Answer]]
    figures: dict[str, Any] = field(default_factory=dict)

    def first_shortfall(self) -> str | None:
        return next((said for call, reference in self.survivors if (said := shortfall(call, reference))), None)

    def first_flaw(self) -> str | None:
        return next((said for call, reference in self.survivors if (said := flaw(call, reference))), None)


async def against_control(bench: Bench, play: Callable[[bool], Awaitable[Played]]) -> dict[str, Any]:
    """Perform a scenario without its hang-up, then with it, and judge those who should not have noticed.

    Answers are compared to the letter if the server's undisturbed answers are always the same: alone, beside each
    other, and in the performance without the hang-up. Otherwise they must be whole, and it is told how many of them
    are the same as one that was given without a hang-up.

    Args:
        bench: The workbench.
        play: Performs the scenario: with the hang-up if it is given True.

    Returns:
        The figures: those of both performances, and how answers were compared.

    Raises:
        Broken: A survivor noticed.
        Unjudged: It would not have been answered without the hang-up either, or noticed once and never again.
        Missed: The situation did not come about.
    """
    control = await _perform(bench, play, "control")
    if (said := control.first_shortfall()) is not None:
        raise Unjudged(f"already without any hang-up, {said}")
    exact = bench.repeats_alone and bench.repeats_beside and control.first_flaw() is None

    disturbed = await _perform(bench, play, "hang-up")
    figures = {f"control: {name}": value for name, value in control.figures.items()} | disturbed.figures
    if (said := disturbed.first_shortfall()) is not None:
        raise Broken(said, **figures)
    if exact and (said := disturbed.first_flaw()) is not None:
        ended = {
            call.name: call for call in bench.acts[-1].calls if not any(call is kept for kept, _ in disturbed.survivors)
        }
        exact = await _blame(bench, play, said, ended, figures)
    await bench.afterwards()
    if not disturbed.survivors:
        return figures | {"compared": "no neighbour was active"}
    for call, reference in disturbed.survivors:
        bench.note_undisturbed(call.request, reference.text)
    same = sum(bench.as_undisturbed(call) for call, _ in disturbed.survivors)
    return figures | {"compared": how_compared(exact, same, len(disturbed.survivors))}


async def _perform(bench: Bench, play: Callable[[bool], Awaitable[Played]], name: str) -> Played:
    await bench.forget()
    bench.act(name)
    disturbed = name == "hang-up"
    try:
        played = await play(disturbed)
    except Missed:
        await bench.close()
        raise
    if not disturbed:
        for call, reference in played.survivors:
            bench.note_undisturbed(call.request, call.text, reference.text)
    return played


async def _blame(
    bench: Bench,
    play: Callable[[bool], Awaitable[Played]],
    said: str,
    ended: dict[str, Call],
    figures: dict[str, Any],
) -> bool:
    """Find out whether an answer that differs does so because of the hang-up.

    The scenario is performed again and again in three ways: without the hang-up, with requests that come to their own
    end where those that were hung up on came to theirs, and with the hang-up.

    Returns:
        False if an answer differs without a hang-up, too.

    Raises:
        Broken: It differs again with the hang-up, and never without.
        Unjudged: It never differs again.
    """
    again, with_it, without = 1, 1, 1
    for _ in range(_REPEATS):
        for name, shortened in (("control again", {}), ("control that ends as early", ended)):
            bench.shortened = shortened
            try:
                with contextlib.suppress(Missed):
                    if (await _perform(bench, play, name)).first_flaw() is not None:
                        return False
                    without += 1
            finally:
                bench.shortened = {}
        with contextlib.suppress(Missed):
            again += (await _perform(bench, play, "hang-up")).first_flaw() is not None
            with_it += 1
    counted = f"so in {again} of {with_it} performances with the hang-up, in none of {without} without"
    if again == 1:
        raise Unjudged(f"{said}, but {counted}", **figures)
    raise Broken(f"{said} ({counted})", **figures)


def how_compared(exact: bool, same: int, survivors: int) -> str:
    """Say how survivors were compared, of whom `same` got an answer that was also given when nobody hung up."""
    if exact:
        return "to the letter"
    if same == survivors:
        return "to the letter, though undisturbed answers differ among themselves"
    return f"by length: undisturbed answers differ among themselves ({same} of {survivors} as undisturbed)"


def see_active(call: Call, reference: Answer, when: str) -> None:
    """See that a survivor is still under way after others were disturbed.

    Raises:
        Broken: It was ended without a whole answer.
        Missed: It has its whole answer already.
    """
    if call.ended is not None:
        if (said := shortfall(call, reference)) is not None:
            raise Broken(said)
        raise Missed(f"{call.name} had its end before {when}")
