"""Checks what the ten laws promise on a model of your own, and tells what was seen.

    python laws.py model.gguf

Exit status 0: all that was seen is as promised. It takes about a minute with a small model.
"""

import argparse
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np

import llamacancel as lc

TEXT = "A cancel reaches exactly the work it names, at once, and leaves everything else as if nothing had happened. "


class Bench:
    """A model, contexts of it, and a prompt whose prefill takes long enough to be cancelled."""

    def __init__(self, path: str, threads: int | None) -> None:
        self.path, self.threads = path, threads
        self.model = lc.Model.load(path)
        words = self.model.tokenize(TEXT, add_special=False)
        n_ctx = min(self.model.n_ctx_train, 4096)
        self.prompt = np.resize(words, n_ctx - 512)
        with self.context(n_ctx=n_ctx) as ctx:
            ctx.decode(self.rows(16))
            began = time.monotonic()
            ctx.decode(self.rows(128, pos=16))
            speed = 128 / (time.monotonic() - began)
        self.length = int(np.clip(speed, 256, len(self.prompt) - 16))  # about a second of work
        self.history = 64
        self.rng = random.Random(0)

    def context(self, **params: int) -> lc.Context:
        n_ctx = min(self.model.n_ctx_train, 4096)
        return self.model.context(**{"n_ctx": n_ctx, "n_batch": n_ctx, "n_threads": self.threads, **params})

    def rows(self, count: int, pos: int = 0) -> lc.Batch:
        batch = lc.Batch(count)
        batch.add_sequence(self.prompt[pos : pos + count], pos=pos)
        return batch

    def filled(self) -> lc.Context:
        """A context with a history."""
        ctx = self.context()
        ctx.decode(self.rows(self.history))
        return ctx

    def whole(self, ctx: lc.Context, token: lc.CancelToken | None = None, **options: str) -> np.ndarray:
        """The logits after the long prompt, in a context with a history."""
        ctx.decode(self.rows(self.length - self.history, pos=self.history), token, **options)
        return ctx.logits(-1).copy()

    def cancelled(self, work: Callable[[lc.CancelToken], object]) -> lc.DecodeCancelled:
        """What a call raises that another thread cancels in its middle."""
        with self.filled() as ctx:
            began = time.monotonic()
            self.whole(ctx)
            usual = time.monotonic() - began
        for attempt in range(20):
            token = lc.CancelToken()
            moment = self.rng.uniform(0.1, 0.8) * usual / (1 + attempt / 4)
            timer = threading.Timer(moment, token.cancel, ["changed my mind"])
            timer.start()
            try:
                work(token)
            except lc.DecodeCancelled as error:
                return error
            finally:
                timer.join()
        raise AssertionError("the model is too fast: no cancel came before the end of the call")


def check(condition: bool, text: str) -> None:
    if not condition:
        raise AssertionError(text)


def scope(bench: Bench) -> str:
    with bench.filled() as alone:
        right = bench.whole(alone)
    with bench.filled() as mine, bench.filled() as other:
        found: list[np.ndarray] = []
        thread = threading.Thread(target=lambda: found.append(bench.whole(other, lc.CancelToken())))
        thread.start()
        bench.cancelled(lambda token: bench.whole(mine, token))
        thread.join()
    check(np.array_equal(found[0], right), "the other call was disturbed")
    return "one of two calls was cancelled; the other gave the bits that it gives alone"


def identity(bench: Bench) -> str:
    with bench.filled() as ctx, bench.filled() as twin:
        stale = lc.CancelToken()
        bench.whole(ctx, stale)
        bench.whole(twin)
        stale.cancel("too late")
        step = bench.rows(8, pos=bench.length)
        ctx.decode(step, lc.CancelToken())
        twin.decode(step)
        check(np.array_equal(ctx.logits(-1), twin.logits(-1)), "a stale cancel reached a later call")
        before = ctx.memory.pos_max(0)
        try:
            ctx.decode(bench.rows(8, pos=bench.length + 8), stale)
        except lc.DecodeCancelled as error:
            check(error.rows_done == 0 and ctx.memory.pos_max(0) == before, "work was done under a cancelled token")
        else:
            raise AssertionError("a call under a cancelled token ran")
    return "a stale cancel did nothing; a call under a cancelled token did not begin"


def truth(bench: Bench) -> str:
    for on_cancel in ("rollback", "keep"):
        with bench.filled() as ctx:
            error = bench.cancelled(lambda token, ctx=ctx, how=on_cancel: bench.whole(ctx, token, on_cancel=how))
            check((error.cause, error.reason) == (lc.Cause.CLIENT, "changed my mind"), "the cause is another")
            check(error.sequences[0].end == ctx.memory.pos_max(0) + 1, "the context holds something else")
    return f"it raised {error}; sequences[0].end={error.sequences[0].end} is where the context is"


def rollback(bench: Bench) -> str:
    with bench.filled() as twin:
        right = bench.whole(twin)
    with bench.filled() as ctx:
        bench.cancelled(lambda token: bench.whole(ctx, token))
        check(np.array_equal(bench.whole(ctx), right), "done again, the logits have other bits")
    with bench.filled() as ctx:
        error = bench.cancelled(lambda token: bench.whole(ctx, token, on_cancel="keep"))
        done = error.sequences[0].end
        ctx.decode(bench.rows(bench.length - done, pos=done))
        check(np.array_equal(ctx.logits(-1), right), "resumed, the logits have other bits")
    kind = bench.model.memory_kind
    return f"done again after a rollback, and resumed at {done} of {bench.length}: the same bits ({kind})"


