"""What the laws have in common: a context and its twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import llamacancel as lc

from .words import NewContext

Pair = Callable[..., tuple[lc.Context, lc.Context]]


@pytest.fixture
def pair(new_context: NewContext) -> Pair:
    """Makes a context in pieces of 8 rows, and its twin that will see no cancel."""

    def make(arch: str, **params: Any) -> tuple[lc.Context, lc.Context]:
        settings = {"n_ubatch": 8, "n_seq_max": 3, **params}
        return new_context(arch, **settings), new_context(arch, **settings)

    return make
