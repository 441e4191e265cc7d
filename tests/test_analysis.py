"""What is computed from a result, against values by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from handmade import BASELINE, DEMOS, INSTRUCTION, TRIALS, WINNER, findings, study_of

from mpromptune.reports.analysis import (
    Effect,
    ExampleScores,
    Step,
    block_scores,
    blocks_of,
    example_scores,
    gain,
    growth,
    label,
    main_effects,
    never_solved,
    random_in_full,
    random_in_hindsight,
)
from mpromptune.studies.attributes import SETTINGS


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


def test_blocks_are_corrected_for_who_was_measured_on_them() -> None:
    """Winner and baseline score 1 and 1/2 on examples 2 and 3, and 1/2, 0 and (the third) 1/2 on 0 and 1.

    That is 0.3 and 0.2 above what is expected of them, 0.7 and 0.3; and 0.2, 0.3 and 0 below. All
    three are expected to score 0.5 on average. The pooled variance of these deviations is
    (0.005 + 0.14 / 3) / 3.
    """
    assert set(map(frozenset, blocks_of(findings()))) == {frozenset({0, 1}), frozenset({2, 3})}
    hard, easy = block_scores(findings())
    assert set(blocks_of(findings())[hard.block]) == {0, 1}
    assert (hard.count, easy.count) == (3, 2)
    assert (hard.mean, easy.mean) == pytest.approx((0.5 - 0.5 / 3, 0.75))
    variance = (0.005 + 0.14 / 3) / 3
    assert (hard.error, easy.error) == pytest.approx(((variance / 3) ** 0.5, (variance / 2) ** 0.5))


def test_blocks_that_only_good_configurations_were_measured_on_do_not_look_easy() -> None:
    """Both score what is expected of them, 0.9 and 0.1, each on its own block."""
    first, second = blocks_of(findings())
    good = replace(WINNER, scores=dict.fromkeys(first, 0.9), posterior_mean=0.9)
    poor = replace(BASELINE, scores=dict.fromkeys(second, 0.1), posterior_mean=0.1)
    found = block_scores(findings(configurations=(good, poor)))
    assert [one.mean for one in found] == pytest.approx([0.5, 0.5])


def test_plans_without_blocks_have_none() -> None:
    """DSPy's minibatches are drawn anew for every trial."""
    study = study_of(TRIALS)
    study.set_user_attr(
        SETTINGS, {"arguments": {"baseline": BASELINE.params, "minibatch_size": 2, "seed": 0}}
    )
    assert block_scores(findings(study=study)) == []


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
