"""Asks proposers for candidates, in threads beside the program calls."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from mpromptune.engine.evidence import Evidence
from mpromptune.engine.growth import Growth
from mpromptune.engine.proposers import Brief, Candidates, Texts
from mpromptune.engine.scores import ScoreTable
from mpromptune.execution.attempts import Attempts
from mpromptune.execution.interrupts import Stopped, contained
from mpromptune.execution.usage import Meter, metered
from mpromptune.model.space import Row
from mpromptune.storage.findings import Measured
from mpromptune.storage.proposals import Proposal

# NOTE: fraction of the validation examples that proposers may see. The others show whether a winner that was
# written from these is good only on them.
_VISIBLE = 0.6
# Most characters of a refusal that are saved.
_SHOWN = 500

Keep = Callable[[Proposal], None]


@dataclass
class Writing:
    """Makes proposals.

    Attributes:
        growth: The proposers, and the space, which gains the texts of what is written.
        seed: Seed of the search.
        executor: Runs the proposers, beside the program calls.
        attempts: Repeats a request while another attempt may succeed.
        meter: Counts the usage of proposals.
        candidates: Makes what is written usable for the score function.
        notes: What the score function said about pairs, beside their scores.
    """

    growth: Growth
    seed: int
    executor: Executor
    attempts: Attempts
    meter: Meter
    candidates: Candidates = field(default_factory=Texts)
    notes: Mapping[tuple[Row, int], Any] = field(default_factory=dict)
    _latest: dict[int, Proposal] = field(default_factory=dict)

    def begin(self, proposal: Proposal, evidence: Evidence, keep: Keep) -> Future[bool]:
        """Have a candidate written, unless an earlier run has; the result is whether there is one.

        An error of the proposer is a refusal. If the search ends first, the proposal stays open.

        Args:
            proposal: The proposal; its requests count against the budget of program calls.
            evidence: What the proposer is told.
            keep: Called with the proposal when it has ended, in the thread of the proposer.
        """
        self.take(proposal, evidence.table)
        if not proposal.is_over:
            context, brief = contextvars.copy_context(), self._brief(proposal, evidence)
            return self.executor.submit(context.run, self._write, proposal, brief, keep)
        known: Future[bool] = Future()
        known.set_result(proposal.written is not None)
        return known

    def take(self, proposal: Proposal, table: ScoreTable) -> None:
        """Count a proposal, and make its candidate known if an earlier run has written it."""
        table.proposing += self.growth.proposers[proposal.proposer].calls
        self._latest[proposal.number] = proposal
        self._adopt(proposal)

    def is_refused(self, proposal: Proposal | None) -> bool:
        """Whether the proposer has failed; False without a proposal."""
        return proposal is not None and self._latest[proposal.number].refused is not None

    def end(self, proposal: Proposal) -> None:
        """Note what became of a proposal, when its trial is told."""
        if self._latest[proposal.number].is_over:
            self.growth.end(self._latest[proposal.number])

    def _write(self, proposal: Proposal, brief: Brief, keep: Keep) -> bool:
        propose = self.growth.proposers[proposal.proposer].propose
        with metered(Meter(self.meter)) as meter:
            try:
                candidate = self.attempts(partial(contained, propose, brief))
                proposal = replace(proposal, written=self.candidates.plain(proposal.component, candidate))
                self._adopt(proposal)
            except Stopped:
                return False
            except Exception as error:  # noqa: BLE001 - no error of a proposer ends a search
                refused = f"{type(error).__name__}: {error}"[:_SHOWN]
                proposal = replace(proposal, written=None, refused=refused)
        self._latest[proposal.number] = proposal = replace(proposal, usage=meter.total)
        keep(proposal)
        return proposal.refused is None

    def _adopt(self, proposal: Proposal) -> None:
        if proposal.written is not None:
            name, index = proposal.component, proposal.index
            self.growth.space.write(name, index, self.candidates.adopt(name, index, proposal.written))

    def _brief(self, proposal: Proposal, evidence: Evidence) -> Brief:
        space, table = self.growth.space, evidence.table
        visible = visible_examples(table.n_examples, self.seed)
        rows = evidence.best_first(table.rows)
        means, deviations = (values.tolist() for values in evidence.posterior(rows))
        standings = []
        for row, mean, deviation in zip(rows, means, deviations, strict=True):
            scores = {e: s for e, s in table.means(row).items() if e in visible}
            standings.append(Measured(space.params(row), scores, mean, deviation, table.is_full(row)))
        notes = {
            (i, e): self.notes[row, e]
            for i, (row, one) in enumerate(zip(rows, standings, strict=True))
            for e in one.scores
            if (row, e) in self.notes
        }
        # A candidate without a score may not be written yet: what is known must not depend on timing.
        scored = {(c, index) for row in rows for c, index in enumerate(row)}
        candidates = {
            name: [
                text if i < n or (c, i) in scored else None for i, text in enumerate(space.components[name])
            ]
            for c, (name, n) in enumerate(zip(space.names, space.initial, strict=True))
        }
        told = proposal.number, proposal.component, proposal.index, proposal.parent
        return Brief(*told, tuple(standings), notes, candidates, self.seed)


def visible_examples(n_examples: int, seed: int) -> frozenset[int]:
    """The validation examples that proposers may see; the same for the same seed."""
    order = np.random.default_rng([abs(seed), n_examples, 2]).permutation(n_examples)
    return frozenset(order[: round(_VISIBLE * n_examples)].tolist())
