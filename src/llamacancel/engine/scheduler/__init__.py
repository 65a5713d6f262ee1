"""Decides which requests run, in which slots, and which rows each step computes. Pure Python, without llama.cpp."""

from .cells import Cells
from .flight import Flight
from .plan import Clear, Copy, Cut, Fault, Outcome, Plan, Rows, Sampled
from .policy import Limits, Pace, place_of
from .prefix import MemoryRules
from .request import FinishReason, Request, RequestState
from .scheduler import Scheduler
from .sequence import Sequence

__all__ = [
    "Cells",
    "Clear",
    "Copy",
    "Cut",
    "Fault",
    "FinishReason",
    "Flight",
    "Limits",
    "MemoryRules",
    "Outcome",
    "Pace",
    "Plan",
    "Request",
    "RequestState",
    "Rows",
    "Sampled",
    "Scheduler",
    "Sequence",
    "place_of",
]
