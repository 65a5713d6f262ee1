"""What is checked: a device that is no CPU, or the CPU standing in for one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import llamacancel as lc

__all__ = ["STAND_IN_PIECES", "NoDeviceError", "Target", "find"]

STAND_IN_PIECES = 20
BIG_ENOUGH = 14 << 30  # bytes of memory for the 8 B shape, its cache and what it computes with


class NoDeviceError(Exception):
    """There is no device to check; says which backends and devices there are."""


@dataclass(frozen=True)
class Target:
    """The device and how much is asked of it.

    Attributes:
        name: llama.cpp's name of the device, "CUDA0", or "CPU" where it stands in.
        description: The card.
        index: Its place among the devices that layers can go to; None where the CPU stands in.
        size: Size of the model that is measured.
        quick: Tiny models, few samples: shows that everything runs, measures nothing.
        threads: Threads of every context.
        seed: Seed of prompts, orders and moments.
    """

    name: str
    description: str
    index: int | None
    size: str
    quick: bool
    threads: int
    seed: int

    @property
    def forced(self) -> bool:
        """Whether the CPU stands in for a device."""
        return self.index is None

    def load(self, n_gpu_layers: int = -1) -> dict[str, Any]:
        """Parameters of `Model.load()` that bring so many layers to the device; -1: all."""
        if self.index is None:
            return {}
        return {"n_gpu_layers": n_gpu_layers, "split_mode": "none", "main_gpu": self.index}

    def context(self, **params: Any) -> dict[str, Any]:
        """Parameters of a context; a CPU that stands in is handed its graphs in pieces."""
        return {**params, "_n_pieces": STAND_IN_PIECES} if self.forced else params

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return {**asdict(self), "forced": self.forced}


def find(name: str | None, *, forced: bool, size: str | None, quick: bool, threads: int, seed: int) -> Target:
    """The device of that name, or the first that is no CPU.

    Args:
        name: llama.cpp's name of a device (`llamacancel info` lists them); None for the first.
        forced: Let the CPU stand in for a device.
        size: Size of the model; None for the 8 B shape if the device's memory holds it, else the 1 B shape.
        quick, threads, seed: As in `Target`.

    Raises:
        NoDeviceError: There is none, or none of that name.
    """
    info = lc.build_info()
    if forced:
        cpu = next(device for device in info["devices"] if device["kind"] == "cpu")
        size = "tiny" if quick else size or "small"
        return Target("CPU", f"{cpu['description']} standing in for a device", None, size, quick, threads, seed)
    # llama.cpp counts them so: integrated ones only where there is no other.
    devices = [device for device in info["devices"] if device["kind"] == "gpu"]
    devices = devices or [device for device in info["devices"] if device["kind"] == "igpu"]
    chosen = [(i, device) for i, device in enumerate(devices) if name in (None, device["name"])]
    if not chosen:
        there = ", ".join(device["name"] for device in info["devices"])
        wanted = "is a GPU" if name is None else f"that layers can go to is called {name!r}"
        raise NoDeviceError(f"no device {wanted}: this build has the backends {', '.join(info['backends'])}, "
                            f"and llama.cpp sees {there}. `--forced` lets the CPU stand in.")  # fmt: skip
    index, device = chosen[0]
    size = "tiny" if quick else size or ("8b" if device["memory"] >= BIG_ENOUGH else "1b")
    return Target(device["name"], device["description"], index, size, quick, threads, seed)
