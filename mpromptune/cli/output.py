"""What the commands ``estimate`` and ``resume`` print."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from mpromptune.engine.result import SearchResult
from mpromptune.execution.usage import StepUsage, Usage
from mpromptune.mipro.estimate import Estimate
from mpromptune.mipro.standing import Standing

_TOTAL = "in total"


def show_estimate(console: Console, estimate: Estimate) -> None:
    """A row for each step, and one for all; tokens and dollars where tokens were given."""
    tokens = estimate.usage.total.tokens > 0
    table = _table("at most", "program calls", "LM calls", *(("tokens", "US dollars") if tokens else ()))
    for step, usage in _rows(estimate.usage):
        money = [f"{usage.tokens:,}", _dollars(estimate, step, usage)] if tokens else []
        table.add_row(step, f"{usage.program_calls:,}", f"{usage.lm_calls:,}", *money)
    console.print(table, highlight=False)
    console.print("Retries apart. No LM was asked.", highlight=False)


def show_standing(console: Console, standing: Standing, estimate: Estimate) -> None:
    """What is paid, what is left to pay, and the best so far."""
    console.print(
        f"Study {standing.study.study_name!r}: {standing.trials} trials are over.",
        highlight=False,
        markup=False,
    )
    left = standing.left(estimate)
    table = _table("", "program calls", "LM calls", "US dollars", "left: program calls", "LM calls")
    for step, due in _rows(left):
        paid = standing.used.total if step == _TOTAL else standing.used.get(step, Usage())
        cost = f"{paid.cost:.4f}" if paid.cost else ""
        counts = [f"{n:,}" for n in (paid.program_calls, paid.lm_calls)]
        table.add_row(step, *counts, cost, f"{due.program_calls:,}", f"{due.lm_calls:,}")
    console.print(table, highlight=False)
    if standing.result is not None:
        console.print(f"Best so far: {_best(standing.result)}", highlight=False)
    console.print("Left is at most, retries apart; what DSPy's cache answers is free.", highlight=False)


def show_program(console: Console, result: SearchResult, path: str) -> None:
    """How good the program is that was compiled, and where it went."""
    console.print(
        f"Best: {_best(result)}; {result.calls:,} program calls in all", soft_wrap=True, highlight=False
    )
    console.print(f"Saved {path}", soft_wrap=True, highlight=False, markup=False)


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, style="bold", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _rows(usage: StepUsage) -> Sequence[tuple[str, Usage]]:
    return [*usage.items(), (_TOTAL, usage.total)]


def _dollars(estimate: Estimate, step: str, usage: Usage) -> str:
    asking = [name for name, one in estimate.usage.items() if one.lm_calls and step in (name, _TOTAL)]
    known = all(estimate.prices.get(name) for name in asking)
    return f"{usage.cost:.2f}" if known else "price not known"


def _best(result: SearchResult) -> str:
    best, own = (_examples(result, params) for params in (result.best_params, result.baseline_params))
    return (
        f"{result.best_score:.4g} on {best} of {result.n_examples} validation examples "
        f"(your own program: {result.baseline_score:.4g} on {own})"
    )


def _examples(result: SearchResult, params: object) -> int:
    """On how many a configuration was measured."""
    return next((len(m.scores) for m in result.configurations if m.params == params), 0)
