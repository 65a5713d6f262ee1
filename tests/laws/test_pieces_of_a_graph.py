"""The laws on a device that cannot be stopped inside a graph: it is handed graphs in pieces, as GPUs are, with looks
at the token between. The CPU stands in for it, and computes each piece to its end."""

from __future__ import annotations

import numpy as np
import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE
from tests.device import GPU_LAYERS, counts_looks_of_the_cpu, holds_on_the_cpu

from .clock import FAR, deadline_at, readings_of
from .words import ModelPath, NewContext, batch, cancelled, decode, holds, same_bits, tokens

HISTORY = batch((tokens(40, seed=1), 0, 0), (tokens(30, seed=2), 0, 1))
ROWS = batch((tokens(90, seed=3), 40, 0), (tokens(60, seed=4), 30, 1))
MOST = 25  # cancels of a sweep


def device(new_context: NewContext, arch: str, n_pieces: int) -> lc.Context:
    """A context on such a device, with a history."""
    context = new_context(arch, n_ctx=512, n_ubatch=64, n_seq_max=2, _n_pieces=n_pieces)
    context.decode(HISTORY)
    return context


def moments(context: lc.Context) -> list[int]:
    """Readings of the clock, from the first to the last of a whole call, at which a deadline can pass."""
    kept = [context.state.save(seq) for seq in (0, 1)]
    last = readings_of(lambda: context.decode(ROWS, lc.CancelToken(timeout=FAR)))
    context.memory.clear()
    for seq, state in enumerate(kept):
        context.state.load(seq, state)
    return sorted({round(k) for k in np.linspace(1, last, MOST)})


@pytest.mark.parametrize("n_pieces", [1, 5])
@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_cancel_between_any_two_pieces_is_rolled_back_to_the_bit(
    arch: str, n_pieces: int, new_context: NewContext
) -> None:
    reference = decode(device(new_context, arch, n_pieces), ROWS)
    at = moments(device(new_context, arch, n_pieces))
    context = device(new_context, arch, n_pieces)
    before = holds(context)
    stopped = 0
    for k in at:
        with deadline_at(k):
            error = cancelled(context, ROWS, lc.CancelToken(timeout=FAR))
        if error is None:  # it came after the last look
            context = device(new_context, arch, n_pieces)
            continue
        stopped += 1
        assert isinstance(error, lc.DeadlineExceeded)
        assert holds(context) == before
        assert {seq: outcome.state for seq, outcome in error.sequences.items()} == {0: "rolled_back", 1: "rolled_back"}
    assert stopped > len(at) // 2
    assert same_bits(decode(context, ROWS), reference)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_what_was_completed_can_be_kept_and_gone_on_from(arch: str, new_context: NewContext) -> None:
    ids = tokens(250, seed=5)
    rows = batch((ids, 0, 0))

    def fresh() -> lc.Context:
        return new_context(arch, n_ctx=512, n_ubatch=64, _n_pieces=5)

    wanted = decode(fresh(), rows)
    counted = fresh()
    last = readings_of(lambda: counted.decode(rows, lc.CancelToken(timeout=FAR)))
    ends = set()
    for k in sorted({round(k) for k in np.linspace(1, last, 16)}):
        context = fresh()
        with deadline_at(k):
            error = cancelled(context, rows, lc.CancelToken(timeout=FAR), on_cancel="keep")
        if error is None:
            continue
        end = error.rows_done
        ends.add(end)
        assert end % 64 == 0 or end == len(rows)
        assert end == error.sequences[0].end == context.memory.pos_max(0) + 1
        if end < len(rows):
            assert same_bits(decode(context, batch((ids[end:], end, 0))), wanted[end:])
    assert 0 in ends
    assert len(ends) > 2


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("on_cancel", ["rollback", "keep"])
def test_neighbours_of_a_cancelled_sequence_keep_their_results(
    arch: str, on_cancel: str, new_context: NewContext
) -> None:
    alone = device(new_context, arch, 5)
    wanted = decode(alone, batch((tokens(60, seed=4), 30, 1)))[-1]
    for k in moments(device(new_context, arch, 5))[:: MOST // 5]:
        context = device(new_context, arch, 5)
        bob = lc.CancelToken()
        with deadline_at(k):
            result = context.decode(ROWS, {0: lc.CancelToken(timeout=FAR), 1: bob}, on_cancel=on_cancel)
        assert 1 in result.survivors
        assert context.memory.pos_max(0) + 1 == result.sequences[0].end
        assert result.sequences[1].state == "completed"
        survivor = context.logits(len(ROWS) - 1)
        assert np.sqrt(np.mean((survivor - wanted) ** 2)) < 0.5


@holds_on_the_cpu
@pytest.mark.parametrize("arch", GENERATIVE)
def test_pieces_do_not_change_the_bits(arch: str, new_context: NewContext) -> None:
    whole = new_context(arch, n_ctx=512, n_ubatch=64, n_seq_max=2, _n_pieces=None)
    whole.decode(HISTORY)
    wanted = decode(whole, ROWS)
    for n_pieces in (1, 3, 10_000):
        assert same_bits(decode(device(new_context, arch, n_pieces), ROWS), wanted)


@counts_looks_of_the_cpu
def test_a_plan_tells_of_the_pieces_and_the_cpu_needs_none(new_context: NewContext) -> None:
    assert new_context("llama").latency_plan.n_pieces == 0
    assert new_context("llama", _n_pieces=7).latency_plan.n_pieces == 7


@pytest.mark.skipif(GPU_LAYERS == 0, reason="it takes a device")
def test_a_device_that_only_helps_the_cpu_is_measured_as_one_that_has_layers(model_path: ModelPath) -> None:
    with lc.Model.load(model_path("llama"), n_gpu_layers=0) as model, model.context(n_ctx=256, n_ubatch=64) as context:
        assert context.latency_plan.node_seconds is not None
