"""Cancels a decode at its first poll, at its second, ... at every one, and looks for traces in the context.

A program: `python -m tests.laws.every_poll ARCH`. It writes one line of JSON for each scenario.
`test_law_04_rollback.py` and `test_law_07_neighbours.py` run it and read them.

A poll here is a reading of the clock that the call makes. Two scenarios are tried at every poll if there are not too
many, the others at some, the first and the last always among them; LLAMACANCEL_DENSITY=20 tries twenty times as many.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import llamacancel as lc
from llamacancel.commands.make_model import cached_model
from tests.device import CONTEXT, load
from tests.laws.clock import NEVER, deadline_at, readings_of
from tests.laws.words import (
    batch,
    cancelled,
    close,
    decode,
    far,
    holds,
    one_more,
    outputs,
    same_bits,
    tokens,
    woven,
)

DENSITY = float(os.environ.get("LLAMACANCEL_DENSITY", "1"))

EVERY = ("llama", "swa", "mamba", "hybrid", "moe")
ALL = EVERY[:-1]  # a mixture of experts has the memory of "llama": it does with some
ALMOST_ALL = 100
SHARING = ("llama", "swa", "hybrid")  # whose rows may belong to several sequences


@dataclass(frozen=True)
class Scenario:
    """A context's past, and the batch whose decode is cancelled.

    Attributes:
        past: Fills the context; the last thing it does is a decode with logits.
        rows: Makes the batch.
        params: Parameters of the context.
        archs: Architectures that can do it.
        cancels: About how many polls are tried.
    """

    past: Callable[[lc.Context], Any]
    rows: Callable[[], lc.Batch]
    params: dict[str, Any] = field(default_factory=dict)
    archs: tuple[str, ...] = ALL
    cancels: int = 9


def fill(context: lc.Context, rows: lc.Batch) -> None:
    """Decodes; of what comes out only the last row's logits are of interest, and they take most of the time."""
    ids, positions = rows.tokens, rows.positions
    quiet = lc.Batch(len(rows), n_seq_max=8)
    for row in range(len(rows)):
        quiet.add(ids[row], int(positions[row]), rows.seq_ids(row), row == len(rows) - 1)
    context.decode(quiet)


def _history(n: int, seq: int = 0, seed: int = 1) -> Callable[[lc.Context], None]:
    return lambda context: fill(context, batch((tokens(n, seed), 0, seq)))


def _four(context: lc.Context) -> None:
    fill(context, batch(*((tokens(9 + 4 * seq, seq), 0, seq) for seq in range(4))))


def _moved(context: lc.Context) -> None:
    """Sequences come, go and come back, so that a recurrent memory has moved their states about."""
    fill(context, woven(*((tokens(9, seq), 0, seq) for seq in range(4))))
    context.memory.remove(1)
    fill(context, batch((tokens(5, 7), 9, 3), (tokens(5, 8), 9, 0)))
    context.memory.remove(0)
    context.memory.copy(2, 1)
    fill(context, batch((tokens(6, 9), 9, 1)))
    fill(context, batch((tokens(6, 10), 0, 0), (tokens(4, 11), 14, 3)))


def _copied(context: lc.Context) -> None:
    fill(context, batch((tokens(40, 1), 0, 0)))
    context.memory.copy(0, 1)
    context.memory.copy(0, 2)


def _copied_window(context: lc.Context) -> None:
    """Two sequences whose shared cells are about to leave the window."""
    fill(context, batch((tokens(40, 1), 0, 0)))
    context.memory.copy(0, 1)
    for turn in range(4):
        fill(context, batch((tokens(50, 2 + turn), 40 + 50 * turn, 1)))


def _fragmented(context: lc.Context) -> None:
    fill(context, woven(*((tokens(40, seq), 0, seq) for seq in range(3))))
    context.memory.remove(1)
    try:
        context.memory.remove(2, 30)
    except ValueError:  # not a part of it
        context.memory.remove(2)
        fill(context, batch((tokens(30, 5), 0, 2)))
    fill(context, batch((tokens(9, 6), 40, 0)))


def _wrapped(context: lc.Context) -> None:
    """The search for a cell stands near the end of the cache; what is free lies before it."""
    fill(context, batch((tokens(100, 1), 0, 0)))
    fill(context, batch((tokens(100, 2), 0, 1)))
    context.memory.remove(0)
    fill(context, batch((tokens(40, 3), 100, 1)))


