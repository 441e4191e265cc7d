"""Batch Bayesian optimisation of the prompts of DSPy programs.

Names are imported at first use: torch and sentence-transformers are loaded only when a sampler is.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpromptune.engine import search
    from mpromptune.errors import MPromptuneError
    from mpromptune.limits import Limits
    from mpromptune.optimizer import MIPROv2
    from mpromptune.result import SearchResult
    from mpromptune.sampler import qEISampler
    from mpromptune.space import PromptSpace

__version__ = "0.1.0"

_HOME = {
    "Limits": "limits",
    "MIPROv2": "optimizer",
    "MPromptuneError": "errors",
    "PromptSpace": "space",
    "SearchResult": "result",
    "qEISampler": "sampler",
    "search": "engine",
}

__all__ = [
    "Limits",
    "MIPROv2",
    "MPromptuneError",
    "PromptSpace",
    "SearchResult",
    "qEISampler",
    "search",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
