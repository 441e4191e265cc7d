"""Compiles that are killed: what tests/test_paid.py starts in processes of their own, and goes on with."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import dspy
from embedders import hashed
from lms import ScriptedLM, arithmetic_lm, digest
from tasks import SMALL_RUN, Adder, Counted, Planner, additions

from mpromptune import MIPROv2

THREADS = 4
TRAIN = additions(24)
VAL = additions(30, offset=24)
PROGRAMS = {"one predictor": Adder, "two predictors": Planner}

Asked = Counter[tuple[str, int]]


def kind_of(messages: list[dict[str, Any]]) -> str:
    """The step that a request is made for."""
    last = str(messages[-1]["content"])
    if any(f"\n{x.question}\n" in last for x in VAL) and "proposed_instruction" not in last:
        return "student"
    is_of_teacher = any(f"\n{x.question}\n" in last for x in TRAIN) and "[[ ## question ## ]]" in last
    return "teacher" if is_of_teacher else "proposer"


class LoggedLM(ScriptedLM):
    """An LM with a file that outlives the process: a line as each request starts and ends.

    Args:
        log: The file.
        last: The request after which the process is killed; None lets it live.
        delay: Seconds from its end.
    """

    def __init__(self, log: Path, last: int | None = None, delay: float = 0.0) -> None:
        super().__init__(arithmetic_lm()._answer)
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._last, self._delay = last, delay
        self._ended = 0

    def forward(self, prompt: str | None = None, messages: list | None = None, **kwargs: Any) -> Any:
        asked = messages or [{"role": "user", "content": prompt}]
        self._note("start", asked)
        time.sleep(0.02 * (digest(asked) % 100) / 100)
        answer = super().forward(prompt, messages, **kwargs)
        self._note("end", asked)
        with self._lock:
            self._ended += 1
            if self._ended == self._last:
                threading.Timer(self._delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return answer

    def _note(self, what: str, messages: list[dict[str, Any]]) -> None:
        os.write(self._log, f"{what} {kind_of(messages)} {digest(messages)}\n".encode())


def read(log: Path, what: str = "start") -> Asked:
    """How often each request has started, or ended."""
    lines = [line.split() for line in log.read_text().splitlines()]
    return Counter((kind, int(number)) for event, kind, number in lines if event == what)


def run(storage: Any, lm: Any, program: str = "one predictor", **options: Any) -> Any:
    """A small compile."""
    settings = {"metric": Counted(), "auto": None, "num_candidates": 6, "num_threads": THREADS}
    given = {
        "trainset": TRAIN,
        "valset": VAL,
        "sampler": "qei",
        "embedder": hashed,
        "view_data_batch_size": 4,
    }
    with dspy.context(lm=lm):
        optimizer = MIPROv2(**settings, max_bootstrapped_demos=3, max_labeled_demos=2)
        return optimizer.compile(PROGRAMS[program](), storage=storage, **{**given, **SMALL_RUN, **options})


def adapt(storage: Any, lm: Any, **options: Any) -> Any:
    """A compile whose search writes candidates, too."""
    given = {"proposals": "adaptive", "proposers": ["contrast", "merge", "fresh", "demos"], "max_calls": 400}
    return run(storage, lm, **{**given, "verbose": False, **options})


def adapt_and_die(path: Path, log: Path, last: int, delay: float) -> None:
    """Like `compile_and_die`, for `adapt`."""
    adapt(path, LoggedLM(log, last, delay))


def compile_and_die(path: Path, log: Path, last: int, delay: float, program: str) -> None:
    """A compile that does not live to see its end, unless it makes fewer requests."""
    run(path, LoggedLM(log, last, delay), program, verbose=False)
