"""What the tests' models compute on, and so how they are stopped: the CPU, which looks at the token inside its kernels.

Two variables of the environment put the same tests on something else:

LLAMACANCEL_TEST_GPU_LAYERS=99
    so many layers of every model go to the devices that the build has, as with `Model.load(n_gpu_layers=99)`.
LLAMACANCEL_TEST_PIECES=100
    every context is handed its graphs in so many pieces, and looks at the token between them only. Models as small as
    the tests' would be handed over as a whole; 100 pieces leave a middle to be cancelled in. Without GPU layers the CPU
    stands in for a device. With GPU layers 100 is what holds unless this says otherwise.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

import llamacancel as lc

__all__ = ["CONTEXT", "GPU_LAYERS", "N_PIECES", "counts_looks_of_the_cpu", "holds_on_the_cpu", "load"]

GPU_LAYERS = int(os.environ.get("LLAMACANCEL_TEST_GPU_LAYERS", "0"))
N_PIECES = int(os.environ.get("LLAMACANCEL_TEST_PIECES", "100" if GPU_LAYERS else "0"))

CONTEXT: dict[str, Any] = {"_n_pieces": N_PIECES} if N_PIECES else {}
"""What every context of the tests is made with."""

counts_looks_of_the_cpu = pytest.mark.skipif(
    N_PIECES > 0, reason="it counts looks at the token that only a CPU takes, inside its kernels"
)

holds_on_the_cpu = pytest.mark.skipif(
    GPU_LAYERS != 0, reason="a device may compute neighbouring nodes by one kernel if they are in one piece"
)


def load(path: Any, **params: Any) -> lc.Model:
    """`Model.load()` onto the device that the tests run on."""
    return lc.Model.load(path, **{"n_gpu_layers": GPU_LAYERS, **params})
