"""Whole compiles through all kinds of faults: each ends as documented, its ledger is the LM's own count."""

from __future__ import annotations

import errno
import os
import random
import re
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspy
import optuna
import pytest
from dspy.clients.cache import Cache, request_cache
from faults import (
    STEPS,
    THREADS,
    AuditedLM,
    BadKey,
    Chance,
    CountedPlanner,
    Down,
    Fault,
    Messages,
    RateLimited,
    TimedOut,
    compile_and_die,
    compiled,
    hold,
    log_lines,
    press_ctrl_c,
    recorded,
    trials_of,
    usage_of_trials,
)
from tasks import FEW_SHOT, LABELLED_ONLY, VAL, Counted

from mpromptune.engine import options
from mpromptune.errors import SearchInterrupted, SearchStoppedError, StorageError
from mpromptune.execution.attempts import RetryPolicy
from mpromptune.execution.usage import StepUsage, Usage
from mpromptune.storage import journal
from mpromptune.storage.attributes import DEMOS, INSTRUCTIONS, SCORES
from mpromptune.storage.storage import open_study

# The student: what a program of two predictors comes with.
BASELINE = {f"{i}_predictor_{what}": 0 for i in (0, 1) for what in ("instruction", "demos")}


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backoff of a hundredth of a second."""

    def hasty(attempts: int, **given: Any) -> RetryPolicy:
        return RetryPolicy(attempts, **{"max_wait": 0.01, **given})

    monkeypatch.setattr(options, "RetryPolicy", hasty)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The compile that nothing goes wrong with, and its log."""
    log = tmp_path_factory.mktemp("sound") / "lm.log"
    return compiled(AuditedLM(log=log)), log


@pytest.fixture(scope="module")
def sound(whole: tuple[Any, Path]) -> Any:
    """The compile that nothing goes wrong with."""
    return whole[0]


def audit(lm: AuditedLM, usage: StepUsage, program: CountedPlanner | None = None) -> None:
    """The ledger of a compile is what the LM, and the program, have counted themselves."""
    for step in STEPS:
        used = usage.get(step, Usage())
        assert used.lm_calls + used.cache_hits == lm.books.started[step], step
        assert [used.prompt_tokens, used.completion_tokens] == lm.books.tokens[step], step
        if program is not None:
            assert used.program_calls == program.runs.begun[step], step
    assert usage.total.lm_calls == sum(lm.books.started.values())


def audit_trials(best: Any) -> None:
    """What the trials have used is what the search has used."""
    result = best.search_result
    of_trials, of_search = usage_of_trials(result.study), result.usage["search"]
    for name in ("lm_calls", "prompt_tokens", "completion_tokens", "program_calls"):
        assert getattr(of_trials, name) == getattr(of_search, name), name


def settle() -> None:
    """Waits for all threads of compiles: whatever they still do, they have done."""
    for thread in threading.enumerate():
        if thread.name.startswith("mpromptune"):
            thread.join(60)
            assert not thread.is_alive()


def nothing_asked_since(lm: AuditedLM, started: Counter[str]) -> None:
    """No request has begun since then, although every thread has come to its end."""
    settle()
    assert lm.books.started == started


def alike(best: Any, other: Any) -> bool:
    """Whether two compiles have found the same, in the same trials."""
    same_program = best.dump_state() == other.dump_state()
    return same_program and trials_of(best.search_result) == trials_of(other.search_result)


# Faults that pass.


@pytest.mark.parametrize("shots", [FEW_SHOT, LABELLED_ONLY], ids=["few", "labelled"])
def test_a_sound_compile(shots: dict[str, int]) -> None:
    """Every step's calls and tokens, and the trials' sum."""
    lm, program, metric = AuditedLM(), CountedPlanner(), Counted()
    best = compiled(lm, program, metric, shots)
    audit(lm, best.search_result.usage, program)
    audit_trials(best)
    assert metric.calls == best.search_result.calls == best.search_result.usage["search"].program_calls


@pytest.mark.parametrize(
    ("share", "error"), [(0.3, RateLimited), (0.05, TimedOut), (0.1, Down)], ids=["429", "timeout", "reset"]
)
def test_refusals_and_timeouts_everywhere(share: float, error: type[Exception], sound: Any) -> None:
    """In bootstrap, proposals and search: the same candidates, trials and winner."""
    fault = Chance(share, lambda: error("come back later"))
    lm, program, metric = AuditedLM(fault), CountedPlanner(), Counted()
    best = compiled(lm, program, metric)
    assert fault.failed > 0
    assert alike(best, sound)
    audit(lm, best.search_result.usage, program)
    audit_trials(best)
    assert metric.calls == best.search_result.calls
    assert sum(lm.books.started.values()) - sum(lm.books.answered.values()) == fault.failed


