"""Models, contexts and samplers: what is computed with llama.cpp, in the one library that links it."""

import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from . import _llama


def load_compiled(name: str) -> ModuleType:
    """Load a module that is compiled into `_llama`'s file, by the init function of its name.

    llama.cpp's globals must exist once in a process: so modules that use it have no file of their own.
    """
    spec = importlib.util.spec_from_file_location(name, _llama.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Those that others build on come first.
for _name in ("call", "model", "result", "context", "memory", "state", "sampler"):
    globals()[_name] = load_compiled(f"{__name__}.{_name}")

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
    "load_compiled",
    "number",
    "serve_rpc",
]
