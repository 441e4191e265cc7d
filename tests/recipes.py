"""Runs the recipes in one process that is forked, so that they import and load models once."""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
import traceback
from pathlib import Path

import dspy

RECIPES = Path(__file__).parent.parent / "examples"


def run_recipes(names: list[str], folder: str) -> None:
    """Run ``python examples/NAME.py --stub`` for each name, in a folder of that name.

    There, the file ``printed`` has what it prints, and ``failed`` the traceback of an error.
    """
    sys.path.insert(0, str(RECIPES))
    for name in names:
        place = Path(folder, name)
        place.mkdir()
        os.chdir(place)
        sys.argv = [f"{name}.py", "--stub"]
        dspy.configure(lm=None, adapter=None)  # those of the recipe before
        with Path("printed").open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
            try:
                runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
            except Exception:  # noqa: BLE001 - a recipe may raise any error, which the test shows
                Path("failed").write_text(traceback.format_exc(), encoding="utf-8")
