"""Broken candidates told from an outage, on failures written down by hand."""

from __future__ import annotations

import pytest

from mpromptune.calls.execution import Outcome
from mpromptune.calls.outage import Answer, Reliability, last_failures

A, B, C, D = ((i,) for i in range(4))


def calls(script: str, start: int = 0) -> list[Answer]:
    """``"A+ B-"``: A was answered, then B failed; one example each."""
    rows = {"A": A, "B": B, "C": C, "D": D}
    return [
        (rows[row], Outcome(i, score=1.0, order=i) if sign == "+" else Outcome(i, error=KeyError(), order=i))
        for i, (row, sign) in enumerate(script.split(), start)
    ]


def judged(script: str, many: int = 10) -> bool:
    answers = calls(script)
    run = last_failures(answers)
    return Reliability().after(answers, run).is_outage(run, many)


def test_only_failures_after_the_last_success_count() -> None:
    """In the order in which calls came back, whatever the order in which they are listed."""
    answers = calls("A- B+ C- D-")
    assert [row for row, _ in last_failures(reversed(answers))] == [C, D]
    assert last_failures([*answers, *calls("A+", start=9)]) == []
    assert last_failures([(A, Outcome(0))]) == []  # skipped, which says nothing


@pytest.mark.parametrize(
    ("script", "outage"),
    [
        ("A+ " * 10 + "B- " * 10, False),  # one broken candidate came last
        ("A+ " * 10 + "B- " * 10 + "C- " * 10, False),  # two of them: (1/3)^2
        ("A+ " * 5 + "B- " * 20 + "A+ " * 5 + "C- " * 20 + "D- " * 20, False),  # they abound here
        ("A+ " * 10 + "B+ " * 10 + "A- B- " * 2, True),  # (1/12)^4
        ("A+ " * 10 + "B+ " * 5 + "B- " * 5 + "C- " * 10, True),  # began in the middle of B
        ("A+ " * 9 + "A- B-", False),  # 1/11 * 1/3
        ("A+ " * 50 + "A- " * 9, False),  # one configuration may have met a bad stretch of examples
        ("A+ " * 50 + "A- " * 10, True),  # but no longer one than a block
        ("A+ A- " * 20 + "A+ A- A- A- B-", False),  # A fails every other time
    ],
)
def test_who_fails_decides(script: str, outage: bool) -> None:
    """Configurations that were answered before are the ones that tell."""
    assert judged(script) is outage


def test_what_was_told_counts() -> None:
    """Eight configurations that were fine so far make three new broken ones in a row unlikely."""
    told = Reliability()
    told.note(((row,), Outcome(0, score=1.0)) for row in range(10, 18))
    run = calls("A- B- C- D-")
    assert not told.is_outage(run[:2], many=10)  # (1/10)^2
    assert told.is_outage(run, many=10)
    assert not told.is_empty
    assert Reliability().after(run, run).is_empty


def test_an_example_that_fails_for_several_good_configurations_is_unanswerable() -> None:
    """Where it is answered for fewer of them; who is answered nowhere says nothing of it."""
    told = Reliability()
    good, bad, never = [(row, Outcome(1, score=1.0)) for row in (A, B, C)], 0, 2
    told.note([*good, (A, Outcome(bad, error=KeyError())), (D, Outcome(bad, error=KeyError()))])
    assert not told.is_unanswerable(bad)  # of A alone: D may be broken
    told.note([(B, Outcome(bad, error=KeyError())), (B, Outcome(bad, error=KeyError()))])
    assert told.is_unanswerable(bad)
    told.note([(C, Outcome(bad, score=1.0)), (C, Outcome(bad, score=1.0))])
    assert not told.is_unanswerable(bad)
    assert not told.is_unanswerable(never)
