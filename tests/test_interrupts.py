"""Ctrl-C and SIGTERM: nothing is spent afterwards, nothing measured is lost, nothing waits for long."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dspy
import optuna
import pytest
from embedders import hashed
from faults import hold, press_ctrl_c
from lms import ScriptedLM, arithmetic_lm
from optuna.trial import TrialState
from tasks import FEW_SHOT, SMALL_RUN, TRAIN, VAL, ZERO_SHOT, Adder, Counted
from test_engine import SPACE, TABLE, N, run, trials_of

from mpromptune import MIPROv2
from mpromptune.engine import loop
from mpromptune.errors import SearchInterrupted, SearchStoppedError, SearchTerminated
from mpromptune.execution.attempts import RetryPolicy, Verdict
from mpromptune.execution.interrupts import Stopped, check_stopped, deferred, handled, is_over
from mpromptune.storage.attributes import EXAMPLES, SCORES

THREADS = 4


class Interrupting:
    """The table of scores; call number ``at`` interrupts, and it and later ones wait to be stopped."""

    def __init__(self, at: int, error: Exception | None = None) -> None:
        self.begun: list[tuple[Any, int]] = []
        self._at = at
        self._error = error
        self._lock = threading.Lock()

    def __call__(self, params: dict[str, int], example: int) -> float:
        with self._lock:
            self.begun.append((SPACE.row(params), example))
            number = len(self.begun)
        if number == self._at:
            press_ctrl_c()
        if number >= self._at:
            hold()
            if self._error is not None:
                raise self._error
        return float(TABLE[SPACE.row(params)][example])


def closed(error: SearchInterrupted) -> list[Any]:
    """The trials: none is open, and each has scores of the table, which the result has too."""
    trials = error.study.trials  # type: ignore[attr-defined]
    for trial in trials:
        assert trial.state.is_finished()
        examples = trial.user_attrs.get(EXAMPLES, [])
        if trial.user_attrs.get(SCORES):
            assert trial.user_attrs[SCORES] == TABLE[SPACE.row(trial.params)][examples].tolist()
    kept = sum(len(t.user_attrs.get(SCORES, ())) for t in trials)
    assert (error.result.calls if error.result else 0) == kept
    assert f"{kept} calls" in str(error)
    return trials  # type: ignore[no-any-return]


@pytest.mark.parametrize("at", [1, 3, 60, 100, 145])
def test_ctrl_c_while_the_search_waits(at: int) -> None:
    """In the first block, in later batches, in the confirmation: what is in flight is kept."""
    score = Interrupting(at)
    with pytest.raises(SearchInterrupted) as caught:
        run(score, max_calls=160, num_threads=THREADS, grace=60.0)
    assert at <= len(score.begun) < at + THREADS
    closed(caught.value)
    assert caught.value.result.calls == len(score.begun)  # all in flight came back in time
    assert isinstance(caught.value, KeyboardInterrupt)
    assert not isinstance(caught.value, SystemExit)


@pytest.mark.parametrize("verdict", [Verdict.RETRY, Verdict.THROTTLE])
def test_ctrl_c_while_calls_wait_for_another_attempt(verdict: Verdict) -> None:
    """A backoff, or the pause of a rate limit, of most of an hour ends; what was to be tried again is not."""
    score, wait = Interrupting(7, ConnectionError("down")), {"retry_after": lambda error: 3000.0}
    with pytest.raises(SearchInterrupted) as caught:
        run(score, num_threads=THREADS, grace=60.0, classify=lambda error: verdict, **wait)
    assert len(score.begun) < 7 + THREADS
    closed(caught.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_callback(number: int) -> None:
    """The trial whose callback it is stays as it was told; SIGTERM can be caught as a SystemExit too."""
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]

    def callback(study: optuna.Study, trial: Any) -> None:
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        if trial.number == 5:
            signal.raise_signal(number)

    score = Interrupting(10**9)
    with pytest.raises(SearchInterrupted) as caught:
        run(score, callbacks=[callback], num_threads=THREADS)
    trials = closed(caught.value)
    assert [t.state for t in trials[:6]] == [TrialState.COMPLETE] * 6
    assert caught.value.result.calls == len(score.begun)
    is_term = number == signal.SIGTERM
    assert isinstance(caught.value, SearchTerminated) == isinstance(caught.value, SystemExit) == is_term
    assert getattr(caught.value, "code", None) == (143 if is_term else None)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers  # put back


def test_ctrl_c_in_an_ask() -> None:
    """The sampler, which may take long, does not go on, and the trial that was being asked is closed too."""
    score, has_scored = Interrupting(10**9), threading.Event()

    class Interrupted(optuna.samplers.RandomSampler):
        asked = 0

        def sample_independent(self, *args: Any) -> Any:
            type(self).asked += 1
            if type(self).asked == 12:
                assert has_scored.wait(60.0)  # or there is nothing to return
                signal.raise_signal(signal.SIGINT)
                type(self).asked += 1  # it goes on
            return super().sample_independent(*args)

    def scored(params: dict[str, int], example: int) -> float:
        has_scored.set()
        return score(params, example)

    with pytest.raises(SearchInterrupted) as caught:
        run(scored, sampler=Interrupted(seed=0), batch_size=4, num_threads=THREADS)
    begun = len(score.begun)
    assert Interrupted.asked == 12
    trials = closed(caught.value)
    assert trials[-1].state == TrialState.FAIL
    assert not trials[-1].user_attrs[SCORES]
    assert caught.value.result.calls == len(score.begun) == begun


def test_ctrl_c_between_a_trial_that_waits_and_its_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a finalist's, which the plan asks for: it is closed as any other."""
    enqueue = optuna.Study.enqueue_trial

    def interrupted(study: optuna.Study, *args: Any, **given: Any) -> None:
        enqueue(study, *args, **given)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(optuna.Study, "enqueue_trial", interrupted)
    with pytest.raises(SearchInterrupted) as caught:
        run()
    assert all(trial.state.is_finished() for trial in caught.value.study.trials)


