"""A request's bits depend on the request alone: not yet a law that is kept everywhere (docs/laws.md says where).

What a row comes to does not depend on where its prompt was cut, on how many rows were computed with it, or on the
number of threads. With weights of floats that holds for two rows and more: llama.cpp multiplies one in another way.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

import llamacancel as lc
from llamacancel.commands.make_model import cached_model

from .words import same_bits

N = 700  # tokens: past the 512 cells from which on one row's attention was parted among the threads

if "AVX2 = 1" not in lc.build_info()["system"]:
    pytest.skip("the kernel that has the same bits for any number of rows needs AVX2 and our patches",
                allow_module_level=True)  # fmt: skip


KINDS = [("llama", "q8_0"), ("llama", "f16"), ("moe", "f16"), ("hybrid", "f16"), ("mamba", "f16")]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def model(request: pytest.FixtureRequest) -> lc.Model:
    arch, quant = request.param
    return lc.Model.load(cached_model(arch, "tiny", quant=quant))


def logits_of(model: lc.Model, cuts: list[int], threads: int = 2, beside: int = 0) -> np.ndarray:
    """The last logits of a prompt that is computed in calls of so many rows, each beside `beside` other sequences."""
    with model.context(
        n_ctx=1024 * (1 + beside), n_batch=1024, n_ubatch=512, n_seq_max=1 + beside, kv_unified=False, n_threads=threads
    ) as context:
        tokens = np.random.default_rng(1).integers(300, 2000, N).astype(np.int32)
        at = 0
        for count in cuts:
            batch = lc.Batch(1024, n_seq_max=1 + beside)
            for seq in range(1 + beside):
                batch.add_sequence(tokens[at : at + count] + seq, pos=at, seq_id=seq)
            context.decode(batch)
            row = count - 1
            at += count
        assert at == N
        return context.logits(row).copy()


def cut(seed: int, least: int, most: int = 120) -> list[int]:
    """The prompt in pieces of random lengths."""
    chance, cuts, left = random.Random(seed), [], N
    while left > most + least:
        cuts.append(chance.randint(least, most))
        left -= cuts[-1]
    return [*cuts, left]


@pytest.mark.parametrize("seed", range(3))
def test_a_prompt_has_the_same_bits_wherever_it_is_cut(model: lc.Model, seed: int) -> None:
    assert same_bits(logits_of(model, cut(seed, 2)), logits_of(model, [N]))


def test_a_quantized_model_has_them_row_by_row_too() -> None:
    with lc.Model.load(cached_model("llama", "tiny", quant="q8_0")) as model:
        assert same_bits(logits_of(model, [N - 40, *[1] * 40]), logits_of(model, [N]))


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_changes_no_bits(model: lc.Model, threads: int) -> None:
    assert same_bits(logits_of(model, [N - 3, 1, 1, 1], threads), logits_of(model, [N - 3, 1, 1, 1]))


@pytest.mark.parametrize("beside", [1, 3])
def test_a_quantized_model_has_them_beside_others_too(beside: int) -> None:
    pieces = [200, 200, 200, 90, *[1] * 10]
    with lc.Model.load(cached_model("llama", "tiny", quant="q8_0")) as model:
        assert same_bits(logits_of(model, pieces, beside=beside), logits_of(model, pieces))
