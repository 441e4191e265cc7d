"""Counting what is used, by hand."""

from __future__ import annotations

import contextvars
import threading

from clocks import Clock

from mpromptune.execution.usage import Meter, StepUsage, Usage, current_meter, metered, record


def test_usage_adds_up_field_by_field() -> None:
    """Two calls of 10 + 5 and 20 + 1 tokens are 36 tokens; steps add up likewise."""
    first, second = Usage(lm_calls=1, prompt_tokens=10, completion_tokens=5), Usage(1, 0, 20, 1, 0.5)
    both = Usage(lm_calls=2, prompt_tokens=30, completion_tokens=6, cost=0.5)
    assert first + second == StepUsage(bootstrap=first, search=second).total == both
    assert (both - second, both.tokens, StepUsage().total) == (first, 36, Usage())


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
    """A meter inside another one passes on what it counts."""
    with metered() as whole:
        record(Usage(lm_calls=1))
        with metered() as part:
            record(Usage(lm_calls=2))
    record(Usage(lm_calls=8))  # nobody listens
    assert (part.total.lm_calls, whole.total.lm_calls) == (2, 3)
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


def test_waiting_is_told_apart_from_working() -> None:
    """Two that wait from 10 to 40 and from 20 to 50 have a meter, and all around it, wait for 40 seconds."""
    clock = Clock()
    whole = Meter(clock=clock)
    meter = Meter(whole, clock)
    first, second = meter.waiting(), meter.waiting()
    clock.sleep(10)
    first.__enter__()
    clock.sleep(10)
    second.__enter__()
    clock.sleep(20)
    assert meter.waited == whole.waited == 30
    first.__exit__(None, None, None)
    clock.sleep(10)
    second.__exit__(None, None, None)
    clock.sleep(49)
    assert meter.waited == whole.waited == 40
