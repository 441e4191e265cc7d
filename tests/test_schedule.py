"""Blocks, budgets, and what DSPy would have spent."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpromptune.errors import InvalidArgumentError
from mpromptune.model.stopping import Stopping
from mpromptune.plans.blocks import BlockPlan
from mpromptune.plans.pool import default_batch_size, default_rounds_in_flight
from mpromptune.plans.schedule import Schedule, partition, stock_calls, warn_of_little
from mpromptune.studies.ledger import Ledger

A, B = (0,), (1,)


def schedule(max_calls: int = 100, confirm: bool = True) -> Schedule:
    return Schedule(6, ((0, 1), (2, 3), (4, 5)), max_calls, baseline=A, confirm=confirm)


@given(st.integers(1, 200), st.data())
def test_blocks_partition_the_examples(n: int, data: st.DataObject) -> None:
    """Every example in one block, none larger than asked, sizes within one of each other."""
    block_size = data.draw(st.integers(1, n))
    blocks = partition(n, block_size, seed=3)
    assert sorted(e for block in blocks for e in block) == list(range(n))
    sizes = {len(block) for block in blocks}
    assert max(sizes) <= block_size
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("block_size", [0, 7])
def test_impossible_block_sizes_are_refused(block_size: int) -> None:
    """The message names both numbers."""
    with pytest.raises(InvalidArgumentError, match=f"6 validation examples; got {block_size}"):
        partition(6, block_size, seed=0)


def test_a_configuration_takes_the_rounds_block_or_its_next_missing_one() -> None:
    """No example twice, the last trial cut to the budget."""
    plan = schedule()
    assert plan.next_examples(B, 1, limit=10) == (2, 3)
    plan.assign(B, (2, 3))
    assert plan.next_examples(B, 1, limit=10) == (4, 5)
    assert plan.next_examples(B, 1, limit=1) == (4,)
    plan.assign(B, (4, 5, 0, 1))
    assert plan.next_examples(B, 1, limit=10) == ()


def test_winner_and_baseline_are_kept_back() -> None:
    """Of 20 calls, 2 spent on each: 16 left, 4 + 4 of them reserved, so 8 are free."""
    plan = schedule(max_calls=20)
    plan.assign(A, (0, 1))
    plan.assign(B, (0, 1))
    assert plan.available_beside([B]) == 8
    assert plan.available() == 6
    assert schedule(max_calls=20, confirm=False).available() == 20


def test_calls_are_kept_back_for_several_finalists_at_their_price() -> None:
    """Of 20 calls, 4 spent: A and B lack 4 each and C all 6, at twice the price of the others."""
    plan = schedule(max_calls=20)
    plan.assign(A, (0, 1))
    plan.assign(B, (0, 1))
    assert plan.available_beside([B, (2,)]) == 16 - 4 - 4 - 6
    plan.price = lambda row: 1.0 + (row == (2,))
    assert plan.cost([B, (2,)]) == 4 + 2 * 6
    assert plan.available_beside([(2,), A]) == 16 - 4 - 12
    plan.confirm = False
    assert plan.available_beside([B, (2,)]) == 16


def test_what_cannot_be_finished_is_closed() -> None:
    """A configuration that could not be fully measured any more is worth no call."""
    plan = schedule(max_calls=13)
    assert plan.is_open(B)
    plan.assign(A, (0, 1))
    plan.assign((2,), (0, 1))
    assert not plan.is_open(B)
    assert plan.is_open((2,))
    assert plan.anything_open(space_size=3)


def test_a_failed_trial_gives_its_budget_back() -> None:
    """And its examples may be measured again, after those that never failed."""
    plan = schedule(max_calls=20)
    plan.assign(B, (0, 1))
    plan.release(B, [1])
    assert plan.spent == 1
    assert plan.missing(B) == (2, 3, 4, 5, 1)


def test_examples_set_aside_are_lacked_by_nobody() -> None:
    """Who has failed on them is not asked again, nor blamed; who has not, only when it is to be whole."""
    plan = schedule()
    for failing in ((0, 1), (0, 2), (0, 3)):
        plan.assign(B, failing)
        plan.release(B, [0])
    assert plan.is_dropped(B)
    plan.aside = frozenset({0})
    assert not plan.is_dropped(B)
    assert plan.missing(B) == (4, 5)
    assert plan.next_examples(B, 0, limit=10) == (4, 5)
    plan.assign(B, (4, 5))
    assert not plan.is_open(B)
    assert plan.missing(A) == (1, 2, 3, 4, 5, 0)
    assert plan.first_of((0, 1, 2), A, limit=10) == (1,)
    assert plan.available() == 95 - 6 - 6  # for the baseline, and for another


@pytest.mark.parametrize(
    ("max_calls", "confirm", "warns"), [(39, True, True), (40, True, False), (11, False, False)]
)
def test_a_budget_that_confirming_takes_most_of_is_warned_of(
    max_calls: int, confirm: bool, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Ten examples of winner and baseline are 20 calls: half of 40."""
    warn_of_little(max_calls, 10, confirm)
    assert (f"takes up to 20 of max_calls={max_calls}" in caplog.text) == warns


