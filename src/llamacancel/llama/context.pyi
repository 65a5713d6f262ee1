from collections.abc import Iterable
from types import TracebackType
from typing import Literal, NoReturn, TypedDict, final

import numpy as np
from numpy.typing import NDArray

from ..cancel.token import CancelToken
from .batch import Batch
from .memory import Memory
from .model import LoraAdapter, Model
from .params import LatencyPlan
from .result import DecodeResult
from .state import State

Pooling = Literal["none", "mean", "cls", "last", "rank"]
RopeScaling = Literal["none", "linear", "yarn", "longrope"]
CacheType = Literal["f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl"]

class _Perf(TypedDict):
    prompt_seconds: float
    prompt_tokens: int
    eval_seconds: float
    eval_tokens: int
    graphs_reused: int

@final
class Context:
    def __init__(
        self,
        model: Model,
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
        token: CancelToken | None = None,
    ) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> Context: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...
    def __reduce__(self) -> NoReturn: ...
    def decode(
        self,
        batch: Batch,
        token: CancelToken | dict[int, CancelToken] | None = None,
        *,
        on_cancel: Literal["rollback", "keep"] = "rollback",
        when_shared: Literal["finish", "stop"] = "finish",
    ) -> DecodeResult: ...
    def encode(self, batch: Batch, token: CancelToken | dict[int, CancelToken] | None = None) -> DecodeResult: ...
    def logits(self, i: int = -1) -> NDArray[np.float32]: ...
    def embeddings(self, i: int = -1) -> NDArray[np.float32]: ...
    def pooled_embeddings(self, seq_id: int = 0) -> NDArray[np.float32]: ...
    def set_lora(self, adapters: Iterable[tuple[LoraAdapter, float]] = ()) -> None: ...
    def set_threads(self, n_threads: int, n_threads_batch: int | None = None) -> None: ...
    def perf(self, reset: bool = False) -> _Perf: ...
    @property
    def model(self) -> Model: ...
    @property
    def memory(self) -> Memory: ...
    @property
    def state(self) -> State: ...
    @property
    def dirty_sequences(self) -> list[int]: ...
    @property
    def latency_plan(self) -> LatencyPlan: ...
    @property
    def closed(self) -> bool: ...
    @property
    def n_ctx(self) -> int: ...
    @property
    def n_ctx_seq(self) -> int: ...
    @property
    def n_batch(self) -> int: ...
    @property
    def n_ubatch(self) -> int: ...
    @property
    def n_seq_max(self) -> int: ...
    @property
    def n_threads(self) -> int: ...
    @property
    def n_threads_batch(self) -> int: ...
