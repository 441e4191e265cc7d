"""Arguments of several commands, and where they print."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


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
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {text}")
    return value


def up_to(most: int) -> Callable[[str], int]:
    """The type of an argument that is an integer from 1 to ``most``."""

    def integer(text: str) -> int:
        value = int(text)
        if not 1 <= value <= most:
            raise argparse.ArgumentTypeError(f"must be from 1 to {most:,}; got {text}")
        return value

    return integer


def amount(text: str) -> float:
    """A finite number of at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or more; got {text}")
    return value