def _overfull(context: lc.Context) -> None:
    """A sliding window's cells have been overwritten several times over."""
    for turn in range(5):
        fill(context, batch((tokens(64, turn), 64 * turn, 0)))


def _loaded(context: lc.Context) -> None:
    fill(context, batch((tokens(40, 1), 0, 1)))
    data = context.state.save(1)
    context.memory.remove(1)
    context.state.load(0, data)
    context.state.load(2, data)
    fill(context, batch(([400], 40, 2)))


def _after_overfull() -> lc.Batch:
    return batch((tokens(40, 50), 320, 0))


_STEP = (tokens(32, 50), 40, 0)
_QUANTIZED = {"flash_attn": True, "type_k": "q8_0", "type_v": "q8_0"}

SCENARIOS: dict[str, Scenario] = {
    "an empty sequence": Scenario(lambda context: None, lambda: batch((tokens(32, 50), 0, 0))),
    "a sequence with history": Scenario(_history(40), lambda: batch(_STEP), {}, EVERY, ALMOST_ALL),
    "one token": Scenario(_history(40), lambda: batch(([777], 40, 0)), cancels=ALMOST_ALL),
    "one ubatch": Scenario(_history(40), lambda: batch(_STEP), {"n_ubatch": 32}),
    "the last row's logits alone": Scenario(_history(40), lambda: batch(_STEP, logits="last")),
    "values transposed": Scenario(_history(40), lambda: batch(_STEP), {"flash_attn": False}, SHARING),
    "a quantized cache": Scenario(_history(40), lambda: batch(_STEP), _QUANTIZED, SHARING),
    "long history": Scenario(_overfull, _after_overfull, {}, ("swa", "mamba")),
    "long history, all of it kept": Scenario(_overfull, _after_overfull, {"swa_full": True}, ("swa",)),
    "long history, values transposed": Scenario(_overfull, _after_overfull, {"flash_attn": False}, ("swa",)),
    "long history, quantized cache": Scenario(_overfull, _after_overfull, _QUANTIZED, ("swa",)),
    "two sequences of four": Scenario(
        _four, lambda: batch((tokens(12, 50), 9, 0), (tokens(20, 51), 17, 2)), {"n_seq_max": 4}, EVERY
    ),
    "two sequences of four, woven": Scenario(
        _four, lambda: woven((tokens(12, 50), 21, 3), (tokens(20, 51), 13, 1)), {"n_seq_max": 4}
    ),
    "four sequences, one of them new": Scenario(
        lambda context: fill(context, batch(*((tokens(9, seq), 0, seq) for seq in (0, 1, 3)))),
        lambda: batch((tokens(12, 50), 0, 2), *((tokens(6, 51 + seq), 9, seq) for seq in (0, 1, 3))),
        {"n_seq_max": 4},
    ),
    "a cache for each sequence": Scenario(
        _four, lambda: batch((tokens(12, 50), 9, 0), (tokens(20, 51), 17, 2)), {"n_seq_max": 4, "kv_unified": False}
    ),
    "a cache for each sequence, long history": Scenario(
        lambda context: [
            fill(context, batch((tokens(150, turn), 150 * turn, seq))) for seq in range(2) for turn in range(2)
        ],
        lambda: batch((tokens(20, 50), 300, 0), (tokens(20, 51), 300, 1)),
        {"n_seq_max": 2, "kv_unified": False},
        ("swa",),
    ),
    "states that have moved": Scenario(
        _moved, lambda: batch((tokens(12, 50), 18, 3), (tokens(12, 51), 15, 1)), {"n_seq_max": 4}, EVERY
    ),
    "states that will move": Scenario(
        _moved, lambda: woven((tokens(8, 50), 9, 2), (tokens(8, 51), 6, 0)), {"n_seq_max": 4}
    ),
    "a sequence that was copied": Scenario(_copied, lambda: batch(_STEP), {"n_seq_max": 3}),
    "a copy": Scenario(_copied, lambda: batch((tokens(32, 50), 40, 2)), {"n_seq_max": 3}),
    "a sequence and its copy": Scenario(_copied, lambda: batch(_STEP, (tokens(16, 51), 40, 1)), {"n_seq_max": 4}),
    "copies, a cache for each": Scenario(_copied, lambda: batch(_STEP), {"n_seq_max": 3, "kv_unified": False}),
    "a copy that pushes shared rows out of the window": Scenario(
        _copied_window, lambda: batch((tokens(96, 50), 240, 1), (tokens(8, 51), 40, 0)), {"n_seq_max": 2}, ("swa",)
    ),
    "rows of several sequences": Scenario(
        lambda context: fill(context, batch((tokens(12, 1), 0, [0, 1]), (tokens(4, 2), 12, 2))),
        lambda: batch((tokens(16, 50), 12, [0, 1]), (tokens(6, 51), 28, 0), (tokens(6, 52), 28, 1)),
        {"n_seq_max": 3},
        SHARING,
    ),
    "a fragmented cache": Scenario(
        _fragmented, lambda: batch((tokens(40, 50), 30, 2), (tokens(24, 51), 0, 1)), {"n_seq_max": 3, "n_ctx": 256}
    ),
    "a cache that wraps around": Scenario(
        _wrapped, lambda: batch((tokens(60, 50), 0, 2)), {"n_seq_max": 3, "n_ctx": 256}
    ),
    "a loaded state": Scenario(_loaded, lambda: batch(_STEP), {"n_seq_max": 3}),
}

