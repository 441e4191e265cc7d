"""Optuna's published sampler contract, against qEISampler."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from embedders import hashed
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    RelativeSamplerTestCase,
    SingleOnlySamplerTestCase,
)

from mpromptune import qEISampler
from mpromptune.model import surrogate


@pytest.fixture(autouse=True)
def quick_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract is about what is proposed, not how well."""
    monkeypatch.setattr(surrogate, "_FIT", {"options": {"ftol": 1e3}})


@pytest.fixture
def sampler() -> Callable[[], BaseSampler]:
    return lambda: qEISampler(embedder=hashed, min_cold_start=1, batch_size=2, n_batches=2, seed=0)


class TestBasic(BasicSamplerTestCase):
    """Distributions, NaN values, conditional and dynamic spaces."""

    @pytest.fixture
    def sampler(self, sampler: Callable[[], BaseSampler]) -> Callable[[], BaseSampler]:
        return sampler


class TestRelative(RelativeSamplerTestCase):
    """Joint sampling of numerical, categorical and mixed spaces, with n_jobs too."""

    @pytest.fixture
    def sampler(self, sampler: Callable[[], BaseSampler]) -> Callable[[], BaseSampler]:
        return sampler


class TestSingleOnly(SingleOnlySamplerTestCase):
    """Multi-objective studies are refused."""

    @pytest.fixture
    def sampler(self, sampler: Callable[[], BaseSampler]) -> Callable[[], BaseSampler]:
        return sampler
