"""search(patience=..., target=...): calls that are not spent, and trials that stay the same."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from optuna.trial import TrialState
from tasks import is_spent
from test_engine import SPACE, TABLE, N, Scores, run, trials_of

from mpromptune.errors import InvalidArgumentError
from mpromptune.execution.attempts import RetryPolicy
from mpromptune.storage.attributes import EXAMPLES

BUDGET = 500


@lru_cache(maxsize=1)
def in_full() -> list[tuple]:
    """The trials of the search that spends its whole budget."""
    return trials_of(run(max_calls=BUDGET))


def common_trials(trials: list[tuple]) -> int:
    """How many trials there are before the first that differs from the whole search's."""
    pairs = zip(trials, in_full(), strict=False)
    return next((i for i, (ours, whole) in enumerate(pairs) if ours != whole), len(trials))


def clear(params: dict[str, int], example: int) -> float:
    """One configuration is always right, the others on every fourth example."""
    return float(SPACE.row(params) == (2, 1) or example % 4 == 0)


def test_patience_saves_calls_once_nothing_is_to_be_won() -> None:
    """One is far ahead: a part of the budget shows it, and winner and baseline are confirmed."""
    result = run(clear, max_calls=BUDGET, patience=2, confirm=True)
    assert result.calls < 0.6 * BUDGET
    assert SPACE.row(result.best_params) == (2, 1)
    assert (result.best_score, result.baseline_score) == (1.0, 0.25)


def test_patience_changes_no_trial_before_the_stop() -> None:
    """The trials are those of the search without it, up to the last ones, which confirm."""
    scores = Scores()
    result = run(scores, max_calls=BUDGET, patience=2)
    trials = trials_of(result)
    assert result.calls == sum(scores.asked.values()) < BUDGET
    assert max(scores.asked.values()) == 1
    assert len(trials) - common_trials(trials) <= 2
    assert result.best_score == TABLE[SPACE.row(result.best_params)].mean()


def test_endless_patience_changes_nothing() -> None:
    """Asking the posterior leaves the proposals alone."""
    assert trials_of(run(max_calls=BUDGET, patience=10**6)) == in_full()


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_patience_works_with_every_sampler(sampler: str) -> None:
    """The rule is the surrogate's, whoever proposes."""
    assert run(clear, max_calls=BUDGET, patience=2, sampler=sampler).calls < BUDGET


@pytest.mark.parametrize("target", [0.3, 0.5, 0.6, 0.7, 0.75, 0.9])
def test_a_target_ends_in_a_confirmed_score_or_with_the_budget(target: float) -> None:
    """Either the winner has it on every example, or exploration went on until nothing was left."""
    result = run(max_calls=BUDGET, target=target, confirm=True)
    assert result.best_score >= target or is_spent(result, BUDGET)
    assert result.best_score == TABLE[SPACE.row(result.best_params)].mean()
    assert result.baseline_score == TABLE[0, 0].mean()
    if target <= 0.5:
        assert result.calls < 0.5 * BUDGET


def test_an_unreachable_target_changes_nothing() -> None:
    """No mean of 0/1 scores is above 1."""
    assert trials_of(run(max_calls=BUDGET, target=1.1)) == in_full()


def test_a_leader_that_misses_the_target_is_not_the_end() -> None:
    """All but the baseline are right on 24 of 40 examples, some on those that come first; one on all."""
    budget = 2 * BUDGET
    tried = [trial[1] for trial in trials_of(run(max_calls=budget, sampler="random", confirm=True))[:8]]
    good = next(row for row in TABLE if SPACE.params(row) not in tried)
    rng = np.random.default_rng(0)
    right = {row: set(rng.permutation(N)[:24].tolist()) for row in TABLE}
    right |= {good: set(range(N)), (0, 0): set()}

    def score(params: dict[str, int], example: int) -> float:
        return float(example in right[SPACE.row(params)])

    result = run(score, max_calls=budget, target=0.66, sampler="random", confirm=True)
    trials = result.study.trials
    confirmed = [t.number for t in trials if len(t.user_attrs[EXAMPLES]) > 5]
    assert (SPACE.row(result.best_params), result.best_score) == (good, 1.0)
    assert result.calls < budget
    assert len(confirmed) > 2  # the baseline, a leader that missed, and the one that did not
    assert confirmed[-1] - confirmed[0] > len(confirmed)  # with exploration between them


def test_without_confirmation_the_target_just_ends_the_search() -> None:
    """The leader's posterior is all there is to go by."""
    result = run(max_calls=BUDGET, target=0.3, confirm=False)
    assert result.calls <= 5 + 2 * 4 * 5  # the baseline's block, and two batches of four
    assert trials_of(result) == trials_of(run(max_calls=BUDGET, confirm=False))[: len(trials_of(result))]


def test_the_same_seed_stops_at_the_same_trial_whatever_the_threads() -> None:
    """1 thread, and 16 threads with shuffled latencies."""
    rules: dict[str, Any] = {"patience": 2, "target": 0.75, "batch_size": 4, "max_calls": BUDGET}
    threaded = run(Scores(delay=0.005), num_threads=16, **rules)
    assert trials_of(run(num_threads=1, **rules)) == trials_of(threaded)


def test_failed_trials_do_not_confuse_the_rules() -> None:
    """One configuration never answers; patience and target still end in a confirmed winner."""

    def score(params: dict[str, int], example: int) -> float:
        if params["0_predictor_instruction"] == 3:
            raise ConnectionError("down")
        return float(TABLE[SPACE.row(params)][example])

    result = run(score, max_calls=BUDGET, patience=3, target=0.75, retry=RetryPolicy(attempts=1))
    assert any(t.state == TrialState.FAIL for t in result.study.trials)
    assert result.best_score == TABLE[SPACE.row(result.best_params)].mean()


@pytest.mark.parametrize(
    "bad", [{"patience": 0}, {"patience": 1.5}, {"target": float("nan")}, {"target": "1"}]
)
def test_rules_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    """Before any call, by name."""
    scores = Scores()
    with pytest.raises(InvalidArgumentError, match=next(iter(bad))):
        run(scores, **bad)
    assert not scores.asked


def test_nothing_is_paid_for_once_the_target_is_reached_and_confirmed() -> None:
    """A baseline that is always right needs no rival: what follows its confirmation was under way."""
    scores = Scores()

    def score(params: dict[str, int], example: int) -> float:
        scores(params, example)
        return float(SPACE.row(params) == (0, 0))

    result = run(score, max_calls=BUDGET, target=0.9, confirm=True)
    assert result.best_score == 1.0
    assert sum(measured.fully for measured in result.configurations) == 1
    assert result.calls < 2 * N + 40
