"""Tokens that say stop, and what a call tells that was stopped. Knows neither models nor llama.cpp."""

from .outcome import cancelled_error
from .token import CallbackHandle, CancelToken, Cause, call_as_callback, publish

__all__ = [
    "CallbackHandle",
    "CancelToken",
    "Cause",
    "call_as_callback",
    "cancelled_error",
    "publish",
]
