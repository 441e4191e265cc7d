"""One run at a time writes to a study: who is refused, who waits, who goes on, and who has to stop."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import AuditedLM, compiled
from killed import Logged, Scores, run, search_elsewhere
from optuna.study import Study
from optuna.trial import TrialState

from mpromptune.errors import MPromptuneError, SearchInterrupted, SearchStoppedError, StudyInUseError
from mpromptune.mipro.reading import read_result
from mpromptune.storage import lease
from mpromptune.storage.attributes import LEASE, USAGE
from mpromptune.storage.storage import open_study

SECONDS = 60  # that a run elsewhere may be silent


def written(study: Study) -> Any:
    return study._storage.get_study_system_attrs(study._study_id).get(LEASE)


def write(study: Study, **changes: Any) -> None:
    """Has a run hold the lease: by default one of another host."""
    holder = {"host": "elsewhere", "machine": "another", "pid": 7, "began": "1", "token": "theirs", "time": 0}
    study._storage.set_study_system_attr(study._study_id, LEASE, {**holder, **changes})


def here(pid: int, began: str | None) -> dict[str, Any]:
    return {"host": "here", "machine": lease._machine(), "pid": pid, "began": began}


def taken(study: Study) -> bool:
    """Whether a run gets the lease, and gives it back."""
    with lease.held(study, threading.Event()):
        mine = written(study)
    assert mine["pid"] == os.getpid()
    assert written(study) is None
    return True


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return open_study(tmp_path / "run.log")


class Waits:
    """Nobody waits: seconds are counted, and what is to happen at one of them happens."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.events: dict[int, Callable[[], None]] = {}

    def __call__(self, seconds: float) -> None:
        before, self.seconds = self.seconds, self.seconds + seconds
        for second, event in self.events.items():
            if before < second <= self.seconds:
                event()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    waits = Waits()
    monkeypatch.setattr(lease, "pause", waits)
    return waits


def trials_of(study: Study) -> list[tuple]:
    trials = [(t.number, t.params, t.state, t.value, dict(t.user_attrs)) for t in study.trials]
    return [(*rest, {k: v for k, v in attrs.items() if k != USAGE}) for *rest, attrs in trials]


# Who is refused, and who goes on


def test_a_second_run_is_refused_at_once(tmp_path: Path) -> None:
    """Before any call, with an error that says who is at work; the first run does not notice."""
    path, refused, second = tmp_path / "run.log", [], Scores()

    def score(params: dict[str, int], example: int) -> float:
        if not refused:
            refused.append(None)
            began = time.monotonic()
            with pytest.raises(StudyInUseError) as caught:
                run(path, second)
            refused[0] = caught.value, time.monotonic() - began
        return first(params, example)

    first = Scores()
    result = run(path, score, num_threads=1)
    error, seconds = refused[0]
    assert isinstance(error, MPromptuneError)
    assert f"'mpromptune' is in use by process {os.getpid()} on " in str(error)
    assert "s ago" in str(error)
    assert "another study_name or storage" in str(error)
    assert not second.asked
    assert seconds < 5
    assert trials_of(result.study) == trials_of(run(None, Scores(), num_threads=1).study)


def test_the_other_studies_of_a_storage_are_free(tmp_path: Path) -> None:
    """The lease is the study's, not the storage's."""
    path, other = tmp_path / "run.log", []

    def score(params: dict[str, int], example: int) -> float:
        if not other:
            other.append(None)
            other[0] = run(path, Scores(), study_name="other")
        return first(params, example)

    first = Scores()
    assert run(path, score, num_threads=1).calls == other[0].calls


@pytest.mark.parametrize("ending", [None, ValueError("bug"), KeyboardInterrupt()])
def test_a_run_gives_the_lease_back(ending: Any, tmp_path: Path, waits: Waits) -> None:
    """At its end, after an error and after an interrupt: the next call goes on without waiting."""
    path = tmp_path / "run.log"

    def callback(study: Study, trial: Any) -> None:
        if ending is not None and trial.number == 2:
            raise ending

    try:
        run(path, Scores(), callbacks=[callback])
    except (SearchStoppedError, SearchInterrupted):
        assert ending is not None
    assert written(open_study(path)) is None
    result = run(path, Scores())
    assert result.calls == run(None, Scores()).calls
    assert waits.seconds < 1


def test_a_study_in_memory_needs_no_lease() -> None:
    """Nobody else can see it."""
    assert written(run(None, Scores()).study) is None


def test_readers_are_not_refused(tmp_path: Path) -> None:
    """What has been measured can be read while a run is at work, and that run goes on."""
    path, read = tmp_path / "run.log", []

    def callback(study: Study, trial: Any) -> None:
        if trial.number == 5:
            read.append(read_result(path)[0].calls)

    run(path, Scores(), callbacks=[callback])
    assert 0 < read[0] < run(None, Scores()).calls


