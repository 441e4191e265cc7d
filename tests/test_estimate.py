"""The estimate before a run against what the run then uses."""

from __future__ import annotations

from typing import Any

import pytest
from lms import arithmetic_lm
from tasks import FEW_SHOT, LABELLED_ONLY, QEI, SMALL_RUN_CALLS, ZERO_SHOT, Adder, Planner, compiled

from mpromptune.execution.usage import StepUsage, Usage
from mpromptune.mipro.estimate import Estimate, estimate


def _compile(lm: Any, program: Any, shots: Any, **options: Any) -> Any:
    init = {"num_candidates": 4, **shots}
    return compiled(program, lm=lm, init=init, **{**QEI, "block_size": 4, "batch_size": 2, **options})


@pytest.mark.parametrize("program", [Adder(), Planner()], ids=["one", "two"])
@pytest.mark.parametrize("shots", [ZERO_SHOT, LABELLED_ONLY, FEW_SHOT], ids=["zero", "labelled", "few"])
def test_a_run_takes_what_was_estimated(shots: dict[str, int], program: Any) -> None:
    """The search and the proposals exactly, the bootstrap at most; and the estimate itself asks nothing."""
    asked = arithmetic_lm()
    expected = _compile(asked, program, shots, dry_run=True)
    assert isinstance(expected, Estimate)
    assert asked.calls == []
    lm = arithmetic_lm()
    used = _compile(lm, program, shots, schedule="mipro", block_size=None).search_result.usage
    for step in ("search", "propose"):
        assert used[step].lm_calls == expected.usage[step].lm_calls
    assert used["search"].program_calls == expected.usage["search"].program_calls == SMALL_RUN_CALLS
    bootstrap = used["bootstrap"], expected.usage["bootstrap"]
    assert bootstrap[0].program_calls <= bootstrap[1].program_calls
    assert bootstrap[0].lm_calls <= bootstrap[1].lm_calls
    assert (bootstrap[1].lm_calls == 0) == (shots is LABELLED_ONLY)
    assert len(lm.calls) <= expected.usage.total.lm_calls


def test_a_budget_of_ones_own_is_what_the_search_takes() -> None:
    """``max_calls`` calls, two LM calls each; a last block that could not change the winner is not spent."""
    expected = _compile(arithmetic_lm(), Planner(), ZERO_SHOT, dry_run=True, max_calls=60)
    assert expected.usage["search"] == Usage(program_calls=60, lm_calls=120)
    best = _compile(arithmetic_lm(), Planner(), ZERO_SHOT, max_calls=60)
    assert 60 - 4 <= best.search_result.calls <= 60


def test_an_estimate_can_be_asked_for_in_the_constructor() -> None:
    """For callers that only know ``compile(student, trainset=...)``."""
    lm = arithmetic_lm()
    expected = compiled(lm=lm, init={"sampler_config": {"dry_run": True, "sampler": "tpe"}})
    assert isinstance(expected, Estimate)
    assert lm.calls == []


def test_proposals_during_the_search_are_a_row_of_their_own() -> None:
    """Room for 1 + 200 / 20 instructions of each predictor, of five requests at most; demo sets take none."""
    lm = arithmetic_lm()
    given = {"proposals": "adaptive", "max_calls": 200}
    expected = _compile(lm, Planner(), FEW_SHOT, dry_run=True, **given)
    assert lm.calls == []
    assert expected.usage["proposals"] == Usage(lm_calls=2 * 11 * 5)
    only = _compile(lm, Planner(), FEW_SHOT, dry_run=True, proposers=["merge", "demos"], **given)
    assert only.usage["proposals"] == Usage(lm_calls=2 * 11)
    assert "proposals: at most 0 program calls, 22 LM calls" in str(only)
    best = _compile(arithmetic_lm(), Planner(), FEW_SHOT, **given)
    assert best.search_result.usage["propose"].lm_calls <= expected.by_step["propose"].lm_calls
    assert best.search_result.usage["search"].program_calls <= 200


def test_proposals_may_take_at_most_all_calls() -> None:
    """Each request takes the place of a program call."""
    given = {"proposals": "adaptive", "proposers": ["fresh"], "max_calls": 40}
    expected = _compile(arithmetic_lm(), Planner(), ZERO_SHOT, dry_run=True, **given)
    assert expected.usage["proposals"] == Usage(lm_calls=2 * 3 * 5)
    assert "proposals" not in expected.by_step
    assert expected.by_step.total == expected.usage.total


def _by_hand(*prices: Any) -> Estimate:
    """Two predictors, 25 examples, 5 demo sets, 4 instructions, 100 calls."""
    given = {
        "program": Planner(),
        "trainset": [None] * 25,
        "num_fewshot_candidates": 5,
        "max_bootstrapped_demos": 1,
        "max_labeled_demos": 1,
    }
    flags = {"program_aware_proposer": True, "data_aware_proposer": True, "view_data_batch_size": 10}
    return estimate(given, flags, 4, 100, *prices)


def test_an_estimate_by_hand() -> None:
    """Three sets of 25 runs; 4 x 2 instructions of three requests and a summary of 1 + 2 + 1."""
    usage = _by_hand(None, None).usage
    assert usage == StepUsage(
        bootstrap=Usage(program_calls=75, lm_calls=150),
        propose=Usage(lm_calls=28),
        search=Usage(program_calls=100, lm_calls=200),
    )


def test_tokens_and_dollars_of_typical_requests() -> None:
    """378 requests of 1000 + 100 tokens; the prompt model costs ten times as much as the task model."""
    expected = _by_hand((1.0, 10.0), (10.0, 100.0)).with_tokens(1000, 100)
    assert expected.usage.total.tokens == 378 * 1100
    assert expected.usage["search"].cost == pytest.approx(200 * 0.002)
    assert expected.usage["propose"].cost == pytest.approx(28 * 0.02)
    assert str(expected).splitlines()[2] == (
        "search: at most 100 program calls, 200 LM calls, about 220000 tokens, $0.40"
    )


def test_an_unknown_price_is_not_passed_off_as_nothing() -> None:
    """The lines that lack one say so, the sum among them."""
    lines = str(_by_hand((1.0, 10.0), None).with_tokens(1000, 100)).splitlines()
    assert lines[1].endswith("price of propose not known")
    assert lines[2].endswith("$0.40")
    assert lines[3].endswith("price of propose not known")
    assert "$" not in str(_by_hand(None, None))