# Batches that two requests share, the second of which is cancelled: past, rows of the one, rows of the other.
SHARED: dict[str, tuple[Callable[[lc.Context], Any], list[Any], list[Any], dict[str, Any], tuple[str, ...]]] = {
    "two new sequences": (
        lambda context: None,
        [(tokens(24, 50), 0, 0)],
        [(tokens(24, 51), 0, 2)],
        {"n_seq_max": 3},
        ALL,
    ),
    "neighbours": (_four, [(tokens(24, 50), 9, 0)], [(tokens(24, 51), 13, 1)], {"n_seq_max": 4}, ALL),
    "far apart": (_four, [(tokens(24, 50), 9, 0)], [(tokens(24, 51), 21, 3)], {"n_seq_max": 4}, EVERY),
    "the later one first": (_four, [(tokens(12, 50), 21, 3)], [(tokens(24, 51), 13, 1)], {"n_seq_max": 4}, ALL),
    "a sequence and its copy": (_copied, [(tokens(24, 50), 40, 0)], [(tokens(24, 51), 40, 1)], {"n_seq_max": 4}, ALL),
    "both copies": (_copied, [(tokens(24, 50), 40, 2)], [(tokens(24, 51), 40, 1)], {"n_seq_max": 4}, ALL),
    "a cache for each": (
        _four,
        [(tokens(24, 50), 9, 0)],
        [(tokens(24, 51), 13, 1)],
        {"n_seq_max": 4, "kv_unified": False},
        ALL,
    ),
    "states that have moved": (_moved, [(tokens(12, 50), 18, 3)], [(tokens(12, 51), 15, 1)], {"n_seq_max": 4}, ALL),
    "the other pushes shared rows out of the window": (
        _copied_window,
        [(tokens(96, 50), 240, 1)],
        [(tokens(8, 51), 40, 0)],
        {"n_seq_max": 2},
        ("swa",),
    ),
    "it pushed rows out of the window": (
        _copied_window,
        [(tokens(8, 51), 40, 0)],
        [(tokens(96, 50), 240, 1)],
        {"n_seq_max": 2},
        ("swa",),
    ),
}


LOADS = ("an empty sequence", "a sequence", "a copy")  # what a state is loaded into


class Sweep:
    """One scenario, one model."""

    def __init__(self, model: lc.Model, params: dict[str, Any], past: Callable[[lc.Context], Any]) -> None:
        self.model = model
        self.params = {"n_ctx": 1024, "n_ubatch": 8, "n_threads": 1, **CONTEXT, **params}
        self.past = past
        self.problems: list[str] = []
        self.cancels = 0
        self.rows_done: set[int] = set()

    def context(self) -> lc.Context:
        context = self.model.context(**self.params)
        self.past(context)
        return context

    def expect(self, holds_true: bool, what: str) -> None:
        if not holds_true:
            self.problems.append(what)

    def decode_until(self, k: int, context: lc.Context, rows: lc.Batch, **params: Any) -> lc.DecodeCancelled | None:
        token = far()
        with deadline_at(k):
            return cancelled(context, rows, token, **params)

    def polls_of(self, rows: lc.Batch) -> int:
        with self.context() as context:
            token = far()
            return readings_of(lambda: context.decode(rows, token))

    def report(self, **more: Any) -> dict[str, Any]:
        return {
            "cancels": self.cancels,
            "rows_done": sorted(self.rows_done),
            "problems": self.problems[:8],
            "n_problems": len(self.problems),
            **more,
        }


