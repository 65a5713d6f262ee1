"""Who is meant by an id."""

from __future__ import annotations

import time

from .work import Work

__all__ = ["Names"]

_LOOKS = 1000


class Names:
    """Gives each id to one request at a time, without a lock: each step is one that CPython does as a whole.

    A request that was cancelled does not keep its id from the next one, though its slot may not be free yet: the next
    one follows on it. Only one can follow on each, and nobody on one whose id was given back: the first to enter itself
    in `Work.heir` is the one.
    """

    def __init__(self) -> None:
        self._first: dict[str, Work] = {}  # of those who have an id one after the other

    def claim(self, work: Work) -> bool:
        """Give `work` its id. False if that is the id of one that nobody has cancelled. From any thread."""
        for _ in range(_LOOKS):
            holder: Work | None = self._first.setdefault(work.id, work)
            while holder is not None and holder is not work:
                if not holder.gone:
                    return False
                holder = holder.heir.setdefault("heir", work)
            if holder is work:
                return True
            time.sleep(0)  # the engine's thread is just giving it back
        return False

    def find(self, name: str) -> Work | None:
        """The request that has this id now."""
        work = self._first.get(name)
        while work is not None and (heir := work.heir.get("heir")) is not None:
            work = heir
        return work

    def give_back(self, work: Work) -> None:
        """`work` has ended. By the engine's thread alone."""
        if self._first.get(work.id) is not work:
            return  # it follows on one that has not
        heir: Work | None = work
        while heir is not None and heir.ended:
            heir = heir.heir.setdefault("heir", None)
        if heir is None:
            del self._first[work.id]
        else:
            self._first[work.id] = heir
