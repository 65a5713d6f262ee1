"""Cancel llama.cpp work exactly and at once.

A cancel reaches the work that was given its token, and leaves everything else as if nothing had happened. The
README tells what is promised and how it is tested.
"""

from . import aio as aio
from .cancel import CancelToken, Cause
from .chat import ChatDelta, ChatMessage, ChatPrompt
from .engine import (
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
