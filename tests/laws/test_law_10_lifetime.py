"""Law 10, lifetime: any order of close, garbage collection, exit, fork and cancel is safe, and nothing grows."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import llamacancel as lc
from llamacancel.commands.make_model import make_lora
from tests.conftest import GENERATIVE
from tests.device import CONTEXT, load
from tests.unit.test_damaged_files import small_model

from .clock import NEVER, Clock, Flight, deadline_at, readings_of
from .words import (
    ModelPath,
    NewContext,
    Pair,
    batch,
    cancelled,
    dead,
    decode,
    far,
    holds,
    one_more,
    run_python,
    same_bits,
    tokens,
)

pytestmark = pytest.mark.timeout(1800)  # on a slow and busy machine

SMALL: dict[str, Any] = {"n_ctx": 256, "n_ubatch": 8, "n_threads": 1, **CONTEXT}


# ---- close -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GENERATIVE)
def test_closing_in_any_order_is_safe(arch: str, model_path: ModelPath) -> None:
    orders = list(itertools.permutations(["model", "one", "two"]))
    for order in orders if arch == "llama" else orders[:3:2]:
        model = load(model_path(arch))
        things: dict[str, Any] = {"model": model, "one": model.context(**SMALL), "two": model.context(**SMALL)}
        for name in ("one", "two"):
            things[name].decode(batch((tokens(20), 0, 0)))
        for name in order:
            things[name].close()
            things[name].close()
            assert things[name].closed
            for each in (things["one"], things["two"]):
                if not each.closed:
                    assert len(one_more(each)) == 1


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_context_outlives_its_model_and_the_last_name_of_it(
    arch: str, model_path: ModelPath, new_context: NewContext
) -> None:
    model = load(model_path(arch))
    with model.context(**SMALL) as context:
        model.close()
        del model
        gc.collect()
        rows, token, twin = batch((tokens(40), 0, 0)), far(), new_context(arch, **SMALL)
        with deadline_at(80):
            assert cancelled(context, rows, token) is not None
        assert same_bits(decode(context, rows), decode(twin, rows))
        assert same_bits(one_more(context), one_more(twin))


# What can be asked of a closed object, because it tells of the handle and not of what it held.
HARMLESS = {"close", "closed", "path", "model", "memory", "state", "load"}
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "Context.decode": (batch((tokens(2), 0, 0)),),
    "Context.encode": (batch((tokens(2), 0, 0)),),
    "Context.set_threads": (1,),
    "Memory.remove": (0,),
    "Memory.copy": (0, 1),
    "Memory.keep": (0,),
    "Memory.pos_min": (0,),
    "Memory.pos_max": (0,),
    "Model.tokenize": ("a",),
    "Model.detokenize": ([300],),
    "Model.token_to_piece": (300,),
    "Model.is_eog": (300,),
    "Model.is_control": (300,),
    "Model.load_lora": ("nowhere",),
    "Model.token_attributes": (1,),
    "State.save_file": (os.devnull + "/nowhere",),
}


def test_every_public_method_and_property_of_a_closed_object_says_that_it_is_closed(
    model_path: ModelPath, tmp_path: Path
) -> None:
    model = load(model_path("llama"))
    context = model.context(**SMALL, n_seq_max=2)
    context.decode(batch((tokens(4), 0, 0)))
    memory, state = context.memory, context.state
    saved = state.save(0)
    state.save_file(tmp_path / "state")
    given = {**ARGUMENTS, "State.load": (0, saved), "State.load_file": (tmp_path / "state",)}
    context.close()
    model.close()
    seen = []
    for thing in (model, context, memory, state):
        for name in dir(type(thing)):
            if name.startswith("_") or (name in HARMLESS and not (thing is state and name == "load")):
                continue
            seen.append(name)
            arguments = given.get(f"{type(thing).__name__}.{name}", ())
            with pytest.raises(lc.ClosedError):
                getattr(thing, name)(*arguments)
        assert repr(thing)
    assert len(seen) > 40
    for token in (lc.CancelToken(), dead(), {0: dead()}):
        with pytest.raises(lc.ClosedError):
            context.decode(batch(([1], 4, 0)), token)
    for thing in (model, context):
        with pytest.raises(lc.ClosedError):
            thing.__enter__()
        assert "closed" in repr(thing)
        assert thing.closed
        thing.close()


@pytest.mark.parametrize("arch", GENERATIVE)
def test_close_in_the_middle_of_a_call_is_refused_and_harms_nobody(arch: str, pair: Pair) -> None:
    context, twin = pair(arch)
    rows = batch((tokens(60), 0, 0), logits="last")
    with Flight(lambda: decode(context, rows, far())) as flight:
        for _ in range(3):
            with pytest.raises(lc.ContextBusyError):
                context.close()
    assert same_bits(flight.told, decode(twin, rows))


def test_a_call_that_waits_for_a_context_which_is_closed_meanwhile_is_told_so() -> None:
    Clock()  # skips the test where there is none
    ran = run_python("""
