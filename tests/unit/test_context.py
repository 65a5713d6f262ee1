"""A context's ordinary work: decoding, outputs, memory, embeddings, encoders. The laws have their own tests."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import llamacancel as lc
from tests import device
from tests.conftest import GENERATIVE, batch_of, prompt

LoadedModel = Callable[[str], lc.Model]
NewContext = Callable[..., lc.Context]


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """The same but for the order in which floats were added."""
    return bool(np.abs(a - b).max() < 2e-2 * max(1.0, float(np.abs(b).max())))


# -- decode and its outputs


@pytest.mark.parametrize("arch", GENERATIVE)
def test_logits_are_given_for_the_rows_that_asked(arch: str, model_of: LoadedModel, new_context: NewContext) -> None:
    model, context = model_of(arch), new_context(arch)
    batch = lc.Batch(40)
    for i, token in enumerate(prompt(model, 40)):
        batch.add(int(token), i, 0, logits=i in (3, 35, 39))
    result = context.decode(batch)
    assert result.rows_done == 40
    assert result.survivors == [0]
    assert result.sequences[0] == lc.SequenceOutcome("completed", 0, 40, False)
    assert result.n_ubatches == 2
    assert result.seconds > 0
    rows = {i: context.logits(i) for i in (3, 35, 39)}
    assert all(
        row.shape == (model.n_vocab,) and row.dtype == np.float32 and np.isfinite(row).all() for row in rows.values()
    )
    for negative, i in ((-1, 39), (-2, 35), (-3, 3)):
        assert context.logits(negative).tobytes() == rows[i].tobytes()
    for wrong in (0, 38, 40, -4):
        with pytest.raises(IndexError):
            context.logits(wrong)


@pytest.mark.parametrize("arch", ["llama", "hybrid", "mamba"])
@pytest.mark.parametrize(
    ("lengths", "n_ubatches"),
    [
        ([1, 1, 1, 40, 50], 3),  # the single rows and one of each prompt, then 39 and 49 by themselves
        ([20, 20, 20, 20, 21], 3),  # 5 times 12, 5 times 8, and what more the last one has
        ([40, 40], 2),
        ([64, 64, 30], 3),
        ([7], 1),
    ],
)
def test_sequences_of_a_batch_share_ubatches_unless_that_makes_more_of_them(
    lengths: list[int], n_ubatches: int, arch: str, model_of: LoadedModel, new_context: NewContext
) -> None:
    model = model_of(arch)
    context = new_context(arch, n_seq_max=5, n_ubatch=64, n_batch=256, n_ctx=640, kv_unified=False)
    batch = lc.Batch(256)
    last = [batch.add_sequence(prompt(model, n, seed=i), 0, i, "last")[-1] for i, n in enumerate(lengths)]
    result = context.decode(batch)
    assert result.n_ubatches == n_ubatches
    together = [context.logits(row).copy() for row in last]
    for i, n in enumerate(lengths):
        context.memory.clear()
        batch.clear()
        batch.add_sequence(prompt(model, n, seed=i), 0, i, "last")
        context.decode(batch)
        assert close(together[i], context.logits(-1))


@pytest.mark.parametrize("arch", GENERATIVE)
def test_the_last_rows_logits_do_not_depend_on_who_else_asked(
    arch: str, model_of: LoadedModel, new_context: NewContext
) -> None:
    tokens = prompt(model_of(arch), 50)
    last, every = new_context(arch), new_context(arch)
    last.decode(batch_of(tokens))
    every.decode(batch_of(tokens, logits="all"))
    assert close(every.logits(), last.logits())
    assert np.argmax(every.logits()) == np.argmax(last.logits())


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_prompt_in_parts_is_the_prompt(arch: str, model_of: LoadedModel, new_context: NewContext) -> None:
    tokens = prompt(model_of(arch), 64)
    whole, parts = new_context(arch), new_context(arch)
    whole.decode(batch_of(tokens))
    parts.decode(batch_of(tokens[:32]))
    parts.decode(batch_of(tokens[32:], pos=32))
    assert parts.logits().tobytes() == whole.logits().tobytes()
    assert parts.memory.pos_max(0) == whole.memory.pos_max(0) == 63


@pytest.mark.parametrize("arch", GENERATIVE)
def test_the_same_calls_give_the_same_bits(arch: str, model_of: LoadedModel, new_context: NewContext) -> None:
    tokens = prompt(model_of(arch), 45)
    seen = set()
    for _ in range(2):
        context = new_context(arch)
        context.decode(batch_of(tokens))
        context.decode(batch_of(tokens[:1], pos=45))
        seen.add(context.logits().tobytes())
    assert len(seen) == 1


def test_logits_are_copies(model_of: LoadedModel, new_context: NewContext) -> None:
    context = new_context("llama")
    context.decode(batch_of(prompt(model_of("llama"), 5)))
    first = context.logits()
    kept = first.copy()
    context.decode(batch_of(np.array([9], np.int32), pos=5))
    assert np.array_equal(first, kept)
    assert not np.array_equal(context.logits(), kept)


def test_a_batch_without_outputs_has_none(model_of: LoadedModel, new_context: NewContext) -> None:
    context = new_context("llama")
    context.decode(batch_of(prompt(model_of("llama"), 5), logits="none"))
    with pytest.raises(IndexError):
        context.logits()
    context.decode(batch_of(np.array([9], np.int32), pos=5))
    assert context.logits().size


@pytest.mark.parametrize("arch", GENERATIVE)
def test_sequences_of_one_batch_do_not_see_each_other(
    arch: str, model_of: LoadedModel, new_context: NewContext
) -> None:
    model = model_of(arch)
    prompts = [prompt(model, 20, seed=3 * i) for i in range(3)]
    shared = new_context(arch, n_seq_max=3)
    batch = lc.Batch(60)
    for seq, tokens in enumerate(prompts):
        batch.add_sequence(tokens, seq_id=seq)
    result = shared.decode(batch)
    assert result.survivors == [0, 1, 2]
    for seq, tokens in enumerate(prompts):
        alone = new_context(arch)
        alone.decode(batch_of(tokens))
        assert close(shared.logits(20 * seq + 19), alone.logits())
        assert shared.memory.pos_max(seq) == 19


@pytest.mark.parametrize("arch", ["llama", "swa", "moe"])
def test_a_prompt_can_be_shared_by_sequences(arch: str, model_of: LoadedModel, new_context: NewContext) -> None:
    model = model_of(arch)
    tokens = prompt(model, 24)
    context = new_context(arch, n_seq_max=2, kv_unified=True)
    batch = lc.Batch(24, n_seq_max=2)
    batch.add_sequence(tokens, seq_id=[0, 1])
    context.decode(batch)
    after = lc.Batch(2)
    after.add(5, 24, 0, True)
    after.add(5, 24, 1, True)
    context.decode(after)
    alone = new_context(arch)
    alone.decode(batch_of(tokens))
    alone.decode(batch_of(np.array([5], np.int32), pos=24))
    assert close(context.logits(0), alone.logits())
    assert close(context.logits(1), alone.logits())


@pytest.mark.parametrize("params", [
    {"flash_attn": True}, {"flash_attn": False}, {"type_k": "q8_0"}, {"type_k": "q8_0", "type_v": "q8_0",
    "flash_attn": True},
    {"type_k": "f32", "type_v": "f32"}, {"kv_unified": False}, {"n_ubatch": 8}, {"n_ubatch": None},
    {"cancel_latency": None, "n_ubatch": None},
    {"n_batch": 40}, {"no_perf": True}, {"offload_kqv": False, "op_offload": False}, {"n_threads_batch": 2},
])  # fmt: skip
def test_the_ways_to_compute_agree(params: dict[str, object], model_of: LoadedModel, new_context: NewContext) -> None:
    tokens = prompt(model_of("llama"), 40)
    plain, other = new_context("llama"), new_context("llama", **params)
    for context in (plain, other):
        context.decode(batch_of(tokens))
    assert np.corrcoef(other.logits(), plain.logits())[0, 1] > 0.995
    assert "type_k" in params or close(other.logits(), plain.logits())


@pytest.mark.parametrize("params", [
    {"rope_freq_base": 100.0}, {"rope_freq_scale": 0.5}, {"rope_scaling": "linear", "rope_freq_scale": 0.25},
    {"rope_scaling": "yarn", "rope_freq_scale": 0.25, "yarn_ext_factor": 1.0, "yarn_orig_ctx": 32},
])  # fmt: skip
def test_the_rope_arguments_have_an_effect(
    params: dict[str, object], model_of: LoadedModel, new_context: NewContext
) -> None:
    tokens = prompt(model_of("llama"), 40)
    plain, other = new_context("llama"), new_context("llama", **params)
    for context in (plain, other):
        context.decode(batch_of(tokens))
    assert not np.array_equal(other.logits(), plain.logits())


@pytest.mark.parametrize("arch", ["llama", "swa", "mamba", "hybrid"])
def test_embeddings_can_be_decoded_in_place_of_tokens(
    arch: str, model_of: LoadedModel, new_context: NewContext
) -> None:
    model = model_of(arch)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((40, model.n_embd)).astype(np.float32)
    seen = []
    for scale in (1.0, 1.0, 2.0):
        context = new_context(arch)
        batch = lc.Batch(40, n_embd=model.n_embd)
        batch.add_sequence(np.tile(rows[:1], (40, 1)) if scale == 2.0 else rows)
        assert context.decode(batch).rows_done == 40
        assert np.isfinite(context.logits()).all()
        assert context.memory.pos_max(0) == 39
        seen.append(context.logits().tobytes())
    assert seen[0] == seen[1] != seen[2]


def test_tokens_can_follow_embeddings(model_of: LoadedModel, new_context: NewContext) -> None:
    model, context = model_of("llama"), new_context("llama")
    batch = lc.Batch(4, n_embd=model.n_embd)
    batch.add_sequence(np.ones((4, model.n_embd)))
    context.decode(batch)
    context.decode(batch_of(np.array([7], np.int32), pos=4))
    assert np.isfinite(context.logits()).all()


# -- memory


def test_memory_starts_empty_and_can_be_cleared(model_of: LoadedModel, new_context: NewContext) -> None:
    context = new_context("llama", n_seq_max=2)
    assert (context.memory.pos_min(0), context.memory.pos_max(0)) == (-1, -1)
    context.decode(batch_of(prompt(model_of("llama"), 9), seq_id=1))
    assert (context.memory.pos_min(1), context.memory.pos_max(1), context.memory.pos_max(0)) == (0, 8, -1)
    context.memory.clear()
    assert context.memory.pos_max(1) == -1


@pytest.mark.parametrize("arch", ["llama", "moe"])
def test_removing_the_end_goes_back_in_time(arch: str, model_of: LoadedModel, new_context: NewContext) -> None:
    tokens = prompt(model_of(arch), 64)
    gone, never = new_context(arch), new_context(arch)
    gone.decode(batch_of(tokens[:32]))
    gone.decode(batch_of(tokens[:10], pos=32))
    gone.memory.remove(0, 32)
    never.decode(batch_of(tokens[:32]))
    for context in (gone, never):
        context.decode(batch_of(tokens[32:], pos=32))
    assert gone.logits().tobytes() == never.logits().tobytes()


@pytest.mark.parametrize("arch", GENERATIVE)
def test_removing_all_of_a_sequence_always_works(arch: str, model_of: LoadedModel, new_context: NewContext) -> None:
    tokens = prompt(model_of(arch), 30)
    context, fresh = new_context(arch, n_seq_max=2), new_context(arch, n_seq_max=2)
    context.decode(batch_of(tokens))
    context.decode(batch_of(tokens[:7], seq_id=1))
    context.memory.remove(0)
    assert (context.memory.pos_max(0), context.memory.pos_max(1)) == (-1, 6)
    for each in (context, fresh):
        each.decode(batch_of(tokens))
    assert close(context.logits(), fresh.logits())
    context.memory.remove(1, 0, 100)
    context.memory.remove(1)


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("kv_unified", [True, False])
def test_a_copied_sequence_goes_on_like_the_first(
    arch: str, kv_unified: bool, model_of: LoadedModel, new_context: NewContext
) -> None:
    tokens = prompt(model_of(arch), 40)
    context = new_context(arch, n_seq_max=2, kv_unified=kv_unified)
    context.decode(batch_of(tokens[:30]))
    context.memory.copy(0, 1)
    assert context.memory.pos_max(1) == 29
    seen = []
    for seq in (0, 1):
        context.decode(batch_of(tokens[30:], pos=30, seq_id=seq))
        seen.append(context.logits())
    assert close(seen[1], seen[0])
    context.memory.copy(0, 0)
    assert context.memory.pos_max(0) == 39


def test_what_has_left_a_sliding_window_cannot_be_copied(model_of: LoadedModel, new_context: NewContext) -> None:
    context = new_context("swa", n_seq_max=2)
    context.decode(batch_of(prompt(model_of("swa"), 600)))
    with pytest.raises(ValueError, match="window has forgotten what position 100 would look back on"):
        context.memory.copy(0, 1, 0, 100)
    assert (context.memory.pos_min(1), context.memory.pos_max(1)) == (-1, -1)
    context.memory.copy(0, 1, 0, 599)  # one back: all that it looks on is there
    assert context.memory.pos_max(1) == 598


def test_part_of_a_shared_cache_can_be_copied(model_of: LoadedModel, new_context: NewContext) -> None:
    tokens = prompt(model_of("llama"), 40)
    context, fresh = new_context("llama", n_seq_max=2), new_context("llama")
    context.decode(batch_of(tokens))
    context.memory.copy(0, 1, 0, 20)
    assert context.memory.pos_max(1) == 19
    context.decode(batch_of(tokens[:4], pos=20, seq_id=1))
    fresh.decode(batch_of(tokens[:20]))
    fresh.decode(batch_of(tokens[:4], pos=20))
    assert close(context.logits(), fresh.logits())


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("kv_unified", [True, False])
def test_keeping_one_sequence_forgets_the_others(
    arch: str, kv_unified: bool, model_of: LoadedModel, new_context: NewContext
) -> None:
    context = new_context(arch, n_seq_max=3, kv_unified=kv_unified)
    for seq in range(3):
        context.decode(batch_of(prompt(model_of(arch), 5 + seq), seq_id=seq))
    context.memory.keep(1)
    assert [context.memory.pos_max(seq) for seq in range(3)] == [-1, 5, -1]
    context.decode(batch_of(np.array([3], np.int32), pos=6, seq_id=1))


@pytest.mark.parametrize(("arch", "kind"), [
    ("llama", "attention"), ("moe", "attention"), ("swa", "sliding_window"), ("mamba", "recurrent"), ("hybrid",
    "hybrid"),
    ("hybrid-conv", "hybrid"), ("embedding", "none"),
])  # fmt: skip
def test_a_context_tells_how_it_remembers(arch: str, kind: str, new_context: NewContext) -> None:
    context = new_context(arch, **({"embeddings": True} if arch == "embedding" else {}))
    assert context.memory.kind == kind
    assert repr(context.memory) == f"<Memory of {context!r}>"


def test_a_full_sliding_window_cache_can_be_taken_back(model_of: LoadedModel, new_context: NewContext) -> None:
    tokens = prompt(model_of("swa"), 700)
    context, fresh = new_context("swa", swa_full=True), new_context("swa", swa_full=True)
    context.decode(batch_of(tokens))
    context.memory.remove(0, 100)
    fresh.decode(batch_of(tokens[:100]))
    for each in (context, fresh):
        each.decode(batch_of(tokens[300:320], pos=100))
    assert close(context.logits(), fresh.logits())


# -- embeddings


def embed(context: lc.Context, *texts: np.ndarray) -> list[np.ndarray]:
    batch = lc.Batch(sum(map(len, texts)))
    for seq, tokens in enumerate(texts):
        batch.add_sequence(tokens, seq_id=seq)
    context.decode(batch)
    return [context.pooled_embeddings(seq) for seq in range(len(texts))]


@pytest.mark.parametrize("arch", ["embedding", "llama"])
def test_pooled_embeddings_are_what_pooling_makes_of_the_rows(
    arch: str, model_of: LoadedModel, new_context: NewContext
) -> None:
    model = model_of(arch)
    tokens = prompt(model, 17)
    rows_context = new_context(arch, embeddings=True, pooling="none")
    rows_context.decode(batch_of(tokens))
    rows = np.array([rows_context.embeddings(i) for i in range(17)])
    assert rows.shape == (17, model.n_embd)
    assert np.array_equal(rows_context.embeddings(-1), rows[16])
    wanted = {"mean": rows.mean(axis=0), "cls": rows[0], "last": rows[16]}
    for pooling, row in wanted.items():
        [pooled] = embed(new_context(arch, embeddings=True, pooling=pooling), tokens)
        assert pooled.shape == (model.n_embd,)
        assert close(pooled, row), pooling


def test_the_model_says_how_to_pool(model_of: LoadedModel, new_context: NewContext) -> None:
    tokens = prompt(model_of("embedding"), 9)
    [default] = embed(new_context("embedding", embeddings=True), tokens)
    [mean] = embed(new_context("embedding", embeddings=True, pooling="mean"), tokens)
    assert np.array_equal(default, mean)


def test_texts_are_embedded_together_as_alone(model_of: LoadedModel, new_context: NewContext) -> None:
    texts = [prompt(model_of("embedding"), n, seed=n) for n in (5, 9, 3)]
    together = embed(new_context("embedding", embeddings=True, n_seq_max=3, n_ubatch=None), *texts)
    for text, pooled in zip(texts, together, strict=True):
        [alone] = embed(new_context("embedding", embeddings=True), text)
        assert close(pooled, alone)


def test_an_encoder_can_be_used_again_and_again(model_of: LoadedModel, new_context: NewContext) -> None:
    tokens = prompt(model_of("embedding"), 9)
    context = new_context("embedding", embeddings=True)
    [first] = embed(context, tokens)
    embed(context, tokens[:4])
    [again] = embed(context, tokens)
    assert np.array_equal(first, again)


def test_a_generative_model_gives_embeddings_and_logits(model_of: LoadedModel, new_context: NewContext) -> None:
    model = model_of("llama")
    context = new_context("llama", embeddings=True, pooling="none")
    context.decode(batch_of(prompt(model, 8)))
    assert context.embeddings(-1).shape == (model.n_embd,)
    assert context.logits(-1).shape == (model.n_vocab,)


def test_an_encoders_output_is_what_the_decoder_attends_to(model_of: LoadedModel, new_context: NewContext) -> None:
    model = model_of("encdec")
    seen = []
    for seed in (0, 0, 4):
        context = new_context("encdec")
        with pytest.raises(lc.InvalidBatchError, match="encode"):
            context.decode(batch_of(np.array([1], np.int32)))
        context.encode(batch_of(prompt(model, 12, seed=seed)))
        context.decode(batch_of(np.array([1], np.int32)))
        seen.append(context.logits().tobytes())
    assert seen[0] == seen[1] != seen[2]


def test_a_model_without_a_memory_has_logits_for_each_row_that_sees_all_others(
    model_of: LoadedModel, new_context: NewContext
) -> None:
    tokens = prompt(model_of("diffusion"), 17)
    context = new_context("diffusion", n_ubatch=None)
    assert context.memory.kind == "none"
    context.decode(batch_of(tokens, logits="all"))
    first = np.array([context.logits(i) for i in range(17)])
    assert np.isfinite(first).all()
    assert np.ptp(first, axis=1).min() > 1
    tokens[-1] += 1
    context.decode(batch_of(tokens, logits="all"))
    second = np.array([context.logits(i) for i in range(17)])
    assert (first != second).any(axis=1).all()
    context.decode(batch_of(tokens[:5], logits="all"))
    context.decode(batch_of(tokens, logits="all"))
    assert np.array_equal(second, [context.logits(i) for i in range(17)])


# -- the rest


def test_the_sizes_are_told(new_context: NewContext) -> None:
    context = new_context("llama", n_ctx=1024, n_batch=128, n_ubatch=32, n_seq_max=2, kv_unified=False)
    assert (context.n_ctx, context.n_ctx_seq, context.n_batch, context.n_ubatch, context.n_seq_max) == (
        1024,
        512,
        128,
        32,
        2,
    )
    assert (context.n_threads, context.n_threads_batch) == (1, 1)
    assert repr(context) == f"<Context n_ctx=1024 n_seq_max=2 of {context.model!r}>"


def test_threads_can_be_set(model_of: LoadedModel, new_context: NewContext) -> None:
    context = new_context("llama")
    context.set_threads(2)
    assert (context.n_threads, context.n_threads_batch) == (2, 2)
    context.set_threads(1, 2)
    assert (context.n_threads, context.n_threads_batch) == (1, 2)
    context.decode(batch_of(prompt(model_of("llama"), 8)))
    context.set_threads(1)
    assert (context.n_threads, context.n_threads_batch) == (1, 1)


def test_a_context_with_yarn_leaves_its_model_as_it_was(model_of: LoadedModel, new_context: NewContext) -> None:
    new_context("llama", rope_scaling="yarn", rope_freq_scale=0.25, yarn_ext_factor=1.0, yarn_orig_ctx=32)
    assert model_of("llama").n_ctx_train == 4096


@pytest.mark.parametrize("n_seq_max", [2, 3, 4, 5])
@pytest.mark.parametrize("pooling", ["none", "mean", "cls", "last"])
def test_contexts_for_embeddings_can_have_any_number_of_sequences(
    n_seq_max: int, pooling: str, model_of: LoadedModel
) -> None:
    for arch in ("embedding", "llama"):
        with model_of(arch).context(
            n_ctx=512, embeddings=True, pooling=pooling, n_seq_max=n_seq_max, n_threads=1
        ) as context:
            batch = lc.Batch(7 * n_seq_max)
            for seq in range(n_seq_max):
                batch.add_sequence(prompt(model_of(arch), 7), seq_id=seq)
            context.decode(batch)


def test_a_context_without_sizes_takes_the_models(model_of: LoadedModel) -> None:
    with model_of("llama").context(n_threads=1) as context:
        assert context.n_ctx == 4096
        assert context.n_batch == 2048


def test_performance_is_counted_until_it_is_reset(model_of: LoadedModel, new_context: NewContext) -> None:
    context = new_context("llama")
    context.perf(reset=True)
    context.decode(batch_of(prompt(model_of("llama"), 20)))
    for i in range(3):
        context.decode(batch_of(np.array([5], np.int32), pos=20 + i))
    counted = context.perf()
    assert set(counted) == {"prompt_seconds", "prompt_tokens", "eval_seconds", "eval_tokens", "graphs_reused"}
    assert (counted["prompt_tokens"], counted["eval_tokens"]) == (20, 3)
    assert counted["prompt_seconds"] > 0
    assert counted["eval_seconds"] > 0
    assert context.perf(reset=True) == counted
    assert context.perf()["eval_seconds"] == 0


def test_a_given_ubatch_is_honoured_and_nothing_is_promised(new_context: NewContext) -> None:
    plan = new_context("llama", n_ubatch=24).latency_plan
    assert plan == lc.LatencyPlan(None, 24, plan.max_outputs, 0, 0, None, None)
    assert new_context("llama", n_ubatch=5000, n_ctx=256).n_ubatch == 256


def test_a_latency_is_planned_for(new_context: NewContext) -> None:
    context = new_context("llama", n_ubatch=None, cancel_latency=0.05)
    plan = context.latency_plan
    assert plan.target == 0.05
    assert plan.n_ubatch == context.n_ubatch
    assert 1 <= plan.n_ubatch <= 512
    assert plan.max_outputs >= 1
    assert plan.node_seconds is not None
    assert plan.node_seconds > 0


def test_without_an_aim_nothing_is_measured(new_context: NewContext) -> None:
    plan = new_context("llama", n_ubatch=None, cancel_latency=None).latency_plan
    assert (plan.target, plan.node_seconds, plan.attention_seconds) == (None, None, None)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted where Linux lists them")
def test_measuring_leaves_no_threads_of_its_own(model_path: Callable[[str], Path]) -> None:
    """OpenMP's would belong to the thread that made the context, and compete with those of the one that decodes."""

    def threads() -> set[str]:
        return {each.name for each in Path("/proc/self/task").iterdir()}

    with device.load(model_path("llama")) as model:
        before = threads()
        as_device: dict[str, object] = {"_n_pieces": 4}
        with model.context(n_ctx=64, n_threads=2, **as_device) as context:  # type: ignore[arg-type]
            assert context.latency_plan.node_seconds is not None
            end = time.monotonic() + 60
            while threads() - before and time.monotonic() < end:
                time.sleep(0.001)  # those that have ended are listed for a moment yet
            assert not threads() - before


