"""Random schedules of everything that a context can do, cancels included, against a twin that sees no cancel.

The twin is given only what took effect. As long as no shared batch was cancelled in part, both must hold the same
to the bit; after that, the cells may lie elsewhere, and the logits must agree up to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

import llamacancel as lc
from tests.conftest import GENERATIVE
from tests.device import CONTEXT

from .clock import Clock
from .words import batch, close, decode, holds, one_more, outputs, same_bits, woven

pytestmark = pytest.mark.timeout(1800)  # on a slow and busy machine

N_SEQ = 3
EXAMPLES = int(os.environ.get("LLAMACANCEL_EXAMPLES", "50"))

seqs = st.integers(0, N_SEQ - 1)
lengths = st.integers(1, 40)
moments = st.integers(0, 1200)  # the reading of the clock at which a deadline has passed; 0: before the start
AHEAD = 100.0  # seconds by which each reading is ahead of the one before


@dataclass(frozen=True)
class Decode:
    """A batch of some sequences' next tokens."""

    parts: list[tuple[int, int]]  # sequence, rows
    seed: int
    weave: bool
    on_cancel: str
    when_shared: str
    whole: int | None  # when one token for all is cancelled
    each: dict[int, int] = field(default_factory=dict)  # when tokens of single sequences are


@dataclass(frozen=True)
class Remove:
    seq: int
    share: float  # of the positions that stay


@dataclass(frozen=True)
class Copy:
    src: int
    dst: int


@dataclass(frozen=True)
class Keep:
    seq: int


@dataclass(frozen=True)
class Clear:
    pass


@dataclass(frozen=True)
class Reload:
    """Saves a sequence's state and loads it into another."""

    src: int
    dst: int


def decodes(shared: bool) -> st.SearchStrategy[Decode]:
    return st.builds(
        Decode,
        parts=st.lists(st.tuples(seqs, lengths), min_size=1, max_size=N_SEQ, unique_by=lambda part: part[0]),
        seed=st.integers(0, 99),
        weave=st.booleans(),
        on_cancel=st.sampled_from(["rollback", "keep"]),
        when_shared=st.sampled_from(["finish", "stop"]),
        whole=st.none() if shared else st.one_of(st.none(), moments),
        each=st.dictionaries(seqs, moments, max_size=N_SEQ) if shared else st.just({}),
    )


others = st.one_of(
    st.builds(Remove, seqs, st.sampled_from([0.0, 0.0, 0.5, 0.9])),
    st.builds(Copy, seqs, seqs),
    st.builds(Keep, seqs),
    st.builds(Clear),
    st.builds(Reload, seqs, seqs),
)


