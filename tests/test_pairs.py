"""Which pairs were asked, which failed, and what is left of the budget, by hand."""

from __future__ import annotations

from mpromptune.engine.pairs import Pairs

A, B, C = (0,), (1,), (2,)
ORDER = (2, 3, 4, 5, 0, 1)


def pairs(n_examples: int = 6, max_calls: int = 100) -> Pairs:
    return Pairs(n_examples, max_calls)


def test_no_example_is_asked_twice_of_a_configuration() -> None:
    """It has those that it lacks, in the order given; another configuration lacks them all."""
    asked = pairs()
    assert asked.open_of(B, ORDER) == ORDER
    asked.assign(B, (2, 3))
    assert asked.open_of(B, ORDER) == (4, 5, 0, 1)
    assert asked.missing(B) == (0, 1, 4, 5)
    assert asked.open_of(A, ORDER) == ORDER
    assert asked.is_open(B)
    asked.assign(B, (4, 5, 0, 1))
    assert asked.open_of(B, ORDER) == ()
    assert not asked.is_open(B)
    assert (asked.spent, asked.remaining) == (6, 94)


def test_a_full_measurement_costs_what_is_missing_at_its_price() -> None:
    """A and B lack 4 each and C all 6, at twice the price of the others."""
    asked = pairs(max_calls=20)
    asked.assign(A, (0, 1))
    asked.assign(B, (0, 1))
    assert asked.cost([A, B]) == 4 + 4
    assert asked.cost([A, B, C]) == 4 + 4 + 6
    asked.price = lambda row: 1.0 + (row == C)
    assert asked.cost([B, C]) == 4 + 2 * 6


def test_a_failed_trial_gives_its_budget_back() -> None:
    """And its examples may be measured again, after those that never failed."""
    asked = pairs()
    asked.assign(B, (0, 1))
    asked.release(B, [1])
    assert asked.spent == 1
    assert asked.missing(B) == (2, 3, 4, 5, 1)
    assert asked.open_of(B, (1, 5, 4, 3, 2)) == (5, 4, 3, 2, 1)


def test_examples_set_aside_are_lacked_by_nobody() -> None:
    """Who has failed on them is not asked again, nor blamed; who has not, only when it is to be whole."""
    asked = pairs()
    for failing in ((0, 1), (0, 2), (0, 3)):
        asked.assign(B, failing)
        asked.release(B, [0])
    assert asked.is_dropped(B)
    asked.aside = frozenset({0})
    assert not asked.is_dropped(B)
    assert asked.missing(B) == (4, 5)
    assert asked.open_of(B, ORDER) == (4, 5)
    asked.assign(B, (4, 5))
    assert not asked.is_open(B)
    assert asked.missing(A) == (1, 2, 3, 4, 5, 0)
    assert asked.open_of(A, (0, 1, 2)) == (1, 2)


def test_a_pair_that_fails_again_is_given_up_where_few_do() -> None:
    """One of ten; of two in three, each is asked for once more until the configuration is dropped."""
    asked = pairs(n_examples=10)
    asked.assign(A, range(10))
    assert not asked.release(A, [3])
    assert asked.missing(A) == (3,)
    asked.assign(A, (3,))
    assert asked.release(A, [3]) == {3}
    assert asked.missing(A) == ()
    assert not asked.is_open(A)
    for _ in range(2):
        asked.assign(B, (0, 1, 2))
        asked.release(B, [1, 2])
    assert {1, 2} <= set(asked.missing(B))
    assert not asked.is_dropped(B)
    asked.assign(B, (1, 2))
    asked.release(B, [1, 2])
    assert asked.is_dropped(B)
    assert asked.cost([B]) == 0
    asked.forgive(B)
    assert not asked.is_dropped(B)