def test_an_example_that_always_times_out() -> None:
    """The compile ends as ever, and the scores are those of the other examples."""
    bad = VAL[3].question

    def fault(number: int, step: str, messages: Messages) -> None:
        if step == "search" and re.search(rf"\b{re.escape(bad)}\b", str(messages[-1]["content"])):
            raise TimedOut("slow")

    lm, program = AuditedLM(fault), CountedPlanner()
    best = compiled(lm, program)
    whole = [set(m.scores) for m in best.search_result.configurations if m.fully]
    assert len(whole) > 1
    assert all(examples == set(range(len(VAL))) - {3} for examples in whole)
    assert best.score == pytest.approx(100 * best.search_result.best_score, abs=0.01)
    audit(lm, best.search_result.usage)


def test_hangs(sound: Any) -> None:
    """Requests of the search that hang are given up after ``timeout``, and counted once they end."""
    hung: list[threading.Event] = []

    def fault(number: int, step: str, messages: Messages) -> None:
        if step == "search" and number > 60 and number % 10 == 0:
            hung.append(threading.Event())
            assert hung[-1].wait(60)

    lm, program, metric = AuditedLM(fault), CountedPlanner(), Counted()
    best = compiled(lm, program, metric, timeout=0.3, confirm=False, num_threads=16)
    settled = best.search_result.usage["search"]
    assert len(hung) >= 3
    assert lm.books.started["search"] - settled.lm_calls == len(hung)
    assert settled.program_calls == program.runs.begun["search"] == metric.calls + len(hung)
    started = lm.books.started.copy()
    for event in hung:
        event.set()
    nothing_asked_since(lm, started)


def test_one_candidate_is_never_parsed(sound: Any) -> None:
    """Its examples score ``failure_score``, DSPy's second attempt at each is paid too, the others win."""
    bad = sound.search_result.best_params["1_predictor_instruction"]
    instruction = sound.predictors()[1].signature.instructions
    assert bad != 0  # the student's own is another

    def fault(number: int, step: str, messages: Messages) -> str | None:
        system = str(messages[0]["content"])
        return "???" if step == "search" and instruction in system and "`answer`" in system else None

    lm, program = AuditedLM(fault), CountedPlanner()
    best = compiled(lm, program, failure_score=-0.5)
    result = best.search_result
    broken = [m for m in result.configurations if m.params["1_predictor_instruction"] == bad]
    assert broken
    assert {score for m in broken for score in m.scores.values()} == {-0.5}
    assert result.best_params["1_predictor_instruction"] != bad
    audit(lm, result.usage, program)
    audit_trials(best)


