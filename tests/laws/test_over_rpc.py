"""The laws with models that are split over worker processes: llama.cpp's RPC backend, on the loopback.

Such a device is asynchronous: what was sent is computed to its end. So graphs are handed over in pieces, with looks at
the token between, and the memory that a cancelled call has touched lies in other processes when it is put back.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import llamacancel as lc
from tests.conftest import GENERATIVE

from . import test_pieces_of_a_graph as on_a_device
from .clock import GENEROUS, NEVER, Flight, deadline_at, readings_of
from .words import (
    ROOT,
    ModelPath,
    NewContext,
    batch,
    cancelled,
    cancelled_at,
    close,
    dead,
    decode,
    far,
    holds,
    one_more,
    run_python,
    same_bits,
    threads,
    tokens,
)
from .workers import Worker

pytestmark = pytest.mark.skipif(not lc.build_info()["rpc"], reason="this build has no RPC backend")

# How a model is spread: over how many workers, and how many of its layers.
PLACES = {"one worker": (1, -1), "two workers": (2, -1), "half on a worker": (1, 2)}
SPREAD = [
    *((arch, "two workers") for arch in GENERATIVE),
    *((arch, "half on a worker") for arch in ("llama", "swa", "hybrid")),
]
SOME = [("llama", "two workers"), ("swa", "half on a worker"), ("mamba", "half on a worker"), ("hybrid", "one worker")]

spread = pytest.mark.parametrize(("arch", "place"), SPREAD)
spread_a_little = pytest.mark.parametrize(("arch", "place"), SOME)


@pytest.fixture(scope="module")
def workers() -> Iterator[list[Worker]]:
    """Two workers that outlive the tests."""
    started = [Worker(), Worker()]
    yield started
    for worker in started:
        worker.kill()


@pytest.fixture(scope="module")
def model_at(workers: list[Worker], model_path: ModelPath) -> Iterator[Callable[[str, str], lc.Model]]:
    """A model of an architecture at one of PLACES, shared by all tests."""
    models: dict[tuple[str, str], lc.Model] = {}

    def load(arch: str, place: str) -> lc.Model:
        if (arch, place) not in models:
            n_workers, n_layers = PLACES[place]
            servers = [worker.endpoint for worker in workers[:n_workers]]
            models[arch, place] = lc.Model.load(model_path(arch), n_gpu_layers=n_layers, rpc_servers=servers)
        return models[arch, place]

    yield load
    for model in models.values():
        model.close()


@pytest.fixture
def place() -> str:
    """Where the test's models are, unless it says so itself."""
    return "two workers"


@pytest.fixture
def new_context(model_at: Callable[[str, str], lc.Model], place: str) -> Iterator[NewContext]:
    """Makes contexts of the models at the test's place, and closes them."""
    contexts: list[lc.Context] = []

    def make(arch: str, **params: object) -> lc.Context:
        settings: dict[str, object] = {"n_ctx": 512, "n_ubatch": 32, "n_threads": 1, "cancel_latency": None, **params}
        contexts.append(model_at(arch, place).context(**settings))
        return contexts[-1]

    yield make
    for context in contexts:
        context.close()


# ---- rollback, keep, neighbours: as on any device, and to the bit ----------------------------------------------


@spread
def test_a_cancel_between_any_two_pieces_is_rolled_back_to_the_bit(
    arch: str, place: str, new_context: NewContext
) -> None:
    on_a_device.test_a_cancel_between_any_two_pieces_is_rolled_back_to_the_bit(arch, 5, new_context)


@spread_a_little
def test_what_was_completed_can_be_kept_and_gone_on_from(arch: str, place: str, new_context: NewContext) -> None:
    on_a_device.test_what_was_completed_can_be_kept_and_gone_on_from(arch, new_context)


@pytest.mark.parametrize("arch", GENERATIVE)
@pytest.mark.parametrize("on_cancel", ["rollback", "keep"])
def test_neighbours_of_a_cancelled_sequence_keep_their_results(
    arch: str, on_cancel: str, new_context: NewContext
) -> None:
    on_a_device.test_neighbours_of_a_cancelled_sequence_keep_their_results(arch, on_cancel, new_context)


@spread_a_little
def test_pieces_do_not_change_the_bits(arch: str, place: str, new_context: NewContext) -> None:
    on_a_device.test_pieces_do_not_change_the_bits(arch, new_context)


@spread_a_little
def test_a_state_that_was_saved_can_be_gone_on_from(arch: str, place: str, new_context: NewContext) -> None:
    context, other = new_context(arch), new_context(arch)
    context.decode(batch((tokens(70), 0, 0)))
    other.state.load(0, context.state.save(0))
    assert other.memory.pos_max(0) == context.memory.pos_max(0) == 69
    assert close(one_more(other), one_more(context))


