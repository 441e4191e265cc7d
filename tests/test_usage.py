"""Counting what is used, by hand."""

from __future__ import annotations

import contextvars
import threading
import time

from mpromptune.execution.usage import Meter, StepUsage, Usage, current_meter, metered, record


def test_usage_adds_up_field_by_field() -> None:
    """Two calls of 10 + 5 and 20 + 1 tokens are 36 tokens."""
    both = Usage(lm_calls=1, prompt_tokens=10, completion_tokens=5) + Usage(1, 0, 20, 1, 0.5)
    assert both == Usage(lm_calls=2, prompt_tokens=30, completion_tokens=6, cost=0.5)
    assert both.tokens == 36


def test_steps_add_up_to_their_total() -> None:
    """Three calls for the bootstrap and two for the search are five."""
    usage = StepUsage(bootstrap=Usage(lm_calls=3), search=Usage(lm_calls=2, cost=1.0))
    assert usage.total == Usage(lm_calls=5, cost=1.0)
    assert StepUsage().total == Usage()


def test_usage_survives_as_json_takes_it() -> None:
    """Zeros are left out, and come back."""
    usage = Usage(lm_calls=2, cost=0.25, program_calls=1)
    assert usage.as_dict() == {"lm_calls": 2, "cost": 0.25, "program_calls": 1}
    assert Usage(**usage.as_dict()) == usage


def test_usage_reads_in_one_line() -> None:
    """What people ask about."""
    usage = Usage(lm_calls=8, cache_hits=2, prompt_tokens=100, completion_tokens=7, cost=0.5, program_calls=4)
    expected = "4 program calls, 8 LM calls and 2 cache hits, 100 + 7 tokens, $0.5000"
    assert str(usage) == expected


def test_a_part_counts_for_the_whole() -> None:
    """A meter inside another one passes on what it counts; what the whole knows already stays with it."""
    with metered() as whole:
        record(Usage(lm_calls=1))
        with metered() as part:
            record(Usage(lm_calls=2))
            part.attribute(Usage(lm_calls=4))
    assert part.total.lm_calls == 6
    assert whole.total.lm_calls == 3
    assert current_meter() is None


def test_nothing_is_lost_between_threads() -> None:
    """Eight threads that inherit the context count a thousand calls each."""

    def work() -> None:
        for _ in range(1000):
            record(Usage(lm_calls=1, prompt_tokens=3))

    with metered(Meter()) as meter:
        contexts = [contextvars.copy_context() for _ in range(8)]
        threads = [threading.Thread(target=context.run, args=(work,)) for context in contexts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert meter.total == Usage(lm_calls=8000, prompt_tokens=24000)


def test_outside_of_any_meter_nothing_is_recorded() -> None:
    """Scores may say what they cost whether anybody listens or not."""
    record(Usage(lm_calls=1))
    assert current_meter() is None


def test_waiting_is_told_apart_from_working() -> None:
    """Two that wait from 10 to 40 and from 20 to 50 have a meter wait for forty seconds."""
    now = [10.0]
    meter = Meter(clock=lambda: now[0])
    first, second = meter.waiting(), meter.waiting()
    first.__enter__()
    now[0] = 20.0
    second.__enter__()
    now[0] = 40.0
    assert meter.waited == 30.0
    first.__exit__(None, None, None)
    now[0] = 50.0
    second.__exit__(None, None, None)
    now[0] = 99.0
    assert meter.waited == 40.0


def test_waiting_is_counted_by_all_meters_around() -> None:
    """What a request waits by our own will is known to whoever has a timeout for the whole call."""
    outer = Meter()
    with Meter(outer).waiting():
        time.sleep(0.01)
    assert outer.waited >= 0.01
