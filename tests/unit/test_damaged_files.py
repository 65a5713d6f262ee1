# ruff: noqa: E501 (a line for each case)
"""A damaged model file is refused, or works: it never ends the process and never hangs.

Each group of files is tried in a process of its own, which makes a file, loads it and decodes with it, and says
so before and after: when it dies or hangs, the file at work is the culprit, and another process goes on behind it.

One file by hand: `python -m tests.unit.test_damaged_files llama "keys: llama.block_count = 0" /tmp/bad.gguf`
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import random
import re
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from llamacancel.commands.make_model import cached_model, find_vocab

pytestmark = pytest.mark.timeout(1800)  # on a slow and busy machine

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ["llama", "mamba", "hybrid", "moe", "embedding", "swa"]
HANG = 240.0  # seconds without a word from a process
MEMORY = 16 << 30  # address space of a process, so that a huge size in a file does not take the machine down

# ---- GGUF files, read and written again with changes -------------------------------------------------------

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_NUMBERS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
_BYTES = {0: (1, 4), 1: (1, 2), 8: (32, 34), 30: (1, 2)}  # of a block: F32, F16, Q8_0, BF16


@dataclass(frozen=True)
class Tensor:
    name: bytes
    ne: tuple[int, ...]
    kind: int
    data: bytes
    offset: int | None = None  # what the file says, where that is to be wrong


@dataclass(frozen=True)
class Gguf:
    keys: dict[str, tuple[int, Any]]
    tensors: tuple[Tensor, ...]
    n_tensors: int | None = None
    n_keys: int | None = None
    version: int = 3
    repeat: tuple[str, ...] = field(default=())  # keys that are written twice

    @staticmethod
    def read(path: Path) -> Gguf:
        return _Reader(path.read_bytes()).file()

    def with_key(self, name: str, kind: int, value: Any) -> Gguf:
        return replace(self, keys={**self.keys, name: (kind, value)})

    def without_key(self, name: str) -> Gguf:
        return replace(self, keys={key: value for key, value in self.keys.items() if key != name})

    def with_tensor(self, name: bytes, change: Callable[[Tensor], Tensor | None]) -> Gguf:
        changed = (change(tensor) if tensor.name == name else tensor for tensor in self.tensors)
        return replace(self, tensors=tuple(tensor for tensor in changed if tensor is not None))

    def header(self) -> bytes:
        keys = [*self.keys.items(), *((name, self.keys[name]) for name in self.repeat)]
        out = bytearray(struct.pack("<4sIqq", b"GGUF", self.version, len(self.tensors) if self.n_tensors is None else
                                    self.n_tensors, len(keys) if self.n_keys is None else self.n_keys))  # fmt: skip
        for name, (kind, value) in keys:
            out += _text(name.encode()) + struct.pack("<I", kind)
            if kind == ARRAY:
                each, items = value
                out += struct.pack("<IQ", each, len(items))
                out += b"".join(map(_text, items)) if each == STRING else _numbers(each, items)
            else:
                out += _text(value) if kind == STRING else _numbers(kind, [value])
        offset = 0
        for tensor in self.tensors:
            out += _text(tensor.name) + struct.pack("<I", len(tensor.ne)) + _numbers(I64, tensor.ne)
            out += struct.pack("<iQ", tensor.kind, offset if tensor.offset is None else tensor.offset)
            offset += len(_padded(tensor.data))
        return bytes(_padded(bytes(out)))

    def to_bytes(self) -> bytes:
        return self.header() + b"".join(_padded(tensor.data) for tensor in self.tensors)


def _text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def _numbers(kind: int, values: Any) -> bytes:
    return struct.pack(f"<{len(values)}{_NUMBERS[kind]}", *values)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 32)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def numbers(self, kind: int, n: int = 1) -> list[Any]:
        form = f"<{n}{_NUMBERS[kind]}"
        values = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return list(values)

    def text(self) -> bytes:
        [n] = self.numbers(U64)
        self.at += n
        return self.data[self.at - n : self.at]

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.numbers(kind)[0]
        [each], [n] = self.numbers(U32), self.numbers(U64)
        return each, [self.text() for _ in range(n)] if each == STRING else self.numbers(each, n)

    def file(self) -> Gguf:
        self.at = 8
        n_tensors, n_keys = self.numbers(I64, 2)
        keys = {}
        for _ in range(n_keys):
            name, [kind] = self.text().decode(), self.numbers(U32)
            keys[name] = kind, self.value(kind)
        infos = []
        for _ in range(n_tensors):
            name, [n_dims] = self.text(), self.numbers(U32)
            infos.append((name, tuple(self.numbers(I64, n_dims)), self.numbers(I32)[0], self.numbers(U64)[0]))
        start = self.at + -self.at % 32
        tensors = []
        for name, ne, kind, offset in infos:
            block, size = _BYTES[kind]
            end = start + offset + math.prod(ne) // block * size
            tensors.append(Tensor(name, ne, kind, self.data[start + offset : end]))
        return Gguf(keys, tuple(tensors))


def small_model(arch: str) -> Gguf:
    """A tiny model with the first few hundred tokens of its vocabulary: it loads within a millisecond."""
    model = Gguf.read(cached_model(arch, "tiny"))
    n = 1100 if arch == "embedding" else 400
    for name in ("tokens", "scores", "token_type"):
        if (key := f"tokenizer.ggml.{name}") in model.keys:
            each, items = model.keys[key][1]
            model = model.with_key(key, ARRAY, (each, items[:n]))
    model = model.with_key(f"{arch_name(model)}.vocab_size", U32, n)
    return model.with_tensor(
        b"token_embd.weight", lambda t: replace(t, ne=(t.ne[0], n), data=t.data[: t.ne[0] * n * 2])
    )


def arch_name(model: Gguf) -> str:
    return str(model.keys["general.architecture"][1].decode())


# ---- the damage --------------------------------------------------------------------------------------------

Case = tuple[str, Callable[[], bytes]]


def truncated(model: Gguf) -> Iterator[Case]:
    data = model.to_bytes()
    n_header = len(model.header())
    rng = random.Random(1)
    ends = {*range(0, 64, 5), *(rng.randrange(n_header) for _ in range(40)), *range(n_header - 40, n_header + 40, 7)}
    ends |= {*(rng.randrange(n_header, len(data)) for _ in range(20)), len(data) - 64, len(data) - 33}
    for end in sorted(ends):
        yield f"truncated: {end} of {len(data)} bytes", lambda end=end: data[:end]


def keys(model: Gguf) -> Iterator[Case]:
    for name, (kind, value) in model.keys.items():
        yield f"keys: {name} missing", lambda name=name: model.without_key(name).to_bytes()
        wrong: list[tuple[int, Any]] = [(STRING, b"?"), (BOOL, True), (ARRAY, (U32, [1, 2, 3])), (ARRAY, (U32, []))]
        if kind == ARRAY:
            each, items = value
            zeros = [b"" if each == STRING else 0] * len(items)
            wrong = [*wrong[:2], (U32, 1), (ARRAY, (each, [])), (ARRAY, (each, items[:1])), (ARRAY, (each, items[:-1])),
                     (ARRAY, (each, items * 2)), (ARRAY, (each, zeros)), (ARRAY, (STRING, [b"x"] * len(items))),
                     (ARRAY, (F32, [1.5] * len(items))), (ARRAY, (U8, [1] * len(items)))]  # fmt: skip
            if each in (I32, U32):
                wrong += [(ARRAY, (I32, [number] * len(items))) for number in (-1, 1, 3, 2**30)]
            if each == F32:
                wrong += [(ARRAY, (F32, [number] * len(items))) for number in (math.nan, math.inf, -math.inf)]
            if each == STRING:
                wrong += [(ARRAY, (STRING, [text] * len(items))) for text in (b"\xff\xfe", b"a" * 300, b"\0")]
        elif kind == STRING:
            wrong = [
                *wrong[1:],
                (U32, 1),
                (STRING, b""),
                (STRING, b"nonsense"),
                (STRING, b"\xff\0\xfe"),
                (STRING, b"x" * 70000),
            ]
        elif kind == F32:
            wrong += [(F32, number) for number in (0.0, -1.0, 1e30, math.nan, math.inf)]
        else:
            numbers = [
                0,
                1,
                2,
                3,
                5,
                7,
                63,
                65,
                100,
                2**16,
                2**24,
                2**31 - 1,
                2**31,
                2**32 - 1,
                int(value) + 1,
                int(value) * 2,
            ]
            wrong += [(U32, number) for number in numbers]
            wrong += [
                (I32, -1),
                (I32, -(2**31)),
                (U64, 2**63),
                (I64, -1),
                (F32, float(value)),
                (U8, int(value) % 256),
                (I64, int(value)),
            ]
        for kind_now, value_now in wrong:
            shown = repr(value_now if kind_now != ARRAY else value_now[1][:3])[:60]
            n = f" ({len(value_now[1])} of them)" if kind_now == ARRAY else ""
            yield (f"keys: {name} = {shown}{n}, type {kind_now}" if kind_now != kind else f"keys: {name} = {shown}{n}",
                   lambda name=name, k=kind_now, v=value_now: model.with_key(name, k, v).to_bytes())  # fmt: skip


EXTRA_KEYS = [
    *((name, U32, value) for name in (
        "attention.key_length", "attention.value_length", "attention.head_count_kv", "attention.sliding_window",
        "attention.sliding_window_pattern", "rope.dimension_count", "expert_count", "expert_used_count",
        "expert_shared_count", "expert_group_count", "expert_group_used_count", "leading_dense_block_count",
        "attention.causal", "pooling_type", "attention.group_norm_groups", "ssm.group_count", "ssm.conv_kernel",
        "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank", "rope.scaling.original_context_length",
        "attention.relative_buckets_count", "embedding_length_out", "features_length", "posnet.embedding_length",
        "nextn_predict_layers", "wkv.head_size", "token_shift_count", "full_attention_interval",
        "attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa",
        "attention.shared_kv_layers", "interleave_moe_layer_step", "block_count", "router_logit_softcapping")
      for value in (0, 1, 3, 1000, 2**32 - 1)),
    *((name, F32, value) for name in (
        "rope.freq_base", "rope.scaling.factor", "rope.scale_linear", "attention.layer_norm_epsilon",
        "attention.layer_norm_rms_epsilon", "attention.clamp_kqv", "attention.max_alibi_bias", "attention.scale",
        "logit_scale", "residual_scale", "embedding_scale", "final_logit_softcapping", "attn_logit_softcapping",
        "expert_weights_scale", "rope.freq_base_swa", "rope.scaling.yarn_log_multiplier")
      for value in (0.0, -1.0, math.nan, math.inf)),
    *(("rope.scaling.type", STRING, value) for value in (b"yarn", b"linear", b"longrope", b"none", b"?", b"")),
    *(("rope.dimension_sections", ARRAY, (U32, value)) for value in ([], [1], [16, 16, 16, 16], [0, 0, 0, 0], [2**31, 1, 1, 1])),
    *((name, ARRAY, (U32, [value] * n)) for name in (
        "attention.head_count", "attention.head_count_kv", "feed_forward_length", "attention.sliding_window_pattern")
      for n in (1, 2, 3, 4, 5, 600) for value in (0, 1, 3, 2**30)),
    *((f"tokenizer.ggml.{name}", U32, value) for name in (
        "bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id", "unknown_token_id", "seperator_token_id",
        "padding_token_id", "cls_token_id", "mask_token_id", "prefix_token_id", "suffix_token_id", "middle_token_id",
        "fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id", "fim_pad_token_id", "fim_rep_token_id",
        "fim_sep_token_id", "token_type_count", "add_space_prefix", "add_bos_token", "remove_extra_whitespaces")
      for value in (0, 1, 399, 400, 2**31 - 1, 2**32 - 1)),
    *(("tokenizer.ggml.model", STRING, value) for value in (b"llama", b"gpt2", b"bert", b"t5", b"rwkv", b"no_vocab", b"plamo2", b"gemma4", b"none", b"hybriddna", b"whitespace")),
    *(("tokenizer.ggml.pre", STRING, value) for value in (b"llama-bpe", b"qwen2", b"deepseek-v3", b"", b"tekken")),
    *(("tokenizer.ggml.precompiled_charsmap", ARRAY, (U8, value)) for value in ([], [1], [255] * 8, [4, 0, 0, 0, 1, 2, 3, 4])),
    *(("tokenizer.ggml.merges", ARRAY, (STRING, value)) for value in ([], [b"a"], [b"a b", b"zz zz", b"", b" "])),
    ("general.alignment", U32, 0), ("general.alignment", U32, 3), ("general.alignment", U32, 1 << 31),
    ("general.alignment", U32, 64), ("general.alignment", I32, 32), ("general.type", STRING, b"adapter"),
    ("general.file_type", U32, 2**32 - 1), ("general.quantization_version", U32, 1000),
    ("split.count", U16, 0), ("split.count", U16, 3), ("split.count", U16, 65535), ("split.count", I32, -1),
    ("split.no", U16, 7), ("quantize.imatrix.entries_count", I32, -1),
]  # fmt: skip


def extra_keys(model: Gguf) -> Iterator[Case]:
    for name, kind, value in EXTRA_KEYS:
        if not name.startswith(("tokenizer", "general", "split", "quantize")):
            name = f"{arch_name(model)}.{name}"
        shown = repr(value if kind != ARRAY else [*value[1][:3], len(value[1])])
        yield (
            f"extra_keys: {name} = {shown}, type {kind}",
            lambda n=name, k=kind, v=value: model.with_key(n, k, v).to_bytes(),
        )


def architectures(model: Gguf) -> Iterator[Case]:
    """The model said to be of each architecture that llama.cpp knows, with all of the keys that there are."""
    source = (find_vocab("llama-spm").parents[1] / "src" / "llama-arch.cpp").read_text()
    names = re.findall(r'\{ LLM_ARCH_\w+, +"([^"]+)"', source)
    numbers = re.findall(r'\{ LLM_KV_\w+, +"%s\.([^"]+)"', source)
    assert len(names) > 100
    assert len(numbers) > 100
    fractions = re.compile(
        "epsilon|scale|factor|freq_base|softcapping|bias$|clamp|beta|alpha|log_mul|magnitude|lower_bound|gain"
    )
    truths = re.compile(
        r"causal|weights_norm|norm_before|finetuned|swin_norm|parallel|prefix_lm|skip_loop|safe_gate|dt_b_c|select_tail"
    )
    skipped = {
        "rope.dimension_sections",
        "nextn_predict_layers",
        "posnet.block_count",
        "convnext.block_count",
        "expert_group_count",
    }
    texts = {"rope.scaling.type": b"none", "hidden_activation": b"silu", "tensor_data_layout": b""}

    def changed(other: str, value: int | None, without: str = "") -> bytes:
        old = arch_name(model) + "."
        keys = {name: pair for name, pair in model.keys.items() if not name.startswith(old)}
        own = {name[len(old) :]: pair for name, pair in model.keys.items() if name.startswith(old)}
        if value is not None:
            for name in numbers:
                if name in texts:
                    own.setdefault(name, (STRING, texts[name]))
                elif fractions.search(name) and name != "rescale_every_n_layers":
                    own.setdefault(name, (F32, float(value)))
                elif truths.search(name):
                    own.setdefault(name, (BOOL, value > 0))
                elif name not in skipped and not name.startswith("ple."):
                    least = (
                        1
                        if name.endswith(("conv_kernel", "inner_size", "state_size", "key_length", "value_length"))
                        else 0
                    )
                    own.setdefault(name, (U32, max(value, least)))
            own["rope.dimension_sections"] = ARRAY, (U32, [value] * 4)
            keys["tokenizer.ggml.token_type_count"] = U32, 2
        own.pop(without, None)
        keys.update({f"{other}.{name}": pair for name, pair in own.items()})
        keys["general.architecture"] = STRING, other.encode()
        return replace(model, keys=keys).to_bytes()

    for other in names:
        yield f"architectures: {other}", lambda o=other: changed(o, None)
        yield f"architectures: {other} without heads", lambda o=other: changed(o, None, "attention.head_count")
        yield (
            f"architectures: {other}, other keys 0, without heads",
            lambda o=other: changed(o, 0, "attention.head_count"),
        )
        for value in (0, 1, 2, 4, 64):
            yield f"architectures: {other}, other keys {value}", lambda o=other, v=value: changed(o, v)


def sized(kind: int, ne: tuple[int, ...]) -> bytes:
    """Zeros in the size of a tensor of any type."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    return bytes(math.prod(ne) // block * size)


