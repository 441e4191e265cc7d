"""The choices of a proposal in spaces that nobody could list."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from mpromptune.model import candidates
from mpromptune.model.candidates import choice_set, local_search
from mpromptune.model.space import IndexSpace

# Eight predictors of 200 instructions and 200 demo sets: 200^16, above 2^63 and above what a float holds.
HUGE = IndexSpace([200] * 16)


def distance(rows: torch.Tensor) -> torch.Tensor:
    """The best is 123 everywhere."""
    return -(rows - 123).abs().sum(dim=1).to(torch.float64)


def test_the_size_of_a_huge_product_is_exact() -> None:
    """Counted in Python's integers, which do not overflow; its corners exist and what is outside does not."""
    assert HUGE.size == 200**16
    assert HUGE.exists((199,) * 16)
    assert not HUGE.exists((200,) + (0,) * 15)


def test_choices_in_a_huge_product_take_memory_for_themselves_alone() -> None:
    """A sample, neighbours and a local search of 200^16 configurations stay below 30 MB."""
    tracemalloc.start()
    choices = choice_set(
        HUGE, 2000, lambda row: True, np.random.default_rng(0), distance, [(0,) * 16, (5,) * 16]
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 2000 <= len(choices) < 5000
    assert all(HUGE.exists(row) for row in choices.tolist())
    assert peak < 30e6


def test_a_sample_of_a_huge_product_is_spread_over_all_candidates() -> None:
    """Every candidate of every component is drawn about as often as any other."""
    rows = HUGE.sample(2000, np.random.default_rng(0))
    assert rows.shape == (2000, 16)
    assert all(len(set(rows[:, c].tolist())) > 190 for c in range(16))


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
    monkeypatch.setattr(candidates, "_ALL_AT_ONCE", 0)
    found = local_search(IndexSpace([200, 3, 1]), (123, 2, 0), distance)
    assert [123, 2, 0] not in found.tolist()
    assert {tuple(row) for row in found.tolist()} >= {(122, 2, 0), (124, 2, 0), (123, 1, 0)}
