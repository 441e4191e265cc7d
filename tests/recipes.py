"""Runs a recipe in a process of its own that is forked, so that nothing is imported twice."""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
from pathlib import Path

RECIPES = Path(__file__).parent.parent / "examples"


def run_recipe(name: str, folder: str) -> None:
    """Run ``python examples/NAME.py --stub`` in a folder, where the file ``printed`` has what it prints."""
    os.chdir(folder)
    sys.argv = [f"{name}.py", "--stub"]
    sys.path.insert(0, str(RECIPES))
    with Path("printed").open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
