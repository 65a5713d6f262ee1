"""The scheduler: who goes first, how steps are filled, what is kept and what has to go."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacancel.engine.scheduler import (
    Cells,
    Copy,
    Fault,
    Limits,
    MemoryRules,
    Outcome,
    Pace,
    Plan,
    Request,
    Scheduler,
    policy,
)
from llamacancel.engine.scheduler.prefix import common_prefix
from llamacancel.errors import DecodeFailedError, MemoryFullError
from tests.unit.fake_runner import Chances, FakeRunner, answer, request

ATTENTION = MemoryRules(cut=True, copy="part", cells=10_000)
RECURRENT = MemoryRules(cut=False, copy="whole", checkpoints=4)


class Bench:
    """A scheduler with a fake runner, stepped by hand."""

    def __init__(self, rules: MemoryRules = ATTENTION, chances: Chances | None = None, **limits: Any) -> None:
        settings = {"slots": 2, "queue_limit": 100, "n_ctx": 5000, "n_batch": 2048, "n_ubatch": 32, **limits}
        self.scheduler = Scheduler(Limits(**settings), rules)
        self.runner = FakeRunner(rules, settings["n_batch"], random.Random(1), chances or Chances())
        self.now = 0.0
        self.step_seconds = 0.01

    def submit(self, name: str, prompt: list[int], **attributes: Any) -> Request:
        made = request(name, prompt, **attributes)
        self.scheduler.submit(made, self.now)
        return made

    def cancel(self, request: Request, ending: Any = "cancelled") -> bool:
        return self.scheduler.cancel(request, ending, self.now)

    def embed(self) -> Plan:
        """The next batch of texts, from its beginning to its end."""
        flight = self.scheduler.plan_texts(self.now)
        if flight is None:
            return Plan()
        outcome = self.runner.embed(flight.plan)
        outcome.seconds = self.step_seconds
        self.now += self.step_seconds
        self.scheduler.commit_texts(outcome, self.now)
        return flight.plan

    def step(self) -> Plan:
        plan = self.scheduler.plan(self.now)
        if plan:
            outcome = self.runner.run(plan)
            outcome.seconds = self.step_seconds
            self.now += self.step_seconds
            self.scheduler.commit(outcome, self.now)
        return plan

    def run(self, most: int = 5000) -> list[Plan]:
        plans = []
        while len(plans) < most:
            plan = self.step()
            if not plan:
                return plans
            plans.append(plan)
        pytest.fail("it never ends")


def prompt(n: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1, 50), k=n)


def rows_of(plan: Plan) -> dict[str, int]:
    return {rows.request.id: rows.count for rows in plan.rows}


def started(bench: Bench) -> list[str]:
    return [each.id for each in bench.scheduler.active.values()]


# ---- the line ----------------------------------------------------------------------------------------------------


def test_requests_start_in_order_of_priority_and_then_of_arrival() -> None:
    bench = Bench(slots=1, aging=1000.0)
    order: list[str] = []
    for name, priority in (("a", 0), ("low", -1), ("b", 0), ("high", 3)):
        bench.submit(name, prompt(5), max_tokens=2, priority=priority)
    while bench.step():
        order += [name for name in started(bench) if name not in order]
    assert order == ["high", "a", "b", "low"]


def test_waiting_makes_up_for_priority() -> None:
    bench = Bench(slots=1, aging=2.0)
    bench.submit("running", prompt(5), max_tokens=2)
    bench.step()
    low = bench.submit("low", prompt(5), max_tokens=1, priority=-1)
    bench.now += 3.0
    high = bench.submit("high", prompt(5), max_tokens=1, priority=0)
    bench.run()
    assert low.finished_at is not None
    assert high.finished_at is not None
    assert low.finished_at < high.finished_at


def test_a_low_priority_is_not_overtaken_for_ever() -> None:
    bench = Bench(slots=1, aging=0.5)
    low = bench.submit("low", prompt(5), max_tokens=1, priority=-4)
    others: list[Request] = []
    while low.state != "finished" and len(others) < 2000:
        others.append(bench.submit(f"r{len(others)}", prompt(5), max_tokens=3))
        bench.step()
        bench.step()
    assert low.state == "finished"
    assert others[-1].submitted_at > 2.0
    assert all(other.submitted_at < 2.0 for other in others if other.state == "finished"), (
        "four levels of half a second"
    )


def test_a_flood_of_cancelled_requests_leaves_nothing_in_the_line() -> None:
    bench = Bench(slots=1, queue_limit=10)
    bench.submit("running", prompt(5))
    bench.step()
    for i in range(5000):
        assert bench.cancel(bench.submit(f"r{i}", prompt(3)))
    assert len(bench.scheduler._line) < 200


# ---- steps -------------------------------------------------------------------------------------------------------


def test_every_running_generation_has_a_row_in_every_step() -> None:
    bench = Bench(slots=4, n_batch=16)
    running = [bench.submit(f"g{i}", prompt(3, i), max_tokens=60) for i in range(3)]
    while any(each.state != "decode" for each in running):
        bench.step()
    bench.submit("long", prompt(400, 9), max_tokens=1)
    plans = bench.run()
    with_prompt = [rows_of(plan) for plan in plans if plan.n_prompt_rows]
    assert len(with_prompt) >= 400 // 16
    alive = [each.id for each in running if each.finish_reason != "stop"]
    for rows in with_prompt[:20]:
        assert sum(rows.values()) <= 16
        assert all(rows.get(name) == 1 for name in alive)


LONG = [(0, 9999)]  # a prompt that no step comes to the end of


def test_a_prompt_beside_generations_gets_what_the_time_of_a_step_allows() -> None:
    limits = Limits(slots=4, queue_limit=1, n_ctx=1, n_batch=2048, n_ubatch=64, step_seconds=0.1)
    pace = Pace()
    assert policy.prompt_budget(limits, pace, 2, LONG) == 62, "one ubatch, until it is known how long a row takes"
    large = Limits(slots=4, queue_limit=1, n_ctx=1, n_batch=2048, n_ubatch=512, step_seconds=0.1)
    assert policy.prompt_budget(large, pace, 2, LONG) == 64, "and no large one beside others"
    assert policy.prompt_budget(large, pace, 0, LONG) == 512
    for _ in range(50):
        pace.observe(0, 2, 0.02)
        pace.observe(400, 2, 0.02 + 400 * 0.0002)
    assert policy.prompt_budget(limits, pace, 2, LONG) == 6 * 64 - 2, "whole ubatches"
    assert policy.prompt_budget(limits, pace, 0, LONG) == 7 * 64
    for _ in range(100):
        pace.observe(100, 0, 100 * 0.01)
    assert policy.prompt_budget(limits, pace, 2, LONG) == 62, "slow as it is, it gets on"
    assert policy.prompt_budget(limits, pace, 2048, LONG) == 0
    whole = Limits(slots=4, queue_limit=1, n_ctx=1, n_batch=2048, n_ubatch=64, step_seconds=None)
    assert policy.prompt_budget(whole, pace, 3, LONG) == 2045


def test_a_last_ubatch_is_filled_as_far_as_time_allows_unless_that_is_hardly_at_all() -> None:
    limits = Limits(slots=4, queue_limit=1, n_ctx=1, n_batch=2048, n_ubatch=512, step_seconds=0.1)
    for rows, budget in ((300, 300), (540, 509), (700, 700), (1000, 1000), (1040, 1021)):
        pace = Pace()
        pace.observe(0, 3, 0.02)
        pace.observe(rows, 0, 0.08)
        assert policy.prompt_budget(limits, pace, 3, LONG) == pytest.approx(budget, abs=1)


def test_a_few_rows_beyond_a_ubatch_go_with_the_next_step_if_others_have_rows_there() -> None:
    limits = Limits(slots=4, queue_limit=1, n_ctx=1, n_batch=2048, n_ubatch=512, step_seconds=0.1)
    pace = Pace()
    pace.observe(0, 3, 0.02)
    pace.observe(600, 0, 0.08)
    assert policy.prompt_budget(limits, pace, 3, [(0, 512)]) == 509
    assert policy.prompt_budget(limits, pace, 0, [(0, 515)]) == 515, "there are none"


def test_rows_cost_the_more_the_deeper_they_lie_and_that_is_learned_from_steps() -> None:
    """The cost of a row is a line over its depth here, and the scheduler is told of whole steps alone."""
    limits = Limits(slots=4, queue_limit=1, n_ctx=1, n_batch=2048, n_ubatch=512, step_seconds=0.4)

    def seconds(start: int, count: int) -> float:
        return sum(0.001 * (1 + (start + i) / 1000) for i in range(count))

    pace = Pace()
    pace.observe(0, 1, 0.01)
    for _ in range(4):
        for start in range(0, 2560, 256):
            pace.observe(256, 1, 0.01 + seconds(start, 256), start + 128)
    assert pace.row_at(0) == pytest.approx(0.001, rel=0.05)
    assert pace.row_at(2000) == pytest.approx(0.003, rel=0.05)
    for pieces in ([(0, 9999)], [(2000, 9999)], [(2000, 65), (0, 9999)], [(0, 65), (2000, 9999)]):
        left, took = policy.prompt_budget(limits, pace, 1, pieces, by_sequence=True), 0.01
        for start, count in pieces:
            took += seconds(start, min(left, count))
            left -= min(left, count)
        assert took == pytest.approx(0.4, rel=0.08), pieces


def test_the_line_is_level_where_all_rows_lay_at_about_the_same_depth_and_never_falls() -> None:
    pace = Pace()
    for seconds in (0.1, 0.2, 0.1, 0.3, 0.1):
        pace.observe(100, 0, seconds, 50)
    assert pace.deeper == pytest.approx(0)
    pace.observe(100, 0, 0.01, 4000)
    assert pace.deeper == 0
    for _ in range(20):
        pace.observe(64, 0, 1e-9, 0)
        pace.observe(64, 0, 10.0, 5000)
    assert 0 < pace.row_at(0) < pace.row_at(5000) < 1


def test_where_each_prompt_has_ubatches_of_its_own_none_is_cut_for_the_single_rows_beside_it() -> None:
    limits = Limits(slots=4, queue_limit=1, n_ctx=1, n_batch=2048, n_ubatch=512, step_seconds=0.1)
    pace = Pace()
    pace.observe(0, 3, 0.02)
    pace.observe(600, 0, 0.08)
    assert policy.prompt_budget(limits, pace, 3, LONG, by_sequence=True) == pytest.approx(600, abs=1)
    assert policy.prompt_budget(limits, pace, 3, [(0, 512)], by_sequence=True) == 512
    rules = MemoryRules(cut=True, in_order=True, by_sequence=True)
    bench = Bench(rules, slots=4, n_ubatch=64, n_batch=256, step_seconds=100.0)
    bench.submit("talks", prompt(5), max_tokens=100)
    bench.step()
    bench.scheduler.pace.row_seconds, bench.scheduler.pace.step_seconds = 0.001, 1.0
    for i in range(3):
        bench.submit(f"{i}", prompt(64, i + 1), max_tokens=10)
    assert [rows.count for rows in bench.step().rows] == [1, 64, 64, 64]


def test_a_few_rows_that_would_need_a_ubatch_of_their_own_wait_for_the_rest_of_their_prompt() -> None:
    counts = {}
    for by_sequence in (False, True):
        rules = MemoryRules(cut=True, in_order=True, by_sequence=by_sequence)
        bench = Bench(rules, slots=3, n_ubatch=64, n_batch=150, quantum=100, step_seconds=None)
        for i in range(2):
            bench.submit(f"{i}", prompt(100, i + 1), max_tokens=1)
        counts[by_sequence] = [[rows.count for rows in bench.step().rows] for _ in range(2)]
    assert counts[False] == [[100, 50], [50]]
    assert counts[True] == [[100], [100]]
    assert policy.whole_tiles(50, 50, spare=True) == 50, "the last ones"


def test_a_prompt_of_an_earlier_step_does_not_wait_for_those_behind_it_unless_that_would_cost_them_as_much() -> None:
    counts = {}
    for step in (0.001, 1.0, None):
        bench = Bench(slots=4, n_batch=1000, n_ubatch=1000, step_seconds=None if step is None else 100.0)
        bench.scheduler.pace.row_seconds, bench.scheduler.pace.step_seconds = 0.001, step or 0.001
        for i, n in enumerate((800, 264)):
            bench.submit(f"{i}", prompt(n, i), max_tokens=9)
        bench.step()
        for i in (2, 3):
            bench.submit(f"{i}", prompt(100, i), max_tokens=9)
        counts[step] = [[rows.count for rows in bench.step().rows] for _ in range(2)]
    assert counts[0.001] == [[1, 96], [1, 1, 100, 100]], "those that begin together stay together"
    assert counts[1.0] == [[1, 96, 100, 100], [1, 1, 1, 1]]
    assert counts[None] == [[1, 96, 100, 100], [1, 1, 1, 1]], "a step takes all it can"


def test_a_step_ends_with_what_is_complete_where_the_first_tokens_gain_more_than_others_lose() -> None:
    limits = Limits(slots=4, queue_limit=1, n_ctx=1, n_batch=2048, n_ubatch=512, step_seconds=0.4)
    pace = Pace()
    pace.observe(0, 3, 0.01)
    pace.observe(500, 0, 0.5)
    assert policy.ends_here(limits, pace, 1, 1, 50), "0.05 s sooner, 0.01 s later"
    assert policy.ends_here(limits, pace, 2, 4, 50)
    assert not policy.ends_here(limits, pace, 1, 6, 50), "six of them wait 0.01 s"
    assert not policy.ends_here(limits, pace, 0, 1, 500), "nobody gains"
    assert not policy.ends_here(limits, pace, 3, 0, 0), "nobody is behind"
    assert not policy.ends_here(limits, Pace(), 1, 1, 50), "nothing is known"


@given(st.integers(0, 300), st.lists(st.tuples(st.integers(1, 100), st.integers(1, 40)), max_size=6))
def test_a_budget_is_shared_out_to_the_last_row_and_nobody_gets_more_than_it_can_use(
    budget: int, wants: list[tuple[int, int]]
) -> None:
    given = policy.share(budget, wants)
    assert all(0 <= rows <= want for rows, (want, _) in zip(given, wants, strict=True))
    assert sum(given) == min(budget, sum(want for want, _ in wants))
    for i, (want, turn) in enumerate(wants):
        if given[i] < min(want, turn):
            assert sum(given[i + 1 :]) == 0, "somebody behind was served first"


def test_the_pieces_of_a_long_prompt_are_whole_tiles() -> None:
    bench = Bench(slots=2, n_batch=700, step_seconds=None)
    bench.submit("short", prompt(5), max_tokens=100)
    bench.step()
    bench.submit("long", prompt(2000, 1), max_tokens=1)
    counts = [rows.count for _ in range(4) for rows in bench.step().rows if rows.request.id == "long"]
    assert counts == [640, 640, 640, 80]


def test_steps_stay_near_their_time_while_the_rows_of_a_long_prompt_get_dearer() -> None:
    limits = Limits(slots=4, queue_limit=1, n_ctx=1, n_batch=2048, n_ubatch=512, step_seconds=0.4)
    pace, at = Pace(), 0
    while at < 1000:
        rows = policy.prompt_budget(limits, pace, 1, [(at, 9999)], by_sequence=True)
        seconds = sum(0.002 * (1 + (at + i) / 500) for i in range(rows))
        assert seconds < 1.5 * 0.4
        pace.observe(rows, 1, seconds, at + rows / 2)
        at += rows


def test_a_row_that_a_prompt_has_in_the_ubatch_of_others_fills_no_tile_of_its_own() -> None:
    limits = Limits(slots=4, queue_limit=1, n_ctx=1, n_batch=2048, n_ubatch=512, step_seconds=0.1)
    pace = Pace()
    pace.row_seconds = 1.0
    assert policy.prompt_budget(limits, pace, 1, LONG, by_sequence=True) == 65
    assert policy.prompt_budget(limits, pace, 0, LONG, by_sequence=True) == 64
    assert policy.whole_tiles(65, 2000, shared=1) == 65
    assert policy.whole_tiles(64, 2000, shared=1) == 64, "less than a tile, but all that there is"
    assert policy.whole_tiles(64, 2000, spare=True, shared=1) == 0
    assert policy.whole_tiles(700, 2000, shared=1) == 641
    assert policy.whole_tiles(300, 300, shared=1) == 300
    assert policy.whole_tiles(193, 257, shared=1) == 129, "64 would be left, one of them in the ubatch of others"
    assert policy.whole_tiles(193, 258, shared=1) == 193
    assert [policy.whole_tiles(65, 100, shared=1, slack=slack) for slack in (34, 35)] == [65, 100]
    assert policy.whole_tiles(65, 140, shared=1, slack=100) == 65


@given(st.integers(1, 3000), st.integers(1, 3000), st.booleans(), st.integers(0, 1))
def test_a_piece_of_a_prompt_is_whole_tiles_unless_it_ends_it_and_so_is_what_it_leaves(
    most: int, wanted: int, spare: bool, shared: int
) -> None:
    count = min(most, wanted)
    rows = policy.whole_tiles(count, wanted, spare, shared)
    assert spare <= (rows == 0) or rows > 0
    assert rows <= count
    slack = policy.whole_tiles(count, wanted, spare, shared, slack=200)
    assert slack == rows or (slack == wanted < 130 and not spare)
    if rows not in (0, wanted) and count >= 128 + 2 * shared:
        assert (rows - shared) % 64 == 0
        assert wanted - rows - shared >= 64
        assert count - rows < 128, "and no tile more is left out than that takes"


def test_a_step_has_no_piece_that_fills_no_tile_while_a_prompt_goes_on() -> None:
    """Whatever is left of a turn, of a step, or of other prompts: pieces were seen to take four times as long."""
    rules = MemoryRules(cut=True, in_order=True, by_sequence=True)
    for seed in range(30):
        rng = random.Random(seed)
        bench = Bench(rules, slots=4, n_ubatch=512, step_seconds=0.4)
        bench.scheduler.pace.observe(rng.randint(100, 500), 0, 0.4)
        bench.submit("talks", prompt(5), max_tokens=10_000)
        bench.step()
        for i in range(6):
            bench.submit(f"{i}", prompt(rng.randint(100, 3000), i), max_tokens=1)
        while len(bench.scheduler.active) + len(bench.scheduler.queue) > 1:
            plan = bench.scheduler.plan(bench.now)
            left = {rows.request.id: rows.request.rows_left for rows in plan.rows}
            least = 64 + (plan.n_other_rows > 0)  # a row is in the ubatch of the single ones
            for rows in plan.rows:
                rest = left[rows.request.id] - rows.count
                assert rows.count == 1 or not rest or min(rows.count, rest) >= least, (seed, rows.count, rest)
            outcome = bench.runner.run(plan)
            outcome.seconds = sum(rows.count for rows in plan.rows) * 0.001
            bench.now += outcome.seconds
            bench.scheduler.commit(outcome, bench.now)


def test_a_long_prompt_lets_short_ones_by_and_they_let_it_on() -> None:
    bench = Bench(slots=4, n_batch=64, quantum=128, step_seconds=None)
    long = bench.submit("long", prompt(4000), max_tokens=1)
    bench.step()
    waits = []
    for i in range(12):
        short = bench.submit(f"short{i}", prompt(20, i + 1), max_tokens=1)
        before, begun = long.held, bench.runner.steps
        while short.state != "finished":
            bench.step()
        waits.append(bench.runner.steps - begun)
        assert long.held > before or long.state == "finished"
    assert max(waits) <= 4, "it waits for what is left of a turn, not for 4,000 rows"


@pytest.mark.parametrize("step_seconds", [None, 1.0])
def test_a_stream_of_short_prompts_does_not_starve_a_long_one(step_seconds: float | None) -> None:
    bench = Bench(slots=3, n_batch=32, quantum=64, step_seconds=step_seconds)
    long = bench.submit("long", prompt(1500), max_tokens=1)
    for i in range(2000):
        while bench.scheduler.idle_slots - len(bench.scheduler.queue) > 0:
            bench.submit(f"s{i}-{len(bench.scheduler.queue)}", prompt(60, i), max_tokens=1)
        bench.step()
        if long.state == "finished":
            break
    assert long.state == "finished"
    assert bench.runner.steps < 3 * (1500 / 32) * 3


def test_a_stopped_step_takes_no_turn_from_those_whose_rows_were_not_computed() -> None:
    bench = Bench(slots=3, n_batch=96, n_ubatch=32, quantum=64, step_seconds=None)
    first, second = (bench.submit(name, prompt(300, i), max_tokens=1) for i, name in enumerate(("first", "second")))
    assert rows_of(bench.scheduler.plan(bench.now)) == {"first": 64, "second": 32}
    bench.scheduler.commit(Outcome(held={0: 64, 1: 0}, aborted=True, rows_done=64), 1.0)
    bench.now = 1.0
    newcomer = bench.submit("newcomer", prompt(300, 2), max_tokens=1)
    assert rows_of(bench.scheduler.plan(bench.now)) == {"second": 64, "first": 32}
    assert [each.held for each in (first, second, newcomer)] == [64, 0, 0]


def test_several_prompts_share_a_step() -> None:
    bench = Bench(slots=3, n_batch=100, step_seconds=None)
    for i in range(3):
        bench.submit(f"p{i}", prompt(30, i), max_tokens=1)
    assert rows_of(bench.step()) == {"p0": 30, "p1": 30, "p2": 30}


def test_a_batch_of_texts_is_computed_while_steps_come_and_go() -> None:
    bench = Bench(slots=2, embed_rows=30, embed_sequences=2)
    generation = bench.submit("g", prompt(4), max_tokens=6)
    texts = [bench.submit(f"e{i}", prompt(12, i), kind="embedding") for i in range(3)]
    assert bench.scheduler.plan(bench.now).requests == [generation], "texts are none of a step's"
    flight = bench.scheduler.plan_texts(bench.now)
    assert flight is not None
    assert bench.scheduler.embedding == flight.plan.requests == texts[:2]
    bench.scheduler.commit(bench.runner.run(bench.scheduler.in_flight.plan), bench.now)
    assert [rows_of(plan) for plan in bench.run()] == [{"g": 1}] * 5
    assert not bench.scheduler.idle
    assert bench.scheduler.plan_texts(bench.now) is None, "one batch at a time"
    bench.scheduler.commit_texts(bench.runner.embed(flight.plan), bench.now)
    assert bench.embed().texts == texts[2:]
    assert bench.scheduler.idle
    assert {each.finish_reason for each in texts} == {"stop"}


def test_a_batch_has_as_many_texts_as_fit_and_one_where_the_context_is_not_there_yet() -> None:
    bench = Bench(embed_rows=100, embed_sequences=3)
    for i, n in enumerate((30, 30, 12, 12, 100, 1)):
        bench.submit(f"e{i}", prompt(n, i), kind="embedding")
    flight = bench.scheduler.plan_texts(0.0, alone=True)
    assert flight is not None
    assert len(flight.plan.texts) == 1
    bench.scheduler.commit_texts(bench.runner.embed(flight.plan), 0.0)
    assert [[each.n_prompt for each in bench.embed().texts] for _ in range(4)] == [[30, 12, 12], [100], [1], []]


def test_a_text_that_is_computed_is_cancelled_by_its_batch_alone() -> None:
    bench = Bench(embed_rows=100, embed_sequences=3)
    texts = [bench.submit(f"e{i}", prompt(12, i), kind="embedding") for i in range(2)]
    flight = bench.scheduler.plan_texts(0.0)
    assert flight is not None
    assert not bench.cancel(texts[0])
    waiting = bench.submit("waiting", prompt(5), kind="embedding")
    assert bench.cancel(waiting)
    bench.runner.cancelled["e0"] = "deadline"
    bench.scheduler.commit_texts(bench.runner.embed(flight.plan), 0.0)
    assert [each.finish_reason for each in (*texts, waiting)] == ["deadline", "stop", "cancelled"]
    assert bench.scheduler.idle


def test_texts_of_a_batch_that_was_stopped_for_others_are_first_in_line_again() -> None:
    bench = Bench(embed_rows=100, embed_sequences=2)
    gone, stayed, behind = (bench.submit(name, prompt(12), kind="embedding") for name in ("gone", "stayed", "behind"))
    flight = bench.scheduler.plan_texts(0.0)
    assert flight is not None
    outcome = Outcome(aborted=True, cancelled={gone: "cancelled"}, seconds=0.01)
    bench.scheduler.commit_texts(outcome, 0.01)
    assert stayed.state == "queued"
    assert bench.embed().texts == [stayed, behind]


def test_a_part_that_others_want_goes_on_to_its_end_unless_that_is_far() -> None:
    pace = known_pace()
    parts = policy.parts_of(pace, 400, [(9, 1, True), (0, 399, False), (9, 1, True), (0, 399, False)])
    for elapsed, left in ((0.1, 0.32), (0.16, 0.26), (0.5, 0.34)):
        assert policy.stops_inside(pace, parts, elapsed), f"{left} s are left of the part"
    for elapsed in (0.2, 0.41, 0.7, 1.5):  # the last one takes longer than expected
        assert not policy.stops_inside(pace, parts, elapsed)


def test_a_part_is_begun_anew_where_the_others_are_done_sooner_without_the_cancelled() -> None:
    pace = known_pace()
    pace.observe_stop(10.0)
    parts = policy.parts_of(pace, 512, [(9, 1, False), (0, 400, True), (0, 60, False)])
    assert policy.loss(parts, 0.1) == pytest.approx(-0.3), "0.1 s are done again, and 0.4 s not done"
    assert policy.stops_inside(pace, parts, 0.1), "also when all patience is spent"
    assert policy.loss(parts, 0.45) == pytest.approx(0.05)
    assert not policy.stops_inside(pace, parts, 0.45)


def test_a_part_that_nobody_wants_is_left_to_stop_by_itself() -> None:
    pace = known_pace()
    parts = policy.parts_of(pace, 512, [(9, 1, False), (0, 200, True), (0, 60, False)], by_sequence=True)
    assert not policy.stops_inside(pace, parts, 0.1)
    bench = Bench(slots=2)
    bench.submit("alone", prompt(10))
    bench.scheduler.pace.row_seconds = 1.0
    assert bench.scheduler.plan(0.0)
    assert bench.scheduler.in_flight is not None
    assert not bench.scheduler.in_flight.stops_inside([True], 0.0)


def test_what_was_computed_before_the_last_ubatch_is_not_lost_and_rows_after_it_are_not_computed() -> None:
    pace = known_pace()
    parts = policy.parts_of(pace, 100, [(0, 150, False), (0, 150, True)])
    assert [(part.seconds, part.saved) for part in parts] == [
        pytest.approx((0.1, 0.0)), pytest.approx((0.1, 0.05)), pytest.approx((0.1, 0.1))
    ]  # fmt: skip
    assert policy.loss(parts, 0.08) == pytest.approx(0.08), "the first part has no row of the cancelled"
    assert policy.loss(parts, 0.12) == pytest.approx(-0.03)
    assert policy.loss(parts, 0.18) == pytest.approx(0.03)


def test_where_sequences_are_computed_by_themselves_only_the_one_that_is_being_computed_is_lost() -> None:
    pace = known_pace()
    parts = policy.parts_of(
        pace, 100, [(9, 1, False), (0, 150, False), (9, 1, False), (0, 150, True)], by_sequence=True
    )
    assert [(part.seconds, part.saved) for part in parts] == [
        (0.02, 0.0), *(pytest.approx(each) for each in ((0.1, 0.0), (0.05, 0.0), (0.1, 0.1), (0.05, 0.05)))
    ]  # fmt: skip
    assert policy.loss(parts, 0.05) == pytest.approx(0.03), "the single rows are done, and 0.03 s of the first prompt"
    assert policy.loss(parts, 0.2) < 0, "only the cancelled one is being computed"


def test_single_rows_cost_what_a_step_costs_however_many_of_them_are_cancelled() -> None:
    pace = known_pace()
    for cancelled in (1, 3):
        parts = policy.parts_of(pace, 512, [(9, 1, i < cancelled) for i in range(4)])
        assert [(part.seconds, part.saved) for part in parts] == [(0.02, 0.0)]


def test_stops_cost_the_others_no_more_than_a_tenth_of_the_time() -> None:
    pace = known_pace()
    parts = policy.parts_of(pace, 512, [(9, 1, True), (9, 1, False), (0, 500, False)])
    for _ in range(10):
        pace.observe_stop(policy.loss(parts, 0.1))
    assert not policy.stops_inside(pace, parts, 0.1), "the others have to get on"
    for _ in range(100):
        pace.observe(100, 0, 0.1)
    assert policy.stops_inside(pace, parts, 0.1)


@pytest.mark.parametrize("step_seconds", [None, 100.0])
def test_a_flood_of_cancels_passes_over_nobody_more_than_twice_in_a_row(step_seconds: float | None) -> None:
    rules = MemoryRules(cut=True, in_order=True, by_sequence=True)
    bench = Bench(rules, slots=3, n_ubatch=8, n_batch=128, step_seconds=step_seconds)
    crowd = [bench.submit(f"crowd{i}", prompt(40, i)) for i in range(2)]
    talkative = next(text for seed in range(100, 200) if len(answer(text := prompt(20, seed), 30, 5000)) == 30)
    stayed = bench.submit("stayed", talkative, max_tokens=30)  # in the last slot: its rows come last
    bench.scheduler.pace.row_seconds = 1.0
    waited = held = 0
    for turn in range(200):
        bench.scheduler.pace.row_seconds = 1.0
        plan = bench.scheduler.plan(bench.now)
        gone = crowd[turn % 2]
        flight = bench.scheduler.in_flight
        assert flight is not None
        assert not (plan.whole and flight.stops_inside([each is gone for each in plan.requests], bench.now))
        if plan.whole or gone not in plan.requests:
            outcome = bench.runner.run(plan)
        else:  # it was stopped before its first row
            bench.runner.run(Plan(actions=plan.actions))
            outcome = Outcome(held={rows.slot: rows.start for rows in plan.rows})
        bench.now += 0.01
        bench.scheduler.commit(outcome, bench.now)
        bench.cancel(gone)
        crowd[turn % 2] = bench.submit(f"crowd{turn + 2}", prompt(40, turn + 2), max_tokens=5)
        waited = 0 if stayed.held > held or stayed.state == "finished" else waited + 1
        held = stayed.held
        assert waited <= 2
    assert stayed.state == "finished"


def test_nothing_is_to_be_stopped_where_nobody_in_the_step_was_cancelled() -> None:
    bench = Bench(slots=2)
    for name in ("a", "b"):
        bench.submit(name, prompt(10))
    bench.scheduler.pace.row_seconds = 1.0
    assert bench.scheduler.in_flight is None
    assert bench.scheduler.plan(0.0)
    flight = bench.scheduler.in_flight
    assert flight is not None
    assert not flight.stops_inside([False, False], 0.0)
    assert flight.stops_inside([True, False], 0.01)


@pytest.mark.parametrize("kind", ["generation", "embedding"])
def test_a_stopped_step_is_paid_for_with_what_it_cost_those_who_stayed(kind: Any) -> None:
    bench = Bench(slots=2, n_ubatch=2048, step_seconds=None, embed_rows=2000, embed_sequences=2)
    scheduler = bench.scheduler
    pace = scheduler.pace if kind == "generation" else scheduler.texts_pace
    pace.row_seconds = 0.001
    patience = pace.patience
    for stayed, gone in ((600, 100), (100, 600)):
        requests = {
            name: bench.submit(name, prompt(n, n), max_tokens=1, kind=kind)
            for name, n in (("stayed", stayed), ("gone", gone))
        }
        outcome = Outcome(aborted=True, cancelled={requests["gone"]: "cancelled"}, seconds=0.3)
        if kind == "generation":
            plan = scheduler.plan(bench.now)
            assert {each.id for each in plan.requests} == {"stayed", "gone"}
            bench.runner.run(Plan(actions=plan.actions))
            scheduler.commit(outcome, bench.now)
        else:
            assert scheduler.plan_texts(bench.now)
            assert {each.id for each in scheduler.embedding} == {"stayed", "gone"}
            scheduler.commit_texts(outcome, bench.now)
        patience -= max(0.3 - 0.001 * gone, 0.0)
        assert pace.patience == pytest.approx(patience)
        bench.cancel(requests["stayed"])
        assert bench.scheduler.idle


def known_pace() -> Pace:
    """A millisecond for a prompt's row, 20 for a step without one."""
    pace = Pace()
    pace.observe(0, 2, 0.02)
    pace.observe(100, 0, 0.1)
    return pace


