"""Makes the result of a search from its evidence, at its end or when it stops early."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from optuna.study import Study

from mpromptune.engine.batches import BatchPlan
from mpromptune.engine.evidence import Evidence
from mpromptune.engine.growth import regrow
from mpromptune.engine.minibatches import Minibatches, MiproPlan
from mpromptune.engine.plan import Plan, Task
from mpromptune.engine.proposers import visible_examples
from mpromptune.engine.result import Measured, SearchResult
from mpromptune.engine.scores import ScoreTable
from mpromptune.errors import SearchStoppedError
from mpromptune.execution.limits import MEASURE, Budget
from mpromptune.model.space import Candidate, PromptSpace, Row
from mpromptune.sampling.encoding import encode_prompts
from mpromptune.storage.proposals import read_proposals

logger = logging.getLogger(__name__)


@dataclass
class Summary:
    """Makes the result of a search.

    Attributes:
        space: The configurations.
        plan: Chooses the winner.
        evidence: The scores and the model.
        budget: The usage.
        binding: Name of the limit that allows fewer calls than the plan has, if any.
    """

    space: PromptSpace
    plan: Plan
    evidence: Evidence
    budget: Budget
    binding: str | None = None

    def afford(self) -> None:
        """Tell the plan how many calls the limits on tokens, cost and time allow."""
        table, max_calls = self.evidence.table, self.plan.task.max_calls
        left = self.budget.calls_left(table.usage, table.calls, table.proposal_usage)
        if left is None:
            return
        name, calls = left
        price = partial(table.relative_use, MEASURE[name])
        dearest = max(map(price, table.rows), default=1.0)
        spent = table.calls + table.proposal_calls
        if calls >= dearest * (max_calls - spent):  # enough even if all calls are of the dearest row
            self.binding = None
            self.plan.afford(max_calls, lambda row: 1.0)
        else:
            self.binding = name if spent + calls < max_calls else None
            self.plan.afford(spent + calls, price)

    def result(self, study: Study) -> SearchResult:
        """The result of a search that has ended.

        Raises:
            SearchStoppedError: A limit was reached before the first score.
        """
        ranked = self.evidence.best_first(self.evidence.table.rows)
        limit = self.budget.reached or self.binding
        if limit is not None and not ranked:
            raise SearchStoppedError(
                f"{limit} was reached before anything was measured: {self.budget.usage.total}. Raise it, and "
                "pass the same storage to go on.",
                study,
            )
        # A plan that a limit has cut short may not have measured its winner in full.
        return self._of(self.plan.winner(ranked, is_cut_short=limit is not None), ranked, study)

    def so_far(self, study: Study) -> SearchResult | None:
        """The result of a search that stopped early; None without scores or if an error is raised here."""
        try:
            ranked = self.evidence.best_first(self.evidence.table.rows)
            return self._of(self.plan.winner(ranked, is_cut_short=True), ranked, study) if ranked else None
        except Exception:
            logger.exception("No result could be made from the scores so far.")
            return None

    def _of(self, winner: Row, ranked: Sequence[Row], study: Study) -> SearchResult:
        found = _found(study, self.space, self.plan, self.evidence, winner, ranked)
        limit = self.budget.reached or self.binding
        return replace(
            found,
            usage=self.budget.usage,
            stopped_by=limit,
            overspent=self.budget.overspent(limit),
            space=self.space,
            distances=self.evidence.encoding.distances(),
            drawn=self.evidence.drawn(),
            text_chance=self.evidence.text_chance(),
        )


def result_of_study(
    study: Study,
    arguments: Mapping[str, Any],
    table: ScoreTable,
    space: PromptSpace,
    text_of: Callable[[Any], Candidate],
) -> SearchResult | None:
    """The result of a search from its study alone, by a model without the texts of candidates.

    Args:
        study: The study.
        arguments: The arguments of the search, from the study's settings.
        table: All scores of the study.
        space: The configurations; gets the candidates that were written during the search.
        text_of: The text or texts of such a candidate as it is saved.

    Returns:
        The result that the search would return if it were cut short now; None without scores.
    """
    # Enough for any plan; no call is made.
    calls = 100 * table.n_examples + table.asked_calls
    task = Task(table.n_examples, calls, space.row(arguments["baseline"]), space.size, arguments["seed"])
    plan: Plan = BatchPlan(task, table, confirm=True)
    if arguments["schedule"] == "mipro":
        sizes = arguments["minibatch_size"], arguments["minibatch_full_eval_steps"]
        plan = MiproPlan(task, table, minibatches=Minibatches(*sizes))
    evidence = Evidence(encode_prompts(space, None), table)
    regrow(space, read_proposals(study), text_of)
    ranked = evidence.best_first(table.rows)
    if not ranked:
        return None
    result = _found(study, space, plan, evidence, plan.winner(ranked, is_cut_short=True), ranked)
    return result if arguments.get("combinations") is not None else replace(result, drawn=evidence.drawn())


def _found(
    study: Study, space: PromptSpace, plan: Plan, evidence: Evidence, winner: Row, ranked: Sequence[Row]
) -> SearchResult:
    """The parts of a result that the scores give; mean scores are predicted if examples are missing.

    A winner whose score equals the baseline's is no gain: the baseline is kept.
    """

    def score(row: Row) -> tuple[float, tuple[float, float]]:
        mean, *interval = [table.mean(row)] * 3 if plan.is_full(row) else evidence.whole_score(row)
        return mean, (interval[0], interval[1])

    table = evidence.table
    if score(winner)[0] == score(plan.task.baseline)[0]:
        winner = plan.task.baseline
    best_score, best_interval = score(winner)
    baseline_score, baseline_interval = score(plan.task.baseline)
    proposals = read_proposals(study)
    posterior = zip(*(values.tolist() for values in evidence.posterior(ranked)), strict=True)
    return SearchResult(
        best_params=space.params(winner),
        best_score=best_score,
        baseline_score=baseline_score,
        best_interval=best_interval,
        baseline_interval=baseline_interval,
        calls=table.calls,
        n_examples=table.n_examples,
        configurations=tuple(
            Measured(space.params(row), table.means(row), mean, deviation, plan.is_full(row))
            for row, (mean, deviation) in zip(ranked, posterior, strict=True)
        ),
        study=study,
        proposals=proposals,
        visible=visible_examples(table.n_examples, plan.task.seed) if proposals else frozenset(),
        gains=evidence.gains(),
    )
