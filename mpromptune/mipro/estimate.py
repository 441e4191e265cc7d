"""What a compile will use, said before it asks an LM anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mpromptune.execution.usage import StepUsage, Usage
from mpromptune.lms.prices import PerMillion
from mpromptune.mipro.bootstrap import demos_wanted

# DSPy shows its dataset summariser this many batches of examples after the first one, at most.
_MORE_BATCHES = 9
# Whose requests these are; the others go to the task model.
_PROMPT_MODEL = "propose"


@dataclass(frozen=True)
class Plan:
    """What determines the requests of a compile.

    Attributes:
        predictors: Predictors of the program.
        train_size: Examples for the bootstrap.
        demo_sets: Demo sets of each predictor, the empty one and the labelled one included.
        bootstrapped: Whether demos are bootstrapped at all.
        labelled: Whether one set holds labelled examples only.
        instructions: Instructions wanted for each predictor.
        describes_program: Whether each proposal has program and module described first.
        summary_batch: Examples in a batch for the dataset summary; 0 for no summary.
        search_calls: Program calls of the search.
    """

    predictors: int
    train_size: int
    demo_sets: int
    bootstrapped: bool
    labelled: bool
    instructions: int
    describes_program: bool
    summary_batch: int
    search_calls: int

    @classmethod
    def of(
        cls, given: Mapping[str, Any], flags: Mapping[str, Any], instructions: int, search_calls: int
    ) -> Plan:
        """From what DSPy passes to its bootstrap, and the flags of ``compile`` for its proposer."""
        bootstrapped, labelled = demos_wanted(given)
        batch = flags["view_data_batch_size"] if flags["data_aware_proposer"] else None
        return cls(
            predictors=len(given["program"].predictors()),
            train_size=len(given["trainset"]),
            demo_sets=given["num_fewshot_candidates"],
            bootstrapped=bootstrapped > 0,
            labelled=labelled > 0,
            instructions=instructions,
            describes_program=bool(flags["program_aware_proposer"]),
            summary_batch=batch or 0,
            search_calls=search_calls,
        )

    @property
    def bootstrap_runs(self) -> int:
        """At most all examples for each set that is bootstrapped."""
        sets = self.demo_sets - 1 - self.labelled if self.bootstrapped else 0
        return max(sets, 0) * self.train_size

    @property
    def proposal_requests(self) -> int:
        """One for each instruction, two more to describe program and module; and the summary's."""
        each = min(self.instructions, max(self.demo_sets, 1))
        requests = each * self.predictors * (3 if self.describes_program else 1)
        if not self.summary_batch:
            return requests
        batches = math.ceil(self.train_size / self.summary_batch) - 1
        return requests + 2 + min(batches, _MORE_BATCHES)


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


def estimate(plan: Plan, task_price: PerMillion | None, prompt_price: PerMillion | None) -> Estimate:
    """Of the requests that ``plan`` determines.

    Args:
        plan: The compile.
        task_price: US dollars per million prompt and completion tokens of the task model, if known.
        prompt_price: Those of the prompt model.
    """
    runs, calls = plan.bootstrap_runs, plan.search_calls
    usage = StepUsage(
        bootstrap=Usage(program_calls=runs, lm_calls=runs * plan.predictors),
        propose=Usage(lm_calls=plan.proposal_requests),
        search=Usage(program_calls=calls, lm_calls=calls * plan.predictors),
    )
    prices = {step: prompt_price if step == _PROMPT_MODEL else task_price for step in usage}
    return Estimate(usage, prices)
