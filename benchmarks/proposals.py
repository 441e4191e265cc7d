"""Searches that write candidates, against a fixed pool and GEPA's loop: `python -m benchmarks.proposals`.

All methods have the same calls, and a proposal costs as much as a program call. Two worlds are made of
recorded tables (`benchmarks.worlds`); in the third one DSPy programs are optimized (`benchmarks.scripted`).
Regrets are those to the best prompt of the pool, so that they are negative where something better was
written; in the third world, those to an accuracy of 100 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np

from benchmarks import scripted
from benchmarks.gepa_loop import gepa
from benchmarks.report import markdown
from benchmarks.rows import pretty, select, tables_of
from benchmarks.runner import RESULTS, Cell, parser_of, read, run_cells
from benchmarks.tables import PER_EXAMPLE, Table, load
from benchmarks.worlds import Parametric, Recorded, World, Writer, one_of
from mpromptune import qEISampler, search
from mpromptune.model.space import FloatArray

Method = Callable[[World, Sequence[Writer], int, int, int], dict[str, int]]  # calls, seed, q

WORLDS: dict[str, Callable[[Table, int, int, int], World]] = {"recorded": Recorded, "parametric": Parametric}
# Writers of a cell by its name for them; another name is that of one writer.
GROUPS: dict[str, tuple[str, ...]] = {"none": (), "mixture": ("delta+0.1", "delta-0.8", "flat")}
RECORDED = ("reflect-0", "reflect-0.5", "reflect-1", "fresh", "bad")
PARAMETRIC = ("delta-0.4", "delta+0", "delta+0.1", "flat")
POOL, N_VAL = 72, 200
CALLS = 1630
# What gains are measured against, and what names a line of their table.
BASES = ("fixed", "gepa", "adaptive")
SETTING = ("world", "calls", "writers", "method")
COST = """\
CPU seconds of a run at 1630 calls: fixed 1.5, gepa 0.1; of a scripted run with 1 and 3 predictors: stock 0.5
and 4, gepa 0.5 and 3, fixed 1.5 and 11, adaptive 2 and 15. Finished cells are kept, so that a run can be
stopped and taken up again."""


def fixed(world: World, writers: Sequence[Writer], calls: int, seed: int, q: int) -> dict[str, int]:
    """`search` on the pool alone."""
    return _searched(world, calls, seed, q)


def adaptive(asked: Callable[[Sequence[Writer]], Sequence[Writer]] = list, **options: Any) -> Method:
    """`search` that asks the writers, or what ``asked`` makes of them; further options are search's."""

    def run(world: World, writers: Sequence[Writer], calls: int, seed: int, q: int) -> dict[str, int]:
        return _searched(world, calls, seed, q, proposers=asked(writers), **options)

    return run


def _searched(world: World, calls: int, seed: int, q: int, **options: Any) -> dict[str, int]:
    result = search(
        world.space,
        world.score,
        n_examples=world.n_examples,
        max_calls=calls,
        sampler=qEISampler(embedder=world.embed, seed=seed),
        num_threads=1,
        batch_size=q,
        baseline=world.baseline,
        seed=seed,
        **options,
    )
    return result.best_params


METHODS: dict[str, Method] = {
    "fixed": fixed,
    "gepa": lambda world, writers, calls, seed, q: gepa(world, writers, calls, seed),
    "adaptive": adaptive(),
    "adaptive-uniform": adaptive(lambda writers: [one_of(writers)]),
    "adaptive-screened": adaptive(),
}
# Prompts that a writer draws for one proposal; the best by their embeddings is taken.
DRAFTS = {"adaptive-screened": 4}


def measure(cell: Cell, seed: int) -> dict[str, float]:
    """Value of the winner of one run, its regret, and how many candidates were written."""
    if cell["world"] == "scripted":
        return scripted.measure(cell, seed)
    world = WORLDS[cell["world"]](load(cell["table"]), seed, cell["pool"], N_VAL)
    if isinstance(world, Recorded):
        world.drafts = DRAFTS.get(cell["method"], 1)
    writers = [world.writer(name) for name in names_of(cell["writers"])]
    params = METHODS[cell["method"]](world, writers, cell["calls"], seed, cell["q"])
    assert world.spent <= cell["calls"]
    value, n_pool = world.value(params), len(world.pool)
    return {
        "regret": world.best_of_pool() - value,
        "value": value,
        "written": float(len(world.texts) - n_pool),
        "new": float(next(iter(params.values())) >= n_pool),
    }


def names_of(writers: str) -> tuple[str, ...]:
    """The writers that a cell's name stands for."""
    return GROUPS.get(writers, (writers,))


def cells(world: str, writers: Sequence[str], calls: int = CALLS, also: Sequence[str] = ()) -> Iterator[Cell]:
    """Every method that there is to compare in a world, the fixed pool once."""
    pairs = [("none", "fixed"), *product(writers, ("gepa", "adaptive", *also))]
    for table, (names, method) in product(PER_EXAMPLE, pairs):
        yield {
            "world": world,
            "table": table,
            "writers": names,
            "method": method,
            "pool": pool_of(world, load(table)),
            "calls": calls,
            "q": 4,
        }


