import os
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Literal, NoReturn, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._cancel import CancelToken
from ._context import CacheType, Context, Pooling, RopeScaling

_Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]

@final
class Model:
    @staticmethod
    def load(
        path: _Path,
        n_gpu_layers: int = 0,
        progress: Callable[[float], object] | None = None,
        token: CancelToken | None = None,
        *,
        use_mmap: bool = True,
        use_mlock: bool = False,
        check_tensors: bool = False,
        vocab_only: bool = False,
        main_gpu: int = 0,
        split_mode: Literal["none", "layer", "row"] = "layer",
        tensor_split: Iterable[float] | None = None,
        rpc_servers: Iterable[str] = (),
    ) -> Model: ...
    def context(
        self,
        *,
        n_ctx: int | None = None,
        n_batch: int = 2048,
        n_ubatch: int | None = None,
        n_seq_max: int = 1,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        cancel_latency: float | None = 0.02,
        embeddings: bool = False,
        pooling: Pooling | None = None,
        kv_unified: bool = True,
        flash_attn: bool | Literal["auto"] = "auto",
        type_k: CacheType = "f16",
        type_v: CacheType = "f16",
        swa_full: bool = False,
        rope_scaling: RopeScaling | None = None,
        rope_freq_base: float | None = None,
        rope_freq_scale: float | None = None,
        yarn_ext_factor: float | None = None,
        yarn_attn_factor: float | None = None,
        yarn_beta_fast: float | None = None,
        yarn_beta_slow: float | None = None,
        yarn_orig_ctx: int | None = None,
        offload_kqv: bool = True,
        op_offload: bool = True,
        no_perf: bool = False,
    ) -> Context: ...
    def close(self) -> None: ...
    def __enter__(self) -> Model: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...
    def __reduce__(self) -> NoReturn: ...
    def tokenize(
        self, text: str | bytes | bytearray, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]: ...
    def detokenize(self, tokens: ArrayLike, remove_special: bool = False, unparse_special: bool = False) -> str: ...
    def token_to_piece(self, token: int, special: bool = True) -> bytes: ...
    def is_eog(self, token: int) -> bool: ...
    def is_control(self, token: int) -> bool: ...
    def load_lora(self, path: _Path) -> LoraAdapter: ...
    @property
    def path(self) -> str | bytes: ...
    @property
    def closed(self) -> bool: ...
    @property
    def description(self) -> str: ...
    @property
    def metadata(self) -> dict[str, str]: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def memory_kind(self) -> Literal["attention", "sliding_window", "recurrent", "hybrid", "none"]: ...
    @property
    def n_vocab(self) -> int: ...
    @property
    def n_embd(self) -> int: ...
    @property
    def n_layer(self) -> int: ...
    @property
    def n_head(self) -> int: ...
    @property
    def n_ctx_train(self) -> int: ...
    @property
    def n_swa(self) -> int: ...
    @property
    def n_params(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def has_encoder(self) -> bool: ...
    @property
    def has_decoder(self) -> bool: ...
    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> int | None: ...
    @property
    def eot(self) -> int | None: ...
    @property
    def decoder_start_token(self) -> int | None: ...
    @property
    def adds_bos(self) -> bool: ...

@final
class LoraAdapter:
    def __init__(self, model: Model, path: _Path) -> None: ...