# ---- what is kept ------------------------------------------------------------------------------------------------


def test_a_state_is_kept_before_the_last_token_and_where_others_branched_off() -> None:
    bench = Bench(RECURRENT)
    stem = prompt(100)
    first, second, third = (stem + prompt(40, seed) for seed in (1, 2, 3))
    copies: list[tuple[str, int]] = []
    cached = []
    for i, each in enumerate((first, second, third)):
        made = bench.submit(f"r{i}", each, max_tokens=2)
        for plan in bench.run():
            copies += [(made.id, len(bench.runner.content(a.dst))) for a in plan.actions if isinstance(a, Copy)]
        cached.append(made.cached_tokens)
    assert cached == [0, 0, 100]
    assert [held for seq in bench.scheduler.sequences[2:] if (held := seq.held)].count(100) == 1
    assert [name for name, _ in copies] == ["r0", "r1", "r1", "r2", "r2"]


def test_a_prompt_that_comes_several_times_at_once_is_computed_once() -> None:
    bench = Bench(slots=4, n_batch=64, step_seconds=None)
    made = [bench.submit(f"r{i}", prompt(200), max_tokens=5) for i in range(4)]
    other = bench.submit("other", prompt(30, 5), max_tokens=1)
    assert rows_of(bench.step()) == {"r0": 64}
    assert other.started_at is not None, "who waits for r0's prompt lets others go first"
    bench.run()
    assert made[0].cached_tokens == 0
    assert all(184 <= each.cached_tokens <= 199 for each in made[1:])
    assert all(each.tokens[200:] == answer(prompt(200), 5, 5000) for each in made)


