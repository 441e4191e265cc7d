"""Regret of the prompt returned, for the same number of program calls: `python -m benchmarks.quality`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

from benchmarks.methods import METHODS
from benchmarks.runner import RESULTS, Cell, parser_of, run_cells
from benchmarks.tables import MEANS_ONLY, OWN, PER_EXAMPLE, draw, load
from mpromptune.engine.minibatches import stock_calls

# Trials of DSPy's light, medium and heavy runs, by the number of configurations that they make.
STOCK_TRIALS = {18: 10, 72: 18, 162: 27}
N_VAL = 200
PEERS = ("halving", "sysrs", "ttts", "prompteval")
SOME = ("stock-tpe", *PEERS, "search-random", "search-qei-index", "search-qei")
LARGE_POOLS = ("search-qei-64-threads", "search-qei-128-threads")
CONFIRMED = ("search-qei-confirmed", "search-qei-unconfirmed")
VARIANTS = (*LARGE_POOLS, *CONFIRMED)
ORDINARY = tuple(method for method in METHODS if method not in VARIANTS)
NOT_INDEX = tuple(method for method in SOME if method != "search-qei-index")
# The tables that slices vary one factor on: a wide field of prompts, and a flat one.
FOCUS = ("gsm8k_llama33_70b_s43", "agnews_llama33_70b_s42")
COST = """\
CPU seconds of a run at pool 72 and stock's calls: search-qei and search-qei-index 2.5, hbbops, search-random
and search-tpe 1, the others under 0.3; search-qei 5.5 at twice the calls, 6 with q = 1, 4.5 with a pool of
162. With 40 seeds that makes, in CPU hours: headline 0.4, means 0.1, budgets 0.5, q 0.2, pools 0.2, shuffled
0.1, few-shot 0.1. Finished cells are kept, so that a run can be stopped and taken up again."""


def measure(cell: Cell, seed: int) -> dict[str, float]:
    """Regret, and excess over exhaustive evaluation, of one run."""
    problem = draw(load(cell["table"]), seed, cell["pool"], N_VAL, cell["few_shot"], cell["shuffled"])
    params = METHODS[cell["method"]](problem, cell["calls"], seed, cell["q"])
    exhaustive = problem.exhaustive_regret()
    regret = problem.regret(params)
    return {"regret": regret, "excess": regret - exhaustive, "exhaustive": exhaustive}


def cell(method: str, table: str, pool: int = 72, share: float = 1.0, q: int = 4, **kind: bool) -> Cell:
    """One row: ``share`` is the fraction of the calls that DSPy's MIPROv2 would spend."""
    calls = int(share * stock_calls(STOCK_TRIALS[pool], N_VAL))
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


def headline() -> Iterator[Cell]:
    """Every method at stock's calls, pool 72 (all prompts of a smaller table), q = 4."""
    yield from (cell(method, table) for table, method in product(PER_EXAMPLE, ORDINARY))


def means() -> Iterator[Cell]:
    """The headline where only mean scores are recorded: examples are drawn independently."""
    yield from (cell(method, table) for table, method in product(MEANS_ONLY, SOME))


def own() -> Iterator[Cell]:
    """The headline on tables of a small model, on which nothing was chosen."""
    yield from (cell(method, table) for table, method in product(OWN, SOME))


def budgets() -> Iterator[Cell]:
    """Other shares of stock's calls; below 435 of them DSPy's protocol spends 435."""
    for table, method, share in product(FOCUS, SOME, (0.25, 0.5)):
        yield cell(method, table, share=share)
    for table, method in product(FOCUS, NOT_INDEX):
        yield cell(method, table, share=2.0)
    for table, share in product(FOCUS, (0.125, 0.375, 0.75)):
        yield cell("search-qei", table, share=share)


def batch_sizes() -> Iterator[Cell]:
    """Blocks in a batch."""
    yield from (cell("search-qei", table, q=q) for table, q in product(FOCUS, (1, 8, 16)))


def threads() -> Iterator[Cell]:
    """The trials of pools of 64 and 128 threads; up to 32 threads they are those of one."""
    yield from (cell(method, table) for table, method in product(PER_EXAMPLE, LARGE_POOLS))


def confirmed() -> Iterator[Cell]:
    """Winner and baseline measured in full, or nothing kept back for that."""
    yield from (cell(m, table, share=share) for table, m, share in product(FOCUS, CONFIRMED, (0.5, 1.0)))


def pools() -> Iterator[Cell]:
    """As many prompts, and calls, as DSPy's light and heavy runs have."""
    yield from (cell(m, table, pool=pool) for table, m, pool in product(FOCUS, NOT_INDEX, (18, 162)))


def shuffled() -> Iterator[Cell]:
    """Embeddings dealt out at random; for search-qei-index that is the headline's run."""
    for table in (*FOCUS, "subj_llama33_70b_s42"):
        yield cell("search-qei", table, shuffled=True)


def few_shot() -> Iterator[Cell]:
    """Only prompts with demos."""
    yield from (cell(method, table, few_shot=True) for table, method in product(FOCUS, SOME))


SLICES: dict[str, Callable[[], Iterator[Cell]]] = {
    "headline": headline,
    "means": means,
    "own": own,
    "budgets": budgets,
    "q": batch_sizes,
    "threads": threads,
    "confirmed": confirmed,
    "pools": pools,
    "shuffled": shuffled,
    "few-shot": few_shot,
}


def chosen(names: Sequence[str], tables: Sequence[str], methods: Sequence[str]) -> list[Cell]:
    """The cells of some slices that are about these tables and methods."""
    cells = [c for name in names for c in SLICES[name]()]
    return [c for c in cells if c["table"] in tables and c["method"] in methods]


def main() -> None:
    """Command line."""
    tables = [*PER_EXAMPLE, *MEANS_ONLY, *OWN]
    parser = parser_of(__doc__, SLICES, COST, tables, list(METHODS), "quality.json")
    parser.add_argument("--headline", action="store_true", help="--only headline means")
    arguments = parser.parse_args()
    names = ["headline", "means"] if arguments.headline else arguments.only
    wanted = chosen(names, arguments.tables, arguments.methods)
    for output, is_own in ((arguments.output, False), ("own.json", True)):
        cells = [cell for cell in wanted if (cell["table"] in OWN) is is_own]
        run_cells(cells, measure, arguments.seeds, RESULTS / output, arguments.jobs)


if __name__ == "__main__":
    main()
