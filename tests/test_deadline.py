"""Limits hold whatever hangs: everything ends in time, and what was measured is returned."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from embedders import hashed
from faults import AuditedLM, CountedPlanner, Messages, RateLimited, compiled
from lms import requested_fields
from tasks import Counted

from mpromptune import PromptSpace, search
from mpromptune.errors import SearchStoppedError
from mpromptune.execution.usage import Usage, record
from mpromptune.storage.attributes import SCORES

SECONDS, GRACE = 0.6, 0.2
# Of compiles that are to get as far as the search, on a busy machine too.
LONGER = 1.5
# What ends in time may still have a surrogate to fit, on a machine that does other things too.
SLACK = 4.0
# No wait of the code under test is as long: it is the hanging calls that are.
FOR_EVER = 60.0
LIMIT: dict[str, Any] = {"max_seconds": SECONDS, "grace": GRACE, "verbose": False}
SEARCHING: dict[str, Any] = {**LIMIT, "max_seconds": LONGER}
SPACE = PromptSpace({"0_predictor_instruction": [f"style {i}" for i in range(6)]})

When = Callable[[int, str, Messages], bool]


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """What hangs does so until the test has ended; it holds up the end of the interpreter no more."""
    before, event = set(threading.enumerate()), threading.Event()
    yield event
    assert all(thread.daemon for thread in set(threading.enumerate()) - before)
    event.set()


@contextmanager
def in_time(seconds: float = SECONDS + GRACE) -> Iterator[None]:
    """What happens in here takes no longer, but for some slack."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began <= seconds + SLACK


class HangingLM(AuditedLM):
    """Requests for which ``when`` holds are not answered before ``release``; it notes when each began."""

    def __init__(self, release: threading.Event, when: When) -> None:
        super().__init__(self._hang)
        self._release, self._when = release, when
        self.began: list[float] = []

    def _hang(self, number: int, step: str, messages: Messages) -> None:
        self.began.append(time.monotonic())
        if self._when(number, step, messages):
            self._release.wait(FOR_EVER)


def _all(first: int, step: str) -> When:
    return lambda number, of, _: of == step and number >= first


def _one_in_ten(first: int, step: str) -> When:
    return lambda number, of, _: of == step and number >= first and number % 10 == 0


def _never(number: int, step: str, messages: Messages) -> bool:
    return False


def _asks_for(field: str) -> When:
    return lambda number, step, messages: field in requested_fields(messages)


# The steps before the search.


@pytest.mark.parametrize(
    "when",
    [_all(3, "bootstrap"), _asks_for("observations"), _asks_for("proposed_instruction")],
    ids=["bootstrap", "summary", "proposals"],
)
def test_requests_that_hang_before_the_search(release: threading.Event, when: When) -> None:
    """The compile ends with an error that names the limit and has the student; no request begins late."""
    lm, program, began = HangingLM(release, when), CountedPlanner(), time.monotonic()
    with in_time(), pytest.raises(SearchStoppedError, match=r"max_seconds=0\.6 was used up") as stopped:
        compiled(lm, program, **LIMIT)
    assert stopped.value.program is program
    assert stopped.value.usage.total.lm_calls == sum(lm.books.answered.values())
    assert max(lm.began) <= began + SECONDS + 0.5


def test_an_embedder_that_hangs(release: threading.Event) -> None:
    """It is asked before any request is paid for: nothing is."""
    lm = HangingLM(release, _never)

    def embedder(texts: list[str]) -> Any:
        release.wait(FOR_EVER)
        return hashed(texts)

    with in_time(), pytest.raises(SearchStoppedError, match="max_seconds"):
        compiled(lm, embedder=embedder, **LIMIT)
    assert not lm.began


def test_an_embedder_that_hangs_on_the_candidates(release: threading.Event) -> None:
    """Nothing has been measured by then but what the error says."""
    asked: list[int] = []

    def embedder(texts: list[str]) -> Any:
        asked.append(len(texts))
        if len(asked) > 1:
            release.wait(FOR_EVER)
        return hashed(texts)

    with in_time(LONGER + GRACE), pytest.raises(SearchStoppedError, match="max_seconds") as stopped:
        compiled(HangingLM(release, _never), embedder=embedder, **SEARCHING)
    assert len(asked) == 2
    instructions = [p.signature.instructions for p in stopped.value.program.predictors()]
    assert instructions == [p.signature.instructions for p in CountedPlanner().predictors()]


# The search.


@pytest.mark.parametrize(
    ("schedule", "when"),
    [
        ("blocks", _one_in_ten(40, "search")),
        ("mipro", _one_in_ten(40, "search")),
    ],
    ids=["blocks", "minibatches"],
)
def test_requests_that_hang_in_the_search(release: threading.Event, schedule: str, when: When) -> None:
    """The result has every score that the metric has given; no request begins late.

    Nor does one when those that hung wake up, although the program has a second request to make.
    """
    lm, metric, began = HangingLM(release, when), Counted(), time.monotonic()
    options = {"block_size": None} if schedule == "mipro" else {}
    with in_time(LONGER + GRACE):
        best = compiled(lm, metric=metric, schedule=schedule, **options, **SEARCHING)
    result, trials = best.search_result, best.search_result.study.trials
    assert result.stopped_by == "max_seconds"
    assert result.calls == sum(len(t.user_attrs.get(SCORES, ())) for t in trials) == metric.calls > 0
    assert all(trial.state.is_finished() for trial in trials)
    assert max(lm.began) <= began + LONGER + 0.5
    sent = len(lm.began)
    release.set()
    time.sleep(0.2)
    assert len(lm.began) == sent


