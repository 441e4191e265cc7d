"""Committed results as Markdown tables and pictures: `python -m benchmarks.report`."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import HEADLINE, OURS, STOCK, budget_curve, methods_of, pretty, select, tables_of
from benchmarks.runner import RESULTS, Cell, find, read

# NOTE: an excess of zero would make a geometric mean zero by one lucky table: floor at 0.02 points.
_FLOOR = 0.02


def headline(rows: list[Cell], **other: Any) -> str:
    """Regret by table and method at stock's calls, pool 72, or with one of these changed."""
    rows = select(rows, **{**HEADLINE, **other})
    methods = methods_of(rows)
    lines = []
    for table in tables_of(rows):
        by = {r["method"]: r for r in rows if r["table"] == table}
        exhaustive = f"{next(iter(by.values()))['exhaustive']:.2f}"
        lines.append([pretty(table), *(_regret(by.get(m)) for m in methods), exhaustive])
    return markdown(["table", *methods, "exhaustive"], lines)


def excess_ratios(rows: list[Cell], method: str = OURS, base: str = STOCK) -> dict[str, float]:
    """Excess regret over exhaustive evaluation, ``method`` divided by ``base``, for each table."""
    rows = select(rows, **HEADLINE)
    excess = {(r["table"], r["method"]): r["excess"] for r in rows}
    both = [t for t in tables_of(rows) if (t, method) in excess and (t, base) in excess]
    return {t: _ratio(excess[t, method], excess[t, base]) for t in both}


def excess_table(rows: list[Cell]) -> str:
    """Excess of every method, divided by stock TPE's, and the geometric mean of the per-example tables."""
    methods = [m for m in methods_of(select(rows, **HEADLINE)) if m != STOCK]
    ratios = {m: excess_ratios(rows, m) for m in methods}
    tables = list(dict.fromkeys(t for by in ratios.values() for t in by))
    lines = [[pretty(t), *(_number(ratios[m].get(t)) for m in methods)] for t in tables]
    means = [[r for t, r in ratios[m].items() if not t.startswith("means")] for m in methods]
    lines.append(["geometric mean, per-example tables", *(_number(geometric_mean(v)) for v in means)])
    return markdown(["excess / stock-tpe's", *methods], lines)


