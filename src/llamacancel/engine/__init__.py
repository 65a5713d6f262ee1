"""Runs many requests at a time: `Engine`, what it gives out for each request, and what it tells of itself.

`engine.py` takes requests in on the caller's thread. `thread.py` is the engine's own, which lets the scheduler (pure
Python, in a room of its own) plan each step and the runner compute it. `work.py` is the engine's half of a request,
`handle.py`, `generation.py` and `conversation.py` the user's; `desk.py` is all that the threads share.
"""

from .conversation import Conversation
from .engine import LONG_TEXT, Engine, token_of
from .generation import Embedding, Generation, GenerationResult, Piece, TokenInfo
from .handle import Handle
from .scheduler import FinishReason, RequestState
from .usage import Usage
from .views import EngineSnapshot, RequestView, SlotView
from .work import Registration

__all__ = [
    "LONG_TEXT",
    "Conversation",
    "Embedding",
    "Engine",
    "EngineSnapshot",
    "FinishReason",
    "Generation",
    "GenerationResult",
    "Handle",
    "Piece",
    "Registration",
    "RequestState",
    "RequestView",
    "SlotView",
    "TokenInfo",
    "Usage",
    "token_of",
]
