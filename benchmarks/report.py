"""Committed results as a Markdown table and a picture: `python -m benchmarks.report`."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from benchmarks.methods import METHODS
from benchmarks.runner import RESULTS, Cell

# NOTE: an excess of zero would make a geometric mean zero by one lucky table: floor at 0.02 points.
_FLOOR = 0.02


def headline(rows: list[Cell]) -> str:
    """Regret by table and method at stock's calls, pool 72, as a Markdown table."""
    chosen = _at_stock_calls(rows)
    methods = [m for m in METHODS if any(r["method"] == m for r in chosen)]
    lines = [_markdown(["table", *methods, "exhaustive"]), _markdown(["---"] * (len(methods) + 2))]
    for table in dict.fromkeys(r["table"] for r in chosen):
        by = {r["method"]: r for r in chosen if r["table"] == table}
        cells = [_regret(by[m]) if m in by else "" for m in methods]
        exhaustive = f"{next(iter(by.values()))['exhaustive']:.2f}"
        lines.append(_markdown([table.replace("_", " "), *cells, exhaustive]))
    return "\n".join(lines)


def excess_ratios(rows: list[Cell], method: str = "search-qei", base: str = "stock-tpe") -> dict[str, float]:
    """Excess regret over exhaustive evaluation, ``method`` divided by ``base``, for each table."""
    chosen = _at_stock_calls(rows)
    excess = {(r["table"], r["method"]): r["excess"] for r in chosen}
    tables = dict.fromkeys(t for t, m in excess if m == method and (t, base) in excess)
    return {t: max(excess[t, method], _FLOOR) / max(excess[t, base], _FLOOR) for t in tables}


def geometric_mean(values: list[float]) -> float:
    """The mean on the scale of ratios."""
    return math.exp(sum(map(math.log, values)) / len(values))


def plot(rows: list[Cell], path: Path) -> None:
    """Bars of regret by table and method."""
    from matplotlib.figure import Figure

    chosen = _at_stock_calls(rows)
    tables = list(dict.fromkeys(r["table"] for r in chosen))
    methods = [m for m in METHODS if any(r["method"] == m for r in chosen)]
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots()
    for k, method in enumerate(methods):
        by = {r["table"]: r for r in chosen if r["method"] == method}
        at = [i + (k - len(methods) / 2) * 0.1 for i, t in enumerate(tables) if t in by]
        heights = [by[t]["regret"] for t in tables if t in by]
        errors = [by[t]["regret_se"] for t in tables if t in by]
        axes.bar(at, heights, 0.1, yerr=errors, label=method)
    axes.set_xticks(range(len(tables)), [t.replace("_", "\n", 1) for t in tables], fontsize=8)
    axes.set_ylabel("regret, percentage points")
    axes.legend(ncols=4, fontsize=8)
    figure.savefig(path)


def _at_stock_calls(rows: list[Cell]) -> list[Cell]:
    """The headline's rows: pool 72, q = 4, the calls of stock, nothing left out or shuffled."""
    wanted = {"pool": 72, "share": 1.0, "q": 4, "few_shot": False, "shuffled": False}
    return [r for r in rows if wanted.items() <= r.items()]


def _regret(row: Cell) -> str:
    return f"{row['regret']:.2f} ± {row['regret_se']:.2f}"


def _markdown(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", default=str(RESULTS / "quality.json"))
    arguments = parser.parse_args()
    path = Path(arguments.results)
    rows = json.loads(path.read_text())
    print(headline(rows))
    per_example = {t: r for t, r in excess_ratios(rows).items() if not t.startswith("means")}
    print("\nexcess over exhaustive, search-qei / stock-tpe:")
    for table, ratio in per_example.items():
        print(f"  {table}: {ratio:.2f}")
    print(f"  geometric mean: {geometric_mean(list(per_example.values())):.2f}")
    plot(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
