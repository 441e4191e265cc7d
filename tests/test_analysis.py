"""What is computed from a result, against values by hand, and the warning signs that follow from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from handmade import BASELINE, DEMOS, INSTRUCTION, OTHER, SPACE, TRIALS, WINNER, findings, study_of

from mpromptune import PromptSpace, SearchResult, qEISampler, search
from mpromptune.show import readings
from mpromptune.show.analysis import (
    chance_of_gain,
    differences,
    example_scores,
    growth,
    main_effects,
    never_solved,
    random_in_full,
    random_in_hindsight,
)
from mpromptune.show.signs import Sign, warning_signs
from mpromptune.show.words import beside_winner, candidate_name, label, title
from mpromptune.storage.attributes import PREDICTORS, SETTINGS

NOTHING = {"configurations": (), "study": study_of(())}


def test_growth_is_the_best_estimate_met_so_far() -> None:
    """Calls add up over trials; the line only rises; a trial's own score is that on its examples."""
    assert growth(findings()) == [(2, 0.0, 0.3, 1), (4, 0.5, 0.5, 2), (8, 0.75, 0.7, 3), (10, 0.5, 0.7, 3)]


# Posterior means 0, 0.5 and 1 of three configurations that are certain.
DRAWN = np.array([[0.5, 0.0], [0.0, 0.0], [1.0, 0.0]])


def test_random_choice_in_full_is_the_best_of_as_many_as_the_calls_allow() -> None:
    """Ten calls on four examples measure two configurations: 0.5 on average, and (0.5 + 1 + 1) / 3."""
    assert random_in_full(findings(drawn=DRAWN)) == pytest.approx([0.5, 5 / 6])
    assert random_in_full(findings()) == []
    # Of two that are alike to the model, the better is expected at std / sqrt(pi) above their mean.
    unknown = np.array([[0.5, 0.1], [0.5, 0.1]])
    assert random_in_full(findings(drawn=unknown)) == pytest.approx([0.5, 0.5 + 0.1 / np.pi**0.5], abs=1e-4)
    # No mean of scores from 0 to 1 is higher, as 0.9 + 1 / sqrt(pi) would be.
    assert random_in_full(findings(drawn=np.array([[0.9, 1.0], [0.9, 1.0]])))[1] == 1.0


def test_random_choice_in_hindsight_meets_as_many_as_the_search() -> None:
    """One, two, three, and still three configurations: 0.5, 5/6 and then the best of all."""
    assert random_in_hindsight(findings(drawn=DRAWN)) == pytest.approx([0.5, 5 / 6, 1.0, 1.0])
    sure_of_less = findings(drawn=np.add(DRAWN, [0.0, 0.3]))
    assert random_in_hindsight(sure_of_less) == pytest.approx([0.5, 5 / 6, 1.0, 1.0])
    assert random_in_hindsight(findings()) == []


def test_candidates_and_examples_have_the_estimates_and_scores_that_were_measured() -> None:
    """By candidate, the posterior means of its configurations; by example, the hardest first, all scores."""
    assert main_effects(findings()) == {
        INSTRUCTION: {0: [0.5, 0.3], 1: [0.7]},
        DEMOS: {0: [0.7, 0.3], 1: [0.5]},
    }
    assert list(example_scores(findings()).items()) == [
        (1, [0.0, 0.0, 0.0]),
        (3, [1.0, 0.0]),
        (0, [1.0, 1.0, 0.0]),
        (2, [1.0, 1.0]),
    ]


def test_never_solved_does_not_depend_on_the_scale_of_the_metric() -> None:
    """What no configuration lifts above the lowest score of the search is unsolved, on any scale."""
    assert never_solved(findings()) == [1]
    scaled = (
        replace(m, scores={e: 500.0 * s - 900.0 for e, s in m.scores.items()})
        for m in findings().configurations
    )
    assert never_solved(findings(configurations=tuple(scaled))) == [1]


def test_the_gain_needs_winner_and_baseline() -> None:
    """By example it is 1, 0, 0 and 1; where one of the two is not known, there is none."""
    assert differences(findings()) == [1.0, 0.0, 0.0, 1.0]
    for same in ({"best_params": BASELINE.params}, {"configurations": (WINNER,)}):
        assert differences(findings(**same)) == []
        assert chance_of_gain(findings(**same)) is None


def test_chance_of_a_gain_is_that_of_two_normal_distributions() -> None:
    """0.35 ± 0.04 and 0.3 ± 0.03 differ by one standard deviation (3-4-5)."""
    near = replace(WINNER, posterior_mean=0.35, posterior_std=0.04)
    assert chance_of_gain(findings(configurations=(near, BASELINE))) == pytest.approx(0.8413, abs=1e-4)
    sure = (replace(WINNER, posterior_std=0.0), replace(BASELINE, posterior_std=0.0))
    assert chance_of_gain(findings(configurations=sure)) == 1.0


