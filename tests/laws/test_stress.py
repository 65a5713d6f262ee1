"""Ten thousand cancels from other threads, and after them every result is what it is without any."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE, batch_of, prompt

CANCELS = 10_000
ROWS = 48
PROMPTS = 4


class Worker:
    """A context that decodes the same few prompts over and over, under tokens that others cancel."""

    def __init__(self, arch: str, context: lc.Context, tokens: list[np.ndarray], seed: int) -> None:
        self.arch = arch
        self.context = context
        self.batches = [batch_of(each) for each in tokens]
        self.random = random.Random(seed)
        self.token: lc.CancelToken | None = None
        self.cancelled = self.survived = 0
        self.wrong: list[str] = []
        self.expected: list[np.ndarray] = []
        start = time.perf_counter()
        for batch in self.batches:
            context.decode(batch)
            self.expected.append(context.logits())
            context.memory.remove(0)
        self.seconds = (time.perf_counter() - start) / len(self.batches)  # of one decode

    def decode_once(self, root: lc.CancelToken) -> None:
        which = self.random.randrange(PROMPTS)
        self.token = root.child(timeout=self.random.choice([None, None, self.random.uniform(0, self.seconds)]))
        try:
            self.context.decode(self.batches[which], self.token)
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
def test_ten_thousand_cancels_leave_every_survivor_its_bits(
    model_of: Callable[[str], lc.Model], new_context: Callable[..., lc.Context]
) -> None:
    root = lc.CancelToken()
    workers = []
    for number, arch in enumerate([*GENERATIVE, "llama", "mamba"]):
        context = new_context(arch, n_ctx=256, n_ubatch=8)
        tokens = [prompt(model_of(arch), ROWS, seed) for seed in range(PROMPTS)]
        workers.append(Worker(arch, context, tokens, seed=number))
    total = threading.Semaphore(0)
    done = threading.Event()

    def work(worker: Worker) -> None:
        while not done.is_set():
            worker.decode_once(root)
            total.release()

    def cancel(seed: int) -> None:
        chance = random.Random(seed)
        while not done.is_set():
            time.sleep(chance.uniform(0, 0.0005))
            token = chance.choice(workers).token
            if token is not None:
                token.cancel("stress")

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    threads += [threading.Thread(target=cancel, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 200
    while sum(worker.cancelled for worker in workers) < CANCELS and time.monotonic() < end:
        time.sleep(0.05)
    done.set()
    for thread in threads:
        thread.join()

    assert [each for worker in workers for each in worker.wrong] == []
    assert sum(worker.cancelled for worker in workers) >= CANCELS
    for worker in workers:
        assert worker.cancelled > 0
        assert worker.survived > 0, f"{worker.arch}: nothing survived, so nothing was compared"
        worker.context.decode(worker.batches[0])
        assert np.array_equal(worker.context.logits(), worker.expected[0])
