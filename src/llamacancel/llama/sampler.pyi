from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

from ..cancel.token import CancelToken
from ..constraint import Source
from .context import Context
from .model import Model

class Sampler:
    def __init__(
        self,
        *,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        top_n_sigma: float = -1.0,
        min_keep: int = 1,
        dynatemp_range: float = 0.0,
        dynatemp_exponent: float = 1.0,
        repeat_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        penalty_last_n: int = 64,
        dry_multiplier: float = 0.0,
        dry_base: float = 1.75,
        dry_allowed_length: int = 2,
        dry_penalty_last_n: int = 1024,
        dry_breakers: Iterable[str] = ("\n", ":", '"', "*"),
        xtc_probability: float = 0.0,
        xtc_threshold: float = 0.1,
        mirostat: Literal[0, 1, 2] = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        seed: int | None = None,
        logit_bias: Mapping[int, float] | None = None,
        json_schema: str | bytes | bytearray | Mapping[str, object] | bool | None = None,
        regex: str | None = None,
        lark: str | Source | None = None,
        grammar: str | None = None,
        grammar_root: str = "root",
        model: Model | None = None,
        token: CancelToken | None = None,
    ) -> None: ...
    def bind(self, model: Model, token: CancelToken | None = None) -> None: ...
    def sample(self, ctx: Context, i: int = -1, token: CancelToken | None = None) -> int: ...
    def accept(self, token: int, *, model: Model | None = None) -> None: ...
    def reset(self) -> None: ...
    @property
    def _lacks_mask(self) -> bool: ...
    def _make_mask(self) -> None: ...
    def _take_forced(self, least: int, most: int) -> list[int]: ...
    def clone(self, *, seed: int | None = None) -> Sampler: ...
    def constrained(self, lark: str | Source) -> Sampler: ...

Chosen: TypeAlias = tuple[int, float | None, tuple[tuple[int, float], ...]]

def choose_tokens(
    ctx: Context, rows: list[tuple[Sampler, int, CancelToken, int | None]]
) -> list[Chosen | Exception]: ...
