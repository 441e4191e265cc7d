"""Statistics of a search: by hand, in closed form, against lists of all choices and all permutations."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from embedders import on_a_line

from mpromptune import PromptSpace
from mpromptune.model.beliefs import Beliefs
from mpromptune.model.embedding import CachedEmbedder, geometry_of
from mpromptune.model.space import IndexSpace
from mpromptune.model.statistics import chance_of_likeness, expected_best, pooled_variance

LINE = on_a_line(range(5), has_text=True)
N = 40


def test_pooled_variance_by_hand() -> None:
    """(0.5 + 2.0) / (1 + 1)."""
    assert pooled_variance([np.array([0.0, 1.0]), np.array([1.0, 3.0])]) == pytest.approx(1.25)


def test_variance_of_samples_of_one_is_that_of_all() -> None:
    """Nothing varies within a single score: 0 and 1 have a variance of a quarter."""
    assert pooled_variance([np.array([0.0]), np.array([1.0])]) == pytest.approx(0.25)


def test_of_uncertain_values_it_is_that_of_normal_variables() -> None:
    """Of three alike, in units of the deviation: 0, 1 / sqrt(pi) and 3 / (2 sqrt(pi)) above the mean."""
    found = expected_best(np.full(3, 0.6), np.full(3, 0.1), 3)
    expected = 0.6 + 0.1 * np.array([0.0, 1.0, 1.5]) / np.pi**0.5
    assert found == pytest.approx(expected, abs=1e-4)


def test_certain_and_uncertain_values_mix() -> None:
    """max(0, Z) has the mean 1 / sqrt(2 pi); one of the two alone is 0 on average."""
    found = expected_best(np.zeros(2), np.array([0.0, 1.0]), 2)
    assert found == pytest.approx([0.0, 1 / (2 * np.pi) ** 0.5], abs=2e-2)


def test_simulation_agrees() -> None:
    """Means and deviations that differ: against 200 000 draws."""
    rng = np.random.default_rng(0)
    means, stds = rng.normal(size=6), rng.uniform(0.2, 1.0, size=6)
    drawn = rng.normal(means, stds, size=(200_000, 6))
    shuffled = rng.permuted(drawn, axis=1)
    simulated = [shuffled[:, :k].max(axis=1).mean() for k in range(1, 7)]
    assert expected_best(means, stds, 6) == pytest.approx(simulated, abs=0.01)


def test_more_draws_are_never_worse() -> None:
    """The whole space holds its maximum."""
    values = np.random.default_rng(1).normal(size=300)
    best = expected_best(values, np.zeros(300), 300)
    assert (np.diff(best) >= -1e-12).all()
    assert (best[0], best[-1]) == pytest.approx((values.mean(), values.max()))


def told(values: list[float], candidates: list[int] | None = None) -> Beliefs:
    """Candidates that are right on the first ``value`` of 40 examples."""
    chosen = candidates or list(range(len(values)))
    scores = np.arange(N) < N * np.array(values)[:, None]
    beliefs = Beliefs(IndexSpace([5]), [LINE])
    beliefs.tell([(candidate,) for candidate in chosen], scores.astype(float))
    return beliefs


def share_of_all_permutations(beliefs: Beliefs) -> float:
    """By dense algebra, over every way to deal five candidates out."""
    blind = beliefs.without_similarity()
    (group,) = beliefs.groups
    rows = np.arange(5)[:, None]
    covariance = group.covariance(rows, beliefs._options[0]._replace(share=0.0))
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