def some(polls: int, n: float) -> list[int]:
    """About `n` of the polls, at equal distances, or all if there are no more; the first and the last two belong."""
    n = min(polls, max(3, int(n * DENSITY)))
    return sorted({max(polls - 1, 1), *(1 + round(i * (polls - 1) / (n - 1)) for i in range(n))}) if n > 1 else [1]


def rollback(model: lc.Model, scenario: Scenario) -> dict[str, Any]:
    """Every cancelled call leaves the context as it was; done again, the call gives the bits that it always gave."""
    sweep = Sweep(model, scenario.params, scenario.past)
    rows = scenario.rows()
    with sweep.context() as twin:
        at_first = holds(twin)
        expected, expected_next = decode(twin, rows), one_more(twin)
        expected_last = outputs_or_none(twin)
    polls = sweep.polls_of(rows)

    context = sweep.context()
    for n, k in enumerate(some(polls, scenario.cancels)):
        before = outputs_or_none(context)
        error = sweep.decode_until(k, context, rows)
        if error is None:
            sweep.expect(k > polls - 8, f"poll {k} of {polls}: not cancelled")
            context.close()
            context = sweep.context()
            continue
        sweep.cancels += 1
        sweep.expect(holds(context) == at_first, f"poll {k}: holds {holds(context)}, held {at_first}")
        sweep.expect(context.dirty_sequences == [], f"poll {k}: dirty {context.dirty_sequences}")
        sweep.expect(error.rows_done == 0, f"poll {k}: says that {error.rows_done} rows are there")
        for seq, outcome in error.sequences.items():
            sweep.expect(
                outcome.state == "rolled_back" and outcome.end == at_first[seq][1] + 1,
                f"poll {k}: says {outcome} of sequence {seq}",
            )
        after = outputs_or_none(context)
        sweep.expect(
            (before is None) == (after is None) and (before is None or same_bits(before, after)),
            f"poll {k}: the logits of the call before are others",
        )
        if n % 10 == 4:
            sweep.expect(same_bits(decode(context, rows), expected), f"poll {k}: done again, other bits")
            sweep.expect(same_bits(one_more(context), expected_next), f"poll {k}: the token after, other bits")
            last = outputs_or_none(context)
            sweep.expect(last is not None and same_bits(last, expected_last), f"poll {k}: other outputs")
            context.close()
            context = sweep.context()
    sweep.expect(same_bits(decode(context, rows), expected), "at the end: done again, other bits")
    sweep.expect(same_bits(one_more(context), expected_next), "at the end: the token after, other bits")
    context.close()
    return sweep.report(polls=polls)


def outputs_or_none(context: lc.Context) -> np.ndarray | None:
    try:
        return context.logits(-1)
    except IndexError:
        return None


def keep(model: lc.Model, scenario: Scenario) -> dict[str, Any]:
    """What was completed stays; the rest, done later, gives the bits of the call that nobody cancelled."""
    sweep = Sweep(model, scenario.params, scenario.past)
    rows = scenario.rows()
    with sweep.context() as twin:
        expected, expected_next = by_row(twin, rows, decode(twin, rows)), one_more(twin)
    polls = sweep.polls_of(rows)

    for n, k in enumerate(some(polls, scenario.cancels / 4)):
        with sweep.context() as context:
            left = rows
            got: dict[Any, np.ndarray] = {}
            step = k
            for _ in range(64):
                before, held_before = outputs_or_none(context), holds(context)
                error = sweep.decode_until(step, context, left, on_cancel="keep")
                if error is None:
                    break
                sweep.cancels += 1
                sweep.rows_done.add(len(rows) - len(left) + error.rows_done)
                said = {seq: outcome.end - 1 for seq, outcome in error.sequences.items()}
                held = holds(context)
                sweep.expect(
                    all(held[seq][1] == (end if end >= 0 else -1) for seq, end in said.items()),
                    f"poll {k}: holds {held}, says it holds up to {said}",
                )
                # A sliding window may lose what has left it to any sequence that needs the room.
                others = [seq for seq in held if seq not in said]
                sweep.expect(
                    all(
                        held[seq][1] == held_before[seq][1] and (held[seq][0] == held_before[seq][0] or model.n_swa)
                        for seq in others
                    ),
                    f"poll {k}: sequences that were not in the batch hold {held}, held {held_before}",
                )
                sweep.expect(
                    all(outcome.state == "kept" for outcome in error.sequences.values()),
                    f"poll {k}: says {error.sequences}",
                )
                done, left_now = split(left, error)
                sweep.expect(len(done) == error.rows_done, f"poll {k}: {len(done)} rows, says {error.rows_done}")
                if done:
                    for row, key in zip(rows_of(left, error), done, strict=True):
                        if left.logits[row]:
                            got[key] = context.logits(row)
                else:
                    after = outputs_or_none(context)
                    sweep.expect(
                        (before is None) == (after is None) and (before is None or same_bits(before, after)),
                        f"poll {k}: nothing done, yet the logits of the call before are others",
                    )
                    step *= 2
                if left_now is None:
                    left = None
                    break
                left = left_now
                if n % 3:
                    step = NEVER  # cancelled once; the rest in one go
            if left is not None:
                got.update(by_row(context, left, outputs(context, left)))
            same = [key for key in expected if key in got and same_bits(got[key], expected[key])]
            what = f"{len(same)} rows of {len(expected)} have the same bits"
            sweep.expect(len(same) == len(expected), f"poll {k}: {what}")
            sweep.expect(same_bits(one_more(context), expected_next), f"poll {k}: the token after, other bits")
    return sweep.report(polls=polls)


