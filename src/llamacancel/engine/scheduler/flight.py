"""What is being computed, as those see it who may have it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import policy
from .plan import Plan
from .policy import Limits, Pace
from .prefix import MemoryRules

__all__ = ["Flight"]


@dataclass(frozen=True, slots=True)
class Flight:
    """What was known when the step began. Nothing here changes any more, so that any thread may ask.

    Attributes:
        plan: What is computed; nobody changes it from now on.
        pace: How long rows took until then.
    """

    plan: Plan
    pace: Pace
    limits: Limits
    rules: MemoryRules

    def parts(self, gone: Sequence[bool]) -> list[policy.Part]:
        """The parts that are computed at a time, where `gone` says which of the plan's requests were cancelled."""
        plan = self.plan
        if plan.rows:
            rows = [(rows.start, rows.count, is_gone) for rows, is_gone in zip(plan.rows, gone, strict=True)]
            return policy.parts_of(self.pace, self.limits.n_ubatch, rows, self.rules.by_sequence)
        seconds = [request.n_prompt * self.pace.row_at(request.n_prompt / 2) for request in plan.texts]
        saved = sum(each for each, is_gone in zip(seconds, gone, strict=True) if is_gone)
        return [policy.Part(sum(seconds), saved)]

    def stops_inside(self, gone: Sequence[bool], now: float) -> bool:
        """Whether the step is to be stopped in the middle of a ubatch, now that some of its requests were cancelled:
        for the others to be run again. It stops after this ubatch in any case, unless it is to be whole, or embeds
        texts. One that nobody wants any more stops by itself.
        """
        if self.plan.whole or all(gone) or not any(gone):
            return False
        return policy.stops_inside(self.pace, self.parts(gone), now - self.plan.began)
