"""Embeddings: through the same queue, and as easy to cancel."""

from __future__ import annotations

import base64
import socket
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llamacancel as lc

from .served import Served, any_step, eventually, new_id, serving

PATH = "/v1/embeddings"


def vectors_of(body: Any) -> np.ndarray:
    return np.array([item["embedding"] for item in body["data"]], np.float32)


def test_every_input_gets_a_vector_of_length_one(served: Served) -> None:
    texts = ["One text", "Another text"]
    body = served.post(PATH, {"input": texts, "model": "text-embedding-3-small"}).json()
    assert body["object"] == "list"
    assert body["model"] == served.service.model_name
    assert [item["index"] for item in body["data"]] == [0, 1]
    vectors = vectors_of(body)
    assert vectors.shape == (2, served.engine.model.n_embd)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert not np.allclose(vectors[0], vectors[1], atol=1e-3)
    n_tokens = sum(len(served.engine.model.tokenize(text)) for text in texts)
    assert body["usage"] == {"prompt_tokens": n_tokens, "total_tokens": n_tokens}


def test_an_input_is_text_texts_tokens_or_lists_of_tokens(served: Served) -> None:
    tokens = served.engine.model.tokenize("One text").tolist()
    expected = vectors_of(served.post(PATH, {"input": "One text"}).json())
    for given in (["One text"], tokens, [tokens]):
        assert np.allclose(vectors_of(served.post(PATH, {"input": given}).json()), expected, atol=1e-4)


def test_base64_is_the_same_vector(llama: Served) -> None:
    expected = vectors_of(llama.post(PATH, {"input": "One text"}).json())[0]
    item = llama.post(PATH, {"input": "One text", "encoding_format": "base64"}).json()["data"][0]
    assert np.allclose(np.frombuffer(base64.b64decode(item["embedding"]), "<f4"), expected, atol=1e-5)


def test_an_encoder_embeds_and_generates_nothing(model_of: Any) -> None:
    with serving(model_of("embedding")) as served:
        vectors = vectors_of(served.post(PATH, {"input": ["One text", "Another"]}).json())
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        refused = served.post("/v1/completions", {"prompt": "Go on"})
        assert refused.status_code == 400
        assert "encoder" in refused.json()["error"]["message"]


def test_a_model_that_ranks_gives_no_embeddings(model_of: Any, model_path: Any, tmp_path: Path) -> None:
    written = model_path("embedding").read_bytes()
    key = b"bert.pooling_type" + struct.pack("<I", 4)  # a uint32
    assert written.count(key + struct.pack("<I", 1)) == 1
    ranking = tmp_path / "ranking.gguf"
    ranking.write_bytes(written.replace(key + struct.pack("<I", 1), key + struct.pack("<I", 4)))
    with lc.Model.load(ranking) as model, lc.Engine(model) as engine:
        assert engine.ranks
    with lc.Engine(model_of("embedding")) as engine:
        assert not engine.ranks
    with serving(model_of("embedding"), pooling="rank") as served:
        refused = served.post(PATH, {"input": "One text"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "no_embeddings")
    assert "ranks" in refused.json()["error"]["message"]


def test_a_vector_with_nan_is_an_error_and_no_answer(llama: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: lc.Embedding, timeout: float | None = None) -> np.ndarray:
        return np.array([1.0, np.nan], np.float32)

    monkeypatch.setattr(lc.Embedding, "result", broken)
    failed = llama.post(PATH, {"input": ["One text", "Another"]})
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "not_finite")
    assert "input 0" in failed.json()["error"]["message"]


