"""What the user asked for."""

from __future__ import annotations

from dataclasses import dataclass

from .wire import Target

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """How the suite goes about it.

    Args:
        target: The server.
        model: Name to ask for; None for the first that the server lists.
        slots: How many requests the server works on at once; None to find out.
        endpoint: "completions", "chat" or "auto".
        key: Bearer token.
        prefill: How long the prefill of a long prompt should take, in seconds.
        rounds: Rounds of random hang-ups.
        seed: Of everything random.
        patience: How many times as long as expected something may take before it counts as hanging.
        grace: Seconds that are added to that.
        tries: How often a situation is set up, with longer work each time, before it counts as not reached.
    """

    target: Target
    model: str | None = None
    slots: int | None = None
    endpoint: str = "auto"
    key: str | None = None
    prefill: float = 3.0
    rounds: int = 100
    seed: int = 1
    patience: float = 6.0
    grace: float = 20.0
    tries: int = 3

    @property
    def longest(self) -> float:
        """How long anything may take while the server's speed is not known yet, in seconds."""
        return 100 * self.prefill + self.grace
