"""Law 10, lifetime: any order of close, garbage collection, exit, fork and cancel is safe."""

from __future__ import annotations

import gc
import itertools
import os
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE

from .words import batch, cancelled, dead, decode, holds, one_more, run_python, same_bits, threads, tokens

NewContext = Callable[..., lc.Context]
ModelPath = Callable[[str], Path]
SMALL = {"n_ctx": 256, "n_ubatch": 8, "n_threads": 1}


# ---- close -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("order", list(itertools.permutations(["model", "one", "two"])), ids="-".join)
def test_closing_in_any_order_is_safe(arch: str, order: tuple[str, ...], model_path: ModelPath) -> None:
    model = lc.Model.load(model_path(arch))
    things = {"model": model, "one": model.context(**SMALL), "two": model.context(**SMALL)}
    for context in (things["one"], things["two"]):
        context.decode(batch((tokens(20), 0, 0)))
    for name in order:
        things[name].close()
        things[name].close()
        assert things[name].closed
        for each in (things["one"], things["two"]):
            if not each.closed:
                assert len(one_more(each)) == 1


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_context_outlives_its_model(arch: str, model_path: ModelPath, new_context: NewContext) -> None:
    model = lc.Model.load(model_path(arch))
    context = model.context(**SMALL)
    model.close()
    del model
    gc.collect()
    rows = batch((tokens(40), 0, 0))
    assert cancelled(context, rows, lc.CancelToken(timeout=0.0005)) is not None or context.memory.remove(0)
    assert same_bits(decode(context, rows), decode(new_context(arch, **SMALL), rows))
    context.close()


@pytest.mark.parametrize("arch", GENERATIVE)
def test_use_after_close_is_an_error(arch: str, model_path: ModelPath) -> None:
    model = lc.Model.load(model_path(arch))
    context = model.context(**SMALL)
    context.decode(batch((tokens(4), 0, 0)))
    memory, state = context.memory, context.state
    data = state.save(0)
    context.close()
    model.close()
    for use in (
        lambda: context.decode(batch(([1], 4, 0))),
        lambda: context.decode(batch(([1], 4, 0)), lc.CancelToken()),
        lambda: context.decode(batch(([1], 4, 0)), dead()),
        lambda: context.encode(batch(([1], 4, 0))),
        lambda: context.logits(),
        lambda: context.embeddings(),
        lambda: context.pooled_embeddings(),
        lambda: memory.clear(),
        lambda: memory.remove(0),
        lambda: memory.copy(0, 0),
        lambda: memory.keep(0),
        lambda: memory.pos_min(0),
        lambda: memory.pos_max(0),
        lambda: memory.kind,
        lambda: state.save(0),
        lambda: state.load(0, data),
        lambda: context.set_lora(),
        lambda: context.set_threads(1),
        lambda: context.perf(),
        lambda: context.n_ctx,
        lambda: context.n_batch,
        lambda: context.n_ubatch,
        lambda: context.n_seq_max,
        lambda: context.n_threads,
        lambda: context.latency_plan,
        lambda: context.dirty_sequences,
        lambda: context.__enter__(),
        lambda: model.context(),
        lambda: model.tokenize("a"),
        lambda: model.detokenize([300]),
        lambda: model.token_to_piece(300),
        lambda: model.is_eog(300),
        lambda: model.n_vocab,
        lambda: model.metadata,
        lambda: model.memory_kind,
        lambda: model.description,
        lambda: model.load_lora("nowhere"),
        lambda: model.__enter__(),
    ):
        with pytest.raises(lc.ClosedError):
            use()
    assert "closed" in repr(context)
    assert "closed" in repr(model)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_close_in_the_middle_of_a_call_is_refused_and_harms_nobody(arch: str, new_context: NewContext) -> None:
    context, twin = (new_context(arch, n_ubatch=8) for _ in range(2))
    rows = batch((tokens(900), 0, 0), logits="last")
    results, refused = [], 0
    with threads(lambda: results.append(decode(context, rows, lc.CancelToken()))) as (thread,):
        while thread.is_alive() and not refused:
            if context_is_busy(context):
                with pytest.raises(lc.ContextBusyError):
                    context.close()
                refused += 1
    assert refused > 0
    assert same_bits(results[0], decode(twin, rows))


