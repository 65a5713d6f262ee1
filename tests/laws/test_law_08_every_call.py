"""Law 8, reach: every native call that can take long takes a token."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE, TEXT

from .words import batch, cancelled, cancels_after, dead, decode, holds, one_more, same_bits, threads, tokens

NewContext = Callable[..., lc.Context]
ModelPath = Callable[[str], Path]
EVERY = [*GENERATIVE, "embedding", "encdec"]


@contextmanager
def held(context: lc.Context) -> Iterator[None]:
    """Another thread decodes in the context, for seconds if need be; it is cancelled in the end."""
    token = lc.CancelToken()
    rows = batch((tokens(4000), 0, 0), logits="none")

    def work() -> None:
        with pytest.raises(lc.DecodeCancelled):
            context.decode(rows, token)

    with threads(work) as (thread,):
        while thread.is_alive():
            try:
                context.memory.pos_max(0)
            except lc.ContextBusyError:
                break
        try:
            yield
            assert thread.is_alive(), "the context was not held for long enough"
        finally:
            token.cancel()


@pytest.fixture
def slow_context(new_context: NewContext) -> Callable[[str], lc.Context]:
    return lambda arch: new_context(arch, n_ctx=4096, n_batch=4096, n_ubatch=1)


# ---- load --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", EVERY)
def test_a_load_is_cancelled_from_within_its_progress_callback(arch: str, model_path: ModelPath) -> None:
    token, shares = lc.CancelToken(), []

    def progress(share: float) -> None:
        shares.append(share)
        token.cancel("seen enough")

    with pytest.raises(lc.LoadCancelled) as caught:
        lc.Model.load(model_path(arch), progress=progress, token=token)
    assert len(shares) == 1
    assert caught.value.cause is lc.Cause.CLIENT
    assert caught.value.reason == "seen enough"


@pytest.mark.parametrize("arch", EVERY)
def test_a_load_with_a_cancelled_token_does_not_begin(arch: str, model_path: ModelPath) -> None:
    shares: list[float] = []
    with pytest.raises(lc.LoadCancelled):
        lc.Model.load(model_path(arch), progress=shares.append, token=dead())
    assert shares == []


@pytest.mark.parametrize("use_mmap", [True, False])
def test_a_load_is_cancelled_by_another_thread_or_a_deadline_at_any_moment(
    use_mmap: bool, model_path: ModelPath
) -> None:
    started = time.perf_counter()
    lc.Model.load(model_path("llama"), use_mmap=use_mmap).close()
    duration = time.perf_counter() - started
    hits = 0
    for step in range(10):
        with cancels_after(duration * step / 10) as timed:
            for token in (timed, lc.CancelToken(timeout=duration * step / 10)):
                try:
                    lc.Model.load(model_path("llama"), token=token, use_mmap=use_mmap).close()
                except lc.LoadCancelled as error:
                    hits += 1
                    assert error.cause is (lc.Cause.CLIENT if token is timed else lc.Cause.DEADLINE)
    assert hits > 4


def test_a_load_after_a_cancelled_one_is_whole(model_path: ModelPath, new_context: NewContext) -> None:
    with pytest.raises(lc.LoadCancelled):
        lc.Model.load(model_path("llama"), token=dead())
    with (
        lc.Model.load(model_path("llama"), token=lc.CancelToken()) as model,
        model.context(n_ctx=1024, n_ubatch=32, n_threads=1) as context,
    ):
        rows = batch((tokens(20), 0, 0))
        assert same_bits(decode(context, rows), decode(new_context("llama"), rows))


# ---- decode, encode, embeddings ----------------------------------------------------------------------------------


def _some_cancelled(run: Callable[[lc.CancelToken], object], check: Callable[[], object]) -> None:
    """Calls `run` under deadlines from none to its whole duration; some must have cancelled it."""
    started = time.perf_counter()
    run(lc.CancelToken())
    duration = time.perf_counter() - started
    hits = 0
    for step in range(16):
        token = lc.CancelToken(timeout=duration * step / 16)
        try:
            run(token)
        except lc.DeadlineExceeded as error:
            hits += 1
            assert error.latency >= 0
            check()
    assert hits > 3


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_decode_takes_a_token(arch: str, new_context: NewContext) -> None:
    context, twin = new_context(arch), new_context(arch)
    rows = batch((tokens(200), 0, 0))

    def run(token: lc.CancelToken) -> None:
        context.memory.clear()
        context.decode(rows, token)

    _some_cancelled(run, lambda: None)
    context.memory.clear()
    assert same_bits(decode(context, rows), decode(twin, rows))


@pytest.mark.parametrize("pooling", ["mean", "none"])
def test_a_decode_of_an_embedding_model_takes_a_token(pooling: str, new_context: NewContext) -> None:
    context, twin = (new_context("embedding", n_ubatch=None, embeddings=True, pooling=pooling) for _ in range(2))
    rows = batch((tokens(500), 0, 0))
    _some_cancelled(lambda token: context.decode(rows, token), lambda: None)
    with pytest.raises(lc.DecodeCancelled):
        context.decode(rows, dead())
    for each in (context, twin):
        each.decode(rows)
    read: Callable[[lc.Context], np.ndarray] = (
        (lambda each: each.pooled_embeddings(0)) if pooling == "mean" else (lambda each: each.embeddings(499))
    )
    assert same_bits(read(context), read(twin))


def test_an_encode_takes_a_token(new_context: NewContext) -> None:
    context, twin = (new_context("encdec", n_ubatch=None) for _ in range(2))
    rows = batch((tokens(500), 0, 0))
    _some_cancelled(lambda token: context.encode(rows, token), lambda: None)
    with pytest.raises(lc.DecodeCancelled):
        context.encode(rows, dead())
    more = batch((tokens(8, 1), 0, 0))
    told = []
    for each in (context, twin):
        each.encode(rows)
        told.append(decode(each, more))
    assert same_bits(*told)


def test_an_encode_that_is_cancelled_leaves_the_encoding_before_in_force(new_context: NewContext) -> None:
    context, twin = (new_context("encdec", n_ubatch=None) for _ in range(2))
    for each in (context, twin):
        each.encode(batch((tokens(100), 0, 0)))
    other = batch((tokens(500, 7), 0, 0))
    hits = 0
    for step in range(12):
        try:
            context.encode(other, lc.CancelToken(timeout=0.002 * step))
        except lc.DeadlineExceeded:
            hits += 1
        else:
            context.encode(batch((tokens(100), 0, 0)))
    assert hits > 0
    rows = batch((tokens(8, 1), 0, 0))
    assert same_bits(decode(context, rows), decode(twin, rows))


def test_the_decoder_of_an_encoder_decoder_takes_a_token(new_context: NewContext) -> None:
    context, twin = (new_context("encdec", n_ubatch=None) for _ in range(2))
    for each in (context, twin):
        each.encode(batch((tokens(50), 0, 0)))
    rows = batch((tokens(200, 1), 0, 0))
    before = holds(context)
    hits = 0
    for step in range(12):
        if cancelled(context, rows, lc.CancelToken(timeout=0.003 * step)) is None:
            context.memory.clear()
        else:
            hits += 1
            assert holds(context) == before
    assert hits > 0
    assert same_bits(decode(context, rows), decode(twin, rows))


# ---- states ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GENERATIVE)
def test_saving_and_loading_a_state_take_a_token(arch: str, new_context: NewContext, tmp_path: Path) -> None:
    context = new_context(arch, n_seq_max=2)
    decode(context, batch((tokens(100), 0, 0), (tokens(50, 1), 0, 1)))
    data, at_first = context.state.save(0), holds(context)
    file = tmp_path / "state"
    context.state.save_file(file, 0, lc.CancelToken())
    content = file.read_bytes()
    calls: list[Callable[[lc.CancelToken], object]] = [
        lambda token: context.state.save(0, token),
        lambda token: context.state.load(1, data, token),
        lambda token: context.state.save_file(file, 1, token),
        lambda token: context.state.save_file(tmp_path / "other", 0, token),
        lambda token: context.state.load_file(file, 1, token),
    ]
    for call in calls:
        with pytest.raises(lc.DecodeCancelled) as caught:
            call(dead())
        assert caught.value.reason == "long ago"
        with pytest.raises(lc.DeadlineExceeded):
            call(lc.CancelToken(timeout=0))
        assert holds(context) == at_first
        assert file.read_bytes() == content
        assert [each.name for each in tmp_path.iterdir()] == ["state"], "a cancelled save left a file"
    context.state.load_file(file, 1, lc.CancelToken())
    assert holds(context)[1][1] == at_first[0][1]
    context.state.load(0, data, lc.CancelToken())
    assert np.allclose(*one_more(context), atol=5e-2)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_saves_and_loads_of_a_state_under_any_deadline_are_whole_or_nothing(
    arch: str, new_context: NewContext, tmp_path: Path
) -> None:
    context = new_context(arch, n_ctx=4096, n_batch=4096, n_seq_max=2, n_ubatch=64)
    context.decode(batch((tokens(2000), 0, 0), (tokens(50, 1), 0, 1), logits="last"))
    data, other = context.state.save(0), context.state.save(1)
    file = tmp_path / "state"
    started = time.perf_counter()
    context.state.save_file(file, 0)
    context.state.load_file(file, 1)
    duration = time.perf_counter() - started
    context.state.load(1, other)
    for step in range(30):
        token = lc.CancelToken(timeout=duration * step / 25)
        file.unlink(missing_ok=True)
        try:
            context.state.save_file(file, 0, token)
            context.state.load_file(file, 1, token)
        except lc.DeadlineExceeded:
            assert context.state.save(1) == other
            assert not file.exists() or file.read_bytes() == data
        else:
            assert holds(context)[1][1] == 1999
            context.state.load(1, other)
        assert {each.name for each in tmp_path.iterdir()} <= {"state"}


# ---- waiting for a busy context ----------------------------------------------------------------------------------


def _calls(context: lc.Context) -> dict[str, Callable[[Any], object]]:
    rows = batch((tokens(4), 0, 0))
    return {
        "decode": lambda token: context.decode(rows, token),
        "decode with tokens of sequences": lambda token: context.decode(rows, token if token is None else {0: token}),
        "state.save": lambda token: context.state.save(0, token),
    }


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_busy_context_without_a_token_says_so_at_once(
    arch: str, slow_context: Callable[[str], lc.Context]
) -> None:
    context = slow_context(arch)
    with held(context):
        for call in _calls(context).values():
            with pytest.raises(lc.ContextBusyError):
                call(None)
        for use in (context.logits, lambda: context.memory.remove(0), context.memory.clear, context.perf, context.close):
            with pytest.raises(lc.ContextBusyError):
                use()
    assert context.memory.pos_max(0) == -1


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_call_that_waits_for_a_busy_context_is_cancelled_by_its_token(
    arch: str, slow_context: Callable[[str], lc.Context]
) -> None:
    context = slow_context(arch)
    with held(context):
        for call in _calls(context).values():
            with pytest.raises(lc.DeadlineExceeded) as caught:
                call(lc.CancelToken(timeout=0.02))
            assert caught.value.cause is lc.Cause.DEADLINE
            with cancels_after(0.02) as token, pytest.raises(lc.DecodeCancelled) as caught:
                call(token)
            assert caught.value.cause is lc.Cause.CLIENT
            with pytest.raises(lc.DecodeCancelled):
                call(dead())


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_waiting_call_has_its_turn_when_the_context_is_free(arch: str, new_context: NewContext) -> None:
    context, twin = (new_context(arch, n_seq_max=8) for _ in range(2))
    told: dict[int, lc.DecodeResult] = {}

    def turn(seq: int) -> Callable[[], None]:
        def work() -> None:
            told[seq] = context.decode(batch((tokens(60, seq), 0, seq), logits="last"), lc.CancelToken(timeout=60))

        return work

    with threads(*(turn(seq) for seq in range(8))):
        pass
    assert len(told) == 8
    for seq in told:  # in the order in which they had their turns
        twin.decode(batch((tokens(60, seq), 0, seq), logits="last"))
    assert holds(context) == holds(twin)
    assert np.allclose(one_more(context), one_more(twin), atol=5e-2)


# ---- one deadline ------------------------------------------------------------------------------------------------


def test_one_deadline_covers_a_load_and_the_decodes_after_it(model_path: ModelPath) -> None:
    token = lc.CancelToken(timeout=3)
    with (
        lc.Model.load(model_path("llama"), token=token) as model,
        model.context(n_ctx=1024, n_ubatch=8, n_threads=1) as context,
    ):
        rows = batch((tokens(900), 0, 0), logits="none")
        with pytest.raises(lc.DeadlineExceeded):
            while True:
                context.memory.clear()
                context.decode(rows, token)
        with pytest.raises(lc.DeadlineExceeded):
            context.state.save(0, token)
        with pytest.raises(lc.LoadCancelled) as caught:
            lc.Model.load(model_path("llama"), token=token)
        assert caught.value.cause is lc.Cause.DEADLINE
        assert token.deadline is not None
        assert time.monotonic() >= token.deadline


# ---- the GIL -----------------------------------------------------------------------------------------------------


def _ticks_during(call: Callable[[], object]) -> int:
    """How often another thread woke while `call` ran, which must not hold the GIL."""
    ticks, over = 0, threading.Event()

    def count() -> None:
        nonlocal ticks
        while not over.is_set():
            time.sleep(0.001)
            ticks += 1

    with threads(count):
        time.sleep(0.02)
        before = ticks
        call()
        told = ticks - before
        over.set()
    return told


def test_other_threads_run_while_a_megabyte_of_text_is_tokenized(model_of: Callable[[str], lc.Model]) -> None:
    model = model_of("llama")
    text = (TEXT * (1_000_000 // len(TEXT) + 1))[:1_000_000]
    result: list[np.ndarray] = []
    assert _ticks_during(lambda: result.append(model.tokenize(text))) > 5
    assert len(result[0]) > 100_000
    assert _ticks_during(lambda: model.detokenize(result[0])) >= 0
    assert model.detokenize(result[0], remove_special=True).strip() == text.strip()


@pytest.mark.parametrize("arch", GENERATIVE)
def test_other_threads_run_while_a_decode_does(arch: str, new_context: NewContext) -> None:
    context = new_context(arch)
    rows = batch((tokens(900), 0, 0), logits="none")
    assert _ticks_during(lambda: context.decode(rows, lc.CancelToken())) > 5


def test_other_threads_run_while_a_model_is_loaded(model_path: ModelPath) -> None:
    def load() -> None:
        lc.Model.load(model_path("llama")).close()

    assert _ticks_during(load) > 5
