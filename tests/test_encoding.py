"""A study's trials as the surrogate sees them."""

from __future__ import annotations

from collections.abc import Sequence

import optuna
import pytest
import torch
from embedders import letters
from optuna.trial import FrozenTrial, TrialState, create_trial

from mpromptune import PromptSpace
from mpromptune.model.embedding import as_embedder
from mpromptune.sampling.encoding import Encoding, History, distributions_of, encode_prompts
from mpromptune.storage.attributes import EXAMPLES, SCORES

A, B, C = (0,), (1,), (2,)
SPACE = PromptSpace({"style": [f"{'a' * i} style" for i in range(4)]})
ENCODING: Encoding = encode_prompts(SPACE, as_embedder(letters))

Values = Sequence[tuple[tuple[int, ...], float]]


def trial(row: tuple[int, ...], value: float | None, state: TrialState = TrialState.COMPLETE) -> FrozenTrial:
    params, distributions = SPACE.params(row), distributions_of(SPACE)
    return create_trial(value=value, params=params, distributions=distributions, state=state)


def history_of(trials: Sequence[FrozenTrial], direction: str = "maximize") -> History:
    study = optuna.create_study(direction=direction)
    study.add_trials(trials)
    return ENCODING.history(study, study.get_trials())


def of_values(values: Values, direction: str = "maximize") -> History:
    return history_of([trial(row, value) for row, value in values], direction)


def test_each_trial_is_an_observation_of_its_value() -> None:
    """Three trials of two configurations, in their order; scores by example are no part of it."""
    scored = trial(B, 0.75)
    scored.set_user_attr(EXAMPLES, [0, 1])
    scored.set_user_attr(SCORES, [1.0, 0.5])
    history = history_of([trial(B, 0.25), trial(A, 1.0), scored])
    assert history.train_X.tolist() == [[1.0], [0.0], [1.0]]
    assert history.train_Y.tolist() == [[0.25], [1.0], [0.75]]
    assert history.measured == {A, B}
    assert len(history.train_Y) == 3


def test_minimising_is_maximising_the_negative() -> None:
    """Values change their sign, and nothing else."""
    up, down = of_values([(A, -0.25), (B, 2.0)]), of_values([(A, 0.25), (B, -2.0)], "minimize")
    assert torch.equal(up.train_X, down.train_X)
    assert torch.equal(up.train_Y, down.train_Y)


def test_states_say_what_is_known() -> None:
    """Pruned trials were measured, running ones are pending, failed ones count for nothing."""
    states = {A: TrialState.PRUNED, B: TrialState.RUNNING, C: TrialState.FAIL}
    history = history_of([trial(row, None, state) for row, state in states.items()])
    assert (history.measured, history.pending, len(history.train_Y)) == ({A}, (B,), 0)
    assert history.train_X.shape == (0, 1)


@pytest.mark.parametrize(("huge", "seen"), [(float("inf"), [1.0, 2.0, 2.0]), (1e155, [0.0, 1.0, 2.0])])
def test_values_that_stand_for_a_failure(huge: float, seen: list[float]) -> None:
    """Infinite ones are clipped to the range of the others; where finite ones are huge, ranks count."""
    assert of_values([(A, 1.0), (B, 2.0), (C, huge)]).train_Y.flatten().tolist() == seen