def test_a_metric_that_hangs(release: threading.Event) -> None:
    """From its 20th score on: those before are returned."""
    lock, scored = threading.Lock(), []

    def metric(example: Any, prediction: Any, trace: Any = None) -> bool:
        with lock:
            if trace is None:
                scored.append(1)
            hangs = trace is None and len(scored) > 20
        if hangs:
            release.wait(FOR_EVER)
        return bool(example.answer == prediction.answer)

    with in_time(LONGER + GRACE):
        best = compiled(HangingLM(release, _never), metric=metric, **SEARCHING)
    assert best.search_result.stopped_by == "max_seconds"
    assert best.search_result.calls == 20


# Waiting by our own will.


def _refusing(first: int, step: str) -> AuditedLM:
    """Says from then on to come back in 200 s."""

    def refuse(number: int, of: str, messages: Messages) -> None:
        if of == step and number >= first:
            error = RateLimited("slow down")
            error.retry_after = 200.0
            raise error

    return AuditedLM(refuse)


@pytest.mark.parametrize("step", ["bootstrap", "propose"])
def test_a_provider_that_asks_for_a_long_pause(step: str) -> None:
    """There is no need to wait for its end."""
    with in_time(SECONDS), pytest.raises(SearchStoppedError, match="max_seconds"):
        compiled(_refusing(2, step), **LIMIT)


def test_a_provider_that_asks_for_a_long_pause_in_the_search() -> None:
    """What was measured before is returned, and nobody waits even for the grace."""
    metric = Counted()
    with in_time(LONGER):
        best = compiled(_refusing(50, "search"), metric=metric, **{**SEARCHING, "grace": FOR_EVER})
    assert best.search_result.stopped_by == "max_seconds"
    assert best.search_result.calls == metric.calls > 0


def test_a_cap_per_minute_that_is_used_up(release: threading.Event) -> None:
    """The next request would have to wait for a minute."""
    with in_time(), pytest.raises(SearchStoppedError, match="max_seconds"):
        compiled(HangingLM(release, _never), max_requests_per_minute=5, **LIMIT)


def test_equal_requests_wait_for_one_that_hangs(release: threading.Event) -> None:
    """All ask the same thing, one of them hangs, and the others would have its answer from the cache."""

    class Constant(CountedPlanner):
        def forward(self, question: str) -> Any:
            return super().forward(question="1+1" if int(question.split("+")[0]) < 6 else "50+1")

    lm = HangingLM(release, _all(1, "search"))
    lm.cache = True
    with in_time(), pytest.raises(SearchStoppedError, match="max_seconds"):
        compiled(lm, Constant(), **LIMIT)


# search() by itself, and the other limits.


def test_a_search_with_a_score_that_hangs(release: threading.Event) -> None:
    """One call in ten: what the others measured is returned."""
    lock, begun, measured = threading.Lock(), [], []

    def score(params: dict[str, int], example: int) -> float:
        with lock:
            begun.append(example)
            hangs = len(begun) % 10 == 0
        if hangs:
            release.wait(FOR_EVER)
        measured.append(example)
        return 0.5

    with in_time(1.0 + GRACE):
        result = search(
            SPACE, score, n_examples=40, max_calls=240, sampler="random", max_seconds=1.0, grace=GRACE
        )
    assert result.stopped_by == "max_seconds"
    assert result.calls == len(measured) == 23  # two batches, of 15 and 10, but for every tenth call


@pytest.mark.parametrize("limit", ["max_tokens", "max_cost"])
def test_no_thread_is_left_to_notice_that_a_limit_is_used_up(release: threading.Event, limit: str) -> None:
    """The last calls to come back use it up; all others have begun by then, and hang."""
    lock, begun = threading.Lock(), []

    def score(params: dict[str, int], example: int) -> float:
        with lock:
            begun.append(example)
            number = len(begun)
        if number > 10:
            release.wait(FOR_EVER)
        time.sleep(0.1)
        record(Usage(prompt_tokens=10, cost=0.1))
        return 0.5

    limits = {limit: 100 if limit == "max_tokens" else 0.95}
    arguments = {"n_examples": 20, "max_calls": 40, "num_threads": 64, "sampler": "random"}
    with in_time(10 * 0.1):  # ten times what a call takes
        result = search(SPACE, score, **limits, grace=GRACE, **arguments)
    assert (result.stopped_by, result.calls) == (limit, 10)


def test_slow_calls_are_waited_for_where_there_is_time() -> None:
    """Of calls that take 0.4 s none is lost to a grace of 0.05 s: they are what a call takes."""

    def score(params: dict[str, int], example: int) -> float:
        time.sleep(0.4)
        record(Usage(prompt_tokens=10))
        return 0.5

    result = search(
        SPACE,
        score,
        n_examples=40,
        max_calls=240,
        sampler="random",
        max_tokens=110,
        grace=0.05,
        num_threads=8,
    )
    assert result.stopped_by == "max_tokens"
    assert 10 * result.calls == result.usage.total.tokens
