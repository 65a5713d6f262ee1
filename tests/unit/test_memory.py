"""Clearing and copying cost what is held, and leave the bits of a context that never held anything else."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE, batch_of, prompt
from tests.laws.clock import FAR, deadline_at, readings_of

LoadedModel = Callable[[str], lc.Model]
NewContext = Callable[..., lc.Context]
STREAMS = ["llama", "swa", "hybrid", "hybrid-swa"]


def bits(context: lc.Context, seq_id: int = 0, pos: int = 0, n: int = 40) -> bytes:
    tokens = np.arange(1000, 1000 + n, dtype=np.int32)
    context.decode(batch_of(tokens, pos=pos, seq_id=seq_id, logits="all"))
    return b"".join(context.logits(i).tobytes() for i in range(n))


def with_nan(state: bytes, size: int | None = None) -> bytes:
    """The state with NaN in the last values that it holds, and a right checksum; cut to `size` bytes of data."""
    magic, n_about, *_ = struct.unpack_from("<8sIIQ", state)
    data = (state[24 + n_about : -2112] + b"\x7e" * 2048 + state[-64:])[:size]  # behind it counts of other caches
    return struct.pack("<8sIIQ", magic, n_about, zlib.crc32(data), len(data)) + state[24 : 24 + n_about] + data


@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_cleared_context_computes_as_a_new_one(
    arch: str, flash_attn: bool, model_of: LoadedModel, new_context: NewContext
) -> None:
    context, new = (new_context(arch, n_seq_max=3, flash_attn=flash_attn) for _ in range(2))
    wanted = bits(new)
    for _ in range(2):
        for seq, n in enumerate((200, 5, 90)):
            context.decode(batch_of(prompt(model_of(arch), n, seed=seq), seq_id=seq))
        context.memory.remove(1)
        context.memory.clear()
        assert [context.memory.pos_max(seq) for seq in range(3)] == [-1, -1, -1]
        assert bits(context) == wanted
        context.memory.clear()


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("left", ["held", "removed", "replaced", "kept another", "refused in its middle"])
def test_nothing_is_left_of_numbers_that_are_none(
    left: str, streams: bool, model_of: LoadedModel, new_context: NewContext
) -> None:
    context, new = (new_context("llama", n_seq_max=2, kv_unified=not streams, flash_attn=False) for _ in range(2))
    wanted = bits(new)
    context.decode(batch_of(prompt(model_of("llama"), 300)))
    state = context.state.save(0)
    context.memory.clear()
    if left == "refused in its middle":
        with pytest.raises(lc.StateError):
            context.state.load(0, with_nan(state, len(state) - 3000))
    else:
        context.state.load(0, with_nan(state))
        if left == "removed":
            context.memory.remove(0)
        elif left == "replaced":
            context.state.load(0, new.state.save(0))
        elif left == "kept another":
            context.memory.keep(1)
    context.memory.clear()
    assert bits(context) == wanted


def test_what_a_clear_costs_does_not_grow_with_the_context(new_context: NewContext) -> None:
    looks = []
    for n_ctx in (1024, 262144):
        context = new_context("llama", n_ctx=n_ctx)
        bits(context)
        looks.append(readings_of(lambda context=context: context.memory.clear(lc.CancelToken(timeout=FAR))))
    assert looks[0] == looks[1]


def test_a_clear_that_is_cancelled_before_it_begins_changes_nothing(new_context: NewContext) -> None:
    context = new_context("llama")
    bits(context)
    token = lc.CancelToken()
    token.cancel("no")
    with pytest.raises(lc.DecodeCancelled):
        context.memory.clear(token)
    assert context.memory.pos_max(0) == 39


@pytest.mark.parametrize("look", range(2, 6))
def test_a_clear_that_is_cancelled_in_its_middle_has_forgotten_all(look: int, new_context: NewContext) -> None:
    context, new = new_context("llama"), new_context("llama")
    bits(context)
    with deadline_at(look):
        context.memory.clear(lc.CancelToken(timeout=FAR))
    assert context.memory.pos_max(0) == -1
    assert bits(context) == bits(new)


@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("arch", STREAMS)
def test_a_copy_between_caches_goes_on_as_the_original(arch: str, flash_attn: bool, new_context: NewContext) -> None:
    context, other = (
        new_context(arch, n_seq_max=3, n_ctx=3072, kv_unified=False, flash_attn=flash_attn) for _ in range(2)
    )
    for each in (context, other):
        bits(each, 0, n=300)
    bits(context, 2, n=7)
    context.memory.remove(2)
    for target in (2, 1):
        context.memory.copy(0, target)
        assert context.memory.pos_min(target) == context.memory.pos_min(0)
        assert context.memory.pos_max(target) == 299
    wanted = bits(other, 0, 300)
    assert [bits(context, seq, 300) for seq in range(3)] == [wanted] * 3


def test_what_a_copy_costs_does_not_grow_with_the_context(new_context: NewContext) -> None:
    looks = []
    for n_ctx in (1024, 65536):
        context = new_context("llama", n_ctx=n_ctx, n_seq_max=2, kv_unified=False)
        bits(context)
        looks.append(readings_of(lambda context=context: context.memory.copy(0, 1, token=lc.CancelToken(timeout=FAR))))
    assert looks[0] == looks[1]


@pytest.mark.parametrize("arch", STREAMS)
def test_a_copy_that_is_cancelled_leaves_its_target_empty(arch: str, new_context: NewContext) -> None:
    context, other = (new_context(arch, n_seq_max=2, n_ctx=2048, kv_unified=False) for _ in range(2))
    for each in (context, other):
        bits(each)
    n = readings_of(lambda: other.memory.copy(0, 1, token=lc.CancelToken(timeout=FAR)))
    cancelled = 0
    for look in range(1, n + 1):
        try:
            with deadline_at(look):
                context.memory.copy(0, 1, token=lc.CancelToken(timeout=FAR))
        except lc.DeadlineExceeded:
            cancelled += 1
            assert context.memory.pos_max(1) == -1
        else:
            context.memory.remove(1)
    assert cancelled > 2
    context.memory.copy(0, 1)
    assert bits(context, 1, 40) == bits(other, 1, 40)


def spoil(context: lc.Context, state: bytes) -> None:
    """Has sequence 0 hold NaN, as that of a request whose numbers overflowed does."""
    context.state.load(0, with_nan(state))
    context.decode(batch_of(np.arange(1000, 1130, dtype=np.int32), pos=300, seq_id=0))
    assert np.isnan(context.logits(-1)).all()


def give_up(how: str, context: lc.Context) -> None:
    """Ends sequence 0 in one of the ways in which a request's cells are given up."""
    more = np.arange(2000, 2120, dtype=np.int32)
    if how == "rolled back":
        with deadline_at(6), pytest.raises(lc.DecodeCancelled):
            context.decode(batch_of(more, pos=430, seq_id=0), lc.CancelToken(timeout=FAR))
        assert context.memory.pos_max(0) == 429
    elif how in ("cancelled beside another", "rolled back to the last ubatch"):
        batch = lc.Batch(240, 1)
        batch.add_sequence(more, 430, 0, "last")
        batch.add_sequence(more, 0, 1, "last")
        keep = how == "rolled back to the last ubatch"
        with deadline_at(6):
            context.decode(batch, {0: lc.CancelToken(timeout=FAR)}, on_cancel="keep" if keep else "rollback")
        assert context.memory.pos_max(1) == 119
        context.memory.remove(1)
    elif how == "kept another":
        context.memory.keep(1)
    elif how == "cut":
        with suppress(ValueError):  # not a part of it
            context.memory.remove(0, 400)
    context.memory.remove(0)


