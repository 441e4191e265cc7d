"""Batch expected improvement and the choices for it, against answers found in other ways."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from botorch.acquisition.analytic import LogExpectedImprovement
from embedders import on_a_line

from mpromptune.model import acquisition
from mpromptune.model.acquisition import (
    PosteriorTable,
    choice_set,
    expected_improvement,
    local_search,
    log_expected_improvement,
    propose,
    ranked,
)
from mpromptune.model.space import IndexSpace
from mpromptune.model.surrogate import Surrogate, fit

VALUES = [0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.8, 1.0]
# Less than a standard deviation above the uncertain candidates: farther out, few of the samples improve.
BEST_F = 0.62


@pytest.fixture(scope="module")
def model() -> Surrogate:
    """A surrogate of one numeric component with eight candidates, four of them measured."""
    return measured_at([0, 2, 4, 7], VALUES)


def measured_at(indices: list[int], values: Sequence[float]) -> Surrogate:
    scores = torch.tensor([[0.2], [0.9], [0.4], [0.1]], dtype=torch.float64)
    return fit(rows(*indices), scores, [on_a_line(values)])


def table_of(model: Surrogate) -> PosteriorTable:
    """The joint posterior of the eight candidates, whose positions are their indices."""
    return PosteriorTable(*model.joint(rows(*range(8))))


def rows(*indices: int) -> torch.Tensor:
    return torch.tensor([[i] for i in indices], dtype=torch.float64)


def brute_force_ei(model: Surrogate, indices: tuple[int, ...], best_f: float) -> float:
    """E[max(max f - best_f, 0)] by plain sampling of the multivariate normal posterior."""
    mean, covariance = model.joint(rows(*indices))
    samples = np.random.default_rng(0).multivariate_normal(mean, covariance, size=400_000)
    return float(np.maximum(samples.max(axis=1) - best_f, 0.0).mean())


def test_one_candidate_equals_analytic_log_ei(model: Surrogate) -> None:
    """q = 1 agrees with the closed form within Monte-Carlo error."""
    X = rows(*range(8)).unsqueeze(-2)
    with torch.no_grad():
        sampled = expected_improvement(table_of(model), best_f=BEST_F)(X)
        analytic = LogExpectedImprovement(table_of(model), best_f=BEST_F)(X)
    likely = analytic > np.log(1e-3)
    assert likely.sum() >= 4
    assert torch.allclose(sampled[likely], analytic[likely], atol=0.15)


@pytest.mark.parametrize("indices", [(1, 3), (1, 2), (3, 5, 6)])
def test_joint_value_equals_brute_force(model: Surrogate, indices: tuple[int, ...]) -> None:
    """The joint qEI of several candidates is that of the multivariate normal posterior."""
    with torch.no_grad():
        sampled = expected_improvement(table_of(model), best_f=BEST_F)(rows(*indices))
    expected = brute_force_ei(model, indices, BEST_F)
    assert float(sampled.exp()) == pytest.approx(expected, rel=0.1, abs=2e-3)


def test_greedy_batch_equals_asks_with_pending(model: Surrogate) -> None:
    """A batch of q is what q single proposals choose, each with the earlier ones pending."""
    choices = rows(*range(8))
    batch = propose(model, choices, q=3, best_f=0.7, seed=1)
    pending = torch.empty(0, 1)
    for expected in batch:
        left = choices[~(choices[:, None] == pending[None]).all(-1).any(-1)]
        chosen = propose(model, left, q=1, best_f=0.7, X_pending=pending, seed=1)
        assert chosen[0].tolist() == expected.tolist()
        pending = torch.cat([pending, chosen])


def test_pending_configuration_is_not_chosen_again(model: Surrogate) -> None:
    """A configuration that is being measured has nothing more to offer."""
    alone = propose(model, rows(*range(8)), q=1, best_f=0.7, seed=0)
    beside = propose(model, rows(*range(8)), q=1, best_f=0.7, X_pending=alone, seed=0)
    assert beside.tolist() != alone.tolist()


def test_random_batches_can_beat_the_greedy_one(model: Surrogate) -> None:
    """With n_batches, the result is at least as good jointly, and sometimes better than greedy."""
    acqf = expected_improvement(table_of(model), best_f=0.85, seed=3)
    best = max(
        itertools.combinations(range(8), 2),
        key=lambda pair: float(acqf(rows(*pair)).detach()),
    )
    batch = propose(model, rows(*range(8)), q=2, best_f=0.85, n_batches=2000, seed=3)
    assert sorted(batch.flatten().tolist()) == sorted(best)


def test_fewer_choices_than_q_returns_them_all(model: Surrogate) -> None:
    """q larger than the choice set yields every choice once."""
    assert sorted(propose(model, rows(1, 3), q=5, best_f=0.7).flatten().tolist()) == [1, 3]


def test_incumbent_is_the_highest_posterior_mean(model: Surrogate) -> None:
    """best_f is a posterior mean, not the luckiest observation."""
    measured = rows(0, 2, 4, 7)
    mean, _ = model.single(measured)
    first, means = ranked(model, measured)
    assert means.tolist() == sorted(mean.tolist(), reverse=True)
    assert first[0].tolist() == measured[mean.argmax()].tolist()
    assert means[0] < 0.9


def test_proposal_leaves_global_state_alone(model: Surrogate) -> None:
    """Neither the global RNG nor the number of torch threads changes."""
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    propose(model, rows(*range(8)), q=2, best_f=0.7, n_batches=8, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_shortlist_keeps_the_best_of_a_large_space() -> None:
    """Of 600 choices the one with the highest expected improvement is found."""
    values = np.linspace(0.0, 1.0, 600)
    large = measured_at([0, 200, 400, 599], values)
    alone = log_expected_improvement(large, 0.7, rows(*range(600)))
    (chosen,) = propose(large, rows(*range(600)), q=1, best_f=0.7).flatten().tolist()
    assert alone[int(chosen)] == pytest.approx(float(alone.max()), abs=0.15)


# Eight predictors of 200 instructions and 200 demo sets: 200^16, above 2^63 and above what a float holds.
HUGE = IndexSpace([200] * 16)


def distance(rows: torch.Tensor) -> torch.Tensor:
    """The best is 123 everywhere."""
    return -(rows - 123).abs().sum(dim=1).to(torch.float64)


def test_a_huge_product_is_counted_and_sampled() -> None:
    """Exactly, since integers do not overflow; a sample has about all candidates of each component."""
    assert HUGE.size == 200**16
    assert HUGE.exists((199,) * 16)
    assert not HUGE.exists((200,) + (0,) * 15)
    drawn = HUGE.sample(2000, np.random.default_rng(0))
    assert drawn.shape == (2000, 16)
    assert all(len(set(drawn[:, c].tolist())) > 190 for c in range(16))


def test_choices_in_a_huge_product_take_memory_for_themselves_alone() -> None:
    """A sample, neighbours and a local search of 200^16 configurations stay below 30 MB."""
    tracemalloc.start()
    choices = choice_set(HUGE, 2000, set(), set(), np.random.default_rng(0), distance, [(0,) * 16, (5,) * 16])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 2000 <= len(choices) < 5000
    assert all(HUGE.exists(row) for row in choices.tolist())
    assert peak < 30e6


def test_one_component_after_the_other_reaches_the_best_of_an_additive_value() -> None:
    """One sweep sets every component right; what is asked is the sum of the candidates, twice at most."""
    asked: list[int] = []

    def value(rows: torch.Tensor) -> torch.Tensor:
        asked.append(len(rows))
        return distance(rows)

    found = local_search(HUGE, (0,) * 16, value)
    assert [123] * 16 in found.tolist()
    assert sum(asked) <= 2 * 16 * 199 + 1


def test_one_component_after_the_other_stays_where_nothing_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the best configuration every move is down: one sweep, and its best neighbours."""
    monkeypatch.setattr(acquisition, "_ALL_AT_ONCE", 0)
    found = local_search(IndexSpace([200, 3, 1]), (123, 2, 0), distance)
    assert [123, 2, 0] not in found.tolist()
    assert {tuple(row) for row in found.tolist()} >= {(122, 2, 0), (124, 2, 0), (123, 1, 0)}
