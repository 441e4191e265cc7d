"""Budgets, and what DSPy would have spent."""

from __future__ import annotations

import pytest

from mpromptune.engine.schedule import (
    Confirm,
    Minibatches,
    check_block_size,
    check_budget,
    default_block_size,
    stock_calls,
    warn_of_little,
)
from mpromptune.errors import InvalidArgumentError


@pytest.mark.parametrize("block_size", [0, 7])
def test_impossible_block_sizes_are_refused(block_size: int) -> None:
    """The message names both numbers."""
    with pytest.raises(InvalidArgumentError, match=f"6 validation examples; got {block_size}"):
        check_block_size(block_size, 6)


@pytest.mark.parametrize(("n_examples", "size", "combined"), [(1, 1, 1), (4, 4, 3), (5, 5, 3), (200, 5, 3)])
def test_a_block_has_five_examples_or_all(n_examples: int, size: int, combined: int) -> None:
    """Three where predictors are combined; it never has more than the validation set."""
    assert (default_block_size(n_examples), default_block_size(n_examples, True)) == (size, combined)


@pytest.mark.parametrize(("confirm", "least"), [(True, 20), ("auto", 1), (False, 1)])
def test_only_full_confirmation_needs_a_budget(confirm: Confirm, least: int) -> None:
    """Ten examples of winner and baseline are 20 calls; otherwise one call is a search."""
    check_budget(least, 10, confirm)
    with pytest.raises(InvalidArgumentError, match=f"max_calls={least - 1} is below the {least} calls"):
        check_budget(least - 1, 10, confirm)


@pytest.mark.parametrize(
    ("max_calls", "confirm", "warns"),
    [(39, True, True), (40, True, False), (11, False, False), (11, "auto", False)],
)
def test_a_budget_that_confirming_takes_most_of_is_warned_of(
    max_calls: int, confirm: Confirm, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Ten examples of winner and baseline are 20 calls: half of 40."""
    warn_of_little(max_calls, 10, confirm)
    assert (f"takes up to 20 of max_calls={max_calls}" in caplog.text) == warns


def test_stock_calls_by_hand() -> None:
    """18 minibatches of 35 and 5 full evaluations of 200: MIPROv2's medium run."""
    assert stock_calls(18, 200) == 18 * 35 + 5 * 200 == 1630
    assert stock_calls(10, 40, minibatch=False) == 40 * 11


@pytest.mark.parametrize(("max_calls", "trials"), [(47, 1), (48, 2), (51, 2), (71, 2), (72, 3)])
def test_trials_for_a_budget_by_hand(max_calls: int, trials: int) -> None:
    """Minibatches of 4 of 20 examples, in full after every second: n trials take 20 + 20 ceil(n/2) + 4 n."""
    assert Minibatches(4, 2).trials_for(max_calls, 20) == trials


def test_a_budget_below_one_trial_is_refused() -> None:
    """The baseline, a minibatch and a full evaluation of 20 examples are 44 calls."""
    with pytest.raises(InvalidArgumentError, match="below the 44 calls"):
        Minibatches(4, 2).trials_for(43, 20)
