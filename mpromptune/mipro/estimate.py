"""What a compile will use, said before it asks an LM anything; and who may ask for that, and end it there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from dspy.teleprompt.mipro_optimizer_v2 import (
    BOOTSTRAPPED_FEWSHOT_EXAMPLES_IN_CONTEXT,
    LABELED_FEWSHOT_EXAMPLES_IN_CONTEXT,
)

from mpromptune.engine.options import SearchOptions
from mpromptune.execution.usage import StepUsage, Usage
from mpromptune.lms.metering import PerMillion

# DSPy shows its dataset summariser this many batches of examples after the first one, at most.
_MORE_BATCHES = 9


@dataclass(frozen=True)
class Estimate:
    """What a compile will use at most, but for retries.

    It reckons with one LM request for every predictor of a program, and without a cache. The search
    spends its program calls to the last few that no configuration can use; proposals are exact unless
    the dataset summary is complete early; the bootstrap stops at the first successes, so it seldom needs
    all of its calls.

    Attributes:
        usage: Per step, program calls and LM calls; and tokens and cost, once `with_tokens` has said
            how many a call takes.
        prices: Per step, US dollars per million prompt and completion tokens, where known.
    """

    usage: StepUsage
    prices: Mapping[str, PerMillion | None] = field(default_factory=dict)

    def with_tokens(self, prompt: float, completion: float) -> Estimate:
        """The same with tokens, and with dollars where prices are known.

        Args:
            prompt: Tokens sent in a typical LM request.
            completion: Tokens of a typical answer.
        """
        return replace(self, usage=StepUsage({k: self._typical(k, prompt, completion) for k in self.usage}))

    def with_price(self, prompt: float, completion: float) -> Estimate:
        """The same with a price of one's own for all models; before `with_tokens`.

        Args:
            prompt: US dollars per million tokens sent.
            completion: US dollars per million tokens received.
        """
        return replace(self, prices=dict.fromkeys(self.usage, (prompt, completion)))

    def _typical(self, step: str, prompt: float, completion: float) -> Usage:
        calls, price = self.usage[step].lm_calls, self.prices.get(step) or (0.0, 0.0)
        sent, received = round(calls * prompt), round(calls * completion)
        cost = (sent * price[0] + received * price[1]) / 1e6
        return replace(self.usage[step], prompt_tokens=sent, completion_tokens=received, cost=cost)

    def __str__(self) -> str:
        """One line for each step, and one for their sum."""
        rows = [*self.usage.items(), ("in total", self.usage.total)]
        return "\n".join(f"{name}: {self._line(name, usage)}" for name, usage in rows)

    def _line(self, step: str, usage: Usage) -> str:
        line = f"at most {usage.program_calls} program calls, {usage.lm_calls} LM calls"
        if usage.tokens:
            line += f", about {usage.tokens} tokens"
            unknown = [
                name for name in self.usage if not self.prices.get(name) and step in (name, "in total")
            ]
            line += f", price of {' and '.join(unknown)} not known" if unknown else f", ${usage.cost:.2f}"
        return line


def demo_numbers(given: Mapping[str, Any]) -> tuple[int, int]:
    """Bootstrapped and labelled demos of a set; a zero-shot run has some too, for the proposer to look at."""
    numbers = given["max_bootstrapped_demos"], given["max_labeled_demos"]
    zero_shot = BOOTSTRAPPED_FEWSHOT_EXAMPLES_IN_CONTEXT, LABELED_FEWSHOT_EXAMPLES_IN_CONTEXT
    return zero_shot if numbers == (0, 0) else numbers


def estimate(
    given: Mapping[str, Any],
    flags: Mapping[str, Any],
    instructions: int,
    search_calls: int,
    task_price: PerMillion | None = None,
    prompt_price: PerMillion | None = None,
) -> Estimate:
    """What a compile will use.

    Args:
        given: What DSPy passes to its bootstrap, by name.
        flags: Of ``compile``, for DSPy's proposer.
        instructions: Instructions wanted for each predictor.
        search_calls: Program calls of the search.
        task_price: US dollars per million prompt and completion tokens of the task model, if known.
        prompt_price: Those of the prompt model.
    """
    n, train_size = len(given["program"].predictors()), len(given["trainset"])
    sets, (bootstrapped, labelled) = given["num_fewshot_candidates"], demo_numbers(given)
    # Each set but the empty one and that of labelled examples takes the whole trainset at most.
    runs = max(sets - 1 - (labelled > 0), 0) * train_size if bootstrapped else 0
    # A request for each instruction, two more to describe program and module; and the summary's.
    requests = min(instructions, max(sets, 1)) * n * (3 if flags["program_aware_proposer"] else 1)
    if flags["data_aware_proposer"]:
        requests += 2 + min(math.ceil(train_size / flags["view_data_batch_size"]) - 1, _MORE_BATCHES)
    usage = StepUsage(
        bootstrap=Usage(program_calls=runs, lm_calls=runs * n),
        propose=Usage(lm_calls=requests),
        search=Usage(program_calls=search_calls, lm_calls=search_calls * n),
    )
    return Estimate(usage, {"bootstrap": task_price, "propose": prompt_price, "search": task_price})


class Interceptor:
    """Told of a compile before its first LM call, and may end it by raising; this one does nothing.

    It is how a command looks at the compile that a function of the user's performs.

    Attributes:
        options: Options that take the place of those given to the compile.
    """

    options: Mapping[str, Any] = {}

    def on_options(self, options: SearchOptions | None) -> None:
        """The options in force; None for DSPy's own search, of which nothing else is said."""

    def on_estimate(self, estimate: Callable[[], Estimate]) -> None:
        """What the whole compile would take."""


_INTERCEPTOR: ContextVar[Interceptor] = ContextVar("mpromptune_interceptor", default=Interceptor())  # noqa: B039


def interceptor() -> Interceptor:
    """That of this context."""
    return _INTERCEPTOR.get()


@contextmanager
def intercepting(own: Interceptor) -> Iterator[None]:
    """Every compile in this context is told to ``own``."""
    token = _INTERCEPTOR.set(own)
    try:
        yield
    finally:
        _INTERCEPTOR.reset(token)
