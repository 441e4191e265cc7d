"""Runs the demo: a task, recorded or live, compiled by MIPROv2 and summed up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dspy
from rich.console import Console

from mpromptune.demo.console import SteppedMIPROv2, quiet_libraries, show_header, show_results
from mpromptune.demo.problems import same_number, word_problems
from mpromptune.demo.replay import Recording, ReplayLM, answered_right, examples, prompt_of
from mpromptune.errors import InvalidArgumentError

STOCK = "stock"

# NOTE: 18 trials on minibatches of 35 and four full evaluations, as in DSPy's "medium" zero-shot runs,
# come to 1630 program calls on 200 validation examples.
_NUM_TRIALS = 18
_LIVE_TRAIN, _LIVE_VALIDATION = 50, 100


@dataclass(frozen=True)
class DemoOptions:
    """What the command line asks for.

    Attributes:
        sampler: ``"qei"``, ``"tpe"``, ``"gp"``, ``"random"``, or ``"stock"`` for DSPy's own search.
        num_threads: Program calls in flight.
        seed: Of the compile.
        calls: Program calls to spend; by default what DSPy would.
        output: Where the compiled program is saved.
    """

    sampler: str = "qei"
    num_threads: int = 16
    seed: int = 9
    calls: int | None = None
    output: Path = Path("mpromptune-demo.json")

    def __post_init__(self) -> None:
        if self.sampler == STOCK and self.calls is not None:
            raise InvalidArgumentError(f"calls={self.calls} needs a sampler; DSPy's own search sets its own.")
        if self.output.suffix != ".json" or not self.output.absolute().parent.is_dir():
            raise InvalidArgumentError(
                f"output must be a .json file in a folder that exists; got {str(self.output)!r}."
            )


@dataclass(frozen=True)
class Task:
    """A program to compile, and everything that MIPROv2 needs for it.

    Attributes:
        title: Names the task.
        notes: (label, text) lines that say what is real about it.
        program: The student.
        trainset: Training examples.
        valset: Validation examples.
        metric: The metric.
        lm: Runs the program and proposes instructions.
        arguments: Further arguments of the MIPROv2 constructor.
        compile_arguments: Further arguments of ``compile``.
        embedder: Embedder of the texts, or None for the default model.
        truth: Rows for the closing table that only a recording knows, given the winner.
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
    """What came of a demo.

    Attributes:
        program: The compiled program.
        baseline_score: Of the student on the whole validation set, in percent.
        best_score: The same of the compiled program.
        calls: Program calls of the search.
        seconds: Wall-clock of the whole compile.
    """

    program: dspy.Module
    baseline_score: float
    best_score: float
    calls: int
    seconds: float


def run_demo(task: Task, options: DemoOptions, console: Console) -> DemoResult:
    """Compiles a task, saves the winner, and prints header, progress and results."""
    budget = f"{options.calls} program calls" if options.calls else "the calls DSPy's own search would spend"
    search = f"sampler {options.sampler}, {options.num_threads} threads, {budget}"
    show_header(console, task.title, [*task.notes, ("Search", search)])
    start = time.monotonic()
    with quiet_libraries(console):
        best = _compile(task, options, console)
    result = _summed_up(best, time.monotonic() - start)
    best.save(str(options.output))
    show_results(console, _rows(task, result), str(options.output.absolute()))
    return result


def _compile(task: Task, options: DemoOptions, console: Console) -> Any:
    optimizer = SteppedMIPROv2(
        console if options.sampler == STOCK else None,
        metric=task.metric,
        prompt_model=task.lm,
        task_model=task.lm,
        num_threads=options.num_threads,
        seed=options.seed,
        sampler_config=_sampler_config(task, options),
        **task.arguments,
    )
    return optimizer.compile(
        task.program, trainset=task.trainset, valset=task.valset, **task.compile_arguments
    )


def _sampler_config(task: Task, options: DemoOptions) -> dict[str, Any] | None:
    """Nothing at all for DSPy's own search."""
    if options.sampler == STOCK:
        return None
    config: dict[str, Any] = {"sampler": options.sampler, "max_calls": options.calls, "confirm": True}
    if options.sampler == "qei":
        config["embedder"] = task.embedder
    return config


