"""Sizes of batches and calls in flight, by hand."""

from __future__ import annotations

import pytest

from mpromptune.engine.pool import default_batch_size, default_rounds_in_flight


@pytest.mark.parametrize(
    ("block_size", "max_calls", "places"),
    [(5, 10_000, 6), (5, 1630, 6), (5, 600, 3), (5, 300, 2), (5, 10, 2), (1, 300, 8), (40, 1630, 2)],
)
def test_three_batches_make_up_the_calls_in_flight(block_size: int, max_calls: int, places: int) -> None:
    """A third of 96 calls, or of 8 % of the budget where that is less, in blocks; at least two."""
    assert default_batch_size(block_size, max_calls) == places


@pytest.mark.parametrize(
    ("num_threads", "rounds"), [(1, 4), (16, 4), (32, 4), (33, 5), (64, 9), (128, 14), (256, 14)]
)
def test_a_large_pool_has_four_calls_in_flight_for_each_thread(num_threads: int, rounds: int) -> None:
    """Batches of 30 calls: for 96 up to 32 threads, then 4 for each, but no more than a quarter of 1630."""
    assert default_rounds_in_flight(num_threads, 6, 5, max_calls=1630) == rounds


@pytest.mark.parametrize(("max_calls", "rounds"), [(1630, 9), (800, 7), (600, 5), (120, 2), (10, 2)])
def test_calls_in_flight_are_no_more_than_a_quarter_of_the_budget(max_calls: int, rounds: int) -> None:
    """64 threads and batches of 30 calls; two of them in any case, so that the pool never drains."""
    assert default_rounds_in_flight(64, 6, 5, max_calls) == rounds


@pytest.mark.parametrize("max_calls", [100, 300, 1000, 1630, 10_000])
def test_up_to_32_threads_make_no_difference(max_calls: int) -> None:
    """Whatever the budget: as many calls are in flight as with one thread, so the trials are the same."""
    size = default_batch_size(5, max_calls)
    serial = default_rounds_in_flight(1, size, 5, max_calls)
    assert [default_rounds_in_flight(n, size, 5, max_calls) for n in (8, 16, 32)] == [serial] * 3
