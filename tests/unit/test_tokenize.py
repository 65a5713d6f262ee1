"""Texts of strangers: tokens are llama.cpp's own, and no text ends the process or takes its time without end."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest

import llamacancel as lc
from llamacancel.commands.make_model import find_vocab

Vocab = Callable[[str], lc.Model]

VOCABS = ["bert-bge", "gpt-neox", "llama-bpe", "llama-spm", "qwen2"]


@pytest.fixture(scope="module")
def vocab() -> Iterator[Vocab]:
    models: dict[str, lc.Model] = {}

    def load(name: str) -> lc.Model:
        if name not in models:
            models[name] = lc.Model.load(find_vocab(name), vocab_only=True)
        return models[name]

    yield load
    for model in models.values():
        model.close()


PARTS = [
    "abcdefgh ", "0123456789", " \n\t\r", "!?.,;:'\"()[]{}<>|$+=~^`", "äöüßéñ", "日本語あいう", "😀🎉👍",
    "\u0301\u0300", "'s't're've'm'll'd ", "<|im_end|>", "<|endoftext|>", "</s>", "<s>", "[CLS]", "[SEP]",
    "the quick brown fox ", "    ", "\u00a0\u2003", "\x00\x01\x7f",
]  # fmt: skip


def texts(n: int) -> Iterator[bytes]:
    """Texts of all that tokenizers treat differently, and bytes that are no text; the same ones on every machine."""
    state = 7

    def below(limit: int) -> int:
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (state >> 33) % limit

    for i in range(n):
        if i % 6 == 0:
            yield bytes(below(256) for _ in range(below(300)))
            continue
        text = ""
        for _ in range(1 + below(60)):
            part, kind = PARTS[below(len(PARTS))], below(3)
            if kind == 0:
                text += part
            elif kind == 1:
                text += "".join(part[below(len(part))] for _ in range(1 + below(11)))
            else:
                text += part[below(len(part))] * (1, 2, 3, 5, 8, 40, 300)[below(7)]
        yield text.encode()


# Of the tokens that llama.cpp makes without our patches.
DIGESTS = {
    "bert-bge": "194fe6e74a07b9662ccbe82ba0f14975",
    "gpt-neox": "8710b374fc8cad38799fd501cf48b1b9",
    "llama-bpe": "956a48f400d0d1bf8a9e4d6e16aceaee",
    "llama-spm": "1288a4d4ddaacfe85663204ca4c9354a",
    "qwen2": "85077986cd302ad088617cdfab158bca",
}


@pytest.mark.parametrize("name", VOCABS)
def test_the_tokens_are_those_of_llama_cpp_as_it_is(name: str, vocab: Vocab) -> None:
    model, digest = vocab(name), hashlib.sha256()
    for text in texts(900):
        for special in (False, True):
            try:
                tokens = model.tokenize(text, special, special, token=lc.CancelToken(timeout=600))
            except ValueError:
                digest.update(b"refused")
            else:
                digest.update(tokens.astype("<i4").tobytes())
    assert digest.hexdigest()[:32] == DIGESTS[name]


@pytest.mark.parametrize("name", VOCABS)
@pytest.mark.parametrize("character", ["7", "a", "!", " ", "\n", "é", "日", "😀", "\u0301", "\x00"])
def test_a_run_of_any_length_is_tokenized_or_refused(name: str, character: str, vocab: Vocab) -> None:
    for n in (40_000, 300_000):
        try:
            assert len(vocab(name).tokenize(character * n, add_special=False)) <= 4 * n + 1
        except ValueError as error:
            assert "too long for this thread's stack" in str(error)  # noqa: PT017
    assert len(vocab(name).tokenize(f"{character} " * 3000, add_special=False)) <= 5 * 3001


def test_a_run_that_a_pattern_takes_as_one_is_tokenized_if_the_stack_is_deep_enough(vocab: Vocab) -> None:
    model = vocab("gpt-neox")
    assert list(model.tokenize("1" * 9999)) == list(model.tokenize("1" * 999)) * 10 + list(model.tokenize("1" * 9))


@pytest.mark.parametrize("kilobytes", [128, 512])
def test_a_thread_with_a_small_stack_is_told_so(kilobytes: int, vocab: Vocab) -> None:
    model = vocab("gpt-neox")
    told: list[str] = []

    def work() -> None:
        try:
            model.tokenize("1" * 40_000)
        except ValueError as error:
            told.append(str(error))

    before = threading.stack_size(kilobytes * 1024)
    try:
        thread = threading.Thread(target=work)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    assert "stack" in told[0]


def test_bytes_without_a_token_of_their_own_take_time_in_proportion(vocab: Vocab) -> None:
    model = vocab("llama-spm")
    one = model.tokenize("😀", add_special=False)[-4:]
    assert np.array_equal(model.tokenize("😀" * 300_000, add_special=False)[-1_200_000:], np.tile(one, 300_000))


def test_special_tokens_in_a_text_take_time_in_proportion(vocab: Vocab) -> None:
    model = vocab("qwen2")
    pair = [model.tokenize("<|im_end|>", parse_special=True)[0], model.tokenize("a")[0]]
    tokens = model.tokenize("<|im_end|>a" * 100_000, parse_special=True)
    assert np.array_equal(tokens, np.tile(pair, 100_000))
    for text in ("a<|im_end|>", "<|im_end|><|im_start|>", "<|im_end|>a<|im_start|>", "a<|im_start|><|im_end|>b"):
        whole = model.tokenize(text * 3, parse_special=True)
        assert model.detokenize(whole, unparse_special=True) == text * 3
        assert all(left != right for left, right in pairwise(whole))


@pytest.mark.parametrize("name", VOCABS)
def test_a_cancelled_text_is_not_tokenized(name: str, vocab: Vocab) -> None:
    token = lc.CancelToken()
    token.cancel("enough")
    with pytest.raises(lc.DecodeCancelled, match="enough"):
        vocab(name).tokenize("a", token=token)
    late = lc.CancelToken()
    threading.Timer(0.05, late.cancel, ["too long"]).start()
    with pytest.raises(lc.DecodeCancelled, match="too long"):
        vocab(name).tokenize("the quick brown fox " * 1_000_000, token=late)
    assert len(vocab(name).tokenize("the quick brown fox"))
