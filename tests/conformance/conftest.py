"""Runs the suite against a fake server in virtual time."""

from __future__ import annotations

import pytest

pytest.importorskip("h11", reason="the suite's client needs it")
