"""How many calls may be in flight while a provider refuses some."""

from __future__ import annotations

import threading

import pytest
from clocks import Clock

from mpromptune.execution.attempts import RetryPolicy, Throttle


def throttle(most: int = 16, **arguments: float) -> tuple[Throttle, Clock]:
    clock = Clock()
    return Throttle(most, RetryPolicy(**arguments), clock.sleep, clock), clock


def test_nothing_is_held_back_without_refusals() -> None:
    """The whole pool may run, and nobody waits."""
    limiter, clock = throttle(4)
    assert [limiter.enter() for _ in range(4)] == [0] * 4
    limiter.succeeded()
    assert (limiter.load.limit, clock.now) == (4, 0)


def test_the_refusals_of_one_round_trip_halve_the_limit_once() -> None:
    """Sixteen calls in flight, all refused: the limit is eight; one more round trip: four."""
    limiter, _ = throttle()
    for expected in (8, 4):
        tickets = [limiter.enter() for _ in range(limiter.load.limit)]
        for ticket in tickets:
            assert limiter.refused(ticket)
            limiter.leave()
        assert limiter.load.limit == expected


def test_the_limit_never_falls_below_one() -> None:
    """A hundred refusals in a row are a hundred attempts, one after the other."""
    limiter, _ = throttle(give_up_after=1e9)
    for _ in range(100):
        assert limiter.refused(limiter.enter())
        limiter.leave()
    assert limiter.load.limit == 1


def test_the_limit_grows_by_one_in_a_round_trip_up_to_the_pool() -> None:
    """Each success raises it by its reciprocal."""
    limiter, _ = throttle(5)
    limiter.refused(limiter.enter())
    assert limiter.load.limit == 2
    for _ in range(3):
        limiter.succeeded()
    assert limiter.load.limit == 3  # 2.5 + 0.4 + 0.34 + 0.31
    for _ in range(20):
        limiter.succeeded()
    assert limiter.load.limit == 5


def test_retry_after_is_honoured_by_all() -> None:
    """No call begins before the time that the provider named, not even another one's."""
    limiter, clock = throttle()
    first, second = limiter.enter(), limiter.enter()
    limiter.refused(first, retry_after=20)
    limiter.refused(second, retry_after=30)  # of the same round trip, but a wish all the same
    assert limiter.load.limit == 8
    limiter.enter()
    assert clock.now == 30


@pytest.mark.parametrize("max_wait", [0.5, 8.0])
def test_pauses_without_a_hint_are_bounded(max_wait: float) -> None:
    """Backoff doubles with every decrease, jittered, up to the longest pause."""
    limiter, clock = throttle(max_wait=max_wait)
    before = 0.0
    for number in range(1, 20):
        limiter.refused(limiter.enter())
        limiter.leave()
        limiter.enter()
        limiter.leave()
        assert clock.now - before <= min(max_wait, 2.0**number)
        before = clock.now


def test_whoever_is_over_the_limit_waits_for_a_slot() -> None:
    """At a limit of one, a second call begins when the first is over."""
    limiter, clock = throttle(2)
    limiter.refused(limiter.enter(), retry_after=0)
    limiter.leave()
    limiter.enter()
    entered = threading.Event()

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if clock.now > 1:
            assert not entered.is_set()
            limiter.leave()

    limiter._sleep = sleep
    limiter.enter()
    entered.set()
    assert clock.now > 1


def test_refusals_alone_for_too_long_are_an_outage() -> None:
    """An hour of them without one success is hopeless; a success starts the hour again."""
    limiter, clock = throttle(max_wait=1.0, give_up_after=3600.0)
    assert limiter.refused(0)
    clock.now = 3599
    assert limiter.refused(0)
    limiter.succeeded()
    clock.now = 7000
    assert limiter.refused(0)
    clock.now = 10_600
    assert not limiter.refused(0)


def test_a_pause_that_is_too_long_is_an_outage_at_once() -> None:
    """A provider that wants to be left alone until tomorrow is not waited for."""
    limiter, clock = throttle(give_up_after=3600.0)
    assert not limiter.refused(limiter.enter(), retry_after=86_400)
    limiter.leave()
    limiter.enter()
    assert clock.now == 0
