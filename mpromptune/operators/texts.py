"""Candidates as texts: what the search, the storage and the guards see of instructions and demos."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import dspy

# Long runs of base64, as in data URLs of images and audio; they are replaced by digests.
_BINARY = re.compile(r"[A-Za-z0-9+/_-]{256,}={0,2}")
# Chinese characters and kana are words of their own, because nothing separates their words.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")


def candidate_text(candidate: str | Sequence[Any]) -> Any:
    """The text of an instruction, or the texts of the demos of a demo set."""
    return candidate if isinstance(candidate, str) else [demo_text(demo) for demo in candidate]


def demo_text(demo: Any) -> str:
    """All fields of a demo as text; binary content is replaced by digests."""
    fields = demo.items() if hasattr(demo, "items") else [("demo", demo)]
    return "\n".join(f"{name}: {value_text(value)}" for name, value in fields if name != "augmented")


def value_text(value: Any) -> str:
    """A value as text; binary content is replaced by digests."""
    return _BINARY.sub(_digest, str(value))


def _digest(match: re.Match[str]) -> str:
    return hashlib.sha256(match.group().encode()).hexdigest()[:16]


def encodable(value: Any) -> Any:
    """A text with ``?`` for every lone surrogate; other values are unchanged.

    LMs return lone surrogates when they cut an emoji in two. A text with one cannot be sent in a request,
    written to a file, or be the docstring of a class, such as DSPy's signatures.
    """
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def encodable_demo(demo: Any) -> Any:
    """A demo whose fields are `encodable`; the same object if nothing changes."""
    if not isinstance(demo, dspy.Example):
        return demo
    texts = {name: encodable(value) for name, value in demo.items()}
    changed = {name: text for name, text in texts.items() if text is not demo[name] and text != demo[name]}
    return demo.copy(**changed) if changed else demo


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.casefold())


def shortened(value: Any, most: int) -> str:
    """A value as text of about ``most`` characters at most; it says how many were cut."""
    text = str(encodable(value_text(value)))
    return text if len(text) <= most else f"{text[:most]} [{len(text) - most:,} more characters]"
