"""Batch Bayesian optimisation of the prompts of DSPy programs.

Names are imported at first use, so that torch and sentence-transformers are loaded only with a sampler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpromptune.engine.result import SearchResult
    from mpromptune.engine.search import search
    from mpromptune.errors import MPromptuneError
    from mpromptune.execution.attempts import RetryPolicy
    from mpromptune.execution.limits import Limits
    from mpromptune.execution.notes import Noted
    from mpromptune.execution.usage import Usage
    from mpromptune.mipro.optimizer import MIPROv2
    from mpromptune.model.space import PromptSpace
    from mpromptune.sampling.sampler import qEISampler
    from mpromptune.show.progress import Progress

__version__ = "0.3.0.dev0"

_HOME = {
    "Limits": "execution.limits",
    "MIPROv2": "mipro.optimizer",
    "MPromptuneError": "errors",
    "Noted": "execution.notes",
    "Progress": "show.progress",
    "PromptSpace": "model.space",
    "RetryPolicy": "execution.attempts",
    "SearchResult": "engine.result",
    "Usage": "execution.usage",
    "qEISampler": "sampling.sampler",
    "search": "engine.search",
}

__all__ = [
    "Limits",
    "MIPROv2",
    "MPromptuneError",
    "Noted",
    "Progress",
    "PromptSpace",
    "RetryPolicy",
    "SearchResult",
    "Usage",
    "qEISampler",
    "search",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
