"""The official JSON-Schema-Test-Suite: what is taken is judged as JSON Schema says, the rest is refused in words."""

from __future__ import annotations

import pytest

from tests.unit import schema_suite

# Schemas taken, instances under them judged rightly: what is so with llguidance 1.9.1, from which nothing may be lost.
TAKEN = {"draft7": (156, 528), "draft2020-12": (157, 551)}


@pytest.fixture(scope="module", params=schema_suite.DRAFTS)
def draft(request: pytest.FixtureRequest) -> tuple[str, schema_suite.Shares]:
    try:
        return request.param, schema_suite.shares_of(request.param)
    except schema_suite.MissingSuiteError as error:
        pytest.skip(f"the JSON-Schema-Test-Suite cannot be brought: {error}")


def test_no_invalid_instance_is_accepted(draft: tuple[str, schema_suite.Shares]) -> None:
    assert draft[1].invalid_accepted == []


def test_as_many_schemas_and_instances_are_taken_as_ever(draft: tuple[str, schema_suite.Shares]) -> None:
    name, shares = draft
    assert (shares.schemas["taken"], shares.instances["right"]) >= TAKEN[name]
    assert shares.instances["right"] >= TAKEN[name][1]
