"""A sequence's state is saved and comes back to the bit, in the same context, in another, through a file."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE, batch_of, prompt

LoadedModel = Callable[[str], lc.Model]
NewContext = Callable[..., lc.Context]
EVERY = [*GENERATIVE, "hybrid-conv", "hybrid-swa"]


def follow(context: lc.Context, pos: int, seq_id: int = 0) -> bytes:
    context.decode(batch_of(np.arange(30, 38, dtype=np.int32), pos=pos, seq_id=seq_id))
    return context.logits().tobytes()


@pytest.mark.parametrize("arch", EVERY)
@pytest.mark.parametrize("n", [1, 60, 400])
def test_a_saved_sequence_goes_on_with_the_same_bits(
    arch: str, n: int, model_of: LoadedModel, new_context: NewContext
) -> None:
    context, other = new_context(arch), new_context(arch)
    context.decode(batch_of(prompt(model_of(arch), n)))
    data = context.state.save(0)
    wanted = follow(context, n)
    other.state.load(0, data)
    assert other.memory.pos_max(0) == n - 1
    assert follow(other, n) == wanted


@pytest.mark.parametrize("arch", EVERY)
def test_loading_replaces_what_the_sequence_held(arch: str, model_of: LoadedModel, new_context: NewContext) -> None:
    context, other = new_context(arch), new_context(arch)
    context.decode(batch_of(prompt(model_of(arch), 50)))
    data = context.state.save(0)
    wanted = follow(context, 50)
    other.decode(batch_of(prompt(model_of(arch), 90, seed=4)))
    other.state.load(0, data)
    assert other.memory.pos_max(0) == 49
    assert np.abs(np.frombuffer(follow(other, 50), np.float32) - np.frombuffer(wanted, np.float32)).max() < 0.05


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_state_can_be_loaded_into_another_sequence(arch: str, model_of: LoadedModel, new_context: NewContext) -> None:
    context = new_context(arch, n_seq_max=3)
    context.decode(batch_of(prompt(model_of(arch), 40), seq_id=0))
    context.decode(batch_of(prompt(model_of(arch), 20, seed=3), seq_id=2))
    context.state.load(1, context.state.save(0))
    assert [context.memory.pos_max(seq) for seq in range(3)] == [39, 39, 19]
    seen = [np.frombuffer(follow(context, 40, seq), np.float32) for seq in (0, 1)]
    assert np.abs(seen[0] - seen[1]).max() < 0.05
    assert context.memory.pos_max(2) == 19


@pytest.mark.parametrize("arch", GENERATIVE)
def test_saving_changes_nothing(arch: str, model_of: LoadedModel, new_context: NewContext) -> None:
    saved, plain = new_context(arch), new_context(arch)
    for context in (saved, plain):
        context.decode(batch_of(prompt(model_of(arch), 40)))
    before = saved.logits().tobytes()
    assert saved.state.save() == saved.state.save(0)
    assert saved.logits().tobytes() == before
    assert follow(saved, 40) == follow(plain, 40)


def test_an_empty_sequence_has_a_state(new_context: NewContext, model_of: LoadedModel) -> None:
    context = new_context("llama", n_seq_max=2)
    data = context.state.save(1)
    context.decode(batch_of(prompt(model_of("llama"), 5)))
    context.state.load(0, data)
    assert context.memory.pos_max(0) == -1
    assert len(follow(context, 0)) > 0


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: np.frombuffer(data, np.uint8)])
def test_a_state_comes_in_any_buffer(
    kind: Callable[[bytes], object], model_of: LoadedModel, new_context: NewContext
) -> None:
    context = new_context("llama")
    context.decode(batch_of(prompt(model_of("llama"), 5)))
    data = context.state.save(0)
    context.memory.clear()
    context.state.load(0, kind(data))  # type: ignore[arg-type]
    assert context.memory.pos_max(0) == 4


@pytest.mark.parametrize("arch", ["llama", "hybrid"])
def test_a_file_holds_a_state(arch: str, model_of: LoadedModel, new_context: NewContext, tmp_path: Path) -> None:
    context, other = new_context(arch), new_context(arch)
    context.decode(batch_of(prompt(model_of(arch), 50)))
    for path in (tmp_path / "state", os.fspath(tmp_path / "state")):
        context.state.save_file(path)
        other.state.load_file(path)
    assert os.listdir(tmp_path) == ["state"]
    assert (tmp_path / "state").read_bytes() == context.state.save(0)
    assert follow(other, 50) == follow(context, 50)


def test_a_cancelled_save_leaves_no_file(model_of: LoadedModel, new_context: NewContext, tmp_path: Path) -> None:
    context = new_context("llama")
    context.decode(batch_of(prompt(model_of("llama"), 50)))
    token = lc.CancelToken()
    token.cancel("no")
    for call in (
        lambda: context.state.save(0, token),
        lambda: context.state.save_file(tmp_path / "state", 0, token),
        lambda: context.state.load(0, context.state.save(0), token),
    ):
        with pytest.raises(lc.DecodeCancelled) as caught:
            call()
        assert caught.value.reason == "no"
    assert os.listdir(tmp_path) == []
    assert context.memory.pos_max(0) == 49


def test_a_context_without_the_room_says_so_and_keeps_what_it_had(
    model_of: LoadedModel, new_context: NewContext
) -> None:
    large, small, plain = new_context("llama"), new_context("llama", n_ctx=256), new_context("llama", n_ctx=256)
    large.decode(batch_of(prompt(model_of("llama"), 700)))
    for context in (small, plain):
        context.decode(batch_of(prompt(model_of("llama"), 30)))
    with pytest.raises(lc.StateError):
        small.state.load(0, large.state.save(0))
    assert small.memory.pos_max(0) == 29
    assert follow(small, 30) == follow(plain, 30)


def test_a_cache_of_another_type_is_refused(model_of: LoadedModel, new_context: NewContext) -> None:
    context, other = new_context("llama"), new_context("llama", type_k="q8_0")
    context.decode(batch_of(prompt(model_of("llama"), 30)))
    with pytest.raises(lc.StateError):
        other.state.load(0, context.state.save(0))
    assert other.memory.pos_max(0) == -1


def test_contexts_can_exchange_states_at_the_same_time(model_of: LoadedModel, new_context: NewContext) -> None:
    contexts = [new_context("llama") for _ in range(2)]
    contexts[0].decode(batch_of(prompt(model_of("llama"), 50)))
    data = contexts[0].state.save(0)
    wanted = follow(contexts[0], 50)
    seen: list[bytes] = []

    def work(context: lc.Context) -> None:
        for _ in range(10):
            context.memory.clear()
            context.state.load(0, data)
            seen.append(follow(context, 50))

    threads = [threading.Thread(target=work, args=(context,)) for context in contexts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) == {wanted}


def test_the_state_says_whose_it_is(new_context: NewContext) -> None:
    context = new_context("llama")
    assert repr(context.state) == f"<State of {context!r}>"


def test_a_state_is_saved_and_loaded_after_the_model_was_closed(model_path: Callable[[str], Path]) -> None:
    model = lc.Model.load(model_path("llama"))
    with model.context(n_ctx=256, n_threads=1) as context:
        context.decode(batch_of(prompt(model, 20)))
        data = context.state.save()
        model.close()
        assert context.state.save() == data
        context.state.load(0, data)
        assert context.memory.pos_max(0) == 19
