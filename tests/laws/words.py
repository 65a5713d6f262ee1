"""What the laws are told in: batches, what a context holds, bits, threads and programs."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import llamacancel as lc

from .clock import FAR, GENEROUS, Clock, deadline_at

ROOT = Path(__file__).parents[2]

NewContext = Callable[..., lc.Context]
ModelPath = Callable[[str], Path]
Pair = Callable[..., tuple[lc.Context, lc.Context]]
Readings = Callable[..., int]
Part = tuple[Any, int, Any]
"""Tokens, the position of the first one, and the sequence (or sequences that share them)."""


def tokens(n: int, seed: int = 0) -> np.ndarray:
    """`n` token ids that every test model's vocabulary has; another `seed` gives others."""
    return np.random.default_rng(seed).integers(300, 30000, n).astype(np.int32)


def batch(*parts: Part, logits: str = "all") -> lc.Batch:
    """A batch of parts, one after the other."""
    result = lc.Batch(max(sum(len(part[0]) for part in parts), 1), n_seq_max=8)
    for ids, pos, seq in parts:
        result.add_sequence(ids, pos=pos, seq_id=seq, logits=logits)
    return result


def woven(*parts: Part) -> lc.Batch:
    """A batch whose rows take turns: one of each part, and again."""
    result = lc.Batch(sum(len(part[0]) for part in parts), n_seq_max=8)
    for i in range(max(len(part[0]) for part in parts)):
        for ids, pos, seq in parts:
            if i < len(ids):
                result.add(ids[i], pos + i, seq, True)
    return result


def outputs(context: lc.Context, rows: lc.Batch) -> np.ndarray:
    """The logits of all rows that have some."""
    return np.stack([context.logits(int(i)) for i in np.flatnonzero(rows.logits)])


def decode(context: lc.Context, rows: lc.Batch, token: Any = None, **params: Any) -> np.ndarray:
    """Decodes, and gives all logits."""
    context.decode(rows, token, **params)
    return outputs(context, rows)


def holds(context: lc.Context) -> dict[int, tuple[int, int]]:
    """First and last position that the context holds of each sequence."""
    memory = context.memory
    return {seq: (memory.pos_min(seq), memory.pos_max(seq)) for seq in range(context.n_seq_max)}


def one_more(context: lc.Context, token: int = 321) -> np.ndarray:
    """Decodes one more token of every sequence that the context holds; their logits, which tell of all it holds."""
    ends = {seq: last + 1 for seq, (_, last) in holds(context).items() if last >= 0}
    if not ends:
        return np.zeros((0, 0), np.float32)
    return decode(context, batch(*(([token], end, seq) for seq, end in ends.items())))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of floats are the same, bit for bit."""
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether logits agree up to rounding: the same content in other cells, or cut in another way.

    Rounding moves a row's logits by 0.03 at most in the mean, one wrong token by more than 1. The middle row decides,
    since in a mixture of experts rounding may send a row to another expert.
    """
    if a.shape != b.shape or not a.size:
        return a.shape == b.shape
    off = np.sqrt(np.mean((a - b) ** 2, axis=-1))
    return bool(np.median(off) < 0.1 and np.mean(off) < 0.5)


def cancelled(context: lc.Context, rows: lc.Batch, token: Any, **params: Any) -> lc.DecodeCancelled | None:
    """Decodes; the exception if it was cancelled, None if it ran to its end."""
    try:
        context.decode(rows, token, **params)
    except lc.DecodeCancelled as error:
        return error
    return None


def cancelled_at(context: lc.Context, rows: lc.Batch, reading: int, **params: Any) -> lc.DecodeCancelled:
    """Decodes, and cancels at that reading of the clock by a deadline."""
    token = far()
    with deadline_at(max(reading, 1)):
        error = cancelled(context, rows, token, **params)
    assert isinstance(error, lc.DeadlineExceeded), f"not cancelled at reading {reading}"
    return error


def far() -> lc.CancelToken:
    """A token with a deadline that does not come unless the clock jumps; a call under it reads the clock."""
    return lc.CancelToken(timeout=FAR)


def dead() -> lc.CancelToken:
    """A token that was cancelled long ago."""
    token = lc.CancelToken()
    token.cancel("long ago")
    return token


def stale() -> list[lc.CancelToken]:
    """Tokens that are over in every way that there is."""
    return [
        dead(),
        dead().child(),
        lc.CancelToken.any_of(lc.CancelToken(), dead()),
        lc.CancelToken(timeout=0),
        lc.CancelToken(timeout=0).child(timeout=FAR),
    ]


@contextmanager
def threads(*functions: Callable[[], Any], most_seconds: float = GENEROUS) -> Iterator[list[threading.Thread]]:
    """Runs functions in threads of their own until they end; what one of them raised is raised again."""
    errors: list[BaseException] = []

    def guarded(function: Callable[[], Any]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    started = [threading.Thread(target=guarded, args=(function,), daemon=True) for function in functions]
    for thread in started:
        thread.start()
    try:
        yield started
    finally:
        for thread in started:
            thread.join(most_seconds)
    assert not any(thread.is_alive() for thread in started), "a thread hangs"
    if errors:
        raise errors[0]


def run_python(
    source: str, *, timeout: float = 2 * GENEROUS, env: dict[str, str] | None = None, args: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Runs a program in a process of its own; one that hangs is killed and fails the test."""
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-W", "error", "-c", source, *args],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        timeout=timeout,
        capture_output=True,
        text=True,
    )


# ---- the sweeps -------------------------------------------------------------------------------------------------


@functools.cache
def _sweeps_of(arch: str) -> tuple[dict[tuple[str, str], dict[str, Any]], str]:
    ran = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "tests.laws.every_poll", arch],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    told = [json.loads(line) for line in ran.stdout.splitlines()]
    return {(each["kind"], each["name"]): each for each in told}, f"exit code {ran.returncode}: {ran.stderr[-4000:]}"


def swept(arch: str, kind: str, name: str) -> dict[str, Any]:
    """What `every_poll.py` tells of a scenario. It runs once for an architecture."""
    Clock()  # skips the test where there is none
    told, end = _sweeps_of(arch)
    assert (kind, name) in told, f"the sweep did not get there: {end}"
    return told[kind, name]