def test_v_that_lies_in_columns_is_put_back_to_the_bit(new_context: NewContext) -> None:
    def filled() -> lc.Context:
        context = new_context("swa", flash_attn=False, n_seq_max=2, _n_pieces=5)
        context.decode(on_a_device.HISTORY)
        return context

    wanted = decode(filled(), on_a_device.ROWS)
    context = filled()
    for at in (8, 14, 20):
        with deadline_at(at):
            assert cancelled(context, on_a_device.ROWS, far())
    assert same_bits(decode(context, on_a_device.ROWS), wanted)


# ---- scope, identity, truth -------------------------------------------------------------------------------------


def test_a_cancel_reaches_its_own_call_and_not_that_of_a_neighbour_on_the_same_workers(new_context: NewContext) -> None:
    rows = batch((tokens(90), 0, 0))
    wanted = decode(new_context("llama", _n_pieces=5), rows)
    hers, his = new_context("llama", _n_pieces=5), new_context("llama", _n_pieces=5)
    alice = far()
    flight = Flight(lambda: hers.decode(rows, alice), at=8)
    assert same_bits(decode(his, rows, far()), wanted)
    alice.cancel("she left")
    error = flight.lands()
    assert isinstance(error, lc.DecodeCancelled)
    assert (error.cause, error.reason, error.rows_done) == (lc.Cause.CLIENT, "she left", 0)
    assert error.latency >= 0
    assert {seq: outcome.state for seq, outcome in error.sequences.items()} == {0: "rolled_back"}
    assert same_bits(decode(hers, rows), wanted)


def test_a_dead_token_starts_no_work_and_a_late_cancel_finds_none(new_context: NewContext) -> None:
    context, twin = new_context("llama", _n_pieces=5), new_context("llama", _n_pieces=5)
    first, second = batch((tokens(40), 0, 0)), batch((tokens(40, seed=1), 40, 0))
    token = lc.CancelToken()
    assert same_bits(decode(context, first, token), decode(twin, first))
    token.cancel("too late")
    assert cancelled(context, second, dead()) is not None
    assert cancelled(context, second, token) is not None
    assert holds(context) == holds(twin)
    assert same_bits(decode(context, second, far()), decode(twin, second))


# ---- latency: the work is handed over in pieces, and not all at once --------------------------------------------


def test_a_worker_is_never_more_than_two_pieces_behind(workers: list[Worker], new_context: NewContext) -> None:
    rows = batch((tokens(256), 0, 0))
    context = new_context("llama", n_ubatch=256, _n_pieces=50)
    wanted = decode(context, rows)
    context.memory.clear()
    token = far()
    workers[0].stop()
    try:
        flight = Flight(lambda: context.decode(rows, token), at=NEVER)
        looks = -1
        while looks != flight.clock.readings:  # until the call waits for the worker
            looks = flight.clock.readings
            time.sleep(0.2)
        assert flight.thread.is_alive()
        assert looks < 20
        token.cancel()
    finally:
        workers[0].go_on()
    assert isinstance(flight.lands(), lc.DecodeCancelled)
    assert same_bits(decode(context, rows), wanted)


def test_a_context_plans_pieces_only_where_a_worker_needs_them(new_context: NewContext) -> None:
    assert new_context("llama", cancel_latency=3600).latency_plan.n_pieces == 0
    plan = new_context("llama", n_ubatch=512, cancel_latency=1e-4).latency_plan
    assert plan.n_pieces > 1
    assert plan.n_ubatch == 512


# ---- several contexts on one worker -----------------------------------------------------------------------------


def test_threads_that_share_workers_get_the_bits_that_they_get_alone(new_context: NewContext) -> None:
    def generate(context: lc.Context, seed: int) -> np.ndarray:
        context.decode(batch((tokens(8, seed), 0, 0)))
        return np.stack([decode(context, batch(([100 + i], 8 + i, 0))) for i in range(24)])

    alone = [generate(new_context("llama"), seed) for seed in range(3)]
    contexts = [new_context("llama") for _ in alone]
    together: dict[int, np.ndarray] = {}
    with threads(*(lambda seed=seed: together.update({seed: generate(contexts[seed], seed)}) for seed in range(3))):
        pass
    assert all(same_bits(together[seed], alone[seed]) for seed in range(3))