# Whose process has gone


def test_a_process_of_this_host_that_has_gone_leaves_the_study_free(study: Study, waits: Waits) -> None:
    """At once: its number is nobody's, or another process's that began at another time."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write(study, **here(ended.pid, "1"))
    assert taken(study)
    write(study, **here(os.getppid(), "1"))
    assert taken(study)
    write(study, **here(os.getpid(), lease._began(os.getpid())))  # this one, which knows of no such run
    assert taken(study)
    assert waits.seconds < 1


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="it cannot be told there")
def test_a_process_that_was_killed_and_is_still_listed_has_gone(study: Study, waits: Waits) -> None:
    """As long as its parent has not asked what became of it."""
    killed = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    write(study, **here(killed.pid, lease._began(killed.pid)))
    with pytest.raises(StudyInUseError, match=f"process {killed.pid} on here"):
        taken(study)
    killed.kill()
    while lease._began(killed.pid):
        time.sleep(0.01)
    assert taken(study)
    killed.wait()
    assert waits.seconds < 1


@pytest.mark.parametrize("holder", [{}, here(os.getppid(), None)], ids=["host", "start"])
def test_what_cannot_be_known_is_waited_for(
    holder: dict[str, Any], study: Study, waits: Waits, caplog: pytest.LogCaptureFixture
) -> None:
    """A silent holder on another host, or one whose start is unknown: a minute, and one line in the log."""
    write(study, **holder)
    with caplog.at_level(logging.WARNING, "mpromptune"):
        assert taken(study)
    assert SECONDS <= waits.seconds < SECONDS + 1
    (line,) = [record.getMessage() for record in caplog.records]
    assert "has not released the study 'mpromptune'" in line
    assert "60 s" in line


@pytest.mark.parametrize("second", [1, 10, SECONDS])
def test_a_run_elsewhere_that_shows_itself_is_at_work(second: int, study: Study, waits: Waits) -> None:
    """Whatever its clock says, a renewal of the lease is what tells."""
    write(study)
    waits.events[second] = lambda: write(study, time=-1e9)
    with pytest.raises(
        StudyInUseError, match=r"process 7 on elsewhere, which last renewed its lease 0 s ago"
    ):
        taken(study)
    assert waits.seconds == second
    assert written(study)["token"] == "theirs"


def test_a_lease_that_is_given_back_is_not_waited_for_any_longer(study: Study, waits: Waits) -> None:
    """The next run begins at once."""
    write(study)
    waits.events[5] = lambda: study._storage.set_study_system_attr(study._study_id, LEASE, None)
    assert taken(study)
    assert 5 <= waits.seconds < 6


def test_of_two_that_start_at_the_same_moment_one_is_refused(study: Study, waits: Waits) -> None:
    """Both have found the study free; the one that wrote last has it."""
    theirs = {"token": "theirs", "time": time.time(), **here(1, lease._began(1))}
    lives = lease.Holder(**theirs).lives()

    def pause(seconds: float) -> None:
        if written(study)["token"] != "theirs":
            write(study, **theirs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "pause", pause)
        with pytest.raises(StudyInUseError, match="process 1 on here"):
            taken(study)
    assert lives
    assert written(study)["token"] == "theirs"


@pytest.mark.parametrize("value", [3, {"host": "x"}, {"time": "x"}, {"pid": 10**30}], ids=str)
def test_a_damaged_lease_holds_up_nobody(value: Any, study: Study, waits: Waits) -> None:
    """What cannot be read belongs to nobody."""
    if isinstance(value, dict) and "host" not in value:
        write(study, **{**here(1, "1"), **value})
    else:
        study._storage.set_study_system_attr(study._study_id, LEASE, value)
    assert taken(study)
    assert waits.seconds < 1


# Holding it


@pytest.mark.usefixtures("hasty")
def test_it_is_renewed_for_as_long_as_it_is_held(study: Study) -> None:
    """By a thread of its own, whatever the run is waiting for; not any more afterwards."""
    with lease.held(study, threading.Event()):
        renewals = {written(study)["time"]}
        deadline = time.monotonic() + 60.0
        while len(renewals) < 4:
            assert time.monotonic() < deadline
            renewals.add(written(study)["time"])
    time.sleep(0.3)
    assert written(study) is None


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases are renewed all the time."""
    monkeypatch.setattr(lease, "BEAT", 0.1)


def until_lost(study: Study) -> None:
    """Another run takes over, and the first has had time to learn of it."""
    while (written(study) or {}).get("token") != "theirs":  # the first may have been about to renew it
        write(study)
        time.sleep(0.3)


