"""An LM that travels to other processes, and writes down where it is asked."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
from lms import arithmetic_lm, completion, requested_fields
from remote_scores import kill_worker, write


class WrittenLM(dspy.BaseLM):
    """`lms.arithmetic_lm`, which travels, with a line in a file for each answer.

    Args:
        log: The file.
        dies: So many lines later, the worker is killed while it asks.
    """

    def __init__(self, log: Path, dies: int | None = None) -> None:
        super().__init__("scripted", "chat", 0.0, 1000, False)
        self.log, self.dies = log, dies

    def forward(self, prompt: str | None = None, messages: list | None = None, **kwargs: Any) -> Any:
        messages = messages or [{"role": "user", "content": prompt}]
        where = "away" if multiprocessing.parent_process() is not None else "here"
        write(self.log, f"start {where}")
        if self.dies is not None and len(self.log.read_text().splitlines()) >= self.dies and where == "away":
            kill_worker(self.log.with_suffix(".killed"))
        fields = "\n\n".join(f"[[ ## {f} ## ]]\n{_ANSWER(f, messages)}" for f in requested_fields(messages))
        write(self.log, f"end {where}")
        return completion(fields + "\n\n[[ ## completed ## ]]", self.model)

    def copy(self, **kwargs: Any) -> WrittenLM:
        return self


_ANSWER: Callable[[str, list], str] = arithmetic_lm()._answer