def test_who_waits_for_a_prefix_leaves_the_slots_to_those_behind_and_keeps_its_place() -> None:
    bench = Bench(slots=4, n_batch=64, step_seconds=None)
    first = bench.submit("first", prompt(400), max_tokens=40)
    bench.step()
    copies = [bench.submit(f"copy{i}", prompt(400), max_tokens=3) for i in range(50)]
    short = bench.submit("short", prompt(3, 7), max_tokens=1)
    others = [bench.submit(f"other{i}", prompt(300, 10 + i), max_tokens=40) for i in range(2)]
    late = bench.submit("late", prompt(10, 30), max_tokens=1)
    gone = copies.pop(5)
    bench.step()
    assert short.started_at is not None
    assert all(each.state != "queued" for each in others)
    assert all(each.state == "queued" for each in copies)
    assert bench.cancel(gone)
    while first.rows_left > 1:
        bench.step()
    bench.step()
    assert copies[0].cached_tokens >= 384, "it came before the one that was behind it"
    bench.run()
    assert [each.submitted_at for each in copies] == sorted(each.submitted_at for each in copies)
    assert sum(each.cached_tokens >= 384 for each in copies) == len(copies)
    assert late.finish_reason is not None
    assert not bench.scheduler._behind
    for each in (first, *copies):
        assert each.tokens[400:] == answer(prompt(400), each.max_tokens, 5000)