@pytest.mark.usefixtures("hasty")
def test_a_search_that_another_run_has_taken_over_stops(tmp_path: Path) -> None:
    """It writes nothing any more, not even that its open trials are over; what it has measured it returns."""
    path, asked, then = tmp_path / "run.log", Scores(), []

    def score(params: dict[str, int], example: int) -> float:
        value = asked(params, example)
        if sum(asked.asked.values()) == 50:
            until_lost(open_study(path))
            then.append(path.read_bytes())
        return value

    with pytest.raises(SearchStoppedError, match="process 7 on elsewhere has taken over the study") as caught:
        run(path, score, num_threads=1)
    assert isinstance(caught.value.__cause__, StudyInUseError)
    assert path.read_bytes() == then[0]
    assert sum(asked.asked.values()) == 50
    assert caught.value.result.calls == 50
    assert TrialState.RUNNING in {trial.state for trial in open_study(path).trials}
    assert written(open_study(path))["token"] == "theirs"


# A compile


@pytest.fixture(scope="module")
def sound() -> Any:
    """The compile that nobody disturbs."""
    return compiled(AuditedLM(), num_threads=1)


def test_a_compile_holds_the_study_from_its_first_step_on(tmp_path: Path) -> None:
    """Another compile is refused before it asks an LM, whichever step the first one is in."""
    path, refused = tmp_path / "run.log", {}

    def fault(number: int, step: str, messages: Any) -> None:
        if step not in refused:
            refused[step] = second = AuditedLM()
            with pytest.raises(StudyInUseError):
                compiled(second, storage=path)

    best = compiled(AuditedLM(fault), storage=path, num_threads=1)
    assert refused.keys() == {"bootstrap", "propose", "search"}
    assert not any(lm.calls for lm in refused.values())
    assert written(best.search_result.study) is None
    assert written(open_study(path)) is None


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("step", ["bootstrap", "propose", "search"])
def test_a_compile_that_another_run_has_taken_over_stops(step: str, sound: Any, tmp_path: Path) -> None:
    """In any of its steps, and it asks no LM and writes nothing any more."""
    path, then = tmp_path / "run.log", []

    def fault(number: int, of: str, messages: Any) -> None:
        if of == step and not then:
            until_lost(open_study(path))
            then.append(path.read_bytes())

    lm = AuditedLM(fault)
    with pytest.raises(SearchStoppedError, match="process 7 on elsewhere has taken over the study"):
        compiled(lm, storage=path, num_threads=1)
    assert path.read_bytes() == then[0]
    assert written(open_study(path))["token"] == "theirs"
    study = open_study(path)
    study._storage.set_study_system_attr(study._study_id, LEASE, None)
    assert compiled(AuditedLM(), storage=path, num_threads=1).score == sound.score


def test_coordinators_is_no_option(tmp_path: Path) -> None:
    """It was one: now it is refused as any other name that is none, before any LM call."""
    lm = AuditedLM()
    with pytest.raises(TypeError, match="Unknown option 'coordinators'."):
        compiled(lm, storage=tmp_path / "run.log", coordinators=2)
    assert not lm.calls


# Two processes


def started(forks: Any, *arguments: Any) -> Any:
    """A search in a process of its own, which has begun its first calls; to be killed by the caller."""
    process = forks.Process(target=search_elsewhere, args=arguments, daemon=True)
    process.start()
    log, deadline = arguments[1], time.monotonic() + 120.0
    while not log.exists() or sum(Logged.read(log, "end").values()) < 20:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("elsewhere", [False, True], ids=["one host", "two hosts"])
def test_two_processes(
    elsewhere: bool,
    forks: Any,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The second is refused; once the first was killed with -9, the same call goes on where it was.

    At once on the same host; on another one, with a database, when there is no sign of life any more. It ends
    as a search in one go, and pays only once more for what was in flight.
    """
    monkeypatch.setattr(lease, "SILENCE", 2.0)
    monkeypatch.setattr(lease, "BEAT", 0.25)
    storage = request.getfixturevalue("server").url_of("hosts") if elsewhere else tmp_path / "run.log"
    log, machine = tmp_path / "calls.log", "another host" if elsewhere else lease._machine()
    first, second = started(forks, storage, log, machine, 0.25), Scores()
    with pytest.raises(StudyInUseError, match=f"in use by process {first.pid} on"):
        run(storage, second)
    assert not second.asked
    assert first.is_alive()
    first.kill()
    first.join()
    caplog.clear()
    began, before, score = time.monotonic(), Logged.read(log, "start"), Scores()
    result, expected = run(storage, score), run(None, Scores())
    assert (time.monotonic() - began >= 2.0) or not elsewhere
    assert caplog.text.count("has not released the study") == elsewhere
    assert trials_of(result.study) == trials_of(expected.study)
    assert result.best_params == expected.best_params
    twice = before & score.asked
    assert sum(twice.values()) <= 4
    assert sum(before.values()) + sum(score.asked.values()) == expected.calls + sum(twice.values())
