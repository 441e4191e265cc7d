"""Time that a compile takes, stock MIPROv2 against ours: `python -m benchmarks.wallclock`."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import dspy
import numpy as np

import mpromptune
from benchmarks.lms import SimulatedLM, Used, uniform
from benchmarks.runner import RESULTS, Cell, line

VALIDATION = {"light": 100, "medium": 300}
N_TRAIN = 75
SETUP = """\
One predictor; {train} training examples; a validation set of 100 (light) or 300 (medium) examples; DSPy's
defaults otherwise. Latency of an LM call: lognormal, mean 1 s x scale, sigma 0.5, the same for the same
request on both sides. Ours: sampler="qei" with an embedder that hashes; torch and BoTorch are imported
before the clock starts. Utilisation: sum of latencies / (workers x wall)."""


@dataclass
class _Clock:
    """When the search step began and ended, and what the LM had been used for."""

    lm: SimulatedLM
    began: float = 0.0
    ended: float = 0.0
    before: Used = field(default_factory=lambda: Used(0, 0.0))
    after: Used = field(default_factory=lambda: Used(0, 0.0))

    def timed(self, cls: type) -> type:
        """A subclass whose search step is timed."""
        clock = self

        class Timed(cls):  # type: ignore[misc]
            def _optimize_prompt_parameters(self, *args: Any, **kwargs: Any) -> Any:
                clock.began, clock.before = time.perf_counter(), clock.lm.used()
                try:
                    return super()._optimize_prompt_parameters(*args, **kwargs)
                finally:
                    clock.ended, clock.after = time.perf_counter(), clock.lm.used()

        return Timed


def hashed(texts: list[str]) -> np.ndarray:
    """Sixteen numbers for each text, which mean nothing: embedding costs no time here."""
    return np.array([[uniform(text, i) for i in range(16)] for text in texts])


def measure(cell: Cell) -> Cell:
    """One compile."""
    lm = SimulatedLM(cell["scale"])
    clock = _Clock(lm)
    ours = cell["method"] == "ours"
    cls = clock.timed(mpromptune.MIPROv2 if ours else dspy.MIPROv2)
    options = {"sampler": "qei", "embedder": hashed} if ours else {}
    data = examples(N_TRAIN + VALIDATION[cell["mode"]])
    with dspy.context(lm=lm), quiet():
        optimizer = cls(metric=exact, auto=cell["mode"], num_threads=cell["workers"])
        start = time.perf_counter()
        best = optimizer.compile(
            dspy.Predict("question -> answer"),
            trainset=data[:N_TRAIN],
            valset=data[N_TRAIN:],
            **options,
        )
        wall = time.perf_counter() - start
    return {**cell, "score": best.score, **_figures(cell["workers"], wall, lm.used(), clock)}


def _figures(workers: int, wall: float, used: Used, clock: _Clock) -> dict[str, float]:
    search = clock.ended - clock.began
    searched = clock.after.seconds - clock.before.seconds
    return {
        "lm_calls": used.calls,
        "search_calls": clock.after.calls - clock.before.calls,
        "wall": round(wall, 2),
        "search_wall": round(search, 2),
        "utilisation": round(used.seconds / (workers * wall), 3),
        "search_utilisation": round(searched / (workers * search), 3),
    }


def examples(n: int) -> list[dspy.Example]:
    """``n`` distinct sums."""
    pairs = [(i, 2 * i + 1) for i in range(n)]
    return [dspy.Example(question=f"{a}+{b}", answer=str(a + b)).with_inputs("question") for a, b in pairs]


def exact(example: Any, prediction: Any, trace: Any = None) -> bool:
    """Exact match."""
    return bool(example.answer == prediction.answer)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No logs, bars or warnings of either side."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _warm_up() -> None:
    """Imports, and whatever is slow the first time only."""
    measure({"method": "ours", "mode": "light", "workers": 64, "scale": 0.001})


def _key(row: Cell) -> tuple[Any, ...]:
    return row["mode"], row["workers"], row["scale"], row["method"]


def _keep(row: Cell, path: Path) -> list[Cell]:
    """Adds a row to the file, in the place of an older one of the same cell."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = sorted([*(r for r in old if _key(r) != _key(row)), row], key=_key)
    path.parent.mkdir(exist_ok=True)
    text = ",\n  ".join(json.dumps(r) for r in rows)
    setup = json.dumps(SETUP.format(train=N_TRAIN).replace("\n", " "))
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f'{{"setup": {setup},\n "rows": [\n  {text}\n]}}\n')
    os.replace(temporary, path)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=0.1, help="mean latency in seconds")
    parser.add_argument("--workers", type=int, nargs="*", default=[8, 16, 32, 64, 128])
    parser.add_argument("--modes", nargs="*", default=list(VALIDATION), choices=list(VALIDATION))
    parser.add_argument("--methods", nargs="*", default=["stock", "ours"], choices=["stock", "ours"])
    parser.add_argument("--output", default="wallclock.json", help="file under benchmarks/results")
    arguments = parser.parse_args()
    print(SETUP.format(train=N_TRAIN), flush=True)
    _warm_up()
    for mode, workers, method in product(arguments.modes, arguments.workers, arguments.methods):
        row = measure({"method": method, "mode": mode, "workers": workers, "scale": arguments.scale})
        _keep(row, RESULTS / arguments.output)
        print(line(row), flush=True)


if __name__ == "__main__":
    main()
