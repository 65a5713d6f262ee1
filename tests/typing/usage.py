"""What a type checker knows of the public names. Never run: test_stubs.py has mypy read it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from typing_extensions import assert_type

import llamacancel as lc


def tokens() -> None:
    token = lc.CancelToken(timeout=1.0)
    assert_type(token.cancel("gone"), bool)
    assert_type(token.cause, lc.Cause | None)
    assert_type(token.reason, str | None)
    assert_type(token.child(timeout=2), lc.CancelToken)
    assert_type(lc.CancelToken.any_of(token, token), lc.CancelToken)
    assert_type(token.wait(1), bool)
    assert_type(token.remaining(), float | None)
    token.cancel(1)  # type: ignore[arg-type]
    lc.CancelToken(timeout="1")  # type: ignore[arg-type]


def models(path: Path, token: lc.CancelToken) -> None:
    with lc.Model.load(path, n_gpu_layers=-1, progress=lambda share: share < 1, token=token) as model:
        assert_type(model, lc.Model)
        assert_type(model.tokenize("text", parse_special=True, token=lc.CancelToken()), NDArray[np.int32])
        assert_type(model.detokenize([1, 2]), str)
        assert_type(model.token_to_piece(1), bytes)
        assert_type(model.is_eog(1), bool)
        assert_type(model.n_vocab, int)
        assert_type(model.metadata, dict[str, str])
        assert_type(model.chat_template, str | None)
        assert_type(model.bos, int | None)
        assert_type(model.size, int)
        assert_type(model.load_lora("lora.gguf"), lc.LoraAdapter)
        assert_type(model.context(n_ctx=64, cancel_latency=None), lc.Context)
        kind: Literal["attention", "sliding_window", "recurrent", "hybrid", "hybrid_sliding_window", "none", "other"]
        kind = model.memory_kind
        assert_type(model.vocab_type == "bpe" and kind == "none", bool)
        model.context(flash_attn="yes")  # type: ignore[arg-type]
        model.context(n_context=1)  # type: ignore[call-arg]
        model.n_vocab = 1  # type: ignore[misc]
    lc.Model.load(path, split_mode="column")  # type: ignore[arg-type]
    lc.Model.load(path, n_gpu_layers=-1, rpc_servers=["127.0.0.1:50052"]).close()
    lc.Model.load(path, rpc_servers=[50052])  # type: ignore[list-item]


def contexts(model: lc.Model, adapter: lc.LoraAdapter, token: lc.CancelToken) -> None:
    with lc.Context(model, n_ctx=128, n_seq_max=2, type_k="q8_0") as ctx:
        assert_type(ctx, lc.Context)
        assert_type(ctx.model, lc.Model)
        batch = lc.Batch(8, n_seq_max=2)
        assert_type(batch.add(1, 0, [0, 1], logits=True), int)
        assert_type(batch.add_sequence([1, 2], pos=1, logits="all"), range)
        assert_type(batch.tokens, NDArray[np.int32] | None)
        assert_type(len(batch), int)
        result = ctx.decode(batch, {0: token}, on_cancel="keep", when_shared="stop")
        assert_type(result, lc.DecodeResult)
        assert_type(result.sequences, dict[int, lc.SequenceOutcome])
        assert_type(result.sequences[0].state, Literal["completed", "rolled_back", "kept", "dirty"])
        assert_type(result.survivors, list[int])
        assert_type(ctx.encode(batch, token), lc.DecodeResult)
        assert_type(ctx.logits(), NDArray[np.float32])
        assert_type(ctx.embeddings(0), NDArray[np.float32])
        assert_type(ctx.pooled_embeddings(), NDArray[np.float32])
        ctx.memory.remove(0, 1, 2)
        assert_type(ctx.memory.pos_max(0), int)
        assert_type(ctx.state.save(0, token), bytes)
        assert_type(ctx.latency_plan, lc.LatencyPlan)
        assert_type(ctx.latency_plan.target, float | None)
        assert_type(ctx.perf()["eval_tokens"], int)
        assert_type(ctx.dirty_sequences, list[int])
        ctx.set_lora([(adapter, 1.0)])
        ctx.state.load(0, bytearray(8))
        ctx.state.save_file(Path("state"))
        ctx.set_lora([adapter])  # type: ignore[list-item]
        ctx.decode(batch, on_cancel="drop")  # type: ignore[arg-type]
        ctx.decode([1, 2])  # type: ignore[arg-type]
        batch.add_sequence([1], logits="some")  # type: ignore[arg-type]


def library() -> None:
    assert_type(lc.build_info()["gpu_offload"], bool)
    assert_type(lc.build_info()["devices"][0]["name"], str)
    assert_type(lc.__version__, str)


def samplers(ctx: lc.Context) -> None:
    sampler = lc.Sampler(temperature=0.5, logit_bias={1: float("-inf")}, mirostat=2, seed=1)
    assert_type(sampler.sample(ctx, 0, lc.CancelToken(timeout=1)), int)
    assert_type(sampler.clone(), lc.Sampler)
    sampler.accept(1, model=ctx.model)
    lc.Sampler(0.5)  # type: ignore[call-arg]
    lc.Sampler(mirostat=3)  # type: ignore[arg-type]


def errors(error: lc.DecodeCancelled, late: lc.DeadlineExceeded) -> None:
    assert_type(error.cause, lc.Cause)
    assert_type(error.latency, float)
    assert_type(error.sequences, dict[int, lc.SequenceOutcome])
    timeout: TimeoutError = late
    bad: ValueError = lc.InvalidBatchError("")
    state: ValueError = lc.StateError("")
    every: list[lc.LlamaCancelError] = [error, late, lc.LoadCancelled("", cause=lc.Cause.CLIENT), lc.ModelLoadError("")]
    print(timeout, bad, state, every)


def engines(model: lc.Model, token: lc.CancelToken) -> None:
    with lc.Engine(model, slots=2, queue_limit=8, step_seconds=None, pooling="mean", type_k="q8_0") as engine:
        assert_type(engine, lc.Engine)
        generation = engine.submit(
            "text", max_tokens=4, sampler=lc.Sampler(), timeout=1, token=token, priority=1, stop="a", logprobs=2
        )
        assert_type(generation, lc.Generation)
        engine.submit(np.zeros(3, np.int32), stop=["a", "b"], stop_tokens=[1, 2])
        for piece in generation:
            assert_type(piece, lc.Piece)
            assert_type(piece.tokens, tuple[lc.TokenInfo, ...])
            text: str = piece
            print(text)
        assert_type(generation.poll(), lc.Piece | None)
        assert_type(generation.cancel("gone"), bool)
        assert_type(generation.wait(1), bool)
        assert_type(generation.cause, lc.Cause | None)
        assert_type(generation.error, Exception | None)
        assert_type(generation.cancel_latency, float | None)
        assert_type(
            generation.finish_reason,
            Literal["stop", "length", "cancelled", "deadline", "shutdown", "error"] | None,
        )
        assert_type(generation.state, Literal["queued", "prefill", "decode", "finished"])
        assert_type(generation.usage, lc.Usage)
        assert_type(generation.result(timeout=1), lc.GenerationResult)
        assert_type(generation.result().tokens[0].top, tuple[tuple[int, bytes, float], ...])
        assert_type(engine.embed([1, 2]), lc.Embedding)
        assert_type(engine.embed("text").result(), NDArray[np.float32])
        assert_type(engine.snapshot(), lc.EngineSnapshot)
        assert_type(engine.snapshot().slots[0], lc.SlotView)
        assert_type(engine.snapshot().recent, tuple[lc.RequestView, ...])
        assert_type(engine.cancel("id"), bool)
        assert_type(engine.add_listener(lambda view: print(view.state)).remove(), bool)
        with engine.submit("text") as entered:
            assert_type(entered, lc.Generation)
        engine.submit("text", stop=1)  # type: ignore[arg-type]
        engine.submit("text", 4)  # type: ignore[call-arg]
        generation.state = "finished"  # type: ignore[misc]
        engine.close(drain=False, timeout=None)
    lc.Engine(model, pooling="most")  # type: ignore[arg-type]


async def async_engines(model: lc.Model, engine: lc.Engine) -> None:
    async with lc.aio.Engine(model, slots=2) as made:
        assert_type(made, lc.aio.Engine)
        assert_type(made.engine, lc.Engine)
        generation = made.submit("text", max_tokens=3)
        assert_type(generation, lc.aio.Generation)
        async for piece in generation:
            assert_type(piece, lc.Piece)
        assert_type(await generation.result(), lc.GenerationResult)
        assert_type(await made.embed("text"), NDArray[np.float32])
        assert_type(await made.tokenize("text"), NDArray[np.int32])
        assert_type(generation.generation, lc.Generation)
        async with made.submit([1]) as entered:
            assert_type(entered, lc.aio.Generation)
    await lc.aio.Engine(engine).close(drain=False)