@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize(
    "how",
    ["removed", "cut", "kept another", "rolled back", "cancelled beside another", "rolled back to the last ubatch"],
)
@pytest.mark.parametrize("arch", ["llama", "swa"])
def test_what_a_sequence_leaves_spoils_no_other(
    arch: str, how: str, streams: bool, flash_attn: bool, model_of: LoadedModel, new_context: NewContext
) -> None:
    context, new = (
        new_context(arch, n_seq_max=2, n_ctx=2048, n_ubatch=16, kv_unified=not streams, flash_attn=flash_attn)
        for _ in range(2)
    )
    new.decode(batch_of(prompt(model_of(arch), 300)))
    state = new.state.save(0)
    new.memory.clear()
    spoil(context, state)
    give_up(how, context)
    wanted = [bits(new, seq, n=90) for seq in range(2)]
    found = [bits(context, seq, n=90) for seq in range(2)]
    assert not np.isnan(np.frombuffer(b"".join(found), np.float32)).any()
    if streams or arch == "llama":  # a window that was in use lies elsewhere: its sums have another order
        assert found == wanted


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("arch", [*GENERATIVE, "hybrid-swa"])
def test_keeping_a_sequence_leaves_nothing_of_the_others_in_any_part_of_the_memory(
    arch: str, unified: bool, model_of: LoadedModel, new_context: NewContext
) -> None:
    context = new_context(arch, n_seq_max=3, kv_unified=unified)
    for seq in range(3):
        context.decode(batch_of(prompt(model_of(arch), 20, seed=seq), seq_id=seq))
    context.memory.keep(1)
    assert [(context.memory.pos_min(seq), context.memory.pos_max(seq)) for seq in (0, 2)] == [(-1, -1)] * 2
    assert context.memory.pos_max(1) == 19
