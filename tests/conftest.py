"""Models made on the spot, contexts that are closed after each test, and a few words to speak about both."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import llamacancel as lc
from llamacancel.commands.make_model import cached_model

from . import device

# Every kind of memory that there is, by the architecture whose tiny model has it.
GENERATIVE = ["llama", "swa", "mamba", "hybrid", "moe"]

TEXT = "A cancel reaches exactly the work it names, at once, and leaves everything else as if nothing had happened. "

# A process in the background may have been told to ignore Ctrl-C, and those that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def model_path() -> Callable[[str], Path]:
    """The file of a tiny model of an architecture; made once and kept outside of the repository."""
    return lambda arch: cached_model(arch, "tiny")


@pytest.fixture(scope="session")
def model_of(model_path: Callable[[str], Path]) -> Iterator[Callable[[str], lc.Model]]:
    """A loaded tiny model of an architecture, shared by all tests."""
    models: dict[str, lc.Model] = {}

    def load(arch: str) -> lc.Model:
        if arch not in models:
            models[arch] = device.load(model_path(arch))
        return models[arch]

    yield load
    for model in models.values():
        model.close()


@pytest.fixture
def new_context(model_of: Callable[[str], lc.Model]) -> Iterator[Callable[..., lc.Context]]:
    """Makes contexts of an architecture's model: small, one thread, cut into ubatches of 32 rows; closes them."""
    contexts: list[lc.Context] = []

    def make(arch: str, **params: object) -> lc.Context:
        settings: dict[str, object] = {"n_ctx": 1024, "n_ubatch": 32, "n_threads": 1, **device.CONTEXT, **params}
        context = model_of(arch).context(**settings)
        contexts.append(context)
        return context

    yield make
    for context in contexts:
        context.close()


def prompt(model: lc.Model, n: int, seed: int = 0) -> np.ndarray:
    """`n` tokens of real text; another `seed` begins elsewhere in it."""
    words = TEXT.split()
    turned = " ".join(words[seed % len(words) :] + words[: seed % len(words)])
    tokens = model.tokenize(turned, add_special=False)
    return np.resize(tokens, n).astype(np.int32)


def batch_of(tokens: np.ndarray, pos: int = 0, seq_id: int = 0, logits: str = "last") -> lc.Batch:
    """A batch of one sequence."""
    batch = lc.Batch(max(len(tokens), 1))
    batch.add_sequence(tokens, pos=pos, seq_id=seq_id, logits=logits)
    return batch
