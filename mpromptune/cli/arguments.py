"""Arguments of several commands, and where they print."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")


def output_console() -> Console:
    """The console of the standard output."""
    from rich.console import Console

    return Console(file=sys.stdout)


def announce(text: str) -> None:
    """Say on the standard error what takes a while, before it begins."""
    sys.stderr.write(f"mpromptune: {text}\n")
    sys.stderr.flush()


def add_output(command: argparse.ArgumentParser, what: str, default: str, kind: Any) -> None:
    """Add ``--output`` for ``what``."""
    text = f"where to save {what} (default: ./{default})"
    command.add_argument("--output", type=kind, default=Path(default), help=text)


def program_file(text: str) -> Path:
    """A .json file that can be written."""
    path = Path(text)
    if path.suffix != ".json" or path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"must be a .json file in a folder that exists and can be written; got {text!r}"
        )
    return path


def positive(text: str) -> int:
    """An integer of at least 1."""
    return _number(int, text, lambda value: value >= 1, "an integer of at least 1")


def up_to(most: int) -> Callable[[str], int]:
    """The type of an argument that is an integer from 1 to ``most``."""

    def integer(text: str) -> int:
        return _number(int, text, lambda value: 1 <= value <= most, f"from 1 to {most:,}")

    return integer


def amount(text: str) -> float:
    """A finite number of at least 0."""
    return _number(float, text, lambda value: 0 <= value < float("inf"), "a number of at least 0")


def _number(kind: Callable[[str], T], text: str, is_valid: Callable[[T], bool], wanted: str) -> T:
    with suppress(ValueError):
        if is_valid(value := kind(text)):
            return value
    raise argparse.ArgumentTypeError(f"must be {wanted}; got {text!r}")