def test_a_pair_that_fails_again_is_given_up_where_few_do() -> None:
    """One of ten; of two in three, each is asked for once more until the configuration is dropped."""
    plan = Schedule(10, (tuple(range(10)),), 100, baseline=A)
    plan.assign(A, range(10))
    assert not plan.release(A, [3])
    assert plan.missing(A) == (3,)
    plan.assign(A, (3,))
    assert plan.release(A, [3]) == {3}
    assert plan.missing(A) == ()
    assert not plan.is_open(A)
    for _ in range(2):
        plan.assign(B, (0, 1, 2))
        plan.release(B, [1, 2])
    assert {1, 2} <= set(plan.missing(B))
    assert not plan.is_dropped(B)
    plan.assign(B, (1, 2))
    plan.release(B, [1, 2])
    assert plan.is_dropped(B)
    assert plan.cost([B]) == 0


def test_a_baseline_that_lacks_examples_is_compared_on_the_others_too() -> None:
    """B has all six and leads; A is better on the five that both have."""
    plan = BlockPlan(schedule(), space_size=3, batch_size=1)
    ledger = Ledger()
    ledger.add(A, dict.fromkeys(range(5), 0.5))
    ledger.add(B, {**dict.fromkeys(range(5), 0.4), 5: 1.0})
    assert plan.winner([B, A], ledger) == A
    ledger.add(B, {0: 2.0})
    assert plan.winner([B, A], ledger) == B


def test_what_failed_for_the_baseline_waits_for_a_finalist() -> None:
    """Asked again by itself, example 0 would have it dropped before anyone else could fail on it."""
    plan = schedule()
    assert not plan.has_tried_all(A)
    plan.assign(A, range(6))
    plan.release(A, [0])
    assert plan.has_tried_all(A)


def test_stock_calls_by_hand() -> None:
    """18 minibatches of 35 and 5 full evaluations of 200: the medium run of DESIGN's benchmark."""
    assert stock_calls(18, 200) == 18 * 35 + 5 * 200 == 1630
    assert stock_calls(10, 40, minibatch=False) == 40 * 11


def test_a_round_occupies_every_worker() -> None:
    """At least 4 configurations, more when the pool is larger than four blocks."""
    assert default_batch_size(8, 10, max_calls=10_000) == 4
    assert default_batch_size(64, 10, max_calls=10_000) == 7


@pytest.mark.parametrize(("max_calls", "q"), [(2130, 7), (1630, 6), (600, 4)])
def test_four_rounds_are_no_more_than_a_share_of_the_budget(max_calls: int, q: int) -> None:
    """floor(0.15 x calls / (4 x 10)) configurations where that is less than 64 workers need; at least 4."""
    assert default_batch_size(64, 10, max_calls) == q


