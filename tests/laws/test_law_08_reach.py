"""Law 8, reach: every native call that can take long takes a token, waiting for a busy context included."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llamacancel as lc
from llamacancel.commands.make_model import find_vocab, make_lora
from tests.conftest import GENERATIVE, TEXT
from tests.device import CONTEXT, load

from .clock import NEVER, Clock, Flight, deadline_at, in_the_middle, readings_of, wait_for
from .words import (
    ModelPath,
    NewContext,
    Pair,
    batch,
    close,
    dead,
    decode,
    far,
    holds,
    one_more,
    same_bits,
    threads,
    tokens,
)

SHARES = (0.05, 0.35, 0.65, 0.9)  # of a call

Call = Callable[[lc.CancelToken], object]


def cancelled_throughout(call: Call, check: Callable[[], object] = lambda: None) -> None:
    """A call is cancelled before its start, and in its middle by deadlines and by another thread."""
    token = far()
    whole = readings_of(lambda: call(token))
    with pytest.raises(lc.DecodeCancelled):
        call(dead())
    for share in SHARES:
        token = far()
        with deadline_at(max(1, int(share * whole))), pytest.raises(lc.DecodeCancelled) as caught:
            call(token)
        assert caught.value.cause is lc.Cause.DEADLINE
        check()
    token = far()
    with in_the_middle(token.cancel, at=whole // 2), pytest.raises(lc.DecodeCancelled) as caught:
        call(token)
    assert caught.value.cause is lc.Cause.CLIENT
    check()


# ---- text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert-bge", "gpt-neox", "llama-bpe", "llama-spm", "qwen2"])
def test_a_text_is_not_tokenized_to_its_end_by_a_cancelled_call(name: str) -> None:
    text = TEXT * 100
    with lc.Model.load(find_vocab(name), vocab_only=True) as model:
        whole = model.tokenize(text).tolist()
        cancelled_throughout(lambda token: model.tokenize(text, token=token))
        assert model.tokenize(text, token=far()).tolist() == whole


# ---- sampling --------------------------------------------------------------------------------------------------


def test_a_grammar_is_followed_under_a_token_and_a_cancelled_sample_chooses_nothing(new_context: NewContext) -> None:
    rules = [f"a{i} ::= a{i + 1} a{i + 1}" for i in range(6)]
    grammar = "\n".join(["root ::= a0", *rules, 'a6 ::= "x"?'])  # it can be read in many ways, which takes long
    ctx = new_context("llama")
    decode(ctx, batch((tokens(8), 0, 0)))
    options: dict[str, Any] = {"temperature": 2.0, "top_k": 0, "seed": 1, "grammar": grammar, "model": ctx.model}
    sampler, alone = lc.Sampler(**options), lc.Sampler(**options)
    with pytest.raises(lc.DecodeCancelled):
        sampler.sample(ctx, token=dead())
    whole = readings_of(lambda: alone.clone().sample(ctx, token=far()))
    for share in (0.05, 0.2):  # of the time in which the grammar says what may follow
        with deadline_at(max(1, int(share * whole))), pytest.raises(lc.DeadlineExceeded):
            sampler.sample(ctx, token=far())
    assert [sampler.sample(ctx, token=far()) for _ in range(3)] == [alone.sample(ctx) for _ in range(3)]


# ---- load ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_mmap", [True, False])
def test_a_load_is_cancelled_by_another_thread_or_a_deadline_at_any_moment(
    use_mmap: bool, model_path: ModelPath
) -> None:
    for arch in ("llama", "hybrid", "embedding"):
        cancelled_throughout(lambda token, arch=arch: load(model_path(arch), token=token, use_mmap=use_mmap).close())


@pytest.mark.parametrize(("arch", "use_mmap"), [("llama", True), ("llama", False), ("hybrid", True), ("encdec", True)])
def test_a_load_can_be_cancelled_at_each_step_of_its_progress(arch: str, use_mmap: bool, model_path: ModelPath) -> None:
    shares: list[float] = []
    load(model_path(arch), progress=shares.append, use_mmap=use_mmap).close()
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] == 1.0
    for step in range(0, len(shares) - 1, max(1, len(shares) // 5)):
        token, seen = lc.CancelToken(), list[float]()

        def report(share: float, token: lc.CancelToken = token, seen: list[float] = seen, step: int = step) -> None:
            seen.append(share)
            if len(seen) > step:
                token.cancel("seen enough")

        with pytest.raises(lc.LoadCancelled, match="seen enough") as caught:
            load(model_path(arch), progress=report, token=token, use_mmap=use_mmap)
        assert caught.value.cause is lc.Cause.CLIENT
        assert len(seen) <= step + 2
        assert step > 0 or len(seen) == 1


def test_a_load_whose_progress_raises_stops_with_that_exception(model_path: ModelPath) -> None:
    def report(share: float) -> None:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        load(model_path("llama"), progress=report, token=lc.CancelToken())


@pytest.mark.parametrize("arch", ["llama", "hybrid"])
def test_a_model_loaded_after_a_cancelled_load_gives_the_same_bits(
    arch: str, model_path: ModelPath, new_context: NewContext
) -> None:
    token = far()
    with deadline_at(30), pytest.raises(lc.LoadCancelled):
        load(model_path(arch), token=token)
    rows = batch((tokens(20), 0, 0))
    with (
        load(model_path(arch), token=lc.CancelToken()) as model,
        model.context(n_ctx=1024, n_ubatch=32, n_threads=1, **CONTEXT) as context,
    ):
        assert same_bits(decode(context, rows), decode(new_context(arch), rows))


# ---- adapters and contexts -------------------------------------------------------------------------------------


def test_an_adapter_is_not_loaded_to_its_end_by_a_cancelled_call(
    model_of: Callable[[str], lc.Model], model_path: ModelPath, tmp_path: Path, new_context: NewContext
) -> None:
    model, context, rows = model_of("llama"), new_context("llama"), batch((tokens(20), 0, 0))
    path = make_lora(tmp_path / "lora.gguf", model_path("llama"), rank=2048)
    cancelled_throughout(lambda token: model.load_lora(path, token=token))
    context.set_lora([(model.load_lora(path), 1.0)])
    adapted = decode(context, rows)
    context.memory.clear()
    context.set_lora([(model.load_lora(path, token=far()), 1.0)])
    assert same_bits(decode(context, rows), adapted)


@pytest.mark.parametrize("arch", ["llama", "swa", "hybrid", "mamba"])
def test_a_context_is_not_made_to_its_end_by_a_cancelled_call(
    arch: str, model_of: Callable[[str], lc.Model], new_context: NewContext
) -> None:
    n_seq_max = 256 if arch == "mamba" else 1
    params: dict[str, Any] = {"n_ctx": 1 << 17, "n_seq_max": n_seq_max, "n_ubatch": 32, **CONTEXT}
    model = model_of(arch)
    cancelled_throughout(lambda token: model.context(token=token, **params).close())
    rows = batch((tokens(20), 0, 0))
    with model.context(token=far(), **params) as context:
        assert close(decode(context, rows), decode(new_context(arch), rows))


def test_a_cancel_reaches_the_measuring_that_the_first_context_waits_for(model_path: ModelPath) -> None:
    device: dict[str, Any] = {"n_ctx": 256, "_n_pieces": 4}  # which the CPU stands in for
    with load(model_path("llama")) as model:
        for reading in (2, 4, 8):
            with deadline_at(reading), pytest.raises(lc.DeadlineExceeded, match="making a context"):
                model.context(token=far(), **device)
            token = far()
            with in_the_middle(token.cancel, at=reading), pytest.raises(lc.DecodeCancelled, match="making a context"):
                model.context(token=token, **device)
        with model.context(**device) as measured, model.context(token=far(), **device) as known:
            assert measured.latency_plan == known.latency_plan
            assert measured.latency_plan.node_seconds is not None


def test_who_waits_for_another_threads_context_to_be_made_can_be_cancelled(
    model_of: Callable[[str], lc.Model], model_path: ModelPath, tmp_path: Path
) -> None:
    model, path = model_of("llama"), make_lora(tmp_path / "lora.gguf", model_path("llama"))
    large: dict[str, Any] = {"n_ctx": 1 << 17, "n_ubatch": 32, **CONTEXT}
    with Flight(lambda: model.context(token=far(), **large), at=8) as making:
        small = Flight(lambda: model.context(n_ctx=64, n_ubatch=32, token=far(), **CONTEXT), at=NEVER)
        adapter = Flight(lambda: model.load_lora(path, token=far()), at=NEVER)
        for each in (small, adapter):
            each.waits()
            each.clock.jumps_in(3)
            assert isinstance(each.lands(), lc.DeadlineExceeded)
    making.told.close()


# ---- decode, encode, embeddings --------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("embeddings", [False, True], ids=["logits", "embeddings"])
def test_a_decode_takes_a_token(arch: str, embeddings: bool, new_context: NewContext) -> None:
    made: dict[str, Any] = {"embeddings": True, "pooling": "none", "n_ubatch": 8} if embeddings else {}
    context, twin = (new_context(arch, **made) for _ in range(2))
    rows = batch((tokens(100), 0, 0))

    def call(token: lc.CancelToken) -> None:
        context.memory.clear()
        context.decode(rows, token)

    cancelled_throughout(call)
    context.memory.clear()
    for each in (context, twin):
        each.decode(rows)
    for row in (0, 50, 99):
        read = lc.Context.embeddings if embeddings else lc.Context.logits
        assert same_bits(read(context, row), read(twin, row))


@pytest.mark.parametrize("n_seq_max", [1, 2, 3, 5])
def test_embeddings_can_be_cancelled_for_any_number_of_sequences(n_seq_max: int, new_context: NewContext) -> None:
    context, twin = (new_context("embedding", n_ubatch=None, embeddings=True, n_seq_max=n_seq_max) for _ in range(2))
    rows = batch(*((tokens(120 // n_seq_max, seq), 0, seq) for seq in range(n_seq_max)))
    cancelled_throughout(lambda token: context.decode(rows, token))
    for each in (context, twin):
        each.decode(rows)
    for seq in range(n_seq_max):
        assert same_bits(context.pooled_embeddings(seq), twin.pooled_embeddings(seq))


def test_an_encode_that_is_cancelled_leaves_the_encoding_before_in_force(new_context: NewContext) -> None:
    context, twin = (new_context("encdec", n_ubatch=None) for _ in range(2))
    text, other, start = batch((tokens(100), 0, 0)), batch((tokens(200, 2), 0, 0)), batch(([5], 0, 0), ([9, 17], 1, 0))
    with deadline_at(20), pytest.raises(lc.DeadlineExceeded):
        context.encode(text, far())
    with pytest.raises(lc.InvalidBatchError, match="encode"):
        context.decode(start)
    for each in (context, twin):
        each.encode(text)
    whole = readings_of(lambda: new_context("encdec", n_ubatch=None).encode(other, far()))
    for share in SHARES:
        token = far()
        with deadline_at(int(share * whole)), pytest.raises(lc.DeadlineExceeded):
            context.encode(other, token)
    assert same_bits(decode(context, start), decode(twin, start))
    assert same_bits(one_more(context), one_more(twin))


def test_encodes_and_decodes_of_a_model_with_an_encoder_can_be_cancelled_and_done_again(
    new_context: NewContext,
) -> None:
    context, twin = (new_context("encdec", n_ubatch=None) for _ in range(2))
    text, rows = batch((tokens(100), 0, 0)), batch((tokens(120, 3), 0, 0))
    cancelled_throughout(lambda token: context.encode(text, token))
    for each in (context, twin):
        each.encode(text)

    def call(token: lc.CancelToken) -> None:
        context.decode(rows, token)
        context.memory.clear()

    def check() -> None:
        assert holds(context)[0] == (-1, -1)

    cancelled_throughout(call, check)
    assert same_bits(decode(context, rows), decode(twin, rows))


# ---- states ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GENERATIVE)
def test_saves_and_loads_of_a_state_under_any_deadline_are_whole_or_nothing(
    arch: str, new_context: NewContext, tmp_path: Path
) -> None:
    context = new_context(arch, n_seq_max=2)
    context.decode(batch((tokens(300), 0, 0), (tokens(50, 1), 0, 1), logits="last"))
    data, other = context.state.save(0, far()), context.state.save(1)
    file, held = tmp_path / "state", holds(context)
    calls: list[Call] = [
        lambda token: context.state.save(0, token),
        lambda token: context.state.load(1, data, token),
        lambda token: context.state.save_file(file, 0, token),
        lambda token: context.state.load_file(file, 1, token),
    ]
    for n, call in enumerate(calls):
        token = far()
        whole = readings_of(lambda call=call, token=token: call(token))
        assert whole > 2
        for reading in (*range(1, min(whole, 30)), NEVER):
            if n == 2:
                file.unlink(missing_ok=True)
            context.state.load(1, other)
            token = dead() if reading == NEVER else far()
            try:
                with deadline_at(reading):
                    call(token)
            except lc.DecodeCancelled:
                assert holds(context)[1][1] == held[1][1]
                assert context.state.save(1) == other
                assert n != 2 or not file.exists()
            else:
                assert token.cause is not lc.Cause.CLIENT
                assert holds(context)[1][1] == held[0 if n % 2 else 1][1]
                assert n != 2 or file.read_bytes() == data
            assert {each.name for each in tmp_path.iterdir()} <= {"state"}
        if n == 2:
            context.state.save_file(file, 0, lc.CancelToken())
            assert file.read_bytes() == data


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_state_that_is_damaged_or_does_not_fit_changes_nothing(
    arch: str, pair: Pair, new_context: NewContext
) -> None:
    context, twin = pair(arch, n_ctx=256, n_seq_max=2)
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
def busy(new_context: NewContext) -> Callable[[str], tuple[lc.Context, Flight]]:
    """A context in which another thread decodes, stopped in its middle. What waits for it is cancelled in law 1."""

    def make(arch: str) -> tuple[lc.Context, Flight]:
        context = new_context(arch, n_ubatch=8, n_seq_max=2)
        decode(context, batch((tokens(4), 0, 1)))
        rows = batch((tokens(60), 0, 0), logits="last")
        return context, Flight(lambda: context.decode(rows, far()))

    return make


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_busy_context_without_a_token_says_so_at_once(
    arch: str, busy: Callable[[str], tuple[lc.Context, Flight]]
) -> None:
    context, flight = busy(arch)
    rows = batch(([1], 4, 1))
    with flight:
        for use in (
            lambda: context.decode(rows),
            lambda: context.decode(rows, {}),
            lambda: context.encode(rows),
            context.logits,
            context.memory.clear,
            lambda: context.memory.remove(1),
            lambda: context.memory.pos_max(1),
            lambda: context.state.save(1),
            context.perf,
            lambda: context.dirty_sequences,
            context.close,
        ):
            with pytest.raises(lc.ContextBusyError):
                use()
    assert flight.told.rows_done == 60
    assert [last for _, last in holds(context).values()] == [59, 3]


@pytest.mark.parametrize("arch", ["llama", "mamba"])
def test_with_a_token_a_call_waits_for_its_turn(arch: str, busy: Callable[[str], tuple[lc.Context, Flight]]) -> None:
    context, flight = busy(arch)
    saving = Flight(lambda: context.state.save(1, far()), at=NEVER)
    decoding = Flight(lambda: context.decode(batch(([1], 60, 0)), {0: far()}), at=NEVER)
    saving.waits()
    decoding.waits()
    assert flight.lands().rows_done == 60
    saved = saving.lands()
    assert decoding.lands().rows_done == 1
    assert saved == context.state.save(1)
    assert holds(context)[0][1] == 60


def test_those_who_wait_have_their_turns_in_the_order_in_which_they_came(new_context: NewContext) -> None:
    context = new_context("llama", n_ubatch=8)

    def twice() -> int:
        context.decode(batch((tokens(60), 0, 0), logits="last"), far())
        return context.decode(batch(([1], 64, 0)), far()).rows_done  # comes when the others wait

    flight = Flight(twice)
    waiting = []
    for pos in range(60, 64):  # each position follows on the one before: any other order is refused
        rows = batch(([1], pos, 0))
        waiting.append(Flight(lambda rows=rows: context.decode(rows, far()).rows_done, at=NEVER))
        waiting[-1].waits()
    assert [flight.lands(), *(each.lands() for each in waiting)] == [1] * 5


def test_a_signal_handler_goes_before_the_call_that_it_interrupts_in_its_waiting(new_context: NewContext) -> None:
    context = new_context("llama", n_ubatch=8)
    flight = Flight(lambda: context.decode(batch((tokens(60), 0, 0), logits="last"), far()))
    done = []

    def handler(*_: object) -> None:
        flight.clock.go_on()
        done.append(context.decode(batch(([1], 60, 0)), far()).rows_done)

    before = signal.signal(signal.SIGUSR1, handler)
    main = threading.main_thread().ident
    assert main is not None
    try:
        with Clock() as clock:

            def press() -> None:
                wait_for(lambda: clock.readings > 4, "the call to wait")
                signal.pthread_kill(main, signal.SIGUSR1)

            with threads(press):
                done.append(context.decode(batch(([1], 61, 0)), far()).rows_done)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert done == [1, 1]
    flight.lands()


def test_a_call_that_is_cancelled_while_it_waits_tells_of_its_sequences(
    busy: Callable[[str], tuple[lc.Context, Flight]],
) -> None:
    context, flight = busy("llama")
    gone, there = lc.CancelToken(), far()
    rows = batch((tokens(3), 60, 0), (tokens(2), 4, 1))
    waiting = [Flight(lambda: context.decode(rows, {0: gone, 1: there}, when_shared="stop"), at=NEVER),
               Flight(lambda: context.decode(rows, gone), at=NEVER)]  # fmt: skip
    with flight:
        for each in waiting:
            each.waits()
        gone.cancel("hung up")
        shared, whole = (each.lands() for each in waiting)
    assert shared.sequences == {
        0: lc.SequenceOutcome("rolled_back", 60, 60, True),
        1: lc.SequenceOutcome("rolled_back", 4, 4, False),
    }
    assert (shared.survivors, shared.reason, shared.rows_done) == ([1], "hung up", 0)
    assert [outcome.cancelled for outcome in whole.sequences.values()] == [True, True]
    assert whole.survivors == []


def test_a_batch_cannot_be_changed_under_a_call_that_reads_it(
    busy: Callable[[str], tuple[lc.Context, Flight]], new_context: NewContext
) -> None:
    context, flight = busy("llama")
    other = new_context("llama")
    rows = batch((tokens(60), 60, 0), logits="last")
    waiting = Flight(lambda: context.decode(rows, far()), at=NEVER)
    waiting.waits()
    for change in (rows.clear, lambda: rows.add(1, 120, 0), lambda: rows.add_sequence([1, 2], 120)):
        with pytest.raises(lc.InvalidBatchError, match="being decoded"):
            change()
    assert len(rows) == 60
    decode(other, batch((tokens(60, seed=9), 0, 0)))
    assert other.decode(rows).rows_done == 60, "two calls may read it"
    flight.lands()
    assert waiting.lands().rows_done == 60
    rows.clear()
    rows.add(1, 120, 0)
    assert context.decode(rows).rows_done == 1


def test_one_deadline_covers_the_wait_and_the_work(busy: Callable[[str], tuple[lc.Context, Flight]]) -> None:
    context, flight = busy("llama")
    rows = batch((tokens(200), 4, 1), logits="last")
    waiting = Flight(lambda: context.decode(rows, far()), at=NEVER)
    waiting.waits()
    waiting.clock.jumps_in(300)
    flight.lands()
    assert isinstance(waiting.lands(), lc.DeadlineExceeded)
    assert holds(context)[1][1] == 3


@pytest.mark.parametrize("arch", ["llama", "mamba"])
def test_many_threads_take_turns_under_their_tokens(arch: str, pair: Pair) -> None:
    context, twin = pair(arch, n_seq_max=6)

    def use(seq: int) -> None:
        for turn in range(20):
            context.decode(batch((tokens(4, seq), 4 * turn, seq)), lc.CancelToken())

    with threads(*(lambda seq=seq: use(seq) for seq in range(6))):
        pass
    assert all(last == 79 for _, last in holds(context).values())
    for turn in range(20):
        twin.decode(batch(*((tokens(4, seq), 4 * turn, seq) for seq in range(6))))
    assert close(one_more(context), one_more(twin))


# ---- one deadline ----------------------------------------------------------------------------------------------


def test_one_deadline_covers_a_load_and_the_calls_after_it(model_path: ModelPath) -> None:
    token = far()
    with (
        load(model_path("llama"), token=token) as model,
        model.context(n_ctx=1024, n_ubatch=8, n_threads=1, **CONTEXT) as context,
    ):
        rows = batch((tokens(60), 0, 0), logits="none")
        context.decode(rows, token)
        context.memory.clear()
        with Clock(jump_at=100), pytest.raises(lc.DeadlineExceeded):
            context.decode(rows, token)
        with pytest.raises(lc.DeadlineExceeded):
            context.state.save(0, token)
        with pytest.raises(lc.LoadCancelled) as caught:
            load(model_path("llama"), token=token)
        assert caught.value.cause is lc.Cause.DEADLINE


# ---- the GIL ---------------------------------------------------------------------------------------------------


def _others_run_during(call: Callable[[], object]) -> bool:
    """Whether another thread ran while `call` did, which it can only if `call` lets go of the GIL."""
    interval = sys.getswitchinterval()
    gate, over, seen = threading.Event(), False, list[bool]()

    def other() -> None:
        gate.wait()
        seen.append(over)

    thread = threading.Thread(target=other, daemon=True)
    try:
        sys.setswitchinterval(1000)  # nobody has to give up the GIL
        thread.start()  # it comes back when the other thread waits
        gate.set()
        call()
        over = True
    finally:
        sys.setswitchinterval(interval)
    thread.join()
    return seen == [False]


def test_other_threads_run_while_text_is_tokenized_and_detokenized(model_of: Callable[[str], lc.Model]) -> None:
    model = model_of("llama")
    text = (TEXT * (500_000 // len(TEXT) + 1))[:500_000]
    ids: list[np.ndarray] = []
    # The other thread may come too late for one call, but not for all.
    assert any(_others_run_during(lambda: ids.append(model.tokenize(text))) for _ in range(40))
    assert len(ids[0]) > 50_000
    assert any(_others_run_during(lambda: model.detokenize(ids[0])) for _ in range(40))
    assert not _others_run_during(lambda: sum(range(100_000))), "this holds the GIL"
    assert model.detokenize(ids[0], remove_special=True).strip() == text.strip()