def test_nobody_waits_for_a_prefix_of_lower_priority_or_one_that_is_given_up() -> None:
    bench = Bench(slots=3, n_batch=64, step_seconds=None)
    low = bench.submit("low", prompt(400), priority=-1)
    bench.step()
    high = bench.submit("high", prompt(400))
    bench.step()
    assert high.state == "prefill"
    third = bench.submit("third", prompt(400), priority=-1)
    bench.step()
    assert third.state == "queued"
    for each in (low, high):
        bench.cancel(each)
    held = max(seq.held for seq in bench.scheduler.sequences)
    bench.step()
    assert third.state == "prefill"
    assert third.cached_tokens == held > 0


def test_an_attention_memory_keeps_no_states() -> None:
    bench = Bench(ATTENTION)
    bench.submit("a", prompt(100), max_tokens=2)
    plans = bench.run()
    assert not any(plan.actions for plan in plans)
    assert [plan.n_prompt_rows for plan in plans if plan.n_prompt_rows] == [32, 68]


def test_idle_sequences_go_first_when_cells_are_short_and_the_oldest_of_them() -> None:
    rules = MemoryRules(cut=True, copy="part", cells=100)
    bench = Bench(rules, slots=4, n_ctx=100)
    for i in range(3):
        bench.submit(f"r{i}", prompt(30, i), max_tokens=1)
        bench.run()
    assert [seq.held for seq in bench.scheduler.sequences] == [30, 30, 30, 0]
    bench.submit("again", prompt(30, 0), max_tokens=1)
    bench.run()
    bench.submit("more", prompt(35, 7), max_tokens=1)
    bench.run()
    held = [seq.tokens[: seq.held] for seq in bench.scheduler.sequences if seq.held]
    assert prompt(30, 0) in held, "of use lately"
    assert prompt(30, 1) not in held
    assert bench.scheduler.cells.used == bench.runner.used <= 100