import llamacancel as lc
from llamacancel.commands.make_model import cached_model
from tests.device import *
from tests.laws.clock import *
from tests.laws.words import *
model = load(cached_model("llama", "tiny"))
seen = set()
for turn in range(12):
    context = model.context(n_ctx=1024, n_ubatch=8, n_threads=1, **CONTEXT)
    active = Flight(lambda: context.decode(batch((tokens(60), 0, 0), logits="last"), far()))
    waiting = [Flight(call, at=NEVER) for call in (
        lambda: context.state.save(0, far()),
        lambda: context.decode(batch(([5], 60, 0)), far()),
    )]
    for each in waiting:
        each.waits()
    active.clock.go_on()
    while not context.closed:
        try:
            context.close()
        except lc.ContextBusyError:
            pass
    seen |= {type(each.lands()).__name__ for each in waiting}
    active.lands()
model.close()
print(sorted(seen - {"bytes", "DecodeResult", "ClosedError"}))
""")
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, "[]", "")


def test_a_main_thread_that_waits_for_a_context_does_not_wait_for_ever() -> None:
    """Its look for Ctrl-C wants the GIL, which the thread that frees the context may hold."""
    ran = run_python("""
import threading
import llamacancel as lc
from llamacancel.commands.make_model import cached_model
from tests.device import *
from tests.laws.words import *
model = load(cached_model("llama", "tiny"))
context = model.context(n_ctx=1024, n_ubatch=8, n_threads=1, **CONTEXT)
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
for _ in range(60):
    try:
        context.decode(batch((tokens(4), 0, 0)), lc.CancelToken(timeout=0.2))
    except lc.LlamaCancelError:
        pass
over = True
for thread in started:
    thread.join()
context.close(); model.close()
print("fine")
""")
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, "fine", "")


# ---- garbage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "hybrid"])
def test_cycles_through_everything_are_collected(arch: str, model_path: ModelPath) -> None:
    class Holder:
        pass

    gone = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for _ in range(5):
            holder, token = Holder(), lc.CancelToken()
            holder.model = load(model_path(arch))
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


def test_dropping_a_token_in_the_middle_of_its_call_is_safe(new_context: NewContext) -> None:
    context = new_context("llama", n_ubatch=8)
    with Flight(lambda: context.decode(batch((tokens(60), 0, 0), logits="last"), far().child().child())):
        gc.collect()
    assert holds(context)[0][1] == 59


def test_an_objects_parts_keep_it_alive(model_path: ModelPath) -> None:
    memory = load(model_path("llama")).context(**SMALL).memory
    gc.collect()
    assert memory.pos_max(0) == -1
    with pytest.warns(ResourceWarning, match="unclosed"):
        memory = None


def test_an_exception_needs_nothing_to_be_alive(model_path: ModelPath) -> None:
    token = lc.CancelToken()
    with load(model_path("llama")) as model, model.context(**SMALL) as context:
        token.cancel("because")
        error = cancelled(context, batch((tokens(8), 0, 0)), token)
    del model, context, token
    gc.collect()
    assert error is not None
    assert error.reason == "because"
    assert "because" in str(error)


# ---- exit and fork ---------------------------------------------------------------------------------------------

EXIT = """
import sys, threading
import llamacancel as lc
from llamacancel.commands.make_model import cached_model
from tests.device import *
from tests.laws.clock import *
from tests.laws.words import *
model = load(cached_model(sys.argv[1], "tiny"))
context = model.context(n_ctx=2048, n_ubatch=8, n_threads=1, **CONTEXT)
token, daemon = far(), sys.argv[2] == "daemon"
token.add_callback(lambda: None)
rows = batch(([1], 0, 0))
clock, use = Clock(), context
def work():
    with clock:
        while True:
            use.decode(batch((tokens(1500 if daemon else 400), 0, 0), logits="last"), token)
            use.memory.clear()
            if not daemon:
                break
