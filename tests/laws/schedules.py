"""Random schedules of everything that a context can do, cancels included, against a twin that sees no cancel.

The twin is given only what took effect, and both must hold the same to the bit. A shared batch that was cancelled in
part may lay the cells of those who stay out differently: from there on, logits agree up to rounding, until both
contexts are cleared. What a cancelled sequence holds is compared to the bit all the same, through its saved state.

A program: `python -m tests.laws.schedules`, which `make soak` runs. A schedule is told by its model and its seed, and
is the same each time: cancels come at a counted look at the token (`clock.py`), on a thread of its own, where nothing
looks for Ctrl-C.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import multiprocessing
import os
import random
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import llamacancel as lc
from llamacancel.commands.make_model import cached_model
from tests.device import CONTEXT, load

from .clock import Clock, deadline_at, readings_of
from .words import close, far, holds, one_more, outputs, same_bits

ARCHS = ("llama", "moe", "positions", "swa", "mamba", "hybrid", "hybrid-conv", "hybrid-swa")
N_SEQ = 4
AHEAD = 100.0  # seconds by which each look is ahead of the one before, where several tokens have looks of their own

PARAMS: dict[str, list[dict[str, Any]]] = {
    "llama": [{}, {}, {"kv_unified": False}, {"flash_attn": False}, {"type_k": "q8_0", "type_v": "q8_0"}],
    "swa": [{}, {}, {"kv_unified": False}, {"flash_attn": False}, {"swa_full": True}],
    "mamba": [{}],
    "hybrid": [{}, {}, {"kv_unified": False}],
}
ALIKE = {"moe": "llama", "positions": "llama", "hybrid-conv": "hybrid", "hybrid-swa": "swa"}  # what they are made with


def _removed(context: lc.Context, seq: int, first: int) -> bool:
    """Removes what a sequence holds from a position on, if that can be."""
    try:
        context.memory.remove(seq, first)
    except ValueError:
        return False
    return True


@dataclass
class Counts:
    """What schedules came to: cancels that were honoured, by what was asked for, and the schedules that failed."""

    cancels: Counter[str] = field(default_factory=Counter)
    schedules: int = 0
    failures: list[tuple[str, int, str]] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        self.cancels += other.cancels
        self.schedules += other.schedules
        self.failures += other.failures


class Schedule:
    """One context, its twin, and what happens to both."""

    def __init__(self, model: lc.Model, arch: str, seed: int, counts: Counts) -> None:
        self.random = random.Random(f"{arch} {seed}")
        self.counts = counts
        self.exact = True
        self.looks_per_row = 200.0
        params = self.random.choice(PARAMS[ALIKE.get(arch, arch)])
        made = {"n_ctx": self.random.choice([64, 128, 256]) * (1 if params.get("kv_unified", True) else N_SEQ),
                "n_ubatch": self.random.choice([2, 4, 8, 16]), "n_batch": 64, "n_seq_max": N_SEQ, "n_threads": 1,
                **CONTEXT, **params}  # fmt: skip
        self.slides = bool(model.n_swa)
        self.shares = params.get("kv_unified", True) and arch != "mamba"
        self.made = made
        self.model = model

    def run(self) -> None:
        with self.model.context(**self.made) as self.context, self.model.context(**self.made) as self.twin:
            for _ in range(self.random.randint(6, 24)):
                self.random.choices(
                    [self.whole, self.kept, self.shared, self.abandoned, self.remove, self.copy, self.keep, self.clear,
                     self.reload],
                    [5, 3, 6, 2, 4, 2, 0.5, 0.3, 2])[0]()  # fmt: skip
                self.same_ends()
            self.next_tokens()

    # -- what both must agree in

    def agree(self, a: np.ndarray, b: np.ndarray) -> None:
        assert a.shape == b.shape
        assert same_bits(a, b) if self.exact else close(a, b), f"logits are off by {np.abs(a - b).max()}"

    def same_ends(self) -> None:
        mine, expected = holds(self.context), holds(self.twin)
        if self.exact:
            assert mine == expected
        assert [last for _, last in mine.values()] == [last for _, last in expected.values()]
        assert self.context.dirty_sequences == []

    def next_tokens(self) -> None:
        """One more token of everybody, which tells of all that a context holds."""
        mine, expected = self.tried(self.context, one_more), self.tried(self.twin, one_more)
        if mine is None or expected is None:
            assert mine is expected or not self.exact
        else:
            self.agree(mine, expected)

    def tried(self, context: lc.Context, act: Callable[[lc.Context], np.ndarray]) -> np.ndarray | None:
        """What it comes to; None if there is no room."""
        try:
            return act(context)
        except lc.MemoryFullError:
            return None

    def states(self, context: lc.Context) -> dict[int, bytes]:
        return {seq: context.state.save(seq) for seq, (_, last) in holds(context).items() if last >= 0}

    def start_again(self) -> None:
        for each in (self.context, self.twin):
            each.memory.clear()
        self.exact = True

    def differs(self) -> None:
        """From here on the two may be laid out differently. Mostly they are compared once more, and cleared."""
        self.exact = False
        self.same_ends()
        if self.random.random() < 0.6:
            self.next_tokens()
            self.start_again()

    # -- batches

    def tokens(self, n: int) -> np.ndarray:
        return np.random.default_rng(self.random.getrandbits(32)).integers(300, 30000, n).astype(np.int32)

    def rows(self) -> lc.Batch:
        """The next tokens of some sequences, part after part or woven; some rows belong to two sequences."""
        chance, held = self.random, holds(self.twin)
        seqs = chance.sample(range(N_SEQ), chance.choice([1, 1, 2, 2, 3, 4]))
        most = chance.choice([1, 3, 12, 64 // len(seqs)])
        parts: list[tuple[Any, int, list[int]]] = []
        while seqs:
            seq = seqs.pop()
            twins = [other for other in seqs if self.shares and self.same_content(seq, other)]
            both = bool(twins) and chance.random() < 0.3
            if both:
                seqs.remove(twins[0])
            ids = self.tokens(chance.randint(1, most))
            parts.append((ids, held[seq][1] + 1, [seq, twins[0]] if both else [seq]))
        queues = [[(token, pos + i, ids) for i, token in enumerate(tokens)] for tokens, pos, ids in parts]
        weave = chance.random() < 0.5
        rows = lc.Batch(64, n_seq_max=N_SEQ)
        while queues:
            queue = chance.choice(queues) if weave else queues[0]
            token, pos, ids = queue.pop(0)
            rows.add(token, pos, ids, not queue or chance.random() < 0.1)
            queues = [each for each in queues if each]
        return rows

    def same_content(self, seq: int, other: int) -> bool:
        held = holds(self.context)
        return held[seq] == held[other] and (
            held[seq][1] < 0 or self.context.state.save(seq) == self.context.state.save(other))  # fmt: skip

    def part(self, rows: lc.Batch, wanted: Callable[[int], list[int]]) -> tuple[list[int], lc.Batch]:
        """Those rows for which some sequences are wanted, and a batch of them that belong to these alone."""
        chosen, result = [], lc.Batch(64, n_seq_max=N_SEQ)
        for row in range(len(rows)):
            if ids := wanted(row):
                chosen.append(row)
                result.add(rows.tokens[row], int(rows.positions[row]), ids, bool(rows.logits[row]))
        return chosen, result

    # -- cancels

    def twin_decodes(self, rows: lc.Batch) -> tuple[np.ndarray, int] | None:
        """Its logits, and how often such a call looks at its token; None if it has no room."""
        token = far()
        try:
            looks = readings_of(lambda: self.twin.decode(rows, token))
        except lc.MemoryFullError:
            return None
        self.looks_per_row = looks / len(rows)
        return outputs(self.twin, rows), looks

    def cancelled(self, rows: lc.Batch, look: int, on_cancel: Any = "rollback") -> lc.DecodeCancelled | None:
        token = far()
        try:
            with deadline_at(look):
                self.context.decode(rows, token, on_cancel=on_cancel)
        except lc.DeadlineExceeded as error:
            self.counts.cancels[on_cancel] += 1
            return error
        return None

    def full(self, rows: lc.Batch) -> None:
        """The twin had no room: neither has the context, and it is as before."""
        before = holds(self.context)
        try:
            self.context.decode(rows)
        except lc.MemoryFullError:
            assert holds(self.context) == before
        else:
            assert not self.exact, "there was room for what the twin had none for"
            self.start_again()

    def leaves_no_trace(self, act: Callable[[], bool]) -> bool:
        """Whether it was cancelled, and then the context is as before."""
        deep = self.random.random() < 0.3
        before, held = self.states(self.context) if deep else {}, holds(self.context)
        cancelled = act()
        if cancelled:
            assert holds(self.context) == held
            assert self.context.dirty_sequences == []
            assert not deep or self.states(self.context) == before, "a state is another than before"
        return cancelled

    def whole(self) -> None:
        """A call that is cancelled, and cancelled again, and done."""
        rows = self.rows()
        told = self.twin_decodes(rows)
        if told is None:
            return self.full(rows)
        expected, looks = told
        for _ in range(self.random.choice([1, 1, 2, 4])):
            look = self.random.randint(1, looks)
            try:
                if not self.leaves_no_trace(lambda look=look: self.cancelled(rows, look) is not None):
                    assert not self.exact or look > looks - 8, f"not cancelled at look {look} of {looks}"
                    return self.agree(outputs(self.context, rows), expected)
            except lc.MemoryFullError:
                assert not self.exact
                return self.start_again()
        self.context.decode(rows)
        return self.agree(outputs(self.context, rows), expected)

    def kept(self) -> None:
        """A call that is cancelled and resumed until it is through."""
        rows = self.rows()
        told = self.twin_decodes(rows)
        if told is None:
            return self.full(rows)
        expected, looks = told
        got: dict[int, np.ndarray] = {}
        left, batch_left, most = list(range(len(rows))), rows, looks
        while left:
            try:
                error = self.cancelled(batch_left, self.random.randint(1, most), "keep")
            except lc.MemoryFullError:
                assert not self.exact
                return self.start_again()
            ends = {} if error is None else {seq: outcome.end for seq, outcome in error.sequences.items()}
            done = [i for i, row in enumerate(left)
                    if error is None or rows.positions[row] < ends[rows.seq_ids(row)[0]]]  # fmt: skip
            for i in done:
                if rows.logits[left[i]]:
                    got[left[i]] = self.context.logits(i)
            most = most if done else 2 * most
            left = [row for i, row in enumerate(left) if i not in set(done)]
            rest = set(left)
            _, batch_left = self.part(rows, lambda row, rest=rest: rows.seq_ids(row) if row in rest else [])
        self.agree(np.stack([got[row] for row in sorted(got)]), expected)
        return None

    def abandoned(self) -> None:
        """A call that is cancelled and never done, or that was through before."""
        rows = self.rows()
        look = self.random.randint(1, max(1, int(self.looks_per_row * len(rows))))
        on_cancel = self.random.choice(["rollback", "keep"])
        before = holds(self.context)
        try:
            error = self.cancelled(rows, look, on_cancel)
        except lc.MemoryFullError:
            assert holds(self.context) == before
            return
        if error is None:
            self.catch_up(rows, lambda row: rows.seq_ids(row))
        elif error.rows_done:
            assert on_cancel == "keep"
            ends = {seq: outcome.end for seq, outcome in error.sequences.items()}
            self.exact = False  # the twin may cut what was done in another way
            self.catch_up(rows, lambda row: [seq for seq in rows.seq_ids(row) if rows.positions[row] < ends[seq]])
            self.differs()
        elif on_cancel == "rollback":
            assert holds(self.context) == before

    def catch_up(self, rows: lc.Batch, wanted: Callable[[int], list[int]]) -> None:
        """The twin decodes what the context has decoded."""
        chosen, kept = self.part(rows, wanted)
        if not chosen:
            return
        try:
            self.twin.decode(kept)
        except lc.MemoryFullError:
            assert not self.exact
            return self.start_again()
        with_logits = [row for row in chosen if rows.logits[row]]
        if with_logits:
            self.agree(np.stack([self.context.logits(row) for row in with_logits]), outputs(self.twin, kept))
        return None

    def shared(self) -> None:
        """A batch whose sequences have tokens of their own, which are cancelled at looks of their own."""
        chance = self.random
        rows = self.rows()
        looks = max(2, int(self.looks_per_row * len(rows)))
        on_cancel: Any = chance.choice(["rollback", "rollback", "keep"])
        when_shared: Any = chance.choice(["finish", "finish", "stop"])
        seqs = sorted(starts_of(rows))
        told_off = chance.sample(seqs, chance.randint(1, len(seqs)))
        # Where somebody has no token, nobody looks within a ubatch: then there are few looks.
        tokens = {seq: lc.CancelToken(timeout=AHEAD * chance.randint(0, chance.choice([12, looks])))
                  for seq in told_off}  # fmt: skip
        before, held = self.states(self.context), holds(self.context)
        try:
            with Clock(step=AHEAD):
                told = self.context.decode(rows, tokens, on_cancel=on_cancel, when_shared=when_shared)
        except lc.MemoryFullError:
            assert holds(self.context) == held
            return
        except lc.DecodeCancelled as error:
            self.counts.cancels[f"all, {on_cancel}"] += 1
            ends = {seq: outcome.end for seq, outcome in error.sequences.items()}
            if on_cancel == "rollback":
                assert (holds(self.context), self.states(self.context)) == (held, before)
                return
        else:
            ends = {seq: outcome.end for seq, outcome in told.sequences.items()}
            gone = [seq for seq in told.sequences if seq not in told.survivors]
            self.counts.cancels[f"some, {on_cancel}"] += len(gone)
            for seq in gone if on_cancel == "rollback" else ():
                self.as_before(seq, held[seq], before.get(seq))
            if not gone:
                return self.catch_up(rows, lambda row: rows.seq_ids(row))
        self.exact = False
        self.catch_up(rows, lambda row: [seq for seq in rows.seq_ids(row) if rows.positions[row] < ends[seq]])
        return self.differs()

    def as_before(self, seq: int, held: tuple[int, int], state: bytes | None) -> None:
        """A sequence was put back beside others: all that a next token looks at is there, to the bit."""
        first, last = holds(self.context)[seq]
        assert last == held[1]
        assert held[0] <= first <= max(held[0], last + 2 - self.model.n_swa if self.slides else held[0])
        if state is not None and first == held[0]:
            now = self.context.state.save(seq)
            if self.slides and len(now) < len(state):  # a hybrid's first position tells nothing of lost cells
                assert same_bits(self.going_on(now), self.going_on(state))
            else:
                assert now == state, f"the state of sequence {seq} is another than before"

    def going_on(self, state: bytes) -> np.ndarray:
        """Logits of three tokens more behind a sequence's state."""
        with self.model.context(**{**self.made, "n_ctx": 2 * self.made["n_ctx"]}) as fresh:
            fresh.state.load(0, state)
            return np.concatenate([one_more(fresh) for _ in range(3)])

    # -- everything else

    def both(self, act: Callable[[lc.Context], Any]) -> None:
        results = [act(self.context), act(self.twin)]
        if results[0] != results[1]:
            assert not self.exact
            self.start_again()  # the one could not remove a part: what lies outside of a window may differ

    def remove(self) -> None:
        seq, share = self.random.randrange(N_SEQ), self.random.choice([0.0, 0.0, 0.5, 0.9])
        first = int(share * (holds(self.twin)[seq][1] + 1))
        self.both(lambda each: _removed(each, seq, first))

    def copy(self) -> None:
        src, dst = self.random.sample(range(N_SEQ), 2)
        if holds(self.twin)[src][1] >= 0:
            self.both(lambda each: each.memory.remove(dst))
            self.both(lambda each: each.memory.copy(src, dst))

    def keep(self) -> None:
        seq = self.random.randrange(N_SEQ)
        self.both(lambda each: each.memory.keep(seq))

    def clear(self) -> None:
        self.start_again()

    def reload(self) -> None:
        """Loads a sequence's state into another, after loads that are cancelled."""
        src, dst = self.random.choices(range(N_SEQ), k=2)
        if holds(self.twin)[src][1] < 0:
            return
        data = self.context.state.save(src)
        if self.exact:
            assert self.twin.state.save(src) == data
        for _ in range(2):
            look = self.random.randint(1, 12)
            if not self.leaves_no_trace(lambda look=look: self.load_cancelled(dst, data, look)):
                break
        self.both(lambda each: self.takes_state(each, dst, data))

    def load_cancelled(self, dst: int, data: bytes, look: int) -> bool:
        token = far()
        try:
            with deadline_at(look):
                self.context.state.load(dst, data, token)
        except lc.DeadlineExceeded:
            self.counts.cancels["load"] += 1
            return True
        except lc.StateError:  # no room
            pass
        return False

    def takes_state(self, context: lc.Context, dst: int, data: bytes) -> bool:
        try:
            context.state.load(dst, data)
        except lc.StateError:  # no room
            return False
        return True


