"""How long llama.cpp takes for a ubatch: measured once, and looked up from then on."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import llamacancel as lc

__all__ = ["SMALL", "Costs", "measured"]

ROWS = (1, 2, 8, 16, 32, 48, 63, 64, 65, 96, 127, 128, 129, 256, 512)
DEPTHS = (0, 1024, 2048, 3584)


@dataclass(frozen=True)
class Costs:
    """Seconds of a ubatch.

    Attributes:
        rows: Numbers of rows of one sequence that were measured.
        depths: Positions of the first of them.
        table: Seconds, of shape (depths, rows).
        single: What a further single row of another sequence adds.
        step: What a step costs beside its ubatches.
    """

    rows: tuple[int, ...]
    depths: tuple[int, ...]
    table: NDArray[np.float64]
    single: float
    step: float = 0.0005

    def prompt(self, depth: int, count: int) -> float:
        """Of `count` rows of one sequence, the first of them at `depth`."""
        by_depth = [float(np.interp(count, self.rows, line)) for line in self.table]
        return float(np.interp(depth, self.depths, by_depth))

    def singles(self, depths: list[int]) -> float:
        """Of a row each of several sequences."""
        alone = [self.prompt(depth, 1) for depth in depths]
        base = self.prompt(0, 1)
        return base + sum(each - base for each in alone) + self.single * (len(depths) - 1)


SMALL = Costs(
    ROWS,
    DEPTHS,
    np.array(
        [
            [7.8, 10.0, 15.0, 24.6, 37.1, 55.0, 69.6, 64.6, 68.9, 97.4, 129.9, 128.1, 143.5, 250.8, 539.1],
            [13.8, 18.3, 52.5, 82.3, 179.7, 254.7, 348.0, 135.0, 191.6, 220.8, 269.9, 268.5, 309.3, 400.6, 1025.7],
            [16.1, 25.3, 76.9, 140.6, 289.0, 382.1, 566.0, 147.8, 249.7, 301.9, 312.1, 286.1, 392.9, 657.4, 1500.2],
            [30.3, 42.2, 128.9, 223.2, 432.3, 841.7, 1123.0, 285.1, 321.8, 396.6, 463.4, 396.8, 600.1, 1096.5, 2550.4],
        ]
    )
    / 1e3,
    0.002,
)
"""The small llama of `make_model` on one core of an Intel Xeon, 2026-11-28, in CPU time: the best of three."""


def measured(model: lc.Model) -> Costs:
    """The same of a model here, on one thread."""
    depths = [depth for depth in DEPTHS if depth + ROWS[-1] <= model.n_ctx_train]
    with model.context(n_ctx=4 * (DEPTHS[-1] + ROWS[-1]), n_seq_max=4, n_threads=1, kv_unified=False) as context:
        batch = lc.Batch(ROWS[-1])

        def seconds(depth: int, count: int) -> float:
            context.memory.remove(0, depth)
            batch.clear()
            batch.add_sequence(np.arange(300, 300 + count), depth, 0, "last")
            began = time.process_time()
            context.decode(batch)
            return time.process_time() - began

        table = []
        for depth in depths:
            for at in range(0, depth, ROWS[-1]):
                seconds(at, min(ROWS[-1], depth - at))
            table.append([min(seconds(depth, count) for _ in range(3)) for count in ROWS])
        spent = []
        for n in (1, 4):
            context.memory.clear()
            batch.clear()
            for seq in range(n):
                batch.add(300, 0, seq, True)
            began = time.process_time()
            context.decode(batch)
            spent.append(time.process_time() - began)
    return Costs(ROWS, tuple(depths), np.array(table), max(spent[1] - spent[0], 0.0) / 3)
