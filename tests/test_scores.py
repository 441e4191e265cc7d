"""The table of scores, by hand: what was asked, what came of it, and what is left."""

from __future__ import annotations

import sys

import pytest

from mpromptune.engine.scores import ScoreTable
from mpromptune.execution.usage import Usage
from mpromptune.model.space import Row

A, B, C = (0,), (1,), (2,)
ORDER = (2, 3, 4, 5, 0, 1)


def table(n_examples: int = 6) -> ScoreTable:
    return ScoreTable(n_examples)


def add(scores: ScoreTable, row: Row, measured: dict[int, float], lost: tuple[int, ...] = ()) -> None:
    """A trial that has these scores, and lacks the ``lost`` ones."""
    scores.add(row, (*measured, *lost), measured)


def test_a_second_answer_is_kept_beside_the_first() -> None:
    """Example 1 is answered 1 and 0: its mean is a half, and three calls were paid."""
    scores = table()
    add(scores, A, {1: 1.0})
    add(scores, A, {0: 1.0, 1: 0.0})
    assert scores.means(A) == {0: 1.0, 1: 0.5}
    assert scores.calls == 3


def test_examples_weigh_the_same_however_often_they_were_answered() -> None:
    """1, 1, 1 on one example and 0 on another: a half, not three quarters."""
    scores = table()
    for _ in range(3):
        add(scores, A, {0: 1.0})
    add(scores, A, {1: 0.0})
    assert scores.mean(A) == pytest.approx(0.5)


def test_the_mean_of_the_largest_floats_is_one_of_them() -> None:
    """Neither their sum nor the sum of their thirds is a number any more."""
    scores = table()
    for _ in range(3):
        add(scores, A, {0: sys.float_info.max})
    assert scores.mean(A) == sys.float_info.max


def test_rows_without_a_score_do_not_count() -> None:
    """A trial that failed altogether leaves no configuration behind, but keeps its place."""
    scores = table(2)
    add(scores, B, {}, lost=(0,))
    add(scores, A, {0: 1.0})
    assert scores.rows == [A]
    add(scores, B, {0: 1.0, 1: 1.0})
    assert scores.rows == [B, A]
    assert (scores.is_full(B), scores.is_full(A), scores.is_full(C)) == (True, False, False)


def test_use_is_told_by_configuration_and_failed_trials_are_paid_for() -> None:
    """Of 80 tokens in four scores, A took 10 a call and B 30; C is not known, and D had no score."""
    scores = table()
    scores.add(A, (0, 1), {0: 1.0, 1: 1.0}, usage=Usage(prompt_tokens=20))
    scores.add(B, (0, 1), {0: 1.0, 1: 1.0}, usage=Usage(prompt_tokens=60))
    assert [scores.relative_use(lambda usage: usage.tokens, row) for row in (A, B, C)] == [0.5, 1.5, 1.0]
    scores.add((3,), (0,), {}, usage=Usage(prompt_tokens=20))
    assert (scores.calls, scores.usage.tokens) == (4, 100)


def test_no_example_is_asked_twice_of_a_configuration() -> None:
    """It has those that it lacks, in the order given; another configuration lacks them all."""
    scores = table()
    assert scores.open_of(B, ORDER) == ORDER
    scores.start(B, (2, 3))
    assert scores.open_of(B, ORDER) == (4, 5, 0, 1)
    assert scores.missing(B) == (0, 1, 4, 5)
    assert scores.open_of(A, ORDER) == ORDER
    assert scores.is_open(B)
    scores.start(B, (4, 5, 0, 1))
    assert scores.open_of(B, ORDER) == ()
    assert not scores.is_open(B)
    assert (scores.asked_calls, scores.pending, scores.calls) == (6, 6, 0)


def test_a_failed_trial_gives_its_budget_back() -> None:
    """And its examples may be measured again, after those that never failed."""
    scores = table()
    add(scores, B, {0: 1.0}, lost=(1,))
    assert (scores.asked_calls, scores.pending) == (1, 0)
    assert scores.missing(B) == (2, 3, 4, 5, 1)
    assert scores.open_of(B, (1, 5, 4, 3, 2)) == (5, 4, 3, 2, 1)