class Pair:
    """A context and its twin."""

    def __init__(self, context: lc.Context, twin: lc.Context) -> None:
        self.context, self.twin = context, twin
        self.exact = True
        self.cancels = 0

    def agree(self, a: np.ndarray, b: np.ndarray) -> None:
        assert a.shape == b.shape
        if self.exact:
            assert same_bits(a, b)
        else:
            assert close(a, b)

    def same_ends(self) -> None:
        a, b = holds(self.context), holds(self.twin)
        if self.exact:
            assert a == b
        else:
            assert {seq: last for seq, (_, last) in a.items()} == {seq: last for seq, (_, last) in b.items()}
        assert self.context.dirty_sequences == []

    def do(self, step: Any) -> None:
        if isinstance(step, Decode):
            self.decode(step)
        elif isinstance(step, Remove):
            last = holds(self.twin)[step.seq][1]
            self.both(lambda each: each.memory.remove(step.seq, int(step.share * (last + 1))))
        elif isinstance(step, Copy):
            if step.src != step.dst and holds(self.twin)[step.src][1] >= 0:
                self.both(lambda each: each.memory.remove(step.dst))
            self.both(lambda each: each.memory.copy(step.src, step.dst))
        elif isinstance(step, Keep):
            self.both(lambda each: each.memory.keep(step.seq))
        elif isinstance(step, Clear):
            self.both(lambda each: each.memory.clear())
        else:
            if holds(self.twin)[step.src][1] < 0:
                return
            self.both(lambda each: each.state.load(step.dst, each.state.save(step.src)))
        self.same_ends()

    def both(self, act: Callable[[lc.Context], Any]) -> None:
        results = [act(self.context), act(self.twin)]
        if self.exact:
            assert results[0] == results[1]
        elif results[0] != results[1]:
            # One of the two could not remove a part: what lies outside of the window may differ. Start again.
            self.context.memory.clear()
            self.twin.memory.clear()

    def decode(self, step: Decode) -> None:
        ends = {seq: last + 1 for seq, (_, last) in holds(self.twin).items()}
        rng = np.random.default_rng(step.seed)
        parts = [(rng.integers(300, 30000, n).astype(np.int32), ends[seq], seq) for seq, n in step.parts]
        rows = (woven if step.weave else batch)(*parts)
        token: Any = None
        if step.whole is not None:
            token = lc.CancelToken(timeout=step.whole * AHEAD)
        elif step.each:
            token = {seq: lc.CancelToken(timeout=moment * AHEAD) for seq, moment in step.each.items()}
        before = holds(self.context)
        try:
            with Clock(step=AHEAD):
                told = self.context.decode(rows, token, on_cancel=step.on_cancel, when_shared=step.when_shared)
        except lc.DecodeCancelled as error:
            self.cancels += 1
            for seq, outcome in error.sequences.items():
                assert outcome.end == holds(self.context)[seq][1] + 1
            if step.on_cancel == "rollback":
                assert (holds(self.context), error.rows_done) == (before, 0)  # noqa: PT017
                return
            # What was dropped before the end changed the cut of what was left.
            self.exact = self.exact and not step.each
            self.resume(rows, {seq: outcome.end for seq, outcome in error.sequences.items()})
            return
        except lc.MemoryFullError:
            with pytest.raises(lc.MemoryFullError):
                self.twin.decode(rows)
            assert holds(self.context) == before
            return
        if len(told.survivors) < len(told.sequences):
            self.cancels += 1
            self.exact = False
            self.twin_decodes({seq: outcome.end for seq, outcome in told.sequences.items()}, rows)
            return
        self.agree(outputs(self.context, rows), decode(self.twin, rows))

    def resume(self, rows: lc.Batch, ends: dict[int, int]) -> None:
        """The context does the rest; the twin all of it at once."""
        kept, rest = divide(rows, ends)
        if kept:
            values = np.stack([self.context.logits(row) for row in kept])
        try:
            expected = decode(self.twin, rows)
        except lc.MemoryFullError:
            with pytest.raises(lc.MemoryFullError):
                self.context.decode(rest)
            self.both(lambda each: each.memory.clear())
            return
        if kept:
            self.agree(values, expected[kept])
        if len(rest):
            self.agree(decode(self.context, rest), expected[[row for row in range(len(rows)) if row not in kept]])

    def twin_decodes(self, ends: dict[int, int], rows: lc.Batch) -> None:
        """The twin decodes those rows alone that the context has kept."""
        kept, _ = divide(rows, ends)
        part = lc.Batch(len(rows), n_seq_max=8)
        for row in kept:
            part.add(rows.tokens[row], int(rows.positions[row]), rows.seq_ids(row), True)
        if kept:
            values = decode(self.twin, part)
            self.agree(np.stack([self.context.logits(row) for row in kept]), values)


def divide(rows: lc.Batch, ends: dict[int, int]) -> tuple[list[int], lc.Batch]:
    """The rows that lie before their sequences' ends, and a batch of the others."""
    ids, positions = rows.tokens, rows.positions
    kept = [row for row in range(len(rows)) if positions[row] < ends[rows.seq_ids(row)[0]]]
    rest = lc.Batch(len(rows), n_seq_max=8)
    for row in sorted(set(range(len(rows))) - set(kept)):
        rest.add(ids[row], int(positions[row]), rows.seq_ids(row), True)
    return kept, rest


PARAMS = [{}, {"kv_unified": False}, {"swa_full": True}, {"flash_attn": False}]


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("shared", [False, True], ids=["whole calls", "shared batches"])
def test_a_random_schedule_leaves_what_a_schedule_without_cancels_leaves(
    arch: str, shared: bool, model_of: Callable[[str], lc.Model]
) -> None:
    model = model_of(arch)
    steps = st.lists(st.one_of(decodes(False), decodes(shared), decodes(shared), others), min_size=3, max_size=14)

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
              report_multiple_bugs=False,
              suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    @given(steps, st.sampled_from(PARAMS), st.sampled_from([4, 8, 16]), st.sampled_from([128, 512]))
    def run(steps: list[Any], params: dict[str, Any], n_ubatch: int, n_ctx: int) -> None:
        made = {"n_ctx": n_ctx, "n_ubatch": n_ubatch, "n_seq_max": N_SEQ, "n_threads": 1, **CONTEXT, **params}
        with model.context(**made) as context, model.context(**made) as twin:
            pair = Pair(context, twin)
            for step in steps:
                pair.do(step)
            try:
                last = one_more(context)
            except lc.MemoryFullError:
                with pytest.raises(lc.MemoryFullError):
                    one_more(twin)
                return
            pair.agree(last, one_more(twin))
            event(f"{pair.cancels} cancels")

    run()
