"""An LM that keeps its own books and fails where it is told to, and compiles with it.

What tests/test_faults.py audits the ledger of a compile with; its processes to be killed begin here.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
from dspy.utils import exceptions as dspy_errors
from embedders import hashed
from lms import ScriptedLM, arithmetic_lm, completion, digest, requested_fields
from tasks import FEW_SHOT, TRAIN, VAL, Counted, Planner

import mpromptune.engine.search
import mpromptune.sampling.sampler  # noqa: F401
from mpromptune import MIPROv2
from mpromptune.execution.interrupts import current_stop
from mpromptune.execution.usage import Usage
from mpromptune.storage.attributes import USAGE
from mpromptune.storage.storage import open_study

THREADS = 4
STEPS = ("bootstrap", "propose", "search")
Messages = list[dict[str, Any]]
# What goes wrong with a request: ``fault(its number within its step, its step, messages)`` raises, waits,
# or returns the text of an answer that nobody asked for.
Fault = Callable[[int, str, Messages], str | None]


def sdk_error(name: str, dspy_name: str) -> type[Exception]:
    """An error as DSPy raises it, or, where this version has none of that name, as LiteLLM does."""
    known = getattr(dspy_errors, dspy_name, None)
    return known or type(name, (Exception,), {"__module__": "litellm.exceptions"})


RateLimited = sdk_error("RateLimitError", "LMRateLimitError")
TimedOut = sdk_error("Timeout", "LMTimeoutError")
Down = sdk_error("APIConnectionError", "LMTransportError")
BadKey = sdk_error("AuthenticationError", "LMAuthError")


def step_of(messages: Messages) -> str:
    """The step that a request belongs to: programs ask about examples, the proposer about anything else."""
    last = str(messages[-1]["content"])
    if not {"plan", "answer"} & set(requested_fields(messages)):
        return "propose"
    question = re.findall(r"(\d+)\+\d+", last)[-1]
    return "bootstrap" if int(question) < len(TRAIN) else "search"


class Books:
    """What an LM was asked and has answered, by step; tokens of answers only."""

    def __init__(self) -> None:
        self.started: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.tokens: dict[str, list[int]] = {step: [0, 0] for step in STEPS}


class AuditedLM(ScriptedLM):
    """`arithmetic_lm` with books, by step: other tokens for every prompt, a line in a log for each request.

    Args:
        fault: What goes wrong.
        log: A file that outlives the process: a line as each request starts and is answered.
    """

    def __init__(self, fault: Fault | None = None, log: Path | None = None) -> None:
        super().__init__(_answer)
        self.books = Books()
        self.fault = fault
        self._log = None if log is None else os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def forward(self, prompt: str | None = None, messages: Messages | None = None, **kwargs: Any) -> Any:
        messages = messages or [{"role": "user", "content": prompt}]
        step = step_of(messages)
        with self._lock:
            self.books.started[step] += 1
            number = self.books.started[step]
        self._note("start", step, messages)
        text = self.fault(number, step, messages) if self.fault is not None else None
        return self._answered(step, messages, text)

    def _answered(self, step: str, messages: Messages, text: str | None) -> Any:
        if text is None:
            fields = requested_fields(messages)
            text = "\n\n".join(f"[[ ## {f} ## ]]\n{_answer(f, messages)}" for f in fields)
            text += "\n\n[[ ## completed ## ]]"
        response = completion(text, self.model)
        sent, received = sum(len(str(m["content"])) for m in messages), len(text)
        response.usage = {
            "prompt_tokens": sent,
            "completion_tokens": received,
            "total_tokens": sent + received,
        }
        with self._lock:
            self.books.answered[step] += 1
            self.books.tokens[step][0] += sent
            self.books.tokens[step][1] += received
        self._note("end", step, messages)
        return response

    def _note(self, what: str, step: str, messages: Messages) -> None:
        if self._log is not None:
            fields = "+".join(requested_fields(messages))
            os.write(self._log, f"{what} {step} {fields} {digest(messages)}\n".encode())


_sound = arithmetic_lm()._answer


def _answer(field: str, messages: Messages) -> str:
    """A plan tells all that it was made from, so that no two configurations ask the same for an answer."""
    return f"plan {digest(messages)}" if field == "plan" else _sound(field, messages)


class Chance:
    """Fails a share of all requests, the same ones whatever the threads do; a second attempt is another."""

    def __init__(self, share: float, error: Callable[[], Exception], steps: tuple[str, ...] = STEPS) -> None:
        self._share, self._error, self._steps = share, error, steps
        self._attempts: Counter[int] = Counter()
        self._lock = threading.Lock()
        self.failed = 0

    def __call__(self, number: int, step: str, messages: Messages) -> None:
        asked = digest(messages)
        with self._lock:
            self._attempts[asked] += 1
            luck = random.Random(digest(asked, self._attempts[asked])).random()
            fails = step in self._steps and luck < self._share
            self.failed += fails
        if fails:
            raise self._error()


class Runs:
    """How often a program and all of its copies were run, by step."""

    def __init__(self) -> None:
        self.begun: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict) -> Runs:
        return self

    def count(self, question: str) -> None:
        with self._lock:
            self.begun["bootstrap" if int(question.split("+")[0]) < len(TRAIN) else "search"] += 1


class CountedPlanner(Planner):
    """Two predictors, and a count of runs."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = Runs()

    def forward(self, question: str) -> Any:
        self.runs.count(question)
        return super().forward(question=question)


