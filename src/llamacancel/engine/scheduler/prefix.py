"""Which of the sequences in memory a new request can go on from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from .sequence import Sequence

__all__ = ["MemoryRules", "Reuse", "common_prefix", "find_reuse", "usable_prefix"]

_BLOCK = 256


@dataclass(frozen=True, slots=True)
class MemoryRules:
    """What a kind of memory can do with part of a sequence.

    Attributes:
        cut: A sequence can be cut back to any length.
        window: If it cannot: one that never held more than this can be.
        copy: What can be given from one sequence to another: any "part" that it can be cut back to, only the
            "whole" of it, or "nothing".
        least_copy: Tokens from which on a prefix is worth being copied.
        checkpoints: Sequence ids beyond the slots, for states that are kept to be gone back to.
        cells: Cells that the sequences share; None if each has its own.
        in_order: Rows are computed together only where the ids of their sequences follow on one another.
        by_sequence: As a rule the rows of a prompt are computed by themselves, and the single rows of several
            sequences together. False: all rows of a step in their order.
    """

    cut: bool = True
    window: int = 0
    copy: Literal["part", "whole", "nothing"] = "part"
    least_copy: int = 1
    checkpoints: int = 0
    cells: int | None = None
    in_order: bool = False
    by_sequence: bool = False


@dataclass(frozen=True, slots=True)
class Reuse:
    """Where the prefix of a new request comes from.

    Attributes:
        slot: Where the request is to run.
        source: The sequence that holds the prefix; the slot itself, another one, or None.
        length: Tokens that need not be computed.
        seen: The longest prefix that some sequence holds, usable or not: where others have branched off.
    """

    slot: Sequence
    source: Sequence | None
    length: int
    seen: int


def common_prefix(a: list[int], b: list[int], most: int) -> int:
    """How many tokens, at most `most`, two lists begin with in common."""
    n = min(len(a), len(b), most)
    for start in range(0, n, _BLOCK):
        end = min(start + _BLOCK, n)
        if a[start:end] != b[start:end]:
            return next(i for i in range(start, end) if a[i] != b[i])
    return n


def usable_prefix(rules: MemoryRules, common: int, held: int, peak: int) -> int:
    """How much of a common prefix can be used, of a sequence that holds `held` and once held `peak`."""
    if common == held or rules.cut or peak <= rules.window:
        return common
    return 0


def find_reuse(rules: MemoryRules, tokens: list[int], sequences: Iterable[Sequence], n_slots: int) -> Reuse | None:
    """The idle slot for a new request, and the longest prefix that it can take over.

    The last token is always computed, since it gives the first output. The prefix is copied to the slot that was of no
    use for the longest; but where all slots hold something, one most of which is of use is taken over as it lies.

    Args:
        rules: What the memory can do.
        tokens: The request's.
        sequences: All sequences, the slots first.
        n_slots: How many of them are slots.

    Returns:
        What to do, or None if no slot is idle.
    """
    idle: list[Sequence] = []
    source: Sequence | None = None
    best = seen = 0
    most = len(tokens) - 1
    for seq in sequences:
        is_idle = seq.id < n_slots and seq.request is None
        if is_idle:
            idle.append(seq)
        if not seq.held:
            continue
        common = common_prefix(tokens, seq.tokens, min(seq.held, most))
        seen = max(seen, common)
        usable = usable_prefix(rules, common, seq.held, seq.peak)
        if not is_idle and not _can_copy(rules, usable, seq):
            continue
        if usable > best or (usable == best and usable and is_idle and source is not None and source.request):
            best, source = usable, seq
    if not idle:
        return None
    oldest = min(idle, key=lambda seq: (seq.held > 0, seq.used_at, seq.id))
    if source is None:
        return Reuse(oldest, None, 0, seen)
    if source in idle:
        lost = source.held - best
        if lost and best < rules.least_copy and oldest is not source:
            return Reuse(oldest, None, 0, seen)  # too little to give up the rest of it for
        can_copy = _can_copy(rules, best, source)
        if not lost or not can_copy or oldest is source or (lost <= best and oldest.held):
            return Reuse(source, source, best, seen)
    return Reuse(oldest, source, best, seen)


def _can_copy(rules: MemoryRules, length: int, seq: Sequence) -> bool:
    if rules.copy == "nothing" or length < rules.least_copy:
        return False
    return rules.copy == "part" or length == seq.held
