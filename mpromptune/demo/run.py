"""Runs the demo: compiles a task by MIPROv2, and prints a summary."""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dspy
from optuna.exceptions import ExperimentalWarning
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

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
        lm: Runs the program.
        arguments: Further arguments of the MIPROv2 constructor.
        compile_arguments: Further arguments of ``compile``.
        testset: Examples that no compile sees.
        prompt_model: Proposes instructions; by default ``lm``.
        instructions: Instructions to choose from besides the student's own, in place of proposed ones.
        adapter: Writes the prompts; by default DSPy's own.
        embedder: Embedder of the texts, or None for the default model.
        proposers: Names of the proposers that can write for it during the search; None means all of them.
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
    testset: list[dspy.Example] = field(default_factory=list)
    prompt_model: dspy.BaseLM | None = None
    instructions: tuple[str, ...] = ()
    adapter: dspy.Adapter | None = None
    embedder: Callable[[list[str]], Any] | None = None
    proposers: tuple[str, ...] | None = None
    truth: Callable[[dspy.Module], list[tuple[str, str]]] = lambda best: []


@dataclass(frozen=True)
class DemoResult:
    """The compiled program of one search, and its figures.

    Attributes:
        program: The program.
        baseline_score: The student's score on the whole validation set, in percent.
        best_score: The program's.
        calls: Program calls of the search.
        seconds: Duration of all steps.
        test_score: The program's score on the test set, in percent; None without a test set.
    """

    program: dspy.Module
    baseline_score: float
    best_score: float
    calls: int
    seconds: float
    test_score: float | None = None


class DemoMIPROv2(MIPROv2):
    """Takes the instructions of the task, or sorts the proposed ones.

    A replay gives them in the order of concurrent requests.
    """

    instructions: tuple[str, ...] = ()

    def _propose_instructions(self, program: Any, *args: Any, **kwargs: Any) -> Any:
        if self.instructions:
            own = [predictor.signature.instructions for predictor in program.predictors()]
            return {i: [text, *self.instructions] for i, text in enumerate(own)}
        proposed = super()._propose_instructions(program, *args, **kwargs)
        return {i: [own, *sorted(others)] for i, (own, *others) in proposed.items()}


def run_demo(
    task: Task,
    console: Console,
    output: Path,
    *,
    samplers: Sequence[str] = ("qei",),
    num_threads: int = 16,
    seed: int = 9,
    calls: int | None = None,
    proposals: str = "fixed",
) -> list[DemoResult]:
    """Compile a task, save the winner, and print the settings and the results.

    Args:
        task: The task.
        console: The console to print on.
        output: The file in which the program of the first sampler is saved.
        samplers: A compile for each: ``"qei"``, ``"tpe"``, ``"gp"``, ``"random"``, or ``"stock"`` for DSPy's
            own search.
        num_threads: Program calls made at the same time.
        seed: Seed of each compile.
        calls: Program calls to spend; by default as many as DSPy.
        proposals: ``"adaptive"`` also writes candidates during the search, for ``"qei"`` only.

    Returns:
        The result of each compile.

    Raises:
        InvalidArgumentError: DSPy's own search was given a number of calls, or nothing can write candidates.
    """
    options: dict[str, Any] = {"max_calls": calls}
    if proposals != "fixed":
        if task.proposers == () or samplers[0] != "qei":
            raise InvalidArgumentError(
                f"proposals={proposals!r} needs a model that runs and sampler='qei'; got {task.title!r} and "
                f"sampler {samplers[0]!r}."
            )
        options |= {"proposals": proposals, "proposers": task.proposers}
    if STOCK in samplers and calls is not None:
        raise InvalidArgumentError(f"calls={calls} needs a sampler; DSPy's own search sets its own.")
    budget = f"{calls} program calls" if calls else "the calls DSPy's own search would spend"
    search = ("Search", f"sampler {' and '.join(samplers)}, {num_threads} threads, {budget}")
    console.rule(task.title, align="left")
    grid = Table.grid(padding=(0, 2))
    _print_rows(console, grid, [*task.notes, search])
    console.rule()
    with warnings.catch_warnings(), dspy.context(adapter=task.adapter or dspy.settings.adapter):
        # Our language models have the interface of DSPy 3.2, which DSPy 3.4 deprecates.
        warnings.filterwarnings("ignore", message=".*scheduled for removal in", category=DeprecationWarning)
        warnings.simplefilter("ignore", ExperimentalWarning)
        results = [_compiled(task, console, sampler, num_threads, seed, options) for sampler in samplers]
        own = _test_score(task, task.program, num_threads)
    results[0].program.save(str(output))
    if task.adapter is not None:
        for name, program in ("baseline", task.program), ("winner", results[0].program):
            console.print(Panel(_prompt(task, program), title=f"Prompt of the {name}", title_align="left"))
    _print_results(task, console, samplers, results, own)
    console.print(
        f"Compiled program saved to {output.absolute()}", soft_wrap=True, highlight=False, markup=False
    )
    return results


