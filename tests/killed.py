"""Searches that are killed: what tests/test_resume.py starts in processes of their own, and goes on with."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from embedders import letters

import mpromptune.storage.lease
from mpromptune import Noted, PromptSpace, SearchResult, qEISampler, search

N = 40
SPACE = PromptSpace(
    {
        "0_predictor_instruction": [f"{'a' * i} style" for i in range(4)],
        "0_predictor_demos": [[], ["abc"], ["abc", "xyz"]],
    }
)
_rng = np.random.default_rng(0)
TABLE = {
    row: _rng.random(N) < 0.3 + 0.1 * row[0] + 0.05 * row[1] for row in map(tuple, SPACE.rows().tolist())
}

Pair = tuple[tuple[int, ...], int]


class Scores:
    """The table as a score function that counts what it is asked."""

    def __init__(self) -> None:
        self.asked: Counter[Pair] = Counter()
        self._lock = threading.Lock()

    def __call__(self, params: dict[str, int], example: int) -> float:
        row = SPACE.row(params)
        with self._lock:
            self.asked[row, example] += 1
        return float(TABLE[row][example])


class Logged:
    """The table with latencies, and a file that outlives the process: a line as each call starts and ends.

    Args:
        log: The file.
        last: The call after which the process is killed.
        delay: Seconds from its end.
        latency: Of the slowest call, in seconds.
        number: The signal that it is killed with.
    """

    def __init__(
        self,
        log: Path,
        last: int | None = None,
        delay: float = 0.0,
        latency: float = 0.004,
        number: int = signal.SIGKILL,
    ) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._last, self._delay, self._latency = last, delay, latency
        self._number = number
        self._ended = 0
        self._lock = threading.Lock()

    def __call__(self, params: dict[str, int], example: int) -> float:
        row = SPACE.row(params)
        self._note("start", row, example)
        time.sleep(self._latency * np.random.default_rng([*row, example]).random())
        self._note("end", row, example)
        with self._lock:
            self._ended += 1
            if self._ended == self._last:
                threading.Timer(self._delay, os.kill, (os.getpid(), self._number)).start()
        return float(TABLE[row][example])

    def _note(self, what: str, row: tuple[int, ...], example: int) -> None:
        os.write(self._log, f"{what} {row[0]} {row[1]} {example}\n".encode())

    @staticmethod
    def read(log: Path, what: str) -> Counter[Pair]:
        """How often each call has started, or ended."""
        lines = [line.split() for line in log.read_text().splitlines()]
        return Counter(((int(i), int(j)), int(e)) for kind, i, j, e in lines if kind == what)


def run(storage: Any, score: Any, **arguments: Any) -> SearchResult:
    """A small search: a dozen trials."""
    given = {
        "n_examples": N,
        "max_calls": 160,
        "sampler": qEISampler(embedder=letters, seed=0, batch_size=4, n_batches=0),
        "num_threads": 4,
        "block_size": 10,
        "storage": storage,
        **arguments,
    }
    return search(SPACE, score, **given)


def search_and_die(path: Path, log: Path, last: int, delay: float, num_threads: int) -> None:
    """A search that does not live to see its end."""
    run(path, Logged(log, last, delay), num_threads=num_threads)
    signal.pause()  # one that has ended by then is killed all the same


def note_on(params: dict[str, int], example: int) -> Any:
    return {"of": [*SPACE.row(params), example]}


def noting(score: Any, params: dict[str, int], example: int) -> float:
    """The score, with a note on every call."""
    return Noted(score(params, example), note_on(params, example))


def die_noting(path: Path, log: Path, last: int) -> None:
    """A search with notes that does not live to see its end."""
    run(path, partial(noting, Logged(log, last)))
    signal.pause()


def search_elsewhere(storage: Any, log: Path, machine: str, beat: float) -> None:
    """A slow search on a host of that name, as far as its lease can tell; for whoever kills it."""
    mpromptune.storage.lease._machine = lambda: machine
    mpromptune.storage.lease.BEAT = beat
    run(storage, Logged(log, latency=0.4))
