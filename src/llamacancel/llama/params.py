"""Arguments of models and contexts: checked here, in words, before llama.cpp sees them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

__all__ = ["LatencyPlan", "choice", "default_threads", "endpoint", "integer", "number"]

POOLING = {"none": 0, "mean": 1, "cls": 2, "last": 3, "rank": 4}
ROPE_SCALING = {"none": 0, "linear": 1, "yarn": 2, "longrope": 3}
SPLIT_MODE = {"none": 0, "layer": 1, "row": 2}
FLASH_ATTENTION = {"auto": -1, False: 0, True: 1}
CACHE_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20}


def integer(name: str, value: Any, low: int, high: int) -> int:
    """`value` as an int between `low` and `high`, or an exception that names the argument."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    result = int(value.__index__())
    if not low <= result <= high:
        told = result if abs(result) < 10**40 else "an integer that large"
        raise ValueError(f"{name} must be {low} to {high}, not {told}")
    return result


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """`value` as a finite float between `low` and `high`, or an exception that names the argument."""
    try:
        result = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, not {value!r}") from None
    except OverflowError:
        raise ValueError(f"{name} must be {low} to {high}, not an integer that large") from None
    if not (math.isfinite(result) and low <= result <= high):
        raise ValueError(f"{name} must be {low} to {high}, not {result}")
    return result


def choice(name: str, value: Any, choices: dict[Any, int]) -> int:
    """The number that llama.cpp has for one of some words."""
    try:
        return choices[value]
    except (KeyError, TypeError):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}") from None


def endpoint(name: str, value: Any) -> str:
    """`value` if it is "host:port", or an exception that names the argument. llama.cpp's RPC knows IPv4 only."""
    if not isinstance(value, str):
        raise TypeError(f'{name} must name each server as "host:port", not {value!r}')
    host, _, port = value.rpartition(":")
    if not host or ":" in host or not host.isascii() or any(c.isspace() or not c.isprintable() for c in host):
        raise ValueError(f'{name} must name each server as "host:port" (IPv4 or a name), not {value!r}')
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise ValueError(f"{name}: {value!r} has no port from 1 to 65535")
    return f"{host}:{int(port)}"


def default_threads() -> int:
    """The number of CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class LatencyPlan:
    """How a context cuts its work so that a cancel is honoured in time.

    Attributes:
        target: Seconds from cancel to return that were asked for; None if `n_ubatch` was given or nothing asked.
        n_ubatch: Most rows that are computed together.
        max_outputs: Most rows with logits in one ubatch.
        n_pieces: Pieces in which the graph of a full ubatch is handed to a device that is no CPU; 0: as a whole.
        n_pieces_of_one: Those of a single token's.
        node_seconds: The longest time between two looks at the token that is expected with `n_ubatch` rows: on a CPU
            estimated from the model's widest layer, on other devices as measured when the model's first context was
            made (of a whole ubatch, where there are pieces to cut it into). None without an aim.
        attention_seconds: By how much it grows for a row and 1,000 cells that the row looks at. None without an aim.
    """

    target: float | None
    n_ubatch: int
    max_outputs: int
    n_pieces: int
    n_pieces_of_one: int
    node_seconds: float | None
    attention_seconds: float | None
