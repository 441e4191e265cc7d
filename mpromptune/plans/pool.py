"""How large rounds are, and how many of them are in flight, for a pool of workers."""

from __future__ import annotations

import math

# NOTE: up to this many threads the trials of a search with blocks of ten do not depend on their number;
# it is what two rounds of the smallest q, four blocks, keep busy.
_SMALL_POOL = 40
# NOTE: in a simulation of workers with lognormal latencies (sigma 0.5) and 1630 calls, with four 0.86 of the
# time of 64 workers is used, with five 0.91, with six 0.92. Regret is 1.25 +- 0.15 with four and 1.29 with
# five (GSM8K s43 and s42, AG News; 40 seeds each): what is proposed knows less, see `blocks._NARROWING`.
_ITEMS_PER_WORKER = 5
# NOTE: of the budget, however large the pool: what is asked for before earlier answers are known is asked
# blindly. At 64 workers and 600 calls regret is 4.7 +- 0.4 with five items for each (half of them), and
# 2.5 +- 0.3 with three rounds of 4, in 1.4 times the time (GSM8K s43 and s42, AG News; 30 seeds).
_SHARE_IN_FLIGHT = 0.15
# NOTE: rounds that should fit into that share: with 128 workers and 1630 calls, two rounds of 13 use 0.39 of
# their time, and five of 6 0.62 at a regret of 1.2 instead of 1.3 (GSM8K s43 and s42; 30 seeds, +-0.2). With
# five items for each worker it was 3.3, and 0.82.
_ROUNDS_IN_SHARE = 4


def default_batch_size(num_threads: int, block_size: int, max_calls: int) -> int:
    """Smallest q of at least 4 for which one round of whole blocks holds a work item for every worker.

    Smaller in a large pool where several such rounds would be too large a part of the budget.
    """
    enough = max(4, math.ceil(num_threads / block_size))
    if num_threads <= _SMALL_POOL:
        return enough
    affordable = math.floor(_SHARE_IN_FLIGHT * max_calls / (_ROUNDS_IN_SHARE * block_size))
    return max(4, min(enough, affordable))


def default_rounds_in_flight(num_threads: int, batch_size: int, block_size: int, max_calls: int) -> int:
    """Rounds being measured at any time, at most: two, or as many as keep a large pool busy.

    Rounds are told in order, so one slow call holds up all that is asked after it: a large pool needs
    several work items for every worker to ride that out. But no more than a share of the budget is
    asked for before something is known of it.
    """
    if num_threads <= _SMALL_POOL:
        return 2
    items = min(_ITEMS_PER_WORKER * num_threads, _SHARE_IN_FLIGHT * max_calls)
    return max(2, math.ceil(items / (batch_size * block_size)))