threading.Thread(target=work, daemon=daemon).start()
wait_for(lambda: clock.readings > 100, "the decode")
"""
ENDS = {
    "falls off the end": "",
    "exit": "sys.exit(0)",
    "drops all": "del model, context",
    "another waits": "threading.Thread(target=context.decode, args=(rows, lc.CancelToken()), daemon=True).start()",
    "cancel and exit": "token.cancel(); sys.exit()",
}
EXITS = [*(("llama", "daemon", end) for end in ENDS), *((arch, "daemon", "exit") for arch in GENERATIVE[1:]),
         ("llama", "no daemon", "falls off the end"), ("mamba", "no daemon", "drops all")]  # fmt: skip


@pytest.mark.parametrize(("arch", "daemon", "end"), EXITS)
def test_an_exit_in_the_middle_of_a_decode_is_silent(arch: str, daemon: str, end: str) -> None:
    Clock()  # skips the test where there is none
    ran = run_python(EXIT + ENDS[end], args=[arch, daemon])
    if "cancel" in end:
        assert ran.returncode == 0
        assert "Fatal" not in ran.stderr
        return  # the thread may have had the time to tell of its cancel
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_a_hook_that_runs_late_still_uses_a_context_whose_thread_was_stopped() -> None:
    Clock()  # skips the test where there is none
    late = """
import atexit
here = {}
def bye():
    context = here["context"]
    print(context.memory.pos_max(0))
    print(context.decode(batch(([1], 0, 1)), far()).rows_done, len(context.state.save(1)) > 0)
    context.close()
    print("closed", flush=True)
atexit.register(bye)  # before the import: it runs after llamacancel's own
"""
    exit_ = EXIT.replace("n_ubatch=8,", "n_ubatch=8, n_seq_max=2,") + "here['context'] = context"
    ran = run_python(late + exit_, args=["llama", "daemon"])
    assert (ran.returncode, ran.stdout.split(), ran.stderr) == (0, ["-1", "1", "True", "closed"], "")


@pytest.mark.parametrize("streams", [True, False], ids=["a thread at work", "an idle thread"])
def test_a_hook_that_runs_late_closes_an_engine(streams: bool) -> None:
    ran = run_python(f"""
import atexit
state = {{}}
def bye():
    state["engine"].close(timeout=1.0)
    print("closed", flush=True)
atexit.register(bye)
import llamacancel as lc
from llamacancel.commands.make_model import cached_model
model = lc.Model.load(cached_model("llama", "tiny"))
state["engine"] = engine = lc.Engine(model, n_threads=1, slots=1)
generation = engine.submit([400], sampler=lc.Sampler(temperature=0, logit_bias={{2: -1000.0}}))
next(generation)
if not {streams}:
    generation.cancel()
    generation.wait()
""")
    assert (ran.returncode, ran.stdout) == (0, "closed\n"), ran.stderr


def test_an_exit_with_everything_open_crashes_nothing() -> None:
    ran = run_python(f"""
import warnings
import llamacancel as lc
from llamacancel.commands.make_model import cached_model
from tests.device import *
from tests.laws.words import *
warnings.simplefilter("ignore")
keep = []
for arch in {GENERATIVE}:
    model = load(cached_model(arch, "tiny"))
    context = model.context(n_ctx=256, n_ubatch=8, n_threads=1, **CONTEXT)
    context.decode(batch((tokens(15), 0, 0)))
    keep.append([context.memory, context.state, [model], keep])
