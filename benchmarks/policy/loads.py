"""The loads: the four of the server's benchmark, and what strangers do to a neighbour."""

from __future__ import annotations

import random

from .play import Client, Load

__all__ = ["LOADS"]

NEIGHBOUR = Client((4, 4), None)


def _served(clients: int, requests: int, within: float | None) -> Load:
    """`within`: seconds of a request there, in which a third hang up."""

    def leaves(rng: random.Random) -> float | None:
        return rng.uniform(0, within) if within and rng.random() < 1 / 3 else None

    name = f"{clients} clients" + (", a third hang up" if within else "")
    return Load(name, (Client((512, 512), 64, leaves, requests),) * clients, clients)


def _beside(name: str, n: int, lengths: tuple[int, int], answer: int, leaves: float | None = None) -> Load:
    stranger = Client(lengths, answer, lambda _: leaves, begins=1.0, counts=False)
    return Load(f"beside {name}", (NEIGHBOUR, *(stranger,) * n), 4, seconds=30.0)


LOADS = (
    _served(4, 4, None),
    _served(4, 4, 5.0),
    _served(16, 2, None),
    _served(16, 2, 17.0),
    _beside("3 prompts of 2,000", 3, (2000, 2000), 1),
    _beside("3 prompts of 100 to 3,000", 3, (100, 3000), 1),
    _beside("8 of 2,000 that leave after 0.7 s", 8, (2000, 2000), 16, 0.7),
    _beside("chats of 20 to 600", 3, (20, 600), 40),
)