def test_a_call_that_waits_for_a_context_which_is_closed_meanwhile_is_told_so() -> None:
    ran = run_python("""
import threading, time
import llamacancel as lc
from llamacancel.make_model import cached_model
from tests.laws.words import *
model = lc.Model.load(cached_model("llama", "tiny"))
seen = set()
for turn in range(30):
    context = model.context(n_ctx=1024, n_ubatch=8, n_threads=1)
    def wait(call):
        try:
            call(lc.CancelToken(timeout=30))
            seen.add("done")
        except lc.LlamaCancelError as error:
            seen.add(type(error).__name__)
    started = [threading.Thread(target=context.decode, args=(batch((tokens(200), 0, 0), logits="last"),))]
    started += [threading.Thread(target=wait, args=(call,)) for call in (
        lambda token: context.state.save(0, token),
        lambda token: context.decode(batch(([5], 200, 0)), token),
        lambda token: context.state.load(0, b"", token),
    )[:2]]
    for thread in started:
        thread.start()
        time.sleep(0.001)
    while not context.closed:
        try:
            context.close()
        except lc.ContextBusyError:
            pass
    for thread in started:
        thread.join()
model.close()
print(sorted(seen - {"done", "ClosedError", "InvalidBatchError"}))
""")
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, "[]", "")


def test_a_main_thread_that_waits_for_a_context_does_not_wait_for_ever() -> None:
    """Its look for Ctrl-C wants the GIL, which the thread that frees the context may hold."""
    ran = run_python("""
import threading, time
import llamacancel as lc
from llamacancel.make_model import cached_model
from tests.laws.words import *
model = lc.Model.load(cached_model("llama", "tiny"))
context = model.context(n_ctx=1024, n_ubatch=8, n_threads=1)
over = False
def busy():
    while not over:
        sum(range(100))
def use():
    while not over:
        for call in (lambda: context.decode(batch((tokens(8), 0, 0)), lc.CancelToken()), context.memory.clear):
            try:
                call()
            except lc.LlamaCancelError:
                pass
started = [threading.Thread(target=each, daemon=True) for each in (busy, use, use)]
for thread in started:
    thread.start()
end = time.monotonic() + 6
while time.monotonic() < end:
    try:
        context.decode(batch((tokens(4), 0, 0)), lc.CancelToken(timeout=0.2))
    except lc.LlamaCancelError:
        pass
over = True
for thread in started:
    thread.join()
context.close(); model.close()
print("fine")
""", timeout=40)
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, "fine", "")


# ---- garbage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GENERATIVE)
def test_an_unclosed_context_warns(arch: str, model_of: Callable[[str], lc.Model]) -> None:
    context: lc.Context | None = model_of(arch).context(**SMALL)
    decode(context, batch((tokens(4), 0, 0)))
    with pytest.warns(ResourceWarning, match="unclosed"):
        context = None


@pytest.mark.parametrize("arch", GENERATIVE)
def test_cycles_through_everything_are_collected(arch: str, model_path: ModelPath) -> None:
    class Holder:
        pass

    gone = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for _ in range(5):
            holder, token = Holder(), lc.CancelToken()
            holder.model = lc.Model.load(model_path(arch))
            holder.context = holder.model.context(**SMALL)
            holder.parts = (holder.context.memory, holder.context.state, batch(([5], 0, 0)), token.child())
            holder.handle = token.add_callback(lambda holder=holder: holder)
            holder.token = token
            holder.context.decode(holder.parts[2], token)
            try:
                holder.context.decode(batch(([5], 1, 0)), dead())
            except lc.DecodeCancelled as error:
                holder.error = error
            holder.self = holder
            gone.append(weakref.ref(holder))
            del holder, token
        gc.collect()
    assert [reference() for reference in gone] == [None] * 5