def test_names_are_the_programs_own_and_those_of_texts() -> None:
    """Neither an index nor "predictor 0" where anything better is known."""
    assert title(findings(), DEMOS) == "demos"
    assert label(findings(), WINNER.params) == "“Answer <b>slowly</b>.”, no demos"
    assert label(findings(), BASELINE.params) == "own instruction, no demos"
    assert label(findings(space=None), WINNER.params) == "no. 1, no. 0"
    named = study_of(TRIALS)
    named.set_user_attr(PREDICTORS, ["plan", "solve"])
    assert title(findings(study=named), "1_predictor_demos") == "solve, demos"
    for names, shown in (
        (["self"], "demos"),
        (["a.predict"], "a, demos"),
        (["a.predict", "a"], "a.predict, demos"),
    ):
        named.set_user_attr(PREDICTORS, names)
        assert title(findings(study=named), DEMOS) == shown
    two = {"0_predictor_instruction": 1, "0_predictor_demos": 0, "1_predictor_demos": 1}
    space = PromptSpace({**SPACE.components, "1_predictor_demos": [[], ["2+2: 4", "3+5: 8"]]})
    found = findings(space=space, best_params=two)
    assert label(found, two) == (
        "predictor 1: “Answer <b>slowly</b>.”, no demos; predictor 2: 2 demos (“2+2: 4 3+5: 8”)"
    )
    assert label(findings(space=PromptSpace({"style": ["a", "b"]})), {"style": 1}) == "style: “b”"


def test_a_neighbour_of_the_winner_is_named_by_what_it_has_instead() -> None:
    """The baseline, the winner, and one that has nothing in common with the winner are named in full."""
    near = {INSTRUCTION: 1, DEMOS: 1}
    assert beside_winner(findings(), near).startswith("winner, but 1 demo (")
    for params in (BASELINE.params, WINNER.params, OTHER.params):
        assert beside_winner(findings(), params) == label(findings(), params)


def test_texts_that_begin_alike_are_told_apart() -> None:
    """By what comes after what they share."""
    begin = "Given the fields `question`, produce the fields `answer`."
    texts = [begin, f"{begin} Think first.", f"{begin} Think twice, and then once more.", "Short."]
    found = findings(space=PromptSpace({"style": texts}), best_params={"style": 1})
    assert [candidate_name(found, "style", i) for i in range(4)] == [
        "“Given the fields … produce the fields `answer`.”",
        "“Given the fields … fields `answer`. Think first.”",
        "“Given the fields … Think twice, and then once more.”",
        "“Short.”",
    ]


def test_nothing_measured_is_no_error() -> None:
    """A result without configurations has no steps, effects and examples, and is judged by its examples."""
    empty = findings(**NOTHING)
    assert (growth(empty), main_effects(empty), example_scores(empty), never_solved(empty)) == (
        [],
        {},
        {},
        [],
    )
    assert has(warning_signs(empty), "validation set")


def test_baseline_comes_from_the_study() -> None:
    """A study that no search has made says nothing of a baseline."""
    assert findings().baseline_params == BASELINE.params
    foreign = study_of(TRIALS)
    foreign.set_user_attr(SETTINGS, {})
    assert findings(study=foreign).baseline_params is None
    assert chance_of_gain(findings(study=foreign)) is None


def has(signs: list[Sign], fragment: str) -> bool:
    return any(fragment in sign.reason for sign in signs)


NEAR = replace(OTHER, posterior_mean=0.66, posterior_std=0.04)
LACKING = replace(WINNER, scores={e: WINNER.scores[e] for e in (0, 1, 2)})
FLAT = tuple(replace(m, scores=dict.fromkeys(m.scores, 2.0)) for m in findings().configurations)
ALONE = {"best_params": BASELINE.params, "configurations": (BASELINE,)}
CHANCE = "The embeddings explain no more than chance"


@pytest.mark.parametrize(
    ("changes", "sign"),
    [
        # 0.66 ± 0.04 and 0.7 ± 0.03 differ by less than a standard deviation (3-4-5), 0.64 by more.
        ({"configurations": (WINNER, NEAR, BASELINE)}, "flat: 1 configuration "),
        ({}, "Risk of overfitting: the winner scored 75.0 %"),
        ({}, "only 4 examples"),
        # 0.35 ± 0.04 and 0.3 ± 0.03.
        (
            {"configurations": (replace(WINNER, posterior_mean=0.35, posterior_std=0.04), BASELINE)},
            "The gain may be chance: the winner is better with a probability of only 84 %.",
        ),
        ({"stopped_by": "max_cost"}, "ended by max_cost"),
        ({"best_params": OTHER.params}, "on 2 of 4 validation examples"),
        (
            {"configurations": (WINNER, replace(BASELINE, fully=False, scores={0: 0.0}))},
            "The baseline was measured on 1 of 4 validation examples: its score is an estimate.",
        ),
        (
            {"configurations": (replace(LACKING, fully=False), replace(BASELINE, fully=False))},
            "the baseline was measured on 4 of 4 validation examples: both scores are estimates.",
        ),
        ({"configurations": (LACKING, OTHER, BASELINE)}, "means over 3 of 4 validation examples: no config"),
        (
            {"configurations": (replace(LACKING, fully=False), OTHER)},
            "The winner was measured on 3 of 4 validation examples: its score is an estimate",
        ),
        (ALONE, "Only one configuration"),
        (ALONE, "No configuration better than the baseline was found"),
        ({"configurations": FLAT}, "Every score is 2"),
        ({"study": study_of(TRIALS, lost=[0])}, "failed or were cut short: 1;"),
        ({"text_chance": 0.5}, "as well in 50 % of cases"),
    ],
)
def test_signs(changes: dict[str, Any], sign: str) -> None:
    """What speaks against taking a result at its word is said."""
    assert has(warning_signs(findings(**changes)), sign)