def test_the_youngest_of_the_lowest_priority_makes_room_for_those_before_it() -> None:
    rules = MemoryRules(cut=True, copy="part", cells=120)
    bench = Bench(rules, slots=3, n_ctx=120)
    made = [
        bench.submit(name, prompt(20, i), max_tokens=60, priority=priority)
        for i, (name, priority) in enumerate((("first", 0), ("high", 1), ("last", 0)))
    ]
    bench.run()
    assert made[0].preemptions == 0 or made[2].preemptions > 0
    assert made[1].preemptions == 0
    for i, each in enumerate(made):
        assert each.tokens[20:] == answer(prompt(20, i), 60, 120)


def test_a_request_joins_only_where_it_finds_room() -> None:
    rules = MemoryRules(cut=True, copy="part", cells=100)
    bench = Bench(rules, slots=2, n_ctx=100, step_seconds=None)
    big = bench.submit("big", prompt(70, 1), max_tokens=3)
    other = bench.submit("other", prompt(70, 2), max_tokens=3)
    third = bench.submit("third", prompt(5, 3), max_tokens=3)
    assert rows_of(bench.step()) == {"big": 70}
    assert len(bench.scheduler.active) == 1
    assert [each.waits_for_memory for each in (big, other, third)] == [False, True, False], "the first in line"
    bench.cancel(other)
    assert not other.waits_for_memory
    bench.step()
    assert third.state != "queued"
    bench.run()
    assert big.preemptions == 0