def geometric_mean(values: Sequence[float]) -> float | None:
    """The mean on the scale of ratios; None of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def share_reached(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """The smallest share at which a curve of (share, mean regret), joined by lines, is at ``target``.

    The first share itself if it is there already; None if the curve never gets there.
    """
    if curve and curve[0][1] <= target:
        return curve[0][0]
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if y1 <= target:
            return x0 + (x1 - x0) * (y0 - target) / (y0 - y1)
    return None


def budget_table(rows: list[Cell]) -> str:
    """Regret by share of stock's calls, and the share at which stock TPE's regret at 1 is reached."""
    shares = sorted({r["share"] for r in rows})
    lines = []
    for table in tables_of(r for r in rows if r["share"] != 1.0):
        target = find({**HEADLINE, "table": table, "method": STOCK}, rows)
        for method in methods_of(rows):
            curve = budget_curve(rows, table, method)
            by = dict(curve)
            points = [(share, row["regret"]) for share, row in curve]
            at = _share(points, target["regret"]) if target and method != STOCK else ""
            if len(curve) > 1:
                lines.append([pretty(table), method, *(_regret(by.get(s)) for s in shares), at])
    return markdown(["table", "method", *map(str, shares), "share for stock-tpe's regret at 1"], lines)


def _share(points: Sequence[tuple[float, float]], target: float) -> str:
    at = share_reached(points, target)
    if at is None:
        return "not reached"
    return f"≤ {at:.3f}" if at == points[0][0] else f"{at:.2f}"


def slice_table(rows: list[Cell], name: str) -> str:
    """Regret by the values of one thing (q, pool), all else as in the headline."""
    wanted = {k: v for k, v in HEADLINE.items() if k != name}
    rows = select(rows, **wanted)
    values = sorted({r[name] for r in rows})
    lines = []
    for table in tables_of(r for r in rows if r[name] != HEADLINE[name]):
        for method in methods_of(rows):
            by = {r[name]: r for r in rows if r["table"] == table and r["method"] == method}
            if len(by) > 1:
                lines.append([pretty(table), method, *(_regret(by.get(v)) for v in values)])
    return markdown(["table", "method", *(f"{name} {v}" for v in values)], lines)


def shuffled_table(rows: list[Cell]) -> str:
    """Embeddings dealt out at random, against none: the mean difference over the same seeds."""
    lines = []
    for row in select(rows, **{**HEADLINE, "shuffled": True}, method=OURS):
        index = find({**HEADLINE, "table": row["table"], "method": "search-qei-index"}, rows)
        real = find({**HEADLINE, "table": row["table"], "method": OURS}, rows)
        difference = paired(row, index) if index else None
        text = "" if difference is None else f"{difference[0]:+.2f} ± {difference[1]:.2f}"
        lines.append([pretty(row["table"]), _regret(real), _regret(row), _regret(index), text])
    return markdown(["table", OURS, "shuffled", "search-qei-index", "shuffled - index, paired"], lines)


def paired(row: Cell, other: Cell) -> tuple[float, float] | None:
    """Mean and standard error of the difference, over the seeds that both have (two at least)."""
    n = min(len(row.get("regrets", ())), len(other.get("regrets", ())))
    if n < 2:
        return None
    differences = np.array(row["regrets"][:n]) - np.array(other["regrets"][:n])
    return float(differences.mean()), float(differences.std(ddof=1)) / n**0.5


def pipelines_table(rows: list[Cell]) -> str:
    """Regret of programs of several predictors, and search-qei's divided by stock TPE's."""
    methods = methods_of(rows)
    lines, ratios = [], []
    for program in dict.fromkeys(r["program"] for r in rows):
        by = {r["method"]: r for r in rows if r["program"] == program}
        ratio = _ratio(by[OURS]["regret"], by[STOCK]["regret"]) if {OURS, STOCK} <= set(by) else None
        ratios += [] if ratio is None else [ratio]
        lines.append([pretty(program), *(_regret(by.get(m)) for m in methods), _number(ratio)])
    lines.append(["geometric mean", *([""] * len(methods)), _number(geometric_mean(ratios))])
    return markdown(["program", *methods, f"{OURS} / {STOCK}"], lines)


def wallclock_table(rows: list[Cell]) -> str:
    """Wall time and utilisation of a whole compile, stock and ours."""
    lines = []
    for row in rows:
        same = {name: row[name] for name in ("mode", "workers", "scale")}
        stock = find({**same, "method": "stock"}, rows)
        if row["method"] == "ours" and stock:
            pair = (stock, row)
            walls = [f"{r['wall']:.1f}" for r in pair]
            busy = [f"{r['utilisation']:.2f} (search {r['search_utilisation']:.2f})" for r in pair]
            lines.append([*map(str, same.values()), *walls, _number(row["wall"] / stock["wall"]), *busy])
    names = ["mode", "workers", "latency, s", "stock, s", "ours, s", "ours / stock"]
    return markdown([*names, "utilisation, stock", "utilisation, ours"], lines)


def proposal_table(rows: list[Cell]) -> str:
    """Seconds (and MB) of four asks, and ours divided by Optuna's."""
    lines = []
    for combinations, trials in dict.fromkeys((r["combinations"], r["trials"]) for r in rows):
        cell = {"combinations": combinations, "trials": trials}
        ours, tpe, gp = (find({**cell, "sampler": s}, rows) for s in ("ours", "tpe", "gp"))
        ratios = [_quotient(ours, tpe), _quotient(ours, gp), _quotient(ours, gp, "cpu")]
        lines.append([str(combinations), str(trials), *map(_cost, (ours, tpe, gp)), *ratios])
    ratio_names = ["ours / TPE", "ours / GP", "ours / GP, CPU time"]
    return markdown(["combinations", "trials", "ours", "TPE", "GP", *ratio_names], lines)