@pytest.mark.parametrize(
    ("num_threads", "batch_size", "rounds"), [(1, 4, 2), (40, 4, 2), (64, 7, 5), (128, 13, 5), (128, 4, 16)]
)
def test_rounds_in_flight_hold_five_items_for_every_worker_of_a_large_pool(
    num_threads: int, batch_size: int, rounds: int
) -> None:
    """ceil(5 x threads / (q x 10)) above 40 threads, two up to there."""
    assert default_rounds_in_flight(num_threads, batch_size, block_size=10, max_calls=10_000) == rounds


@pytest.mark.parametrize(("max_calls", "rounds"), [(2130, 5), (1630, 4), (600, 2), (100, 2)])
def test_rounds_in_flight_are_no_more_than_a_share_of_the_budget(max_calls: int, rounds: int) -> None:
    """64 workers, rounds of 70 calls: ceil(0.15 x calls / 70) of them, but two."""
    assert default_rounds_in_flight(64, 7, block_size=10, max_calls=max_calls) == rounds


def test_examples_that_could_not_be_measured_come_last() -> None:
    """Of five in order, 4 was lost: it is asked for again when nothing else is left."""
    plan = Schedule(5, ((0, 1), (2, 3), (4,)), 100, (0,))
    plan.assign((1,), (4, 3))
    plan.release((1,), (4,))
    assert plan.first_of((4, 3, 2, 1, 0), (1,), 10) == (2, 1)
    plan.assign((1,), (2, 1, 0))
    assert plan.first_of((4, 3, 2, 1, 0), (1,), 10) == (4,)


def test_the_first_trial_of_a_configuration_has_half_a_block() -> None:
    """Two of three examples, and all three from then on; cut to the budget."""
    plan = Schedule(6, ((0, 1, 2), (3, 4, 5)), 100, A)
    assert plan.first_of((5, 4, 3, 2, 1, 0), B, 10) == (5, 4)
    assert plan.first_of((5, 4, 3, 2, 1, 0), B, 1) == (5,)
    plan.assign(B, (5, 4))
    assert plan.first_of((5, 4, 3, 2, 1, 0), B, 10) == (3, 2, 1)
    assert Schedule(3, ((0, 1, 2),), 100, A).first_of((2, 1, 0), B, 10) == (2, 1, 0)


@pytest.mark.parametrize(("max_calls", "late", "last"), [(200, 100, 50), (2000, 12 * 40, 6 * 40)])
def test_a_large_pool_has_fewer_rounds_in_flight_towards_the_end(
    max_calls: int, late: int, last: int
) -> None:
    """Three quarters of them from half of the calls or twelve rounds before the end on, then half; or two."""
    parts = Schedule(40, partition(40, 10, seed=0), max_calls, baseline=(0, 0))
    large = BlockPlan(parts, 12, batch_size=4, rounds_in_flight=8)
    small = BlockPlan(parts, 12, batch_size=4)
    rounds = []
    for left in (max_calls, late + 1, late, last + 1, last, 0):
        parts.spent = max_calls - left
        rounds.append((large.rounds_now(), small.rounds_now()))
    assert rounds == [(8, 2), (8, 2), (6, 2), (6, 2), (4, 2), (4, 2)]
    few = BlockPlan(parts, 12, batch_size=4, rounds_in_flight=3)
    assert few.rounds_now() == 2
    parts.confirm = False
    assert large.rounds_now() == 8


def late(max_calls: int, measured: dict[tuple[int], int], in_flight: int = 8) -> tuple[BlockPlan, Any]:
    """A plan whose baseline is full, and whose rivals, the best first, have so many of 40 examples."""
    parts = Schedule(40, partition(40, 10, seed=0), max_calls, baseline=A)
    ledger = Ledger()
    for row, n in {A: 40, **measured}.items():
        parts.assign(row, range(n))
        ledger.add(row, dict.fromkeys(range(n), 0.5))
    ranked = SimpleNamespace(ledger=ledger, best_first=lambda rows: [(row, 0.5) for row in rows])
    return BlockPlan(parts, 12, batch_size=4, rounds_in_flight=in_flight), ranked


