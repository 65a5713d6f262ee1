"""The engine's state as JSON, whole or as what is new since the last time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ...engine import RequestView, SlotView
from ..service import Asker, Service

__all__ = ["Snapshots"]

_TIMES = ("submitted_at", "started_at", "first_token_at", "finished_at")
_EPOCH = time.time() - time.monotonic()
"""The engine's clock began then, in Unix seconds."""


class Snapshots:
    """Pictures of an engine for one reader.

    Args:
        service: Whose engine.
        asker: Who reads.
    """

    def __init__(self, service: Service, asker: Asker) -> None:
        self._service, self._asker = service, asker
        self._told: frozenset[tuple[str, float]] | None = None

    def whole(self) -> dict[str, Any]:
        """Everything; times are Unix seconds."""
        self._told = None
        return self.next()

    def next(self) -> dict[str, Any]:
        """The same, but of the finished requests only those that were not told yet; "complete" where that is all."""
        now = self._service.engine.snapshot()
        complete = self._told is None
        recent = [view for view in now.recent if self._told is None or _key(view) not in self._told]
        self._told = frozenset(_key(view) for view in now.recent)
        return {
            **{name: getattr(now, name) for name in now.__slots__},
            "now": time.monotonic() + _EPOCH,
            "model": self._service.model_name,
            "complete": complete,
            "slots": [_fields(slot) for slot in now.slots],
            "queue": self._views(now.queue),
            "active": self._views(now.active),
            "recent": self._views(recent),
        }

    def _views(self, views: Sequence[RequestView]) -> list[dict[str, Any]]:
        given = [_fields(view) for view in views]
        for each in given:
            for name in _TIMES:
                if each[name] is not None:
                    each[name] += _EPOCH
            each["yours"] = each["state"] != "finished" and self._service.may_cancel(self._asker, each["id"])
        return given


def _key(view: RequestView) -> tuple[str, float]:
    return view.id, view.submitted_at


def _fields(view: RequestView | SlotView) -> dict[str, Any]:
    """As `dataclasses.asdict`, which copies each value and takes ten times as long."""
    return {name: getattr(view, name) for name in view.__slots__}