RUN = {
    "num_trials": 8,
    "minibatch_size": 4,
    "minibatch_full_eval_steps": 4,
    "sampler": "qei",
    "embedder": hashed,
    "block_size": 4,
    "batch_size": 2,
    "n_batches": 0,
    "confirm": True,
}


def compiled(lm: Any, program: Any = None, metric: Any = None, shots: Any = FEW_SHOT, **options: Any) -> Any:
    """The best program of a small compile."""
    threads = options.pop("num_threads", THREADS)
    with dspy.context(lm=lm):
        optimizer = MIPROv2(
            metric=metric or Counted(), auto=None, num_candidates=3, num_threads=threads, **shots
        )
        program = program or CountedPlanner()
        return optimizer.compile(program, trainset=TRAIN, valset=VAL, **{**RUN, **options})


def press_ctrl_c() -> None:
    """A signal to the main thread, which wakes it, as the terminal's does."""
    ident = threading.main_thread().ident
    assert ident is not None
    signal.pthread_kill(ident, signal.SIGINT)


def hold() -> None:
    """Returns once nobody waits any more for what runs here."""
    stop, patience = current_stop(), threading.Event()
    while not stop():
        patience.wait(0.001)


def trials_of(result: Any) -> list[Any]:
    """What the trials of two equal searches have in common."""
    return [(t.number, t.params, t.value, t.user_attrs.get("mpromptune:scores")) for t in result.study.trials]


def usage_of_trials(study: Any) -> Usage:
    """What all trials have used."""
    used = [Usage(**json.loads(t.user_attrs.get(USAGE, "{}"))) for t in study.trials]
    return sum(used, Usage())


def log_lines(log: Path, what: str, *prefix: str) -> Counter[str]:
    """How often each request of a step and fields has started, or was answered."""
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return Counter(line[-1] for line in lines if line[: 1 + len(prefix)] == [what, *prefix])


def recorded(storage: Any) -> set[tuple[Any, int]]:
    """The (configuration, example) pairs of which a storage has a score."""
    study = open_study(storage)
    return {(tuple(t.params.items()), e) for t in study.trials for e in t.intermediate_values}


def compile_and_die(storage: Path, log: Path, step: str, at: int) -> None:
    """A compile whose process is killed at the ``at``-th request of a step."""

    def fault(number: int, of: str, messages: Messages) -> None:
        if (of, number) == (step, at):
            os.kill(os.getpid(), signal.SIGKILL)

    compiled(AuditedLM(fault, log), storage=storage)
