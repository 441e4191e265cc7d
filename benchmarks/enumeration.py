"""Local search against full enumeration, where both are possible: `python -m benchmarks.enumeration`.

Programs of three predictors as in `benchmarks.pipelines`, with 12 prompts a stage: 1728 configurations, which
a proposal lists one by one, or of which it sees a hundred at random and what a local search meets. The same
seeds, so that the difference is paired.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import product
from unittest.mock import patch

from benchmarks.methods import Method, ours
from benchmarks.pipelines import N_VAL, PROGRAMS, STOCK_TRIALS, compose
from benchmarks.runner import RESULTS, Cell, run_cells
from benchmarks.tables import Task, load
from mpromptune.engine.minibatches import stock_calls
from mpromptune.model import acquisition

POOL, SAMPLE, STAGES = 12, 100, 3


def _by_component(problem: Task, calls: int, seed: int, q: int) -> dict[str, int]:
    """The local search that larger programs have, here too."""
    with patch.object(acquisition, "_ALL_AT_ONCE", 0):
        return ours("qei", max_space_size=SAMPLE)(problem, calls, seed, q)


METHODS: dict[str, Method] = {
    "enumerated": ours("qei"),
    "local": ours("qei", max_space_size=SAMPLE),
    "local-by-component": _by_component,
}
COST = "CPU seconds of a run: 5. With 16 seeds that makes 8 minutes. Finished cells are kept."


def measure(cell: Cell, seed: int) -> dict[str, float]:
    """Regret, and that of exhaustive evaluation, of one run."""
    problem = compose([load(name) for name in cell["program"].split("+")], seed, cell["pool"], N_VAL)
    params = METHODS[cell["method"]](problem, cell["calls"], seed, cell["q"])
    exhaustive, regret = problem.exhaustive_regret(), problem.regret(params)
    return {"regret": regret, "excess": regret - exhaustive, "exhaustive": exhaustive}


def cells(methods: Sequence[str]) -> Iterator[Cell]:
    """Every method on every program of three predictors, for half of the calls of DSPy's MIPROv2."""
    calls = stock_calls(STOCK_TRIALS[STAGES], N_VAL) // 2
    for tables, method in product((p for p in PROGRAMS if len(p) == STAGES), methods):
        yield {"program": "+".join(tables), "pool": POOL, "method": method, "calls": calls, "q": 4}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=COST, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--output", default="enumeration.json", help="file under benchmarks/results")
    arguments = parser.parse_args()
    run_cells(cells(arguments.methods), measure, arguments.seeds, RESULTS / arguments.output, arguments.jobs)


if __name__ == "__main__":
    main()
