"""Law 8, reach: every native call that can take long takes a token, waiting for a busy context included."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE

from .words import batch, cancels_after, close, dead, decode, holds, one_more, same_bits, threads, tokens

NewContext = Callable[..., lc.Context]
ModelPath = Callable[[str], Path]
LOADABLE = [*GENERATIVE, "embedding"]


# ---- load ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", LOADABLE)
def test_a_load_under_a_cancelled_token_does_nothing(arch: str, model_path: ModelPath) -> None:
    shares: list[float] = []
    with pytest.raises(lc.LoadCancelled) as caught:
        lc.Model.load(model_path(arch), progress=shares.append, token=dead())
    assert caught.value.cause is lc.Cause.CLIENT
    assert caught.value.reason == "long ago"
    assert caught.value.latency >= 0
    assert 1.0 not in shares


@pytest.mark.parametrize("arch", LOADABLE)
@pytest.mark.parametrize("use_mmap", [True, False])
def test_a_load_can_be_cancelled_at_each_step_of_its_progress(
    arch: str, use_mmap: bool, model_path: ModelPath
) -> None:
    shares: list[float] = []
    lc.Model.load(model_path(arch), progress=shares.append, use_mmap=use_mmap).close()
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] == 1.0
    for step in range(0, len(shares) - 1, max(1, len(shares) // 6)):
        token, seen = lc.CancelToken(), []

        def report(share: float, token: lc.CancelToken = token, seen: list[float] = seen, step: int = step) -> None:
            seen.append(share)
            if len(seen) > step:
                token.cancel("seen enough")

        with pytest.raises(lc.LoadCancelled, match="seen enough"):
            lc.Model.load(model_path(arch), progress=report, token=token, use_mmap=use_mmap)
        assert len(seen) <= step + 2


def test_a_load_whose_progress_raises_stops_with_that_exception(model_path: ModelPath) -> None:
    def report(share: float) -> None:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        lc.Model.load(model_path("llama"), progress=report, token=lc.CancelToken())


def test_a_deadline_reaches_a_load(model_path: ModelPath) -> None:
    with pytest.raises(lc.LoadCancelled) as caught:
        lc.Model.load(model_path("llama"), token=lc.CancelToken(timeout=0.0001))
    assert caught.value.cause is lc.Cause.DEADLINE


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_model_loaded_after_a_cancelled_load_gives_the_same_bits(
    arch: str, model_path: ModelPath, new_context: NewContext
) -> None:
    with pytest.raises(lc.LoadCancelled):
        lc.Model.load(model_path(arch), token=lc.CancelToken(timeout=0.001))
    rows = batch((tokens(20), 0, 0))
    with lc.Model.load(model_path(arch), token=lc.CancelToken()) as model, \
            model.context(n_ctx=1024, n_ubatch=32, n_threads=1) as context:
        assert same_bits(decode(context, rows), decode(new_context(arch), rows))


# ---- encode and embeddings -------------------------------------------------------------------------------------


def test_an_encode_can_be_cancelled_and_done_again(new_context: NewContext) -> None:
    context, twin = (new_context("encdec", n_ubatch=None) for _ in range(2))
    rows = batch((tokens(400), 0, 0))
    assert_cancelled(lambda token: context.encode(rows, token))
    start = batch(([5], 0, 0), ([9, 17], 1, 0))
    with pytest.raises(lc.InvalidBatchError, match="encode"):
        context.decode(start)
    context.encode(rows)
    twin.encode(rows)
    assert_cancelled(lambda token: context.encode(batch((tokens(500, 2), 0, 0)), token))
    assert same_bits(decode(context, start), decode(twin, start))
    assert same_bits(one_more(context), one_more(twin))


def test_a_decode_of_a_model_with_an_encoder_can_be_cancelled_and_done_again(new_context: NewContext) -> None:
    context, twin = (new_context("encdec", n_ubatch=None) for _ in range(2))
    for each in (context, twin):
        each.encode(batch((tokens(60), 0, 0)))
    rows = batch((tokens(600, 3), 0, 0))
    assert_cancelled(lambda token: context.decode(rows, token))
    assert holds(context)[0] == (-1, -1)
    assert same_bits(decode(context, rows), decode(twin, rows))


@pytest.mark.parametrize("n_seq_max", [1, 2, 3, 4, 5])
def test_embeddings_can_be_cancelled_for_any_number_of_sequences(n_seq_max: int, new_context: NewContext) -> None:
    context, twin = (new_context("embedding", n_ubatch=None, embeddings=True, n_seq_max=n_seq_max) for _ in range(2))
    rows = batch(*((tokens(600 // n_seq_max, seq), 0, seq) for seq in range(n_seq_max)))
    assert_cancelled(lambda token: context.decode(rows, token))
    context.decode(rows)
    twin.decode(rows)
    for seq in range(n_seq_max):
        assert same_bits(context.pooled_embeddings(seq), twin.pooled_embeddings(seq))


@pytest.mark.parametrize("arch", ["llama", "swa", "mamba", "hybrid", "moe"])
def test_embeddings_of_a_generative_model_can_be_cancelled(arch: str, new_context: NewContext) -> None:
    context, twin = (new_context(arch, embeddings=True, pooling="none", n_ubatch=8) for _ in range(2))
    rows = batch((tokens(600), 0, 0))
    assert_cancelled(lambda token: context.decode(rows, token))
    context.decode(rows)
    twin.decode(rows)
    for row in (0, 300, 599):
        assert same_bits(context.embeddings(row), twin.embeddings(row))


# ---- states ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_save_can_be_cancelled_and_changes_nothing(arch: str, new_context: NewContext, tmp_path: Path) -> None:
    context, twin = (new_context(arch, n_seq_max=2) for _ in range(2))
    for each in (context, twin):
        decode(each, batch((tokens(100), 0, 0)))
    for token in (dead(), lc.CancelToken(timeout=0)):
        with pytest.raises(lc.DecodeCancelled):
            context.state.save(0, token)
        with pytest.raises(lc.DecodeCancelled):
            context.state.save_file(tmp_path / "state", 0, token)
    assert list(tmp_path.iterdir()) == [], "a file appears whole or not at all"
    assert context.state.save(0, lc.CancelToken()) == twin.state.save(0)
    assert same_bits(one_more(context), one_more(twin))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_load_of_a_state_can_be_cancelled_and_changes_nothing(
    arch: str, new_context: NewContext, tmp_path: Path
) -> None:
    context, twin, source = (new_context(arch, n_seq_max=2) for _ in range(3))
    for each in (context, twin):
        decode(each, batch((tokens(50), 0, 0)))
    decode(source, batch((tokens(80, 3), 0, 1)))
    data = source.state.save(1)
    source.state.save_file(tmp_path / "state", 1)
    for load in (lambda token: context.state.load(0, data, token),
                 lambda token: context.state.load_file(tmp_path / "state", 0, token)):
        with pytest.raises(lc.DecodeCancelled):
            load(dead())
    assert holds(context) == holds(twin)
    context.state.load(1, data, lc.CancelToken())
    twin.state.load(1, data)
    assert same_bits(one_more(context), one_more(twin))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_state_that_is_damaged_or_does_not_fit_changes_nothing(arch: str, new_context: NewContext) -> None:
    context, twin = (new_context(arch, n_ctx=256, n_seq_max=2) for _ in range(2))
    for each in (context, twin):
        decode(each, batch((tokens(50), 0, 0)))
        decode(each, batch((tokens(150), 0, 1)))
    source = new_context(arch, n_ctx=256)
    decode(source, batch((tokens(200, 3), 0, 0)))
    data = source.state.save(0)
    for bad in (b"", data[:-1], data[: len(data) // 2], data[:-9] + b"\0" + data[-8:-1] + b"\x55", b"x" * 1000):
        with pytest.raises(lc.StateError):
            context.state.load(0, bad)
    if arch not in ("mamba", "swa"):
        with pytest.raises(lc.StateError):
            context.state.load(0, data)  # 200 cells where 106 are free
    assert context.dirty_sequences == []
    assert holds(context) == holds(twin)
    assert same_bits(one_more(context), one_more(twin))


# ---- waiting for a busy context --------------------------------------------------------------------------------


@pytest.fixture
def busy(new_context: NewContext) -> Callable[[str], lc.Context]:
    """A context in which another thread decodes for some 100 ms."""
    started: list[threading.Thread] = []

    def make(arch: str) -> lc.Context:
        context = new_context(arch, n_ubatch=8, n_seq_max=2, n_ctx=4096)
        decode(context, batch((tokens(4), 0, 1)))
        thread = threading.Thread(target=context.decode,
                                  args=(batch((tokens(2000), 0, 0), logits="last"), lc.CancelToken()))
        thread.start()
        started.append(thread)
        while not is_busy(context):
            assert thread.is_alive()
        return context

    yield make
    for thread in started:
        thread.join()


@pytest.mark.parametrize("arch", GENERATIVE)
def test_without_a_token_a_busy_context_is_an_error_at_once(arch: str, busy: Callable[[str], lc.Context]) -> None:
    context = busy(arch)
    for use in (
        lambda: context.decode(batch(([1], 4, 1))),
        lambda: context.decode(batch(([1], 4, 1)), {}),
        lambda: context.logits(),
        lambda: context.memory.clear(),
        lambda: context.memory.remove(1),
        lambda: context.memory.pos_max(1),
        lambda: context.state.save(1),
        lambda: context.close(),
        lambda: context.perf(),
    ):
        with pytest.raises(lc.ContextBusyError):
            use()


@pytest.mark.parametrize("arch", GENERATIVE)
def test_with_a_token_a_call_waits_for_its_turn(arch: str, busy: Callable[[str], lc.Context]) -> None:
    context = busy(arch)
    context.decode(batch(([1], 4, 1)), lc.CancelToken())
    assert holds(context)[0][1] == 1999
    assert holds(context)[1][1] == 4


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_save_waits_for_its_turn_under_a_token(arch: str, busy: Callable[[str], lc.Context]) -> None:
    context = busy(arch)
    assert context.state.save(1, lc.CancelToken()) == context.state.save(1)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_waiting_for_a_busy_context_ends_with_the_token(arch: str, busy: Callable[[str], lc.Context]) -> None:
    context = busy(arch)
    with pytest.raises(lc.DecodeCancelled):
        context.decode(batch(([1], 4, 1)), dead())
    with pytest.raises(lc.DeadlineExceeded):
        context.decode(batch(([1], 4, 1)), lc.CancelToken(timeout=0.005))
    with cancels_after(0.005) as token, pytest.raises(lc.DecodeCancelled):
        context.state.save(1, token)
    assert is_busy(context), "too slow to show anything"


@pytest.mark.parametrize("arch", GENERATIVE)
def test_one_deadline_covers_the_wait_and_the_work(arch: str, busy: Callable[[str], lc.Context]) -> None:
    context = busy(arch)
    before = time.monotonic()
    token = lc.CancelToken(timeout=0.01)
    with pytest.raises(lc.DeadlineExceeded) as caught:
        context.decode(batch((tokens(1900), 4, 1)), token)
    assert caught.value.latency <= time.monotonic() - before - 0.01


@pytest.mark.parametrize("arch", GENERATIVE)
def test_many_threads_take_turns_under_their_tokens(arch: str, new_context: NewContext) -> None:
    context, twin = (new_context(arch, n_ubatch=8, n_seq_max=6) for _ in range(2))

    def use(seq: int) -> None:
        for turn in range(20):
            context.decode(batch((tokens(4, seq), 4 * turn, seq)), lc.CancelToken())

    with threads(*(lambda seq=seq: use(seq) for seq in range(6))):
        pass
    assert all(last == 79 for _, last in holds(context).values())
    for turn in range(20):
        twin.decode(batch(*((tokens(4, seq), 4 * turn, seq) for seq in range(6))))
    assert close(one_more(context), one_more(twin))


# ---- words -----------------------------------------------------------------------------------------------------


def is_busy(context: lc.Context) -> bool:
    try:
        context.memory.pos_max(1)
    except lc.ContextBusyError:
        return True
    return False


def assert_cancelled(call: Callable[[lc.CancelToken], object]) -> None:
    """A call that takes some milliseconds is cancelled before its start, and in the middle."""
    with pytest.raises(lc.DecodeCancelled):
        call(dead())
    with pytest.raises(lc.DeadlineExceeded):
        call(lc.CancelToken(timeout=0.002))
