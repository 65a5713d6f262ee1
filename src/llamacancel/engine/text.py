"""Turns the bytes of tokens into text, piece by piece, and finds stop strings across their borders."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Generic, TypeVar

__all__ = ["TextAssembler"]

T = TypeVar("T")


class TextAssembler(Generic[T]):
    """Text that grows by bytes, and is given out as soon as it is final.

    Part of a character is held back until the rest has come; only `finish()` turns what never came into U+FFFD. What
    may yet become a stop string is held back, too.

    Args:
        stop: Stop strings. The text ends before the first one that is complete, the longest where several are at once:
            so it does not matter where the items end.

    Attributes:
        stopped: The stop string that was found.
    """

    def __init__(self, stop: Iterable[str] = ()) -> None:
        self._stops = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # decoded, and may be the beginning of a stop string
        self._taken = 0  # characters decoded so far
        self._given = 0  # characters given out so far
        self._waiting: list[tuple[T, int, int]] = []  # items, and the characters decoded before and after each
        self.stopped: str | None = None

    def feed(self, data: bytes, item: T) -> tuple[str, list[T]]:
        """Takes the bytes of one item.

        Returns:
            The text that became final, and the items that it completes, in order.
        """
        if not self._stops and not self._waiting and data.isascii():  # nothing is held back, and nothing need be
            text = data.decode("ascii")
            self._taken += len(text)
            self._given += len(text)
            return text, [item]
        text = self._decoder.decode(data)
        before = self._taken
        self._taken = after = before + len(text)
        if self._decoder.getstate()[0]:
            after += 1  # part of the next character is the item's, too
        self._waiting.append((item, before, after))
        self._held += text
        if not self._stops:
            return self._give(len(self._held))
        return self._end_at_stop() or self._give(len(self._held) - self._may_become_stop())

    def finish(self) -> tuple[str, list[T]]:
        """Gives out what was held back: nothing more will come."""
        if self.stopped is not None:
            return "", []
        rest = self._decoder.decode(b"", final=True)
        self._taken += len(rest)
        self._held += rest
        return self._end_at_stop() or self._give(len(self._held), all_items=True)

    def _give(self, n: int, all_items: bool = False) -> tuple[str, list[T]]:
        text, self._held = self._held[:n], self._held[n:]
        self._given += n
        count = 0
        while count < len(self._waiting) and (all_items or self._waiting[count][2] <= self._given):
            count += 1
        items = [item for item, _, _ in self._waiting[:count]]
        del self._waiting[:count]
        return text, items

    def _end_at_stop(self) -> tuple[str, list[T]] | None:
        """What is left before the first stop string, with the items that some of that belongs to."""
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if not found:
            return None
        _, at, self.stopped = min(found)
        text, items = self._give(at)
        items += [item for item, before, _ in self._waiting if before < self._given]
        self._waiting.clear()
        self._held = ""
        return text, items

    def _may_become_stop(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        for n in range(min(len(self._held), max(map(len, self._stops)) - 1), 0, -1):
            tail = self._held[-n:]
            if any(stop.startswith(tail) for stop in self._stops):
                return n
        return 0
