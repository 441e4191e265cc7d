"""The permutation test of embeddings, against a list of all permutations."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from mpromptune import PromptSpace
from mpromptune.model.beliefs import Beliefs
from mpromptune.model.embedding import CachedEmbedder
from mpromptune.model.explained import chance_of_likeness
from mpromptune.model.geometry import Geometry, geometry_of, numeric_views
from mpromptune.model.space import IndexSpace

LINE = Geometry(numeric_views([0.0, 1.0, 2.0, 3.0, 4.0]), 0, has_text=True)
N = 40


def told(values: list[float], candidates: list[int] | None = None) -> Beliefs:
    """Candidates that are right on the first ``value`` of 40 examples."""
    chosen = candidates or list(range(len(values)))
    scores = np.arange(N) < N * np.array(values)[:, None]
    beliefs = Beliefs(IndexSpace([5]), [LINE])
    beliefs.tell([(candidate,) for candidate in chosen], scores.astype(float))
    return beliefs


def share_of_all_permutations(beliefs: Beliefs) -> float:
    """By dense algebra, over every way to deal five candidates out."""
    blind = beliefs.without_likeness()
    (group,) = beliefs.groups
    rows = np.arange(5)[:, None]
    covariance = group.covariance(rows, rows, replace(beliefs._options[0], share=0.0))
    u = np.linalg.solve(covariance, blind.posterior.mean)
    similar = np.exp(-LINE.views[0].numpy() / 2.0)
    statistics = [u[list(p)] @ similar @ u[list(p)] for p in permutations(range(5))]
    return float(np.mean(np.array(statistics) >= statistics[0] - 1e-9))


@pytest.mark.parametrize("values", [[0.0, 0.3, 0.5, 0.8, 1.0], [0.5, 0.0, 0.8, 1.0, 0.3]])
def test_share_is_that_of_all_permutations(values: list[float]) -> None:
    """499 random ones come near it: within three standard errors, 0.067 at most."""
    beliefs = told(values)
    assert chance_of_likeness(beliefs, [LINE]) == pytest.approx(share_of_all_permutations(beliefs), abs=0.067)


def test_order_tells_from_disorder() -> None:
    """Values that rise along the line are like it in 2 of 120 orders: forwards and backwards."""
    beliefs = told([0.0, 0.3, 0.5, 0.8, 1.0])
    assert share_of_all_permutations(beliefs) <= 4 / 120
    assert share_of_all_permutations(told([0.5, 0.0, 0.8, 1.0, 0.3])) > 0.3


def test_same_seed_same_share() -> None:
    """No global random numbers are drawn."""
    beliefs = told([0.5, 0.0, 0.8, 1.0, 0.3])
    state = np.random.get_state()[1].copy()  # noqa: NPY002 - it is the global state that is looked at
    assert chance_of_likeness(beliefs, [LINE]) == chance_of_likeness(beliefs, [LINE])
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_few_candidates_and_no_texts_say_nothing() -> None:
    """Three measured candidates can be dealt out in six ways; a view that is no text does not count."""
    assert chance_of_likeness(told([0.0, 0.5, 1.0], [0, 2, 4]), [LINE]) is None
    beliefs = told([0.0, 0.3, 0.5, 0.8, 1.0])
    assert chance_of_likeness(beliefs, [replace(LINE, has_text=False)]) is None


def test_only_what_the_embedder_tells_apart_is_a_text() -> None:
    """One vector for all texts leaves the number of demos as the only view; letters do not."""
    space = PromptSpace({"instruction": ["a", "b"], "demos": [[], ["a"], ["a", "b"]]})

    def known(texts: list[str]) -> np.ndarray:
        return np.array([[1.0, float(text == "b")] for text in texts])

    told = geometry_of(space, CachedEmbedder(known))
    assert [(len(g.views), g.has_text) for g in told] == [(1, True), (2, True)]
    same = geometry_of(
        PromptSpace({"instruction": ["a", "b"]}), CachedEmbedder(lambda t: np.ones((len(t), 2)))
    )
    assert [(len(g.views), g.has_text) for g in same] == [(0, False)]
    blind = geometry_of(space, None)
    assert [(len(g.views), g.has_text) for g in blind] == [(0, False), (0, False)]