@pytest.mark.parametrize("as_base64", [False, True], ids=["float", "base64"])
def test_fewer_dimensions_are_the_first_ones_again_of_length_one(llama: Served, as_base64: bool) -> None:
    n_embd = llama.engine.model.n_embd
    whole = vectors_of(llama.post(PATH, {"input": "One text"}).json())[0]
    for n in (1, n_embd // 2, n_embd):
        body = {"input": "One text", "dimensions": n, **({"encoding_format": "base64"} if as_base64 else {})}
        given = llama.post(PATH, body).json()["data"][0]["embedding"]
        vector = np.frombuffer(base64.b64decode(given), "<f4") if as_base64 else np.array(given, np.float32)
        assert vector.shape == (n,)
        assert np.allclose(vector, whole[:n] / np.linalg.norm(whole[:n]), atol=1e-5)


def test_more_dimensions_than_there_are_are_refused(llama: Served) -> None:
    refused = llama.post(PATH, {"input": "x", "dimensions": llama.engine.model.n_embd + 1})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "dimensions")


def test_an_input_that_is_too_long_is_refused(llama: Served) -> None:
    refused = llama.post(PATH, {"input": [300] * 100_000})
    assert refused.status_code == 400
    assert "tokens" in refused.json()["error"]["message"]


def test_a_client_that_hangs_up_takes_its_inputs_along(served: Served) -> None:
    name = new_id("quitter")
    ids = [f"{name}.{index}" for index in range(served.engine.slots)]
    with served.held(any_step) as hold:
        busy = served.engine.submit("Something else", max_tokens=4)
        hold.wait()
        connection = served.send(PATH, {"input": ["a", "b", "c", "d", "e"]}, name)
        served.wait_known(*ids)
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()
        served.wait_noticed(name)
        hold.release()
        views = [served.wait_finished(each) for each in ids]
        assert busy.result(60).finish_reason in ("stop", "length")
    assert {view.finish_reason for view in views} == {"cancelled"}
    assert {view.kind for view in views} == {"embedding"}
    served.wait_idle()
    assert served.finished(f"{name}.{served.engine.slots}") is None, "the others are not begun"


def test_there_may_be_more_inputs_than_room_in_the_queue(served: Served) -> None:
    texts = [f"Text number {number}" for number in range(3 * served.engine.queue_limit)]
    body = served.post(PATH, {"input": texts}).json()
    one = served.post(PATH, {"input": texts[-1]}).json()
    assert [item["index"] for item in body["data"]] == list(range(len(texts)))
    assert np.allclose(vectors_of(body)[-1], vectors_of(one)[0], atol=1e-4)


def test_a_full_queue_refuses_a_request_and_only_holds_up_one_that_has_begun(llama: Served) -> None:
    answers: list[Any] = []

    def ask() -> None:
        answers.append(llama.post(PATH, {"input": ["a", "b", "c", "d"]}, headers={"X-Request-Id": name}))

    name = new_id("begun")
    with llama.held(any_step) as hold:
        busy = [llama.engine.submit("Something else", max_tokens=4)]
        hold.wait()
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        llama.wait_known(*(f"{name}.{index}" for index in range(llama.engine.slots)))
        while True:
            try:
                busy.append(llama.engine.submit("Something else", max_tokens=4))
            except lc.QueueFullError:
                break
        assert llama.post(PATH, {"input": "a"}).status_code == 429
        hold.release()
    asking.join(60)
    assert len(answers[0].json()["data"]) == 4
    for generation in busy:
        generation.result(60)


@pytest.mark.parametrize("way", ["deadline", "delete"])
def test_an_embedding_can_be_cancelled_by_time_and_by_name(llama: Served, way: str) -> None:
    name = new_id("named")
    answers: list[Any] = []
    with llama.held(any_step) as hold:
        busy = llama.engine.submit("Something else", max_tokens=4)
        hold.wait()
        body = {"input": "a", "timeout": 0.05} if way == "deadline" else {"input": "a"}
        asking = threading.Thread(
            target=lambda: answers.append(llama.post(PATH, body, headers={"X-Request-Id": name})), daemon=True
        )
        asking.start()
        if way == "delete":
            llama.wait_known(name)
            with llama.client() as client:
                assert client.delete(f"/v1/requests/{name}").status_code == 200
        eventually(lambda: llama.finished(name))
        hold.release()
        busy.result(60)
    asking.join(60)
    assert answers[0].status_code == (408 if way == "deadline" else 499)
