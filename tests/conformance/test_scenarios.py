"""The suite is proven both ways: a right server passes every scenario, and each scenario has servers that fail it."""

from __future__ import annotations

import pytest

from llamacancel.conformance.results import FAILED, PASSED, UNJUDGED, Report
from llamacancel.conformance.scenarios import SCENARIOS

from . import fakes
from .suite import report_of, result_of

ACTIVE = ["prefill-hang-up-streaming", "prefill-hang-up", "generation-hang-up-streaming", "generation-hang-up"]

# Which server fails which scenario, and what the reason says.
BUGS: list[tuple[type[fakes.Server], str, str]] = [
    (fakes.GlobalFlag, "queued-hang-up", "'active 1' got no whole answer"),
    *((fakes.KillsNeighbours, name, "'survivor' got no whole answer") for name in ACTIVE),
    *((fakes.DamagesNeighbours, name, "answer of 'survivor' differs") for name in ACTIVE),
    (fakes.ForgetsNeighbours, "generation-hang-up", "then nothing more came"),
    (fakes.EndsNeighboursAsIfComplete, "prefill-hang-up", "cut short"),
    (fakes.KillsPrefills, "hang-up-beside-prefill", "'survivor' got no whole answer"),
    (fakes.DamagesNeighbours, "hang-up-beside-prefill", "answer of 'survivor' differs"),
    (fakes.KillsNeighbours, "hang-ups-in-a-burst", "'survivor' got no whole answer"),
    (fakes.LosesSlotsInTheQueue, "hang-ups-in-a-burst", "1 requests were worked on at once instead of 2"),
    (fakes.LateCancel, "hang-up-in-the-last-token", "'next 1' got no whole answer"),
    (fakes.WrongRetry, "retry-answer", "answer of 'asks again later' differs"),
    (fakes.WrongRetryOneSlot, "retry-answer", "answer of 'asks again' differs"),
    (fakes.ForgetsPrefixes, "retry-prefix", "computed anew"),
    (fakes.IgnoresHangUps, "slot-freed", "the next client waited"),
    (fakes.LyingDeadline, "deadline", "says that it ended as 'length'"),
    (fakes.LateDeadline, "deadline", "ended a prefill after"),
    (fakes.DeadlineForAll, "deadline", "was cut short"),
    (fakes.HangsHalfClosed, "half-closed", "neither answers nor closes"),
    (fakes.KillsNeighbours, "half-closed", "'survivor' got no whole answer"),
    (fakes.OneWriter, "stopped-reading", "'survivor' was not answered"),
    (fakes.CancelsByPlace, "cancel-by-id", "'next' was cut short"),
    (fakes.CancelsNothing, "cancel-by-id", "did nothing"),
    (fakes.LyingCancel, "cancel-by-id", "says that it ended as 'stop'"),
    (fakes.KillsNeighbours, "random-rounds", "got no whole answer"),
    (fakes.WearsOut, "random-rounds", "afterwards, the answer of 'a client' differs"),
]


@pytest.fixture(scope="module")
def right() -> Report:
    return report_of(fakes.Server)


def test_a_right_server_passes_everything(right: Report) -> None:
    assert [(result.name, result.outcome, result.why) for result in right.results] == [
        (name, PASSED, "") for name in SCENARIOS
    ]


def test_a_right_servers_survivors_were_compared_to_the_letter(right: Report) -> None:
    compared = {result.name: result.figures.get("compared") for result in right.results}
    assert {name for name, how in compared.items() if how == "to the letter"} == SCENARIOS.keys() - {
        "retry-prefix",
        "slot-freed",
    }


def test_every_scenario_leaves_its_clients_for_the_picture(right: Report) -> None:
    for result in right.results:
        assert result.lanes, result.name
        if result.name not in ("cancel-by-id", "deadline", "half-closed"):
            assert any(kind == "hang-up" for lane in result.lanes for kind, _, _ in lane.marks), result.name


