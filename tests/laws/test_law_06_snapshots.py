"""Law 6, cost: what is saved for a rollback, into how many pieces a call is cut, and what a poll does without."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE

from .test_law_05_in_the_middle import hold_the_gil, wait_until_busy
from .words import batch, decode, one_more, same_bits, tokens

NewContext = Callable[..., lc.Context]


def _descendant(generations: int) -> lc.CancelToken:
    token = lc.CancelToken(timeout=1000)
    for _ in range(generations):
        token = token.child(timeout=1000)
    return token


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("on_cancel", ["rollback", "keep"])
def test_a_token_does_not_change_how_a_call_is_cut_nor_what_is_saved(
    arch: str, on_cancel: str, new_context: NewContext
) -> None:
    seen = []
    for token in (None, lc.CancelToken(), lc.CancelToken(timeout=1000), _descendant(200)):
        context = new_context(arch, n_ubatch=8)
        context.decode(batch((tokens(30), 0, 0)), token, on_cancel=on_cancel)
        rows = batch((tokens(100, 1), 30, 0))
        result = context.decode(rows, token, on_cancel=on_cancel)
        values = [context.logits(row).tobytes() for row in range(len(rows))]
        seen.append((result.n_ubatches, result.snapshot_bytes, result.rows_done, values, one_more(context).tobytes()))
    assert all(each == seen[0] for each in seen)
    assert seen[0][0] == 13


@pytest.mark.parametrize("arch", ["llama", "moe"])
@pytest.mark.parametrize("kv_unified", [True, False])
def test_plain_attention_saves_nothing(arch: str, kv_unified: bool, new_context: NewContext) -> None:
    context = new_context(arch, n_ubatch=8, n_seq_max=2, kv_unified=kv_unified)
    for turn in range(5):
        for on_cancel in ("rollback", "keep"):
            end = context.memory.pos_max(0) + 1
            rows = batch((tokens(40, turn), end, 0), (tokens(30, turn), context.memory.pos_max(1) + 1, 1))
            assert context.decode(rows, lc.CancelToken(), on_cancel=on_cancel).snapshot_bytes == 0


@pytest.mark.parametrize("arch", ["mamba", "hybrid"])
def test_a_recurrent_state_is_saved_once_in_a_call_however_many_pieces_it_has(
    arch: str, new_context: NewContext
) -> None:
    context = new_context(arch, n_ubatch=8)
    context.decode(batch((tokens(20), 0, 0)))
    sizes, pieces, end = [], [], 20
    for n in (1, 8, 64, 256):
        result = context.decode(batch((tokens(n, n), end, 0), logits="last"), lc.CancelToken())
        sizes.append(result.snapshot_bytes)
        pieces.append(result.n_ubatches)
        end += n
    assert pieces == [1, 1, 8, 32]
    assert sizes[0] > 0
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("arch", ["mamba", "hybrid"])
def test_each_recurrent_sequence_of_a_batch_is_saved_once(arch: str, new_context: NewContext) -> None:
    context = new_context(arch, n_ubatch=8, n_seq_max=4)
    context.decode(batch(*((tokens(10, seq), 0, seq) for seq in range(4))))
    ends, one = [10] * 4, 0
    for n_seqs in (1, 2, 4):
        rows = batch(*((tokens(40, seq), ends[seq], seq) for seq in range(n_seqs)), logits="last")
        saved = context.decode(rows, lc.CancelToken()).snapshot_bytes
        one = one or saved
        assert saved == n_seqs * one
        for seq in range(n_seqs):
            ends[seq] += 40


def test_the_snapshot_of_a_sliding_window_is_bounded_by_the_window_and_not_by_the_prompt(
    new_context: NewContext,
) -> None:
    context = new_context("swa", n_ubatch=8, n_ctx=4096)
    sizes, end = {}, 0
    for n in (600, 64, 256, 1024, 64, 256, 512):
        sizes.setdefault(n, []).append(
            context.decode(batch((tokens(n, end), end, 0), logits="last"), lc.CancelToken()).snapshot_bytes)
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


@pytest.mark.parametrize(("arch", "generations"), [("llama", None), ("swa", 0), ("mamba", 50), ("hybrid", 0)])
def test_a_call_goes_on_to_its_end_while_another_thread_holds_the_gil(
    arch: str, generations: int | None, new_context: NewContext
) -> None:
    context, twin = (new_context(arch, n_ubatch=8) for _ in range(2))
    rows = batch((tokens(400), 0, 0), logits="last")
    token = lc.CancelToken() if generations is None else _descendant(generations)
    results: list[lc.DecodeResult] = []
    thread = threading.Thread(target=lambda: results.append(context.decode(rows, token)))
    thread.start()
    wait_until_busy(context)
    began, let_go = hold_the_gil()
    thread.join(60)
    # It had begun before the GIL was taken: had it waited for the GIL, it would have taken about that long.
    assert results[0].seconds < (let_go - began) / 2
    assert same_bits(context.logits(-1), decode(twin, rows)[0])


def test_a_call_on_the_main_thread_goes_on_while_another_thread_holds_the_gil(new_context: NewContext) -> None:
    assert threading.current_thread() is threading.main_thread()
    context = new_context("llama", n_ubatch=8)
    held: list[tuple[float, float]] = []

    def hold() -> None:
        wait_until_busy(context)
        held.append(hold_the_gil())

    thread = threading.Thread(target=hold)
    thread.start()
    result = context.decode(batch((tokens(1000), 0, 0), logits="last"), lc.CancelToken())
    thread.join(60)
    began, let_go = held[0]
    assert result.seconds < (let_go - began) * 0.75, "a poll waited for the GIL"
