"""Some thousand cancels over several threads, contexts and architectures; every survivor's logits are looked at."""

from __future__ import annotations

import os
import queue
import random
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE

from .words import batch, holds, same_bits, threads, tokens, woven

CANCELS = int(os.environ.get("LLAMACANCEL_STRESS", "4000"))
SECONDS = 80.0  # then it must be through
N_SEQ = 3
PAST, STEP = 12, 40


class Canceller:
    """A thread that cancels tokens at the moments it is told."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[tuple[float, lc.CancelToken] | None] = queue.SimpleQueue()
        self.done = 0

    def run(self) -> None:
        while (job := self.jobs.get()) is not None:
            at, token = job
            while (left := at - time.perf_counter()) > 0:
                if left > 0.0005:
                    time.sleep(left / 2)
            token.cancel("stress")
            self.done += 1


class Worker:
    """A thread with a context of its own, which decodes the same few batches again and again."""

    def __init__(self, arch: str, context: lc.Context, cancellers: list[Canceller], root: lc.CancelToken, seed: int,
                 goal: int) -> None:
        self.arch, self.context, self.cancellers, self.root = arch, context, cancellers, root
        self.rng = random.Random(seed)
        self.goal = goal
        self.cancels = self.survivals = self.redone = 0
        parts = [(tokens(STEP, 10 + seq), PAST, seq) for seq in range(N_SEQ)]
        self.batches = [batch(parts[0], logits="last"), batch(parts[1], parts[2], logits="last"), woven(*parts[:2]),
                        batch(*parts)]
        self.expected: list[np.ndarray] = []
        for rows in self.batches:
            self.fresh()
            started = time.perf_counter()
            context.decode(rows)
            self.expected.append(self.outputs(rows))
            self.duration = time.perf_counter() - started
        self.fresh()
        self.at_first = holds(context)

    def fresh(self) -> None:
        self.context.memory.clear()
        self.context.decode(batch(*((tokens(PAST, seq), 0, seq) for seq in range(N_SEQ)), logits="none"))

    def outputs(self, rows: lc.Batch) -> np.ndarray:
        wanted = np.flatnonzero(rows.logits)
        return np.stack([self.context.logits(int(row)) for row in wanted[:: max(1, len(wanted) // 4)]])

    def token(self) -> tuple[lc.CancelToken, lc.CancelToken]:
        """A token for a call, and the one to cancel: itself, an ancestor, or one of several."""
        kind = self.rng.randrange(5)
        top = self.root.child()
        if kind == 0:
            return top, top
        if kind == 1:
            return top.child().child(), top
        if kind == 2:
            return lc.CancelToken.any_of(lc.CancelToken(), top), top
        if kind == 3:
            return top.child(timeout=1000), top
        return lc.CancelToken.any_of(top.child(), lc.CancelToken(timeout=1000)).child(), top

    def run(self) -> None:
        rng, context = self.rng, self.context
        end = time.monotonic() + SECONDS
        bystander = self.root.child()
        while self.cancels < self.goal and time.monotonic() < end:
            which = rng.randrange(len(self.batches))
            rows = self.batches[which]
            token, top = self.token()
            after = rng.choice([0.0, rng.uniform(0, 0.5 * self.duration), rng.uniform(0, 1.2 * self.duration)])
            if after == 0.0:
                top.cancel("at once")
            elif rng.random() < 0.4:
                token = token.child(timeout=after)
            else:
                rng.choice(self.cancellers).jobs.put((time.perf_counter() + after, top))
            try:
                context.decode(rows, token)
            except lc.DecodeCancelled:
                self.cancels += 1
                assert holds(context) == self.at_first, self.arch
                if rng.random() < 0.15:
                    context.decode(rows, bystander)
                    assert same_bits(self.outputs(rows), self.expected[which]), f"{self.arch}: redone, other bits"
                    self.redone += 1
                    self.fresh()
            else:
                self.survivals += 1
                assert same_bits(self.outputs(rows), self.expected[which]), f"{self.arch}: a survivor has other bits"
                self.fresh()
        assert not bystander.cancelled
        assert context.dirty_sequences == []


@pytest.mark.slow
def test_thousands_of_cancels_leave_histories_and_survivors_their_bits(model_of: Callable[[str], lc.Model]) -> None:
    root = lc.CancelToken()
    cancellers = [Canceller(), Canceller()]
    contexts = [model_of(arch).context(n_ctx=256, n_ubatch=8 if i % 2 else 16, n_seq_max=N_SEQ, n_threads=1)
                for i, arch in enumerate(GENERATIVE)]
    workers = [Worker(arch, context, cancellers, root, i, CANCELS // len(GENERATIVE) + 1)
               for i, (arch, context) in enumerate(zip(GENERATIVE, contexts, strict=True))]

    def work() -> None:
        with threads(*(worker.run for worker in workers)):
            pass

    try:
        with threads(*(canceller.run for canceller in cancellers)):
            try:
                work()
            finally:
                for canceller in cancellers:
                    canceller.jobs.put(None)
    finally:
        for context in contexts:
            context.close()
    assert not root.cancelled
    assert sum(worker.cancels for worker in workers) >= CANCELS
    assert all(worker.survivals and worker.redone for worker in workers)


@pytest.mark.slow
@pytest.mark.parametrize("arch", GENERATIVE)
def test_clients_that_share_a_context_and_hang_up_at_random_do_not_disturb_each_other(
    arch: str, model_of: Callable[[str], lc.Model]
) -> None:
    """Six threads, a sequence each, one context: they wait for their turn under their tokens."""
    n, rounds, clients = 24, 40, 6
    model = model_of(arch)
    made = {"n_ctx": 512, "n_ubatch": 8, "n_seq_max": clients, "n_threads": 1}
    ids = [tokens(n, seq) for seq in range(clients)]
    with model.context(**made) as context, model.context(**made) as twin:
        hangs = [0] * clients
        lock = threading.Lock()
        held: dict[int, list[np.ndarray]] = {seq: [] for seq in range(clients)}

        def client(seq: int) -> None:
            rng = random.Random(seq)
            for _ in range(rounds):
                token = lc.CancelToken(timeout=rng.uniform(0, 0.02) if rng.random() < 0.6 else 1000)
                try:
                    context.decode(batch((ids[seq], 0, seq), logits="none"), token)
                except lc.DeadlineExceeded:
                    hangs[seq] += 1
                    continue
                with lock:
                    while True:
                        try:
                            assert context.memory.pos_max(seq) == n - 1
                            context.memory.remove(seq)
                            break
                        except lc.ContextBusyError:
                            time.sleep(0.0002)
                held[seq].append(np.zeros(0))

        with threads(*(lambda seq=seq: client(seq) for seq in range(clients))):
            pass
        assert all(hangs)
        assert all(held.values())
        assert all(first == -1 for first, _ in holds(context).values()), "somebody's rows stayed"
        context.memory.clear()
        rows = batch(*((ids[seq], 0, seq) for seq in range(clients)), logits="last")
        context.decode(rows)
        twin.decode(rows)
        for seq in range(clients):
            assert same_bits(context.logits(n * seq + n - 1), twin.logits(n * seq + n - 1))


def test_a_tree_of_tokens_is_cancelled_from_many_threads_at_once() -> None:
    for turn in range(30):
        root = lc.CancelToken()
        level, everything = [root], [root]
        for _ in range(6):
            level = [token.child() for token in level for _ in range(2)]
            everything += level
        first: list[str] = []

        def cancel(name: int, root: lc.CancelToken = root, first: list[str] = first, seed: int = turn) -> None:
            if root.cancel(f"thread {name} in turn {seed}"):
                first.append(f"thread {name} in turn {seed}")

        with threads(*(lambda name=name: cancel(name) for name in range(6))):
            pass
        assert len(first) == 1
        assert {token.reason for token in everything} == {first[0]}
