"""What a search returns."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mpromptune.show.page import write_report
from mpromptune.storage.findings import RESULT_VERSION, Findings, Measured

__all__ = ["RESULT_VERSION", "Measured", "SearchResult"]


@dataclass(frozen=True)
class SearchResult(Findings):
    """Outcome of `search`; for its attributes see `Findings`, for figures `mpromptune.plots`."""

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Writes one HTML page about the search, which needs nothing else to be read.

        It holds texts of prompts and demos. Without matplotlib it has no figures.

        Args:
            path: The file; overwritten if it exists.

        Returns:
            The path.
        """
        return write_report(self, path)
