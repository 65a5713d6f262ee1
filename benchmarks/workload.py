"""What all measurements share: models made on the spot, prompts, and contexts that go back to a known state."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import llamacancel as lc
from llamacancel.commands.make_model import cached_model

__all__ = ["Models", "Progress", "Settings", "Start", "Step", "batch_of", "prompt", "same_bits", "single_rows"]

Tokens = NDArray[np.int32]


class Models:
    """Loaded models, each loaded once. A context manager that closes them.

    Args:
        load: Parameters of `Model.load()`, such as how many layers go to a GPU.
    """

    def __init__(self, **load: Any) -> None:
        self._load = load
        self._models: dict[tuple[str, str], lc.Model] = {}

    def get(self, arch: str, size: str) -> lc.Model:
        """A model of this architecture and size; its file is made the first time and kept in the cache."""
        if (arch, size) not in self._models:
            self._models[arch, size] = lc.Model.load(cached_model(arch, size), **self._load)
        return self._models[arch, size]

    def __enter__(self) -> Models:
        return self

    def __exit__(self, *exc: object) -> None:
        for model in self._models.values():
            model.close()


@dataclass
class Settings:
    """What the command line asked for.

    Attributes:
        threads: Threads of every context.
        quick: Tiny models and a few samples: shows that everything runs, measures nothing.
        seed: Seed of prompts, orders and moments.
        with_1b: Measure the model of about 1 B parameters too.
        models: The loaded models.
    """

    threads: int
    quick: bool
    seed: int
    with_1b: bool
    models: Models = field(default_factory=Models)

    @property
    def small(self) -> str:
        """Size of the models that stand for "small"."""
        return "tiny" if self.quick else "small"

    def rng(self, *key: object) -> np.random.Generator:
        """A generator of its own for each measurement, so that leaving one out does not change the others."""
        return np.random.default_rng([self.seed, *"/".join(map(str, key)).encode()])


@dataclass(frozen=True)
class Step:
    """One measurement: `run` is given a function that takes the share done, and returns what goes in the report."""

    section: str
    name: str
    expected_seconds: float
    run: Callable[[Callable[[float], None]], dict[str, Any]]


class Progress:
    """Shows on stderr which step of how many runs, for how long, and how long the rest will take.

    The steps' expected times only weigh them against each other; how fast this machine is shows as it goes.
    """

    def __init__(self, steps: list[Step]) -> None:
        self._steps = steps
        self._start = time.perf_counter()
        self._shown = 0.0
        self._live = sys.stderr.isatty()

    def begin(self, index: int) -> Callable[[float], None]:
        """Announce a step; returns the function to be told its share done."""
        self._show(index, 0.0, end="\r" if self._live else "\n")

        def update(share: float) -> None:
            if self._live and time.perf_counter() - self._shown > 0.2:
                self._show(index, share, end="\r")

        return update

    def finish(self) -> None:
        """Say how long all of it took."""
        elapsed = time.perf_counter() - self._start
        clear = "\x1b[2K" if self._live else ""
        print(f"{clear}{len(self._steps)} steps in {_clock(elapsed)}", file=sys.stderr, flush=True)

    def _show(self, index: int, share: float, end: str) -> None:
        elapsed = time.perf_counter() - self._start
        weights = [step.expected_seconds for step in self._steps]
        done = sum(weights[:index]) + weights[index] * share
        rest = sum(weights) - done
        # Until a tenth is done, the expected times are the better guess.
        eta = rest * elapsed / done if done > 0.1 * sum(weights) else rest
        step = self._steps[index]
        text = f"[{index + 1}/{len(self._steps)}] {step.section}: {step.name}"
        times = f"({_clock(elapsed)} so far, about {_clock(eta)} to go)"
        clear = "\x1b[2K" if self._live else ""
        print(f"{clear}{text} {times}", end=end, file=sys.stderr, flush=True)
        self._shown = time.perf_counter()


class Start:
    """A context and the state from which every sample of a measurement starts.

    `reset()` brings the context back there, in the same way each time, so that the same decode done twice
    works on the same cells. A sliding window is filled by decoding: a state that was saved and loaded again
    leaves cells free, and then nothing is overwritten that a rollback would have to save.

    Args:
        context: The context.
        history: Tokens that sequences 0 to `n_seqs` - 1 hold at the start; may be empty.
        n_seqs: Sequences that hold them.
    """

    def __init__(self, context: lc.Context, history: Tokens, n_seqs: int = 1) -> None:
        self.context = context
        self.pos = len(history)
        self.n_seqs = n_seqs
        self._batches = [batch_of(history, seq_id=seq) for seq in range(n_seqs)] if len(history) else []
        self._states: list[bytes] = []
        self.reset()
        if self._batches and "sliding_window" not in context.memory.kind:
            self._states = [context.state.save(seq) for seq in range(n_seqs)]
            self.reset()

    def reset(self) -> None:
        """Bring the context to the starting state."""
        self.context.memory.clear()
        if self._states:
            for seq, state in enumerate(self._states):
                self.context.state.load(seq, state)
        else:
            for batch in self._batches:
                self.context.decode(batch)


def prompt(model: lc.Model, n: int, rng: np.random.Generator) -> Tokens:
    """`n` random tokens."""
    return rng.integers(3, model.n_vocab, n).astype(np.int32)


def batch_of(tokens: Tokens, pos: int = 0, seq_id: int = 0) -> lc.Batch:
    """A batch of consecutive rows of one sequence, with the logits of the last."""
    batch = lc.Batch(len(tokens))
    batch.add_sequence(tokens, pos=pos, seq_id=seq_id)
    return batch


def single_rows(tokens: Tokens, pos: int = 0) -> list[lc.Batch]:
    """A batch for each of consecutive rows, as a generation decodes them."""
    return [batch_of(tokens[i : i + 1], pos + i) for i in range(len(tokens))]


def same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    """True if two arrays of logits are equal to the last bit."""
    return a.shape == b.shape and bool(np.array_equal(a.view(np.uint32), b.view(np.uint32)))


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
