"""What the demo prints: quiet compile steps, and a table at the end."""

from __future__ import annotations

import contextlib
import io
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from optuna.exceptions import ExperimentalWarning
from rich.console import Console
from rich.table import Table

from mpromptune.mipro.optimizer import MIPROv2

_CHATTY = ("dspy", "optuna")
# DSPy's own proposer makes DSPy warn, twice for every instruction.
_SELF_INFLICTED = "Input contains fields not in signature"


class SteppedMIPROv2(MIPROv2):
    """MIPROv2 whose instructions are in alphabetical order.

    Args:
        console: Where DSPy's own first two steps are named; None where the live view does that.
        **kwargs: As `MIPROv2`.
    """

    def __init__(self, console: Console | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._console = console

    def _bootstrap_fewshot_examples(self, *args: Any, **kwargs: Any) -> Any:
        with _step(self._console, "Bootstrapping demos"):
            return super()._bootstrap_fewshot_examples(*args, **kwargs)

    def _propose_instructions(self, *args: Any, **kwargs: Any) -> Any:
        with _step(self._console, "Proposing instructions"):
            proposed = super()._propose_instructions(*args, **kwargs)
        # They are asked for concurrently, and a replay hands them out as they are asked for.
        return {i: [own, *sorted(others)] for i, (own, *others) in proposed.items()}


@contextlib.contextmanager
def _step(console: Console | None, title: str) -> Iterator[None]:
    """Swallows what a step prints, and says how long it took."""
    if console is None:
        yield
        return
    start = time.monotonic()
    sink = io.StringIO()
    with console.status(title), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield
    console.print(f"{title}: {time.monotonic() - start:.1f} s", highlight=False)


class _Relay(logging.Filter):
    """Drops a handler's narration, and shows warnings and errors on the console instead."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if record.levelno >= logging.WARNING and not message.startswith(_SELF_INFLICTED):
            self._console.print(f"{record.name}: {message}", style="yellow", markup=False)
        return False


@contextlib.contextmanager
def quiet_libraries(console: Console) -> Iterator[None]:
    """Keeps DSPy's and Optuna's narration off the screen while the demo runs.

    Logging levels are left alone: the handlers get a filter, and lose it again.
    """
    relay = _Relay(console)
    handlers = [handler for name in _CHATTY for handler in logging.getLogger(name).handlers]
    for handler in handlers:
        handler.addFilter(relay)
    try:
        with warnings.catch_warnings():
            # The replayed LM is of the kind that DSPy 3.2 knows, which 3.4 deprecates.
            warnings.filterwarnings("ignore", message=".*BaseLM.forward", category=DeprecationWarning)
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(relay)


def show_header(console: Console, title: str, notes: Sequence[tuple[str, str]]) -> None:
    """What is about to run, and what of it is replayed or simulated."""
    console.rule(title, align="left")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    for name, text in notes:
        grid.add_row(name, text)
    console.print(grid, highlight=False)
    console.rule()


def show_results(console: Console, rows: Sequence[tuple[str, str]], path: str) -> None:
    """The closing table, and where the program went."""
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table, highlight=False)
    # Outside the table, which would break a long path.
    console.print(f"Compiled program saved to {path}", soft_wrap=True, highlight=False, markup=False)
