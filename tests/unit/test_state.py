"""A sequence's state is saved and comes back to the bit, in the same context, in another, through a file."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import llamacancel as lc
from llamacancel.commands.make_model import make_lora
from tests.conftest import GENERATIVE, batch_of, prompt
from tests.unit.test_damaged_files import Gguf

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


def test_a_link_to_a_file_stays_a_link(model_of: LoadedModel, new_context: NewContext, tmp_path: Path) -> None:
    context = new_context("llama")
    context.decode(batch_of(prompt(model_of("llama"), 50)))
    (tmp_path / "link").symlink_to("state")
    for mode in (None, 0o640):
        if mode is not None:
            (tmp_path / "state").chmod(mode)
        context.state.save_file(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "state").read_bytes() == context.state.save(0)
        assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == (mode or 0o600)
    assert sorted(os.listdir(tmp_path)) == ["link", "state"]


def test_a_pipe_is_not_replaced_by_a_file(model_of: LoadedModel, new_context: NewContext, tmp_path: Path) -> None:
    context = new_context("llama")
    context.decode(batch_of(prompt(model_of("llama"), 50)))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is none"):
        context.state.save_file(tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_state_of_other_weights_is_refused_whatever_their_file_is_called(
    model_path: Callable[[str], Path], tmp_path: Path
) -> None:
    original = Gguf.read(model_path("llama"))
    tuned = original.with_tensor(
        b"blk.1.attn_q.weight", lambda tensor: replace(tensor, data=bytes(byte ^ 1 for byte in tensor.data))
    )
    paths = [tmp_path / "a" / "model.gguf", tmp_path / "b" / "model.gguf", tmp_path / "renamed.gguf"]
    for path, gguf in zip(paths, (original, tuned, original), strict=True):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gguf.to_bytes())
    with contextlib.ExitStack() as stack:
        models = [stack.enter_context(lc.Model.load(path)) for path in paths]
        context, other, renamed = (stack.enter_context(model.context(n_ctx=64, n_threads=1)) for model in models)
        context.decode(batch_of(prompt(models[0], 20)))
        state = context.state.save(0)
        with pytest.raises(lc.StateError, match=r"model was .*, and is .* here"):
            other.state.load(0, state)
        assert other.memory.pos_max(0) == -1
        renamed.state.load(0, state)
        assert follow(renamed, 20) == follow(context, 20)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"rope_freq_base": 20000.0}, "rope_freq_base was 10000, and is 20000 here"),
        ({"rope_freq_scale": 0.5}, "rope_freq_scale was 1, and is 0.5 here"),
        ({"yarn_ext_factor": 1.0}, "yarn_ext_factor was 0, and is 1 here"),
        ({"yarn_orig_ctx": 77}, "yarn_orig_ctx was .*, and is 77 here"),
        ({"type_k": "q8_0"}, "type_k was f16, and is q8_0 here"),
        ({"flash_attn": False}, "flash_attn was on, and is off here"),
    ],
)
def test_what_a_state_was_computed_with_is_told_where_it_differs(
    params: dict[str, object], words: str, model_of: LoadedModel, new_context: NewContext
) -> None:
    context, other = new_context("llama", flash_attn=True), new_context("llama", **{"flash_attn": True, **params})
    context.decode(batch_of(prompt(model_of("llama"), 20)))
    with pytest.raises(lc.StateError, match=words):
        other.state.load(0, context.state.save(0))
    assert other.memory.pos_max(0) == -1


def test_adapters_and_their_scales_are_part_of_a_state(
    model_of: LoadedModel, new_context: NewContext, tmp_path: Path
) -> None:
    model = model_of("llama")
    one, same, two = (
        model.load_lora(make_lora(tmp_path / f"{name}.gguf", model.path, seed=seed))
        for name, seed in (("one", 0), ("same", 0), ("two", 1))
    )
    context, other = new_context("llama"), new_context("llama")
    context.set_lora([(one, 1.0), (two, 0.5)])
    context.decode(batch_of(prompt(model, 20)))
    state = context.state.save(0)
    for adapters in ((), [(one, 1.0)], [(one, 0.5), (two, 0.5)], [(two, 1.0), (one, 0.5)]):
        other.set_lora(adapters)
        with pytest.raises(lc.StateError, match=r"adapters was .*, and is .* here"):
            other.state.load(0, state)
    other.set_lora([(two, 0.5), (same, 1.0)])
    other.state.load(0, state)
    assert other.memory.pos_max(0) == 19


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


def test_a_state_that_would_leave_out_an_encoders_output_is_refused(new_context: NewContext) -> None:
    context = new_context("encdec")
    context.encode(batch_of(np.arange(9, 13, dtype=np.int32)))
    context.decode(batch_of(np.array([0], np.int32)))
    logits = context.logits().tobytes()
    with pytest.raises(lc.StateError, match="encoder"):
        context.state.save(0)
    assert context.logits().tobytes() == logits


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