def test_who_waits_for_a_busy_slot_does_not_wait_for_memory() -> None:
    bench = Bench(slots=1)
    bench.submit("a", prompt(20, 1), max_tokens=3)
    waiting = bench.submit("b", prompt(20, 2), max_tokens=3)
    bench.step()
    assert waiting.state == "queued"
    assert not waiting.waits_for_memory


def test_a_request_that_made_room_waits_for_memory_until_it_goes_on() -> None:
    bench = Bench(MemoryRules(cut=True, copy="part", cells=120), slots=3, n_ctx=120)
    gone = [bench.submit(f"r{i}", prompt(20, i), max_tokens=60) for i in (20, 21, 22)][2]
    told = []
    while bench.step():
        if gone.preemptions:
            told.append((gone.state, gone.waits_for_memory))
    queued = told.count(("queued", True))
    assert queued
    assert told[:queued] == [("queued", True)] * queued
    assert {waits for _, waits in told[queued:]} == {False}


def test_a_prompt_that_finds_no_cells_waits_for_memory_in_its_slot() -> None:
    bench = Bench(MemoryRules(cut=True, copy="part", cells=200), slots=2, n_ctx=200, n_batch=32)
    writing = bench.submit("writing", prompt(20, 1), max_tokens=150)
    while not writing.n_generated:
        bench.step()
    reading = bench.submit("reading", prompt(70, 2), max_tokens=3)
    bench.step()
    assert reading.state == "prefill"
    assert not reading.waits_for_memory
    bench.scheduler.cells.grow(99, (bench.scheduler.cells.free or 0) - 1)  # somebody has taken all but one
    assert rows_of(bench.step()) == {"writing": 1}
    assert reading.waits_for_memory
    assert not writing.waits_for_memory
    bench.scheduler.cells.cut(99, 0)
    assert "reading" in rows_of(bench.step())
    assert not reading.waits_for_memory


