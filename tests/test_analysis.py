"""What is computed from a result, against values by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from handmade import BASELINE, DEMOS, INSTRUCTION, OTHER, TRIALS, WINNER, findings, study_of

from mpromptune.analysis import (
    Effect,
    ExampleScores,
    Step,
    example_scores,
    gain,
    growth,
    label,
    main_effects,
    never_solved,
    warning_signs,
)
from mpromptune.attributes import SETTINGS


def test_growth_is_the_best_estimate_met_so_far() -> None:
    """Calls add up over trials; the line only rises; a trial's own score is that on its examples."""
    assert growth(findings()) == [
        Step(2, 0.0, 0.3),
        Step(4, 0.5, 0.5),
        Step(8, 0.75, 0.7),
        Step(10, 0.5, 0.7),
    ]


def test_main_effects_are_means_over_the_configurations_that_have_a_candidate() -> None:
    """Each candidate has the mean of the posterior means of its configurations, and their number."""
    assert main_effects(findings()) == {
        INSTRUCTION: [Effect(0, pytest.approx(0.4), 2), Effect(1, 0.7, 1)],
        DEMOS: [Effect(0, pytest.approx(0.5), 2), Effect(1, 0.5, 1)],
    }


def test_examples_are_listed_hardest_first() -> None:
    """An example has the mean and the best score of the configurations that were measured on it."""
    assert example_scores(findings()) == [
        ExampleScores(1, 0.0, 0.0, 3),
        ExampleScores(3, 0.5, 1.0, 2),
        ExampleScores(0, pytest.approx(2 / 3), 1.0, 3),
        ExampleScores(2, 1.0, 1.0, 2),
    ]


def test_never_solved_does_not_depend_on_the_scale_of_the_metric() -> None:
    """What no configuration lifts above the lowest score of the search is unsolved, on any scale."""
    assert [one.example for one in never_solved(findings())] == [1]
    scaled = [
        replace(m, scores={e: 500.0 * s - 900.0 for e, s in m.scores.items()})
        for m in findings().configurations
    ]
    assert [one.example for one in never_solved(findings(configurations=tuple(scaled)))] == [1]


def test_gain_is_that_on_shared_examples() -> None:
    """The differences 1, 0, 0, 1 have the mean 1/2, and the standard error sqrt((1/3) / 4)."""
    assert gain(findings()) == pytest.approx((0.5, (1 / 12) ** 0.5))
    assert gain(findings(best_params=BASELINE.params)) is None
    assert gain(findings(configurations=(WINNER,))) is None


def test_labels_name_indices_by_predictor() -> None:
    """MIPROv2's names are shortened; others stay."""
    params = {INSTRUCTION: 2, DEMOS: 1, "1_predictor_instruction": 0, "style": 3}
    assert label(params) == "0: instr. 2, demos 1 | 1: instr. 0 | style 3"


def has(signs: list[str], fragment: str) -> bool:
    return any(fragment in sign for sign in signs)


def test_flat_top_is_a_difference_within_its_standard_deviation() -> None:
    """0.3 ± 0.03 and 0.4 ± 0.04 differ by two standard deviations (3-4-5), 0.66 ± 0.04 and 0.7 by less."""
    assert not has(warning_signs(findings()), "The top is flat")
    near = replace(OTHER, posterior_mean=0.66, posterior_std=0.04)
    assert has(warning_signs(findings(configurations=(WINNER, near, BASELINE))), "flat: 1 configuration ")
    apart = replace(near, posterior_mean=0.64)
    assert not has(warning_signs(findings(configurations=(WINNER, apart, BASELINE))), "The top is flat")


def test_overfitting_is_a_mean_above_what_the_model_expects() -> None:
    """0.75 is more than a standard deviation above 0.7 ± 0.03, and not above 0.7 ± 0.06."""
    assert has(warning_signs(findings()), "Risk of overfitting: the winner scored 0.75")
    wide = replace(WINNER, posterior_std=0.06)
    assert not has(warning_signs(findings(configurations=(wide, OTHER, BASELINE))), "Risk of overfitting")


def test_warnings_say_what_a_score_is_worth() -> None:
    """Few examples, a gain that may be chance, a winner that was not fully measured, a limit."""
    signs = warning_signs(findings(stopped_by="max_cost"))
    assert has(signs, "only 4 examples")
    assert has(signs, "0.5 ± 0.29 (standard error), may be chance")
    assert has(signs, "ended by max_cost")
    assert has(warning_signs(findings(best_params=OTHER.params)), "on 2 of 4 validation examples")


def test_warnings_where_nothing_was_learnt() -> None:
    """A single configuration, the baseline as the winner, equal scores everywhere."""
    alone = findings(best_params=BASELINE.params, configurations=(BASELINE,))
    assert has(warning_signs(alone), "Only one configuration")
    assert has(warning_signs(alone), "Nothing was found that beats the baseline")
    flat = tuple(replace(m, scores=dict.fromkeys(m.scores, 2.0)) for m in findings().configurations)
    assert has(warning_signs(findings(configurations=flat)), "Every score is 2")
    assert never_solved(findings(configurations=flat)) == []


def test_failed_trials_are_told() -> None:
    """Their scores count as calls, and a sentence says how many there are."""
    broken = findings(study=study_of(TRIALS, lost=[0]))
    assert has(warning_signs(broken), "failed or were cut off: 1;")
    assert growth(broken)[-1].calls == 10


def test_nothing_measured_is_no_error() -> None:
    """A result without configurations has no steps, no effects and no examples."""
    empty = findings(configurations=(), study=study_of(()))
    assert (growth(empty), main_effects(empty), example_scores(empty), never_solved(empty)) == (
        [],
        {},
        [],
        [],
    )
    assert has(warning_signs(empty), "validation set")


def test_baseline_comes_from_the_study() -> None:
    """A study that no search has made says nothing of a baseline."""
    assert findings().baseline_params == BASELINE.params
    foreign = study_of(TRIALS)
    foreign.set_user_attr(SETTINGS, {})
    assert findings(study=foreign).baseline_params is None
    assert gain(findings(study=foreign)) is None
