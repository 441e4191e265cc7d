"""Runs cells of a benchmark over seeds in processes; finished cells are kept and not run again."""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"

Cell = dict[str, Any]
Figures = dict[str, float]
Measure = Callable[[Cell, int], Figures]  # cell, seed -> figures, "regret" among them
# Held while a row is added to a file, which is then read and written as a whole.
_WRITING = threading.Lock()


def quiet() -> None:
    """One torch thread and no chatter in a worker process."""
    import optuna
    import torch

    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")


def parser_of(
    described: str | None,
    slices: Mapping[str, Callable[..., object]],
    cost: str,
    tables: Sequence[str],
    methods: Iterable[str],
    output: str,
) -> argparse.ArgumentParser:
    """The parser of a benchmark whose cells come in slices; each slice is described by its docstring."""
    listed = "\n".join(f"  {name}: {slice_.__doc__}" for name, slice_ in slices.items())
    parser = argparse.ArgumentParser(
        description=f"{described}\n\nSlices:\n{listed}",
        epilog=cost,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="*", default=list(slices), choices=list(slices), help="slices")
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--tables", nargs="*", default=list(tables))
    parser.add_argument("--methods", nargs="*", default=list(methods), choices=list(methods))
    parser.add_argument("--output", default=output, help="file under benchmarks/results")
    return parser


def run_cells(cells: Iterable[Cell], measure: Measure, seeds: int, path: Path, jobs: int) -> list[Cell]:
    """Measures every cell over ``range(seeds)`` and writes the file after each.

    Args:
        cells: Everything that defines a row of the table: a row is taken as done only if all of it
            is the same.
        measure: Figures of one seed; runs in another process.
        seeds: Number of seeds.
        path: JSON file; rows already there, with as many seeds, are taken as they are.
        jobs: Processes.
    """
    rows = []
    with ProcessPoolExecutor(jobs, initializer=quiet) as pool:
        for cell in cells:
            row = find(cell, read(path))
            if row is None or len(row.get("regrets", ())) < seeds:
                figures = list(pool.map(partial(_timed, measure, cell), range(seeds)))
                row = {**cell, "seeds": seeds, **_summary(figures)}
                keep(row, cell, path)
            rows.append(row)
            print(line(row), flush=True)
    return rows


def run_once(cell: Cell, measure: Callable[[Cell], Cell], path: Path) -> None:
    """Measures a cell without seeds, unless the file has it, and prints its row."""
    row = find(cell, read(path))
    if row is None:
        row = {**cell, **measure(cell)}
        keep(row, cell, path)
    print(line(row), flush=True)


def _timed(measure: Measure, cell: Cell, seed: int) -> Figures:
    """The figures, and the CPU time that they took."""
    start = time.process_time()
    figures = measure(cell, seed)
    return {**figures, "seconds": time.process_time() - start}


def find(cell: Cell, rows: list[Cell]) -> Cell | None:
    """The row of a cell, if there is one."""
    return next((row for row in rows if _is_of(row, cell)), None)


def _is_of(row: Cell, cell: Cell) -> bool:
    return all(name in row and row[name] == value for name, value in cell.items())


def _summary(figures: list[Figures]) -> Cell:
    """Means; of the regret also its standard error, 90th percentile and every seed's."""
    means = {name: round(float(np.mean([f[name] for f in figures])), 4) for name in figures[0]}
    regrets = np.array([f["regret"] for f in figures])
    spread = float(regrets.std(ddof=1)) if len(regrets) > 1 else 0.0
    return {
        **means,
        "regret_se": round(spread / len(regrets) ** 0.5, 4),
        "regret_p90": round(float(np.quantile(regrets, 0.9)), 4),
        "regrets": [round(float(r), 2) for r in regrets],
    }


def line(row: Cell) -> str:
    """One row as text, without the list of every seed's regret."""
    return "  ".join(f"{k}={v}" for k, v in row.items() if k != "regrets")


def read(path: Path) -> list[Cell]:
    """The rows of a file; none where there is no file."""
    rows: list[Cell] = json.loads(path.read_text()) if path.exists() else []
    return rows


def keep(row: Cell, cell: Cell, path: Path) -> None:
    """Writes the row of a cell to the file, in the place of an older one; several threads may call this."""
    with _WRITING:
        others = [other for other in read(path) if not _is_of(other, cell)]
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("[\n" + ",\n".join(json.dumps(r) for r in [*others, row]) + "\n]\n")
        os.replace(temporary, path)
