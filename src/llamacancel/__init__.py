"""Cancel llama.cpp work exactly and at once.

A cancel reaches the work that was given its token, and leaves everything else as if nothing had happened. The
README tells what is promised and how it is tested.
"""

import dataclasses as _dataclasses

from . import aio as aio
from .cancel import CancelToken, Cause
from .cancel import publish as _publish
from .chat import ChatDelta, ChatMessage, ChatPrompt
from .engine import (
    Conversation,
    Embedding,
    Engine,
    EngineSnapshot,
    Generation,
    GenerationResult,
    Piece,
    RequestView,
    SlotView,
    TokenInfo,
    Usage,
)
from .errors import (
    ChatError,
    ClosedError,
    ContextBusyError,
    ContextError,
    DeadlineExceeded,
    DecodeCancelled,
    DecodeFailedError,
    DirtySequenceError,
    InvalidBatchError,
    LlamaCancelError,
    LoadCancelled,
    LoadDeadlineExceeded,
    MemoryFullError,
    ModelLoadError,
    QueueFullError,
    SequenceOutcome,
    StateError,
)
from .llama import Batch, Context, DecodeResult, LatencyPlan, LoraAdapter, Model, Sampler, build_info

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "CancelToken",
    "Cause",
    "ChatDelta",
    "ChatError",
    "ChatMessage",
    "ChatPrompt",
    "ClosedError",
    "Context",
    "ContextBusyError",
    "ContextError",
    "Conversation",
    "DeadlineExceeded",
    "DecodeCancelled",
    "DecodeFailedError",
    "DecodeResult",
    "DirtySequenceError",
    "Embedding",
    "Engine",
    "EngineSnapshot",
    "Generation",
    "GenerationResult",
    "InvalidBatchError",
    "LatencyPlan",
    "LlamaCancelError",
    "LoadCancelled",
    "LoadDeadlineExceeded",
    "LoraAdapter",
    "MemoryFullError",
    "Model",
    "ModelLoadError",
    "Piece",
    "QueueFullError",
    "RequestView",
    "Sampler",
    "SequenceOutcome",
    "SlotView",
    "StateError",
    "TokenInfo",
    "Usage",
    "__version__",
    "build_info",
]

# Tracebacks and `help()` show where a class is imported from. A data class's annotations are read in its own module.
for _public in map(globals().__getitem__, __all__):
    if isinstance(_public, type) and not _dataclasses.is_dataclass(_public):
        _publish(_public, __name__)
