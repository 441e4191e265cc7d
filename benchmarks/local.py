"""Accuracy on a test set after compiles on a real language model: `python -m benchmarks.local`.

The model is the demo's, the tasks too. The program has one predictor, or two: the first writes a hint. All
methods make as many program calls as DSPy's own search, with the same instructions, written by hand, and the
same seed. A compile takes two to three minutes of one core; finished ones are kept.
"""

from __future__ import annotations

import argparse
import time
from itertools import product
from typing import Any

import dspy
import numpy as np

from benchmarks.runner import RESULTS, Cell, read, run_once
from benchmarks.wallclock import quiet
from mpromptune.demo.run import DemoMIPROv2, Task
from mpromptune.demo.sorting import SORTINGS, sorting_task

METHODS: dict[str, dict[str, Any]] = {
    "stock": {},
    "qei": {"sampler": "qei"},
    "adaptive": {"sampler": "qei", "proposals": "adaptive", "proposers": ["demos"]},
}
PREDICTORS = (1, 2)
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


class _Handmade(DemoMIPROv2):
    """Instructions by the number of the predictor, the own first."""

    candidates: dict[int, list[str]]

    def _propose_instructions(self, *args: Any, **kwargs: Any) -> Any:
        return {i: list(texts) for i, texts in self.candidates.items()}


def measure(cell: Cell) -> Cell:
    """One compile."""
    task = sorting_task(cell["task"], "smollm2")
    own = [task.program.signature.instructions, *task.instructions]
    program = task.program if cell["predictors"] == 1 else Hinted(task)
    candidates = {0: own} if cell["predictors"] == 1 else {0: list(_HINTS), 1: own[:6]}
    with quiet(), dspy.context(lm=task.lm, adapter=task.adapter):
        optimizer = _Handmade(
            metric=task.metric,
            prompt_model=task.lm,
            task_model=task.lm,
            num_threads=16,
            seed=cell["seed"],
            **{**task.arguments, "num_candidates": len(candidates[0])},
        )
        optimizer.candidates = candidates
        wall, cpu = time.perf_counter(), time.process_time()
        data = {"trainset": task.trainset, "valset": task.valset}
        best = optimizer.compile(program, **data, **task.compile_arguments, **METHODS[cell["method"]])
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        before, after = (_accuracy(task, one) for one in (program, best))
    figures = {"before": before, "after": after, "validation": best.score, "calls": _calls(best)}
    return {**figures, "seconds": round(wall, 1), "cpu_seconds": round(cpu, 1)}


def _accuracy(task: Task, program: dspy.Module) -> float:
    """Percent of the test set."""
    evaluate = dspy.Evaluate(devset=task.testset, metric=task.metric, num_threads=16, max_errors=10_000)
    return float(evaluate(program).score)


def _calls(best: Any) -> int:
    result = getattr(best, "search_result", None)
    if result is not None:
        return int(result.calls)
    return int(max(log["total_eval_calls_so_far"] for log in best.trial_logs.values()))


def summary(rows: list[Cell]) -> str:
    """A line for each program: test accuracy in percent, mean and standard error over seeds."""
    lines = [" ".join(f"{name:>16}" for name in ("task", "predictors", "before", *METHODS))]
    for task, predictors in product(SORTINGS, PREDICTORS):
        of = [row for row in rows if (row["task"], row["predictors"]) == (task, predictors)]
        columns = [[row["before"] for row in of]]
        columns += [[row["after"] for row in of if row["method"] == method] for method in METHODS]
        if of:
            lines.append(" ".join(f"{text:>16}" for text in (task, predictors, *map(_mean, columns))))
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    if not values:
        return "-"
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{np.mean(values):.1f} ± {error:.1f}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", nargs="*", default=list(SORTINGS), choices=list(SORTINGS))
    parser.add_argument("--predictors", type=int, nargs="*", default=list(PREDICTORS), choices=PREDICTORS)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--output", default="local.json", help="file under benchmarks/results")
    given = parser.parse_args()
    path = RESULTS / given.output
    names = "seed", "task", "predictors", "method"
    for values in product(range(given.seeds), given.tasks, given.predictors, given.methods):
        run_once(dict(zip(names, values, strict=True)), measure, path)
    print(summary(read(path)))


if __name__ == "__main__":
    main()