def key_of(rows: lc.Batch, row: int) -> tuple[Any, ...]:
    return (int(rows.positions[row]), *rows.seq_ids(row))


def by_row(context: lc.Context, rows: lc.Batch, values: np.ndarray) -> dict[Any, np.ndarray]:
    return {key_of(rows, int(row)): value for row, value in zip(np.flatnonzero(rows.logits), values, strict=True)}


def rows_of(rows: lc.Batch, error: lc.DecodeCancelled) -> list[int]:
    positions = rows.positions
    return [row for row in range(len(rows)) if positions[row] < error.sequences[rows.seq_ids(row)[0]].end]


def split(rows: lc.Batch, error: lc.DecodeCancelled) -> tuple[list[Any], lc.Batch | None]:
    """Keys of the rows that were done, and a batch of those that were not."""
    done = set(rows_of(rows, error))
    ids, positions, wanted = rows.tokens, rows.positions, rows.logits
    rest = lc.Batch(len(rows), n_seq_max=8)
    for row in range(len(rows)):
        if row not in done:
            rest.add(ids[row], int(positions[row]), rows.seq_ids(row), bool(wanted[row]))
    return [key_of(rows, row) for row in sorted(done)], rest if len(rest) else None


def neighbour(model: lc.Model, name: str, on_cancel: str) -> dict[str, Any]:
    """The one goes on, whenever the other is cancelled; what the context holds of the other is what it says."""
    past, mine, other, params, _ = SHARED[name]
    sweep = Sweep(model, params, past)
    rows = batch(*mine, *other)
    (mine_seq,), (other_seq,) = {part[2] for part in mine}, {part[2] for part in other}
    with sweep.context() as context:
        at_first = holds(context)
        given = {other_seq: far()}
        polls = readings_of(lambda: context.decode(rows, given))

    twins: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def twin_of(kept: int) -> tuple[np.ndarray, np.ndarray]:
        if kept not in twins:
            with sweep.context() as twin:
                alone = decode(twin, batch(*mine))
                if kept:
                    decode(twin, batch((other[0][0][:kept], other[0][1], other_seq)))
                twins[kept] = alone, one_more(twin)
        return twins[kept]

    worst = 0.0
    for k in some(polls, 6):
        with sweep.context() as context:
            token = far()
            try:
                with deadline_at(k):
                    result = context.decode(rows, {other_seq: token}, on_cancel=on_cancel)
            except lc.DecodeCancelled as error:
                sweep.expect(False, f"poll {k}: the whole call was cancelled: {error}")
                continue
            outcome = result.sequences[other_seq]
            sweep.expect(context.dirty_sequences == [], f"poll {k}: dirty {context.dirty_sequences}")
            if outcome.state == "dirty":
                continue
            if not outcome.cancelled:
                sweep.expect(k > polls - 400, f"poll {k} of {polls}: never cancelled")
                continue
            sweep.cancels += 1
            sweep.rows_done.add(outcome.end - outcome.start)
            sweep.expect(result.survivors == [mine_seq], f"poll {k}: survivors {result.survivors}")
            state = "rolled_back" if on_cancel == "rollback" else "kept"
            sweep.expect(outcome.state == state, f"poll {k}: {outcome}")
            held = holds(context)
            sweep.expect(held[other_seq][1] == outcome.end - 1, f"poll {k}: holds {held}, says {outcome}")
            if on_cancel == "rollback":
                first, last = at_first[other_seq]
                # What had left the window may be gone.
                least = max(first, last + 2 - model.n_swa) if model.n_swa else first
                sweep.expect(
                    first <= held[other_seq][0] <= least and held[other_seq][1] == last,
                    f"poll {k}: holds {held}, held {at_first}",
                )
            kept = outcome.end - (at_first[other_seq][1] + 1)
            alone, after = twin_of(kept)
            n_mine = len(batch(*mine))
            values = np.stack([context.logits(row) for row in range(n_mine)])
            for what, a, b in (("outputs", values, alone), ("token after", one_more(context), after)):
                if a.shape != b.shape:
                    sweep.expect(False, f"poll {k}: {what}: {a.shape} for {b.shape}")
                    continue
                worst = max(worst, float(np.abs(a - b).max(initial=0)))
                sweep.expect(close(a, b), f"poll {k}: {what} off by {np.abs(a - b).max()}")
    return sweep.report(polls=polls, worst=worst)


