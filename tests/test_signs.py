"""Warning signs: when they are given, and when not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from handmade import BASELINE, OTHER, TRIALS, WINNER, findings, study_of

from mpromptune import PromptSpace, SearchResult, qEISampler, search
from mpromptune.show.analysis import growth, never_solved
from mpromptune.show.signs import warning_signs


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


def test_examples_that_cannot_be_answered_are_told_from_those_not_measured() -> None:
    """The winner is whole without the one of four that nobody could be measured on."""
    lacking = replace(WINNER, scores={e: WINNER.scores[e] for e in (0, 1, 2)})
    whole = warning_signs(findings(configurations=(lacking, OTHER, BASELINE)))
    assert has(whole, "means over 3 of 4 validation examples: no configuration could")
    partly = warning_signs(findings(configurations=(replace(lacking, fully=False), OTHER, BASELINE)))
    assert has(partly, "on 3 of 4 validation examples: its score is an estimate")


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


def test_nothing_measured_has_signs_too() -> None:
    """A result without configurations is judged by its validation set."""
    assert has(warning_signs(findings(configurations=(), study=study_of(()))), "validation set")


NOTHING = "The embeddings explain nothing"


def test_embeddings_are_judged_by_what_chance_explains() -> None:
    """One in ten is evidence; one in two is none; without embeddings there is nothing to say."""
    assert not has(warning_signs(findings(text_chance=0.1)), NOTHING)
    assert has(warning_signs(findings(text_chance=0.5)), "as well in 50 % of cases")
    assert not has(warning_signs(findings(text_chance=None)), NOTHING)


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
    assert not has(warning_signs(result), NOTHING)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_texts_dealt_out_at_random_have_the_sign(seed: int) -> None:
    """The same places, given to the texts in another order, explain no more than chance."""
    result = searched(np.random.default_rng(seed).permutation(12).tolist())
    assert result.text_chance is not None
    assert result.text_chance > 0.05


def test_without_embeddings_nothing_is_said_of_them() -> None:
    """A search by identity has no share, and its report no sign."""
    result = searched([])
    assert result.text_chance is None
    assert not has(warning_signs(result), NOTHING)
