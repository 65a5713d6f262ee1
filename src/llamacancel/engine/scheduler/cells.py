"""Counts the cells of a cache that sequences share."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["Cells"]


class _Run:
    """Consecutive cells with the same owners. `users`: sequences that end here, and runs that follow on it."""

    __slots__ = ("above", "length", "users")

    def __init__(self, above: _Run | None, length: int, users: int) -> None:
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
        self._ends: dict[int, _Run] = {}

    @property
    def free(self) -> int | None:
        """Cells that nobody holds; None if they are not scarce."""
        return None if self.total is None else self.total - self.used

    def grow(self, seq: int, n: int) -> None:
        """`seq` holds `n` more."""
        run = self._ends.get(seq)
        if run is not None and run.users == 1:
            run.length += n
        else:
            self._ends[seq] = _Run(run, n, 1)  # takes the place of `seq` among the users of `run`
        self.used += n

    def cut(self, seq: int, length: int) -> None:
        """`seq` holds its first `length` only."""
        run = self._ends.pop(seq, None)
        if run is None:
            return
        end = self._ending_at(run, length)
        if end is not None:
            end.users += 1
            self._ends[seq] = end
        self._release(run)

    def copy(self, src: int, dst: int, length: int) -> None:
        """`dst` holds the first `length` of `src`, and nothing else."""
        self.cut(dst, 0)
        run = self._ends.get(src)
        end = self._ending_at(run, length) if run is not None else None
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
            run = self._ends.get(seq)
            while run is not None and id(run) not in seen:
                seen.add(id(run))
                total += run.length
                run = run.above
        return total

    def _ending_at(self, run: _Run, length: int) -> _Run | None:
        """The run on the way up from `run` that ends after `length` cells, split off where there is none."""
        if length <= 0:
            return None
        end = _depth(run)
        if length >= end:
            return run
        while end - run.length >= length:
            end -= run.length
            assert run.above is not None
            run = run.above
        if end == length:
            return run
        upper = _Run(run.above, length - (end - run.length), 1)
        run.length = end - length
        run.above = upper
        return upper

    def _release(self, run: _Run | None) -> None:
        while run is not None:
            run.users -= 1
            if run.users:
                return
            self.used -= run.length
            run = run.above


def _depth(run: _Run | None) -> int:
    total = 0
    while run is not None:
        total += run.length
        run = run.above
    return total
