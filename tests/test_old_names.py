"""The names of the earlier package keep working."""

from __future__ import annotations

from typing import Any

import dspy
import pytest
from embedders import hashed
from lms import arithmetic_lm
from tasks import SMALL_RUN, SMALL_RUN_CALLS, TRAIN, VAL, ZERO_SHOT, Adder, Counted

from mpromptune import MIPROv2, qEI, qEISampler

OLD = {"sampler": "qEI", "max_space_size": 100, "n_batches": 200, "batch_size": 4, "min_cold_start": 4}


def test_old_order_of_arguments() -> None:
    """qEI.qEISampler takes (max_space_size, n_batches, batch_size, min_cold_start) by position."""
    sampler = qEI.qEISampler(100, 200, 3, 5)
    assert sampler.max_space_size == 100
    assert sampler.n_batches == 200
    assert sampler.batch_size == 3
    assert sampler.min_cold_start == 5


def test_old_class_names() -> None:
    """qEI.Sampler and qEI.qEISampler are the sampler of today."""
    assert qEI.Sampler is qEISampler
    assert qEI.qEISampler is qEISampler


@pytest.mark.parametrize("as_config", [True, False])
def test_old_compile_arguments(as_config: bool) -> None:
    """The old keywords work as arguments of compile and in its sampler_config."""
    given: dict[str, Any] = {"sampler_config": OLD} if as_config else OLD
    with dspy.context(lm=arithmetic_lm()):
        optimizer = MIPROv2(
            metric=Counted(), auto=None, num_candidates=3, num_threads=2, embedder=hashed, **ZERO_SHOT
        )
        best = optimizer.compile(Adder(), trainset=TRAIN, valset=VAL, n_jobs=2, **SMALL_RUN, **given)
    assert best.search_result.calls <= SMALL_RUN_CALLS
    sampler = best.search_result.study.sampler
    assert isinstance(sampler, qEISampler)
    assert (sampler.max_space_size, sampler.n_batches, sampler.batch_size) == (100, 200, 4)
