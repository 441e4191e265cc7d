"""Accuracy on a test set after compiles on a real language model: `python -m benchmarks.local`.

The model is the demo's, the tasks too. The program has one predictor, or two: the first writes a hint. All
methods make as many program calls as DSPy's own search, with the same instructions, written by hand, and the
same seed. Finished compiles are kept. A process remembers the model's answers, which are always the same, but
not during the compiles of the first seed: these are timed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import dspy
import numpy as np

from benchmarks.report import markdown
from benchmarks.rows import select
from benchmarks.runner import RESULTS, Cell, read, run_once
from benchmarks.wallclock import quiet
from mpromptune.demo.run import DemoMIPROv2, Task, scores
from mpromptune.demo.sorting import SORTINGS, sorting_task
from mpromptune.local.lm import LocalLM

METHODS: dict[str, dict[str, Any]] = {
    "stock": {},
    "qei": {"sampler": "qei"},
    "adaptive": {"sampler": "qei", "proposals": "adaptive", "proposers": ["demos"]},
}
PREDICTORS = (1, 2)
# NOTE: as many as the search can have without a change of its trials; the more, the larger are the batches.
_THREADS = 32
# NOTE: 12 instructions of one predictor, or 6 of each of two.
_HINTS = (
    "Write a hint.",
    "Say in a few words what it is about.",
    "Name something similar.",
    "Explain it to a child.",
    "Write the first word that comes to mind.",
    "Describe it.",
)


class Hinted(dspy.Module):
    """Writes a hint, and answers with it.

    Args:
        task: A task with one predictor.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        (predictor,) = task.program.predictors()
        (given,), (answer,) = predictor.signature.input_fields, predictor.signature.output_fields
        self.hint = dspy.Predict(dspy.Signature(f"{given} -> hint", _HINTS[0]))
        self.answer = dspy.Predict(
            dspy.Signature(f"{given}, hint -> {answer}", predictor.signature.instructions)
        )

    def forward(self, **inputs: Any) -> Any:
        """One prediction."""
        return self.answer(**inputs, hint=self.hint(**inputs).hint)


class Remembering(LocalLM):
    """Remembers its answers in a process."""

    answers: ClassVar[dict[str, Any]] = {}

    def forward(
        self, prompt: str | None = None, messages: list[dict[str, Any]] | None = None, **kwargs: Any
    ) -> Any:
        """One completion."""
        settings = {**self.kwargs, **kwargs}
        key = json.dumps([self.model, prompt, messages, settings.get("stop"), settings.get("max_tokens")])
        if key not in self.answers:
            self.answers[key] = super().forward(prompt, messages, **kwargs)
        return self.answers[key]


def measure(cell: Cell) -> Cell:
    """One compile."""
    task = sorting_task(cell["task"], "smollm2")
    remembering = Remembering(task.lm.model, **task.lm.kwargs)
    own = [task.program.signature.instructions, *task.instructions]
    program, instructions = task.program, [own]
    if cell["predictors"] == 2:
        program, instructions = Hinted(task), [list(_HINTS), own[:6]]
    lm = task.lm if cell["seed"] == 0 else remembering
    with quiet(), dspy.context(lm=lm, adapter=task.adapter):
        optimizer = DemoMIPROv2(
            metric=task.metric,
            prompt_model=lm,
            task_model=lm,
            num_threads=_THREADS,
            seed=cell["seed"],
            **{**task.arguments, "num_candidates": len(instructions[0])},
        )
        optimizer.instructions = instructions
        wall, cpu = time.perf_counter(), time.process_time()
        data = {"trainset": task.trainset, "valset": task.valset}
        best = optimizer.compile(program, **data, **task.compile_arguments, **METHODS[cell["method"]])
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    with quiet(), dspy.context(lm=remembering, adapter=task.adapter):
        before, after = (_accuracy(task, one) for one in (program, best))
    *_, calls = scores(best)
    figures: Cell = {"before": before, "after": after, "validation": best.score, "calls": calls}
    if lm is task.lm:
        figures |= {"seconds": round(wall, 1), "cpu_seconds": round(cpu, 1)}
    return figures


def _accuracy(task: Task, program: dspy.Module) -> float:
    """Percent of the test set."""
    evaluate = dspy.Evaluate(devset=task.testset, metric=task.metric, num_threads=_THREADS, max_errors=10_000)
    return float(evaluate(program).score)


def summary(rows: Sequence[Cell]) -> str:
    """Test accuracy in percent, mean and standard error over seeds; and seconds of the compiles timed."""
    lines = []
    for task, predictors in product(SORTINGS, PREDICTORS):
        of = select(rows, task=task, predictors=predictors)
        by = [select(of, method=method) for method in METHODS]
        if of:
            before = _mean([row["before"] for row in of])
            after = [_mean([row["after"] for row in found]) for found in by]
            seconds = [str(row.get("seconds", "")) for found in by for row in select(found, seed=0)]
            seeds = " / ".join(str(len(found)) for found in by)
            lines.append([task, str(predictors), seeds, before, *after, " / ".join(seconds)])
    names = " / ".join(METHODS)
    head = ["task", "predictors", f"seeds of {names}", "before", *METHODS, f"seconds of {names}"]
    return markdown(head, lines)


def _mean(values: Sequence[float]) -> str:
    """With the standard error, if there are two or more."""
    if len(values) < 2:
        return "".join(f"{value:.1f}" for value in values)
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.1f}"


def run(groups: Sequence[Sequence[Cell]], measure: Callable[[Cell], Cell], path: Path, jobs: int) -> None:
    """Measure what the file does not have; the cells of a group one after another in one process."""
    waiting = iter(groups)

    def run_groups(process: ProcessPoolExecutor) -> None:
        for group in waiting:
            for cell in group:
                run_once(cell, lambda cell: process.submit(measure, cell).result(), path)

    with ExitStack() as stack:
        pools = (ProcessPoolExecutor(1, initializer=_stay, initargs=(cores,)) for cores in _shares(jobs))
        processes = [stack.enter_context(pool) for pool in pools]
        for process in processes:
            process.submit(os.getpid).result()  # begins before there are threads
        for _ in stack.enter_context(ThreadPoolExecutor(jobs)).map(run_groups, processes):
            pass


def _shares(jobs: int) -> list[set[int]]:
    """The cores of each process: its own, if there are as many."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [set(cores[k::jobs]) if len(cores) >= jobs else set() for k in range(jobs)]


def _stay(cores: set[int]) -> None:
    if cores:
        os.sched_setaffinity(0, cores)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", nargs="*", default=list(SORTINGS), choices=list(SORTINGS))
    parser.add_argument("--predictors", type=int, nargs="*", default=list(PREDICTORS), choices=PREDICTORS)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes; more share cores, and times are longer"
    )
    parser.add_argument("--output", default="local.json", help="file under benchmarks/results")
    given = parser.parse_args()
    path = RESULTS / given.output
    run(
        [
            [{"seed": seed, "task": task, "predictors": n, "method": method} for method in given.methods]
            for seed, n, task in product(range(given.seeds), given.predictors, given.tasks)
        ],
        measure,
        path,
        given.jobs,
    )
    print(summary(read(path)))


if __name__ == "__main__":
    main()