@pytest.mark.parametrize(
    ("changes", "sign"),
    [
        ({}, "The top is flat"),
        ({}, "The gain may be chance"),
        ({"configurations": (WINNER, replace(NEAR, posterior_mean=0.64), BASELINE)}, "The top is flat"),
        ({"configurations": (replace(WINNER, posterior_std=0.06), OTHER, BASELINE)}, "Risk of overfitting"),
        ({"text_chance": 0.1}, CHANCE),
        ({"text_chance": None}, CHANCE),
    ],
)
def test_no_sign_without_a_reason(changes: dict[str, Any], sign: str) -> None:
    """One in ten is evidence of texts; 0.75 is not more than a standard deviation above 0.7 ± 0.06."""
    assert not has(warning_signs(findings(**changes)), sign)


def test_each_kind_of_doubt_has_advice() -> None:
    """What is most urgent comes first; luck is a fact, about which nothing can be done."""
    advice = {
        sign.reason: sign.advice for sign in warning_signs(findings(stopped_by="max_cost", text_chance=0.5))
    }
    assert next(iter(advice.values())).startswith("Raise `max_cost`")
    assert [reason[:19] for reason, told in advice.items() if not told] == ["Risk of overfitting"]
    assert any("another embedder" in told for told in advice.values())


def test_lost_examples_count_as_calls() -> None:
    """Scores of a trial that failed are there, and nothing is unsolved where all scores are the same."""
    assert growth(findings(study=study_of(TRIALS, lost=[0])))[-1].calls == 10
    assert never_solved(findings(configurations=FLAT)) == []


def searched(dealt: list[int] | None) -> SearchResult:
    """Twelve texts whose skill rises along a line; embedded by their places on it, or dealt out."""
    texts = [f"text {i}" for i in range(12)]
    place = dict(zip(texts, dealt or range(12), strict=True))

    def embed(asked: list[str]) -> np.ndarray:
        angles = np.array([place[text] for text in asked]) * (np.pi / 12)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)

    def score(params: dict[str, int], example: int) -> float:
        return float(0.2 + 0.05 * params["style"] > (example * 0.618) % 1)

    sampler = qEISampler(embedder=embed if dealt is None or dealt else "index", seed=0)
    options = {"n_examples": 60, "max_calls": 480, "num_threads": 1, "seed": 0}
    return search(PromptSpace({"style": texts}), score, sampler=sampler, **options)


def test_texts_that_determine_the_scores_have_no_sign() -> None:
    """Neighbours on the line score alike, and hardly any other order of them would do as well."""
    result = searched(None)
    assert result.text_chance is not None
    assert result.text_chance < 0.05
    assert not has(warning_signs(result), CHANCE)


@pytest.mark.parametrize("seed", [0, 1])
def test_texts_dealt_out_at_random_explain_no_more_than_chance(seed: int) -> None:
    """The same places, given to the texts in another order."""
    result = searched(np.random.default_rng(seed).permutation(12).tolist())
    assert result.text_chance is not None
    assert result.text_chance > 0.05


def test_without_embeddings_nothing_is_said_of_them() -> None:
    """A search by identity has no share, and its report no sign."""
    result = searched([])
    assert result.text_chance is None
    assert not has(warning_signs(result), CHANCE)


@pytest.mark.parametrize(
    ("read", "changes", "said"),
    [
        # The search's best estimate is 0.7; of three random configurations, the best has 0.5, or 1.
        (readings.growth, {"drawn": DRAWN * 0.5}, "Its estimate is 20.0 points above what the best"),
        (readings.growth, {"drawn": DRAWN}, "The best of as many random configurations would be as good"),
        (readings.examples, {"configurations": FLAT}, "The lower a dot, the harder the example."),
        (readings.leaders, {"configurations": (WINNER, NEAR, BASELINE)}, "1 configuration of 3 is too close"),
        (readings.effects, {"configurations": (WINNER,)}, "All candidates have nearly the same mean"),
        (readings.similarity, {"text_chance": None}, "If similar prompts have similar scores"),
        (readings.similarity, {"text_chance": 0.004}, "Similar prompts have similar scores: shuffled texts"),
        (readings.similarity, {"text_chance": 0.14}, "it may be chance: shuffled texts explain"),
        (readings.similarity, {"text_chance": 0.5}, "do not help to foresee the scores"),
    ],
)
def test_a_figure_says_only_what_the_search_shows(read: Any, changes: dict[str, Any], said: str) -> None:
    """No sentence on a number that is 0, and no likeness that may be chance without saying so."""
    assert said in read(findings(**changes))[0]
