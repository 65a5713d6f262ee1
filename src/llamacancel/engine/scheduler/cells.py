"""Counts the cells of a cache that sequences share."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["Cells"]


class _Stretch:
    """Consecutive cells with the same owners. `users`: sequences that end here, and stretches that follow on it."""

    __slots__ = ("above", "length", "users")

    def __init__(self, above: _Stretch | None, length: int, users: int) -> None:
        self.above = above
        self.length = length
        self.users = users


class Cells:
    """How many cells are in use, when sequences share what was copied from one to another.

    A copy takes no cells: it shares those of the prefix, and each cell is free once nobody holds it.

    Args:
        total: Cells that there are; None if they are not scarce.
    """

    def __init__(self, total: int | None) -> None:
        self.total = total
        self.used = 0
        self._ends: dict[int, _Stretch] = {}

    @property
    def free(self) -> int | None:
        """Cells that nobody holds; None if they are not scarce."""
        return None if self.total is None else self.total - self.used

    def grow(self, seq: int, n: int) -> None:
        """`seq` holds `n` more."""
        stretch = self._ends.get(seq)
        if stretch is not None and stretch.users == 1:
            stretch.length += n
        else:
            self._ends[seq] = _Stretch(stretch, n, 1)  # takes the place of `seq` among the users of `stretch`
        self.used += n

    def cut(self, seq: int, length: int) -> None:
        """`seq` holds its first `length` only."""
        stretch = self._ends.pop(seq, None)
        if stretch is None:
            return
        end = self._ending_at(stretch, length)
        if end is not None:
            end.users += 1
            self._ends[seq] = end
        self._release(stretch)

    def copy(self, src: int, dst: int, length: int) -> None:
        """`dst` holds the first `length` of `src`, and nothing else."""
        self.cut(dst, 0)
        stretch = self._ends.get(src)
        end = self._ending_at(stretch, length) if stretch is not None else None
        if end is not None:
            end.users += 1
            self._ends[dst] = end

    def clear(self) -> None:
        """Nobody holds anything."""
        self._ends.clear()
        self.used = 0

    def held(self, seq: int) -> int:
        """Cells that `seq` holds, shared ones too."""
        return _depth(self._ends.get(seq))

    def used_by(self, seqs: Iterable[int]) -> int:
        """Cells that at least one of `seqs` holds."""
        seen: set[int] = set()
        total = 0
        for seq in seqs:
            stretch = self._ends.get(seq)
            while stretch is not None and id(stretch) not in seen:
                seen.add(id(stretch))
                total += stretch.length
                stretch = stretch.above
        return total

    def _ending_at(self, stretch: _Stretch, length: int) -> _Stretch | None:
        """The stretch on the way up from `stretch` that ends after `length` cells, split off where there is none."""
        if length <= 0:
            return None
        end = _depth(stretch)
        if length >= end:
            return stretch
        while end - stretch.length >= length:
            end -= stretch.length
            assert stretch.above is not None
            stretch = stretch.above
        if end == length:
            return stretch
        upper = _Stretch(stretch.above, length - (end - stretch.length), 1)
        stretch.length = end - length
        stretch.above = upper
        return upper

    def _release(self, stretch: _Stretch | None) -> None:
        while stretch is not None:
            stretch.users -= 1
            if stretch.users:
                return
            self.used -= stretch.length
            stretch = stretch.above


def _depth(stretch: _Stretch | None) -> int:
    total = 0
    while stretch is not None:
        total += stretch.length
        stretch = stretch.above
    return total
