"""Time and memory of four asks, ours against Optuna's samplers: `python -m benchmarks.proposal`.

Every cell is a process of its own, with one thread: it fills a study with made-up trials (blocks of 10 of 200
examples, scores recorded as a search records them), proposes once on another small study, and then asks four
times in a row. Time is the median of up to three studies; memory is what the process grew by meanwhile. All
cells together take about eight minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from itertools import product
from typing import TYPE_CHECKING, Any

from benchmarks.runner import RESULTS, Cell, run_once

if TYPE_CHECKING:  # a parent that has loaded little leaves its children's memory alone
    from optuna.samplers import BaseSampler
    from optuna.study import Study

    from mpromptune import PromptSpace

# Candidates of each component: instructions and demo sets of one predictor, from 10 000 on of two;
# 5184 configurations are two predictors of 72 prompts.
SIZES: dict[int, tuple[int, ...]] = {
    72: (9, 8),
    500: (25, 20),
    2000: (50, 40),
    5184: (72, 72),
    10_000: (10, 10, 10, 10),
    100_000: (20, 25, 20, 10),
    1_000_000: (25, 40, 25, 40),
}
TRIALS = (10, 50, 100, 200, 500)
SAMPLERS = ("ours", "tpe", "gp")
ASKS, REPEATS, N_EXAMPLES, BLOCK, DIMENSIONS = 4, 3, 200, 10, 384


def prompt_space(combinations: int) -> PromptSpace:
    """A space of so many combinations."""
    from mpromptune import PromptSpace

    sizes = SIZES[combinations]
    parts = ("instruction",) if combinations == 5184 else ("instruction", "demos")
    names = [f"{c // len(parts)}_predictor_{parts[c % len(parts)]}" for c in range(len(sizes))]
    texts = {name: [f"{name} {i}" for i in range(n)] for name, n in zip(names, sizes, strict=True)}
    return PromptSpace({k: [[t] for t in v] if "demos" in k else v for k, v in texts.items()})


def embed(texts: list[str]) -> Any:
    """Random vectors, the same for the same text: as long as the default model's."""
    import zlib

    import numpy as np

    return np.stack([np.random.default_rng(zlib.crc32(t.encode())).normal(size=DIMENSIONS) for t in texts])


def make_sampler(name: str, space: PromptSpace, seed: int) -> BaseSampler:
    """A sampler with its defaults."""
    import optuna

    from mpromptune import qEISampler

    if name == "ours":
        return qEISampler(space=space, embedder=embed, batch_size=ASKS, seed=seed)
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
    return optuna.samplers.GPSampler(seed=seed)


def filled_study(sampler: BaseSampler, space: PromptSpace, trials: int, seed: int) -> Study:
    """A study in which rounds of four configurations were measured on one block each.

    Half of the trials measure configurations that were measured before, on examples that they lack.
    """
    import numpy as np
    import optuna

    from mpromptune.sampling.encoding import distributions_of
    from mpromptune.storage.attributes import EXAMPLES, SCORES
    from mpromptune.storage.attributes import N_EXAMPLES as SIZE

    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.set_user_attr(SIZE, N_EXAMPLES)
    rng = np.random.default_rng(seed)
    effects = [rng.normal(size=n) for n in space.sizes]
    difficulty = rng.normal(size=N_EXAMPLES)
    blocks = rng.permutation(N_EXAMPLES).reshape(-1, BLOCK)
    used: dict[tuple[int, ...], list[int]] = {}
    distributions = distributions_of(space)
    for number in range(trials):
        again = [row for row, have in used.items() if len(have) < len(blocks)] if number % 2 else []
        row = again[rng.integers(len(again))] if again else tuple(int(rng.integers(n)) for n in space.sizes)
        rotation = [(number // ASKS + k) % len(blocks) for k in range(len(blocks))]
        lacking = [b for b in rotation if b not in used.get(row, ())]
        if not lacking:  # drawn afresh, and fully measured already
            continue
        used.setdefault(row, []).append(lacking[0])
        block = blocks[lacking[0]]
        skill = sum(float(e[i]) for e, i in zip(effects, row, strict=True)) + difficulty[block]
        scores = (rng.random(BLOCK) < 1 / (1 + np.exp(-skill))).astype(float)
        study.add_trial(
            optuna.create_trial(
                params=space.params(row),
                distributions=distributions,
                value=float(scores.mean()),
                user_attrs={EXAMPLES: block.tolist(), SCORES: scores.tolist()},
            )
        )
    return study


def four_asks(study: Study, space: PromptSpace) -> tuple[float, float]:
    """Seconds that the asks took, and those that the processor spent on them."""
    from mpromptune.sampling.encoding import distributions_of

    distributions = distributions_of(space)
    start, busy = time.perf_counter(), time.process_time()
    for _ in range(ASKS):
        study.ask(fixed_distributions=distributions)
    return time.perf_counter() - start, time.process_time() - busy


def measure(cell: Cell) -> Cell:
    """Median seconds, median CPU seconds and additional peak memory (MB), in this process."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    small, space = prompt_space(72), prompt_space(cell["combinations"])
    four_asks(filled_study(make_sampler(cell["sampler"], small, 0), small, 20, 0), small)  # imports
    studies = [
        filled_study(make_sampler(cell["sampler"], space, s), space, cell["trials"], s)
        for s in range(REPEATS)
    ]
    before, times = peak(), list[tuple[float, float]]()
    for study in studies:
        times.append(four_asks(study, space))
        if sum(wall for wall, _ in times) > cell["limit"] / 2:
            break
    wall, cpu = (round(statistics.median(part), 4) for part in zip(*times, strict=True))
    return {"seconds": wall, "cpu": cpu, "memory": round(peak() - before, 1)}


def peak() -> float:
    """Largest resident size of this process so far, in MB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_new_process(cell: Cell) -> Cell:
    """`measure` in a fresh interpreter; no figures when it takes longer than the limit."""
    command = [sys.executable, "-m", "benchmarks.proposal", "--cell", json.dumps(cell)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    # What comes before the asks may take this long on a busy machine.
    start_up = 60
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            env=environment,
            timeout=cell["limit"] + start_up,
        )
    except subprocess.TimeoutExpired:
        return {"seconds": None, "cpu": None, "memory": None}
    figures: Cell = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--combinations", type=int, nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--trials", type=int, nargs="*", default=list(TRIALS))
    parser.add_argument("--samplers", nargs="*", default=list(SAMPLERS), choices=SAMPLERS)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for the asks of a cell")
    parser.add_argument("--output", default="proposal.json", help="file under benchmarks/results")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(measure(json.loads(arguments.cell))))
        return
    path = RESULTS / arguments.output
    for combinations, trials, name in product(arguments.combinations, arguments.trials, arguments.samplers):
        cell = {"combinations": combinations, "trials": trials, "sampler": name, "limit": arguments.limit}
        run_once(cell, in_new_process, path)


if __name__ == "__main__":
    main()