# ---- faults ------------------------------------------------------------------------------------------------------


def test_the_request_that_makes_steps_fail_is_found_and_the_others_finish() -> None:
    bench = Bench(slots=4)
    made = {name: bench.submit(name, prompt(20, i), max_tokens=8) for i, name in enumerate("abcd")}
    bench.runner.poison = {"c"}
    bench.run()
    assert {name: each.finish_reason == "error" for name, each in made.items()} == {
        "a": False, "b": False, "c": True, "d": False,
    }  # fmt: skip
    assert isinstance(made["c"].error, DecodeFailedError)
    for i, name in enumerate("abd"):
        assert made[name].tokens[20:] == answer(prompt(20, "abcd".index(name)), 8, 5000), i


def test_a_poisoned_embedding_is_found_and_the_others_finish() -> None:
    bench = Bench(slots=4, embed_rows=100, embed_sequences=4)
    made = {name: bench.submit(name, prompt(20, i), kind="embedding") for i, name in enumerate("abcd")}
    bench.runner.poison = {"b"}
    while bench.embed():
        pass
    assert {name: each.finish_reason for name, each in made.items()} == {
        "a": "stop", "b": "error", "c": "stop", "d": "stop",
    }  # fmt: skip


def test_a_memory_that_says_it_is_full_runs_fewer_requests_until_one_leaves() -> None:
    bench = Bench(slots=3)
    made = [bench.submit(f"r{i}", prompt(10, i), max_tokens=8) for i in range(3)]
    sizes = []
    run = bench.runner.run

    def full_with_two(plan: Plan) -> Outcome:
        sizes.append(len(plan.rows))
        if len(plan.rows) > 1:
            run(Plan(actions=plan.actions))
            return Outcome(fault=Fault.FULL, error=MemoryFullError("full"))
        return run(plan)

    bench.runner.run = full_with_two  # type: ignore[method-assign]
    bench.run(200)
    assert sizes.count(3) == 1
    for i, each in enumerate(made):
        assert each.tokens[10:] == answer(prompt(10, i), 8, 5000)


