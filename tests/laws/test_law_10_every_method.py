"""Law 10, lifetime: no public method of a closed object does anything, and nothing grows."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE

from .words import batch, cancelled, dead, decode, one_more, run_python, same_bits, tokens

NewContext = Callable[..., lc.Context]
ModelPath = Callable[[str], Path]
SMALL: dict[str, Any] = {"n_ctx": 256, "n_ubatch": 8, "n_threads": 1}
BOUND = 30 << 20

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
    "State.save_file": (os.devnull + "/nowhere",),
}


def test_every_public_method_and_property_of_a_closed_object_says_that_it_is_closed(
    model_path: ModelPath, tmp_path: Path
) -> None:
    model = lc.Model.load(model_path("llama"))
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
            with pytest.raises(lc.ClosedError):
                value = getattr(thing, name)
                value(*given.get(f"{type(thing).__name__}.{name}", ()))
        assert repr(thing)
    assert len(seen) > 40
    for thing in (model, context):
        assert thing.closed
        thing.close()


def _grown(work: Callable[[], object], times: int, warm: int = 50) -> tuple[int, int]:
    """Bytes and threads that the process has gained by doing `work` so many times."""
    process = psutil.Process()
    for _ in range(warm):
        work()
    gc.collect()
    memory, n = process.memory_info().rss, process.num_threads()
    for _ in range(times):
        work()
    gc.collect()
    return process.memory_info().rss - memory, process.num_threads() - n


def _stays_flat(work: Callable[[], object], times: int, warm: int = 50) -> None:
    grown, threads = _grown(work, times, warm)
    assert grown < BOUND
    assert threads <= 0


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_thousand_saves_and_loads_of_a_state_leave_nothing(arch: str, new_context: NewContext, tmp_path: Path) -> None:
    context = new_context(arch, **SMALL, n_seq_max=2)
    decode(context, batch((tokens(100), 0, 0)))

    def work() -> None:
        context.state.load(1, context.state.save(0), lc.CancelToken(timeout=60))

    _stays_flat(work, 1000)
    _stays_flat(lambda: (context.state.save_file(tmp_path / "s"), context.state.load_file(tmp_path / "s", 1)), 100)


@pytest.mark.parametrize("arch", GENERATIVE)
def test_a_thousand_contexts_and_cancelled_decodes_start_no_threads_that_stay(
    arch: str, model_of: Callable[[str], lc.Model]
) -> None:
    rows = batch((tokens(32), 0, 0))

    def work() -> None:
        with model_of(arch).context(n_ctx=256, n_ubatch=8, n_threads=2) as context:
            cancelled(context, rows, lc.CancelToken(timeout=0.0005))

    _stays_flat(work, 1000 if arch == "llama" else 200)


def test_a_thousand_cancelled_saves_leave_nothing(new_context: NewContext) -> None:
    context = new_context("hybrid", **SMALL)
    decode(context, batch((tokens(100), 0, 0)))

    def work() -> None:
        for token in (dead(), lc.CancelToken(timeout=0)):
            with pytest.raises(lc.DecodeCancelled):
                context.state.save(0, token)

    _stays_flat(work, 1000)


@pytest.mark.slow
def test_loads_leave_nothing(model_path: ModelPath) -> None:
    _stays_flat(lambda: lc.Model.load(model_path("llama")).close(), 200, 10)


@pytest.mark.parametrize("daemon", [True, False])
@pytest.mark.parametrize("end", ["pass", "raise SystemExit(0)", "del context, model"])
def test_an_exit_in_the_middle_of_a_decode_is_quick_and_silent(daemon: bool, end: str, model_path: ModelPath) -> None:
    ran = run_python(f"""
import sys, threading, time
import llamacancel as lc
from tests.laws.words import batch, tokens
model = lc.Model.load(sys.argv[1])
context = model.context(n_ctx=4096, n_batch=4096, n_ubatch=8, n_threads=1)
work = context.decode
thread = threading.Thread(target=lambda: work(batch((tokens(4000), 0, 0), logits="none")), daemon={daemon})
thread.start()
time.sleep(0.05)
{end}
""", args=[str(model_path("llama"))])
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_a_context_outlives_the_last_name_of_its_model(model_path: ModelPath, new_context: NewContext) -> None:
    model = lc.Model.load(model_path("llama"))
    with model.context(n_ctx=1024, n_ubatch=32, n_threads=1) as context:
        model.close()
        del model
        gc.collect()
        rows = batch((tokens(40), 0, 0))
        twin = new_context("llama")
        assert same_bits(decode(context, rows), decode(twin, rows))
        assert same_bits(one_more(context), one_more(twin))


def test_threads_of_tokens_do_not_add_up() -> None:
    before = threading.active_count()
    for _ in range(200):
        token = lc.CancelToken(timeout=0.001)
        token.add_callback(lambda: None)
        assert token.wait(30)
    assert threading.active_count() <= before + 1
