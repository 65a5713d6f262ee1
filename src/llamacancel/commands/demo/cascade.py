"""A server, and clients that hang up: queued, beside others, and in the middle of a prompt."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ...conformance.lanes import Band, Lane, draw
from ...engine import RequestView
from .client import Client
from .decode import load, made
from .show import Progress, check, legend, named, say, text_lanes
from .stage import ANSWER, ATTEMPTS, PROMPT, Answer, NotSo, Stage, lanes_of

__all__ = ["show_cascade"]


@dataclass(frozen=True)
class Scene:
    """What happened in a play.

    Args:
        title: Who does what.
        lanes: The clients.
        checks: Sentences, and whether they are so.
        in_time: Whether the client hung up at the moment that the play is about.
    """

    title: str
    lanes: list[Lane]
    checks: list[tuple[str, bool]]
    in_time: bool

    @property
    def good(self) -> bool:
        """Whether all was as it should be."""
        return all(holds for _, holds in self.checks)

    def tell(self) -> None:
        """Print it."""
        say(f"   {self.title}\n")
        for line in text_lanes(self.lanes):
            say(f"     {line}")
        say()
        for words, holds in self.checks:
            check(words, holds)
        say()

    def band(self) -> Band:
        """The same for the picture."""
        note = " ".join(f"{words}{'' if holds else ': NOT SO'}." for words, holds in self.checks)
        return Band(self.title, self.lanes, note, "passed" if self.good else "failed")


def show_cascade(args: argparse.Namespace) -> bool:
    """Show whom a client that hangs up takes along: nobody. Whether all was as it should be."""
    say(f"{2 if args.model else 3}. A server, and clients that hang up")
    with load(args.model or made("llama", args.size)) as model:
        say(f"   {named(model)}; real HTTP clients; every figure is of this run\n")
        say(f"   {legend()}\n")
        stage = Stage(model, args.tokens, args.threads)
        scenes: list[Scene] = []
        try:
            for slots, plays in ((1, [_queued]), (2, [_beside, _in_a_prompt])):
                with stage.open(slots):
                    for play in plays:
                        with Progress("clients come and go"):
                            scene = _play(stage, play)
                        scene.tell()
                        scenes.append(scene)
        except NotSo as error:
            return check(str(error), False)
        description = named(model)
    picture = draw(
        [scene.band() for scene in scenes],
        title="llamacancel: clients that hang up",
        note=f"{description}. Time in seconds, from the first request of each play.",
    )
    args.out.write_text(picture, encoding="utf-8")
    say(f"   The picture of it: {args.out}")
    say("   To watch requests of your own: llamacancel serve --model PATH, and open the address that it tells.\n")
    return all(scene.good for scene in scenes)


def _play(stage: Stage, play: Callable[[Stage, list[Answer], int], Awaitable[Scene]]) -> Scene:
    """Play until the client hangs up in time: a machine may be too fast, or busy with something else."""
    known = [stage.alone(0), stage.alone(200)]
    for attempt in range(ATTEMPTS):
        scene = asyncio.run(_awaited(play(stage, known, attempt)))
        if scene.in_time:
            break
    return scene


async def _awaited(scene: Awaitable[Scene]) -> Scene:
    return await scene


async def _queued(stage: Stage, known: list[Answer], _: int) -> Scene:
    a = stage.ask("A", known[0].body)
    await stage.until(lambda view: view.completion_tokens >= 1, a)
    b = stage.ask("B", stage.body(PROMPT, 40))
    await stage.until(lambda view: True, b, a)
    await stage.until(lambda view: view.completion_tokens >= known[0].n_tokens // 3, a)
    await b.hang_up()
    await a.answered()
    at_a, at_b = await stage.ended(a), await stage.ended(b)
    return Scene(
        "One slot: A has it, B waits in the queue and hangs up.",
        lanes_of([(a, at_a), (b, at_b)]),
        [
            (
                f"B was gone from the queue {_free_after(b, at_b)} after it hung up",
                _hung_up(at_b) and at_b.slot is None,
            ),
            _same("A", a, known[0]),
        ],
        in_time=at_b.started_at is None and _is_on_its_way(at_a, b),
    )


async def _beside(stage: Stage, known: list[Answer], attempt: int) -> Scene:
    a = stage.ask("A", known[0].body)
    await stage.until(lambda view: view.completion_tokens >= 1, a)
    b = stage.ask("B", stage.body(max(4 * PROMPT >> attempt, 16), 40, 8 * ANSWER))
    await stage.until(lambda view: view.completion_tokens >= 3, b, a)
    await b.hang_up()
    await a.answered()
    at_a, at_b = await stage.ended(a), await stage.ended(b)
    tokens = at_b.completion_tokens
    return Scene(
        "Two slots: B is answered beside A and hangs up.",
        lanes_of([(a, at_a), (b, at_b)]),
        [
            (
                f"B hung up at token {tokens} of its answer, and its slot was free {_free_after(b, at_b)} later",
                _hung_up(at_b),
            ),
            _same("A", a, known[0]),
        ],
        in_time=_is_on_its_way(at_a, b),
    )


async def _in_a_prompt(stage: Stage, known: list[Answer], attempt: int) -> Scene:
    n_prompt = min(stage.n_long << attempt, stage.most)
    b = stage.ask("B", known[0].body)
    await stage.until(lambda view: view.completion_tokens >= 1, b)
    a = stage.ask("A", stage.body(n_prompt, 80))
    await stage.until(lambda view: view.state != "queued", a, b)
    c = stage.ask("C", known[1].body)
    await stage.until(lambda view: True, c, a, b)
    await stage.until(lambda view: view.prompt_done >= n_prompt // 4, a, b)
    await a.hang_up()
    await b.answered()
    await c.answered()
    at_a, at_b, at_c = await stage.ended(a), await stage.ended(b), await stage.ended(c)
    freed, next_one = at_a.finished_at or 0.0, at_c.started_at or 0.0
    return Scene(
        "Two slots: A is in the middle of a long prompt and hangs up; B is answered beside it, C waits.",
        lanes_of([(a, at_a), (b, at_b), (c, at_c)]),
        [
            (
                f"A hung up at token {at_a.prompt_done:,} of {n_prompt:,} of its prompt, and its slot was free "
                f"{_free_after(a, at_a)} later",
                _hung_up(at_a) and 0 < at_a.prompt_done < n_prompt,
            ),
            (f"C, which waited, was in it {_seconds(next_one - freed)} after that", at_c.slot == at_a.slot),
            _same("B", b, known[0]),
            _same("C", c, known[1]),
        ],
        in_time=at_a.prompt_done < n_prompt and at_a.first_token_at is None and _is_on_its_way(at_b, a),
    )


def _hung_up(view: RequestView) -> bool:
    return view.finish_reason == "cancelled" and view.cause == "client"


def _is_on_its_way(view: RequestView, other: Client) -> bool:
    """Whether a request was being worked on when another client hung up."""
    return (view.finished_at or 0.0) > (other.hung_up_at or 0.0)


def _same(name: str, client: Client, known: Answer) -> tuple[str, bool]:
    words = f"{name} never noticed: the {known.n_tokens} tokens of its answer are the same as alone"
    return words, client.done and client.text == known.text


def _free_after(client: Client, view: RequestView) -> str:
    return _seconds((view.finished_at or 0.0) - (client.hung_up_at or 0.0))


def _seconds(value: float) -> str:
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"