""")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("arch", ["llama", "mamba"])
def test_a_forked_child_is_told_and_the_parent_goes_on(arch: str) -> None:
    Clock()  # skips the test where there is none
    ran = run_python(
        """
import os, sys, gc, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import llamacancel as lc
from llamacancel.commands.make_model import cached_model
from tests.device import *
from tests.laws.clock import *
from tests.laws.words import *
path = cached_model(sys.argv[1], "tiny")
model = load(path)
context, other = (model.context(n_ctx=1024, n_ubatch=8, n_threads=1, **CONTEXT) for _ in range(2))
rows = batch((tokens(60), 0, 0), logits="last")
flight = Flight(lambda: decode(context, rows, far()))
children = []
for turn in range(4):
    child = os.fork()
    if child == 0:
        code = 3
        try:
            wrong = []
            for use in (lambda: other.decode(batch(([5], 0, 0))), lambda: context.decode(rows, lc.CancelToken()),
                        lambda: other.memory.clear(), lambda: other.state.save(0), lambda: model.tokenize("a"),
                        lambda: other.logits(), lambda: load(path), lambda: model.context(n_ctx=256)):
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
assert same_bits(flight.lands(), decode(other, rows))
context.close(); other.close(); model.close()
print(codes)
""",
        args=[arch],
    )
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, "[0, 0, 0, 0]", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_before_the_first_load_may_load() -> None:
    ran = run_python("""
import os
import llamacancel as lc
from llamacancel.commands.make_model import cached_model
from tests.device import *
from tests.laws.words import *
child = os.fork()
with load(cached_model("llama", "tiny")) as model, model.context(n_ctx=256, n_threads=1, **CONTEXT) as context:
    decode(context, batch((tokens(9), 0, 0)))
    assert cancelled(context, batch((tokens(9), 9, 0)), dead())
if child:
    assert os.waitpid(child, 0)[1] == 0
    print("fine")
""")
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, "fine", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_may_load_after_a_load_that_failed_and_exits_at_once() -> None:
    ran = run_python("""
import os, sys, threading, time
import llamacancel as lc
from llamacancel.commands.make_model import cached_model
from tests.device import *
from tests.laws.words import *
try:
    load(__file__ if "__file__" in globals() else sys.executable)
except lc.ModelLoadError:
    pass
child = os.fork()
if not child:
    with load(cached_model("llama", "tiny")) as model:
        sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
print("fine")
""")
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, "fine", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_in_the_middle_of_a_decode_exits_by_itself_and_can_print_what_it_inherited() -> None:
    Clock()  # skips the test where there is none
    ran = run_python("""
import os, sys, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import llamacancel as lc
from llamacancel.commands.make_model import cached_model
from tests.device import *
from tests.laws.clock import *
from tests.laws.words import *
model = load(cached_model("llama", "tiny"))
context = model.context(n_ctx=1024, n_ubatch=8, n_threads=1, **CONTEXT)
flight = Flight(lambda: decode(context, batch((tokens(60), 0, 0)), far()))
start = time.monotonic()
child = os.fork()
if not child:
    print(repr(context).startswith("<Context of process"), repr(model).startswith("<Model of process"), flush=True)
    sys.exit(0)
status = os.waitpid(child, 0)[1]
waited = time.monotonic() - start
flight.lands()
context.close(); model.close()
print(status, "at once" if waited < 9 else waited)  # an exit waits 10 s for calls in flight
""")
    assert (ran.returncode, ran.stdout.split("\n")[:2]) == (0, ["True True", "0 at once"]), ran.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("own", [True, False], ids=["a wakeup fd of the application's", "none"])
def test_a_child_forked_in_the_middle_of_a_call_has_the_wakeup_fd_from_before_it(own: bool) -> None:
    Clock()  # skips the test where there is none
    ran = run_python(f"""