def load_state(model: lc.Model, into: str) -> dict[str, Any]:
    """A load of a state that is cancelled changes nothing."""
    sweep = Sweep(model, {"n_seq_max": 3}, _copied if into == "a copy" else _four_of_three)
    seq = {"an empty sequence": 2, "a sequence": 1, "a copy": 1}[into]
    with sweep.context() as source:
        more = holds(source)[0][1] + 1
        decode(source, batch((tokens(20, 60), more, 0)))
        data = source.state.save(0)

    def prepared() -> lc.Context:
        context = sweep.context()
        if into == "an empty sequence":
            context.memory.remove(2)
        return context

    with prepared() as twin:
        at_first = holds(twin)
        expected = one_more(twin)
        token = far()
        polls = readings_of(lambda: twin.state.load(seq, data, token))
    for k in some(polls, 12):
        with prepared() as context:
            token = far()
            try:
                with deadline_at(k):
                    context.state.load(seq, data, token)
            except lc.DeadlineExceeded:
                sweep.cancels += 1
            else:
                # Past the point of no return a load runs to its end.
                sweep.expect(holds(context)[seq][1] == more + 19, f"poll {k}: neither cancelled nor loaded")
                continue
            sweep.expect(holds(context) == at_first, f"poll {k}: holds {holds(context)}, held {at_first}")
            sweep.expect(context.dirty_sequences == [], f"poll {k}: dirty {context.dirty_sequences}")
            if holds(context).keys() == at_first.keys():
                sweep.expect(same_bits(one_more(context), expected), f"poll {k}: other bits")
    return sweep.report(polls=polls)


def _four_of_three(context: lc.Context) -> None:
    fill(context, batch(*((tokens(20 + 4 * seq, seq), 0, seq) for seq in range(3))))


def main(arch: str) -> None:
    model = load(cached_model(arch, "tiny"))

    def tell(kind: str, name: str, work: Callable[[], dict[str, Any]]) -> None:
        try:
            told = work()
        except Exception:
            told = {"problems": [traceback.format_exc()]}
        print(json.dumps({"kind": kind, "name": name, **told}), flush=True)

    def all_of_it() -> None:
        for name, scenario in SCENARIOS.items():
            if arch in scenario.archs:
                tell("rollback", name, lambda scenario=scenario: rollback(model, scenario))
                tell("keep", name, lambda scenario=scenario: keep(model, scenario))
        for name in LOADS if arch in ALL else ():
            tell("load", name, lambda name=name: load_state(model, name))
        for name, shared in SHARED.items():
            if arch in shared[-1]:
                for on_cancel in ("rollback", "keep"):
                    tell(
                        f"neighbour-{on_cancel}",
                        name,
                        lambda name=name, on_cancel=on_cancel: neighbour(model, name, on_cancel),
                    )

    # Off the main thread, where the look for Ctrl-C reads the clock as well.
    worker = threading.Thread(target=all_of_it)
    worker.start()
    worker.join()
    model.close()


if __name__ == "__main__":
    main(sys.argv[1])
