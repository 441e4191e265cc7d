"""The record of scores, by hand."""

from __future__ import annotations

import sys

import pytest

from mpromptune.storage.ledger import Ledger

A, B = (0,), (1,)


def test_a_second_answer_is_kept_beside_the_first() -> None:
    """Example 1 is answered 1 and 0: both stay, its mean is a half, and three calls were paid."""
    ledger = Ledger()
    ledger.add(A, {1: 1.0})
    ledger.add(A, {0: 1.0, 1: 0.0})
    assert ledger.scores[A] == {1: [1.0, 0.0], 0: [1.0]}
    assert ledger.means(A) == {0: 1.0, 1: 0.5}
    assert ledger.calls == 3


def test_examples_weigh_the_same_however_often_they_were_answered() -> None:
    """1, 1, 1 on one example and 0 on another: a half, not three quarters."""
    ledger = Ledger()
    for _ in range(3):
        ledger.add(A, {0: 1.0})
    ledger.add(A, {1: 0.0})
    assert ledger.mean(A) == pytest.approx(0.5)


def test_rows_without_a_score_do_not_count() -> None:
    """A trial that failed altogether leaves no configuration behind, but keeps its place."""
    ledger = Ledger()
    ledger.add(B, {})
    ledger.add(A, {0: 1.0})
    assert ledger.rows() == [A]
    ledger.add(B, {0: 1.0, 2: 1.0})
    assert ledger.rows() == [B, A]
    assert ledger.covers(B, 2)
    assert not ledger.covers(A, 2)


def test_what_nobody_can_be_measured_on_is_not_lacking() -> None:
    """Example 2 fails for A and B, which are answered elsewhere; once A is answered after all, B lacks it."""
    ledger = Ledger()
    ledger.add(A, {0: 1.0, 1: 0.0}, lost=[2])
    assert not ledger.covers(A, 3)
    ledger.add(B, {0: 1.0, 1: 1.0}, lost=[2])
    assert ledger.covers(A, 3)
    assert ledger.covers(B, 3)
    ledger.add(A, {2: 1.0})
    assert not ledger.covers(B, 3)


def test_the_mean_of_the_largest_floats_is_one_of_them() -> None:
    """Neither their sum nor the sum of their thirds is a number any more."""
    ledger = Ledger()
    for _ in range(3):
        ledger.add(A, {0: sys.float_info.max})
    assert ledger.mean(A) == sys.float_info.max