import os, signal, socket, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import llamacancel as lc
from llamacancel.commands.make_model import cached_model
from tests.device import *
from tests.laws.clock import *
from tests.laws.words import *
model = load(cached_model("llama", "tiny"))
context = model.context(n_ctx=1024, n_ubatch=8, n_threads=1, **CONTEXT)
near, far_end = socket.socketpair()
far_end.setblocking(False)
mine = far_end.fileno() if {own} else -1
signal.set_wakeup_fd(mine)
told = []
def fork(clock):
    wait_for(lambda: clock.stopped, "the call's middle")
    child = os.fork()
    if not child:
        os._exit(0 if signal.set_wakeup_fd(-1) == mine else 1)
    told.append(os.waitpid(child, 0)[1])
    clock.go_on()
with Clock(stop_at=40) as clock:
    thread = threading.Thread(target=fork, args=(clock,))
    thread.start()
    context.decode(batch((tokens(60), 0, 0)), far())
thread.join()
print(told, signal.set_wakeup_fd(-1) == mine)
context.close(); model.close()
""")
    assert (ran.returncode, ran.stdout) == (0, "[0] True\n"), ran.stderr


def test_a_call_without_memory_for_its_outputs_leaves_the_context_as_it_was() -> None:
    ran = run_python("""
import resource
import psutil
import llamacancel as lc
from llamacancel.commands.make_model import cached_model
from tests.device import *
from tests.laws.words import *
with load(cached_model("llama", "tiny")) as model:
    context, twin = (model.context(n_ctx=1024, n_ubatch=32, n_threads=1, **CONTEXT) for _ in range(2))
    for each in (context, twin):
        each.decode(batch((tokens(40), 0, 0), logits="last"))
        each.decode(batch((tokens(32), 40, 0)))  # llama.cpp has its buffer
    before, rows = context.logits(0), batch((tokens(640, 3), 72, 0))  # 82 MB of logits
    used = psutil.Process().memory_info().vms
    failures = 0
    for room in range(8, 400, 8):
        resource.setrlimit(resource.RLIMIT_AS, (used + (room << 20), resource.RLIM_INFINITY))
        try:
            context.decode(rows)
            break
        except MemoryError as error:
            failures += 1
            assert "as before" in str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert holds(context)[0][1] == 71 and context.dirty_sequences == []
        assert same_bits(context.logits(0), before)
    twin.decode(rows)
    assert same_bits(outputs(context, rows), outputs(twin, rows))
    print("failed and was done again" if failures else "never failed")
    context.close(); twin.close()
""")
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, "failed and was done again", "")


# ---- leaks -----------------------------------------------------------------------------------------------------


def _stays_flat(step: Callable[[], object], n: int, warm_up: int = 50) -> None:
    """The process has gained neither 30 MB nor threads after `n` steps."""
    process = psutil.Process()
    for _ in range(warm_up):
        step()
    gc.collect()
    memory, threads = process.memory_info().rss, process.num_threads()
    for _ in range(n):
        step()
    gc.collect()
    assert process.memory_info().rss - memory < 30e6
    assert process.num_threads() <= threads


@pytest.fixture(scope="session")
def quick_model_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model with a short vocabulary, which is what makes a load slow."""

    def make(arch: str) -> Path:
        path = tmp_path_factory.mktemp(arch) / "quick.gguf"
        path.write_bytes(small_model(arch).to_bytes())
        return path

    return make


@pytest.mark.slow
@pytest.mark.parametrize("arch", GENERATIVE)
def test_memory_stays_flat_over_a_thousand_loads(arch: str, quick_model_path: Callable[[str], Path]) -> None:
    path, rows = quick_model_path(arch), batch((range(20), 0, 0))
    turns = itertools.count()

    def step() -> None:
        turn, token = next(turns), far()
        with (
            load(path, use_mmap=turn % 2 == 0) as model,
            model.context(**SMALL) as context,
            deadline_at(30 if turn % 4 == 0 else NEVER),
        ):
            assert (cancelled(context, rows, token) is None) == (turn % 4 != 0)

    _stays_flat(step, 1000 if arch == "llama" else 150, 40)


