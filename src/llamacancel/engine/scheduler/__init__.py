"""Decides which requests run, in which slots, and which rows each step computes. Pure Python, without llama.cpp."""

from .cells import Cells
from .flight import Flight
from .plan import Clear, Copy, Fault, Outcome, Plan, Rows, Sampled, Trim
from .policy import Limits, Pace, place_of
from .prefix import MemoryRules
from .request import FinishReason, Request, RequestState
from .scheduler import Scheduler
from .sequence import Sequence

__all__ = [
    "Cells",
    "Clear",
    "Copy",
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
    "Trim",
    "place_of",
]
