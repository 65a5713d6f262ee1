"""An OpenAI-compatible server whose clients can hang up: `llamacancel serve`, or `create_app(engine)` for your own.

Needs the extra `server`: `pip install "llamacancel[server]"`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app import create_app

__all__ = ["create_app"]


def __getattr__(name: str) -> Any:
    if name != "create_app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .app import create_app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("llamacancel"):
            raise
        raise ImportError(f"the server needs {error.name}: pip install 'llamacancel[server]'") from error
    return create_app
