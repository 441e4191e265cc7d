"""A study's trials as the surrogate sees them."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import optuna
import pytest
import torch
from embedders import letters
from optuna.trial import FrozenTrial, TrialState, create_trial

from mpromptune import PromptSpace
from mpromptune.model.embedding import as_embedder
from mpromptune.model.surrogate import posterior_mean_and_variance
from mpromptune.sampling.encoding import Encoding, encode_prompts
from mpromptune.sampling.history import History, LastFit, fit_history, read
from mpromptune.sampling.samplers import distributions_of
from mpromptune.studies.attributes import ABANDONED, EXAMPLES, N_EXAMPLES, PLANNED, SCORES

A, B = (0,), (1,)
SPACE = PromptSpace({"style": [f"{'a' * i} style" for i in range(4)]})
ENCODING: Encoding = encode_prompts(SPACE, as_embedder(letters))

Scores = Sequence[tuple[tuple[int, ...], dict[int, float]]]


def trial(row: tuple[int, ...], scores: dict[int, float]) -> FrozenTrial:
    return create_trial(
        value=float(np.mean(list(scores.values()))),
        params=SPACE.params(row),
        distributions=distributions_of(SPACE),
        user_attrs={EXAMPLES: list(scores), SCORES: list(scores.values())},
    )


def history_of(scores: Scores, direction: str = "maximize") -> History:
    study = optuna.create_study(direction=direction)
    study.set_user_attr(N_EXAMPLES, 12)
    study.add_trials([trial(row, by_example) for row, by_example in scores])
    return read(study, study.get_trials(), ENCODING.row, 1)


def belief(scores: Scores) -> tuple[list[float], list[float]]:
    model = fit_history(history_of(scores), ENCODING.geometries)
    mean, variance = posterior_mean_and_variance(model, torch.tensor(SPACE.rows()))
    return mean.tolist(), variance.tolist()


def test_trials_of_one_configuration_are_one_observation() -> None:
    """Three trials of two configurations, in the order in which these came."""
    history = history_of([(B, {0: 1.0, 1: 0.0}), (A, {0: 1.0}), (B, {2: 1.0})])
    assert history.train_X.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert history.measured == {B: {0, 1, 2}, A: {0}}
    assert (len(history), history.n_trials) == (2, 3)


def test_how_trials_cut_the_examples_does_not_matter() -> None:
    """The same scores in one trial or in two: the same observations."""
    one = history_of([(A, {0: 1.0, 1: 0.0, 2: 1.0}), (B, {0: 0.0, 1: 0.0})])
    two = history_of([(A, {1: 0.0}), (B, {0: 0.0, 1: 0.0}), (A, {0: 1.0, 2: 1.0})])
    assert torch.equal(one.train_Y, two.train_Y)
    assert torch.equal(one.shared, two.shared)


def test_the_same_answers_again_teach_the_surrogate_nothing() -> None:
    """A deterministic program, asked twice: the posterior is that of asking once."""
    once = [((i,), {e: float((e + i) % 3 > 0) for e in range(i, i + 6)}) for i in range(4)]
    assert belief([*once, *once]) == belief(once)


def test_an_example_that_was_answered_twice_counts_once() -> None:
    """With the mean of its answers."""
    twice = history_of([(A, {0: 1.0, 1: 1.0}), (B, {0: 0.0}), (A, {1: 0.0})])
    once = history_of([(A, {0: 1.0, 1: 0.5}), (B, {0: 0.0})])
    assert torch.equal(twice.train_Y, once.train_Y)


def test_minimising_is_maximising_the_negative() -> None:
    """Values change their sign; variances do not."""
    scores = [(A, {0: 1.0, 1: 0.0, 2: 1.0}), (B, {0: 0.0, 1: 0.0})]
    up = history_of([(row, {e: -s for e, s in by.items()}) for row, by in scores])
    down = history_of(scores, "minimize")
    assert down.train_Y.tolist() == [pytest.approx(y) for y in up.train_Y.tolist()]
    assert torch.equal(down.shared, up.shared)


def test_trials_without_scores_by_example_are_observations_as_they_are() -> None:
    """A study of someone else's, with one trial that has scores: values only, noise unknown."""
    study = optuna.create_study(direction="maximize")
    bare = create_trial(value=0.3, params=SPACE.params(A), distributions=distributions_of(SPACE))
    study.add_trials([bare, bare, trial(A, {0: 1.0})])
    history = read(study, study.get_trials(), ENCODING.row, 1)
    assert history.train_Y.tolist() == [[0.3], [0.3], [1.0]]
    assert history.train_X[:, -1].tolist() == [-1.0, -1.0, -1.0]
    assert history.train_Yvar is None
    assert history.trial_noise is None


def test_a_trial_that_lost_a_score_is_observed_by_its_others() -> None:
    """Errors cost it one of three; an abandoned one counts for nothing, since another takes it up."""
    whole = trial(A, {0: 1.0, 1: 0.0})
    partly = create_trial(
        state=TrialState.FAIL,
        params=whole.params,
        distributions=whole.distributions,
        user_attrs={**whole.user_attrs, PLANNED: [0, 1, 2]},
    )
    abandoned = create_trial(
        state=TrialState.FAIL,
        params=SPACE.params(B),
        distributions=whole.distributions,
        user_attrs={EXAMPLES: [0], SCORES: [1.0], ABANDONED: True},
    )
    study = optuna.create_study(direction="maximize")
    study.set_user_attr(N_EXAMPLES, 12)
    study.add_trials([trial(B, {0: 0.0}), partly, abandoned])
    history = read(study, study.get_trials(), ENCODING.row, 1)
    expected = history_of([(B, {0: 0.0}), (A, {0: 1.0, 1: 0.0})])
    assert torch.equal(history.train_X, expected.train_X)
    assert torch.equal(history.train_Y, expected.train_Y)
    assert history.measured == expected.measured


def test_the_same_observations_are_fitted_once() -> None:
    """What is running makes no difference; one more score does. A copy that travelled fits again."""
    scores = [(A, {0: 1.0, 1: 0.0}), (B, {0: 0.0})]
    fits, told = LastFit(ENCODING.geometries), history_of(scores)
    model = fits.of(told)
    assert fits.of(replace(history_of(scores), pending=(B,))) is model
    assert fits.of(history_of([*scores, (B, {1: 1.0})])) is not model
    assert fits.of(told) is not model  # one is kept
    assert pickle.loads(pickle.dumps(fits)).of(told).state_dict().keys() == model.state_dict().keys()
