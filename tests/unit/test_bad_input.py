# ruff: noqa: E501 (a line for each case)
"""Bad input gets a Python exception that names what was wrong, and the context is as it was.

Each case runs against a context that holds twelve positions of sequence 0. After the exception the context holds
the same positions, nothing is dirty, and what it computes next has the same bits as in a context that saw no error.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llamacancel as lc
from llamacancel.commands.make_model import cached_model, find_vocab, make_lora, make_model
from tests.conftest import batch_of, prompt

HELD = 12  # positions of sequence 0 that a context holds before the bad input


@dataclass
class World:
    """What a case has to work with."""

    ctx: lc.Context
    model: lc.Model
    model_of: Callable[[str], lc.Model]
    new_context: Callable[..., lc.Context]
    folder: Path


@dataclass
class Case:
    name: str
    kind: type[BaseException]
    words: str  # in the message, in this order, whatever is between
    call: Callable[[World], object]
    arch: str = "llama"
    params: dict[str, Any] = field(default_factory=dict)


def rows(*items: tuple[int, int, Any], n_seq_max: int = 4, logits: bool = True) -> lc.Batch:
    """A batch of (token, position, sequences)."""
    batch = lc.Batch(max(len(items), 1), n_seq_max)
    for token, pos, seqs in items:
        batch.add(token, pos, seqs, logits)
    return batch


def decode(*items: tuple[int, int, Any], **kwargs: Any) -> Callable[[World], object]:
    return lambda w: w.ctx.decode(rows(*items), **kwargs)


def follow(n: int, pos: int = HELD, seq_id: int = 0) -> lc.Batch:
    return batch_of(np.arange(5, 5 + n, dtype=np.int32), pos=pos, seq_id=seq_id)


SHARED = {"n_seq_max": 4, "kv_unified": True}
OWN = {"n_seq_max": 4, "kv_unified": False, "n_ctx": 1024}


def _context(**params: Any) -> Callable[[World], object]:
    def call(w: World) -> object:
        with w.model.context(**{"n_ctx": 64, "n_threads": 1, "n_ubatch": 16, **params}) as context:
            return context

    return call


def _sampler(**options: Any) -> Callable[[World], object]:
    return lambda w: lc.Sampler(model=w.model, **options)


def _bits(ctx: lc.Context, n: int = 5) -> bytes:
    ctx.decode(batch_of(np.arange(20, 20 + n, dtype=np.int32), pos=HELD, logits="all"))
    return b"".join(ctx.logits(i).tobytes() for i in range(n))


DECODE = [
    Case("decode: an empty batch", lc.InvalidBatchError, "empty", lambda w: w.ctx.decode(lc.Batch(4))),
    Case("decode: an empty sequence", lc.InvalidBatchError, "empty", lambda w: w.ctx.decode(batch_of(np.zeros(0, np.int32)))),
    Case("decode: more rows than n_batch", lc.InvalidBatchError, "65 rows n_batch 64", lambda w: w.ctx.decode(follow(65)),
         params={"n_batch": 64}),
    Case("decode: token -1", lc.InvalidBatchError, "row 0 token -1 vocabulary", decode((-1, HELD, 0))),
    Case("decode: the token after the last", lc.InvalidBatchError, "row 0 token 32000 vocabulary 31999", decode((32000, HELD, 0))),
    Case("decode: token 2**31-1", lc.InvalidBatchError, "row 0 token 2147483647", decode((2**31 - 1, HELD, 0))),
    Case("decode: token -2**31", lc.InvalidBatchError, "row 0 token -2147483648", decode((-(2**31), HELD, 0))),
    Case("decode: a bad token in the middle", lc.InvalidBatchError, "row 1 token 40000", decode((1, HELD, 0), (40000, HELD + 1, 0))),
    Case("decode: sequence 1 of 1", lc.InvalidBatchError, "row 0 sequence id 1 n_seq_max is 1", decode((5, 0, 1))),
    Case("decode: sequence -1", lc.InvalidBatchError, "row 0 sequence id -1", decode((5, HELD, -1))),
    Case("decode: sequence 2**31-1", lc.InvalidBatchError, "row 0 sequence id 2147483647", decode((5, HELD, 2**31 - 1))),
    Case("decode: a sequence named twice in a row", lc.InvalidBatchError, "row 0 sequence id 0 twice", decode((5, HELD, [0, 0])), params=SHARED),
    Case("decode: position 0 again", lc.InvalidBatchError, "row 0 position 0 sequence 0 follow 11", decode((5, 0, 0))),
    Case("decode: the last position again", lc.InvalidBatchError, "position 11 follow 11", decode((5, HELD - 1, 0))),
    Case("decode: a gap to what is held", lc.InvalidBatchError, "position 13 follow 11", decode((5, HELD + 1, 0))),
    Case("decode: a gap within the batch", lc.InvalidBatchError, "row 1 position 14 follow position 12 row 0", decode((5, HELD, 0), (5, HELD + 2, 0))),
    Case("decode: a position twice", lc.InvalidBatchError, "row 1 position 12 follow position 12", decode((5, HELD, 0), (6, HELD, 0))),
    Case("decode: decreasing positions", lc.InvalidBatchError, "row 1 position 11 follow", decode((5, HELD, 0), (6, HELD - 1, 0))),
    Case("decode: a negative position", lc.InvalidBatchError, "row 0 position -1 negative", decode((5, -1, 0))),
    Case("decode: position 2**31-1", lc.InvalidBatchError, "position 2147483647 follow", decode((5, 2**31 - 1, 0))),
    Case("decode: a gap in another sequence", lc.InvalidBatchError, "row 2 position 2 sequence 1 follow",
         decode((5, HELD, 0), (5, 0, 1), (6, 2, 1)), params=SHARED),
    Case("decode: a row of two sequences of which one is held", lc.InvalidBatchError, "row 0 (does not follow|different)", decode((5, HELD, [0, 1])), params=SHARED),
    Case("decode: sequences that diverged share a row", lc.InvalidBatchError, "row 0 (does not follow|different)",
         lambda w: (w.ctx.decode(follow(HELD, pos=0, seq_id=1)), w.ctx.memory.remove(1, 6), w.ctx.decode(rows((5, HELD, [0, 1])))),
         params=SHARED),
    Case("decode: sequences that diverged in the batch share a row", lc.InvalidBatchError, "row 2 joins",
         decode((5, 0, 1), (6, 0, 2), (7, 1, [1, 2])), params=SHARED),
    Case("decode: a shared row in a recurrent state", lc.InvalidBatchError, "row 0 several sequences recurrent", decode((5, 0, [1, 2])), "mamba", {"n_seq_max": 4}),
    Case("decode: a shared row with caches apart", lc.InvalidBatchError, "row 0 several sequences kv_unified", decode((5, 0, [1, 2])), params=OWN),
    Case("decode: the last position that there is", lc.InvalidBatchError, "row 0 2147483647", decode((5, 2**31 - 1, 1)), params=SHARED),
    Case("decode: embeddings of the wrong width", lc.InvalidBatchError, "embeddings 32 64", lambda w: w.ctx.decode(_floats(32))),
    Case("decode: a batch that is a list", TypeError, "batch Batch list", lambda w: w.ctx.decode([1, 2, 3])),
    Case("decode: no batch", TypeError, "batch Batch NoneType", lambda w: w.ctx.decode(None)),
    Case("decode: a token that is a string", TypeError, "CancelToken str", lambda w: w.ctx.decode(follow(1), "stop")),
    Case("decode: a token that is a list", TypeError, "CancelToken list", lambda w: w.ctx.decode(follow(1), [lc.CancelToken()])),
    Case("decode: tokens by sequence that are none", TypeError, "token of sequence 0 CancelToken NoneType", lambda w: w.ctx.decode(follow(1), {0: None})),
    Case("decode: a token for a sequence without rows", lc.InvalidBatchError, "token sequence 1 no row", lambda w: w.ctx.decode(follow(1), {0: lc.CancelToken(), 1: lc.CancelToken()})),
    Case("decode: a token for a sequence without rows alone", lc.InvalidBatchError, "token sequence -7 no row", lambda w: w.ctx.decode(follow(1), {-7: lc.CancelToken()})),
    Case("decode: tokens by a name", TypeError, "sequence id integer 'a'", lambda w: w.ctx.decode(follow(1), {"a": lc.CancelToken()})),
    Case("decode: tokens by a huge id", ValueError, "sequence id 1099511627776", lambda w: w.ctx.decode(follow(1), {2**40: lc.CancelToken()})),
    Case("decode: on_cancel unknown", ValueError, "on_cancel 'rollback' 'keep' 'drop'", lambda w: w.ctx.decode(follow(1), on_cancel="drop")),
    Case("decode: on_cancel a list", ValueError, "on_cancel", lambda w: w.ctx.decode(follow(1), on_cancel=[])),
    Case("decode: when_shared unknown", ValueError, "when_shared 'finish' 'stop' 'some'", lambda w: w.ctx.decode(follow(1), when_shared="some")),
    Case("decode: no room", lc.MemoryFullError, "memory no room", lambda w: w.ctx.decode(follow(256)), params={"n_ctx": 256}),
    Case("decode: no room behind the first ubatches", lc.MemoryFullError, "memory no room", lambda w: w.ctx.decode(follow(250)), params={"n_ctx": 256, "n_batch": 256}),
    Case("decode: no room in a hybrid", lc.MemoryFullError, "memory no room", lambda w: w.ctx.decode(follow(256)), "hybrid", {"n_ctx": 256}),
    Case("decode: no room in a sequence's own cache", lc.MemoryFullError, "memory no room", lambda w: w.ctx.decode(follow(256)), params=OWN),
    Case("encode: a model without an encoder", lc.InvalidBatchError, "no encoder decode", lambda w: w.ctx.encode(follow(1))),
    Case("encode: no batch", TypeError, "batch Batch", lambda w: w.ctx.encode(3)),
]  # fmt: skip


def _floats(width: int, n: int = 1) -> lc.Batch:
    batch = lc.Batch(n, n_embd=width)
    batch.add_sequence(np.zeros((n, width), np.float32), pos=HELD)
    return batch


OUTPUTS = [
    Case("logits: a row without", IndexError, "row 0 no logits", lambda w: w.ctx.logits(0)),
    Case("logits: a row behind the last", IndexError, "row 12 no logits", lambda w: w.ctx.logits(HELD)),
    Case("logits: a row far behind", IndexError, "row 2147483647 no logits", lambda w: w.ctx.logits(2**31 - 1)),
    Case("logits: before the first output", IndexError, "row -2 no logits", lambda w: w.ctx.logits(-2)),
    Case("logits: the smallest index", IndexError, "row -2147483648 no logits", lambda w: w.ctx.logits(-(2**31))),
    Case("logits: an index of 40 bits", ValueError, "i must be", lambda w: w.ctx.logits(2**40)),
    Case("logits: an index that is a float", TypeError, "i must be an integer 1.0", lambda w: w.ctx.logits(1.0)),
    Case("logits: an index that is True", TypeError, "i must be an integer True", lambda w: w.ctx.logits(True)),
    Case("embeddings: a context without", IndexError, "no embedding", lambda w: w.ctx.embeddings(-1)),
    Case("pooled_embeddings: a context without", IndexError, "sequence 0 no pooled", lambda w: w.ctx.pooled_embeddings(0)),
    Case("pooled_embeddings: a negative sequence", ValueError, "seq_id -1", lambda w: w.ctx.pooled_embeddings(-1)),
    Case("embeddings: those that were pooled", IndexError, "pooled pooled_embeddings", lambda w: _embedding(w).embeddings(0)),
    Case("decode: a position that the model has not learned", lc.InvalidBatchError, "row 0 position 512 learned 511",
         lambda w: w.new_context("positions", n_ctx=600, n_batch=600, n_threads=2).decode(batch_of(np.arange(9, 13, dtype=np.int32), pos=512))),
    Case("encode: a position that the model has not learned", lc.InvalidBatchError, "row 2 position 4096 learned 4095",
         lambda w: w.new_context("embedding", n_threads=2, embeddings=True).encode(batch_of(np.arange(9, 13, dtype=np.int32), pos=4094))),
    Case("encode: anew, and the decoder holds the text before", lc.InvalidBatchError, "row 0 decoder holds sequence 0 remove",
         lambda w: _translated(w).encode(batch_of(np.arange(9, 13, dtype=np.int32)))),
    Case("pooled_embeddings: another sequence", IndexError, "sequence 1 no pooled", lambda w: _embedding(w).pooled_embeddings(1)),
    Case("logits: an encoder has none", IndexError, "row 0 no logits", lambda w: _embedding(w).logits(0)),
    Case("memory: an encoder has none", lc.ContextError, "without a memory", lambda w: _embedding(w).memory.clear()),
    Case("state: an encoder has none", lc.ContextError, "without a memory no state", lambda w: _embedding(w).state.save(0)),
    Case("decode: an encoder's batch in more than one piece", lc.InvalidBatchError, "one piece 33 rows n_ubatch is 32",
         lambda w: w.new_context("embedding", embeddings=True).decode(batch_of(prompt(w.model_of("embedding"), 33)))),
]  # fmt: skip


def _translated(w: World) -> lc.Context:
    context = w.new_context("encdec")
    context.encode(batch_of(np.arange(9, 13, dtype=np.int32)))
    context.decode(batch_of(np.array([0], np.int32)))
    return context


def _embedding(w: World) -> lc.Context:
    context = w.new_context("embedding", embeddings=True)
    context.decode(batch_of(prompt(w.model_of("embedding"), 8)))
    return context


MEMORY = [
    Case("memory.remove: sequence -1", ValueError, "sequence id -1", lambda w: w.ctx.memory.remove(-1)),
    Case("memory.remove: sequence 1 of 1", ValueError, "sequence id 1", lambda w: w.ctx.memory.remove(1)),
    Case("memory.remove: a sequence that is a string", TypeError, "sequence id integer '0'", lambda w: w.ctx.memory.remove("0")),
    Case("memory.remove: a position of 40 bits", ValueError, "p0 1099511627776", lambda w: w.ctx.memory.remove(0, 2**40)),
    Case("memory.remove: a position that is None", TypeError, "p1 integer None", lambda w: w.ctx.memory.remove(0, 0, None)),
    Case("memory.pos_max: a sequence that is not", ValueError, "sequence id 9", lambda w: w.ctx.memory.pos_max(9)),
    Case("memory.pos_min: a sequence that is not", ValueError, "sequence id 64", lambda w: w.ctx.memory.pos_min(64)),
    Case("memory.keep: a sequence that is not", ValueError, "sequence id 1", lambda w: w.ctx.memory.keep(1)),
    Case("memory.keep: a sequence that is a float", TypeError, "sequence id integer 0.0", lambda w: w.ctx.memory.keep(0.0)),
    Case("memory.copy: to a sequence that is not", ValueError, "sequence id 4", lambda w: w.ctx.memory.copy(0, 4), params=SHARED),
    Case("memory.copy: from a sequence that is not", ValueError, "sequence id -1", lambda w: w.ctx.memory.copy(-1, 0), params=SHARED),
    Case("memory.copy: into one that is not empty", ValueError, "sequence 1 holds positions up to 2",
         lambda w: (w.ctx.decode(follow(3, 0, 1)), w.ctx.memory.copy(0, 1)), params=SHARED),
    Case("memory.copy: part of a recurrent state", ValueError, "recurrent whole", lambda w: w.ctx.memory.copy(0, 1, 0, 3), "mamba", {"n_seq_max": 2}),
    Case("memory.copy: part of a hybrid's state", ValueError, "recurrent whole", lambda w: w.ctx.memory.copy(0, 1, 2, 5), "hybrid", {"n_seq_max": 2}),
    Case("memory.copy: part between caches apart", ValueError, "whole kv_unified", lambda w: w.ctx.memory.copy(0, 1, 0, 3), params=OWN),
    Case("memory.copy: a position that is a string", TypeError, "p0 integer", lambda w: w.ctx.memory.copy(0, 0, "a")),
]  # fmt: skip


def _state(change: Callable[[bytearray], object], seq_id: Any = 0) -> Callable[[World], object]:
    def call(w: World) -> object:
        data = bytearray(w.ctx.state.save(0))
        changed = change(data)
        return w.ctx.state.load(seq_id, data if changed is None else changed)

    return call


def _foreign_state(arch: str) -> Callable[[World], object]:
    def call(w: World) -> object:
        other = w.new_context(arch)
        other.decode(batch_of(prompt(w.model_of(arch), HELD)))
        return w.ctx.state.load(0, other.state.save(0))

    return call


STATE = [
    Case("state.load: nothing", lc.StateError, "0 bytes no saved state", _state(lambda d: b"")),
    Case("state.load: half a header", lc.StateError, "10 bytes no saved state", _state(lambda d: d[:10])),
    Case("state.load: the header alone", lc.StateError, "no saved state", _state(lambda d: d[:24])),
    Case("state.load: half of it", lc.StateError, "no saved state part", _state(lambda d: d[: len(d) // 2])),
    Case("state.load: all but the last byte", lc.StateError, "no saved state part", _state(lambda d: d[:-1])),
    Case("state.load: one byte more", lc.StateError, "no saved state part", _state(lambda d: d + b"\0")),
    Case("state.load: zeros", lc.StateError, "no saved state", _state(lambda d: bytes(len(d)))),
    Case("state.load: another magic", lc.StateError, "no saved state", _state(lambda d: b"X" + d[1:])),
    Case("state.load: a bit flipped in the data", lc.StateError, "damaged checksum", _state(lambda d: d[:-9] + bytes([d[-9] ^ 4]) + d[-8:])),
    Case("state.load: a bit flipped in the description", lc.StateError, "saved elsewhere model", _state(lambda d: d[:26] + bytes([d[26] ^ 1]) + d[27:])),
    Case("state.load: of another model", lc.StateError, "saved elsewhere model was memory was recurrent is attention", _foreign_state("mamba")),
    Case("state.load: of another attention model", lc.StateError, "saved elsewhere model was", _foreign_state("moe")),
    Case("state.load: into a sequence that is not", ValueError, "sequence id 1", _state(lambda d: None, 1)),
    Case("state.load: into a sequence that is None", TypeError, "sequence id integer None", _state(lambda d: None, None)),
    Case("state.load: text", TypeError, "bytes", lambda w: w.ctx.state.load(0, "state")),
    Case("state.load: None", TypeError, "bytes", lambda w: w.ctx.state.load(0, None)),
    Case("state.save: a sequence that is not", ValueError, "sequence id -1", lambda w: w.ctx.state.save(-1)),
    Case("state.save: a token that is none", TypeError, "CancelToken", lambda w: w.ctx.state.save(0, "token")),
    Case("state.load_file: no file", FileNotFoundError, "nowhere", lambda w: w.ctx.state.load_file(w.folder / "nowhere")),
    Case("state.load_file: a folder", IsADirectoryError, "", lambda w: w.ctx.state.load_file(w.folder)),
    Case("state.save_file: to a device", OSError, "is none /dev/null", lambda w: w.ctx.state.save_file(os.devnull)),
    Case("state.save_file: to a folder", OSError, "is none", lambda w: w.ctx.state.save_file(w.folder)),
    Case("state.save_file: into no folder", FileNotFoundError, "nowhere", lambda w: w.ctx.state.save_file(w.folder / "nowhere" / "state")),
]  # fmt: skip


CONTEXT = [
    *(Case(f"context: {name} = {value!r}", kind, name, _context(**{name: value})) for name, value, kind in [
        ("n_ctx", 0, ValueError), ("n_ctx", -1, ValueError), ("n_ctx", 2**31, ValueError), ("n_ctx", 1.5, TypeError),
        ("n_ctx", True, TypeError), ("n_ctx", "64", TypeError), ("n_batch", 0, ValueError), ("n_batch", None, TypeError),
        ("n_ubatch", 0, ValueError), ("n_ubatch", 2.0, TypeError), ("n_seq_max", 0, ValueError), ("n_seq_max", 100000, ValueError),
        ("n_seq_max", None, TypeError), ("n_threads", 0, ValueError), ("n_threads", -1, ValueError), ("n_threads", 10**6, ValueError),
        ("n_threads_batch", 0, ValueError), ("cancel_latency", 0, ValueError), ("cancel_latency", -1, ValueError),
        ("cancel_latency", math.nan, ValueError), ("cancel_latency", math.inf, ValueError), ("cancel_latency", "fast", TypeError),
        ("pooling", "sum", ValueError), ("pooling", 1, ValueError), ("flash_attn", "yes", ValueError), ("flash_attn", None, ValueError),
        ("type_k", "f64", ValueError), ("type_v", "q2_k", ValueError), ("type_k", 1, ValueError), ("rope_scaling", "ntk", ValueError),
        ("rope_freq_base", math.nan, ValueError), ("rope_freq_base", -1.0, ValueError), ("rope_freq_base", 10**400, ValueError), ("rope_freq_scale", "x", TypeError),
        ("yarn_ext_factor", math.inf, ValueError), ("yarn_attn_factor", math.nan, ValueError), ("yarn_beta_fast", [], TypeError),
        ("yarn_beta_slow", math.nan, ValueError), ("yarn_orig_ctx", -1, ValueError)]),
    Case("context: an argument that is none", TypeError, "n_context", _context(n_context=1)),
    Case("context: fewer rows than sequences", ValueError, "n_batch (2) n_seq_max (4)", _context(n_batch=2, n_seq_max=4)),
    Case("context: n_ubatch no multiple of n_seq_max, with embeddings", ValueError, "n_ubatch (16) multiple of n_seq_max (3)", _context(n_seq_max=3, embeddings=True, pooling="mean")),
    Case("context: n_ubatch text with embeddings", TypeError, "n_ubatch integer 'a'", _context(n_ubatch="a", embeddings=True)),
    Case("context: of no model", TypeError, "Model", lambda w: lc.Context(None)),
    Case("context: of a path", TypeError, "Model", lambda w: lc.Context("model.gguf")),
    Case("context: a quantised V without flash attention", lc.ContextError, "context V", _context(type_v="q8_0", flash_attn=False)),
    Case("set_threads: 0", ValueError, "n_threads", lambda w: w.ctx.set_threads(0)),
    Case("set_threads: many", ValueError, "n_threads_batch", lambda w: w.ctx.set_threads(1, 10**9)),
    Case("set_threads: text", TypeError, "n_threads", lambda w: w.ctx.set_threads("2")),
]  # fmt: skip


DEEP = "root ::= " + 100_000 * "(" + '"a"' + 100_000 * ")"
CHAIN = "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(400_000)) + 'r400000 ::= "x"'
FORKS = "root ::= r0\n" + "".join(f'r{i} ::= r{i + 1} "a" | r{i + 1} "b"\n' for i in range(60)) + 'r60 ::= "x"'
SAMPLER = [
    *(Case(f"sampler: {name} = {value!r}", kind, words or name, _sampler(**{name: value})) for name, value, kind, words in [
        ("temperature", math.nan, ValueError, ""), ("temperature", "hot", TypeError, ""), ("top_k", -1, ValueError, ""),
        ("top_k", 1.5, TypeError, ""), ("top_k", 2**40, ValueError, ""), ("top_p", 1.5, ValueError, ""), ("top_p", -0.1, ValueError, ""),
        ("min_p", 2, ValueError, ""), ("typical_p", math.nan, ValueError, ""), ("top_n_sigma", math.inf, ValueError, ""),
        ("min_keep", -1, ValueError, ""), ("dynatemp_range", -1, ValueError, ""), ("repeat_penalty", 0, ValueError, ""),
        ("frequency_penalty", math.nan, ValueError, ""), ("presence_penalty", None, TypeError, ""), ("penalty_last_n", -1, ValueError, ""),
        ("dry_base", 0.5, ValueError, ""), ("xtc_probability", 2, ValueError, ""), ("mirostat", 3, ValueError, ""),
        ("mirostat_tau", -1, ValueError, ""), ("seed", -1, ValueError, ""), ("seed", 2**32, ValueError, ""), ("seed", 2**32 - 1, ValueError, ""), ("seed", "s", TypeError, ""),
        ("logit_bias", {-1: 1.0}, ValueError, "token -1"), ("logit_bias", {"a": 1.0}, TypeError, "token integer"),
        ("logit_bias", {1: math.nan}, ValueError, "logit_bias NaN"), ("temperature", 10**400, ValueError, ""), ("logit_bias", {1: 10**400}, ValueError, "logit_bias"), ("logit_bias", {32000: 1.0}, ValueError, "logit_bias token 32000 vocabulary"),
        ("logit_bias", {2**31 - 1: 1.0}, ValueError, "logit_bias token 2147483647"),
        ("grammar", 'root ::= "', ValueError, "grammar parsed"), ("grammar", "root ::= nobody", ValueError, "grammar parsed"),
        ("grammar", "", ValueError, "grammar parsed"), ("grammar", 'other ::= "a"', ValueError, "grammar parsed"),
        ("grammar", "root ::= root", ValueError, "grammar parsed"), ("grammar", 'root ::= "a" (', ValueError, "grammar parsed"),
        ("grammar", 'root ::= "a"{3,1}', ValueError, "grammar"),
        ("grammar", "root ::= [\\x", ValueError, "grammar parsed"), ("grammar", "root ::= \xff\ufffe", ValueError, "grammar parsed"),
        ("grammar", "a\0b", ValueError, "grammar zero"), ("grammar", b"root ::= x", ValueError, "grammar text"),
        ("grammar", 'root ::= "\ud800"', ValueError, "grammar")]),
    Case("sampler: a grammar nested very deep", ValueError, "grammar nested", lambda w: lc.Sampler(model=w.model, grammar=DEEP)),
    Case("sampler: a very long chain of rules", ValueError, "grammar more than characters, alternatives and rules", lambda w: lc.Sampler(model=w.model, grammar=CHAIN)),
    Case("sampler: rules that fork sixty times", ValueError, "grammar ways", lambda w: lc.Sampler(model=w.model, grammar=FORKS)),
    Case("sampler: an argument that is none", TypeError, "heat", _sampler(heat=1)),
    Case("sampler: positional", TypeError, "positional", lambda w: lc.Sampler(0.5)),
    Case("sampler: a model that is none", TypeError, "Model", lambda w: lc.Sampler(model="model")),
    Case("sampler: a grammar's other root", ValueError, "grammar parsed", _sampler(grammar='root ::= "a"', grammar_root="start")),
    Case("sampler: no token left by the biases", ValueError, "no token left",
         lambda w: lc.Sampler(temperature=0, logit_bias=dict.fromkeys(range(32000), -math.inf)).sample(w.ctx)),
    Case("sampler: a token that the grammar does not know", ValueError, "token not accepted",
         lambda w: lc.Sampler(grammar='root ::= "yes"', model=w.model).accept(_a_token(w.model, "no"))),
    Case("sampler: no token left by the grammar", ValueError, "no token left", lambda w: _exhausted(w)),
    Case("sampler: another model's", ValueError, "bound another model", lambda w: lc.Sampler(model=w.model_of("mamba")).sample(w.ctx)),
    Case("sampler.sample: a row without logits", IndexError, "row 0 no logits", lambda w: lc.Sampler().sample(w.ctx, 0)),
    Case("sampler.sample: a row that is a float", TypeError, "i must be an integer", lambda w: lc.Sampler().sample(w.ctx, 0.0)),
    Case("sampler.sample: of no context", TypeError, "Context", lambda w: lc.Sampler().sample(None)),
    Case("sampler.sample: of a model", TypeError, "Context", lambda w: lc.Sampler().sample(w.model)),
    Case("sampler.accept: unbound", ValueError, "bound model", lambda w: lc.Sampler().accept(1)),
    Case("sampler.accept: token -1", ValueError, "token -1", lambda w: lc.Sampler(model=w.model).accept(-1)),
    Case("sampler.accept: the token after the last", ValueError, "token 32000", lambda w: lc.Sampler(model=w.model).accept(32000)),
]  # fmt: skip


def _a_token(model: lc.Model, text: str) -> int:
    return int(model.tokenize(text, add_special=False)[-1])


def _exhausted(w: World) -> object:
    """A grammar that wants a character of no token, in a vocabulary whose end tokens are forbidden."""
    forbidden = {t: -math.inf for t in range(w.model.n_vocab) if b"a" in w.model.token_to_piece(t) or w.model.is_eog(t)}
    return lc.Sampler(grammar='root ::= "a"', logit_bias=forbidden).sample(w.ctx)


TEXT = [
    Case("tokenize: a lone surrogate", UnicodeEncodeError, "surrogates", lambda w: w.model.tokenize("a\ud800b")),
    Case("tokenize: None", TypeError, "text str NoneType", lambda w: w.model.tokenize(None)),
    Case("tokenize: a list of text", TypeError, "text str list", lambda w: w.model.tokenize(["a"])),
    Case("tokenize: a number", TypeError, "text str int", lambda w: w.model.tokenize(7)),
    Case("detokenize: token -1", ValueError, "token -1 vocabulary", lambda w: w.model.detokenize([5, -1])),
    Case("detokenize: the token after the last", ValueError, "token 32000 vocabulary 31999", lambda w: w.model.detokenize([32000])),
    Case("detokenize: two dimensions", ValueError, "tokens shape (1, 2)", lambda w: w.model.detokenize([[1, 2]])),
    Case("detokenize: text", TypeError, "tokens integers", lambda w: w.model.detokenize("hello")),
    Case("detokenize: floats", TypeError, "tokens integers float64", lambda w: w.model.detokenize([1.5, 2.5])),
    Case("detokenize: a token of 40 bits", ValueError, "token", lambda w: w.model.detokenize(np.array([2**40 + 5]))),
    Case("token_to_piece: -1", ValueError, "token -1", lambda w: w.model.token_to_piece(-1)),
    Case("token_to_piece: the token after the last", ValueError, "token 32000", lambda w: w.model.token_to_piece(32000)),
    Case("token_to_piece: 40 bits", ValueError, "token 1099511627776", lambda w: w.model.token_to_piece(2**40)),
    Case("token_to_piece: text", TypeError, "token integer 'a'", lambda w: w.model.token_to_piece("a")),
    Case("token_to_piece: None", TypeError, "token integer None", lambda w: w.model.token_to_piece(None)),
    Case("is_eog: -1", ValueError, "token -1", lambda w: w.model.is_eog(-1)),
    Case("is_eog: 2**31-1", ValueError, "token 2147483647", lambda w: w.model.is_eog(2**31 - 1)),
    Case("is_control: -1", ValueError, "token -1", lambda w: w.model.is_control(-1)),
]  # fmt: skip


def _file(name: str, data: bytes) -> Callable[[World], object]:
    def call(w: World) -> object:
        path = w.folder / name
        path.write_bytes(data)
        return lc.Model.load(path)

    return call


def _raise(_share: float) -> None:
    raise ZeroDivisionError("from the callback")


LOAD = [
    Case("load: no file", lc.ModelLoadError, "nowhere.gguf No such file", lambda w: lc.Model.load(w.folder / "nowhere.gguf")),
    Case("load: a folder", lc.ModelLoadError, "not a file", lambda w: lc.Model.load(w.folder)),
    Case("load: a device", lc.ModelLoadError, "/dev/null not a file", lambda w: lc.Model.load("/dev/null")),
    Case("load: an empty file", lc.ModelLoadError, "empty.gguf not a GGUF file", _file("empty.gguf", b"")),
    Case("load: two bytes", lc.ModelLoadError, "not a GGUF file", _file("two.gguf", b"GG")),
    Case("load: the magic alone", lc.ModelLoadError, "not a sound GGUF file", _file("magic.gguf", b"GGUF")),
    Case("load: text", lc.ModelLoadError, "not a GGUF file", _file("text.gguf", b"This is no model.\n" * 100)),
    Case("load: an empty path", lc.ModelLoadError, "No such file", lambda w: lc.Model.load("")),
    Case("load: a path with a zero byte", lc.ModelLoadError, "zero byte", lambda w: lc.Model.load("mo\0del.gguf")),
    Case("load: a path that is a number", TypeError, "PathLike int", lambda w: lc.Model.load(3)),
    Case("load: a path that is None", TypeError, "PathLike NoneType", lambda w: lc.Model.load(None)),
    Case("load: a path of 10,000 letters", lc.ModelLoadError, "too long", lambda w: lc.Model.load("m" * 10_000)),
    Case("load: progress that cannot be called", TypeError, "progress callable 'bar'", lambda w: lc.Model.load(cached_model("llama", "tiny"), progress="bar")),
    Case("load: progress that raises", ZeroDivisionError, "from the callback", lambda w: lc.Model.load(cached_model("llama", "tiny"), progress=_raise)),
    Case("load: progress that takes no share", TypeError, "argument", lambda w: lc.Model.load(cached_model("llama", "tiny"), progress=lambda: None)),
    Case("load: a token that is none", TypeError, "CancelToken", lambda w: lc.Model.load(cached_model("llama", "tiny"), token="t")),
    Case("load: n_gpu_layers text", TypeError, "n_gpu_layers", lambda w: lc.Model.load("x", n_gpu_layers="all")),
    Case("load: n_gpu_layers -2", ValueError, "n_gpu_layers", lambda w: lc.Model.load("x", n_gpu_layers=-2)),
    Case("load: main_gpu -1", ValueError, "main_gpu", lambda w: lc.Model.load("x", main_gpu=-1)),
    Case("load: split_mode unknown", ValueError, "split_mode", lambda w: lc.Model.load("x", split_mode="column")),
    Case("load: tensor_split of many", ValueError, "tensor_split", lambda w: lc.Model.load("x", tensor_split=[1] * 1000)),
    Case("load: tensor_split of NaN", ValueError, "tensor_split", lambda w: lc.Model.load("x", tensor_split=[math.nan])),
    Case("load: an argument that is none", TypeError, "n_ctx", lambda w: lc.Model.load("x", n_ctx=1)),
    Case("load: a vocabulary as a model", lc.ModelLoadError, "ggml-vocab-llama-spm.gguf", lambda w: lc.Model.load(find_vocab("llama-spm"))),
    Case("model: made by hand", TypeError, "Model.load", lambda w: lc.Model()),
    Case("model.context: a vocabulary has none", lc.ContextError, "vocab", lambda w: _vocab_context()),
    Case("load_lora: no file", lc.ModelLoadError, "nowhere No such file", lambda w: w.model.load_lora(w.folder / "nowhere")),
    Case("load_lora: a model", lc.ModelLoadError, "llama-tiny", lambda w: w.model.load_lora(cached_model("llama", "tiny"))),
    Case("load_lora: text", lc.ModelLoadError, "not a GGUF file", lambda w: w.model.load_lora(__file__)),
    Case("load_lora: a folder", lc.ModelLoadError, "not a file", lambda w: w.model.load_lora(w.folder)),
    Case("load_lora: of another architecture", lc.ModelLoadError, "lora.gguf", lambda w: w.model.load_lora(_lora(w, "swa"))),
    Case("load_lora: of another shape", lc.ModelLoadError, "lora.gguf", lambda w: w.model.load_lora(_lora(w, "small"))),
    Case("load_lora: None", TypeError, "PathLike NoneType", lambda w: w.model.load_lora(None)),
    Case("set_lora: a path", TypeError, "adapters pairs", lambda w: w.ctx.set_lora(["lora.gguf"])),
    Case("set_lora: an adapter without a scale", TypeError, "adapters pairs", lambda w: w.ctx.set_lora([w.model.load_lora(_lora(w))])),
    Case("set_lora: a number", TypeError, "", lambda w: w.ctx.set_lora(3)),
    Case("set_lora: a scale of NaN", ValueError, "scale", lambda w: w.ctx.set_lora([(w.model.load_lora(_lora(w)), math.nan)])),
    Case("set_lora: a scale of text", TypeError, "scale", lambda w: w.ctx.set_lora([(w.model.load_lora(_lora(w)), "big")])),
    Case("set_lora: another model's adapter", ValueError, "another model", lambda w: w.ctx.set_lora([(w.model_of("moe").load_lora(_lora(w, "moe")), 1.0)])),
]  # fmt: skip


def _vocab_context() -> object:
    with lc.Model.load(find_vocab("llama-spm"), vocab_only=True) as vocab:
        assert vocab.detokenize(vocab.tokenize("Hello", add_special=False)) == "Hello"
        with vocab.context(n_ctx=64, n_ubatch=16, n_threads=1) as context:
            return context.decode(batch_of(np.array([1], np.int32)))


def _lora(w: World, arch: str = "llama") -> Path:
    # "small": the same architecture, other shapes
    path = make_model(w.folder / "other.gguf", "llama", "small") if arch == "small" else cached_model(arch, "tiny")
    return make_lora(w.folder / "lora.gguf", path)


CASES = [*DECODE, *OUTPUTS, *MEMORY, *STATE, *CONTEXT, *SAMPLER, *TEXT, *LOAD]


def pattern(words: str) -> str:
    return "(?s)" + ".*".join(
        word if "|" in word else re.escape(word) for word in re.findall(r"\(\S[^()]*\|[^()]*\)|\S+", words)
    )


@pytest.fixture(scope="module")
def expected() -> dict[object, bytes]:
    return {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_told_and_leaves_the_context_as_it_was(
    case: Case,
    expected: dict[object, bytes],
    model_of: Callable[[str], lc.Model],
    new_context: Callable[..., lc.Context],
    tmp_path: Path,
) -> None:
    model = model_of(case.arch)
    tokens = prompt(model, HELD)
    key = (case.arch, *sorted(case.params.items()))
    if key not in expected:
        other = new_context(case.arch, **case.params)
        other.decode(batch_of(tokens))
        expected[key] = _bits(other)
    ctx = new_context(case.arch, **case.params)
    ctx.decode(batch_of(tokens))

    with pytest.raises(case.kind, match=pattern(case.words)) as caught:
        case.call(World(ctx, model, model_of, new_context, tmp_path))

    assert caught.type is case.kind
    assert ctx.memory.pos_max(0) == HELD - 1
    assert ctx.dirty_sequences == []
    assert _bits(ctx) == expected[key]


BATCH: list[tuple[str, type[BaseException], str, Callable[[], object]]] = [
    ("capacity 0", ValueError, "capacity 0", lambda: lc.Batch(0)),
    ("capacity -1", ValueError, "capacity -1", lambda: lc.Batch(-1)),
    ("capacity 2**31", ValueError, "capacity 2147483648", lambda: lc.Batch(2**31)),
    ("capacity 1.5", TypeError, "capacity 1.5", lambda: lc.Batch(1.5)),  # type: ignore[arg-type]
    ("capacity True", TypeError, "capacity True", lambda: lc.Batch(True)),
    ("capacity None", TypeError, "capacity None", lambda: lc.Batch(None)),  # type: ignore[arg-type]
    ("capacity '4'", TypeError, "capacity '4'", lambda: lc.Batch("4")),  # type: ignore[arg-type]
    ("n_seq_max 0", ValueError, "n_seq_max 0", lambda: lc.Batch(4, 0)),
    ("n_seq_max 1.0", TypeError, "n_seq_max 1.0", lambda: lc.Batch(4, 1.0)),  # type: ignore[arg-type]
    ("n_embd -1", ValueError, "n_embd -1", lambda: lc.Batch(4, n_embd=-1)),
    ("n_embd 0.5", TypeError, "n_embd 0.5", lambda: lc.Batch(4, n_embd=0.5)),  # type: ignore[arg-type]
]
ADD: list[tuple[str, str, Callable[[lc.Batch], object]]] = [
    ("a float", "token 1.0", lambda b: b.add(1.0, 0, 0)),
    ("True", "token True", lambda b: b.add(True, 0, 0)),
    ("None", "token None", lambda b: b.add(None, 0, 0)),  # type: ignore[arg-type]
    ("text", "token '5'", lambda b: b.add("5", 0, 0)),
    ("a token of 40 bits", "row 1 token 1099511627776 32-bit", lambda b: b.add(2**40, 0, 0)),
    ("a token of 400 bits", "row 1", lambda b: b.add(2**400, 0, 0)),
    ("a position of 40 bits", "row 1 pos 32 bits 1099511627776", lambda b: b.add(1, 2**40, 0)),
    ("a position of half", "pos", lambda b: b.add(1, 0.5, 0)),  # type: ignore[arg-type]
    ("a position of text", "pos", lambda b: b.add(1, "0", 0)),  # type: ignore[arg-type]
    ("a position of True", "pos", lambda b: b.add(1, True, 0)),
    ("no position", "pos", lambda b: b.add(1, None, 0)),  # type: ignore[arg-type]
    ("no sequence", "1 to 2 sequences 0", lambda b: b.add(1, 0, [])),
    ("three sequences", "1 to 2 sequences 3 n_seq_max", lambda b: b.add(1, 0, [0, 1, 2])),
    ("a sequence of 40 bits", "row 1", lambda b: b.add(1, 0, 2**40)),
    ("a sequence of half", "sequence 0.5", lambda b: b.add(1, 0, 0.5)),  # type: ignore[arg-type]
    ("a sequence of half in a list", "sequence 0.5", lambda b: b.add(1, 0, [0.5])),  # type: ignore[list-item]
    ("a sequence of text", "sequence '0'", lambda b: b.add(1, 0, ["0"])),  # type: ignore[list-item]
    ("a sequence of True", "sequence True", lambda b: b.add(1, 0, True)),
    ("no sequence at all", "sequence None", lambda b: b.add(1, 0, None)),  # type: ignore[arg-type]
    ("more rows than there is room", "4 more rows 1 of 4", lambda b: b.add_sequence([1, 2, 3, 4])),
    ("floats", "tokens integers float64", lambda b: b.add_sequence([1.0, 2.0])),
    ("bools", "tokens integers bool", lambda b: b.add_sequence([True, False])),
    ("text as a sequence", "tokens integers", lambda b: b.add_sequence("abc")),
    ("two dimensions", "tokens shape (1, 2)", lambda b: b.add_sequence([[1, 2]])),
    ("lists of different lengths", "tokens", lambda b: b.add_sequence([[1], [1, 2]])),  # type: ignore[list-item]
    ("tokens of 40 bits", "1099511627776 32-bit", lambda b: b.add_sequence([2**40])),
    ("tokens of -40 bits", "-1099511627776 32-bit", lambda b: b.add_sequence([-(2**40), 5])),
    ("tokens of 64 bits, unsigned", "32-bit", lambda b: b.add_sequence(np.array([2**64 - 1], np.uint64))),
    ("objects", "tokens integers object", lambda b: b.add_sequence([None, None])),
    ("logits unknown", "logits last first", lambda b: b.add_sequence([1], logits="first")),  # type: ignore[arg-type]
    ("logits 2.5", "logits not 2.5", lambda b: b.add_sequence([1], logits=2.5)),  # type: ignore[arg-type]
    ("a negative position", "pos -1", lambda b: b.add_sequence([1], pos=-1)),
    ("the last position", "pos 2147483647", lambda b: b.add_sequence([1], pos=2**31 - 1)),
    ("a position that is a float", "pos 1.0", lambda b: b.add_sequence([1], pos=1.0)),  # type: ignore[arg-type]
    ("a position that is True", "pos True", lambda b: b.add_sequence([1], pos=True)),
    ("a sequence id of 40 bits", "seq_id 1099511627776", lambda b: b.add_sequence([1], seq_id=2**40)),
    ("a sequence id of half", "seq_id 0.5", lambda b: b.add_sequence([1], seq_id=0.5)),  # type: ignore[arg-type]
    ("a sequence id of text", "seq_id '1'", lambda b: b.add_sequence([1], seq_id=["1"])),  # type: ignore[list-item]
    ("sequence ids too many", "1 to 2 sequences 3", lambda b: b.add_sequence([1], seq_id=range(3))),
]  # fmt: skip
FLOATS: list[tuple[str, str, Callable[[lc.Batch], object]]] = [
    ("NaN", "embeddings finite", lambda b: b.add([1.0, math.nan, 0.0], 0, 0)),
    ("infinity", "embeddings finite", lambda b: b.add([1.0, -math.inf, 0.0], 0, 0)),
    ("a number too large for 32 bits", "embeddings finite", lambda b: b.add([1.0, 1e300, 0.0], 0, 0)),
    ("two of three", "embeddings shape (3) (2,)", lambda b: b.add([1.0, 2.0], 0, 0)),
    ("a token", "embeddings shape", lambda b: b.add(5, 0, 0)),
    ("text", "embeddings floats", lambda b: b.add("abc", 0, 0)),
    ("objects", "embeddings floats", lambda b: b.add([{}, {}, {}], 0, 0)),  # type: ignore[list-item]
    ("complex numbers", "embeddings floats", lambda b: b.add([1j, 0, 0], 0, 0)),
    ("rows of another width", "embeddings shape (n, 3) (2, 4)", lambda b: b.add_sequence(np.zeros((2, 4)))),
    ("one dimension", "embeddings shape (n, 3) (3,)", lambda b: b.add_sequence(np.zeros(3))),
    ("NaN in a row", "embeddings finite", lambda b: b.add_sequence([[0, 0, 0], [0, math.nan, 0]])),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "words", "call"), [pytest.param(*rest, id=name) for name, *rest in BATCH])
def test_a_batch_refuses_sizes_that_it_cannot_have(
    kind: type[BaseException], words: str, call: Callable[[], object]
) -> None:
    with pytest.raises(kind, match=pattern(words)):
        call()


def _refused(batch: lc.Batch, words: str, call: Callable[[lc.Batch], object], again: Iterable[object]) -> None:
    with pytest.raises(lc.InvalidBatchError, match=pattern(words)):
        call(batch)
    assert [len(batch), batch.positions.tolist(), batch.seq_ids(0), batch.logits.tolist()] == [1, [7], [1], [True]]
    row = batch.add(*again, 8, [0, 1])  # type: ignore[arg-type]
    assert row == 1
    assert batch.seq_ids(1) == [0, 1]


@pytest.mark.parametrize(("words", "call"), [pytest.param(*rest, id=name) for name, *rest in ADD])
def test_a_batch_refuses_rows_and_stays_as_it_was(words: str, call: Callable[[lc.Batch], object]) -> None:
    batch = lc.Batch(4, 2)
    batch.add(3, 7, 1, True)
    _refused(batch, words, call, [4])


@pytest.mark.parametrize(("words", "call"), [pytest.param(*rest, id=name) for name, *rest in FLOATS])
def test_a_batch_of_embeddings_refuses_what_is_no_embedding(words: str, call: Callable[[lc.Batch], object]) -> None:
    batch = lc.Batch(4, 2, n_embd=3)
    batch.add([1.0, 2.0, 3.0], 7, 1, True)
    _refused(batch, words, call, [np.zeros(3)])


def test_a_full_batch_says_so() -> None:
    batch = lc.Batch(1)
    batch.add(1, 0, 0)
    with pytest.raises(lc.InvalidBatchError, match=pattern("1 more rows fit 1 of 1")):
        batch.add(2, 1, 0)
    assert batch.tokens is not None
    assert batch.tokens.tolist() == [1]


@pytest.mark.parametrize("row", [-1, 1, 2**40])
def test_a_batch_has_no_other_rows(row: int) -> None:
    batch = lc.Batch(4)
    batch.add(1, 0, 0)
    with pytest.raises(IndexError, match=f"row {row} "):
        batch.seq_ids(row)


@pytest.mark.parametrize(("arch", "first"), [("mamba", 3), ("hybrid", 11), ("swa", 40)])
def test_what_cannot_be_removed_is_not(arch: str, first: int, model_of: Any, new_context: Any) -> None:
    model = model_of(arch)
    tokens = prompt(model, 700)
    ctx, other = new_context(arch), new_context(arch)
    for context in (ctx, other):
        context.decode(batch_of(tokens[:600]))
        context.decode(batch_of(tokens[600:650], pos=600))
    held = ctx.memory.pos_min(0), ctx.memory.pos_max(0)
    for end in (-1, first + 2):
        with pytest.raises(ValueError, match=r"remove the whole of the sequence"):
            ctx.memory.remove(0, first, end)
    assert (ctx.memory.pos_min(0), ctx.memory.pos_max(0)) == held
    for context in (ctx, other):
        context.decode(batch_of(tokens[650:], pos=650))
    assert ctx.logits().tobytes() == other.logits().tobytes()
    ctx.memory.remove(0)
    assert ctx.memory.pos_max(0) == -1


def test_a_state_truncated_anywhere_is_refused(new_context: Any, model_of: Any) -> None:
    ctx = new_context("llama")
    ctx.decode(batch_of(prompt(model_of("llama"), HELD)))
    data = ctx.state.save(0)
    before = _state_bits(ctx)
    for end in [*range(0, 200, 7), *range(200, len(data), max(1, len(data) // 40)), len(data) - 1]:
        with pytest.raises(lc.StateError):
            ctx.state.load(0, data[:end])
    assert _state_bits(ctx) == before


@pytest.mark.parametrize("arch", ["llama", "swa", "mamba", "hybrid"])
def test_a_state_whose_checksum_was_made_right_again_does_no_harm(arch: str, new_context: Any, model_of: Any) -> None:
    """Somebody who writes states can write wrong ones: that may give wrong values, but ends no process."""
    import struct
    import zlib

    ctx = new_context(arch)
    ctx.decode(batch_of(prompt(model_of(arch), HELD)))
    data = ctx.state.save(0)
    n_about = struct.unpack_from("<I", data, 8)[0]
    head, payload = data[: 24 + n_about], data[24 + n_about :]
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        changed = bytearray(payload)
        for at in rng.integers(0, min(len(payload), 400), rng.integers(1, 4)):
            changed[at] = rng.choice([0, 1, 0x7F, 0xFF, int(rng.integers(256))])
        if rng.random() < 0.3:
            changed = changed[: int(rng.integers(len(changed)))]
        packed = struct.pack("<8sIIQ", b"lcstate1", n_about, zlib.crc32(changed), len(changed)) + head[24:] + changed
        try:
            ctx.state.load(0, packed)
        except lc.StateError:
            refused += 1
    assert refused > 10
    ctx.memory.clear()
    ctx.decode(batch_of(prompt(model_of(arch), HELD)))
    other = new_context(arch)
    other.decode(batch_of(prompt(model_of(arch), HELD)))
    assert _bits(ctx) == _bits(other)


def _state_bits(ctx: lc.Context) -> bytes:
    return ctx.state.save(0)


@pytest.mark.parametrize("use", [
    lambda c: c.decode(batch_of(np.array([1], np.int32))), lambda c: c.encode(batch_of(np.array([1], np.int32))),
    lambda c: c.logits(), lambda c: c.embeddings(), lambda c: c.pooled_embeddings(), lambda c: c.memory.clear(),
    lambda c: c.memory.pos_max(0), lambda c: c.state.save(), lambda c: c.n_ctx, lambda c: c.perf(), lambda c: c.latency_plan,
    lambda c: c.set_threads(1), lambda c: c.set_lora(()), lambda c: c.dirty_sequences, lambda c: c.memory.kind,
    lambda c: lc.Sampler().sample(c), lambda c: c.__enter__(), lambda c: c.state.load(0, bytes(100)), lambda c: c.n_threads,
])  # fmt: skip
def test_a_closed_context_says_so(use: Callable[[lc.Context], object], new_context: Any) -> None:
    ctx = new_context("llama")
    ctx.close()
    ctx.close()
    assert ctx.closed
    with pytest.raises((lc.ClosedError, lc.StateError), match=r"closed|no saved state"):
        use(ctx)


@pytest.mark.parametrize("use", [
    lambda m: m.tokenize("a"), lambda m: m.detokenize([1]), lambda m: m.token_to_piece(1), lambda m: m.is_eog(1), lambda m: m.n_vocab,
    lambda m: m.metadata, lambda m: m.chat_template, lambda m: m.context(n_ctx=64), lambda m: m.load_lora("x"), lambda m: m.bos,
    lambda m: m.memory_kind, lambda m: m.description, lambda m: lc.Sampler(model=m), lambda m: m.__enter__(), lambda m: m.detokenize([]),
])  # fmt: skip
def test_a_closed_model_says_so(use: Callable[[lc.Model], object], model_path: Any) -> None:
    model = lc.Model.load(model_path("llama"))
    model.close()
    model.close()
    assert model.closed
    assert repr(model) == "<Model closed>"
    with pytest.raises(lc.ClosedError, match="model is closed"):
        use(model)


def test_text_with_zero_bytes_and_huge_text_are_tokenized(model_of: Any) -> None:
    model = model_of("llama")
    tokens = model.tokenize("a\0b", add_special=False)
    assert model.detokenize(tokens) in ("a\0b", " a\0b")
    many = model.tokenize("word " * 50_000, add_special=False)
    assert len(many) > 50_000
    assert model.tokenize(b"\xff\xfe\x80", add_special=False).size > 0
    assert model.tokenize("", add_special=False).size == 0


def test_an_exception_in_a_progress_callback_is_the_one_that_is_raised(model_path: Any) -> None:
    shares: list[float] = []

    def report(share: float) -> None:
        shares.append(share)
        if share > 0:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        lc.Model.load(model_path("llama"), progress=report)
    assert 0 <= shares[0] <= shares[-1] <= 1
