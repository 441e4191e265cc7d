"""Optimizers for DSPy programs on a task with scripted language models, at equal cost.

Run by `python -m benchmarks.proposals --only scripted`. All have the same program, examples, metric and
models. A program call costs 1, and so does a request to the model that writes instructions, before the search
as well. What is compared is the expected accuracy of the returned program on other cases, which is known.
"""

from __future__ import annotations

import contextlib
import io
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import product
from typing import Any

import dspy
import numpy as np

from benchmarks.report import markdown
from benchmarks.rows import pretty, select
from benchmarks.runner import Cell
from benchmarks.scripted_lm import Scripted
from mpromptune import MIPROv2
from mpromptune.model.space import FloatArray

N_TRAIN, N_VAL, N_TEST = 50, 100, 2000
# A little more than `dspy.MIPROv2` with ``auto="light"`` spends, by the number of predictors.
CALLS = {1: 710, 3: 1960}
# Program calls of a search that is only there for what comes before it.
_FEW = 20
_DIMENSIONS = 64

Method = Callable[[Scripted, int, int], Any]  # calls, seed -> program


def stock(world: Scripted, calls: int, seed: int) -> Any:
    """`dspy.MIPROv2` as it comes: the size of its run follows from ``auto="light"``, not from ``calls``."""
    return dspy.MIPROv2(**_arguments(world, seed)).compile(world.program, **_data(world))


def gepa(world: Scripted, calls: int, seed: int) -> Any:
    """`dspy.GEPA` as it comes, until the calls are spent; what it measures after that does not count."""
    best: list[Any] = [-1.0, {}]

    class Watched:
        """Keeps the best candidate on the validation set so far, the first of several."""

        def on_valset_evaluated(self, event: Any) -> None:
            if len(world.log) <= calls and event["average_score"] > best[0]:
                best[:] = event["average_score"], event["candidate"]

    dspy.GEPA(
        metric=world.metric,
        reflection_lm=world.prompt_lm,
        max_metric_calls=calls,
        num_threads=1,
        seed=seed,
        gepa_kwargs={"callbacks": [Watched()], "stop_callbacks": [lambda state: len(world.log) >= calls]},
    ).compile(world.program, **_data(world))
    program = world.program.deepcopy()
    for name, predictor in program.named_predictors():
        predictor.signature = predictor.signature.with_instructions(best[1][name])
    return program


def ours(**options: Any) -> Method:
    """`mpromptune.MIPROv2` with options; the search gets what the steps before it leave of the calls."""

    def run(world: Scripted, calls: int, seed: int) -> Any:
        left = calls - _before_search(world, seed)
        return _optimizer(world, seed, **options).compile(world.program, **_data(world), max_calls=left)

    return run


def _before_search(world: Scripted, seed: int) -> int:
    """What the bootstrap and the first instructions cost, in a world of the same seed."""
    twin = Scripted(world.n_steps, world.seed)
    with dspy.context(lm=twin.task_lm):
        best = _optimizer(twin, seed).compile(twin.program, **_data(twin), max_calls=_FEW)
    return len(twin.log) - int(best.search_result.calls)


def _optimizer(world: Scripted, seed: int, **options: Any) -> MIPROv2:
    config = {"sampler": "qei", "embedder": embed, "verbose": False, **options}
    return MIPROv2(**_arguments(world, seed), sampler_config=config)


METHODS: dict[str, Method] = {
    "stock": stock,
    "gepa": gepa,
    "fixed": ours(),
    "adaptive": ours(proposals="adaptive"),
}


def _arguments(world: Scripted, seed: int) -> dict[str, Any]:
    """Arguments of both classes of the name MIPROv2; DSPy takes a seed of 0 for none."""
    models = {"prompt_model": world.prompt_lm, "task_model": world.task_lm}
    return {"metric": world.metric, **models, "auto": "light", "num_threads": 1, "seed": seed + 1}


def _data(world: Scripted) -> dict[str, Any]:
    return {"trainset": world.examples(0, N_TRAIN), "valset": world.examples(N_TRAIN, N_TRAIN + N_VAL)}


def embed(texts: Sequence[str]) -> FloatArray:
    """Sums of random vectors of words, of length 1: a fast embedder."""
    vectors = np.stack([np.sum([_vector(word) for word in ("", *text.split())], axis=0) for text in texts])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@cache
def _vector(word: str) -> FloatArray:
    return np.random.default_rng(zlib.crc32(word.encode())).standard_normal(_DIMENSIONS)


def measure(cell: Cell, seed: int) -> dict[str, float]:
    """Accuracy of the returned program in percent, and what was spent; GEPA ends the evaluation it is in."""
    world = Scripted(cell["predictors"], seed)
    with _silence(), dspy.context(lm=world.task_lm, disable_history=True):
        program = METHODS[cell["method"]](world, cell["calls"], seed)
    assert len(world.log) <= cell["calls"] or cell["method"] == "gepa"
    start = N_TRAIN + N_VAL
    accuracy = 100.0 * world.accuracy(program, range(start, start + N_TEST))
    spent = world.log[: cell["calls"]]
    return {
        "regret": 100.0 - accuracy,
        "accuracy": accuracy,
        "program_calls": float(sum(spent)),
        "proposals": float(len(spent) - sum(spent)),
    }


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No progress bars and log messages."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def cells() -> Iterator[Cell]:
    """DSPy's optimizers and ours, on programs of one and of three predictors."""
    for predictors, method in product(CALLS, METHODS):
        yield {
            "world": "scripted",
            "predictors": predictors,
            "method": method,
            "calls": CALLS[predictors],
            "n_val": N_VAL,
        }


def summary(rows: Sequence[Cell], ours: str = "adaptive") -> str:
    """Mean accuracy in percent and mean costs, and how much more ours has, paired by seed, with its error."""
    columns, lines = ("accuracy", "program_calls", "proposals"), []
    for row in select(rows, world="scripted"):
        same = {name: row[name] for name in ("world", "predictors", "calls", "n_val")}
        found = select(rows, **same, method=ours)
        gain = _gain(found[0], row) if found and row["method"] != ours else ""
        lines.append([str(row["predictors"]), row["method"], *(f"{row[c]:.1f}" for c in columns), gain])
    return markdown(["predictors", "method", *map(pretty, columns), f"{ours} has more"], lines)


def _gain(row: Cell, other: Cell) -> str:
    n = min(len(row["regrets"]), len(other["regrets"]))
    gains = np.array(other["regrets"][:n]) - np.array(row["regrets"][:n])
    error = gains.std(ddof=1) / n**0.5 if n > 1 else 0.0
    return f"{gains.mean():+.2f} ± {error:.2f}"
