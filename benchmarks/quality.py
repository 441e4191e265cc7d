"""Regret of the prompt returned, for the same number of program calls: `python -m benchmarks.quality`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import product

from benchmarks.methods import METHODS
from benchmarks.runner import RESULTS, Cell, run_cells
from benchmarks.tables import MEANS_ONLY, PER_EXAMPLE, draw, load
from mpromptune.schedule import stock_calls

# Trials of DSPy's light, medium and heavy runs, by the number of configurations that they make.
STOCK_TRIALS = {18: 10, 72: 18, 162: 27}
N_VAL = 200
Q_MATTERS = ("search-qei", "search-qei-index")


def measure(cell: Cell, seed: int) -> dict[str, float]:
    """Regret, and excess over exhaustive evaluation, of one run."""
    problem = draw(load(cell["table"]), seed, cell["pool"], N_VAL, cell["few_shot"], cell["shuffled"])
    params = METHODS[cell["method"]](problem, cell["calls"], seed, cell["q"])
    exhaustive = problem.exhaustive_regret()
    regret = problem.regret(params)
    return {"regret": regret, "excess": regret - exhaustive, "exhaustive": exhaustive}


def cell(method: str, table: str, pool: int = 72, share: float = 1.0, q: int = 4, **kind: bool) -> Cell:
    """One row: ``share`` is the fraction of the calls that DSPy's MIPROv2 would spend."""
    calls = round(share * stock_calls(STOCK_TRIALS[pool], N_VAL))
    return {
        "method": method,
        "table": table,
        "pool": pool,
        "share": share,
        "calls": calls,
        "q": q,
        "few_shot": kind.get("few_shot", False),
        "shuffled": kind.get("shuffled", False),
    }


def headline(tables: tuple[str, ...]) -> Iterator[Cell]:
    """Every method at stock's calls, pool 72."""
    for table, method in product(tables, METHODS):
        yield cell(method, table)


def slices(tables: tuple[str, ...]) -> Iterator[Cell]:
    """One factor at a time around the headline: budget, q, pool; shuffled and few-shot rows."""
    some = ("stock-tpe", "halving", "search-random", *Q_MATTERS)
    for table, method, share in product(tables, some, (0.25, 0.5, 2.0)):
        yield cell(method, table, share=share)
    for table, q in product(tables, (1, 8, 16)):
        yield cell("search-qei", table, q=q)
    for table, method in product(tables, Q_MATTERS):
        yield cell(method, table, shuffled=True)
    for table, method, pool in product(tables[:3], some, (18, 162)):
        yield cell(method, table, pool=pool)
    for table, method in product(tables[:3], some):
        yield cell(method, table, few_shot=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--tables", nargs="*", default=[*PER_EXAMPLE, *MEANS_ONLY])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--headline", action="store_true", help="only stock's calls, pool 72, q = 4")
    parser.add_argument("--output", default="quality.json", help="file under benchmarks/results")
    arguments = parser.parse_args()
    tables = tuple(arguments.tables)
    cells = list(headline(tables)) + ([] if arguments.headline else list(slices(tables)))
    wanted = [c for c in cells if c["method"] in arguments.methods]
    run_cells(wanted, measure, arguments.seeds, RESULTS / arguments.output, arguments.jobs)


if __name__ == "__main__":
    main()
