"""The programs in docs/examples run as they stand."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from .served import eventually
from .test_embedding_in_apps import running

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def test_threads_share_an_engine_and_one_of_them_changes_its_mind(model_path: Callable[[str], Path]) -> None:
    ran = subprocess.run(
        [sys.executable, EXAMPLES / "threads.py", model_path("llama")], capture_output=True, text=True, timeout=280
    )
    assert ran.returncode == 0, ran.stderr
    told = dict(line.split(": ", 1) for line in ran.stdout.splitlines())
    assert set(told) == {"Ada", "Bob", "Cyd"}
    assert told["Bob"].startswith("cancelled, Bob has changed his mind, after ")
    assert all(told[name].startswith(("'", '"')) for name in ("Ada", "Cyd"))


@pytest.fixture
def app(model_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The FastAPI example, and its address."""
    monkeypatch.setenv("MODEL", str(model_path("llama")))
    spec = importlib.util.spec_from_file_location("fastapi_app", EXAMPLES / "fastapi_app.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with running(module.app) as url:
        yield module.app, url


def test_a_fastapi_app_with_an_engine_answers_streams_and_notices_who_hangs_up(app: Any) -> None:
    fastapi, url = app
    whole = httpx.post(f"{url}/continue", content="Once upon a time", timeout=120)
    assert whole.status_code == 200
    assert isinstance(whole.json(), str)
    streamed = httpx.post(f"{url}/stream", content="Once upon a time", timeout=120)
    assert streamed.status_code == 200
    assert httpx.post(f"{url}/continue", content="word " * 20_000, timeout=120).status_code == 413

    engine = fastapi.state.engine
    for path in ("continue", "stream"):
        before = len(engine.snapshot().recent)
        for timeout in (0.1, 0.03, 0.01, 0.003, 0.001):  # until one of them is too short for the answer
            with contextlib.suppress(httpx.ReadTimeout):
                text = f"{path} {timeout}: " + "Once more. " * 400  # another beginning each time: nothing is cached
                httpx.post(f"{url}/{path}", content=text, timeout=httpx.Timeout(120, read=timeout))
            eventually(lambda: not engine.snapshot().active and not engine.snapshot().queue)
            if any(request.finish_reason == "cancelled" for request in engine.snapshot().recent[before:]):
                break
        else:
            raise AssertionError("nobody hung up before the answer was there")
