"""Several processes on one study: the same trials as one, no pair twice, whoever is killed."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import postgres
import pytest
from crews import COORDINATORS, THREADS, Mate, audit, compile_together, forks, run_together, serve, trials_of
from faults import STEPS, log_lines
from killed import SPACE, Pair, Scores, run
from optuna.storages import GrpcStorageProxy

import mpromptune.crew.members
import mpromptune.studies.reconnecting
from mpromptune import SearchResult
from mpromptune.calls.limits import Limits
from mpromptune.calls.usage import Usage, record
from mpromptune.errors import SearchStoppedError, StudyMismatchError
from mpromptune.studies.storage import open_study


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Server]:
    if postgres.programs() is None:
        pytest.skip("PostgreSQL is not installed")
    pytest.importorskip("psycopg")
    with postgres.running() as server:
        yield server


@pytest.fixture(scope="module")
def by_one(tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    """What one process makes of it that nobody helps."""
    return run(tmp_path_factory.mktemp("one") / "j", Scores(), coordinators=COORDINATORS)


@pytest.fixture(params=["journal", "postgresql", "grpc"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """A storage that several processes see."""
    if request.param == "journal":
        yield tmp_path / "journal"
        return
    url = request.getfixturevalue("server").url_of(f"d{os.urandom(4).hex()}")
    if request.param == "postgresql":
        yield url
        return
    pytest.importorskip("grpc")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    proxy = forks().Process(target=serve, args=(url, port), daemon=True)
    proxy.start()
    try:
        GrpcStorageProxy(host="localhost", port=port).wait_server_ready(60)
        yield port
    finally:
        proxy.kill()


def mates_of(tmp_path: Path, *lasts: int | None, seed: int = 0) -> list[Mate]:
    rng = random.Random(seed)
    return [
        Mate(tmp_path / f"{i}.log", tmp_path / f"{i}.json", last, 0.2 * rng.random())
        for i, last in enumerate(lasts)
    ]


def test_an_interrupt_ends_one_process(tmp_path: Path, by_one: SearchResult) -> None:
    """Ctrl-C where the search is led: what was under way there is saved, and the others go on."""
    (first, *others) = mates_of(tmp_path, 10, None, None)
    mates = [replace(first, signal=signal.SIGINT), *others]
    found = run_together(tmp_path / "journal", mates)
    assert [one["trials"] for one in found] == [trials_of(by_one)] * 2
    assert audit(mates) == (Counter(dict.fromkeys(by_one_pairs(by_one), 1)), 0)


def by_one_pairs(result: SearchResult) -> list[Pair]:
    return [(SPACE.row(m.params), example) for m in result.configurations for example in m.scores]


def together(path: Path, *calls: Callable[[], SearchResult | None], began: Callable[[], Any]) -> list[Any]:
    """What each call of a thread of its own returns or raises; the first has begun before the others."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(calls[0])]
        deadline = time.monotonic() + 60.0
        while not began() and time.monotonic() < deadline:
            time.sleep(0.01)
        futures += [pool.submit(call) for call in calls[1:]]
        wait(futures, timeout=120.0)
        return [future.exception() or future.result() for future in futures]


class Slow(Scores):
    """So slow that others can help."""

    def __call__(self, params: dict[str, int], example: int) -> float:
        score = super().__call__(params, example)
        time.sleep(0.05)
        return score


def shared(path: Path, score: Any, **arguments: Any) -> Callable[[], SearchResult]:
    return partial(run, path, score, coordinators=COORDINATORS, **arguments)


def test_who_was_given_another_search_does_not_take_part(tmp_path: Path, by_one: SearchResult) -> None:
    """It says what differs before it calls anything, and disturbs nobody."""
    path, score, other = tmp_path / "j", Slow(), Slow()
    one, two = together(path, shared(path, score), shared(path, other, seed=1), began=lambda: score.asked)
    assert isinstance(two, StudyMismatchError)
    assert "seed was 0 and now 1" in str(two)
    assert not other.asked
    assert trials_of(one) == trials_of(by_one)


def test_an_error_that_no_call_can_mend_stops_all(tmp_path: Path) -> None:
    """Wherever it happens; each says why, and the next call goes on."""
    path, score = tmp_path / "j", Slow()

    def broken(params: dict[str, int], example: int) -> Any:
        return "no number"

    calls = shared(path, score), shared(path, broken), shared(path, score)
    stopped = together(path, *calls, began=lambda: score.asked)
    assert all(isinstance(error, SearchStoppedError) for error in stopped)
    assert any("ScoreError" in str(error) for error in stopped)
    before = sum(score.asked.values())
    result = shared(path, score)()
    assert sum(score.asked.values()) == result.calls > before


def test_what_a_candidate_cannot_answer_counts_the_same(tmp_path: Path) -> None:
    """Its own failures are failures for all, whoever made the call."""

    def failing(params: dict[str, int], example: int) -> float:
        score = asked(params, example)
        if params["0_predictor_instruction"] == 2 and example % 3 == 0:
            raise ValueError("cannot parse")
        return score

    asked, paths = Slow(), (tmp_path / "one", tmp_path / "two")
    given = {"failure_score": -1.0}
    alone = shared(paths[0], failing, **given)()
    asked.asked.clear()
    calls = [shared(paths[1], failing, **given)] * 2
    for found in together(paths[1], *calls, began=lambda: asked.asked):
        assert trials_of(found) == trials_of(alone)
    assert max(asked.asked.values()) == 1


