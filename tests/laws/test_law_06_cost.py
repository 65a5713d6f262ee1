"""Law 6, cost: what can be shown without a stopwatch. `benchmarks/` has the rest."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE

from .clock import FAR, Flight, in_the_middle, readings_of
from .words import NewContext, batch, decode, one_more, same_bits, tokens


def _descendant(generations: int) -> lc.CancelToken:
    token = lc.CancelToken(timeout=FAR)
    for _ in range(generations):
        token = token.child(timeout=FAR)
    return token


# ---- bits and pieces -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_token_changes_neither_the_bits_nor_how_a_call_is_cut_nor_what_is_saved(
    arch: str, new_context: NewContext
) -> None:
    given: list[Any] = [
        None, lc.CancelToken(), lc.CancelToken(timeout=FAR), _descendant(200), {}, {0: lc.CancelToken()},
        {0: lc.CancelToken(timeout=FAR), 1: lc.CancelToken()},
    ]  # fmt: skip
    for on_cancel in ("rollback", "keep"):
        seen = []
        for token in given:
            context = new_context(arch, n_ubatch=8, n_seq_max=2)
            context.decode(batch((tokens(30), 0, 0), (tokens(24, 1), 0, 1)), token, on_cancel=on_cancel)
            rows = batch((tokens(60, 2), 30, 0), (tokens(40, 3), 24, 1))
            told = context.decode(rows, token, on_cancel=on_cancel)
            bits = b"".join(context.logits(row).tobytes() for row in range(len(rows)))
            seen.append((told.n_ubatches, told.snapshot_bytes, told.rows_done, bits, one_more(context).tobytes()))
        assert all(each == seen[0] for each in seen)
        assert seen[0][0] == 13


@pytest.mark.parametrize("arch", GENERATIVE)
def test_keep_costs_no_bits(arch: str, new_context: NewContext) -> None:
    one, two = new_context(arch, n_ubatch=8), new_context(arch, n_ubatch=8)
    for turn in range(6):
        rows = batch((tokens(60, turn), 60 * turn, 0))
        assert same_bits(decode(one, rows, lc.CancelToken(), on_cancel="keep"), decode(two, rows))


@pytest.mark.parametrize("arch", ["swa", "mamba", "hybrid"])
def test_what_a_single_token_overwrites_is_copied_once_whatever_is_kept(arch: str, new_context: NewContext) -> None:
    saved = []
    for on_cancel in ("rollback", "keep"):
        context = new_context(arch, n_ctx=512, n_ubatch=64, n_seq_max=1)
        context.decode(batch((tokens(400), 0, 0)), on_cancel=on_cancel)
        saved.append(context.decode(batch(([500], 400, 0)), on_cancel=on_cancel).snapshot_bytes)
    assert saved[0] == saved[1] > 0


# ---- the GIL ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "generations"), [("llama", 0), ("swa", 0), ("mamba", 50), ("hybrid", 0), ("moe", 0)])
def test_a_call_goes_on_while_another_thread_holds_the_gil(
    arch: str, generations: int, new_context: NewContext
) -> None:
    context, twin = (new_context(arch, n_ubatch=8) for _ in range(2))
    rows = batch((tokens(120), 0, 0), logits="last")
    readings = readings_of(lambda: twin.decode(rows, _descendant(generations)))
    flight = Flight(lambda: context.decode(rows, _descendant(generations)), at=10)
    # On another thread than the main one it looks at the token half as often: not for Ctrl-C.
    assert flight.clock.hold_the_gil_until(readings * 2 // 5), "a poll waited for the GIL"
    assert flight.lands().rows_done == 120
    assert same_bits(context.logits(-1), twin.logits(-1))


@pytest.mark.parametrize("token", [None, lc.CancelToken(), _descendant(50)], ids=["none", "token", "descendant"])
def test_a_call_on_the_main_thread_goes_on_while_another_thread_holds_the_gil(
    token: lc.CancelToken | None, new_context: NewContext
) -> None:
    """Also its look for Ctrl-C does without the GIL, as long as there was no signal."""
    assert threading.current_thread() is threading.main_thread()
    context, twin = (new_context("llama", n_ubatch=8) for _ in range(2))
    rows = batch((tokens(120), 0, 0), logits="last")
    readings = readings_of(lambda: twin.decode(rows, token))
    held: list[bool] = []
    # The clock runs so fast that it is time to look for Ctrl-C at each poll.
    with in_the_middle(lambda: held.append(clock.hold_the_gil_until(readings * 9 // 10)), at=10, step=0.1) as clock:
        result = context.decode(rows, token)
    assert held == [True], "a poll waited for the GIL"
    assert result.rows_done == 120
    assert same_bits(context.logits(-1), twin.logits(-1))


# ---- snapshots -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "moe"])
@pytest.mark.parametrize("kv_unified", [True, False])
def test_plain_attention_saves_nothing(arch: str, kv_unified: bool, new_context: NewContext) -> None:
    context = new_context(arch, n_ubatch=8, n_seq_max=2, kv_unified=kv_unified)
    for turn in range(4):
        for on_cancel in ("rollback", "keep"):
            end = context.memory.pos_max(0) + 1
            rows = batch((tokens(40, turn), end, 0), (tokens(30, turn), context.memory.pos_max(1) + 1, 1))
            result = context.decode(rows, lc.CancelToken(), on_cancel=on_cancel)
            assert result.snapshot_bytes == 0
            assert result.repair_seconds == 0


@pytest.mark.parametrize("arch", ["mamba", "hybrid"])
def test_a_recurrent_state_is_saved_once_in_a_call_however_long_the_call_and_its_history(
    arch: str, new_context: NewContext
) -> None:
    context = new_context(arch, n_ubatch=8)
    sizes, pieces, end = [], [], 0
    for n in (20, 1, 8, 64, 256):
        result = context.decode(batch((tokens(n, n), end, 0), logits="last"), lc.CancelToken())
        sizes.append(result.snapshot_bytes)
        pieces.append(result.n_ubatches)
        end += n
    assert pieces == [3, 1, 1, 8, 32]
    assert sizes[0] == 0, "an empty sequence needs none"
    assert sizes[1] > 0
    assert len(set(sizes[1:])) == 1


@pytest.mark.parametrize("arch", ["mamba", "hybrid"])
def test_each_recurrent_sequence_of_a_batch_is_saved_once(arch: str, new_context: NewContext) -> None:
    context = new_context(arch, n_ubatch=8, n_seq_max=4)
    context.decode(batch(*((tokens(10, seq), 0, seq) for seq in range(4))))
    ends, one = [10] * 4, 0
    for n_seqs in (1, 2, 4):
        rows = batch(*((tokens(40, seq), ends[seq], seq) for seq in range(n_seqs)), logits="last")
        saved = context.decode(rows, lc.CancelToken()).snapshot_bytes
        one = one or saved
        assert saved == n_seqs * one > 0
        for seq in range(n_seqs):
            ends[seq] += 40


def test_the_snapshot_of_a_sliding_window_is_bounded_by_the_window_and_not_by_the_prompt(
    new_context: NewContext,
) -> None:
    context = new_context("swa", n_ubatch=8, n_ctx=4096)
    sizes: dict[int, list[int]] = {}
    end = 0
    for n in (600, 64, 256, 1024, 64, 256, 512):
        sizes.setdefault(n, []).append(
            context.decode(batch((tokens(n, end), end, 0), logits="last"), lc.CancelToken()).snapshot_bytes
        )
        end += n
    assert sizes[64][0] > 0
    whole = sizes[1024][0]
    assert all(each <= whole for group in sizes.values() for each in group)
    assert sizes[256][0] == sizes[256][1], "it grew with the history"
    assert whole <= 4 * sizes[256][0], "it grew with the rows"
    assert sizes[512][0] == whole, "it grew with the rows beyond the cache"


def test_a_full_sliding_window_cache_needs_no_snapshot(new_context: NewContext) -> None:
    context = new_context("swa", n_ubatch=8, swa_full=True)
    for turn in range(4):
        rows = batch((tokens(150, turn), 150 * turn, 0), logits="last")
        assert context.decode(rows, lc.CancelToken()).snapshot_bytes == 0