def test_a_context_closes_at_the_end_of_with(model_of: LoadedModel) -> None:
    with model_of("llama").context(n_ctx=64, n_ubatch=16, n_threads=1) as context:
        assert not context.closed
    assert context.closed
    assert repr(context) == "<Context closed>"
    context.close()


def test_a_context_that_was_not_closed_warns(model_of: LoadedModel) -> None:
    context = model_of("llama").context(n_ctx=64, n_ubatch=16, n_threads=1)
    held = [context]
    del context
    with pytest.warns(ResourceWarning, match="unclosed <Context"):
        held.clear()
    gc.collect()


@pytest.mark.parametrize("how", [lambda it: pickle.loads(pickle.dumps(it)), copy.copy, copy.deepcopy])
def test_a_result_can_be_copied_and_pickled(
    how: Callable[[lc.DecodeResult], lc.DecodeResult], new_context: NewContext
) -> None:
    context = new_context("llama", n_seq_max=2)
    batch = lc.Batch(5)
    batch.add_sequence([7, 8, 9], seq_id=1)
    batch.add_sequence([7, 8], seq_id=0)
    result = context.decode(batch, lc.CancelToken())
    again = how(result)
    assert repr(again) == repr(result)
    assert (again.rows_done, again.survivors) == (5, [0, 1])
    assert again.sequences == {
        0: lc.SequenceOutcome("completed", 0, 2, False),
        1: lc.SequenceOutcome("completed", 0, 3, False),
    }


