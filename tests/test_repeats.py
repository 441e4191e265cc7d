"""Trials that share examples with an earlier one of the same configuration."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import optuna
import pytest
import torch
from embedders import letters
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import FrozenTrial, create_trial

from mpromptune import PromptSpace
from mpromptune.attributes import EXAMPLES, N_EXAMPLES, SCORES
from mpromptune.embedding import as_embedder
from mpromptune.encoding import Encoding, encode_prompts
from mpromptune.history import fit_history, read
from mpromptune.repeats import without_repeats
from mpromptune.samplers import distributions_of
from mpromptune.surrogate import posterior_mean_and_variance

A, B = (0,), (1,)
SPACE = PromptSpace({"style": [f"{'a' * i} style" for i in range(4)]})


def trial(row: tuple[int, ...], scores: dict[int, float]) -> FrozenTrial:
    return create_trial(
        value=float(np.mean(list(scores.values()))),
        params=SPACE.params(row),
        distributions=distributions_of(SPACE),
        user_attrs={EXAMPLES: list(scores), SCORES: list(scores.values())},
    )


def content(placed: Sequence[tuple[FrozenTrial, tuple[int, ...]]]) -> list:
    return [
        (row, dict(zip(t.user_attrs[EXAMPLES], t.user_attrs[SCORES], strict=True)), t.value)
        for t, row in placed
    ]


def test_trials_without_repeats_are_left_alone() -> None:
    """Other examples, or another configuration on the same ones: the very same objects."""
    observed = [(trial(A, {0: 1.0}), A), (trial(B, {0: 0.0}), B), (trial(A, {1: 0.0}), A)]
    assert all(a[0] is b[0] for a, b in zip(without_repeats(observed), observed, strict=True))


def test_shared_examples_are_pooled_by_hand() -> None:
    """{0: 1, 1: 0} and {1: 1, 2: 1}: one trial on 0, 1, 2 with means 1, 1/2, 1, in the first's place."""
    observed = [(trial(A, {0: 1.0, 1: 0.0}), A), (trial(B, {1: 1.0}), B), (trial(A, {1: 1.0, 2: 1.0}), A)]
    expected = [(A, {0: 1.0, 1: 0.5, 2: 1.0}, pytest.approx(2.5 / 3)), (B, {1: 1.0}, 1.0)]
    assert content(without_repeats(observed)) == expected
    assert observed[0][0].user_attrs[EXAMPLES] == [0, 1]  # what was given is not changed


def test_trials_without_scores_by_example_are_left_alone() -> None:
    """A study of someone else's: values only, or examples only."""
    bare = [trial(A, {0: 1.0}) for _ in range(2)]
    bare[0].user_attrs, bare[1].user_attrs = {}, {EXAMPLES: [0]}
    observed = [(t, A) for t in (*bare, trial(A, {0: 0.0}))]
    assert all(a[0] is b[0] for a, b in zip(without_repeats(observed), observed, strict=True))


def test_a_trial_can_join_two_others() -> None:
    """The third shares one example with each of the first two."""
    observed = [(trial(A, {0: 1.0}), A), (trial(A, {1: 0.0}), A), (trial(A, {0: 1.0, 1: 0.0}), A)]
    assert content(without_repeats(observed)) == [(A, {0: 1.0, 1: 0.0}, 0.5)]


@given(st.lists(st.tuples(st.sampled_from([A, B]), st.sets(st.integers(0, 6), min_size=1)), max_size=8))
def test_no_example_of_a_configuration_occurs_twice(asked: list) -> None:
    """Whatever the trials: the same examples of the same configurations, each once."""
    observed = [(trial(row, dict.fromkeys(examples, 1.0)), row) for row, examples in asked]
    pairs = [(row, e) for t, row in without_repeats(observed) for e in t.user_attrs[EXAMPLES]]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == {(row, e) for row, examples in asked for e in examples}


def belief(scores: Sequence[tuple[tuple[int, ...], dict[int, float]]]) -> tuple[list[float], list[float]]:
    encoding: Encoding = encode_prompts(SPACE, as_embedder(letters))
    study = optuna.create_study(direction="maximize")
    study.set_user_attr(N_EXAMPLES, 12)
    study.add_trials([trial(row, by_example) for row, by_example in scores])
    history = read(study, study.get_trials(), encoding.row, 1)
    mean, variance = posterior_mean_and_variance(
        fit_history(history, encoding.geometries), torch.tensor(SPACE.rows())
    )
    return mean.tolist(), variance.tolist()


def test_the_same_answers_again_teach_the_surrogate_nothing() -> None:
    """A deterministic program, asked twice: the posterior is that of asking once."""
    once = [((i,), {e: float((e + i) % 3 > 0) for e in range(i, i + 6)}) for i in range(4)]
    assert belief([*once, *once]) == belief(once)
