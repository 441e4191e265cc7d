"""Proposers for tests, and scores of what they write: each text begins with its quality."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from embedders import letters
from optuna.study import Study

from mpromptune import PromptSpace, SearchResult, qEISampler, search
from mpromptune.engine.proposers import Brief
from mpromptune.storage.attributes import PROPOSAL
from mpromptune.storage.proposals import Proposal, from_json

INSTRUCTION, DEMOS = "0_predictor_instruction", "0_predictor_demos"
SECOND = "1_predictor_instruction"
N = 20
SPACE = PromptSpace({INSTRUCTION: ["0.30 first", "0.40 second", "0.35 third"]})
_EASE = np.random.default_rng(5).permutation(N) / N


def quality(text: str | Sequence[str]) -> float:
    """The number that a text begins with; that of the first text of several, 0.2 for none."""
    first = text if isinstance(text, str) else next(iter(text), "0.2")
    return float(first.split()[0])


class World:
    """Scores by the quality of texts, and the candidates that it was told of.

    Args:
        space: The candidates at first.
        delay: Longest time of a call, in seconds.
    """

    def __init__(self, space: PromptSpace = SPACE, delay: float = 0.0) -> None:
        self.texts = {n: dict(enumerate(some)) for n, some in space.components.items()}
        self.asked: Counter[tuple[tuple[int, ...], int]] = Counter()
        self.unknown: list[dict[str, int]] = []
        self._delay = delay
        self._lock = threading.Lock()

    def plain(self, component: str, candidate: Any) -> Any:
        if not isinstance(candidate, str | list):
            raise TypeError(f"{candidate!r} is no candidate")
        return candidate

    def adopt(self, component: str, index: int, written: Any) -> Any:
        self.texts[component][index] = written
        return written

    def __call__(self, params: dict[str, int], example: int) -> float:
        with self._lock:
            self.asked[tuple(params.values()), example] += 1
        if any(index not in self.texts[name] for name, index in params.items()):
            self.unknown.append(params)
            raise KeyError(params)
        time.sleep(self._delay * np.random.default_rng([*params.values(), example]).random())
        qualities = [quality(self.texts[name][index]) for name, index in params.items()]
        return float(_EASE[example] < np.mean(qualities))


class Writer:
    """Writes what a function of the brief returns.

    Args:
        write: The function.
        name: Its name in the study.
        calls: Requests of a proposal.
        keeps_parent: Whether its candidates resemble their parents.
        only: The components that it writes for; all by default.
    """

    def __init__(
        self,
        write: Callable[[Brief], Any],
        name: str = "writer",
        calls: int = 1,
        keeps_parent: bool = True,
        only: Sequence[str] | None = None,
    ) -> None:
        self.name, self.calls, self.keeps_parent = name, calls, keeps_parent
        self.briefs: list[Brief] = []
        self._write, self._only = write, only

    def components(self, space: PromptSpace) -> Sequence[str]:
        return space.names if self._only is None else self._only

    def propose(self, brief: Brief) -> Any:
        self.briefs.append(brief)
        return self._write(brief)


def better(brief: Brief) -> str:
    """A text that is better than its parent's by 0.1, up to 0.95."""
    parent = brief.candidates[brief.component][brief.parent[brief.component]]
    assert parent is not None
    return f"{min(0.95, quality(parent) + 0.1):.2f} by {brief.number}"


def run(score: World, writers: Sequence[Any], space: PromptSpace = SPACE, **arguments: Any) -> SearchResult:
    """A small search."""
    given = {
        "n_examples": N,
        "max_calls": 120,
        "sampler": qEISampler(embedder=letters, seed=0, n_batches=0),
        "num_threads": 4,
        "candidates": score,
        **arguments,
    }
    return search(space, score, proposers=writers, **given)


def proposals_of(result: SearchResult) -> list[Proposal]:
    """The proposals of a search, by number."""
    return proposals_in(result.study)


def proposals_in(study: Study) -> list[Proposal]:
    """The proposals in a study, by number."""
    found = [from_json(t.user_attrs[PROPOSAL]) for t in study.trials if PROPOSAL in t.user_attrs]
    return sorted({proposal.number: proposal for proposal in found}.values(), key=lambda p: p.number)


def slowly(brief: Brief) -> str:
    """A better text after a moment."""
    time.sleep(0.02)
    return better(brief)


def die_writing(path: Path, seconds: float) -> None:
    """A search that is killed."""
    world, writer = World(delay=0.01), Writer(slowly)
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    run(world, [writer], storage=path)
    signal.pause()
