"""Notes: what a score function says about a call beside its score, as JSON of limited size."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

# NOTE: most characters of one text in a note, about 1,000 tokens: enough to see what went wrong. Notes of a
# few calls are shown together to a language model. The smaller numbers are for notes with many long texts.
_LONGEST = (4000, 1000, 200)
# NOTE: most characters of a whole note as JSON, which is ASCII: MySQL allows 65,535 bytes in an attribute.
_MOST = 60_000
# NOTE: most nested containers in a note; it also ends cycles.
_DEEPEST = 8
# NOTE: integers of at most 64 bits are JSON everywhere.
_LARGEST = 2**63
# Attribute of an error that carries a note; it is an attribute so that it is sent to other processes with it.
_OF_ERROR = "mpromptune_note"


class Noted(float):
    """A score with a note, for score functions to return.

    Args:
        value: The score.
        note: JSON that says more about the call, such as feedback, inputs and outputs. Other values become
            text, and long texts are cut. None means no note.

    Attributes:
        note: The note.
    """

    note: Any

    def __new__(cls, value: float, note: Any = None) -> Noted:
        """Make the note plain."""
        noted = super().__new__(cls, value)
        noted.note = plain(note)
        return noted


def note_of(answer: float | BaseException) -> Any:
    """The note of a score or of an error; None if there is none."""
    return answer.note if isinstance(answer, Noted) else getattr(answer, "__dict__", {}).get(_OF_ERROR)


def attach_note(error: BaseException, note: Any) -> None:
    """Let an error carry a note."""
    vars(error)[_OF_ERROR] = plain(note)


def plain(value: Any) -> Any:
    """A value as JSON: what is not JSON becomes text, and long texts are cut.

    The result is equal after it was saved and read. None if there is too much even of short texts.
    """
    for longest in _LONGEST:
        note = _plain(value, longest)
        if len(json.dumps(note)) <= _MOST:
            return note
    return None


def _plain(value: Any, longest: int, depth: int = 0) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < _LARGEST:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if depth < _DEEPEST:
        inner = partial(_plain, longest=longest, depth=depth + 1)
        if isinstance(value, Mapping):
            return {_cut(key, longest): inner(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [inner(item) for item in value]
    return _cut(value, longest)


def _cut(value: Any, longest: int) -> str:
    text = as_text(value)
    cut = text if len(text) <= longest else f"{text[:longest]}..."
    return cut.encode("utf-8", "replace").decode()  # lone surrogates cannot be sent in a request


def as_text(value: Any) -> str:
    """The text of any value; the name of its class if it has none."""
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - the code of another class
        return f"<{type(value).__name__}>"
