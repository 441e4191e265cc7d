"""Runs the demo: compiles a task by MIPROv2, and prints a summary."""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import dspy
from optuna.exceptions import ExperimentalWarning
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mpromptune.errors import InvalidArgumentError
from mpromptune.mipro.estimate import Interceptor, intercepting
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
    """Takes the instructions that it is given, or sorts the proposed ones.

    Proposed ones are sorted because the threads of a replay get them in any order.

    Attributes:
        instructions: The instructions of each predictor, the program's own first; empty to propose them.
    """

    instructions: Sequence[Sequence[str]] = ()

    def _propose_instructions(self, *args: Any, **kwargs: Any) -> Any:
        if self.instructions:
            return {i: list(texts) for i, texts in enumerate(self.instructions)}
        proposed = super()._propose_instructions(*args, **kwargs)
        return {i: [own, *sorted(others)] for i, (own, *others) in proposed.items()}


class _Announced(Interceptor):
    next_step = "see below for the report"


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
    """Compile a task, save the winner and its report, and print the settings and the results.

    Args:
        task: The task.
        console: The console to print on.
        output: The .json file in which the program of the first sampler is saved; the report is next to it.
        samplers: A compile for each: ``"qei"``, ``"tpe"``, ``"gp"``, ``"random"``, or ``"stock"`` for DSPy's
            own search.
        num_threads: Program calls made at the same time.
        seed: Seed of each compile.
        calls: Program calls to spend, by default as many as DSPy; without effect on DSPy's own search.
        proposals: ``"adaptive"`` also writes candidates during the search, for ``"qei"`` only.

    Returns:
        The result of each compile.

    Raises:
        InvalidArgumentError: Options of the command do not go together, or there are too few calls.
    """
    _check(task, samplers[0], calls, proposals)
    options: dict[str, Any] = {"max_calls": calls}
    if proposals != "fixed":
        options |= {"proposals": proposals, "proposers": task.proposers}
    budget = f"{calls} program calls" if calls else "the calls DSPy's own search would spend"
    search = ("Search", f"sampler {' and '.join(samplers)}, {num_threads} threads, {budget}")
    console.rule(task.title, align="left")
    grid = Table.grid(padding=(0, 2))
    _print_rows(console, grid, [*task.notes, search])
    console.rule()
    with (
        warnings.catch_warnings(),
        dspy.context(adapter=task.adapter or dspy.settings.adapter),
        intercepting(_Announced()),
    ):
        # Our language models have the interface of DSPy 3.2, which DSPy 3.4 deprecates.
        warnings.filterwarnings("ignore", message=".*scheduled for removal in", category=DeprecationWarning)
        warnings.simplefilter("ignore", ExperimentalWarning)
        results = [_compiled(task, sampler, console, num_threads, seed, options) for sampler in samplers]
        own, *tested = _tested(task, console, [task.program, *(r.program for r in results)], num_threads)
    results = [replace(result, test_score=score) for result, score in zip(results, tested, strict=True)]
    _print_outcome(task, console, samplers, results, own)
    _save(console, results, samplers, output)
    return results


def _check(task: Task, sampler: str, calls: int | None, proposals: str) -> None:
    """Refuse what a compile would refuse, but name the options of the command."""
    if proposals != "fixed" and (task.proposers == () or sampler != "qei"):
        raise InvalidArgumentError(
            f"--proposals {proposals} needs --sampler qei and a model that runs; got --sampler "
            f"{sampler} and the task {task.title!r}."
        )
    least = 2 * len(task.valset)  # of the winner and the baseline, which `confirm` measures in full
    if calls is not None and calls < least:
        raise InvalidArgumentError(
            f"--calls {calls} is too few: measuring the prompts before and after on all {len(task.valset)} "
            f"validation examples takes {least}. Pass --calls {2 * least} or more."
        )


def _compiled(
    task: Task, sampler: str, console: Console, num_threads: int, seed: int, options: dict[str, Any]
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
    if task.instructions:
        own = [predictor.signature.instructions for predictor in task.program.predictors()]
        optimizer.instructions = [[text, *task.instructions] for text in own]
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        if sampler == STOCK:  # DSPy's own search has no live view, and prints much
            stack.enter_context(console.status("DSPy's own MIPROv2"))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        data: dict[str, Any] = {"trainset": task.trainset, "valset": task.valset}
        best = optimizer.compile(task.program, **data, **task.compile_arguments)
    return DemoResult(best, *scores(best), time.monotonic() - began)


def scores(best: Any) -> tuple[float, float, int]:
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


def _tested(
    task: Task, console: Console, programs: Sequence[dspy.Module], num_threads: int
) -> list[float | None]:
    """The scores of programs on the test set in percent; None without one."""
    if not task.testset:
        return [None] * len(programs)
    calls = len(programs) * len(task.testset)
    console.print(f"Testing {len(programs)} programs on {len(task.testset)} examples: {calls} program calls")
    evaluate = dspy.Evaluate(
        devset=task.testset,
        metric=task.metric,
        num_threads=num_threads,
        display_progress=False,
        max_errors=len(task.testset),
    )
    with dspy.context(lm=task.lm):
        return [float(evaluate(program).score) for program in programs]


def _prompt(task: Task, program: dspy.Module) -> Text:
    """The prompt of a program with one predictor for the first example of the test set."""
    (predictor,) = program.predictors()
    assert task.adapter is not None
    messages = task.adapter.format(predictor.signature, predictor.demos, task.testset[0].inputs())
    return Text("\n\n".join(str(message["content"]) for message in messages))


def _print_outcome(
    task: Task, console: Console, samplers: Sequence[str], results: Sequence[DemoResult], own: float | None
) -> None:
    """Print the prompts before and after, and a column of figures for each sampler."""
    if task.adapter is not None:
        for name, program in ("baseline", task.program), ("winner", results[0].program):
            console.print(Panel(_prompt(task, program), title=f"Prompt of the {name}", title_align="left"))
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


def _save(console: Console, results: Sequence[DemoResult], samplers: Sequence[str], output: Path) -> None:
    """Save the program of the first sampler and the report of its search, and print where they are."""
    program = results[0].program
    program.save(str(output))
    lines = [f"Program  {output.absolute()}"]
    if hasattr(program, "search_result"):
        lines.append(f"Report   {program.search_result.report(output.with_suffix('.html').absolute())}")
        lines.append("Next     open the report in a browser")
        if STOCK not in samplers:
            lines[-1] += '; with --compare (make demo ARGS="--compare") DSPy\'s own search runs beside it'
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _print_rows(console: Console, table: Table, rows: Sequence[tuple[str, ...]]) -> None:
    for row in rows:
        table.add_row(Text(row[0], "bold", no_wrap=True), *row[1:])
    console.print(table, highlight=False)
