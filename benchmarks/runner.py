"""Runs cells of a benchmark over seeds in processes; finished cells are kept and not run again."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"

Cell = dict[str, Any]
Measure = Callable[[Cell, int], dict[str, float]]  # cell, seed -> figures


def quiet() -> None:
    """One torch thread and no chatter in a worker process."""
    import optuna
    import torch

    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")


def run_cells(cells: Iterable[Cell], measure: Measure, seeds: int, path: Path, jobs: int) -> list[Cell]:
    """Measures every cell over ``range(seeds)`` and writes the file after each.

    Args:
        cells: What distinguishes a row of the table.
        measure: Figures of one seed; runs in another process.
        seeds: Number of seeds.
        path: JSON file; rows already there, with as many seeds, are taken as they are.
        jobs: Processes.
    """
    done = {_key(row): row for row in _read(path) if row["seeds"] >= seeds}
    rows = []
    with ProcessPoolExecutor(jobs, initializer=quiet) as pool:
        for cell in cells:
            if _key(cell) not in done:
                start = time.perf_counter()
                figures = list(pool.map(measure, [cell] * seeds, range(seeds)))
                seconds = (time.perf_counter() - start) * jobs / seeds
                done[_key(cell)] = {**cell, "seeds": seeds, "seconds": round(seconds, 2), **_summary(figures)}
                _write(path, list(done.values()))
            rows.append(done[_key(cell)])
            print(line(rows[-1]), flush=True)
    return rows


def _key(row: Cell) -> str:
    names = ("method", "table", "pool", "calls", "q", "stages", "few_shot", "shuffled")
    return json.dumps({name: row[name] for name in names if name in row})


def _summary(figures: list[dict[str, float]]) -> dict[str, float]:
    """Mean of every figure; of the regret also standard error and 90th percentile."""
    means = {name: round(float(np.mean([f[name] for f in figures])), 4) for name in figures[0]}
    regrets = np.array([f["regret"] for f in figures])
    return {
        **means,
        "regret_se": round(float(regrets.std(ddof=1) / len(regrets) ** 0.5), 4),
        "regret_p90": round(float(np.quantile(regrets, 0.9)), 4),
    }


def line(row: Cell) -> str:
    """One row as text."""
    return "  ".join(f"{k}={v}" for k, v in row.items())


def _read(path: Path) -> list[Cell]:
    return json.loads(path.read_text()) if path.exists() else []


def _write(path: Path, rows: list[Cell]) -> None:
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    os.replace(temporary, path)
