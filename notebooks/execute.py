"""Executes the notebooks in place: ``python notebooks/execute.py``, or some of them by their paths."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
# Seconds that a cell may take; on a quiet machine the slowest takes about ten.
_TIMEOUT = 300
# Advice and progress bars of other libraries, which would go into the outputs.
_QUIET = {"PYTHONWARNINGS": "ignore", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}


def executed(path: Path) -> nbformat.NotebookNode:
    """A notebook with fresh outputs; what its cells write goes to a folder that is gone afterwards.

    Raises:
        CellExecutionError: A cell raises.
    """
    notebook = nbformat.read(path, as_version=4)
    environment = {**os.environ, **_QUIET, "PYTHONPATH": str(FOLDER.parent.absolute())}
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=_TIMEOUT,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        client.execute(env=environment)
    # Of the machine, and of no use to a reader.
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    return notebook


def main() -> None:
    """Command line."""
    paths = [Path(argument) for argument in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb"))
    for path in paths:
        nbformat.write(executed(path), path)


if __name__ == "__main__":
    main()