def test_a_trial_that_was_cut_short_has_not_failed() -> None:
    """Its budget returns, and another run may ask as if nothing had been."""
    scores = table()
    scores.add(B, (0, 1), {0: 1.0}, is_over=False)
    assert scores.asked_calls == 1
    assert scores.missing(B) == (1, 2, 3, 4, 5)


def test_a_pair_that_fails_again_is_given_up_where_few_do() -> None:
    """One of ten; of two in three, each is asked for once more until the configuration is dropped."""
    scores = table(10)
    add(scores, A, dict.fromkeys({*range(10)} - {3}, 1.0), lost=(3,))
    assert scores.missing(A) == (3,)
    assert not scores.is_full(A)
    add(scores, A, {}, lost=(3,))
    assert scores.missing(A) == ()
    assert scores.is_full(A)
    assert not scores.is_open(A)
    for _ in range(2):
        add(scores, B, {0: 1.0}, lost=(1, 2))
    assert {1, 2} <= set(scores.missing(B))
    assert not scores.is_dropped(B)
    add(scores, B, {}, lost=(1, 2))
    assert scores.is_dropped(B)
    scores.forgive(B)
    assert not scores.is_dropped(B)


def test_what_nobody_can_be_measured_on_is_left_out() -> None:
    """Example 2 fails for A and B, which are answered elsewhere; once A is answered after all, B lacks it."""
    scores = table(3)
    add(scores, A, {0: 1.0, 1: 0.0}, lost=(2,))
    assert not scores.is_full(A)
    assert scores.unanswerable == frozenset()
    add(scores, B, {0: 1.0, 1: 1.0}, lost=(2,))
    assert scores.unanswerable == {2}
    assert scores.is_full(A)
    assert scores.is_full(B)
    assert scores.open_of(C, (0, 1, 2)) == (0, 1)  # nobody new is asked on it,
    assert scores.missing(C) == (0, 1, 2)  # but who is to be whole, once
    assert scores.missing(B) == ()
    add(scores, A, {2: 1.0})
    assert not scores.is_full(B)


def test_an_example_is_judged_by_configurations_that_are_answered_elsewhere() -> None:
    """C is answered nowhere, so it says nothing of example 0; A and B do, until it is answered twice."""
    scores = table()
    add(scores, A, {1: 1.0}, lost=(0,))
    add(scores, C, {}, lost=(0, 2))
    assert scores.unanswerable == frozenset()
    add(scores, B, {1: 1.0}, lost=(0,))
    assert scores.unanswerable == {0}
    for row in ((4,), (5,)):
        add(scores, row, {0: 1.0})
    assert scores.unanswerable == frozenset()


def test_a_prompt_that_is_refused_counts_unless_others_are_refused_too() -> None:
    """A is refused on example 0 and scores nothing there; once B is as well, neither is compared on it."""
    scores = table(2)
    scores.add(A, (0, 1), {0: 0.0, 1: 1.0}, refused={0})
    assert scores.means(A) == {0: 0.0, 1: 1.0}
    scores.add(B, (0, 1), {0: 0.0, 1: 1.0}, refused={0})
    assert scores.means(A) == scores.means(B) == {1: 1.0}


def test_prompts_that_are_refused_again_and_again_have_their_scores() -> None:
    """A plan may ask for what has a score already: two of four refused twice are no examples that A lacks."""
    scores = table(4)
    for _ in range(2):
        scores.add(A, (0, 1, 2, 3), {0: 0.0, 1: 0.0, 2: 1.0, 3: 1.0}, refused={0, 1})
    assert scores.is_full(A)


def test_failures_that_are_forgiven_are_tried_again() -> None:
    """Three trials failed on one example of twenty; once they are forgiven, it is lacking like any other."""
    scores = table(20)
    for _ in range(3):
        add(scores, A, {}, lost=(0,))
    assert scores.is_dropped(A)
    scores.forgive(A)
    add(scores, A, dict.fromkeys(range(1, 20), 1.0))
    assert scores.missing(A) == (0,)
    assert not scores.is_full(A)
