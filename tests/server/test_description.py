"""The server does what its own OpenAPI description says, also with requests that nobody would write by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from .served import Served, serving

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]
ENDLESS = {"/events"}
EXAMPLES = 12


@pytest.fixture(scope="module")
def described(model_of: Any) -> Iterator[Served]:
    """A server whose answers never get long."""
    with serving(model_of("llama"), n_ctx=256, slots=4, app={"request_timeout": 20.0}) as served:
        yield served


def operations(served: Served) -> Any:
    config = schemathesis.Config()
    schema = schemathesis.openapi.from_dict(served.get("/openapi.json").json(), config=config)
    schema.config.update(base_url=served.url)
    return schema


def test_the_description_names_every_endpoint(described: Served) -> None:
    paths = described.get("/openapi.json").json()["paths"]
    named = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert named == {
        "POST /v1/completions",
        "POST /v1/chat/completions",
        "POST /v1/embeddings",
        "GET /v1/models",
        "GET /v1/models/{model}",
        "DELETE /v1/requests/{request_id}",
        "POST /tokenize",
        "POST /detokenize",
        "GET /health",
        "GET /metrics",
        "GET /slots",
        "GET /events",
    }
    assert not any("422" in operation["responses"] for methods in paths.values() for operation in methods.values())


@pytest.mark.parametrize(
    "operation",
    [
        "POST /v1/completions",
        "POST /v1/chat/completions",
        "POST /v1/embeddings",
        "GET /v1/models",
        "GET /v1/models/{model}",
        "DELETE /v1/requests/{request_id}",
        "POST /tokenize",
        "POST /detokenize",
        "GET /health",
        "GET /metrics",
        "GET /slots",
    ],
)
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_an_endpoint_answers_as_described(described: Served, operation: str, mode: str) -> None:
    method, path = operation.split(" ")
    found = operations(described)[path][method]
    generation = schemathesis.GenerationMode.POSITIVE if mode == "positive" else schemathesis.GenerationMode.NEGATIVE

    @hypothesis.settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=found.as_strategy(generation_mode=generation))
    def ask(case: Any) -> None:
        case.call_and_validate(checks=CHECKS, timeout=60)

    try:
        ask()
    except hypothesis.errors.Unsatisfiable:
        assert mode == "negative", "there is always a right request"
    described.wait_idle()