def test_a_limit_covers_all_processes(tmp_path: Path) -> None:
    """What all have used counts; whoever leads ends the search for all, and all name the limit."""
    path, scores = tmp_path / "j", [Slow(), Slow()]

    def costly(score: Slow, params: dict[str, int], example: int) -> float:
        record(Usage(prompt_tokens=10))
        return score(params, example)

    calls = [shared(path, partial(costly, score), limits=Limits(max_tokens=600)) for score in scores]
    results = together(path, *calls, began=lambda: scores[0].asked)
    asked = scores[0].asked + scores[1].asked
    assert max(asked.values()) == 1
    for result in results:
        assert result.stopped_by == "max_tokens"
        assert result.usage["search"].prompt_tokens == 10 * result.calls == 10 * sum(asked.values())
    assert scores[1].asked


class Cutting(Scores):
    """Has the server stop, as in a power cut, in the middle of a search."""

    def __init__(self, server: postgres.Server, at: int, back_after: float | None) -> None:
        super().__init__()
        self._server, self._at, self._back_after = server, at, back_after

    def __call__(self, params: dict[str, int], example: int) -> float:
        score = super().__call__(params, example)
        if sum(self.asked.values()) == self._at:
            self._server.stop()
            if self._back_after is not None:
                threading.Timer(self._back_after, self._server.start).start()
        return score


@pytest.mark.parametrize("coordinators", [1, COORDINATORS])
def test_a_lost_connection_is_waited_for(coordinators: int, server: postgres.Server, tmp_path: Path) -> None:
    """A database that is started again costs time, and nothing else."""
    expected = run(tmp_path / "j", Scores(), coordinators=coordinators)
    score = Cutting(server, at=60, back_after=1.0)
    result = run(server.url_of(f"back{coordinators}"), score, coordinators=coordinators)
    assert trials_of(result) == trials_of(expected)
    assert result.calls == len(score.asked) == sum(score.asked.values())


@pytest.mark.parametrize("coordinators", [1, COORDINATORS])
def test_a_connection_that_stays_lost_ends_a_search(
    coordinators: int, server: postgres.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a plain error; all that was saved is there for the next call."""
    monkeypatch.setattr(mpromptune.studies.reconnecting, "PATIENCE", 1.0)
    expected = run(tmp_path / "j", Scores(), coordinators=coordinators)
    url, score = server.url_of(f"lost{coordinators}"), Cutting(server, at=60, back_after=None)
    with pytest.raises(SearchStoppedError, match="connection to the storage was lost"):
        run(url, score, coordinators=coordinators)
    server.start()
    monkeypatch.setattr(mpromptune.crew.members, "LEASE", 1.0)
    kept = {(SPACE.row(t.params), e) for t in open_study(url).trials for e in t.intermediate_values}
    again = Scores()
    assert trials_of(run(url, again, coordinators=coordinators)) == trials_of(expected)
    assert not again.asked.keys() & kept
    assert len(score.asked) - len(kept) <= 2 * THREADS


def test_a_compile_is_shared(tmp_path: Path) -> None:
    """Nobody bootstraps or proposes twice, whoever is killed meanwhile; all return the same program."""
    alone = mates_of(tmp_path, None)
    expected = run_together(tmp_path / "one", alone, compile_together)[0]
    for number, step in ((2, "bootstrap"), (20, "search")):
        (place := tmp_path / step).mkdir()
        mates = [replace(mate, step=step) for mate in mates_of(place, number, None, None)]
        found = run_together(place / "journal", mates, compile_together)
        assert [one["best"] for one in found] == [expected["best"]] * 2
        assert [one["score"] for one in found] == [expected["score"]] * 2
        for made in STEPS:
            asked = sum((log_lines(mate.log, "start", made) for mate in mates), Counter())
            killed = log_lines(mates[0].log, "start", made)
            extra = asked - log_lines(alone[0].log, "start", made)
            assert not extra - killed
            assert made in (step, "bootstrap") or sum(extra.values()) <= 2 * THREADS  # a call asks twice
            assert not log_lines(alone[0].log, "start", made) - asked


def test_processes_that_are_killed_leave_the_search_as_it_is(
    storage: Any, tmp_path: Path, by_one: SearchResult
) -> None:
    """Two of four are killed, whoever leads: the others end with what one process finds, no pair twice."""
    rng = random.Random(type(storage).__name__)
    mates = mates_of(tmp_path, rng.randrange(1, 30), rng.randrange(1, 30), None, None)
    found = run_together(storage, mates)
    begun, extra = audit(mates)
    for one in found:
        assert one["trials"] == trials_of(by_one)
        assert (one["best"], one["calls"]) == (by_one.best_params, by_one.calls)
    assert extra <= 2 * THREADS
    assert len(begun) == by_one.calls