def _compiled(
    task: Task, console: Console, sampler: str, num_threads: int, seed: int, options: dict[str, Any]
) -> DemoResult:
    config: dict[str, Any] = {"sampler": sampler, "confirm": True, **options}
    if sampler == "qei":
        config["embedder"] = task.embedder
    optimizer = DemoMIPROv2(
        metric=task.metric,
        prompt_model=task.prompt_model or task.lm,
        task_model=task.lm,
        num_threads=num_threads,
        seed=seed,
        sampler_config=None if sampler == STOCK else config,
        **task.arguments,
    )
    optimizer.instructions = task.instructions
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        if sampler == STOCK:  # DSPy's own search has no live view, and prints much
            stack.enter_context(console.status("DSPy's own MIPROv2"))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        data: dict[str, Any] = {"trainset": task.trainset, "valset": task.valset}
        best = optimizer.compile(task.program, **data, **task.compile_arguments)
    seconds = time.monotonic() - began
    return DemoResult(best, *_scores(best), seconds, _test_score(task, best, num_threads))


def _scores(best: Any) -> tuple[float, float, int]:
    """The scores of the baseline and the winner in percent, and the program calls of the search."""
    found = getattr(best, "search_result", None)
    if found is not None:
        return 100 * found.baseline_score, 100 * found.best_score, found.calls
    logs = best.trial_logs
    return (
        logs[1]["full_eval_score"],
        best.score,
        max(log["total_eval_calls_so_far"] for log in logs.values()),
    )


def _test_score(task: Task, program: dspy.Module, num_threads: int) -> float | None:
    """The score of a program on the test set in percent."""
    if not task.testset:
        return None
    evaluate = dspy.Evaluate(
        devset=task.testset,
        metric=task.metric,
        num_threads=num_threads,
        display_progress=False,
        max_errors=len(task.testset),
    )
    with dspy.context(lm=task.lm):
        return float(evaluate(program).score)


def _prompt(task: Task, program: dspy.Module) -> Text:
    """The prompt of a program with one predictor for the first example of the test set."""
    (predictor,) = program.predictors()
    assert task.adapter is not None
    messages = task.adapter.format(predictor.signature, predictor.demos, task.testset[0].inputs())
    return Text("\n\n".join(str(message["content"]) for message in messages))


def _print_results(
    task: Task, console: Console, samplers: Sequence[str], results: Sequence[DemoResult], own: float | None
) -> None:
    """Print a column for each sampler."""
    n, m = len(task.valset), len(task.testset)
    rows = [
        (f"Baseline, {n} validation examples", [f"{result.baseline_score:.2f} %" for result in results]),
        (f"Winner, {n} validation examples", [f"{result.best_score:.2f} %" for result in results]),
        *((label, [text]) for label, text in task.truth(results[0].program)),
        (f"Baseline, {m} test examples", [f"{own:.2f} %" for _ in results if own is not None]),
        (
            f"Winner, {m} test examples",
            [f"{r.test_score:.2f} %" for r in results if r.test_score is not None],
        ),
        ("Program calls spent on the search", [str(result.calls) for result in results]),
        ("Wall-clock, all steps", [f"{result.seconds:.1f} s" for result in results]),
    ]
    table = Table("", *samplers, show_header=len(samplers) > 1)
    _print_rows(console, table, [(label, *texts) for label, texts in rows if texts])


def _print_rows(console: Console, table: Table, rows: Sequence[tuple[str, ...]]) -> None:
    for row in rows:
        table.add_row(Text(row[0], "bold", no_wrap=True), *row[1:])
    console.print(table, highlight=False)