def test_closing_a_context_leaves_the_others_on_its_worker_alone(new_context: NewContext) -> None:
    alone, context = new_context("llama"), new_context("llama")
    ones = [batch(([300 + i], i, 0)) for i in range(9)]
    wanted = [decode(alone, one) for one in ones]
    for i, one in enumerate(ones):
        if i % 3 == 2:
            new_context("llama").close()
        assert same_bits(decode(context, one), wanted[i])


def test_a_single_token_is_handed_over_in_pieces_where_it_takes_longer_than_it_may(new_context: NewContext) -> None:
    patient, hasty = new_context("llama", cancel_latency=60), new_context("llama", cancel_latency=1e-4)
    assert patient.latency_plan.n_pieces_of_one == 0
    n_pieces = hasty.latency_plan.n_pieces_of_one
    assert n_pieces > 2
    for context in (patient, hasty):
        decode(context, batch((tokens(20), 0, 0)))
    one = batch(([400], 20, 0))
    error = cancelled_at(hasty, one, n_pieces // 2)
    assert (error.rows_done, holds(hasty)[0][1]) == (0, 19)
    looks = [readings_of(lambda context=context: context.decode(one, far())) for context in (patient, hasty)]
    assert looks[1] - looks[0] > n_pieces // 2, "looks between pieces"
    assert same_bits(patient.logits(), hasty.logits())


# ---- loading ----------------------------------------------------------------------------------------------------


def load(model_path: ModelPath, *endpoints: object, **params: object) -> lc.Model:
    settings: dict[str, object] = {"n_gpu_layers": -1, **params}
    return lc.Model.load(model_path("llama"), rpc_servers=endpoints, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("endpoint", "kind"),
    [
        ("", ValueError),
        ("localhost", ValueError),
        (":50052", ValueError),
        ("localhost:", ValueError),
        ("localhost:no", ValueError),
        ("localhost:0", ValueError),
        ("localhost:65536", ValueError),
        ("a host:50052", ValueError),
        ("[::1]:50052", ValueError),
        ("a\0b:50052", ValueError),
        (50052, TypeError),
    ],
)
def test_what_is_no_endpoint_is_refused_by_name(endpoint: object, kind: type[Exception], model_path: ModelPath) -> None:
    with pytest.raises(kind, match="rpc_servers"):
        load(model_path, endpoint)


def test_workers_that_would_get_no_layers_are_refused(model_path: ModelPath) -> None:
    with pytest.raises(ValueError, match="n_gpu_layers is 0"):
        load(model_path, "127.0.0.1:50052", n_gpu_layers=0)
    with pytest.raises(TypeError, match="rpc_servers must be a sequence"):
        lc.Model.load(model_path("llama"), n_gpu_layers=-1, rpc_servers="127.0.0.1:50052")


@contextmanager
def listener(answer: bytes | None) -> Iterator[str]:
    """Somebody who is no worker: gives everyone the same answer and hangs up; None: says nothing, and stays."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    client = server.accept()[0]
                except OSError:
                    return
                held.append(client)
                if answer is not None:
                    client.recv(64)
                    client.sendall(answer)
                    client.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        for client in held:
            client.close()


def test_an_endpoint_where_nobody_listens_is_named(model_path: ModelPath) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(lc.ModelLoadError, match=f"RPC server {endpoint}: Connection refused"):
        load(model_path, endpoint)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"", "hung up"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak"),
        ((28).to_bytes(8, "little") + bytes([1, 0, 0, 0]) + bytes(24), "speaks version 1.0"),
    ],
)
def test_who_is_no_worker_is_told_apart(answer: bytes, says: str, model_path: ModelPath) -> None:
    with listener(answer) as endpoint, pytest.raises(lc.ModelLoadError, match=f"RPC server {endpoint}: .*{says}"):
        load(model_path, endpoint)


def test_a_deadline_ends_the_wait_for_who_says_nothing(model_path: ModelPath) -> None:
    with listener(None) as endpoint, pytest.raises(lc.LoadDeadlineExceeded):
        load(model_path, endpoint, token=lc.CancelToken(timeout=0.1))


def test_a_server_that_is_not_reached_leaves_no_socket_open(model_path: ModelPath) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"127.0.0.1:{free.getsockname()[1]}"

    def fail() -> None:
        with pytest.raises(lc.ModelLoadError):
            load(model_path, nobody)
        with listener(b"no") as endpoint, pytest.raises(lc.ModelLoadError):
            load(model_path, endpoint)
        with listener(None) as endpoint, pytest.raises(lc.LoadCancelled):
            load(model_path, endpoint, token=lc.CancelToken(timeout=0.02))

    fail()  # what the first one needs may stay
    before = os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else os.listdir("/dev/fd")
    for _ in range(10):
        fail()
    assert len(os.listdir("/proc/self/fd" if os.path.exists("/proc/self/fd") else "/dev/fd")) <= len(before) + 1


def test_a_name_that_is_never_resolved_holds_up_nobody_else(model_path: ModelPath, tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler")
    library, source = tmp_path / "names.so", Path(__file__).with_name("names.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    ran = run_python(
        """
        import os, socket, sys, threading
        import llamacancel as lc

        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]

        def load(host, token=None):
            try:
                lc.Model.load(sys.argv[1], n_gpu_layers=-1, rpc_servers=[f"{host}:{port}"], token=token)
            except lc.LlamaCancelError as error:
                return type(error).__name__

        def count():
            return len(os.listdir("/proc/self/task"))

        waiting = lc.CancelToken()
        first = threading.Thread(target=load, args=("silent.invalid", waiting))
        threads = count()
        first.start()
        while count() < threads + 2:
            pass
        print(load("127.0.0.1"))
        for _ in range(20):
            print(load("silent.invalid", lc.CancelToken(timeout=0.02)))
        waiting.cancel()
        first.join()
        print(count() <= threads + 8)
        """.replace("\n        ", "\n"),
        args=[str(model_path("llama"))],
        env={"LD_PRELOAD": str(library)},
    )
    assert ran.stdout.split() == ["ModelLoadError", *["LoadDeadlineExceeded"] * 20, "True"], ran.stderr
    assert ran.returncode == 0


def test_a_cancelled_load_leaves_the_workers_to_the_next_one(workers: list[Worker], model_path: ModelPath) -> None:
    token = lc.CancelToken()
    endpoints = [worker.endpoint for worker in workers]
    with pytest.raises(lc.LoadCancelled):
        load(model_path, *endpoints, token=token, progress=lambda share: share > 0.3 and token.cancel())
    with load(model_path, *endpoints, *endpoints) as model, model.context(n_ctx=64, n_threads=1) as context:
        assert np.isfinite(decode(context, batch((tokens(5), 0, 0)))).all()


def test_a_worker_listens_for_this_machine_only_unless_told_otherwise_and_says_so() -> None:
    worker = Worker()
    assert worker.port
    assert "127.0.0.1" in worker.said
    assert "for this machine only" in worker.said
    worker.kill()


def test_a_worker_ends_cleanly_at_ctrl_c_and_says_why_it_cannot_listen(workers: list[Worker]) -> None:
    command = [sys.executable, "-m", "llamacancel", "rpc-server", "--port"]
    told = subprocess.run([*command, str(workers[0].port)], cwd=ROOT, capture_output=True, text=True, timeout=GENEROUS)
    assert told.returncode == 1
    assert f"cannot listen on 127.0.0.1:{workers[0].port}" in told.stderr
    worker = Worker()
    assert worker.port
    worker.process.send_signal(signal.SIGINT)
    assert worker.ended() == 0


# ---- a worker that dies -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deaths(model_path: ModelPath) -> dict[str, str]:
    """What a process tells that loses a worker in each phase of its work; it has to live through all of them."""
    for arch in ("llama", "mamba"):
        model_path(arch)
    ran = run_python("from tests.laws.lost_workers import main; main()", timeout=2 * GENEROUS)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr[-4000:]}"
    return dict(line.split("\t", 1) for line in ran.stdout.splitlines() if "\t" in line)


@pytest.mark.parametrize(
    ("phase", "kind"),
    [
        ("while the model is loaded", "ModelLoadError"),
        ("before a context is made", "ContextError"),
        ("in the middle of a decode", "DecodeFailedError"),
        ("between two decodes", "DecodeFailedError"),
        ("in the middle of the repair", "DecodeFailedError"),
        ("before a recurrent state is snapshot", "DecodeFailedError"),
        ("while a state is saved", "DecodeFailedError"),
        ("while a state is loaded", "DecodeFailedError"),
        ("while a state is loaded where there was none", "DecodeFailedError"),
        ("while the memory is cleared", "DecodeFailedError"),
        ("while an engine generates", "ClosedError"),
        ("after an engine has failed", "ClosedError"),
    ],
)
def test_the_loss_of_a_worker_is_an_exception_that_names_it(phase: str, kind: str, deaths: dict[str, str]) -> None:
    assert deaths[phase].startswith(f"{kind}: ")
    assert "the connection to the RPC server 127.0.0.1:" in deaths[phase]
    assert "was lost" in deaths[phase]


@pytest.mark.parametrize("what", ["who did not use the worker goes on", "a worker that was started again is used"])
def test_the_loss_of_a_worker_is_not_the_end(what: str, deaths: dict[str, str]) -> None:
    assert deaths[what] == "same bits"
