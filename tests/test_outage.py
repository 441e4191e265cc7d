"""Broken candidates told from an outage, on failures written down by hand."""

from __future__ import annotations

import pytest

from mpromptune.engine.outage import Answer, Outage, last_failures
from mpromptune.execution.attempts import Verdict
from mpromptune.execution.pool import Outcome

A, B, C, D = ((i,) for i in range(4))


def calls(script: str, start: int = 0) -> list[Answer]:
    """``"A+ B-"``: A was answered, then B failed; one example each, unless as in ``"A-0"``."""
    rows = {"A": A, "B": B, "C": C, "D": D}
    answers = []
    for i, (row, sign, *example) in enumerate(script.split(), start):
        answer = {"score": 1.0} if sign == "+" else {"error": KeyError()}
        answers.append((rows[row], Outcome(int("".join(example) or i), order=i, **answer)))
    return answers


def judge(many: int = 10) -> Outage:
    """Every error is one of the infrastructure."""
    return Outage(lambda outcome: None if outcome.error is None else Verdict.RETRY, many)


def is_outage(script: str, outage: Outage | None = None) -> bool:
    """The last failures are judged, as part of a batch in which somebody else was answered first."""
    answers = calls(script)
    return (outage or judge())._is_outage(last_failures(answers), answers)


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
        ("A+ " * 10 + "B+ " * 10 + "C+ " * 10 + "A-0 B-0 C-0", False),  # of one example, which may be bad
        ("A+ " * 10 + "B+ " * 10 + "C+ " * 10 + "A-0 B-0 C-1", True),
    ],
)
def test_who_fails_decides(script: str, outage: bool) -> None:
    """Configurations that were answered before are the ones that tell."""
    assert is_outage(script) is outage


def test_what_was_told_counts() -> None:
    """Eight configurations that were fine so far make three new broken ones in a row unlikely."""
    outage = judge()
    outage.note([((row,), Outcome(0, score=1.0)) for row in range(10, 18)])
    assert not is_outage("A- B-", outage)  # (1/10)^2
    assert is_outage("A- B- C- D-", outage)


def alarm_after(script: str) -> bool:
    """Batches of one call each, in a run whose outages are ten failures: whether the last is an alarm."""
    outage, alarm = judge(), None
    for number, call in enumerate(script.split()):
        answers = calls(call, start=number)
        alarm = outage.alarm(answers, lambda answers=answers: (answers, []))
    return alarm is not None


def test_unanswerable_examples_neither_end_a_search_nor_are_signs_of_life() -> None:
    """Ten batches without an answer are an outage; in between, those of such an example do not count."""
    fine = "A+1 B+2 A-0 B-0 A+3 "  # who asks for example 0 next is not answered either
    assert not alarm_after(fine + "C-0 D-0 " * 20)
    assert not alarm_after(fine + "C-5 D-0 " * 9)
    assert alarm_after(fine + "C-5 D-0 " * 9 + "C-5")
