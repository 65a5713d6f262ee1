"""Telling what a hang-up did from what would have happened anyway."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from .answers import Answer, flaw, shortfall
from .bench import Bench, Broken, Missed, Unjudged
from .call import Call

__all__ = ["Played", "against_control", "how_compared", "see_active"]

_MORE_CONTROLS = 3


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
        Unjudged: It would not have been answered without the hang-up either.
        Missed: The situation did not come about.
    """
    await bench.forget()
    bench.act("control")
    control = await play(False)
    if (said := control.first_shortfall()) is not None:
        raise Unjudged(f"already without any hang-up, {said}")
    for call, reference in control.survivors:
        bench.note_undisturbed(call.request, call.text, reference.text)
    exact = bench.repeats_alone and bench.repeats_beside and control.first_flaw() is None

    await bench.forget()
    bench.act("hang-up")
    disturbed = await play(True)
    figures = {f"control: {name}": value for name, value in control.figures.items()} | disturbed.figures
    if (said := disturbed.first_shortfall()) is not None:
        raise Broken(said, **figures)
    if exact and (said := disturbed.first_flaw()) is not None:
        for _ in range(_MORE_CONTROLS):
            await bench.forget()
            bench.act("control again")
            again = await play(False)
            for call, _ in again.survivors:
                bench.note_undisturbed(call.request, call.text)
            if again.first_flaw() is not None:
                exact = False
                break
        else:
            raise Broken(f"{said} ({1 + _MORE_CONTROLS} performances without the hang-up did not)", **figures)
    await bench.afterwards()
    if not disturbed.survivors:
        return figures | {"compared": "no neighbour was active"}
    for call, reference in disturbed.survivors:
        bench.note_undisturbed(call.request, reference.text)
    same = sum(bench.as_undisturbed(call) for call, _ in disturbed.survivors)
    return figures | {"compared": how_compared(exact, same, len(disturbed.survivors))}


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
