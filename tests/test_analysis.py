"""What is computed from a result, against values by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from handmade import BASELINE, DEMOS, INSTRUCTION, TRIALS, WINNER, findings, study_of

from mpromptune.show.analysis import (
    Effect,
    ExampleScores,
    Step,
    example_scores,
    gain,
    growth,
    label,
    main_effects,
    never_solved,
    random_in_full,
    random_in_hindsight,
)
from mpromptune.storage.attributes import SETTINGS


def test_growth_is_the_best_estimate_met_so_far() -> None:
    """Calls add up over trials; the line only rises; a trial's own score is that on its examples."""
    assert growth(findings()) == [
        Step(2, 0.0, 0.3, 1),
        Step(4, 0.5, 0.5, 2),
        Step(8, 0.75, 0.7, 3),
        Step(10, 0.5, 0.7, 3),
    ]


# Posterior means 0, 1 and 2 of three configurations that are certain.
DRAWN = np.array([[1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])


def test_random_choice_in_full_is_the_best_of_as_many_as_the_calls_allow() -> None:
    """Ten calls on four examples measure two configurations: 1 on average, and (1 + 2 + 2) / 3."""
    assert random_in_full(findings(drawn=DRAWN)) == pytest.approx([1.0, 5 / 3])
    assert random_in_full(findings()) == []


def test_random_choice_in_full_learns_what_the_model_does_not_know() -> None:
    """Of two that are alike to the model, the better is expected at std / sqrt(pi) above their mean."""
    unknown = np.array([[0.5, 0.1], [0.5, 0.1]])
    assert random_in_full(findings(drawn=unknown)) == pytest.approx([0.5, 0.5 + 0.1 / np.pi**0.5], abs=1e-4)


def test_random_choice_in_hindsight_meets_as_many_as_the_search() -> None:
    """One, two, three, and still three configurations: 1, 5/3 and then the best of all."""
    assert random_in_hindsight(findings(drawn=DRAWN)) == pytest.approx([1.0, 5 / 3, 2.0, 2.0])
    sure_of_less = findings(drawn=np.add(DRAWN, [0.0, 0.3]))
    assert random_in_hindsight(sure_of_less) == pytest.approx([1.0, 5 / 3, 2.0, 2.0])
    assert random_in_hindsight(findings()) == []


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


def test_nothing_measured_is_no_error() -> None:
    """A result without configurations has no steps, no effects and no examples."""
    empty = findings(configurations=(), study=study_of(()))
    assert (growth(empty), main_effects(empty), example_scores(empty), never_solved(empty)) == (
        [],
        {},
        [],
        [],
    )


def test_baseline_comes_from_the_study() -> None:
    """A study that no search has made says nothing of a baseline."""
    assert findings().baseline_params == BASELINE.params
    foreign = study_of(TRIALS)
    foreign.set_user_attr(SETTINGS, {})
    assert findings(study=foreign).baseline_params is None
    assert gain(findings(study=foreign)) is None