def test_the_servers_own_speed_and_slots_were_found(right: Report) -> None:
    assert right.profile["slots"] == 2
    assert right.profile["tokens per second"] == pytest.approx(1 / fakes.TOKEN, rel=0.1)
    assert right.profile["prompt words per second"] == pytest.approx(1 / fakes.WORD, rel=0.3)
    assert right.repeats == {"alone": True, "side by side": True}


@pytest.mark.parametrize(("kind", "name", "why"), BUGS, ids=lambda value: getattr(value, "__name__", None))
def test_a_server_with_the_bug_fails(kind: type[fakes.Server], name: str, why: str) -> None:
    result = result_of(kind, name, known=True)
    assert result.outcome == FAILED
    assert why in result.why


def test_every_scenario_has_a_server_that_fails_it() -> None:
    assert {name for _, name, _ in BUGS} == SCENARIOS.keys()


def test_a_server_that_dies_fails_once_and_is_judged_no_further() -> None:
    report = report_of(fakes.Dies, ["prefill-hang-up", "queued-hang-up", "random-rounds"])
    assert [result.outcome for result in report.results] == [FAILED, UNJUDGED, UNJUDGED]
    assert "answered no more after prefill-hang-up" in report.results[-1].why


@pytest.mark.parametrize(
    ("kind", "name", "why"),
    [
        *((fakes.OneSlot, name, "one request at a time") for name in [*ACTIVE, "hang-up-beside-prefill"]),
        (fakes.ManySlots, "queued-hang-up", "no queue was met"),
        (fakes.ManySlots, "slot-freed", "no slot to wait for"),
        (fakes.TurnsAway, "queued-hang-up", "turns clients away"),
        (fakes.Plain, "deadline", "ignores `timeout`"),
        (fakes.Strict, "deadline", "refuses `timeout`"),
        (fakes.Plain, "cancel-by-id", "no X-Request-Id"),
        (fakes.NoDelete, "cancel-by-id", "HTTP 404"),
        (fakes.KeepsNoPrefix, "retry-prefix", "keeps no prefix of a finished request either"),
        (fakes.CutsOffUndisturbed, "prefill-hang-up", "already without any hang-up"),
        (fakes.PrefillsInNoTime, "prefill-hang-up-streaming", "no prefill is long enough"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_cannot_be_judged_is_said_to_be_so(kind: type[fakes.Server], name: str, why: str) -> None:
    result = result_of(kind, name)
    assert result.outcome == UNJUDGED
    assert why in result.why


def test_a_server_with_one_slot_is_judged_by_what_it_has() -> None:
    report = report_of(fakes.OneSlot)
    assert report.profile["slots"] == 1
    assert {result.name for result in report.results if result.outcome == PASSED} == SCENARIOS.keys() - {
        *ACTIVE,
        "hang-up-beside-prefill",
    }


@pytest.mark.parametrize("kind", [fakes.NeverTheSame, fakes.DependsOnNeighbours])
@pytest.mark.parametrize("name", ["prefill-hang-up", "random-rounds"])
def test_answers_that_differ_undisturbed_are_compared_by_length(kind: type[fakes.Server], name: str) -> None:
    result = result_of(kind, name)
    assert result.outcome == PASSED
    assert result.figures["compared"].startswith("by length")


def test_answers_that_are_all_as_some_undisturbed_ones_are_said_to_be_so() -> None:
    result = result_of(fakes.DependsOnNeighbours, "queued-hang-up")
    assert result.outcome == PASSED
    assert result.figures["compared"] == "to the letter, though undisturbed answers differ among themselves"


def test_a_survivor_that_is_cut_short_fails_where_answers_are_compared_by_length_too() -> None:
    class Both(fakes.NeverTheSame, fakes.EndsNeighboursAsIfComplete):
        """Both."""

    result = result_of(Both, "generation-hang-up")
    assert result.outcome == FAILED
    assert "cut short" in result.why


def test_an_answer_that_differs_by_chance_only_is_not_blamed_on_the_hang_up() -> None:
    class SometimesInCompany(fakes.Server):
        """A long prompt changes its neighbour's answer, but not the first time."""

        times = 0

        async def after_prompt(self, job: fakes.Job, done: int) -> None:
            await super().after_prompt(job, done)
            for other in self.others(job, "generation") if len(job.words) > 100 else []:
                self.times += 1
                other.salt = "company" if self.times > 1 else ""

    result = result_of(SometimesInCompany, "prefill-hang-up")
    assert result.outcome == PASSED
    assert result.figures["compared"].startswith("by length")


def test_an_answer_that_depends_on_when_the_company_ends_is_not_blamed_on_the_hang_up() -> None:
    class DependsOnEarlyEnds(fakes.Server):
        """An answer changes when another request ends in its first half, hang-up or not."""

        def free(self, job: fakes.Job) -> None:
            super().free(job)
            for other in self.others(job, "generation"):
                if other.tokens < 0.5 * other.body["max_tokens"]:
                    other.salt = "company"

    result = result_of(DependsOnEarlyEnds, "prefill-hang-up-streaming")
    assert result.outcome == PASSED
    assert "undisturbed answers differ among themselves" in result.figures["compared"]


def test_an_answer_that_differs_once_and_never_again_is_not_judged() -> None:
    class Once(fakes.Server):
        """The first hang-up changes the neighbour's answer, no later one does."""

        def hung_up(self, job: fakes.Job) -> None:
            for other in self.others(job, "generation") if self.hang_ups == 1 else []:
                other.salt = "once"
            super().hung_up(job)

    result = result_of(Once, "prefill-hang-up-streaming")
    assert result.outcome == UNJUDGED
    assert "in 1 of 3 performances with the hang-up, in none of 5 without" in result.why


def test_a_situation_that_was_missed_is_set_up_again_with_longer_work() -> None:
    said: list[str] = []
    report = report_of(fakes.SlowInCompany, ["prefill-hang-up-streaming"], said=said)
    assert report.results[0].outcome == PASSED
    assert any("once more with longer work" in line for line in said)


@pytest.mark.parametrize("name", ["retry-answer", "slot-freed", "prefill-hang-up-streaming"])
def test_a_server_that_became_faster_is_measured_again(name: str) -> None:
    class Faster(fakes.Server):
        """Three times as fast as it was when it was measured."""

        word = fakes.WORD / 3

    result = result_of(Faster, name, known=True)
    assert (result.outcome, result.why) == (PASSED, "")


def test_a_server_that_speaks_chat_only_is_asked_through_chat() -> None:
    report = report_of(fakes.ChatOnly, ["prefill-hang-up-streaming"])
    assert report.profile["endpoint"] == "/v1/chat/completions"
    assert report.results[0].outcome == PASSED


def test_options_that_the_server_refuses_are_left_out() -> None:
    report = report_of(fakes.Strict, ["prefill-hang-up"])
    assert report.profile["options"] == {"temperature": 0, "seed": 1}
    assert report.results[0].outcome == PASSED


def test_a_prompt_is_never_longer_than_the_server_takes() -> None:
    class Small(fakes.Server):
        """A small context."""

        context = 300

    report = report_of(Small, ["slot-freed", "prefill-hang-up"], prefill=1.0)
    assert report.profile["long prompt (words)"] < report.profile["longest prompt taken (words)"] < 300
    assert [result.outcome for result in report.results] == [PASSED, PASSED]


def test_the_number_of_slots_that_the_user_gives_is_taken() -> None:
    report = report_of(fakes.Server, ["queued-hang-up"], slots=2)
    assert report.profile["slots known by"] == "--slots"
    assert report.results[0].outcome == PASSED


def test_slots_that_are_not_there_are_noticed() -> None:
    result = result_of(fakes.Server, "queued-hang-up", slots=4)
    assert result.outcome != PASSED


def test_slots_that_the_user_left_out_are_noticed() -> None:
    result = result_of(fakes.ManySlots, "queued-hang-up", slots=2)
    assert result.outcome == UNJUDGED
    assert "served" in result.why


def test_the_same_seed_draws_the_same_rounds() -> None:
    first, again = (result_of(fakes.Server, "random-rounds", seed=7, slots=2).figures for _ in range(2))
    assert (first["rounds"], first["others answered"]) == (again["rounds"], again["others answered"])