@pytest.mark.slow
def test_memory_stays_flat_over_a_thousand_cancelled_loads(quick_model_path: Callable[[str], Path]) -> None:
    path = quick_model_path("llama")
    token = far()
    whole = readings_of(lambda: load(path, token=token).close())
    turns = itertools.count()

    def step() -> None:
        turn, token = next(turns), far()
        with deadline_at(turn % (whole - 2) + 1), pytest.raises(lc.LoadCancelled):
            load(path, token=token, use_mmap=turn % 2 == 0)

    _stays_flat(step, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("arch", GENERATIVE)
def test_memory_stays_flat_over_a_thousand_contexts(arch: str, model_of: Callable[[str], lc.Model]) -> None:
    model, rows = model_of(arch), batch((tokens(8), 0, 0), logits="last")

    def step() -> None:
        token = far()
        with model.context(**SMALL) as context, deadline_at(30):
            assert cancelled(context, rows, token) is not None

    _stays_flat(step, 1000)


def test_contexts_leave_none_of_their_threads(model_of: Callable[[str], lc.Model]) -> None:
    rows = batch((tokens(8), 0, 0), logits="last")

    def step() -> None:
        with model_of("llama").context(**{**SMALL, "n_threads": 2}) as context:
            context.decode(rows, lc.CancelToken())

    _stays_flat(step, 20, 5)


@pytest.mark.slow
@pytest.mark.parametrize("arch", GENERATIVE)
def test_memory_stays_flat_over_a_thousand_cancelled_decodes(arch: str, new_context: NewContext) -> None:
    context = new_context(arch, **SMALL, n_seq_max=2)
    past = batch((tokens(16), 0, 0), logits="last")
    rows = batch((tokens(10), 16, 0), (tokens(6), 0, 1), logits="last")
    context.decode(past)
    token = far()
    whole = readings_of(lambda: context.decode(rows, token))
    context.memory.clear()
    context.decode(past)
    turns = itertools.count()

    def step() -> None:
        turn, token = next(turns), far()
        with deadline_at(1 + turn % (whole * 9 // 10)):
            error = cancelled(context, rows, token, on_cancel="keep" if turn % 4 == 3 else "rollback")
        assert error is not None
        if error.rows_done:
            context.memory.clear()
            context.decode(past)

    _stays_flat(step, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("arch", GENERATIVE)
def test_memory_stays_flat_over_a_thousand_saves_and_loads_of_a_state(
    arch: str, new_context: NewContext, tmp_path: Path
) -> None:
    context = new_context(arch, **SMALL, n_seq_max=2)
    decode(context, batch((tokens(100), 0, 0)))
    turns = itertools.count()

    def step() -> None:
        context.state.load(1, context.state.save(0), far())
        turn = next(turns)
        if turn % 10 == 0:
            context.state.save_file(tmp_path / "state")
            context.state.load_file(tmp_path / "state", 1)
        for token in (dead(), lc.CancelToken(timeout=0)):
            with pytest.raises(lc.DecodeCancelled):
                context.state.save(0, token)

    _stays_flat(step, 1000)


@pytest.mark.slow
def test_memory_stays_flat_over_a_hundred_thousand_tokens() -> None:
    root = lc.CancelToken()

    def step() -> None:
        token = lc.CancelToken.any_of(root.child(timeout=1000), lc.CancelToken())
        token.add_callback(lambda token=token: token)
        token.child().cancel()

    _stays_flat(step, 100_000, 5000)


def test_memory_stays_flat_over_adapters_that_are_dropped(model_of: Callable[[str], lc.Model], tmp_path: Path) -> None:
    model = model_of("llama")
    path = make_lora(tmp_path / "lora.gguf", model.path, rank=64)
    _stays_flat(lambda: model.load_lora(path), 400)


def test_threads_of_tokens_do_not_add_up() -> None:
    before = threading.active_count()
    for _ in range(200):
        token = lc.CancelToken(timeout=0.001)
        token.add_callback(lambda: None)
        assert token.wait(30)
    assert threading.active_count() <= before + 1
