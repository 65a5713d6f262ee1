"""A process that loses a worker in each phase of its work, and tells what it was told. It must live to its end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import llamacancel as lc
from llamacancel.commands.make_model import cached_model

from .clock import in_the_middle, wait_for
from .words import batch, decode, far, same_bits, tokens
from .workers import Worker

ROWS = batch((tokens(60), 0, 0))


def tell(phase: str, act: Callable[[], object]) -> None:
    """Acts, and prints what it raised."""
    try:
        act()
        print(phase, "nothing was raised", sep="\t")
    except lc.LlamaCancelError as error:
        print(phase, f"{type(error).__name__}: {error}", sep="\t")


def load(worker: Worker, arch: str = "llama", **params: object) -> lc.Model:
    return lc.Model.load(cached_model(arch, "tiny"), n_gpu_layers=-1, rpc_servers=[worker.endpoint], **params)


@contextmanager
def context_on(worker: Worker, arch: str = "llama") -> Iterator[lc.Context]:
    """A context that has decoded a little."""
    with load(worker, arch) as model, model.context(n_ctx=256, n_ubatch=32, n_threads=1, _n_pieces=5) as context:
        context.decode(ROWS)
        yield context


def kill_in(call: Callable[[], object], worker: Worker, at: int) -> object:
    """The call, in whose middle the worker dies."""
    with in_the_middle(worker.kill, at=at):
        return call()


def kill_stopped(call: Callable[[], object], worker: Worker) -> object:
    """The call, whose question the worker never answers."""
    worker.stop()
    dying = threading.Timer(0.3, worker.kill)
    dying.start()
    try:
        return call()
    finally:
        dying.join()


def cancelled_then_lost(context: lc.Context, worker: Worker) -> None:
    """The worker dies after the last look at a token that was cancelled: in the middle of the repair."""
    token = far()

    def act() -> None:
        token.cancel()
        worker.kill()

    with in_the_middle(act, at=12):
        context.decode(batch((tokens(60), 60, 0)), token)


def generated(model: lc.Model, worker: Worker) -> None:
    """The answer of an engine; the worker dies in its middle."""
    with lc.Engine(model, slots=2, n_ctx=512, n_threads=1) as engine:
        generation = engine.submit("Once upon a time", max_tokens=400, sampler=lc.Sampler(temperature=0))
        wait_for(lambda: len(generation.text) > 20 or generation.finish_reason is not None, "some text")
        worker.kill()
        tell("while an engine generates", generation.result)
        tell("after an engine has failed", lambda: engine.submit("Once more"))


def main() -> None:
    workers = [Worker() for _ in range(11)]
    with lc.Model.load(cached_model("llama", "tiny")) as here, here.context(n_ctx=256, n_threads=1) as bystander:
        wanted = decode(bystander, ROWS)
        lose(workers)
        bystander.memory.clear()
        print("who did not use the worker goes on", _same(decode(bystander, ROWS), wanted), sep="\t")


def lose(workers: list[Worker]) -> None:
    """All the phases; each takes a worker."""
    left = iter(workers)

    worker = next(left)
    tell("while the model is loaded", lambda: load(worker, progress=lambda share: share > 0.5 and worker.kill()))

    worker = next(left)
    with load(worker) as model:
        worker.kill()
        tell("before a context is made", lambda: model.context(n_ctx=64, n_threads=1))

    worker = next(left)
    with context_on(worker) as context:
        wanted = decode(context, batch((tokens(60, seed=1), 60, 0)))
        context.memory.remove(0, 60)
        tell(
            "in the middle of a decode",
            lambda: kill_in(lambda: context.decode(batch((tokens(60, seed=1), 60, 0)), far()), worker, 12),
        )
        tell("in the middle of a decode, and the next one", lambda: context.decode(ROWS))
        # The worker's machine is up again, while what was lost is not closed yet.
        again = Worker(worker.port)
        with context_on(again) as fresh:
            got = decode(fresh, batch((tokens(60, seed=1), 60, 0)))
        print("a worker that was started again is used", _same(got, wanted), sep="\t")
        again.kill()

    worker = next(left)
    with context_on(worker) as context:
        worker.kill()
        tell("between two decodes", lambda: context.decode(batch((tokens(60), 60, 0))))

    worker = next(left)
    with context_on(worker, "mamba") as context:
        tell("in the middle of the repair", lambda: cancelled_then_lost(context, worker))

    worker = next(left)
    with context_on(worker, "mamba") as context:
        tell(
            "before a recurrent state is snapshot",
            lambda: kill_stopped(lambda: context.decode(batch(([1], 60, 0))), worker),
        )

    worker = next(left)
    with context_on(worker) as context:
        tell("while a state is saved", lambda: kill_stopped(lambda: context.state.save(0), worker))

    worker = next(left)
    with context_on(worker) as context:
        saved = context.state.save(0)
        tell("while a state is loaded", lambda: kill_stopped(lambda: context.state.load(0, saved), worker))

    worker = next(left)
    with context_on(worker) as context:
        saved = context.state.save(0)
        context.memory.clear()
        tell(
            "while a state is loaded where there was none",
            lambda: kill_stopped(lambda: context.state.load(0, saved), worker),
        )

    worker = next(left)
    with context_on(worker) as context:
        tell("while the memory is cleared", lambda: kill_stopped(context.memory.clear, worker))

    worker = next(left)
    with load(worker) as model:
        generated(model, worker)


def _same(a: object, b: object) -> str:
    return "same bits" if same_bits(a, b) else "other bits"