@pytest.mark.parametrize("arch", GENERATIVE)
def test_dropping_a_token_in_the_middle_of_its_call_is_safe(arch: str, new_context: NewContext) -> None:
    context = new_context(arch, n_ubatch=8)

    def call() -> None:
        context.decode(batch((tokens(600), 0, 0), logits="last"), lc.CancelToken().child().child())

    with threads(call) as (thread,):
        while thread.is_alive():
            gc.collect()
    assert holds(context)[0][1] == 599


def test_an_objects_parts_keep_it_alive(model_path: ModelPath) -> None:
    memory = lc.Model.load(model_path("llama")).context(**SMALL).memory
    gc.collect()
    assert memory.pos_max(0) == -1
    with pytest.warns(ResourceWarning, match="unclosed"):
        memory = None


def test_an_exception_needs_nothing_to_be_alive(model_path: ModelPath) -> None:
    token = lc.CancelToken()
    with lc.Model.load(model_path("llama")) as model, model.context(**SMALL) as context:
        token.cancel("because")
        error = cancelled(context, batch((tokens(8), 0, 0)), token)
    del model, context, token
    gc.collect()
    assert error is not None
    assert error.reason == "because"
    assert "because" in str(error)


# ---- exit and fork ---------------------------------------------------------------------------------------------

EXIT = """
import sys, threading, time
import llamacancel as lc
from llamacancel.make_model import cached_model
from tests.laws.words import *
model = lc.Model.load(cached_model(sys.argv[1], "tiny"))
context = model.context(n_ctx=4096, n_ubatch=8, n_threads=1)
token = lc.CancelToken(timeout=1000)
token.add_callback(lambda: None)
rows = batch(([1], 0, 0))
def work():
    while True:
        context.decode(batch((tokens(1500), 0, 0), logits="last"), token)
        context.memory.clear()
threading.Thread(target=work, daemon=True).start()
time.sleep(0.05)
"""
ENDS = {
    "falls off the end": "",
    "exit": "sys.exit(0)",
    "cancel and exit": "token.cancel(); sys.exit()",
    "drops all": "del model, context",
    "another waits": "threading.Thread(target=context.decode, args=(rows, lc.CancelToken()), daemon=True).start()",
}


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_an_exit_in_the_middle_of_a_decode_is_silent(arch: str, end: str) -> None:
    if arch in ("moe", "hybrid") and end not in ("", "sys.exit(0)"):
        return  # the same as the others
    ran = run_python(EXIT + end, args=[arch], timeout=30)
    if "token.cancel" in end:
        assert ran.returncode == 0
        assert "Fatal" not in ran.stderr
        return  # the thread may have had the time to tell of its cancel
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


@pytest.mark.parametrize("arch", GENERATIVE)
def test_an_exit_with_everything_open_crashes_nothing(arch: str) -> None:
    ran = run_python("import warnings; warnings.simplefilter('ignore')\n" + EXIT.split("token =")[0]
                     + "context.decode(batch((tokens(15), 0, 0)))\nkeep = [context.memory, context.state, [model]]\n"
                     "keep.append(keep)", args=[arch], timeout=30)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("arch", ["llama", "mamba"])
