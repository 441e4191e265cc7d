"""Pictures of committed results; needs matplotlib (``pip install '.[bench]'``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.overview import overview
from benchmarks.rows import HEADLINE, budget_curve, methods_of, pretty, select, tables_of
from benchmarks.runner import Cell, read

Draw = Callable[[list[Cell], Figure], None]


def plot_all(results: Path) -> Iterator[Path]:
    """Draws what there are results of; yields the files written."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    if overview(results, figure):
        figure.savefig(path := results / "overview.png", dpi=100)
        yield path
    for name, source, draw in PICTURES:
        rows = read(results / f"{source}.json")
        if rows:
            figure = Figure(figsize=(10, 4), layout="constrained")
            draw(rows, figure)
            if figure.axes:  # there may be no row that the picture is about
                path = results / f"{name}.png"
                figure.savefig(path, dpi=80)
                yield path


def regrets(rows: list[Cell], figure: Figure) -> None:
    """Bars of regret by table and method at stock's calls."""
    rows = select(rows, **HEADLINE)
    _bars(figure.subplots(), rows, "table", "regret, percentage points")


def pipelines(rows: list[Cell], figure: Figure) -> None:
    """Bars of regret by program and method."""
    _bars(figure.subplots(), rows, "program", "regret, percentage points")


def budgets(rows: list[Cell], figure: Figure) -> None:
    """Regret against the share of stock's calls, with one standard error either way."""
    tables = tables_of(r for r in rows if r["share"] != 1.0)
    if not tables:
        return
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    for axes, table in zip(panels, tables, strict=True):
        for method in methods_of(rows):
            curve = budget_curve(rows, table, method)
            if len(curve) > 1:
                shares, found = zip(*curve, strict=True)
                errors = [r["regret_se"] for r in found]
                axes.errorbar(shares, [r["regret"] for r in found], errors, marker="o", label=method)
        axes.set(title=pretty(table), xlabel="share of stock's calls", ylabel="regret, percentage points")
        axes.legend(fontsize=8)


def proposals(rows: list[Cell], figure: Figure) -> None:
    """Seconds of four asks against the size of the space, by number of trials."""
    trials = sorted({r["trials"] for r in rows})
    panels = figure.subplots(1, len(trials), squeeze=False, sharey=True)[0]
    for axes, n in zip(panels, trials, strict=True):
        for sampler in dict.fromkeys(r["sampler"] for r in rows):
            found = [r for r in rows if r["sampler"] == sampler and r["trials"] == n and r["seconds"]]
            points = sorted((r["combinations"], r["seconds"]) for r in found)
            axes.loglog([x for x, _ in points], [y for _, y in points], marker="o", label=sampler)
        axes.set(title=f"{n} trials", xlabel="combinations")
    panels[0].set_ylabel("seconds for four asks")
    panels[0].legend(fontsize=8)


def scale(rows: list[Cell], figure: Figure) -> None:
    """CPU seconds and peak memory of a proposal against trials, by size of the space."""
    panels = figure.subplots(1, 2)
    spaces = dict.fromkeys(r["configurations"] for r in sorted(rows, key=lambda r: r["size"]))
    for axes, what, label in zip(panels, ("cpu", "memory"), ("CPU seconds", "MB over imports"), strict=True):
        for name in spaces:
            points = sorted((r["trials"], r[what]) for r in rows if r["configurations"] == name)
            axes.loglog([x for x, _ in points], [y for _, y in points], marker="o", label=name)
        axes.set(xlabel="trials", ylabel=label)
    panels[0].legend(title="configurations", fontsize=8)


def _bars(axes: Axes, rows: list[Cell], across: str, label: str) -> None:
    groups, methods = list(dict.fromkeys(r[across] for r in rows)), methods_of(rows)
    width = 0.8 / max(len(methods), 1)
    for k, method in enumerate(methods):
        by = {r[across]: r for r in rows if r["method"] == method}
        at = [i + (k - (len(methods) - 1) / 2) * width for i, g in enumerate(groups) if g in by]
        heights = [by[g]["regret"] for g in groups if g in by]
        errors = [by[g]["regret_se"] for g in groups if g in by]
        hatch = "///" if k >= 10 else None  # there are ten colours
        axes.bar(at, heights, width, yerr=errors, label=method, hatch=hatch)
    names = [pretty(g).replace(" llama", "\nllama").replace(" + ", "\n") for g in groups]
    axes.set_xticks(range(len(groups)), names, fontsize=7)
    axes.set_ylabel(label)
    axes.legend(ncols=3, fontsize=8)


PICTURES: tuple[tuple[str, str, Draw], ...] = (
    ("quality", "quality", regrets),
    ("budgets", "quality", budgets),
    ("pipelines", "pipelines", pipelines),
    ("proposal", "proposal", proposals),
    ("scale", "scale", scale),
)
