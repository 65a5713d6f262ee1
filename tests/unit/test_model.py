"""What a Model tells and does: its file's facts, text to tokens and back, adapters, the ways to load it."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import llamacancel as lc
from llamacancel.commands.make_model import CHAT_TEMPLATE, find_vocab, make_lora
from tests.conftest import TEXT, batch_of, prompt

LoadedModel = Callable[[str], lc.Model]
NewContext = Callable[..., lc.Context]


def test_the_facts_are_those_of_the_file(model_of: LoadedModel) -> None:
    model = model_of("llama")
    assert (model.n_vocab, model.n_embd, model.n_layer, model.n_head) == (32000, 64, 3, 2)
    assert (model.n_ctx_train, model.n_swa, model.n_embd_inp, model.vocab_type) == (4096, 0, 64, "spm")
    assert (model.bos, model.eos, model.eot, model.decoder_start_token) == (1, 2, None, None)
    assert (model.sep, model.pad, model.mask, model.adds_eos) == (None, None, None, False)
    assert (model.has_encoder, model.has_decoder, model.adds_bos, model.closed) == (False, True, True, False)
    assert 2_000_000 < model.n_params < 3_000_000
    assert model.size > model.n_params
    assert model.description.startswith("llama")
    assert repr(model) == f"<Model {model.description!r}>"


def test_the_metadata_is_text_and_a_copy(model_of: LoadedModel) -> None:
    model = model_of("llama")
    metadata = model.metadata
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block_count"] == "3"
    assert metadata["general.description"].startswith("Random weights")
    assert metadata["tokenizer.chat_template"] == CHAT_TEMPLATE
    metadata.clear()
    assert model.metadata["general.architecture"] == "llama"


@pytest.mark.parametrize(("vocab", "facts"), [
    ("qwen2", {"vocab_type": "bpe", "nl": 198, "pad": 151643, "eot": 151645, "sep": None, "fim_mid": None}),
    ("bert-bge", {"vocab_type": "wpm", "sep": 102, "pad": 0, "mask": 103, "adds_eos": False, "fim_pre": None}),
])  # fmt: skip
def test_special_tokens_are_told(vocab: str, facts: dict[str, object]) -> None:
    with lc.Model.load(find_vocab(vocab), vocab_only=True) as model:
        assert {name: getattr(model, name) for name in facts} == facts


def test_a_token_has_attributes(model_of: LoadedModel) -> None:
    model = model_of("llama")
    told = [model.token_attributes(token) for token in (0, 1, 3, 400)]
    assert told == [{"unknown"}, {"control"}, {"byte"}, {"normal"}]


def test_the_chat_template_is_the_files_or_none(model_of: LoadedModel) -> None:
    assert model_of("llama").chat_template == CHAT_TEMPLATE == model_of("llama").get_chat_template()
    assert model_of("llama").get_chat_template("tool_use") is None
    assert model_of("embedding").chat_template is None


@pytest.mark.parametrize(("arch", "kind"), [
    ("llama", "attention"), ("moe", "attention"), ("swa", "sliding_window"), ("mamba", "recurrent"),
    ("hybrid", "hybrid"), ("embedding", "none"), ("encdec", "attention"),
])  # fmt: skip
def test_the_memory_kind_is_told_before_a_context_is_made(arch: str, kind: str, model_of: LoadedModel) -> None:
    assert model_of(arch).memory_kind == kind


def test_a_sliding_window_has_a_width(model_of: LoadedModel) -> None:
    assert model_of("swa").n_swa == 32


def test_an_encoder_and_a_decoder_are_told(model_of: LoadedModel) -> None:
    model = model_of("encdec")
    assert (model.has_encoder, model.has_decoder, model.decoder_start_token) == (True, True, 1)


def test_the_path_is_what_load_was_given(model_path: Callable[[str], Path]) -> None:
    path = model_path("llama")
    for given in (path, os.fspath(path), os.fsencode(path)):
        with lc.Model.load(given) as model:
            assert model.path == os.fspath(given)


# -- text


@pytest.mark.parametrize("arch", ["llama", "mamba"])
@pytest.mark.parametrize("text", [
    "Hello, world!", TEXT, "two  spaces ", "tabs\tand\nlines\n\n", "naïve café — “quoted”",
    "日本語のテキスト", "🦙🦙", "a\0b",
    "x" * 5000, "if (a < b) { return; }",
])  # fmt: skip
def test_detokenize_gives_back_what_tokenize_took(arch: str, text: str, model_of: LoadedModel) -> None:
    model = model_of(arch)
    tokens = model.tokenize(text, add_special=False)
    assert tokens.dtype == np.int32
    assert tokens.ndim == 1
    assert model.detokenize(tokens) == text
    assert b"".join(model.token_to_piece(int(t)) for t in tokens).decode().removeprefix(" ") == text.removeprefix(" ")


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "gpt-neox"])
def test_a_vocabulary_alone_tokenizes(name: str) -> None:
    with lc.Model.load(find_vocab(name), vocab_only=True) as vocab:
        tokens = vocab.tokenize(TEXT + "🦙 日本", add_special=False)
        assert vocab.detokenize(tokens) == TEXT + "🦙 日本"
        assert vocab.n_vocab > int(tokens.max())


def test_special_tokens_are_added_where_the_model_wants_them(model_of: LoadedModel) -> None:
    model = model_of("llama")
    plain = model.tokenize("Hello", add_special=False)
    assert model.tokenize("Hello").tolist() == [model.bos, *plain.tolist()]
    assert model.tokenize("").tolist() == [model.bos]


def test_special_tokens_in_a_text_are_parsed_on_request(model_of: LoadedModel) -> None:
    model = model_of("llama")
    assert model.tokenize("</s>", add_special=False, parse_special=True).tolist()[-1] == model.eos
    assert model.eos not in model.tokenize("</s>", add_special=False).tolist()


def test_special_tokens_are_told_as_text_on_request(model_of: LoadedModel) -> None:
    model = model_of("llama")
    tokens = [model.bos, *model.tokenize("Hello", add_special=False).tolist(), model.eos]
    assert model.detokenize(tokens).strip() == "Hello"
    assert "</s>" in model.detokenize(tokens, unparse_special=True)
    assert "<s>" in model.detokenize(tokens, unparse_special=True)
    assert "<s>" not in model.detokenize(tokens, remove_special=True, unparse_special=True)


def test_text_comes_as_str_or_as_bytes(model_of: LoadedModel) -> None:
    model = model_of("llama")
    wanted = model.tokenize("naïve").tolist()
    for text in ("naïve".encode(), bytearray("naïve".encode())):
        assert model.tokenize(text).tolist() == wanted


def test_bytes_that_are_no_text_become_replacement_characters(model_of: LoadedModel) -> None:
    model = model_of("llama")
    lone = next(t for t in range(model.n_vocab) if model.token_to_piece(t) == b"\xf0")
    assert model.detokenize([lone]) == "\N{REPLACEMENT CHARACTER}"
    assert model.detokenize([]) == ""
    assert model.detokenize(np.array([lone, lone], np.int64)) == 2 * "\N{REPLACEMENT CHARACTER}"


def test_a_piece_of_a_special_token_is_shown_on_request(model_of: LoadedModel) -> None:
    model = model_of("llama")
    assert model.eos is not None
    assert model.token_to_piece(model.eos) == b"</s>"
    assert model.token_to_piece(model.eos, special=False) == b""


def test_tokens_that_end_a_generation_are_known(model_of: LoadedModel) -> None:
    model = model_of("llama")
    assert model.eos is not None
    assert model.is_eog(model.eos) is True
    assert model.is_control(model.eos) is True
    ordinary = int(model.tokenize("Hello", add_special=False)[-1])
    assert model.is_eog(ordinary) is False
    assert model.is_control(ordinary) is False


# -- loading


@pytest.mark.parametrize("params", [
    {"use_mmap": False}, {"check_tensors": True}, {"n_gpu_layers": -1}, {"split_mode": "none"}, {"split_mode": "row"},
    {"tensor_split": [1]}, {"use_mlock": True}, {"use_mmap": False, "use_mlock": True}, {"n_gpu_layers": 99},
])  # fmt: skip
def test_the_way_of_loading_changes_nothing_in_what_is_computed(
    params: dict[str, object], model_path: Callable[[str], Path], model_of: LoadedModel, new_context: NewContext
) -> None:
    tokens = prompt(model_of("llama"), 20)
    wanted = new_context("llama")
    wanted.decode(batch_of(tokens))
    with (
        lc.Model.load(model_path("llama"), **params) as model,  # type: ignore[arg-type]
        model.context(n_ctx=64, n_ubatch=32, n_threads=1) as context,
    ):
        context.decode(batch_of(tokens))
        assert context.logits().tobytes() == wanted.logits().tobytes()


def test_progress_is_told_from_nothing_to_all(model_path: Callable[[str], Path]) -> None:
    shares: list[float] = []
    with lc.Model.load(model_path("llama"), progress=shares.append):
        assert shares == sorted(shares)
        assert shares[0] == 0.0
        assert shares[-1] == 1.0


def test_a_load_can_be_cancelled(model_path: Callable[[str], Path]) -> None:
    token = lc.CancelToken()
    with pytest.raises(lc.LoadCancelled) as caught:
        lc.Model.load(model_path("llama"), progress=lambda share: token.cancel("enough"), token=token)
    assert (caught.value.cause, caught.value.reason) == (lc.Cause.CLIENT, "enough")


def test_a_context_outlives_its_models_close(model_path: Callable[[str], Path]) -> None:
    model = lc.Model.load(model_path("llama"))
    context = model.context(n_ctx=64, n_ubatch=16, n_threads=1)
    model.close()
    assert model.closed
    context.decode(batch_of(np.array([1, 2, 3], np.int32)))
    assert context.logits().shape == (32000,)
    assert context.model is model
    context.close()


def test_a_model_that_nobody_holds_is_freed(model_path: Callable[[str], Path]) -> None:
    model = lc.Model.load(model_path("llama"))
    held = weakref.ref(model)
    del model
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("how", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_model_is_not_copied(how: Callable[[object], object], model_of: LoadedModel) -> None:
    with pytest.raises(TypeError, match="Model"):
        how(model_of("llama"))


# -- adapters


@pytest.mark.parametrize("arch", ["llama", "moe", "swa"])
def test_a_lora_changes_the_logits_and_goes_without_a_trace(
    arch: str, model_of: LoadedModel, new_context: NewContext, tmp_path: Path
) -> None:
    model, context = model_of(arch), new_context(arch)
    adapter = model.load_lora(make_lora(tmp_path / "lora.gguf", model.path))

    def logits() -> bytes:
        context.memory.clear()
        context.decode(batch_of(prompt(model, 30)))
        return context.logits().tobytes()

    plain = logits()
    context.set_lora([(adapter, 1.0)])
    full = logits()
    context.set_lora([(adapter, 0.5)])
    half = logits()
    context.set_lora([(adapter, 0.0)])
    none = logits()
    context.set_lora(())
    assert len({plain, full, half}) == 3
    assert np.abs(np.frombuffer(none, np.float32) - np.frombuffer(plain, np.float32)).max() < 1e-4
    assert logits() == plain
    context.set_lora([(adapter, 1.0)])
    assert logits() == full


def test_two_adapters_add_up(model_of: LoadedModel, new_context: NewContext, tmp_path: Path) -> None:
    model, context = model_of("llama"), new_context("llama")
    adapters = [model.load_lora(make_lora(tmp_path / f"{seed}.gguf", model.path, seed=seed)) for seed in range(2)]
    seen = []
    for pairs in ([(adapters[0], 1.0)], [(adapters[1], 1.0)], [(adapters[0], 1.0), (adapters[1], 1.0)]):
        context.memory.clear()
        context.set_lora(pairs)
        context.decode(batch_of(prompt(model, 10)))
        seen.append(context.logits().tobytes())
    assert len(set(seen)) == 3


def test_an_adapter_of_one_context_leaves_the_others_alone(
    model_of: LoadedModel, new_context: NewContext, tmp_path: Path
) -> None:
    model = model_of("llama")
    one, other = new_context("llama"), new_context("llama")
    adapter = model.load_lora(make_lora(tmp_path / "lora.gguf", model.path))
    assert repr(adapter) == f"<LoraAdapter {os.fspath(tmp_path / 'lora.gguf')!r}>"
    tokens = prompt(model, 10)
    other.decode(batch_of(tokens))
    before = other.logits().tobytes()
    one.set_lora([(adapter, 1.0)])
    one.decode(batch_of(tokens))
    other.memory.clear()
    other.decode(batch_of(tokens))
    assert other.logits().tobytes() == before != one.logits().tobytes()


def test_how_the_library_was_built_is_told() -> None:
    info = lc.build_info()
    assert info["devices"]
    assert {"name", "description", "memory", "kind"} == set(info["devices"][0])
    assert "cpu" in {device["kind"] for device in info["devices"]}
    assert "CPU" in info["backends"]
    assert isinstance(info["llama_cpp"], str)
    assert isinstance(info["gpu_offload"], bool)