def test_a_request_that_finds_no_room_alone_ends_with_that_error() -> None:
    bench = Bench(slots=1)
    made = bench.submit("a", prompt(10), max_tokens=8)
    bench.scheduler.plan(0.0)
    bench.scheduler.commit(Outcome(fault=Fault.FULL, error=MemoryFullError("full")), 0.1)
    assert made.finish_reason == "error"
    assert isinstance(made.error, MemoryFullError)
    assert bench.scheduler.idle


def test_what_a_broken_memory_has_lost_is_computed_again() -> None:
    bench = Bench(RECURRENT, slots=2)
    made = [bench.submit(f"r{i}", prompt(50, i), max_tokens=10) for i in range(2)]
    while any(each.n_generated < 3 for each in made):
        bench.step()
    assert bench.scheduler.plan(bench.now)
    bench.runner.cells.clear()
    bench.scheduler.commit(Outcome(fault=Fault.BROKEN, error=DecodeFailedError("broken")), bench.now)
    assert [each.held for each in made] == [0, 0]
    assert all(seq.held == 0 for seq in bench.scheduler.sequences)
    bench.run()
    for i, each in enumerate(made):
        assert each.tokens[50:] == answer(prompt(50, i), 10, 5000)


@pytest.mark.parametrize("fault", list(Fault))
def test_a_request_cancelled_in_a_step_that_fails_ends_as_cancelled_and_without_an_error(fault: Fault) -> None:
    bench = Bench(slots=1)
    made = bench.submit("a", prompt(10), max_tokens=8)
    assert bench.scheduler.plan(0.0)
    outcome = Outcome(fault=fault, error=DecodeFailedError("failed"), cancelled={made: "cancelled"})
    bench.scheduler.commit(outcome, 0.1)
    assert (made.finish_reason, made.error) == ("cancelled", None)
    assert bench.scheduler.idle


def test_nobody_is_blamed_for_a_memory_that_a_step_before_has_broken() -> None:
    bench = Bench(slots=1)
    made = bench.submit("a", prompt(10), max_tokens=8)
    bench.step()
    assert bench.scheduler.plan(bench.now)
    bench.runner.cells.clear()
    bench.scheduler.commit(Outcome(fault=Fault.BROKEN, error=DecodeFailedError("broken")), bench.now)
    bench.run()
    assert made.tokens[10:] == answer(prompt(10), 8, 5000)


# ---- cells and prefixes ------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(0, 4), st.integers(0, 12)), max_size=60))
def test_cells_are_counted_as_if_each_were_looked_at(actions: list[tuple[int, int, int, int]]) -> None:
    cells = Cells(1000)
    held: dict[int, list[int]] = {seq: [] for seq in range(5)}
    fresh = iter(range(10_000))
    for kind, seq, other, n in actions:
        if kind == 0:
            cells.grow(seq, n)
            held[seq] += [next(fresh) for _ in range(n)]
        elif kind == 1:
            cells.cut(seq, n)
            del held[seq][n:]
        elif seq != other:
            cells.copy(seq, other, n)
            held[other] = held[seq][:n]
        assert cells.used == len({cell for each in held.values() for cell in each})
        assert [cells.held(seq) for seq in range(5)] == [len(held[seq]) for seq in range(5)]
        assert cells.used_by([0, 3]) == len({*held[0], *held[3]})
        assert cells.free == 1000 - cells.used
    for seq in held:
        cells.cut(seq, 0)
    assert cells.used == 0


@given(st.lists(st.integers(0, 1), max_size=600), st.lists(st.integers(0, 1), max_size=600), st.integers(0, 700))
def test_a_common_prefix_is_as_long_as_it_can_be(a: list[int], b: list[int], most: int) -> None:
    n = common_prefix(a, a[: len(a) // 2] + b, most)
    other = a[: len(a) // 2] + b
    assert a[:n] == other[:n]
    assert n <= most
    assert n in (len(a), len(other), most) or a[n] != other[n]
