"""Several processes on one study: the same trials as one, no pair twice, whoever is killed."""

from __future__ import annotations

import os
import random
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import postgres
import pytest
from crews import COORDINATORS, THREADS, Mate, audit, compile_together, forks, run_together, serve, trials_of
from faults import STEPS, log_lines
from killed import Scores, run
from optuna.storages import GrpcStorageProxy

from mpromptune import SearchResult


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
            assert made in (step, "bootstrap") or sum(extra.values()) <= THREADS
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
