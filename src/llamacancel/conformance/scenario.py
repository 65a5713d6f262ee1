"""What a scenario is: a function whose docstring is the claim that it checks."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from .bench import Bench

__all__ = ["Scenario", "scenario"]

Run = Callable[[Bench], Awaitable[dict[str, Any]]]


@dataclass(frozen=True)
class Scenario:
    """A claim about a server, and how it is checked.

    Args:
        name: How the command line and reports call it.
        claim: What is true of a server that passes.
        run: Checks it and returns figures; raises Broken, Unjudged or Missed.
    """

    name: str
    claim: str
    run: Run


def scenario(name: str) -> Callable[[Run], Scenario]:
    """Make a scenario of a function; the first paragraph of its docstring is the claim."""

    def make(run: Run) -> Scenario:
        claim = " ".join((inspect.getdoc(run) or "").partition("\n\n")[0].split())
        if not claim:
            raise ValueError(f"{name} has no docstring that says its claim")
        return Scenario(name, claim, run)

    return make