def scale_table(rows: list[Cell]) -> str:
    """CPU seconds and MB of a proposal, and how they grow: slopes on a log-log plot."""
    spaces = list(dict.fromkeys(r["configurations"] for r in sorted(rows, key=lambda r: r["size"])))
    trials = sorted({r["trials"] for r in rows})
    lines = []
    for name in spaces:
        by = {r["trials"]: r for r in rows if r["configurations"] == name}
        cells = [f"{by[n]['cpu']:.2f} s, {by[n]['memory']:.0f} MB" if n in by else "" for n in trials]
        lines.append([name, *cells, _slope([(n, by[n]["cpu"]) for n in trials if n in by and n >= 500])])
    down = [[(r["size"], r["cpu"]) for r in rows if r["trials"] == n] for n in trials]
    lines.append(["slope in configurations", *map(_slope, down), ""])
    return markdown(["configurations", *(f"{n} trials" for n in trials), "slope from 500 trials"], lines)


def _slope(points: Sequence[tuple[float, float]]) -> str:
    return f"{slope(points):.2f}" if len({x for x, _ in points}) > 1 else ""


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the straight line through points on a log-log plot, by least squares."""
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


def enumeration_table(rows: list[Cell]) -> str:
    """Regret with local search and with full enumeration, and the difference over the same seeds."""
    lines = []
    for row in rows:
        base = find({"program": row["program"], "method": "enumerated"}, rows)
        difference = paired(row, base) if base and base is not row else None
        text = "" if difference is None else f"{difference[0]:+.2f} ± {difference[1]:.2f}"
        lines.append([pretty(row["program"]), row["method"], str(row["seeds"]), _regret(row), text])
    return markdown(["program", "method", "seeds", "regret", "minus enumerated, paired"], lines)


def _cost(row: Cell | None) -> str:
    if row is None:
        return ""
    over = f"over {row['limit']:.0f} s"
    return over if row["seconds"] is None else f"{row['seconds']:.3f} s, {row['memory']:.0f} MB"


def _quotient(row: Cell | None, other: Cell | None, figure: str = "seconds") -> str:
    if not row or not other or row[figure] is None:
        return ""
    if other[figure] is None:
        return f"< {row[figure] / other['limit']:.3f}"
    return f"{row[figure] / other[figure]:.2f}"


def _regret(row: Cell | None) -> str:
    return "" if row is None else f"{row['regret']:.2f} ± {row['regret_se']:.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _ratio(value: float, base: float) -> float:
    return max(value, _FLOOR) / max(base, _FLOOR)


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def sections(results: Path) -> Iterator[tuple[str, str, str]]:
    """Name, title and table of everything that there are results of."""
    if rows := read(results / "quality.json"):
        yield "regret", "Regret at stock's calls, percentage points ± standard error", headline(rows)
        yield "excess", "Excess over exhaustive evaluation", excess_table(rows)
        yield "budgets", "Budgets", budget_table(rows)
        yield "q", "Configurations in a round", slice_table(rows, "q")
        yield (
            "pools",
            "Pools, at the calls of DSPy's light, medium and heavy runs",
            slice_table(rows, "pool"),
        )
        yield "shuffled", "Shuffled embeddings", shuffled_table(rows)
        yield "few-shot", "Few-shot prompts only", headline(rows, few_shot=True)
    if rows := read(results / "own.json"):
        yield "own", "Regret on tables of a small model, on which nothing was chosen", headline(rows)
        yield "own-excess", "Excess on these tables", excess_table(rows)
    if rows := read(results / "pipelines.json"):
        yield "pipelines", "Programs of several predictors", pipelines_table(rows)
    if (path := results / "wallclock.json").exists():
        table = wallclock_table(json.loads(path.read_text())["rows"])
        yield "wallclock", "Wall-clock time of a compile", table
    if rows := read(results / "proposal.json"):
        yield "proposal", "Four asks", proposal_table(rows)
    if rows := read(results / "scale.json"):
        yield "scale", "A proposal of four, CPU time and peak memory over the imports", scale_table(rows)
    if rows := read(results / "enumeration.json"):
        yield "enumeration", "Local search against full enumeration", enumeration_table(rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--no-plots", action="store_true", help="tables only: no matplotlib")
    arguments = parser.parse_args()
    for _, title, table in sections(arguments.results):
        if table.count("\n") > 1:
            print(f"### {title}\n\n{table}\n")
    if not arguments.no_plots:
        from benchmarks.plots import plot_all

        for path in plot_all(arguments.results):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
