"""Running the suite against a fake server in virtual time."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llamacancel.conformance.profile import Profile, measure
from llamacancel.conformance.results import Report, Result
from llamacancel.conformance.runner import run_suite
from llamacancel.conformance.settings import Settings

from . import virtual
from .fakes import Server

PREFILL = 0.7  # seconds of a long prompt's prefill


def report_of(
    kind: type[Server],
    only: Sequence[str] | None = None,
    *,
    said: list[str] | None = None,
    known: bool = False,
    **changes: Any,
) -> Report:
    """Run scenarios against a server of a kind; if it is `known` to be as fast as others, without measuring again."""

    profile = _measured(kind.n_slots, changes.get("prefill", PREFILL)) if known else None

    async def go() -> Report:
        async with kind().serving() as target:
            settings = Settings(target, **{"prefill": PREFILL, "rounds": 20, **changes})
            fitted = profile and replace(profile, api=replace(profile.api, target=target))
            return await run_suite(settings, only=only, say=(said if said is not None else []).append, profile=fitted)

    return virtual.run(go())


@functools.cache
def _measured(n_slots: int, prefill: float) -> Profile:
    """What a right server with that many slots is like."""

    class Right(Server):
        """A right server."""

    Right.n_slots = n_slots

    async def go() -> Profile:
        async with Right().serving() as target:
            return await measure(Settings(target, prefill=prefill), lambda line: None)

    return virtual.run(go())


def result_of(kind: type[Server], name: str, **changes: Any) -> Result:
    """Run one scenario against a server of a kind."""
    (result,) = report_of(kind, [name], **changes).results
    return result
