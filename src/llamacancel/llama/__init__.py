"""Models, contexts and samplers: what is computed with llama.cpp, in the one library that links it."""

import importlib.util
import sys
from typing import TYPE_CHECKING

from . import _llama

# llama.cpp's globals must exist once in a process. So these modules are compiled into `_llama`'s file and have none of
# their own: each is loaded from there, by the init function of its name. Those that others build on come first.
for _name in ("call", "model", "result", "context", "memory", "state", "sampler"):
    _spec = importlib.util.spec_from_file_location(f"{__name__}.{_name}", _llama.__file__)
    assert _spec is not None
    assert _spec.loader is not None
    globals()[_name] = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_spec.name])

from ._llama import build_info, is_parked, serve_rpc
from .batch import Batch
from .context import Context
from .memory import Memory
from .model import LoraAdapter, Model
from .params import POOLING, LatencyPlan, default_threads, integer, number
from .result import DecodeResult
from .sampler import Sampler, choose_tokens
from .state import State

if TYPE_CHECKING:  # names of the stubs alone
    from .context import Pooling as Pooling
    from .sampler import Chosen as Chosen

__all__ = [
    "POOLING",
    "Batch",
    "Context",
    "DecodeResult",
    "LatencyPlan",
    "LoraAdapter",
    "Memory",
    "Model",
    "Sampler",
    "State",
    "build_info",
    "choose_tokens",
    "default_threads",
    "integer",
    "is_parked",
    "number",
    "serve_rpc",
]
