"""What answers of language models cost, from the usage that they report."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import dspy

logger = logging.getLogger(__name__)

PerMillion = tuple[float, float]
Prices = Mapping[str, PerMillion] | Callable[[str, Mapping[str, Any]], float]


class Pricing:
    """US dollars of an answer: as given, as the provider reports it, or as LiteLLM knows it.

    Args:
        prices: Model to US dollars per million prompt and completion tokens; or a callable
            ``(model, usage) -> dollars``.
        must_know: Whether a model without a price is worth a warning.
    """

    def __init__(self, prices: Prices | None = None, must_know: bool = False) -> None:
        self._prices = prices or {}
        self._must_know = must_know
        self._known: dict[str, PerMillion | None] = {}
        self._warned: set[str] = set()
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:  # each process has its own lock
        return Pricing, (self._prices, self._must_know)

    def cost(self, lm: Any, model: str, usage: Mapping[str, Any]) -> float:
        """Of one answer; 0 if nobody knows."""
        if callable(self._prices):
            return self._asked(self._prices, model, usage)
        reported = usage.get("cost")
        if model not in self._prices and isinstance(reported, int | float) and reported > 0:
            return float(reported)
        price = self.of(lm, model)
        prompt, completion = tokens_of(usage)
        return (price[0] * prompt + price[1] * completion) / 1e6 if price else 0.0

    def _asked(self, prices: Callable[..., float], model: str, usage: Mapping[str, Any]) -> float:
        """An answer is counted whatever becomes of its price."""
        try:
            return float(prices(model, usage))
        except Exception as error:  # noqa: BLE001 - the user's own code
            self._warn(model, "prices(%r, ...) raised %s: its answers count as free.", model, repr(error))
            return 0.0

    def _warn(self, model: str, message: str, *args: str) -> None:
        with self._lock:
            first = model not in self._warned
            self._warned.add(model)
        if first:
            logger.warning(message, *args)

    def of(self, lm: Any, model: str) -> PerMillion | None:
        """US dollars per million prompt and completion tokens, if known."""
        if callable(self._prices):
            return None
        with self._lock:
            if model not in self._known:
                self._known[model] = self._prices.get(model) or _listed(lm, model)
            price = self._known[model]
        if price is None and self._must_know:
            message = (
                "No price is known for %r: its answers count as free. Give prices={%r: (US dollars per "
                "million prompt tokens, completion tokens)}."
            )
            self._warn(model, message, model, model)
        return price


def tokens_of(usage: Mapping[str, Any]) -> tuple[int, int]:
    """Prompt and completion tokens, by the names of either of OpenAI's APIs."""
    prompt = usage.get("prompt_tokens", usage.get("input_tokens")) or 0
    completion = usage.get("completion_tokens", usage.get("output_tokens")) or 0
    return int(prompt), int(completion)


def _listed(lm: Any, model: str) -> PerMillion | None:
    """LiteLLM's list price; only of DSPy's own LM, whose models go by LiteLLM's names."""
    if not isinstance(lm, dspy.LM):
        return None
    try:
        import litellm

        litellm.suppress_debug_info = (
            True  # as DSPy sets it: it prints a link for names that it does not know
        )
        prompt, completion = litellm.cost_per_token(
            model=model, prompt_tokens=1_000_000, completion_tokens=1_000_000
        )
    except Exception:  # noqa: BLE001 - it has errors of many kinds for a name that it does not know
        return None
    return float(prompt), float(completion)
