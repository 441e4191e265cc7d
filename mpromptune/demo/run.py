"""Runs the demo: compiles a task, recorded or live, by MIPROv2, and prints a summary."""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dspy
from optuna.exceptions import ExperimentalWarning
from rich.console import Console
from rich.table import Table

from mpromptune.errors import InvalidArgumentError
from mpromptune.mipro.optimizer import MIPROv2

STOCK = "stock"


@dataclass(frozen=True)
class Task:
    """A program to compile, and everything that MIPROv2 needs for it.

    Attributes:
        title: Name of the task.
        notes: (label, text) lines that say which parts are real.
        program: The student.
        trainset: Training examples.
        valset: Validation examples.
        metric: The metric.
        lm: Runs the program and proposes instructions.
        arguments: Further arguments of the MIPROv2 constructor.
        compile_arguments: Further arguments of ``compile``.
        embedder: Embedder of the texts, or None for the default model.
        truth: Returns rows of the closing table for the winner, known only from a recording.
    """

    title: str
    notes: list[tuple[str, str]]
    program: dspy.Module
    trainset: list[dspy.Example]
    valset: list[dspy.Example]
    metric: Callable[..., bool]
    lm: dspy.BaseLM
    arguments: dict[str, Any]
    compile_arguments: dict[str, Any] = field(default_factory=dict)
    embedder: Callable[[list[str]], Any] | None = None
    truth: Callable[[dspy.Module], list[tuple[str, str]]] = lambda best: []


@dataclass(frozen=True)
class DemoResult:
    """The compiled program, scores on the whole validation set in percent, and the search's program calls."""

    program: dspy.Module
    baseline_score: float
    best_score: float
    calls: int


class _SortedMIPROv2(MIPROv2):
    """Sorts the instructions, because a replay gives them in the order of concurrent requests."""

    def _propose_instructions(self, *args: Any, **kwargs: Any) -> Any:
        proposed = super()._propose_instructions(*args, **kwargs)
        return {i: [own, *sorted(others)] for i, (own, *others) in proposed.items()}


def run_demo(
    task: Task,
    console: Console,
    output: Path,
    *,
    sampler: str = "qei",
    num_threads: int = 16,
    seed: int = 9,
    calls: int | None = None,
) -> DemoResult:
    """Compile a task, save the winner, and print the settings and the results.

    Args:
        task: The task.
        console: The console to print on.
        output: The file in which the program is saved.
        sampler: ``"qei"``, ``"tpe"``, ``"gp"``, ``"random"``, or ``"stock"`` for DSPy's own search.
        num_threads: Program calls made at the same time.
        seed: Seed of the compile.
        calls: Program calls to spend; by default as many as DSPy.

    Raises:
        InvalidArgumentError: A number of calls was given for DSPy's own search.
    """
    if sampler == STOCK and calls is not None:
        raise InvalidArgumentError(f"calls={calls} needs a sampler; DSPy's own search sets its own.")
    budget = f"{calls} program calls" if calls else "the calls DSPy's own search would spend"
    search = ("Search", f"sampler {sampler}, {num_threads} threads, {budget}")
    console.rule(task.title, align="left")
    _print_rows(console, Table.grid(padding=(0, 2)), [*task.notes, search])
    console.rule()
    config = {"sampler": sampler, "max_calls": calls, "confirm": True}
    optimizer = _SortedMIPROv2(
        metric=task.metric,
        prompt_model=task.lm,
        task_model=task.lm,
        num_threads=num_threads,
        seed=seed,
        sampler_config=None
        if sampler == STOCK
        else config | ({"embedder": task.embedder} if sampler == "qei" else {}),
        **task.arguments,
    )
    began = time.monotonic()
    data: dict[str, Any] = {"trainset": task.trainset, "valset": task.valset, **task.compile_arguments}
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        # The replayed LM has the interface of DSPy 3.2, which DSPy 3.4 deprecates.
        warnings.filterwarnings("ignore", message=".*BaseLM.forward", category=DeprecationWarning)
        warnings.simplefilter("ignore", ExperimentalWarning)
        if sampler == STOCK:  # DSPy's own search has no live view, and prints much
            stack.enter_context(console.status("DSPy's own MIPROv2"))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        best = optimizer.compile(task.program, **data)
    result, seconds = _result(best), time.monotonic() - began
    best.save(str(output))
    n = len(task.valset)
    rows = [
        (f"Baseline, {n} validation examples", f"{result.baseline_score:.2f} %"),
        (f"Winner, {n} validation examples", f"{result.best_score:.2f} %"),
        *task.truth(best),
        ("Program calls spent on the search", str(result.calls)),
        ("Wall-clock, all steps", f"{seconds:.1f} s"),
    ]
    _print_rows(console, Table(show_header=False), rows)
    console.print(
        f"Compiled program saved to {output.absolute()}", soft_wrap=True, highlight=False, markup=False
    )
    return result


def _result(best: Any) -> DemoResult:
    found = getattr(best, "search_result", None)
    if found is not None:
        return DemoResult(best, 100 * found.baseline_score, 100 * found.best_score, found.calls)
    logs = best.trial_logs
    calls = max(log["total_eval_calls_so_far"] for log in logs.values())
    return DemoResult(best, logs[1]["full_eval_score"], best.score, calls)


def _print_rows(console: Console, table: Table, rows: list[tuple[str, str]]) -> None:
    table.add_column(style="bold", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table, highlight=False)