def tensors(model: Gguf) -> Iterator[Case]:
    import gguf

    kinds = [kind.value for kind in gguf.GGMLQuantizationType]
    rng = random.Random(2)
    seen: set[str] = set()
    for tensor in model.tensors:
        name = tensor.name
        shown = name.decode()
        if shown.startswith("blk.") and shown.split(".", 2)[2] in seen:
            continue
        seen.add(shown.split(".", 2)[-1])

        def with_(change: Callable[[Tensor], Tensor | None], name: bytes = name) -> Callable[[], bytes]:
            return lambda: model.with_tensor(name, change).to_bytes()

        yield f"tensors: {shown} missing", with_(lambda t: None)
        yield f"tensors: {shown} renamed", with_(lambda t: replace(t, name=b"nobody.knows.me"))
        yield f"tensors: {shown} name of 80 letters", with_(lambda t: replace(t, name=b"x" * 80))
        yield f"tensors: {shown} without a name", with_(lambda t: replace(t, name=b""))
        yield (
            f"tensors: {shown} with a zero byte in its name",
            with_(lambda t: replace(t, name=t.name[:4] + b"\0" + t.name[5:])),
        )
        for shape in {
            (1,), (0,), (tensor.ne[0] // 2, *tensor.ne[1:]), (*tensor.ne[:-1], tensor.ne[-1] * 2), (*tensor.ne, 2),
            tensor.ne[::-1], (*tensor.ne[:-1], max(tensor.ne[-1] - 1, 1)), (*tensor.ne, 0), (),
        } - {tensor.ne}:  # fmt: skip
            size = _BYTES[tensor.kind][1]
            yield (f"tensors: {shown} of shape {shape}",
                   with_(lambda t, s=shape, z=size: replace(t, ne=s, data=bytes(math.prod(s) * z))))  # fmt: skip
        for shape in [(2**62, 4), (-1, 64), (2**40,), (64, 2**50), (1, 1, 1, 1, 1)]:
            yield f"tensors: {shown} of shape {shape} without the data", with_(lambda t, s=shape: replace(t, ne=s))
        chosen = kinds if tensor is model.tensors[0] or "attn_q.w" in shown else rng.sample(kinds, 6)
        for kind in {*chosen, 28, 24, 26}:
            if math.prod(tensor.ne) % 256 == 0 or kind in (0, 1, 24, 26, 28, 30):
                yield (f"tensors: {shown} of type {kind}",
                       with_(lambda t, k=kind: replace(t, kind=k, data=sized(k, t.ne))))  # fmt: skip
        for kind in [*chosen[:4], 4, 5, 31, 36, 41, 99, -1]:
            yield f"tensors: {shown} of type {kind} without the data", with_(lambda t, k=kind: replace(t, kind=k))
        for offset in (0, 1, 32, 2**40, 2**63, 2**64 - 32):
            yield f"tensors: {shown} at offset {offset}", with_(lambda t, o=offset: replace(t, offset=o))
        for value in (b"\xff", b"\x7f", b"\x00"):
            yield f"tensors: {shown} of bytes {value!r}", with_(lambda t, v=value: replace(t, data=v * len(t.data)))
        twice = (*model.tensors, tensor)
        yield f"tensors: {shown} twice", lambda two=twice: replace(model, tensors=two).to_bytes()
    yield "tensors: none", lambda: replace(model, tensors=()).to_bytes()
    yield "tensors: one too many", lambda: replace(
        model, tensors=(*model.tensors, Tensor(b"extra.weight", (64,), 0, bytes(256)))).to_bytes()  # fmt: skip
    for name in ("output.weight", "output.bias", "rope_freqs.weight", "blk.0.rope_freqs.weight", "cls.weight", "blk.0.attn_q.bias",
                 "blk.0.attn_q_norm.weight", "blk.0.attn_qkv.weight", "blk.0.ffn_gate_exps.weight", "blk.0.attn_rot_embd",
                 "token_embd.weight.lora_a", "blk.0.attn_sinks.weight", "blk.0.ffn_down.scale",
                 "blk.0.rope_factors_long.weight", "blk.0.rope_factors_short.weight"):  # fmt: skip
        for shape in [(64,), (32,), (1,), (64, 64), (0,), (64, 400)]:
            extra = Tensor(name.encode(), shape, 0, bytes(4 * math.prod(shape)))
            yield (f"tensors: another one, {name} of shape {shape}",
                   lambda e=extra: replace(model, tensors=(*model.tensors, e)).to_bytes())  # fmt: skip
    order = list(model.tensors)
    rng.shuffle(order)
    yield "tensors: in another order", lambda: replace(model, tensors=tuple(order)).to_bytes()


def header(model: Gguf) -> Iterator[Case]:
    n_tensors, n_keys = len(model.tensors), len(model.keys)
    for n in (0, 1, n_tensors - 1, n_tensors + 1, 10**6, 2**40, 2**62, -1, -(2**63)):
        yield f"header: {n} tensors", lambda n=n: replace(model, n_tensors=n).to_bytes()
    for n in (0, 1, n_keys - 1, n_keys + 1, 10**6, 2**40, 2**62, -1, -(2**63)):
        yield f"header: {n} keys", lambda n=n: replace(model, n_keys=n).to_bytes()
    for version in (0, 1, 2, 4, 3 << 24, 2**32 - 1):
        yield f"header: version {version}", lambda v=version: replace(model, version=v).to_bytes()
    for name in ("general.architecture", "tokenizer.ggml.tokens", f"{arch_name(model)}.block_count"):
        yield f"header: {name} twice", lambda name=name: replace(model, repeat=(name,)).to_bytes()
    yield "header: only", lambda: model.header()
    yield "header: nothing but the magic", lambda: b"GGUF"
    yield "header: of text", lambda: b"GGUF is a file format.\n" * 100
    yield "header: of 0xff", lambda: b"GGUF" + b"\xff" * 4096
    yield "header: of zeros", lambda: b"GGUF" + bytes(4096)


def flips(model: Gguf, n: int = 200) -> Iterator[Case]:
    """Random bytes changed in the header, most of them where the numbers are and not in the long lists."""
    data = model.to_bytes()
    n_header = len(model.header())
    n_infos = sum(len(t.name) + 16 + 8 * len(t.ne) + 8 for t in model.tensors) + 64
    n_start = 256
    for seed in range(n):

        def flipped(seed: int = seed) -> bytes:
            rng = random.Random(f"{arch_name(model)} {seed}")
            changed = bytearray(data)
            for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
                low, high = rng.choice([(4, n_start), (n_header - n_infos, n_header), (4, n_header), (0, n_header)])
                at = rng.randrange(low, high)
                if rng.random() < 0.5:
                    changed[at] ^= 1 << rng.randrange(8)
                else:
                    changed[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
            return bytes(changed)

        yield f"flips: seed {seed}", flipped


def scalar_flips(model: Gguf, n: int = 100) -> Iterator[Case]:
    """Several keys at once with random numbers."""
    names = [name for name, (kind, _) in model.keys.items() if kind == U32]
    for seed in range(n):

        def changed(seed: int = seed) -> bytes:
            rng = random.Random(f"numbers {arch_name(model)} {seed}")
            result = model
            for name in rng.sample(names, rng.choice([1, 2, 3])):
                value = int(model.keys[name][1])
                number = rng.choice(
                    [
                        value * 2,
                        value // 2,
                        value + 1,
                        rng.randrange(1, 200),
                        rng.randrange(2**32),
                        2 ** rng.randrange(32),
                    ]
                )
                result = result.with_key(name, U32, number % 2**32)
            return result.to_bytes()

        yield f"scalar_flips: seed {seed}", changed


GROUPS = [truncated, keys, extra_keys, architectures, tensors, header, flips, scalar_flips]

# Long groups, with the models that they tell something new about.
LONG = {
    architectures: ["llama", "mamba"],
    extra_keys: ["embedding", "swa"],
    tensors: ["llama", "moe", "hybrid", "embedding"],
}


def cases(arch: str, group: str) -> Iterator[Case]:
    model = small_model(arch)
    yield "sound", model.to_bytes
    for make in GROUPS:
        if make.__name__ == group:
            yield from make(model)


# ---- the process that tries them ---------------------------------------------------------------------------


def try_file(path: Path) -> str:
    import numpy as np

    import llamacancel as lc

    try:
        model = lc.Model.load(path, use_mmap=False)
    except lc.ModelLoadError as error:
        return f"refused: {error}"
    try:
        with model.context(n_ctx=64, n_batch=16, n_ubatch=16, n_threads=1) as context:
            batch = lc.Batch(16)
            batch.add_sequence(np.arange(min(model.n_vocab, 8)), logits="all")
            if model.has_encoder and context.memory.kind != "none":
                context.encode(batch)
            context.decode(batch)
            if context.memory.kind != "none":
                assert context.logits().shape == (model.n_vocab,)
                with contextlib.suppress(ValueError):  # weights that are no numbers give logits that are none
                    lc.Sampler(seed=1).sample(context)
        with contextlib.suppress(ValueError):  # a vocabulary that cannot says so in words
            model.detokenize(model.tokenize("Hello, world! \N{SNOWMAN} <s>", parse_special=True))
        assert model.metadata
        return "works"
    except lc.ContextError as error:
        return f"refused: {path}: {error}"  # the tensors do not make a graph
    except lc.DecodeFailedError as error:
        # Computing it failed on this thread. In a kernel of ggml's it would be another thread's, and end the process.
        return f"died, with more threads: {error}" if "ggml-cpu" in str(error) else f"refused: {path}: {error}"
    except (lc.LlamaCancelError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        model.close()


def work(arch: str, group: str, start: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        path = Path(folder) / "damaged.gguf"
        for i, (name, make) in enumerate(cases(arch, group)):
            if i >= start:
                path.write_bytes(make())
                print(f"try\t{i}\t{name}", flush=True)
                try:
                    outcome = try_file(path).replace(str(path), "FILE").replace("\n", " ").replace("\t", " ")
                except BaseException as error:
                    outcome = f"unexpected {type(error).__name__}: {error}".replace("\n", " ")
                print(f"end\t{i}\t{outcome}", flush=True)
    print("done", flush=True)


def outcomes(arch: str, group: str) -> Iterator[tuple[str, str]]:
    """Each file's name and what came of it: "works", "refused: ...", "died: ...", "hung"."""
    start, finished = 0, False
    while not finished:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.unit.test_damaged_files", arch, group, str(start)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        )  # fmt: skip
        lines: queue.Queue[str | None] = queue.Queue()
        errors: list[str] = []

        def read_lines(process: Any = process, lines: Any = lines) -> None:
            for line in process.stdout:
                lines.put(line.rstrip("\n"))
            lines.put(None)

        readers = [
            threading.Thread(target=read_lines),
            threading.Thread(target=lambda p=process, e=errors: e.extend(p.stderr)),
        ]
        for reader in readers:
            reader.start()
        name, hung = "the start of the process", False
        while True:
            try:
                line = lines.get(timeout=HANG)
            except queue.Empty:
                hung = True
                process.kill()
                break
            if line is None:
                break
            word, _, rest = line.partition("\t")
            if word == "done":
                finished = True
                continue
            if word not in ("try", "end"):
                yield name, f"wrote to stdout: {line}"
                continue
            number, _, text = rest.partition("\t")
            if word == "try":
                name, start = text, int(number) + 1
            else:
                yield name, text
        process.wait()
        for reader in readers:
            reader.join()
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stderr.close()
        if hung:
            yield name, "hung"
        elif not finished:
            tail = " | ".join("".join(errors).strip().splitlines()[-3:])
            yield name, f"died: status {process.returncode}: {tail}"
            if start == 0:
                return


@pytest.mark.parametrize(
    ("arch", "group"), [(a, g.__name__) for a in ARCHITECTURES for g in GROUPS if g not in LONG or a in LONG[g]]
)
def test_a_damaged_file_is_refused_or_works(arch: str, group: str) -> None:
    results = list(outcomes(arch, group))
    assert results[0] == ("sound", "works")
    assert len(results) > 25
    bad = [f"{name}: {text}" for name, text in results if not text.startswith(("works", "refused: "))]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_refusal_says_what_is_wrong(arch: str) -> None:
    texts = [text for _, text in outcomes(arch, "header") if text.startswith("refused: ")]
    assert texts
    for text in texts:
        assert text.startswith("refused: FILE: ")
        assert len(text) > len("refused: FILE: ") + 10


if __name__ == "__main__":
    if sys.argv[2] in [make.__name__ for make in GROUPS]:
        work(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 0)
    else:
        wanted = next(make for name, make in cases(sys.argv[1], sys.argv[2].partition(":")[0]) if name == sys.argv[2])
        Path(sys.argv[3]).write_bytes(wanted())
        print(try_file(Path(sys.argv[3])))