@pytest.mark.parametrize("at", range(1, 40, 3))
def test_ctrl_c_in_the_storage_waits_until_a_trial_is_whole(at: int) -> None:
    """Whichever write to the study it comes with, no trial stays open and no score is lost."""

    class Storage(optuna.storages.InMemoryStorage):
        writes = 0

        def set_trial_user_attr(self, *args: Any) -> None:
            self.press()
            super().set_trial_user_attr(*args)

        def set_trial_state_values(self, *args: Any, **kwargs: Any) -> bool:
            done = super().set_trial_state_values(*args, **kwargs)
            self.press()
            return done

        def press(self) -> None:
            self.writes += 1
            if self.writes == at:
                signal.raise_signal(signal.SIGINT)

    score = Interrupting(10**9)
    with pytest.raises(SearchInterrupted) as caught:
        run(score, storage=Storage(), sampler="random", num_threads=THREADS, grace=60.0)
    closed(caught.value)
    result = caught.value.result
    assert (result.calls if result else 0) == len(score.begun)


@pytest.mark.parametrize("at", [1, 30])
def test_a_call_that_hangs_is_left_behind_after_the_grace(at: int) -> None:
    """What came back is kept, and where nothing did there is no best; what did not is not waited for."""
    release, table = threading.Event(), Interrupting(at)

    def score(params: dict[str, int], example: int) -> float:
        value = table(params, example)
        if len(table.begun) >= at:
            release.wait()
        return value

    with pytest.raises(SearchInterrupted) as caught:
        run(score, num_threads=THREADS, grace=0.05)
    begun, result = len(table.begun), caught.value.result
    release.set()
    assert begun - THREADS <= (result.calls if result else 0) < begun
    assert (result is None) == (at == 1)
    closed(caught.value)
    assert len(table.begun) == begun


