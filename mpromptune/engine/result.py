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
    """The result of `search`; its attributes are those of `Findings`, `mpromptune.plots` draws figures."""

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write a report of the search as one self-contained HTML page.

        It contains texts of prompts and demos. Without matplotlib it has no figures.

        Args:
            path: The file; overwritten if it exists.

        Returns:
            The path.
        """
        return write_report(self, path)
