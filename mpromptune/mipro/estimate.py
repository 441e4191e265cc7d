"""The estimated usage of a compile before its first LM call, and interceptors that may end it there."""

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

# The row of proposals during the search in an estimate.
WRITING = "proposals"
# DSPy shows its dataset summariser at most this many batches of examples after the first one.
_MORE_BATCHES = 9


@dataclass(frozen=True)
class Estimate:
    """An upper estimate of the usage of a compile, without retries.

    It assumes one LM request per predictor of a program, and no cache. The search spends nearly all of its
    program calls. The number of proposals is exact unless the dataset summary is complete early. The
    bootstrap rarely needs all of its calls, because it stops after enough successes.

    Proposals during the search (``proposals="adaptive"``) are a row of their own here, as many as there is
    room for; searches of the benchmarks write one candidate for every 100 to 250 program calls. Each request
    takes the place of a program call, so the two rows are never reached together. In results they count for
    the step ``"propose"``.

    Attributes:
        usage: Program calls and LM calls of each step; also tokens and cost after `with_tokens`.
        prices: US dollars per million prompt and completion tokens of each step, if known.
    """

    usage: StepUsage
    prices: Mapping[str, PerMillion | None] = field(default_factory=dict)

    @property
    def by_step(self) -> StepUsage:
        """The usage of each step, by the names that results have."""
        steps = dict(self.usage)
        written = steps.pop(WRITING, Usage())
        return StepUsage(steps, propose=steps["propose"] + written)

    def with_tokens(self, prompt: float, completion: float) -> Estimate:
        """The estimate with tokens, and with the cost if prices are known.

        Args:
            prompt: Tokens sent in a typical LM request.
            completion: Tokens of a typical answer.
        """
        return replace(self, usage=StepUsage({k: self._typical(k, prompt, completion) for k in self.usage}))

    def with_price(self, prompt: float, completion: float) -> Estimate:
        """The estimate with one price for all models; call it before `with_tokens`.

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
    """Numbers of bootstrapped and labelled demos in a set; zero-shot runs need some for the proposer."""
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
    written: int = 0,
    writing_price: PerMillion | None = None,
) -> Estimate:
    """Estimate the usage of a compile.

    Args:
        given: The arguments that DSPy passes to its bootstrap, by name.
        flags: The arguments of ``compile`` for DSPy's proposer.
        instructions: Number of instructions for each predictor.
        search_calls: Program calls of the search.
        task_price: US dollars per million prompt and completion tokens of the task model, if known.
        prompt_price: The same for the prompt model.
        written: Most LM requests of proposals during the search.
        writing_price: The price of their model.
    """
    n, train_size = len(given["program"].predictors()), len(given["trainset"])
    sets, (bootstrapped, labelled) = given["num_fewshot_candidates"], demo_numbers(given)
    # Every set except the empty one and the one of labelled examples needs at most the whole trainset.
    runs = max(sets - 1 - (labelled > 0), 0) * train_size if bootstrapped else 0
    # One request for each instruction, two more to describe program and module; and those of the summary.
    requests = min(instructions, max(sets, 1)) * n * (3 if flags["program_aware_proposer"] else 1)
    if flags["data_aware_proposer"]:
        requests += 2 + min(math.ceil(train_size / flags["view_data_batch_size"]) - 1, _MORE_BATCHES)
    usage = StepUsage(
        bootstrap=Usage(program_calls=runs, lm_calls=runs * n),
        propose=Usage(lm_calls=requests),
        search=Usage(program_calls=search_calls, lm_calls=search_calls * n),
    )
    prices = {"bootstrap": task_price, "propose": prompt_price, "search": task_price}
    if written:
        usage[WRITING], prices[WRITING] = Usage(lm_calls=written), writing_price
    return Estimate(usage, prices)


class Interceptor:
    """Receives the options and estimate of a compile before its first LM call, and may raise to end it.

    Commands use it to inspect the compile in a user's function. This base class does nothing.

    Attributes:
        options: Options that override those given to the compile.
        next_step: What to do after the compile, for the live view; None for the lines of code that save its
            result.
    """

    options: Mapping[str, Any] = {}
    next_step: str | None = None

    def on_options(self, options: SearchOptions | None) -> None:
        """Called with the options of a compile; None for DSPy's own search, which has no estimate."""

    def on_estimate(self, estimate: Callable[[], Estimate]) -> None:
        """Called with a function that estimates the whole compile."""


_INTERCEPTOR: ContextVar[Interceptor] = ContextVar("mpromptune_interceptor", default=Interceptor())  # noqa: B039


def interceptor() -> Interceptor:
    """The interceptor of this context."""
    return _INTERCEPTOR.get()


@contextmanager
def intercepting(own: Interceptor) -> Iterator[None]:
    """A context in which ``own`` is the interceptor of every compile."""
    token = _INTERCEPTOR.set(own)
    try:
        yield
    finally:
        _INTERCEPTOR.reset(token)
