"""Time and memory of a proposal, from 10^2 to 10^36 configurations: `python -m benchmarks.scale`. Linux only.

Every cell is a process of its own: it fills a study with made-up trials (blocks of 10 of 200 examples, half
of them of configurations that were measured before) and asks three times for a round of four. Time is the
least of the three, on the wall and on the processor (the one to compare where a machine is shared); memory is
the largest resident size over that after the imports, the study and the embeddings included. One thread: the
second of two cores is the program's. All cells together take about ten minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from itertools import product
from typing import TYPE_CHECKING

from benchmarks.proposal import ASKS, embed, filled_study, four_asks, peak
from benchmarks.runner import RESULTS, Cell, run_once

if TYPE_CHECKING:  # what is imported before the baseline is taken would not count
    from mpromptune import PromptSpace

# Predictors, and the instructions and demo sets that each of them has.
PROGRAMS = {
    "10^2": (1, 10),
    "10^3": (1, 32),
    "10^6": (2, 32),
    "10^9": (3, 32),
    "10^12": (4, 32),
    "10^36": (8, 200),
}
TRIALS = (10, 50, 200, 500, 1000, 2000, 5000)
REPEATS = 3


def prompt_space(configurations: str) -> PromptSpace:
    """A space of that order of magnitude."""
    from mpromptune import PromptSpace

    predictors, n = PROGRAMS[configurations]
    texts = {
        f"{p}_predictor_{part}": part for p, part in product(range(predictors), ("instruction", "demos"))
    }
    return PromptSpace({name: [f"{name} {i}" for i in range(n)] for name in texts})


def measure(cell: Cell) -> Cell:
    """Least seconds, least CPU seconds and peak memory (MB) of a round, in this process."""
    import optuna

    from mpromptune.sampling.sampler import qEISampler

    before = peak()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    space = prompt_space(cell["configurations"])
    sampler = qEISampler(space=space, embedder=embed, batch_size=ASKS, seed=0)
    study = filled_study(sampler, space, cell["trials"], seed=0)
    rounds = [four_asks(study, space) for _ in range(REPEATS)]
    wall, cpu = (round(min(part), 3) for part in zip(*rounds, strict=True))
    return {"size": float(space.size), "seconds": wall, "cpu": cpu, "memory": round(peak() - before, 1)}


def in_new_process(cell: Cell) -> Cell:
    """`measure` in a fresh interpreter."""
    command = [sys.executable, "-m", "benchmarks.scale", "--cell", json.dumps(cell)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    figures: Cell = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=list(PROGRAMS), choices=list(PROGRAMS), help="spaces")
    parser.add_argument("--trials", type=int, nargs="*", default=list(TRIALS))
    parser.add_argument("--output", default="scale.json", help="file under benchmarks/results")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(measure(json.loads(arguments.cell))))
        return
    path = RESULTS / arguments.output
    for configurations, trials in product(arguments.only, arguments.trials):
        cell = {"configurations": configurations, "trials": trials}
        run_once(cell, in_new_process, path)


if __name__ == "__main__":
    main()
