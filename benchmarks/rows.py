"""Rows of committed results: which are about what, and what it is called."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.methods import METHODS
from benchmarks.runner import Cell

OURS, STOCK = "search-qei", "stock-tpe"

HEADLINE = {"pool": 72, "share": 1.0, "q": 4, "few_shot": False, "shuffled": False}


def select(rows: Iterable[Cell], **wanted: Any) -> list[Cell]:
    """The rows with these values."""
    return [r for r in rows if all(r.get(k) == v for k, v in wanted.items())]


def tables_of(rows: Iterable[Cell]) -> list[str]:
    """Names of tables in the order of their first row."""
    return list(dict.fromkeys(r["table"] for r in rows))


def methods_of(rows: Iterable[Cell]) -> list[str]:
    """Names of the methods that rows are about, in the order of `METHODS`."""
    found = {r["method"] for r in rows}
    return [m for m in METHODS if m in found]


def pretty(name: str) -> str:
    """A table's or a program's name to read."""
    return " + ".join(part.replace("_", " ") for part in name.split("+"))


def budget_curve(rows: list[Cell], table: str, method: str) -> list[tuple[float, Cell]]:
    """Rows of a method by the share of stock's calls, in order."""
    wanted = {k: v for k, v in HEADLINE.items() if k != "share"}
    found = select(rows, **wanted, table=table, method=method)
    return sorted(((r["share"], r) for r in found), key=lambda pair: pair[0])
