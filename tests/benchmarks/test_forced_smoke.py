"""The benchmark of forced tokens runs from end to end. No time is asserted."""

from __future__ import annotations

import pytest

from benchmarks.forced import CONSTRAINTS, main
from llamacancel.commands.make_model import cached_model


def test_it_prints_a_row_for_each_constraint_and_number_of_slots(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(cached_model("llama", "tiny", quant="f32")), "--threads", "1", "--pairs", "2"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 2 * len(CONSTRAINTS)
    for row in rows:
        same, texts = row.split("|")[-2].split(" of ")
        assert 0 <= int(same) <= int(texts) > 0