def test_a_result_is_made_by_a_decode_only() -> None:
    with pytest.raises(TypeError, match=r"Context\.decode"):
        lc.DecodeResult()


@pytest.mark.parametrize("how", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_context_is_not_copied(how: Callable[[object], object], new_context: NewContext) -> None:
    with pytest.raises(TypeError, match="Context"):
        how(new_context("llama"))


def test_the_outputs_of_the_last_batch_stay_when_the_next_is_refused(
    model_of: LoadedModel, new_context: NewContext
) -> None:
    context = new_context("llama")
    context.decode(batch_of(prompt(model_of("llama"), 20), logits="all"))
    before = [context.logits(i).tobytes() for i in range(20)]
    with pytest.raises(lc.InvalidBatchError):
        context.decode(batch_of(np.array([-1], np.int32), pos=20))
    assert [context.logits(i).tobytes() for i in range(20)] == before


def test_two_contexts_of_a_model_work_at_the_same_time(model_of: LoadedModel, new_context: NewContext) -> None:
    tokens = prompt(model_of("llama"), 100)
    reference = new_context("llama")
    reference.decode(batch_of(tokens))
    contexts = [new_context("llama") for _ in range(2)]
    results: list[bytes] = []

    def work(context: lc.Context) -> None:
        for _ in range(5):
            context.memory.clear()
            context.decode(batch_of(tokens))
            results.append(context.logits().tobytes())

    threads = [threading.Thread(target=work, args=(context,)) for context in contexts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(results) == {reference.logits().tobytes()}
    assert len(results) == 10


def test_the_parts_of_a_context_are_not_made_without_it(new_context: NewContext) -> None:
    for part in (type(new_context("llama").memory), type(new_context("llama").state)):
        for make in (part, lambda part=part: part.__new__(part)):
            with pytest.raises(TypeError):
                make()
        with pytest.raises(TypeError):
            part(None)


class Index:
    """An integer for `__index__` alone, and another one each time."""

    def __init__(self, *values: int) -> None:
        self.values = list(values)

    def __index__(self) -> int:
        return self.values.pop(0) if len(self.values) > 1 else self.values[0]


def test_a_sequence_id_is_read_once(model_of: LoadedModel, new_context: NewContext) -> None:
    context = new_context("llama", n_seq_max=2)
    context.decode(batch_of(prompt(model_of("llama"), 5)))
    assert context.memory.pos_max(Index(0, 9)) == 4
    context.memory.copy(Index(0, 9), Index(1, 9))
    context.memory.remove(Index(1, -5))
    data = context.state.save(Index(0, 77))
    context.state.load(Index(1, 77), data)
    assert [context.memory.pos_max(seq) for seq in (0, 1)] == [4, 4]
    context.memory.keep(Index(1, 5))
    assert [context.memory.pos_max(seq) for seq in (0, 1)] == [-1, 4]


def test_a_context_is_made_once(new_context: NewContext, model_of: LoadedModel) -> None:
    context = new_context("llama")
    with pytest.raises(TypeError, match="once"):
        context.__init__(model_of("llama"))  # type: ignore[misc]
    assert context.memory.pos_max(0) == -1


def test_learned_positions_are_computed_up_to_the_last(model_of: LoadedModel) -> None:
    model = model_of("positions")
    assert model.max_position_embeddings == 512
    assert model_of("llama").max_position_embeddings is None
    with model.context(n_ctx=1024, n_threads=2) as context:  # measured within the table
        context.decode(batch_of(prompt(model, 512)))
        assert np.isfinite(context.logits()).all()


def test_a_text_can_be_encoded_anew_when_the_decoder_has_forgotten_the_one_before(
    model_of: LoadedModel, new_context: NewContext
) -> None:
    context, other = new_context("encdec"), new_context("encdec")
    start = batch_of(np.array([0], np.int32))
    context.encode(batch_of(np.arange(9, 13, dtype=np.int32)))
    context.decode(start)
    context.memory.clear()
    for each in (context, other):
        each.encode(batch_of(np.arange(20, 33, dtype=np.int32)))
        each.decode(start)
    assert context.logits().tobytes() == other.logits().tobytes()


def test_several_sequences_of_an_encoder_and_decoder_share_a_cache(new_context: NewContext) -> None:
    with pytest.raises(lc.ContextError, match="kv_unified=True"):
        new_context("encdec", n_seq_max=2, kv_unified=False)