class Late:
    """Interrupts while it is being taken away, where Python ignores whatever is raised."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_in_a_finalizer_is_not_lost() -> None:
    """Python ignores an exception there; the search ends at its next wait."""
    late = [Late()]

    def drop(study: Any, trial: Any) -> None:
        late.clear()

    score = Interrupting(10**9)
    with pytest.raises(SearchInterrupted) as caught:
        run(score, callbacks=[drop], num_threads=THREADS)
    closed(caught.value)


@contextlib.contextmanager
def handler(number: int, function: Callable[..., Any]) -> Iterator[None]:
    previous = signal.signal(number, function)
    try:
        yield
    finally:
        signal.signal(number, previous)


def test_handlers_of_the_user_are_left_alone() -> None:
    """Who listens to SIGTERM already keeps hearing it, and the search goes on."""
    heard: list[int] = []

    def callback(study: optuna.Study, trial: Any) -> None:
        if trial.number == 2:
            signal.raise_signal(signal.SIGTERM)

    with handler(signal.SIGTERM, lambda number, frame: heard.append(number)):
        result = run(callbacks=[callback])
    assert heard == [signal.SIGTERM]
    assert trials_of(result) == trials_of(run())


def test_an_interrupt_waits_for_what_belongs_together_and_a_second_does_not() -> None:
    """One signal in a deferred section is raised at its end; of two, the second at once."""
    done: list[int] = []

    def press(number: int) -> None:
        with deferred(), deferred():
            signal.raise_signal(signal.SIGINT)
            done.append(number)

    with handled():
        with pytest.raises(KeyboardInterrupt):
            press(1)
        with pytest.raises(KeyboardInterrupt):
            press(2)
    assert done == [1]
    with handled(), deferred():  # nothing is left of it
        done.append(3)
    assert done == [1, 3]


def test_two_threads_may_search_at_once() -> None:
    """Each has the trials that it has alone, although a third one, of the main thread, is interrupted."""
    expected = {seed: trials_of(run(seed=seed, max_calls=100)) for seed in (0, 1)}
    found: dict[int, Any] = {}
    both = threading.Barrier(3)

    def one(seed: int) -> None:
        both.wait(60)
        found[seed] = trials_of(run(seed=seed, max_calls=100))

    threads = [threading.Thread(target=one, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    both.wait(60)
    with pytest.raises(SearchInterrupted):
        run(Interrupting(10))
    for thread in threads:
        thread.join(120)
    assert found == expected


def search_and_hang(log: Path, grace: float) -> None:
    """A search of which a call hangs, whatever happens; what it says is in a file."""
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), stream)
    answered: list[int] = []

    def score(params: dict[str, int], example: int) -> float:
        answered.append(example)
        if len(answered) <= 5:
            return 1.0
        os.write(1, b"hangs\n")
        while not is_over():
            threading.Event().wait(0.001)
        os.write(1, b"stopped\n")
        threading.Event().wait()
        raise AssertionError

    storage = optuna.storages.InMemoryStorage()
    try:
        run(score, sampler="random", num_threads=1, storage=storage, study_name="s", grace=grace)
    finally:
        study = optuna.load_study(study_name="s", storage=storage)
        os.write(1, f"left with {sorted({t.state.name for t in study.trials})}\n".encode())


@pytest.mark.parametrize(
    ("signals", "grace", "code", "message"),
    [
        ([signal.SIGTERM], 0.5, 143, "The search was interrupted; the study keeps the scores of 5 calls."),
        (
            [signal.SIGINT],
            0.5,
            1,
            "SearchInterrupted: The search was interrupted; the study keeps the scores of 5 calls.",
        ),
        ([signal.SIGINT, signal.SIGINT], 10_000.0, 1, "KeyboardInterrupt"),
    ],
    ids=["SIGTERM", "Ctrl-C", "a second Ctrl-C"],
)
def test_signals_end_a_process_although_a_call_hangs(
    forks: Any, tmp_path: Path, signals: list[int], grace: float, code: int, message: str
) -> None:
    """SIGTERM with its exit code, Ctrl-C as an exception, a second one at once; no trial stays open."""
    log = tmp_path / "log"
    process = forks.Process(target=search_and_hang, args=(log, grace))
    process.start()
    for number, awaited in zip(signals, ("hangs", "stopped"), strict=False):
        while not (log.exists() and awaited in log.read_text()):
            assert process.is_alive()
            process.join(0.01)
        os.kill(process.pid, number)
    process.join(60)
    said = log.read_text()
    assert (process.exitcode, "left with ['COMPLETE', 'FAIL']" in said) == (code, True), said
    assert message in said


def _compile(metric: Any, lm: ScriptedLM, demos: dict[str, int] = ZERO_SHOT, **given: Any) -> Any:
    arguments = {**SMALL_RUN, "sampler": "qei", "embedder": hashed, "block_size": 4, "batch_size": 2, **given}
    with dspy.context(lm=lm):
        optimizer = MIPROv2(metric=metric, auto=None, num_candidates=4, num_threads=THREADS, **demos)
        return optimizer.compile(Adder(), trainset=TRAIN, valset=VAL, **arguments)


class Pressing(Counted):
    """A metric whose call number ``at`` interrupts; evaluations alone are counted."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._at = at

    def __call__(self, example: Any, prediction: Any, trace: Any = None) -> bool:
        value = super().__call__(example, prediction, trace)
        if trace is None and self.calls == self._at:
            press_ctrl_c()
            hold()
        return value


def is_short(error: SearchInterrupted) -> bool:
    """Whether its traceback ends at the caller's line, without those of threads and of other errors."""
    return len(traceback.format_exception(error)) < 12