def starts_of(rows: lc.Batch) -> dict[int, int]:
    """The first position of each sequence in a batch."""
    starts: dict[int, int] = {}
    for row in range(len(rows)):
        for seq in rows.seq_ids(row):
            starts.setdefault(seq, int(rows.positions[row]))
    return starts


# ---- many of them ------------------------------------------------------------------------------------------------


def run_one(model: lc.Model, arch: str, seed: int, counts: Counts) -> None:
    """Runs a schedule on a thread of its own; what goes wrong is noted."""

    def work() -> None:
        try:
            Schedule(model, arch, seed, counts).run()
        except BaseException:
            counts.failures.append((arch, seed, traceback.format_exc()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    counts.schedules += 1


@functools.cache
def _model(arch: str) -> lc.Model:
    return load(cached_model(arch, "tiny"))


def run_some(arch: str, first: int, n: int) -> tuple[str, Counts]:
    """Runs `n` schedules from a seed on; the kind of their memory, and what they came to."""
    counts = Counts()
    for seed in range(first, first + n):
        run_one(_model(arch), arch, seed, counts)
    return _model(arch).memory_kind, counts


def soak(archs: list[str], seconds: float, cancels: int, seed: int, jobs: int, n: int = 20) -> dict[str, Counts]:
    """Runs schedules of all architectures by turns until each kind of memory has had so many cancels, or time is up."""
    end = time.monotonic() + seconds
    told: dict[str, Counts] = {}
    kinds: dict[str, str] = {}
    next_seed = dict.fromkeys(archs, seed)

    def behind() -> str | None:
        """The architecture that has had the fewest schedules of those whose kind lacks cancels."""
        lacking = [arch for arch in archs if arch not in kinds or told[kinds[arch]].cancels.total() < cancels]
        return min(lacking, key=lambda arch: next_seed[arch]) if lacking and time.monotonic() < end else None

    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        running: dict[concurrent.futures.Future[tuple[str, Counts]], str] = {}
        while True:
            while len(running) < jobs and (arch := behind()) is not None:
                running[pool.submit(run_some, arch, next_seed[arch], n)] = arch
                next_seed[arch] += n
            if not running:
                return told
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                arch = running.pop(future)
                kind, counts = future.result()
                kinds[arch] = kind
                told.setdefault(kind, Counts()).add(counts)
                for arch, failed, why in counts.failures:
                    print(f"FAILED {arch} {failed}\n{why}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.laws.schedules", description=__doc__)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no schedule after so long")
    parser.add_argument("--cancels", type=int, default=sys.maxsize, help="end when each kind of memory has had so many")
    parser.add_argument("--archs", nargs="+", default=list(ARCHS), choices=ARCHS)
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.seconds == float("inf") and args.cancels == sys.maxsize:
        parser.error("--seconds or --cancels tells when to end")
    told = soak(args.archs, args.seconds, args.cancels, args.seed, args.jobs)
    for kind, counts in sorted(told.items()):
        how = ", ".join(f"{n} {name}" for name, n in sorted(counts.cancels.items()))
        print(
            f"{kind}: {counts.cancels.total()} cancels in {counts.schedules} schedules ({how}), "
            f"{len(counts.failures)} failed"
        )
    failed = [(arch, seed) for counts in told.values() for arch, seed, _ in counts.failures]
    print(f"{sum(counts.cancels.total() for counts in told.values())} cancels; failed: {failed}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
