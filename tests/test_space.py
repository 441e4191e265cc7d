"""Params, index rows and neighbours."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpromptune import PromptSpace
from mpromptune.errors import InvalidArgumentError
from mpromptune.model.space import Birth, IndexSpace, groups_of

NAMES = ["0_predictor_instruction", "0_predictor_demos", "1_predictor_instruction", "style"]


def test_components_of_one_predictor_form_a_group() -> None:
    """Names tell the predictor; any other name is a group of its own."""
    assert groups_of(NAMES) == (0, 0, 1, 2)


def test_params_order_does_not_matter() -> None:
    """MIPROv2's default trial lists its params in another order than its live trials."""
    space = PromptSpace({"a": ["x", "y"], "b": ["u", "v", "w"]})
    assert space.row({"b": 2, "a": 1}) == space.row({"a": 1, "b": 2}) == (1, 2)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_rows_and_params_are_inverse(sizes: list[int]) -> None:
    """Every row of a product survives the round trip, and there are exactly `size` of them."""
    space = PromptSpace({f"c{i}": ["t"] * n for i, n in enumerate(sizes)})
    rows = [tuple(row) for row in space.rows().tolist()]
    assert len(set(rows)) == space.size == np.prod(sizes)
    assert all(space.row(space.params(row)) == row for row in rows)


def test_only_listed_combinations_exist() -> None:
    """`combinations` restrict the space, whatever the product holds."""
    space = PromptSpace({"a": ["x", "y"], "b": ["u", "v"]}, combinations=[(0, 1), (1, 0), (0, 1)])
    assert space.size == 2
    with pytest.raises(InvalidArgumentError, match="not in"):
        space.row({"a": 0, "b": 0})


def test_neighbours_change_one_component() -> None:
    """In a product, one component; among listed rows, one predictor."""
    product = IndexSpace([3, 2])
    assert sorted(map(tuple, product.neighbours((0, 0)).tolist())) == [(0, 1), (1, 0), (2, 0)]
    listed = IndexSpace([2, 2, 2], groups=[0, 0, 1], combinations=[(0, 0, 0), (1, 1, 0), (1, 1, 1)])
    assert listed.neighbours((0, 0, 0)).tolist() == [[1, 1, 0]]


def test_an_expected_candidate_is_no_part_of_the_space() -> None:
    """The model knows its origin for as long as the context lasts, also if that ends with an error."""
    space, known, expected = IndexSpace([2, 3]), Birth("known", 1), Birth("expected")
    assert space.add(1, known) == 3
    with space.expecting([(1, expected), (0, expected), (1, expected)]) as indices:
        assert (indices, space.births) == ([4, 2, 5], ([expected], [known, expected, expected]))
        assert space.sizes == (2, 4)
        assert space.is_next((0, 4))
        assert not space.exists((0, 4))
    with pytest.raises(KeyError), space.expecting([(0, expected)]):
        raise KeyError
    assert space.added == {(1, 3): known}


def test_a_sample_of_a_huge_product_does_not_enumerate_it() -> None:
    """10^12 configurations cost what a hundred do."""
    space = IndexSpace([1000] * 4)
    assert len(space.sample(100, np.random.default_rng(0))) == 100


@pytest.mark.parametrize(
    ("components", "combinations", "message"),
    [
        ({}, None, "at least one component"),
        ({"a": []}, None, "no candidate"),
        ({"a": ["x"]}, [(1,)], "out of range"),
        ({"a": ["x"]}, [(0, 0)], "tuples of 1"),
        ({"a": ["x"]}, [], "non-empty"),
    ],
)
def test_bad_spaces_are_refused(components: dict, combinations: list | None, message: str) -> None:
    """The message names what was given."""
    with pytest.raises(InvalidArgumentError, match=message):
        PromptSpace(components, combinations)
