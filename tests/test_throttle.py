"""How many calls may be in flight while a provider refuses some."""

from __future__ import annotations

from typing import Any

import pytest
from clocks import Clock

from mpromptune.execution.attempts import RetryPolicy, Throttle


def throttle(most: int = 16, **policy: float) -> tuple[Throttle, Clock]:
    clock = Clock()
    return Throttle(most, RetryPolicy(**policy), clock.sleep, clock), clock  # type: ignore[arg-type]


def refuse(limiter: Throttle, **given: Any) -> None:
    """One call, which is refused."""
    assert limiter.refused(limiter.enter(), **given)
    limiter.leave()


def test_the_refusals_of_one_round_trip_halve_the_limit_once() -> None:
    """Sixteen calls in flight, all refused: the limit is eight; then four, and in the end one."""
    limiter, clock = throttle()
    for expected in (8, 4, 2, 1, 1):
        tickets = [limiter.enter() for _ in range(limiter.load.limit)]
        assert expected != 8 or clock.now == 0  # nobody is held back without refusals
        for ticket in tickets:
            assert limiter.refused(ticket)
            limiter.leave()
        assert limiter.load.limit == expected


def test_the_limit_grows_by_one_in_a_round_trip_up_to_the_pool() -> None:
    """Each success raises it by its reciprocal."""
    limiter, _ = throttle(5)
    refuse(limiter)
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
    assert (limiter.load.limit, limiter.load.pause) == (8, 30)
    limiter.enter()
    assert clock.now == 30


@pytest.mark.parametrize("max_wait", [0.5, 8.0])
def test_pauses_without_a_hint_are_bounded(max_wait: float) -> None:
    """Backoff doubles with every decrease, jittered, up to the longest pause."""
    limiter, clock = throttle(max_wait=max_wait)
    for number in range(1, 20):
        before = clock.now
        refuse(limiter)
        limiter.enter()
        limiter.leave()
        assert clock.now - before <= min(max_wait, 2.0**number)


def test_whoever_is_over_the_limit_waits_for_a_slot() -> None:
    """At a limit of one, a second call begins when the first is over."""
    limiter, clock = throttle(2)
    refuse(limiter, retry_after=0)
    limiter.enter()

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if clock.now > 1:
            assert limiter.load.running == 1
            limiter.leave()

    limiter._sleep = sleep
    limiter.enter()
    assert clock.now > 1


def test_refusals_alone_for_too_long_are_an_outage() -> None:
    """An hour of them without one success is hopeless, as is a pause of a day; a success starts anew."""
    limiter, clock = throttle(max_wait=1.0, give_up_after=3600.0)
    assert limiter.refused(0)
    clock.now = 3599
    assert limiter.refused(0)
    limiter.succeeded()
    clock.now = 7000
    assert limiter.refused(0)
    clock.now = 10_600
    assert not limiter.refused(0)
    limiter, clock = throttle(give_up_after=3600.0)
    assert not limiter.refused(limiter.enter(), retry_after=86_400)
    limiter.enter()
    assert clock.now == 0


def test_the_reason_of_an_outage_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """At the third failure in succession; the load has their number until a call is answered."""
    limiter, _ = throttle()
    for _ in range(5):
        limiter.failed(ConnectionResetError("reset by peer"))
    assert limiter.load.failed == 5
    assert [record.getMessage().count("reset by peer") for record in caplog.records] == [1]
    limiter.succeeded()
    assert limiter.load.failed == 0
