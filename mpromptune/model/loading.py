"""Loading models of transformers without its progress bars and its report of weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from mpromptune.model.shared import Shared, message_of


@contextmanager
def _quiet() -> Iterator[None]:
    """Turn the bars off, and filter the report, as it was before in the end."""
    from transformers.utils import logging as settings

    handlers = [*logging.getLogger("transformers").handlers]
    had_bars = settings.is_progress_bar_enabled()
    if had_bars:
        settings.disable_progress_bar()
    for handler in handlers:
        handler.addFilter(_is_needed)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_is_needed)
        if had_bars:
            settings.enable_progress_bar()


def _is_needed(record: logging.LogRecord) -> bool:
    """Whether to show a record: not a report of weights that are in the file and not in the model."""
    text = message_of(record)
    return "LOAD REPORT" not in text or "MISSING" in text or "MISMATCH" in text


quiet_loading = Shared(_quiet)
