"""What a request's fault is to others: what its reader is told, and whether the model is lost."""

from __future__ import annotations

from ..errors import LlamaCancelError

__all__ = ["for_a_reader", "is_lost"]

_LOST = "the connection to the RPC server"  # how the core says that a model is lost, and every context with it


def for_a_reader(error: BaseException) -> Exception:
    """What a reader is told. A `KeyboardInterrupt` or `SystemExit` that was raised here is none of his thread's."""
    if isinstance(error, Exception):
        return error
    told = LlamaCancelError(f"the request failed: {type(error).__name__}: {error}")
    told.__cause__ = error
    return told


def is_lost(error: BaseException) -> bool:
    """Whether a call failed because its model is lost."""
    return str(error).startswith(_LOST)