def test_a_forked_child_is_told_and_the_parent_goes_on(arch: str) -> None:
    ran = run_python("""
import os, sys, threading, time, gc, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import llamacancel as lc
from llamacancel.make_model import cached_model
from tests.laws.words import *
path = cached_model(sys.argv[1], "tiny")
model = lc.Model.load(path)
context, other = (model.context(n_ctx=2048, n_ubatch=8, n_threads=1) for _ in range(2))
rows = batch((tokens(900), 0, 0), logits="last")
results = []
worker = threading.Thread(target=lambda: results.append(decode(context, rows)))
worker.start()
time.sleep(0.01)
children = []
for turn in range(6):
    child = os.fork()
    if child == 0:
        code = 3
        try:
            wrong = []
            for use in (lambda: other.decode(batch(([5], 0, 0))), lambda: context.decode(rows, lc.CancelToken()),
                        lambda: other.memory.clear(), lambda: other.state.save(0), lambda: model.tokenize("a"),
                        lambda: other.logits(), lambda: lc.Model.load(path), lambda: model.context(n_ctx=256)):
                try:
                    use()
                    wrong.append(use)
                except lc.ClosedError:
                    pass
            token = lc.CancelToken(); token.child(); token.cancel("in the child")
            other.close(); context.close(); model.close()
            del other, context, model
            gc.collect()
            code = 1 if wrong else 0
        finally:
            os._exit(code)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
worker.join()
assert same_bits(results[0], decode(other, rows))
context.close(); other.close(); model.close()
print(codes)
""", args=[arch], timeout=60)
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, "[0, 0, 0, 0, 0, 0]", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_before_the_first_load_may_load() -> None:
    ran = run_python("""
import os, sys
import llamacancel as lc
from llamacancel.make_model import cached_model
from tests.laws.words import *
child = os.fork()
with lc.Model.load(cached_model("llama", "tiny")) as model, model.context(n_ctx=256, n_threads=1) as context:
    decode(context, batch((tokens(9), 0, 0)))
    assert cancelled(context, batch((tokens(9), 9, 0)), dead())
if child:
    assert os.waitpid(child, 0)[1] == 0
    print("fine")
""")
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, "fine", "")


# ---- leaks -----------------------------------------------------------------------------------------------------


def _growth(step: Callable[[], object], warm_up: int, n: int) -> float:
    """How much the process grows over `n` steps, in MB."""
    process = psutil.Process()
    for _ in range(warm_up):
        step()
    gc.collect()
    before = process.memory_info().rss
    for _ in range(n):
        step()
    gc.collect()
    return (process.memory_info().rss - before) / 1e6


@pytest.mark.slow
@pytest.mark.parametrize("arch", GENERATIVE)
def test_memory_stays_flat_over_loads(arch: str, model_path: ModelPath) -> None:
    # The vocabulary makes a load slow; a leaked tiny model is 5 MB and more.
    assert _growth(lambda: lc.Model.load(model_path(arch)).close(), 8, 30) < 60


@pytest.mark.slow
def test_memory_stays_flat_over_a_thousand_cancelled_loads(model_path: ModelPath) -> None:
    def step() -> None:
        with pytest.raises(lc.LoadCancelled):
            lc.Model.load(model_path("llama"), token=dead())

    assert _growth(step, 100, 1000) < 30


@pytest.mark.slow
@pytest.mark.parametrize("arch", GENERATIVE)
def test_memory_stays_flat_over_a_thousand_contexts(arch: str, model_of: Callable[[str], lc.Model]) -> None:
    def step() -> None:
        with model_of(arch).context(**SMALL) as context:
            cancelled(context, batch((tokens(8), 0, 0)), dead())

    assert _growth(step, 100, 1000) < 30


@pytest.mark.slow
@pytest.mark.parametrize("arch", GENERATIVE)
def test_memory_stays_flat_over_a_thousand_cancelled_decodes(arch: str, new_context: NewContext) -> None:
    context = new_context(arch, n_ubatch=8, n_seq_max=2)
    decode(context, batch((tokens(40), 0, 0)))
    rows = batch((tokens(300), 40, 0), (tokens(30), 0, 1))
    turns = itertools.count()

    def step() -> None:
        keep = "keep" if next(turns) % 4 == 3 else "rollback"
        error = cancelled(context, rows, lc.CancelToken().child(timeout=0.0015), on_cancel=keep)
        assert error is not None
        if keep == "keep":
            context.memory.clear()
            context.decode(batch((tokens(40), 0, 0)))

    assert _growth(step, 150, 1000) < 30


@pytest.mark.slow
def test_memory_stays_flat_over_a_hundred_thousand_tokens() -> None:
    root = lc.CancelToken()

    def step() -> None:
        token = lc.CancelToken.any_of(root.child(timeout=1000), lc.CancelToken())
        token.add_callback(lambda token=token: token)
        token.child().cancel()

    assert _growth(step, 5000, 100_000) < 30


# ---- words -----------------------------------------------------------------------------------------------------


def context_is_busy(context: lc.Context) -> bool:
    try:
        context.memory.pos_max(0)
    except lc.ContextBusyError:
        return True
    return False
