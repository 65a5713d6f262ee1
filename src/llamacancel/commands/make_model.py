"""Small GGUF models made on the spot: a real vocabulary with seeded random weights.

They say nothing sensible, but llama.cpp runs them as it runs real ones: every kind of memory, finite logits
that depend on the whole context, and a size that suits tests ("tiny") or benchmarks ("small", "1b").
Needs the `gguf` package: `pip install "llamacancel[models]"`.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .gguf import QUANTS, Array, ModelWriter, read_gguf

__all__ = ["ARCHITECTURES", "SIZES", "add_arguments", "cached_model", "find_vocab", "make_lora", "make_model", "run"]

FORMAT = 1
"""Version of what this module writes; a part of the cached files' names."""

ARCHITECTURES: dict[str, str] = {
    "llama": "plain attention",
    "swa": "sliding window on every other layer (gemma3)",
    "mamba": "recurrent (mamba)",
    "hybrid": "recurrent layers with attention among them (jamba)",
    "moe": "plain attention, mixture of experts (llama)",
    "hybrid-conv": "short convolutions with attention among them; llama.cpp's n_rs_seq applies (lfm2)",
    "hybrid-swa": "short convolutions with sliding-window attention among them (lfm2)",
    "positions": "plain attention, a learned table of 512 positions (gpt2)",
    "encdec": "encoder and decoder (t5)",
    "diffusion": "plain attention both ways, without memory; with logits (llada)",
    "embedding": "encoder without memory, mean pooling (bert)",
}
SIZES: dict[str, str] = {
    "tiny": "for tests: a few MB, loads within milliseconds",
    "small": "for benchmarks: about 25 M parameters beside the vocabulary",
    "1b": "about 1.1 B parameters, Q8_0",
    "8b": "for GPUs: an 8 B shape, about 7.5 B parameters since the embeddings are the output matrix, too; Q8_0",
}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """The hyperparameters of one model; those that an architecture lacks go unused."""

    n_embd: int
    n_layer: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int = 64
    n_ctx: int = 4096
    window: int = 32
    n_expert: int = 0
    n_expert_used: int = 0
    d_state: int = 16
    d_conv: int = 4

    @property
    def d_inner(self) -> int:
        """Width of a recurrent layer; llama.cpp knows only twice the embedding."""
        return 2 * self.n_embd

    @property
    def dt_rank(self) -> int:
        """Rank of a recurrent layer's time step projection."""
        return max(self.n_embd // 16, 4)


_TINY = Shape(n_embd=64, n_layer=4, n_ff=128, n_head=2, n_head_kv=1)
_SMALL = Shape(n_embd=512, n_layer=10, n_ff=1408, n_head=8, n_head_kv=4, n_ctx=8192, window=256)
_1B = Shape(n_embd=2048, n_layer=16, n_ff=8192, n_head=32, n_head_kv=8, n_ctx=32768, window=512)

_8B = Shape(n_embd=4096, n_layer=32, n_ff=14336, n_head=32, n_head_kv=8, head_dim=128, n_ctx=32768)

_SHAPES: dict[tuple[str, str], Shape] = {
    ("llama", "tiny"): replace(_TINY, n_layer=3),
    ("llama", "small"): _SMALL,
    ("llama", "1b"): _1B,
    ("llama", "8b"): _8B,
    ("swa", "tiny"): _TINY,
    ("swa", "small"): _SMALL,
    ("swa", "1b"): _1B,
    ("mamba", "tiny"): replace(_TINY, n_layer=3),
    ("mamba", "small"): replace(_SMALL, n_layer=12),
    ("mamba", "1b"): replace(_1B, n_layer=40),
    ("hybrid", "tiny"): replace(_TINY, head_dim=32),
    ("hybrid", "small"): replace(_SMALL, n_layer=8, n_ff=1024),
    ("hybrid", "1b"): replace(_1B, n_ff=6144),
    ("moe", "tiny"): replace(_TINY, n_layer=3, n_ff=64, n_expert=4, n_expert_used=2),
    ("moe", "small"): replace(_SMALL, n_layer=6, n_ff=320, n_expert=8, n_expert_used=4),
    ("hybrid-conv", "tiny"): replace(_TINY, head_dim=32, window=0),
    ("hybrid-conv", "small"): replace(_SMALL, n_layer=8, window=0),
    ("hybrid-swa", "tiny"): replace(_TINY, head_dim=32),
    ("hybrid-swa", "small"): replace(_SMALL, n_layer=8),
    ("positions", "tiny"): replace(_TINY, n_layer=3, n_head_kv=2, head_dim=32, n_ctx=512),
    ("positions", "small"): replace(_SMALL, n_head_kv=8, n_ctx=512),
    ("encdec", "tiny"): replace(_TINY, n_layer=2, n_head_kv=2, head_dim=32),
    ("encdec", "small"): replace(_SMALL, n_layer=4, n_ff=1024, n_head_kv=8),
    ("diffusion", "tiny"): _TINY,
    ("embedding", "tiny"): replace(_TINY, n_layer=3, n_head_kv=2, head_dim=32),
    ("embedding", "small"): replace(_SMALL, n_embd=384, n_layer=12, n_ff=1536, n_head=12, n_head_kv=12, head_dim=32),
}
_DEFAULT_QUANT = {"tiny": "f16", "small": "f16", "1b": "q8_0", "8b": "q8_0"}


def make_model(
    path: str | os.PathLike[str],
    arch: str = "llama",
    size: str = "tiny",
    *,
    seed: int = 0,
    quant: str | None = None,
    vocab: str | None = None,
    progress: Callable[[float], object] | None = None,
) -> Path:
    """Write a small random model; the same arguments give the same bytes.

    The file appears under its name only when it is complete.

    Args:
        path: Where to write the GGUF file.
        arch: One of `ARCHITECTURES`.
        size: One of `SIZES`; "1b" exists for "llama", "swa", "mamba" and "hybrid", "8b" for "llama".
        seed: Seed of the weights.
        quant: Type of the matrices, "f32", "f16" or "q8_0"; by default "q8_0" for "1b" and "8b" and "f16" otherwise.
        vocab: A vocabulary's name or a GGUF file to copy it from (see `find_vocab`); by default "bert-bge"
            for "embedding", "llama-bpe" (128 k tokens) for "8b" and "llama-spm" otherwise.
        progress: Called with the fraction written, ending with 1.0. What it raises ends the work.

    Returns:
        The path of the file.

    Raises:
        ValueError: An unknown architecture, size or type, or a size that the architecture does not have.
        FileNotFoundError: The vocabulary was not found.
        ImportError: The `gguf` package is missing.
    """
    shape = _shape_of(arch, size)
    quant = _quant_of(size, quant)
    default = "bert-bge" if arch == "embedding" else "llama-bpe" if size == "8b" else "llama-spm"
    vocab_path = find_vocab(vocab or default)
    gguf_arch, build = _BUILDERS[arch]
    writer = ModelWriter(gguf_arch, seed=seed, quant=quant, keys=_read_vocab(vocab_path))
    _shape_params(writer, shape)
    writer.describe(f"llamacancel {arch} {size}", f"Random weights, seed {seed}, {quant}: {ARCHITECTURES[arch]}.")
    build(writer, shape)
    return writer.write(Path(path), progress)


def cached_model(arch: str, size: str, *, seed: int = 0, quant: str | None = None) -> Path:
    """Return a made model from the cache, making it there the first time.

    The cache is `$LLAMACANCEL_CACHE`, or `~/.cache/llamacancel/models`. Processes may race: each one writes a
    file of its own and renames it, and the bytes are the same.

    Args:
        arch: One of `ARCHITECTURES`.
        size: One of `SIZES`.
        seed: Seed of the weights.
        quant: Type of the matrices, as for `make_model`.

    Returns:
        The path of the file.

    Raises:
        ValueError: An unknown architecture, size or type, or a size that the architecture does not have.
        FileNotFoundError: The vocabulary was not found.
        ImportError: The `gguf` package is missing.
    """
    quant = _quant_of(size, quant)
    folder = os.environ.get("LLAMACANCEL_CACHE") or Path.home() / ".cache" / "llamacancel" / "models"
    path = Path(folder) / f"{arch}-{size}-seed{seed}-{quant}-v{FORMAT}.gguf"
    if not path.exists():
        make_model(path, arch, size, seed=seed, quant=quant)
    return path


def make_lora(
    path: str | os.PathLike[str], model_path: str | os.PathLike[str], *, rank: int = 4, seed: int = 0
) -> Path:
    """Write a small random LoRA adapter that fits the attention of a made model.

    Args:
        path: Where to write the adapter's GGUF file.
        model_path: The model, which has to have attention ("llama", "moe", "swa").
        rank: Rank of the adapter.
        seed: Seed of the weights.

    Returns:
        The path of the adapter.

    Raises:
        ValueError: The model is no GGUF file, or has no attention matrices to adapt.
        ImportError: The `gguf` package is missing.
    """
    keys, tensors = read_gguf(Path(model_path))
    arch = keys["general.architecture"].decode()
    targets = {name: ne for name, ne in tensors.items() if name.endswith((".attn_q.weight", ".attn_v.weight"))}
    if not targets:
        raise ValueError(f"{os.fspath(model_path)} ({arch}) has no attn_q and attn_v matrices to adapt")
    writer = ModelWriter(arch, seed=seed, quant="f32")
    writer.describe("llamacancel lora", f"Random LoRA adapter, rank {rank}, seed {seed}.")
    writer.key("general.type", "adapter")
    writer.key("adapter.type", "lora")
    writer.key("adapter.lora.alpha", float(rank))
    for name, (n_in, n_out) in targets.items():
        writer.matrix(f"{name}.lora_a", n_in, rank)
        writer.matrix(f"{name}.lora_b", rank, n_out)
    return writer.write(Path(path))


def find_vocab(name: str) -> Path:
    """Find the GGUF file of a vocabulary.

    Looks in `$LLAMACANCEL_LLAMA_DIR/models`, in the source tree's `vendor/llama.cpp/models`, then in the
    current folder's.

    Args:
        name: "llama-spm", "llama-bpe", "qwen2", "gpt-neox", "bert-bge", ..., or the path of a GGUF file.

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError: It is in none of these places; the message lists them.
    """
    if name.endswith(".gguf"):
        candidates = [Path(name)]
    else:
        root = os.environ.get("LLAMACANCEL_LLAMA_DIR")
        folders = [Path(root)] if root else []
        folders += [base / "vendor" / "llama.cpp" for base in (Path(__file__).resolve().parents[2], Path.cwd())]
        candidates = [folder / "models" / f"ggml-vocab-{name}.gguf" for folder in dict.fromkeys(folders)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    looked = ", ".join(str(candidate) for candidate in candidates)
    raise FileNotFoundError(f"no vocabulary {name!r}: looked for {looked}. Set LLAMACANCEL_LLAMA_DIR to a llama.cpp.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `llamacancel make-model` to a parser."""
    parser.add_argument("path", help="GGUF file to write")
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), default="llama")
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quant", choices=QUANTS, help="type of the matrices (default: by size)")
    parser.add_argument("--vocab", help="vocabulary's name, or a GGUF file that has it")


def run(args: argparse.Namespace) -> int:
    """Make the model that the command line asks for, print what was made, and return the exit status."""
    start = time.perf_counter()
    progress = _show if sys.stderr.isatty() else None
    path = make_model(
        args.path, args.arch, args.size, seed=args.seed, quant=args.quant, vocab=args.vocab, progress=progress
    )
    seconds = time.perf_counter() - start
    parameters = sum(math.prod(ne) for ne in read_gguf(path)[1].values())
    print(
        f"{path}: {args.arch} {args.size} ({_quant_of(args.size, args.quant)}), "
        f"{parameters / 1e6:.1f} M parameters, {path.stat().st_size / 1e6:.1f} MB, {seconds:.1f} s"
    )
    return 0


def _show(fraction: float) -> None:
    print(f"\rwriting weights: {fraction:4.0%}", end="" if fraction < 1 else "\r\x1b[2K", file=sys.stderr, flush=True)


def _build_llama(w: ModelWriter, s: Shape) -> None:
    _attention_params(w, s)
    w.param("rope.dimension_count", s.head_dim)
    if s.n_expert:
        w.param("expert_count", s.n_expert)
        w.param("expert_used_count", s.n_expert_used)
    _embedding(w, s, std=0.5 / math.sqrt(s.n_embd))
    for i in range(s.n_layer):
        blk = f"blk.{i}"
        w.vector(f"{blk}.attn_norm.weight", s.n_embd)
        _attention(w, s, blk, gain=1.6)
        w.vector(f"{blk}.ffn_norm.weight", s.n_embd)
        if s.n_expert:
            w.normal(f"{blk}.ffn_gate_inp.weight", (s.n_expert, s.n_embd), gain=2.0)
            _feed_forward(w, s, blk, suffix="_exps", lead=(s.n_expert,))
        else:
            _feed_forward(w, s, blk)


def _build_gemma3(w: ModelWriter, s: Shape) -> None:
    _attention_params(w, s)
    w.param("attention.sliding_window", s.window)
    w.param("attention.sliding_window_pattern", 2)
    w.param("rope.freq_base", 1e6)
    _embedding(w, s, std=0.5 / s.n_embd)  # the graph scales embeddings by sqrt(n_embd)
    for i in range(s.n_layer):
        blk = f"blk.{i}"
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            w.vector(f"{blk}.{name}.weight", s.n_embd)
        for name in ("attn_q_norm", "attn_k_norm"):
            w.vector(f"{blk}.{name}.weight", s.head_dim, mean=1.6)
        _attention(w, s, blk)
        _feed_forward(w, s, blk)


def _build_mamba(w: ModelWriter, s: Shape) -> None:
    w.param("attention.layer_norm_rms_epsilon", 1e-5)
    _recurrent_params(w, s)
    w.keys[f"{w.arch}.feed_forward_length"] = 0
    _embedding(w, s, std=0.5 / math.sqrt(s.n_embd))
    for i in range(s.n_layer):
        w.vector(f"blk.{i}.attn_norm.weight", s.n_embd)
        _recurrent(w, s, f"blk.{i}")


def _build_jamba(w: ModelWriter, s: Shape) -> None:
    _attention_params(w, s)
    _recurrent_params(w, s)
    attends = [i % 4 == 2 for i in range(s.n_layer)]
    w.param("attention.head_count_kv", [s.n_head_kv if attend else 0 for attend in attends])
    _embedding(w, s, std=0.5 / math.sqrt(s.n_embd))
    for i, attend in enumerate(attends):
        blk = f"blk.{i}"
        w.vector(f"{blk}.attn_norm.weight", s.n_embd)
        if attend:
            _attention(w, s, blk, gain=1.6)
        else:
            _recurrent(w, s, blk)
            w.vector(f"{blk}.ssm_dt_norm.weight", s.dt_rank)
            w.vector(f"{blk}.ssm_b_norm.weight", s.d_state, mean=2.0)
            w.vector(f"{blk}.ssm_c_norm.weight", s.d_state, mean=2.0)
        w.vector(f"{blk}.ffn_norm.weight", s.n_embd)
        _feed_forward(w, s, blk)


def _build_lfm2(w: ModelWriter, s: Shape) -> None:
    _attention_params(w, s)
    w.param("shortconv.l_cache", s.d_conv)
    w.param("attention.sliding_window", s.window)  # 0: none
    attends = [i % 2 == 1 for i in range(s.n_layer)]
    w.param("attention.head_count_kv", [s.n_head_kv if attend else 0 for attend in attends])
    _embedding(w, s, std=0.5 / math.sqrt(s.n_embd), norm="token_embd_norm")
    for i, attend in enumerate(attends):
        blk = f"blk.{i}"
        w.vector(f"{blk}.attn_norm.weight", s.n_embd)
        if attend:
            w.vector(f"{blk}.attn_q_norm.weight", s.head_dim, mean=1.6)
            w.vector(f"{blk}.attn_k_norm.weight", s.head_dim, mean=1.6)
            _attention(w, s, blk)
        else:
            w.normal(f"{blk}.shortconv.conv.weight", (s.n_embd, s.d_conv), gain=2.0)
            w.matrix(f"{blk}.shortconv.in_proj.weight", s.n_embd, 3 * s.n_embd)
            w.matrix(f"{blk}.shortconv.out_proj.weight", s.n_embd, s.n_embd)
        w.vector(f"{blk}.ffn_norm.weight", s.n_embd)
        _feed_forward(w, s, blk)


def _build_gpt2(w: ModelWriter, s: Shape) -> None:
    w.param("attention.head_count", s.n_head)
    w.param("attention.layer_norm_epsilon", 1e-5)
    _embedding(w, s, std=0.5 / math.sqrt(s.n_embd))
    w.vector("output_norm.bias", s.n_embd, mean=0.0)
    w.matrix("position_embd.weight", s.n_embd, s.n_ctx, gain=0.5)
    for i in range(s.n_layer):
        blk = f"blk.{i}"
        for name, n_in, n_out in (
            ("attn_qkv", s.n_embd, 3 * s.n_embd),
            ("attn_output", s.n_embd, s.n_embd),
            ("ffn_up", s.n_embd, s.n_ff),
            ("ffn_down", s.n_ff, s.n_embd),
        ):
            w.matrix(f"{blk}.{name}.weight", n_in, n_out, gain=1.6)
            w.vector(f"{blk}.{name}.bias", n_out, mean=0.0)
        _layer_norm(w, f"{blk}.attn_norm", s.n_embd)
        _layer_norm(w, f"{blk}.ffn_norm", s.n_embd)


def _build_t5(w: ModelWriter, s: Shape) -> None:
    _attention_params(w, s)
    w.param("attention.relative_buckets_count", 32)
    w.param("decoder_start_token_id", 1)
    gain = 1.6 / s.head_dim**0.25  # the graph does not divide by sqrt(head_dim)
    _embedding(w, s, std=0.5 / math.sqrt(s.n_embd), norm="dec.output_norm")
    w.vector("enc.output_norm.weight", s.n_embd)
    for stack in ("enc", "dec"):
        w.normal(f"{stack}.blk.0.attn_rel_b.weight", (32, s.n_head), gain=2.0)
        for i in range(s.n_layer):
            blk = f"{stack}.blk.{i}"
            for part in ("attn", "cross_attn") if stack == "dec" else ("attn",):
                w.vector(f"{blk}.{part}_norm.weight", s.n_embd)
                _attention(w, s, blk, gain=gain, part=part, out="o")
            w.vector(f"{blk}.ffn_norm.weight", s.n_embd)
            _feed_forward(w, s, blk)


def _build_bert(w: ModelWriter, s: Shape) -> None:
    w.param("attention.head_count", s.n_head)
    w.param("attention.layer_norm_epsilon", 1e-12)
    w.param("attention.causal", False)
    w.param("pooling_type", 1)
    w.keys.setdefault("tokenizer.ggml.token_type_count", 2)
    w.matrix("token_embd.weight", s.n_embd, _n_vocab(w))
    w.matrix("position_embd.weight", s.n_embd, s.n_ctx, gain=0.5)
    w.normal("token_types.weight", (2, s.n_embd), gain=0.1)
    _layer_norm(w, "token_embd_norm", s.n_embd)
    for i in range(s.n_layer):
        blk = f"blk.{i}"
        _attention(w, s, blk, gain=1.6)
        _layer_norm(w, f"{blk}.attn_output_norm", s.n_embd)
        w.matrix(f"{blk}.ffn_up.weight", s.n_embd, s.n_ff)
        w.matrix(f"{blk}.ffn_down.weight", s.n_ff, s.n_embd, gain=2.0)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down"):
            w.vector(f"{blk}.{name}.bias", s.n_ff if name == "ffn_up" else s.n_embd, mean=0.0)
        _layer_norm(w, f"{blk}.layer_output_norm", s.n_embd)


def _shape_params(w: ModelWriter, s: Shape) -> None:
    """Set the keys that all architectures share."""
    w.param("vocab_size", _n_vocab(w))
    w.param("context_length", s.n_ctx)
    w.param("embedding_length", s.n_embd)
    w.param("block_count", s.n_layer)
    w.param("feed_forward_length", s.n_ff)


def _n_vocab(w: ModelWriter) -> int:
    return len(w.keys["tokenizer.ggml.tokens"])


def _attention_params(w: ModelWriter, s: Shape) -> None:
    w.param("attention.head_count", s.n_head)
    w.param("attention.head_count_kv", s.n_head_kv)
    w.param("attention.key_length", s.head_dim)
    w.param("attention.value_length", s.head_dim)
    w.param("attention.layer_norm_rms_epsilon", 1e-5)


def _embedding(w: ModelWriter, s: Shape, *, std: float, norm: str = "output_norm") -> None:
    """Add token embeddings, which are the output matrix too, and an output norm that gives logits of size 3.

    The embeddings are small beside what the layers add, so a token does not predict itself.
    """
    w.key("tokenizer.chat_template", CHAT_TEMPLATE)
    w.matrix("token_embd.weight", s.n_embd, _n_vocab(w), gain=std * math.sqrt(s.n_embd))
    w.vector(f"{norm}.weight", s.n_embd, mean=3.0 / (std * math.sqrt(s.n_embd)))


def _attention(
    w: ModelWriter, s: Shape, blk: str, *, gain: float = 1.0, part: str = "attn", out: str = "output"
) -> None:
    """Add attention; a `gain` above 1 makes it attend to few tokens, so that the context matters."""
    q, kv = s.n_head * s.head_dim, s.n_head_kv * s.head_dim
    w.matrix(f"{blk}.{part}_q.weight", s.n_embd, q, gain=gain)
    w.matrix(f"{blk}.{part}_k.weight", s.n_embd, kv, gain=gain)
    w.matrix(f"{blk}.{part}_v.weight", s.n_embd, kv)
    w.matrix(f"{blk}.{part}_{out}.weight", q, s.n_embd, gain=2.0)


def _feed_forward(w: ModelWriter, s: Shape, blk: str, *, suffix: str = "", lead: Sequence[int] = ()) -> None:
    w.matrix(f"{blk}.ffn_gate{suffix}.weight", s.n_embd, s.n_ff, lead=lead)
    w.matrix(f"{blk}.ffn_up{suffix}.weight", s.n_embd, s.n_ff, lead=lead)
    w.matrix(f"{blk}.ffn_down{suffix}.weight", s.n_ff, s.n_embd, gain=2.0, lead=lead)


def _recurrent_params(w: ModelWriter, s: Shape) -> None:
    w.param("ssm.conv_kernel", s.d_conv)
    w.param("ssm.inner_size", s.d_inner)
    w.param("ssm.state_size", s.d_state)
    w.param("ssm.time_step_rank", s.dt_rank)


def _recurrent(w: ModelWriter, s: Shape, blk: str) -> None:
    """Add a mamba layer whose slowest states remember for about 500 tokens."""
    w.matrix(f"{blk}.ssm_in.weight", s.n_embd, 2 * s.d_inner)
    w.normal(f"{blk}.ssm_conv1d.weight", (s.d_inner, s.d_conv), gain=2.0)
    w.vector(f"{blk}.ssm_conv1d.bias", s.d_inner, mean=0.0)
    w.matrix(f"{blk}.ssm_x.weight", s.d_inner, s.dt_rank + 2 * s.d_state, gain=3.0)
    w.matrix(f"{blk}.ssm_dt.weight", s.dt_rank, s.d_inner, gain=0.2)
    w.exact(f"{blk}.ssm_dt.bias", (s.d_inner,), lambda rng: _dt_bias(rng, s.d_inner))
    decay = -np.geomspace(1, s.d_state, s.d_state)
    w.exact(f"{blk}.ssm_a", (s.d_inner, s.d_state), lambda rng: np.tile(decay, (s.d_inner, 1)))
    w.vector(f"{blk}.ssm_d", s.d_inner, mean=0.5)
    w.matrix(f"{blk}.ssm_out.weight", s.d_inner, s.n_embd, gain=2.0)


def _layer_norm(w: ModelWriter, name: str, n: int) -> None:
    w.vector(f"{name}.weight", n)
    w.vector(f"{name}.bias", n, mean=0.0)


def _dt_bias(rng: np.random.Generator, n: int) -> Array:
    """Draw time steps between 0.002 and 0.1, through the inverse of the softplus that the graph applies."""
    dt = np.exp(rng.uniform(math.log(2e-3), math.log(0.1), n))
    return dt + np.log(-np.expm1(-dt))


_BUILDERS: dict[str, tuple[str, Callable[[ModelWriter, Shape], None]]] = {
    "llama": ("llama", _build_llama),
    "swa": ("gemma3", _build_gemma3),
    "mamba": ("mamba", _build_mamba),
    "hybrid": ("jamba", _build_jamba),
    "moe": ("llama", _build_llama),
    "hybrid-conv": ("lfm2", _build_lfm2),
    "hybrid-swa": ("lfm2", _build_lfm2),
    "positions": ("gpt2", _build_gpt2),
    "encdec": ("t5", _build_t5),
    "diffusion": ("llada", _build_llama),
    "embedding": ("bert", _build_bert),
}


def _shape_of(arch: str, size: str) -> Shape:
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}: one of {', '.join(ARCHITECTURES)}")
    if (arch, size) not in _SHAPES:
        sizes = [s for a, s in _SHAPES if a == arch]
        raise ValueError(f"{arch!r} has no size {size!r}: one of {', '.join(sizes)}")
    return _SHAPES[arch, size]


def _quant_of(size: str, quant: str | None) -> str:
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}: one of {', '.join(SIZES)}")
    quant = quant or _DEFAULT_QUANT[size]
    if quant not in QUANTS:
        raise ValueError(f"unknown type {quant!r}: one of {', '.join(QUANTS)}")
    return quant


@lru_cache(maxsize=2)
def _read_vocab(path: Path) -> dict[str, Any]:
    return {name: value for name, value in read_gguf(path)[0].items() if name.startswith("tokenizer.")}