def pool_of(world: str, table: Table) -> int:
    """Prompts in the pool: 72, but half of a small recorded table, so that there is something to write."""
    n = len(table.truth)
    return min(POOL, n // 2 if world == "recorded" else n)


def recorded() -> Iterator[Cell]:
    """Writers take prompts of the table that are not in the pool."""
    return cells("recorded", RECORDED)


def demos() -> Iterator[Cell]:
    """Recorded: prompts with other demos, chosen by the effects of single demos; nothing else is asked."""
    return (cell for cell in cells("recorded", ("demos",)) if cell["method"] != "gepa")


def screening() -> Iterator[Cell]:
    """Recorded: several drafts of each proposal, of which the best by its embedding is measured."""
    return (
        cell
        for cell in cells("recorded", ("reflect-0.5", "fresh"), also=("adaptive-screened",))
        if cell["method"] != "gepa"
    )


def parametric() -> Iterator[Cell]:
    """Writers make children of any skill."""
    return cells("parametric", PARAMETRIC)


def budgets() -> Iterator[Cell]:
    """Parametric, fewer and more calls."""
    for calls in (650, 3260):
        yield from cells("parametric", ("delta+0", "delta+0.1"), calls)


def mixture() -> Iterator[Cell]:
    """Parametric, a good writer and two useless ones: learned operators, and a uniform choice."""
    return cells("parametric", ("mixture",), also=("adaptive-uniform",))


SLICES: dict[str, Callable[[], Iterator[Cell]]] = {
    "recorded": recorded,
    "parametric": parametric,
    "budgets": budgets,
    "mixture": mixture,
    "screening": screening,
    "demos": demos,
    "scripted": scripted.cells,
}


def chosen(
    names: Sequence[str], tables: Sequence[str], methods: Sequence[str], writers: Sequence[str] | None = None
) -> list[Cell]:
    """The cells of some slices that are about these tables, methods and writers (or none), each once.

    Those of the scripted world are about no table and no writer.
    """
    every = [c for name in names for c in SLICES[name]()]
    found = [c for c in every if c.get("table") in (None, *tables) and c["method"] in methods]
    if writers is not None:
        found = [c for c in found if c.get("writers", "none") in (*writers, "none")]
    return [c for i, c in enumerate(found) if c not in found[:i]]


def summary(rows: Sequence[Cell], base: str) -> str:
    """Gains in value over a method, in percentage points, by table and on the mean of the tables.

    They are paired by seed. The first error is the standard error over seeds; the second one, of a mean, over
    tables.
    """
    tables = tables_of(rows)
    lines = []
    for setting in settings_of(rows):
        against = {**setting, "method": base, **({"writers": "none"} if base == "fixed" else {})}
        pairs = {t: (select(rows, table=t, **setting), select(rows, table=t, **against)) for t in tables}
        gains = {t: gains_of(mine[0], other[0]) for t, (mine, other) in pairs.items() if mine and other}
        if gains and setting["method"] != base:
            by_table = [with_error(gains[t]) if t in gains else "" for t in tables]
            lines.append([*map(str, setting.values()), *by_table, over_tables(list(gains.values()))])
    return markdown([*SETTING, *map(pretty, tables), "mean"], lines)


def settings_of(rows: Sequence[Cell]) -> list[Cell]:
    """What rows of several tables have in common, in the order of their first row."""
    return [
        dict(zip(SETTING, key, strict=True))
        for key in dict.fromkeys(tuple(r[k] for k in SETTING) for r in rows)
    ]


def gains_of(row: Cell, other: Cell) -> FloatArray:
    """Differences of values, seed by seed, over the seeds that both have."""
    n = min(len(row["regrets"]), len(other["regrets"]))
    return np.array(other["regrets"][:n]) - np.array(row["regrets"][:n])


def with_error(gains: FloatArray) -> str:
    """A mean with its standard error."""
    return f"{gains.mean():+.2f} ± {_error(gains):.2f}"


def over_tables(gains: Sequence[FloatArray]) -> str:
    """The mean over tables, its standard error over seeds, and that over tables."""
    n = min(map(len, gains))
    by_seed = np.mean([g[:n] for g in gains], axis=0)
    return f"{with_error(by_seed)} (tables ± {_error(np.array([g.mean() for g in gains])):.2f})"


def _error(values: FloatArray) -> float:
    return float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0


def main() -> None:
    """Command line."""
    methods = list({**METHODS, **scripted.METHODS})
    parser = parser_of(__doc__, SLICES, COST, PER_EXAMPLE, methods, "proposals.json")
    parser.add_argument("--writers", nargs="*", help="groups of writers; all by default")
    parser.add_argument("--summary", action="store_true", help="print gains in the file, and run nothing")
    arguments = parser.parse_args()
    path = RESULTS / arguments.output
    if arguments.summary:
        rows = read(path)
        of_tables = [row for row in rows if row["world"] != "scripted"]
        for base in BASES:
            print(f"\nGain over {base}, percentage points\n\n{summary(of_tables, base)}")
        print(f"\nScripted, percent\n\n{scripted.summary(rows)}")
        return
    wanted = chosen(arguments.only, arguments.tables, arguments.methods, arguments.writers)
    run_cells(wanted, measure, arguments.seeds, path, arguments.jobs)


if __name__ == "__main__":
    main()
