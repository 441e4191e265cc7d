"""The usage and the cost of requests to language models, as DSPy and the providers report them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import dspy

from mpromptune.execution.usage import Meter, current_meter, metered

logger = logging.getLogger(__name__)

PerMillion = tuple[float, float]
Prices = Mapping[str, PerMillion] | Callable[[str, Mapping[str, Any]], float]

# Name of the DSPy setting with the meter: DSPy's thread pools inherit settings, but no context variables.
METER = "mpromptune_meter"

_FORWARDING = threading.Lock()


@contextmanager
def measured(meter: Meter | None = None) -> Iterator[Meter]:
    """Like `metered`, but also for LM requests made in DSPy's own threads."""
    with metered(meter) as inner, dspy.context(**{METER: inner}):
        yield inner


def meter_of_requests() -> Meter | None:
    """The meter of the LM requests of this context."""
    return dspy.settings.get(METER) or current_meter()


def settings_of(lm: Any, kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings of a request: those of its LM, overridden by its own."""
    return {"cache": getattr(lm, "cache", False), **(getattr(lm, "kwargs", None) or {}), **(kwargs or {})}


class Relay:
    """DSPy's usage tracker for one request: records its usage and passes it on to the user's tracker."""

    def __init__(self, tracker: Any) -> None:
        self.entries: list[tuple[str, dict[str, Any]]] = []
        self.wraps_another = False
        self.outer: Any = tracker
        if isinstance(tracker, Relay):  # an LM that calls another LM
            tracker.wraps_another = True
            self.outer = tracker.outer

    def add_usage(self, model: str, usage: Mapping[str, Any]) -> None:
        """Like the method of DSPy's tracker, which is not safe for threads."""
        self.entries.append((model, dict(usage)))
        if self.outer is not None:
            with _FORWARDING:
                self.outer.add_usage(model, usage)

    def get_total_tokens(self) -> Any:
        """Like the method of DSPy's tracker."""
        return {} if self.outer is None else self.outer.get_total_tokens()

    def usages(self, lm: Any, inputs: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """The models called for this request, and their reported usage; empty if a cache answered.

        Up to 3.2, DSPy tracks only its own LM; for others, the LM's history has the usage.
        """
        if self.entries or isinstance(lm, dspy.LM) or hasattr(dspy.BaseLM, "_record_response"):
            return self.entries
        for entry in reversed(list(getattr(lm, "history", ()))):
            if all(entry.get(name) is inputs.get(name) for name in ("prompt", "messages")):
                hit = getattr(entry.get("response"), "cache_hit", False)
                return [(lm.model, {} if hit else dict(entry.get("usage") or {}))]
        return []


class Pricing:
    """The cost of an answer in US dollars: by given prices, as the provider reports it, or by LiteLLM's list.

    Args:
        prices: Model to US dollars per million prompt and completion tokens; or a callable
            ``(model, usage) -> dollars``.
        must_know: Whether to warn of a model without a price.
    """

    def __init__(self, prices: Prices | None = None, must_know: bool = False) -> None:
        self._prices = prices or {}
        self._must_know = must_know
        self._warned: set[str] = set()

    def cost(self, lm: Any, model: str, usage: Mapping[str, Any]) -> float:
        """The cost of one answer; 0 if it is unknown."""
        if callable(self._prices):
            try:
                return float(self._prices(model, usage))
            except Exception as error:  # noqa: BLE001 - user code; its answers are still counted
                self._warn(model, f"prices({model!r}, ...) raised {error!r}: its answers count as free.")
                return 0.0
        reported = usage.get("cost")
        if model not in self._prices and isinstance(reported, int | float) and reported > 0:
            return float(reported)
        price = self.of(lm, model)
        prompt, completion = tokens_of(usage)
        return (price[0] * prompt + price[1] * completion) / 1e6 if price else 0.0

    def of(self, lm: Any, model: str) -> PerMillion | None:
        """US dollars per million prompt and completion tokens, if known."""
        if callable(self._prices):
            return None
        # Only DSPy's own LM uses LiteLLM's names.
        price = self._prices.get(model) or (_listed(model) if isinstance(lm, dspy.LM) else None)
        if price is None and self._must_know:
            self._warn(
                model,
                f"No price is known for {model!r}: its answers count as free. Pass prices={{{model!r}: (US "
                "dollars per million prompt tokens, completion tokens)}.",
            )
        return price

    def _warn(self, model: str, message: str) -> None:
        if model not in self._warned:
            self._warned.add(model)
            logger.warning(message)


def tokens_of(usage: Mapping[str, Any]) -> tuple[int, int]:
    """Prompt and completion tokens, by the names of either of OpenAI's APIs."""
    prompt = usage.get("prompt_tokens", usage.get("input_tokens")) or 0
    completion = usage.get("completion_tokens", usage.get("output_tokens")) or 0
    return int(prompt), int(completion)


@lru_cache
def _listed(model: str) -> PerMillion | None:
    """LiteLLM's list price."""
    try:
        import litellm

        litellm.suppress_debug_info = True  # as DSPy sets it; otherwise unknown names print a link
        prices = litellm.cost_per_token(model=model, prompt_tokens=1_000_000, completion_tokens=1_000_000)
    except Exception:  # noqa: BLE001 - LiteLLM raises various errors for an unknown name
        return None
    return float(prices[0]), float(prices[1])
