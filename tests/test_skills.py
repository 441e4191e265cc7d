"""Prior covariances of skills: values by hand, and what a covariance must be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from mpromptune.model.embedding import Geometry
from mpromptune.model.skills import Option, groups_of
from mpromptune.model.space import Birth

NONE: tuple[list[Birth], ...] = ([], [], [])  # candidates added to the components
DISTANCES = np.array([[0.0, 1.0, 4.0], [1.0, 0.0, 1.0], [4.0, 1.0, 0.0]])


def geometry(group: int, has_text: bool = True) -> Geometry:
    views = torch.from_numpy(DISTANCES[None]) if has_text else torch.empty(0, 3, 3, dtype=torch.float64)
    return Geometry(views, group, has_text)


def rows(*indices: tuple[int, ...]) -> np.ndarray:
    return np.array(indices, dtype=np.int64)


def test_a_component_by_itself_has_its_likeness_its_own_and_the_common_part():
    """a^2 (w exp(-d^2 / 2) + (1 - w)) + 1 on the diagonal, without the second part elsewhere."""
    (group,) = groups_of([geometry(0)], NONE, 100, is_product=True)
    found = group.covariance(rows((0,), (2,)), Option(0.5, 1.0, 2.0))
    assert_allclose(found, [[5.0, 1 + 2 * np.exp(-2.0)], [1 + 2 * np.exp(-2.0), 5.0]])


def test_components_of_a_predictor_have_the_mean_of_both_and_of_their_product():
    """(k_1 + k_2 + k_1 k_2) / 3, with the first alike and the second at a distance of 1."""
    (group,) = groups_of([geometry(0), geometry(0)], NONE, 100, is_product=True)
    k = np.exp(-0.5)
    found = group.covariance(rows((0, 0), (0, 1)), Option(1.0, 1.0, 1.0))
    assert_allclose(found[0, 1], 1 + (1 + k + k) / 3)


def test_a_lengthscale_of_zero_compares_by_identity():
    """Half of the pair is the same: (1 + 0 + 0) / 3 of the likeness."""
    (group,) = groups_of([geometry(0), geometry(0)], NONE, 100, is_product=True)
    assert_allclose(group.covariance(rows((0, 0), (0, 1)), Option(0.5, 0.0, 1.0))[0, 1], 1 + 0.5 / 3)


def test_predictors_are_groups_that_share_the_common_part():
    """Two predictors have half of the common variance each."""
    groups = groups_of([geometry(0), geometry(0), geometry(1)], NONE, 100, is_product=True)
    assert [group.components for group in groups] == [(0, 1), (2,)]
    assert [group.common for group in groups] == [0.5, 0.5]


def test_listed_configurations_are_one_group():
    """Where not every combination exists, the latents are the configurations."""
    groups = groups_of([geometry(0), geometry(1)], NONE, 100, is_product=False)
    assert [group.components for group in groups] == [(0, 1)]


def test_a_predictor_with_too_many_pairs_has_a_group_for_each_component():
    """Three by three pairs are more than eight."""
    groups = groups_of([geometry(0), geometry(0)], NONE, 8, is_product=True)
    assert [group.components for group in groups] == [(0,), (1,)]


@pytest.mark.parametrize("has_text", [True, False])
def test_every_option_is_a_covariance(has_text: bool):
    """Symmetric and positive definite, for all hyper-parameters that the evidence chooses from."""
    (group,) = groups_of([geometry(0, has_text), geometry(0, has_text)], NONE, 100, is_product=True)
    all_pairs = rows(*((i, j) for i in range(3) for j in range(3)))
    for option in group.options():
        covariance = group.covariance(all_pairs, option)
        assert_allclose(covariance, covariance.T)
        assert np.linalg.eigvalsh(covariance).min() > 0


def test_without_texts_only_identity_is_left():
    """Length-scales other than 0 would mean nothing."""
    (group,) = groups_of([geometry(0, has_text=False)], NONE, 100, is_product=True)
    assert {option.lengthscale for option in group.options()} == {0.0}
