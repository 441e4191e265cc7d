"""How large batches are, and how many calls are in flight, for a pool of workers."""

from __future__ import annotations

import math

# NOTE: threads up to which trials do not depend on their number, and the calls in flight for all of these, at
# which 32 threads are busy for 0.95 of the time; but no more than a part of the budget, since what is asked
# for before earlier answers are known is asked blindly.
_SMALL_POOL = 32
_IN_FLIGHT = 96
_SHARE = 0.08
# NOTE: calls in flight for each thread of a larger pool, which rides out slow calls, and what part of the
# budget they may be. In a simulation of 2130 calls with lognormal latencies (sigma 0.5), 64 threads are busy
# for 0.90, 0.94 and 0.95 of the time with three, four and five; 128 for 0.80, 0.86 and 0.88.
_PER_THREAD = 4
_LARGEST_SHARE = 0.25
# Batches that these calls are made of, so that the pool never waits for a decision.
_BATCHES = 3


def default_batch_size(block_size: int, max_calls: int) -> int:
    """Blocks in a batch, of ``block_size`` calls each."""
    return max(2, round(_usual(max_calls) / (_BATCHES * block_size)))


def default_rounds_in_flight(num_threads: int, batch_size: int, block_size: int, max_calls: int) -> int:
    """Batches being measured at any time, at most; at least two, so that the pool never drains."""
    calls = _usual(max_calls)
    if num_threads > _SMALL_POOL:
        calls = max(calls, min(_PER_THREAD * num_threads, _LARGEST_SHARE * max_calls))
    return max(2, math.ceil(calls / (batch_size * block_size)))


def _usual(max_calls: int) -> float:
    return min(_IN_FLIGHT, _SHARE * max_calls)