def test_refusals_of_a_cached_lm(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was answered is in the cache: with 16 threads no more is answered, or charged, than with one."""

    class CachedLM(AuditedLM):
        def __init__(self, fault: Fault) -> None:
            super().__init__(fault)
            self.cache = True

        def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            ask = super().forward

            @request_cache(cache_arg_name="request")
            def answer(request: dict[str, Any]) -> Any:
                return ask(request["prompt"], request["messages"])

            return answer(request={"prompt": prompt, "messages": messages, **kwargs})

    answered = []
    for threads in (1, 16):
        cache = Cache(enable_disk_cache=False, enable_memory_cache=True, disk_cache_dir=None)
        monkeypatch.setattr(dspy, "cache", cache)
        lm = CachedLM(Chance(0.3, lambda: RateLimited("slow down")))
        usage = compiled(lm, num_threads=threads, batch_size=4).search_result.usage
        assert usage.total.lm_calls == sum(lm.books.started.values())
        assert usage.total.tokens == sum(map(sum, lm.books.tokens.values()))
        answered.append(sum(lm.books.answered.values()))
    assert answered[1] <= answered[0]


# Faults that stop.


def from_request(k: int, error: Callable[[], Exception], step: str | None = None) -> Fault:
    """All requests fail from the k-th on, of a step or of all."""
    asked: Counter[str | None] = Counter()
    lock = threading.Lock()

    def fault(number: int, of: str, messages: Messages) -> None:
        with lock:
            asked[None] += 1
            asked[of] += 1
            fails = asked[step] >= k
        if fails:
            raise error()

    return fault


@pytest.mark.parametrize("k", [1, 10, 25, 60, 100, 130])
@pytest.mark.parametrize("error", [BadKey, Down])
def test_nothing_works_any_more(k: int, error: type[Exception], tmp_path: Path) -> None:
    """Wherever it begins: a clear error with what was used and the best program, no score of it, and later
    the same call ends as if nothing had happened.
    """
    lm, program, metric = AuditedLM(from_request(k, lambda: error("gone"))), CountedPlanner(), Counted()
    with pytest.raises(SearchStoppedError, match="gone") as caught:
        compiled(lm, program, metric, storage=tmp_path / "run.log", max_retries=1, failure_score=-1.0)
    started = lm.books.started.copy()
    nothing_asked_since(lm, started)
    stopped = caught.value
    assert type(stopped.__cause__) is error
    audit(lm, stopped.usage, program)
    assert isinstance(stopped.program, CountedPlanner)
    if error is BadKey:
        assert sum(started.values()) - sum(lm.books.answered.values()) <= 2 * THREADS
    trials = open_study(tmp_path / "run.log").trials
    assert all(trial.state.is_finished() for trial in trials)
    assert -1.0 not in [score for t in trials for score in t.user_attrs.get("mpromptune:scores", [])]
    check_rest(tmp_path / "run.log", lm)


@pytest.mark.parametrize(
    "value", [float("nan"), None, "1.0", {"score": 1.0}], ids=["nan", "None", "str", "dict"]
)
def test_a_metric_that_returns_no_number(value: Any) -> None:
    """From its 20th evaluation on: what was measured before is a program, and all is accounted for."""
    metric = Counted()

    def failing(example: Any, prediction: Any, trace: Any = None) -> Any:
        score = metric(example, prediction, trace)
        return score if trace is not None or metric.calls < 20 else value

    lm, program = AuditedLM(), CountedPlanner()
    with pytest.raises(SearchStoppedError, match="The metric returned") as caught:
        compiled(lm, program, failing)
    started = lm.books.started.copy()
    nothing_asked_since(lm, started)
    audit(lm, caught.value.usage, program)
    assert caught.value.program is not None


# Ctrl-C.


class Pressing:
    """Ctrl-C at a step's request number ``at``, which waits, as all later ones do, for the end."""

    def __init__(self, step: str, at: int) -> None:
        self._step, self._at = step, at
        self._pressed = threading.Event()

    def __call__(self, number: int, step: str, messages: Messages) -> None:
        if (step, number) == (self._step, self._at):
            self._pressed.set()
            press_ctrl_c()
        if self._pressed.is_set():
            hold()


def check_interrupted(storage: Path, lm: AuditedLM, program: CountedPlanner, **options: Any) -> None:
    """Nothing is asked afterwards, all is accounted for, there is a program; and the same call goes on."""
    with pytest.raises(SearchInterrupted) as caught:
        compiled(lm, program, storage=storage, grace=60.0, **options)
    started = lm.books.started.copy()
    nothing_asked_since(lm, started)
    interrupted = caught.value
    audit(lm, interrupted.usage, program)
    assert isinstance(interrupted.program, CountedPlanner)
    assert all(trial.state.is_finished() for trial in open_study(storage).trials)
    check_rest(storage, lm)


def check_rest(storage: Path, lm: AuditedLM) -> None:
    """The same call goes on, and of what was answered it asks again only for plans that led to nothing."""
    done = {
        step
        for step, key in {"bootstrap": DEMOS, "propose": INSTRUCTIONS}.items()
        if key in open_study(storage).user_attrs
    }
    in_search, rest = bool(open_study(storage).trials), AuditedLM()
    result = compiled(rest, storage=storage).search_result
    assert {m.fully for m in result.configurations if m.params in (result.best_params, BASELINE)} == {True}
    assert not any(rest.books.started[step] for step in done)
    answered = lm.books.answered["search"] + rest.books.answered["search"]
    assert 0 <= answered - 2 * result.calls <= THREADS
    lost = lm.books.started["search"] + rest.books.started["search"] - result.usage["search"].lm_calls
    assert 0 <= lost <= (0 if in_search else 1)  # a first score that failed is kept with no trial


@pytest.mark.parametrize(
    ("step", "at"),
    [("bootstrap", 2), ("propose", 4), ("search", 50), ("search", 110)],
    ids=["bootstrap", "proposal", "rounds", "confirmation"],
)
def test_ctrl_c(step: str, at: int, tmp_path: Path) -> None:
    """Requests in flight are waited for and counted, no other begins, and the same call goes on later."""
    lm, program = AuditedLM(Pressing(step, at)), CountedPlanner()
    check_interrupted(tmp_path / "run.log", lm, program)
    assert at <= lm.books.started[step] < at + THREADS


def test_ctrl_c_in_a_callback(tmp_path: Path) -> None:
    """While other trials are under way."""

    def callback(study: optuna.Study, trial: Any) -> None:
        if trial.number == 3:
            press_ctrl_c()

    lm, program = AuditedLM(), CountedPlanner()
    check_interrupted(tmp_path / "run.log", lm, program, callbacks=[callback])


# kill -9.


def kill_points() -> list[tuple[str, int]]:
    """Three at random in each step, which a sound compile makes so many requests in."""
    rng = random.Random(0)
    requests = {"bootstrap": 4, "propose": 20, "search": 136}
    return [(step, at) for step, n in requests.items() for at in sorted(rng.sample(range(1, n + 1), 3))]


@pytest.mark.filterwarnings("ignore:The value of `grace_period`")
@pytest.mark.parametrize(("step", "at"), kill_points())
def test_kill_9(
    step: str,
    at: int,
    tmp_path: Path,
    whole: tuple[Any, Path],
    forks: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same call ends with the same trials and winner; no step that was over is repeated, no answer that
    was kept is paid again, and what is paid again is what was in flight.
    """
    storage, log = tmp_path / "run.log", tmp_path / "lm.log"
    monkeypatch.setattr(journal, "_GRACE", 1)  # what holds the lock may be killed
    sound, requests = whole[0], log_lines(whole[1], "start", "search", "answer")
    killed = forks.Process(target=compile_and_die, args=(storage, log, step, at))
    killed.start()
    killed.join()
    assert killed.exitcode == -9
    before = log_lines(log, "start", "search", "answer")  # a request for an answer names its pair
    kept, steps = recorded(storage), open_study(storage).user_attrs
    lm = AuditedLM(log=tmp_path / "again.log")
    best = compiled(lm, storage=storage)
    assert alike(best, sound)
    again = log_lines(tmp_path / "again.log", "start", "search", "answer")
    # Answers that were kept just before the kill, and their scores not: scored again without a request.
    answered = sound.search_result.calls - len(kept) - sum(again.values())
    assert 0 <= answered <= THREADS
    assert before <= requests
    assert again <= requests
    assert sum((before + again - requests).values()) == sum(before.values()) - len(kept) - answered <= THREADS
    assert not (DEMOS in steps and lm.books.started["bootstrap"])
    assert not (INSTRUCTIONS in steps and lm.books.started["propose"])
    for name in ("bootstrap", "propose"):  # of a step that was cut off, what was in flight counts twice
        of_sound, of_this = (r.search_result.usage[name] for r in (sound, best))
        assert of_sound.lm_calls <= of_this.lm_calls <= of_sound.lm_calls + THREADS * (name == step)
        assert of_sound.tokens <= of_this.tokens
    audit_trials(best)
    paid = sum(log_lines(log, "start", "search").values()) + lm.books.started["search"]
    assert paid - 2 * THREADS <= best.search_result.usage["search"].lm_calls <= paid


# Storages that fail.


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In mid-search: it stops with all that was measured and counted, and goes on once there is room."""
    metric = Counted()
    lm, program = AuditedLM(), CountedPlanner()
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if metric.calls >= 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises((SearchStoppedError, StorageError), match="No space left on device") as caught:
            compiled(lm, program, metric, storage=tmp_path / "run.log")
    started = lm.books.started.copy()
    nothing_asked_since(lm, started)
    audit(lm, caught.value.usage, program)
    in_study = [s for t in caught.value.study.trials for s in t.user_attrs.get(SCORES, ())]
    assert caught.value.result.calls == len(in_study) > 0
    assert compiled(AuditedLM(), storage=tmp_path / "run.log").search_result.calls > len(in_study)


def test_a_storage_that_cannot_be_written(tmp_path: Path) -> None:
    """It is refused before a single request."""
    lm = AuditedLM()
    with pytest.raises(StorageError):
        compiled(lm, storage=tmp_path / "missing" / "run.log")
    (tmp_path / "directory.log").mkdir()
    with pytest.raises(StorageError):
        compiled(lm, storage=tmp_path / "directory.log")
    assert not lm.books.started


# Two users.


def test_two_threads_compile_at_once(tmp_path: Path, sound: Any) -> None:
    """One with a storage, one without, with LMs of their own, one of them refused now and then: each ends
    as it would alone, with a ledger of its own.
    """
    refused = Chance(0.3, lambda: RateLimited("slow down"))
    lms, programs = (AuditedLM(), AuditedLM(refused)), (CountedPlanner(), CountedPlanner())
    both = threading.Barrier(2)

    def work(lm: AuditedLM, program: CountedPlanner, storage: Any) -> Any:
        both.wait(60)
        return compiled(lm, program, storage=storage)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, lms, programs, (tmp_path / "run.log", None)))
    for lm, program, best in zip(lms, programs, results, strict=True):
        assert alike(best, sound)
        audit(lm, best.search_result.usage, program)
        audit_trials(best)