def test_an_interrupted_compile_has_the_best_program_so_far() -> None:
    """With the scores that were measured, a short traceback, and no LM call afterwards."""
    lm, metric = arithmetic_lm(), Pressing(20)
    with pytest.raises(SearchInterrupted) as caught:
        _compile(metric, lm, grace=60.0, confirm=False)
    calls = len(lm.calls)
    error = caught.value
    assert is_short(error)
    assert error.program.search_result is error.result
    assert error.program.score == round(100 * error.result.best_score, 2)
    assert error.result.calls == metric.calls >= 20
    assert isinstance(error.program, Adder)
    assert len(lm.calls) == calls


@pytest.mark.parametrize("at", [1, 4, 9])
def test_a_compile_interrupted_before_its_search_has_the_student(at: int) -> None:
    """In the bootstrap or in the proposals: LM calls in flight come back, no other begins."""
    lm = arithmetic_lm()
    forward, lock = lm.forward, threading.Lock()
    begun: list[int] = []

    def pressing(*args: Any, **kwargs: Any) -> Any:
        check_stopped()
        with lock:
            begun.append(1)
            number = len(begun)
        if number == at:
            press_ctrl_c()
        if number >= at:
            hold()
        return forward(*args, **kwargs)

    lm.forward = pressing  # type: ignore[method-assign]
    with pytest.raises(SearchInterrupted) as caught:
        _compile(Counted(), lm, FEW_SHOT, grace=60.0, confirm=False)
    assert isinstance(caught.value.program, Adder)
    assert caught.value.result is None
    assert is_short(caught.value)
    assert at <= len(begun) < at + 2 * THREADS
    assert len(lm.calls) <= len(begun)


def test_sigterm_before_the_search_is_as_in_it() -> None:
    """Both a KeyboardInterrupt and a SystemExit of status 143, with the student; the handler is put back."""
    lm = arithmetic_lm()
    forward, before = lm.forward, signal.getsignal(signal.SIGTERM)

    def terminated(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return forward(*args, **kwargs)

    lm.forward = terminated  # type: ignore[method-assign]
    with pytest.raises(SearchTerminated) as caught:
        _compile(Counted(), lm, FEW_SHOT)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert isinstance(caught.value, SystemExit)
    assert caught.value.code == 143
    assert isinstance(caught.value.program, Adder)
    assert caught.value.usage.total.lm_calls == len(lm.calls)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("how", ["event", "score"])
@pytest.mark.parametrize("at", [1, 30])
def test_a_search_that_is_stopped_from_outside_ends(how: str, at: int) -> None:
    """By its event, or by a score that may not be made any more, as within a compile that is over."""
    event, asked = threading.Event(), []

    def score(params: dict[str, int], example: int) -> float:
        if len(asked) == at:
            event.set()
            if how == "score":
                raise Stopped
        asked.append(example)
        return float(TABLE[SPACE.row(params)][example])

    with pytest.raises(SearchStoppedError, match="from outside") as caught:
        run(score, stopped=event if how == "event" else None, num_threads=1)
    kept = sum(len(t.user_attrs.get(SCORES, ())) for t in caught.value.study.trials)  # type: ignore[attr-defined]
    assert kept == len(asked) == at + (how == "event")


def test_a_call_that_hangs_does_not_hold_up_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that no further call can mend ends the search; Ctrl-C ends the wait for the last calls."""
    release, begun, lock = threading.Event(), [], threading.Lock()

    def score(params: dict[str, int], example: int) -> float:
        with lock:
            begun.append(example)
            number = len(begun)
        if number == 2:
            release.wait()
        if number > 5:
            raise PermissionError("bad key")
        return float(TABLE[SPACE.row(params)][example])

    given: dict[str, Any] = {"classify": lambda error: Verdict.STOP, "num_threads": 2}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_LAST_CALLS", 0.05)
        with pytest.raises(SearchStoppedError, match="PermissionError: bad key.* 4 calls"):
            run(score, **given)
    begun.clear()
    patience = threading.Timer(0.5, press_ctrl_c)
    patience.start()
    with pytest.raises(SearchInterrupted, match="4 calls") as caught:
        run(score, **given)
    assert caught.value.result.calls == 4
    closed(caught.value)
    release.set()


def test_retries_do_not_outlive_an_error() -> None:
    """An error of a callback ends calls that wait for another attempt as well."""

    def score(params: dict[str, int], example: int) -> float:
        if SPACE.row(params) != (0, 0) and example % 2:
            raise ConnectionError("down")
        return float(TABLE[SPACE.row(params)][example])

    def callback(study: optuna.Study, trial: Any) -> None:
        raise RuntimeError("mine")

    with pytest.raises(SearchStoppedError) as caught:
        run(score, retry=RetryPolicy(attempts=1), callbacks=[callback])
    assert all(t.state.is_finished() for t in caught.value.study.trials)  # type: ignore[attr-defined]
    assert N == 40