def _summed_up(best: Any, seconds: float) -> DemoResult:
    result = getattr(best, "search_result", None)
    if result is not None:
        return DemoResult(best, 100 * result.baseline_score, 100 * result.best_score, result.calls, seconds)
    logs = best.trial_logs
    calls = max(log["total_eval_calls_so_far"] for log in logs.values())
    return DemoResult(best, logs[1]["full_eval_score"], best.score, calls, seconds)


def _rows(task: Task, result: DemoResult) -> list[tuple[str, str]]:
    n = len(task.valset)
    return [
        (f"Baseline, {n} validation examples", f"{result.baseline_score:.2f} %"),
        (f"Winner, {n} validation examples", f"{result.best_score:.2f} %"),
        *task.truth(result.program),
        ("Program calls spent on the search", str(result.calls)),
        ("Wall-clock, all steps", f"{result.seconds:.1f} s"),
    ]


def replay_task(latency: float, recording: Recording | None = None) -> Task:
    """GSM8K as Llama-3.3-70B was recorded to answer it; zero-shot, a candidate per recorded prompt."""
    recording = recording or Recording.load()
    prompts, total = len(recording.pool), recording.scores.shape[1]

    def truth(best: dspy.Module) -> list[tuple[str, str]]:
        winner = prompt_of(best.predictors()[0].signature.instructions)
        return [
            (f"Baseline, all {total} recorded examples", _percent(recording.mean(recording.pool[0]))),
            (f"Winner, all {total} recorded examples", _percent(recording.mean(winner))),
            (f"Best of the {prompts} prompts, all {total} examples", _percent(recording.best_mean())),
        ]

    return Task(
        title="m-promptune demo: a replayed LM",
        notes=_replay_notes(latency, recording),
        program=dspy.Predict(dspy.Signature("question -> answer", recording.texts[0])),
        trainset=examples(recording.train),
        valset=examples(recording.validation),
        metric=answered_right,
        lm=ReplayLM(recording, latency),
        arguments={
            "auto": None,
            "num_candidates": prompts,
            "max_bootstrapped_demos": 0,
            "max_labeled_demos": 0,
        },
        compile_arguments={"num_trials": _NUM_TRIALS},
        embedder=recording.embed,
        truth=truth,
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _replay_notes(latency: float, recording: Recording) -> list[tuple[str, str]]:
    split = f"{len(recording.train)} for training, {len(recording.validation)} for validation"
    return [
        ("Task", f"choose among {len(recording.pool)} prompts for GSM8K; examples: {split}"),
        ("Recorded", "the answers: right or wrong as Llama-3.3-70B was on each (prompt, example) pair"),
        ("Recorded", "the prompts' embeddings by all-MiniLM-L6-v2"),
        ("Stand-in", "the texts of prompts and examples: the recording holds only numbers"),
        ("Stand-in", "the proposer: it hands out the recorded prompts one after the other"),
        (
            "Simulated",
            f"latency: lognormal, mean {latency:g} s per validation call; the rest answers at once",
        ),
        ("Real", "DSPy, the program, MIPROv2's three steps, and the search"),
        ("Caution", "one run is one draw of luck: compare samplers over several seeds (--seed)"),
    ]


def live_task(model: str | dspy.BaseLM) -> Task:
    """Generated word problems for a real LM, with chain of thought and few-shot demos.

    Args:
        model: A LiteLLM name, or an LM object.
    """
    problems = word_problems(_LIVE_TRAIN + _LIVE_VALIDATION)
    lm = dspy.LM(model) if isinstance(model, str) else model
    return Task(
        title=f"m-promptune demo: live on {lm.model}",
        notes=[
            (
                "Task",
                f"generated word problems: {_LIVE_TRAIN} for training, {_LIVE_VALIDATION} for validation",
            ),
            ("Live", "every answer and every proposal comes from the model; nothing is replayed"),
        ],
        program=dspy.ChainOfThought("question -> answer"),
        trainset=problems[:_LIVE_TRAIN],
        valset=problems[_LIVE_TRAIN:],
        metric=same_number,
        lm=lm,
        arguments={"auto": "light"},
    )
