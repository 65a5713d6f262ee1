"""All scenarios, in the order in which they are run."""

from __future__ import annotations

from ..scenario import Scenario
from . import active, burst, by_id, connection, deadline, freed, queued, retry, rounds

__all__ = ["SCENARIOS"]

SCENARIOS: dict[str, Scenario] = {
    found.name: found
    for module in (queued, active, burst, retry, freed, deadline, connection, by_id, rounds)
    for found in vars(module).values()
    if isinstance(found, Scenario)
}