def latency(bench: Bench) -> str:
    found = []
    for _ in range(10):
        with bench.filled() as ctx:
            found.append(bench.cancelled(lambda token, ctx=ctx: bench.whole(ctx, token)).latency * 1e3)
            aim = ctx.latency_plan
    return f"10 cancels: median {statistics.median(found):.1f} ms, worst {max(found):.1f} ms; the plan: {aim}"


def cost(bench: Bench) -> str:
    ratios = []
    for _ in range(7):
        seconds = []
        for token in bench.rng.sample([None, lc.CancelToken()], 2):
            with bench.filled() as ctx:
                began = time.monotonic()
                bench.whole(ctx, token)
                seconds.append((token is None, time.monotonic() - began))
        times = dict(seconds)
        ratios.append(times[False] / times[True])
    return f"time with a token against without: {statistics.median(ratios):.3f} (7 pairs; `make bench` measures better)"


def neighbours(bench: Bench) -> str:
    def shared() -> lc.Batch:
        batch = lc.Batch(4 * quarter)
        batch.add_sequence(bench.prompt[:quarter], seq_id=0)
        batch.add_sequence(bench.prompt[: 3 * quarter], seq_id=1)
        return batch

    quarter = bench.length // 4
    row = quarter - 1
    with bench.context(n_seq_max=2) as ctx:
        ctx.decode(shared())
        right = int(np.argmax(ctx.logits(row)))
    for attempt in range(20):
        with bench.context(n_seq_max=2) as ctx:
            token = lc.CancelToken()
            timer = threading.Timer(bench.rng.uniform(0.02, 0.5) / (1 + attempt / 4), token.cancel)
            timer.start()
            result = ctx.decode(shared(), {1: token})
            timer.join()
            if result.survivors == [0]:
                check(int(np.argmax(ctx.logits(row))) == right, "the survivor would say something else")
                return f"one of two in a batch was cancelled ({result.sequences[1].state}); the other got its result"
    raise AssertionError("the model is too fast: no cancel came before the end of the call")


def reach(bench: Bench) -> str:
    try:
        lc.Model.load(bench.path, token=lc.CancelToken(timeout=0)).close()
    except lc.LoadCancelled:
        pass
    else:
        raise AssertionError("a load under a deadline that had passed was done")
    with bench.filled() as ctx:
        thread = threading.Thread(target=lambda: bench.whole(ctx))
        thread.start()
        time.sleep(0.02)
        try:
            ctx.state.save(0, token=lc.CancelToken(timeout=0.01))
        except lc.DeadlineExceeded:
            told = "so did waiting for a busy context"
        else:
            told = "the context was never busy long enough to be waited for"
        thread.join()
    return f"a load under a passed deadline ended; {told}"


def habit(bench: Bench) -> str:
    with bench.filled() as twin:
        right = bench.whole(twin)
    for attempt in range(20):
        with bench.filled() as ctx:
            timer = threading.Timer(0.2 / (1 + attempt / 2), signal.raise_signal, [signal.SIGINT])
            try:
                timer.start()
                bench.whole(ctx)
                timer.join()
                time.sleep(1)  # the signal came too late for the call: it comes here
            except KeyboardInterrupt:
                if ctx.memory.pos_max(0) == bench.history - 1:
                    check(np.array_equal(bench.whole(ctx), right), "after Ctrl-C the logits have other bits")
                    return "Ctrl-C ended a decode with KeyboardInterrupt; done again, it gave the same bits"
    raise AssertionError("the model is too fast: no Ctrl-C came before the end of the call")


def lifetime(bench: Bench) -> str:
    code = (
        "import sys, threading, time, numpy as np, llamacancel as lc\n"
        "model = lc.Model.load(sys.argv[1]); ctx = model.context(n_ctx=2048); batch = lc.Batch(1024)\n"
        f"batch.add_sequence(np.resize(model.tokenize({TEXT!r}), 1024))\n"
        "threading.Thread(target=ctx.decode, args=[batch, lc.CancelToken()], daemon=True).start()\n"
        "time.sleep(0.02)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, bench.path], capture_output=True, text=True, timeout=120)
    check(ran.returncode == 0 and not ran.stderr, f"status {ran.returncode}: {ran.stderr}")
    return "a process that ends in the middle of a decode ends in silence"


LAWS = (scope, identity, truth, rollback, latency, cost, neighbours, reach, habit, lifetime)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="GGUF file")
    parser.add_argument("--threads", type=int, help="threads to compute with")
    args = parser.parse_args()
    bench = Bench(args.model, args.threads)
    broken = 0
    for number, law in enumerate(LAWS, 1):
        try:
            told = law(bench)
        except AssertionError as error:
            broken += 1
            told = f"NOT SEEN: {error}"
        print(f"{number:2} {law.__name__:<11} {told}", flush=True)
    bench.model.close()
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
