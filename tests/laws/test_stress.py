"""Thousands of cancels from other threads, and after them every result is what it is without any."""

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
from tests.conftest import GENERATIVE, batch_of, prompt
from tests.device import CONTEXT

from .words import NewContext, batch, holds, same_bits, threads, tokens, woven

CANCELS = 10_000 * int(os.environ.get("LLAMACANCEL_STRESS", "1"))
SPARED = 8  # each such call is one that nobody cancels


# ---- the same few prompts --------------------------------------------------------------------------------------


class Prompts:
    """A context that decodes the same few prompts over and over, under tokens that others cancel."""

    def __init__(self, arch: str, context: lc.Context, prompts: list[np.ndarray], seed: int) -> None:
        self.arch = arch
        self.context = context
        self.batches = [batch_of(each) for each in prompts]
        self.random = random.Random(seed)
        self.token: lc.CancelToken | None = None
        self.calls = self.cancelled = self.survived = 0
        self.wrong: list[str] = []
        self.expected: list[np.ndarray] = []
        start = time.perf_counter()
        for rows in self.batches:
            context.decode(rows)
            self.expected.append(context.logits())
            context.memory.remove(0)
        self.seconds = (time.perf_counter() - start) / len(self.batches)  # of one decode

    def decode_once(self, root: lc.CancelToken) -> None:
        which = self.random.randrange(len(self.batches))
        token = root.child(timeout=self.random.choice([None, None, self.random.uniform(0, self.seconds)]))
        self.calls += 1
        if self.calls % SPARED == 0:
            token = root.child()
        else:
            self.token = token
        try:
            self.context.decode(self.batches[which], token)
        except lc.DecodeCancelled as error:
            self.cancelled += 1
            if error.sequences[0].state != "rolled_back" or self.context.memory.pos_max(0) != -1:
                self.wrong.append(f"{self.arch}: left {error.sequences} {self.context.memory.pos_max(0)}")
        else:
            self.survived += 1
            if not np.array_equal(self.context.logits(), self.expected[which]):
                self.wrong.append(f"{self.arch}: wrong bits")
            self.context.memory.remove(0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_cancels_leave_every_survivor_its_bits(
    model_of: Callable[[str], lc.Model], new_context: NewContext
) -> None:
    root = lc.CancelToken()
    workers = []
    for number, arch in enumerate([*GENERATIVE, "llama", "mamba"]):
        prompts = [prompt(model_of(arch), 48, seed) for seed in range(4)]
        workers.append(Prompts(arch, new_context(arch, n_ctx=256, n_ubatch=8), prompts, seed=number))

    def work(worker: Prompts) -> None:
        # Not before it has had some of both, however the threads are scheduled.
        while sum(each.cancelled for each in workers) < CANCELS or not (worker.cancelled and worker.survived):
            worker.decode_once(root)

    def cancel(seed: int) -> None:
        chance = random.Random(seed)
        while not done.wait(chance.uniform(0, 0.0005)):
            token = chance.choice(workers).token
            if token is not None:
                token.cancel("stress")

    done = threading.Event()
    with threads(*(lambda seed=seed: cancel(seed) for seed in range(2))):
        try:
            with threads(*(lambda worker=worker: work(worker) for worker in workers), most_seconds=1500):
                pass
        finally:
            done.set()
    assert [each for worker in workers for each in worker.wrong] == []
    assert not root.cancelled
    for worker in workers:
        worker.context.decode(worker.batches[0])
        assert np.array_equal(worker.context.logits(), worker.expected[0])


# ---- histories and shared batches ------------------------------------------------------------------------------

N_SEQ = 3
PAST, STEP = 12, 40


class Canceller:
    """A thread that cancels tokens at the moments it is told."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[tuple[float, lc.CancelToken] | None] = queue.SimpleQueue()

    def run(self) -> None:
        while (job := self.jobs.get()) is not None:
            at, token = job
            while (left := at - time.perf_counter()) > 0:
                if left > 0.0005:
                    time.sleep(left / 2)
            token.cancel("stress")


class Histories:
    """A context with a past, in which a thread decodes the same few batches again and again."""

    def __init__(
        self, arch: str, context: lc.Context, cancellers: list[Canceller], root: lc.CancelToken, seed: int, goal: int
    ) -> None:
        self.arch, self.context, self.cancellers, self.root = arch, context, cancellers, root
        self.random = random.Random(seed)
        self.goal = goal
        self.cancels = self.survivals = self.redone = 0
        parts = [(tokens(STEP, 10 + seq), PAST, seq) for seq in range(N_SEQ)]
        self.batches = [
            batch(parts[0], logits="last"),
            batch(parts[1], parts[2], logits="last"),
            woven(*parts[:2]),
            batch(*parts),
        ]
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
        top = self.root.child()
        return self.random.choice([
            lambda: (top, top),
            lambda: (top.child().child(), top),
            lambda: (lc.CancelToken.any_of(lc.CancelToken(), top), top),
            lambda: (top.child(timeout=1000), top),
            lambda: (lc.CancelToken.any_of(top.child(), lc.CancelToken(timeout=1000)).child(), top),
        ])()  # fmt: skip

    def run(self) -> None:
        bystander = self.root.child()
        calls = 0
        while self.cancels < self.goal or not self.survivals:
            calls += 1
            which = self.random.randrange(len(self.batches))
            rows = self.batches[which]
            token = bystander if calls % SPARED == 0 else self.doomed()
            try:
                self.context.decode(rows, token)
            except lc.DecodeCancelled:
                self.cancels += 1
                assert holds(self.context) == self.at_first, self.arch
                if self.cancels % 8 == 0:
                    self.context.decode(rows, bystander)
                    assert same_bits(self.outputs(rows), self.expected[which]), f"{self.arch}: redone, other bits"
                    self.redone += 1
                    self.fresh()
            else:
                self.survivals += 1
                assert same_bits(self.outputs(rows), self.expected[which]), f"{self.arch}: a survivor has other bits"
                self.fresh()
        assert not bystander.cancelled
        assert self.context.dirty_sequences == []

    def doomed(self) -> lc.CancelToken:
        """A token that is cancelled already, or will be at a random moment, from wherever cancels come."""
        chance = self.random
        token, top = self.token()
        after = chance.choice([0.0, chance.uniform(0, 0.5 * self.duration), chance.uniform(0, 1.2 * self.duration)])
        if after == 0.0:
            top.cancel("at once")
        elif chance.random() < 0.4:
            token = token.child(timeout=after)
        else:
            chance.choice(self.cancellers).jobs.put((time.perf_counter() + after, top))
        return token


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_cancels_of_all_kinds_leave_histories_and_survivors_their_bits(new_context: NewContext) -> None:
    root, cancellers = lc.CancelToken(), [Canceller(), Canceller()]
    workers = [
        Histories(arch, new_context(arch, n_ctx=256, n_ubatch=8 if i % 2 else 16, n_seq_max=N_SEQ), cancellers, root, i,
                  CANCELS // 40)
        for i, arch in enumerate(GENERATIVE)
    ]  # fmt: skip
    with threads(*(canceller.run for canceller in cancellers)):
        try:
            with threads(*(worker.run for worker in workers), most_seconds=1500):
                pass
        finally:
            for canceller in cancellers:
                canceller.jobs.put(None)
    assert not root.cancelled
    assert all(worker.survivals and worker.redone for worker in workers)


# ---- one context for all ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "mamba", "hybrid"])
def test_clients_that_share_a_context_and_hang_up_at_random_do_not_disturb_each_other(
    arch: str, model_of: Callable[[str], lc.Model]
) -> None:
    """Six threads, a sequence each, one context: they wait for their turn under their tokens."""
    n, rounds, clients = 24, 20, 6
    made = {"n_ctx": 512, "n_ubatch": 8, "n_seq_max": clients, "n_threads": 1, **CONTEXT}
    ids = [tokens(n, seq) for seq in range(clients)]
    with model_of(arch).context(**made) as context, model_of(arch).context(**made) as twin:
        hangs, served = [0] * clients, [0] * clients

        def client(seq: int) -> None:
            chance = random.Random(seq)
            for turn in range(rounds):
                timeout = 1000 if turn == rounds - 1 or chance.random() < 0.4 else chance.uniform(0, 0.02)
                token = lc.CancelToken(timeout=0 if turn == 0 else timeout)
                try:
                    context.decode(batch((ids[seq], 0, seq), logits="none"), token)
                except lc.DeadlineExceeded:
                    hangs[seq] += 1
                    continue
                served[seq] += 1
                while True:
                    try:
                        assert context.memory.pos_max(seq) == n - 1
                        context.memory.remove(seq)
                        break
                    except lc.ContextBusyError:
                        time.sleep(0.0002)

        with threads(*(lambda seq=seq: client(seq) for seq in range(clients))):
            pass
        assert all(hangs)
        assert all(served)
        assert all(first == -1 for first, _ in holds(context).values()), "somebody's rows stayed"
        context.memory.clear()
        rows = batch(*((ids[seq], 0, seq) for seq in range(clients)), logits="last")
        for each in (context, twin):
            each.decode(rows)
        for seq in range(clients):
            assert same_bits(context.logits(n * seq + n - 1), twin.logits(n * seq + n - 1))


def test_a_tree_of_tokens_is_cancelled_from_many_threads_at_once() -> None:
    for turn in range(20):
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