def asked_for(plan: BlockPlan, known: Any) -> Iterator[tuple[tuple[int] | None, int]]:
    """A round's requests, and how many examples each is for; what explores is new."""
    for new, request in enumerate(plan.next_round(known, alone=False), start=10):
        row = request.row or (new,)
        examples = request.examples(row, 0)
        plan.assign(row, examples)
        yield request.row, len(examples)


BLOCK, FINALISTS = (None, 10), [((1,), 10), ((2,), 10), ((3,), 10)]


@pytest.mark.parametrize(
    ("max_calls", "large", "small"),
    [
        (210, [BLOCK, BLOCK, *FINALISTS], [BLOCK, BLOCK]),  # 50 left, 30 of them for three finalists
        (205, FINALISTS, [BLOCK, (None, 5)]),  # less than half a round of 40 is free
        (190, FINALISTS, FINALISTS),
        (189, FINALISTS[:2], [(None, 9)]),  # three cannot be paid any more
    ],
)
def test_three_finalists_are_asked_for_at_once(max_calls: int, large: list[Any], small: list[Any]) -> None:
    """While other rounds come in; in a large pool, where few calls are not explored with, sooner."""
    measured = {(row,): 30 for row in (1, 2, 3, 4)}
    assert list(asked_for(*late(max_calls, measured))) == large
    assert list(asked_for(*late(max_calls, measured, in_flight=2))) == small


@pytest.mark.parametrize(("target", "measured", "asked"), [(0.9, 40, [(A, 1)]), (None, 10, [])])
def test_what_failed_for_the_baseline_is_asked_again_once_nobody_else_will_be(
    target: float | None, measured: int, asked: list[Any]
) -> None:
    """At once where a target ends the search; while rounds are awaited, a finalist may fail on it, too."""
    plan, known = late(80, {B: measured})
    plan.stopping = Stopping(target)
    plan.schedule.release(A, [39])  # nothing is left to explore with
    known.ledger = Ledger()
    known.ledger.add(A, dict.fromkeys(range(39), 0.5), lost=[39])
    known.ledger.add(B, dict.fromkeys(range(measured), 0.95))
    assert list(asked_for(plan, known)) == asked


def test_the_late_rounds_of_a_large_pool_have_calls_for_the_leader() -> None:
    """Of 270 calls 110 are left, 50 for three finalists: a round of 40, and half as many for who leads."""
    plan, known = late(270, {B: 10, **{(row,): 30 for row in (2, 3, 4)}, (5,): 20})
    assert list(asked_for(plan, known)) == [*[(None, 10)] * 4, (B, 20)]


def test_finalists_take_no_more_than_a_third_of_the_budget() -> None:
    """Of 240 calls, three that lack 35 would take 105 and two take 70, beside which ten are left."""
    plan, known = late(240, {**{(row,): 5 for row in (1, 2, 3, 4)}, **{(row,): 25 for row in range(5, 9)}})
    assert [request.row for request in plan.next_round(known, alone=False)] == [(1,), (2,)]


@pytest.mark.parametrize("in_flight", [2, 8])
@pytest.mark.parametrize(("measured", "at_once"), [(30, True), (20, True), (19, False), (5, False)])
def test_one_finalist_is_waited_for_unless_it_is_well_known(
    measured: int, at_once: bool, in_flight: int
) -> None:
    """If it has half of the examples: otherwise what is awaited may still make another one the leader."""
    for alone, asked in ((False, [B] * at_once), (True, [B])):
        plan, known = late(80, {B: measured}, in_flight)  # there are calls for nothing else
        assert [request.row for request in plan.next_round(known, alone)] == asked
