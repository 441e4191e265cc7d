"""Asks proposers for candidates, in threads beside the program calls."""

from __future__ import annotations

import contextvars
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from mpromptune.engine.evidence import Evidence
from mpromptune.engine.growth import Growth
from mpromptune.engine.proposers import Brief, Candidates, visible_examples
from mpromptune.engine.scores import ScoreTable
from mpromptune.errors import ProposalDeclinedError, ProposalRefusedError
from mpromptune.execution.attempts import Attempts
from mpromptune.execution.interrupts import Stop, Stopped, contained, wait_for
from mpromptune.execution.pool import DaemonThreads, within
from mpromptune.execution.usage import Meter, metered
from mpromptune.model.space import Candidate, Row
from mpromptune.storage.findings import Measured
from mpromptune.storage.proposals import Proposal

# NOTE: proposals written at the same time. A search seldom has more than one for each predictor.
THREADS = 4
# NOTE: seconds after which a proposal counts as failed, if the search has no ``timeout``: several requests
# for long answers of a slow LM end in this time.
_TIMEOUT = 300.0
# Most characters of a refusal that are saved.
_SHOWN = 500

Keep = Callable[[Proposal], None]
Notes = Mapping[tuple[Row, int], Any]


@dataclass
class Writing:
    """Makes proposals.

    Attributes:
        growth: The proposers, and the space, which gains the texts of what is written.
        seed: Seed of the search.
        executor: Runs the proposers, beside the program calls.
        attempts: Repeats a request while another attempt may succeed.
        meter: Counts the usage of proposals.
        stopped: Whether the search is ending, so that no result is needed.
        candidates: Makes what is written usable for the score function.
        timeout: Seconds after which an attempt counts as failed; by default five minutes.
    """

    growth: Growth
    seed: int
    executor: Executor
    attempts: Attempts
    meter: Meter
    stopped: Stop
    candidates: Candidates
    timeout: float | None = None
    _latest: dict[int, Proposal] = field(default_factory=dict)
    _before: dict[str, Future[bool]] = field(default_factory=dict)  # the last proposal for each component

    def begin(self, proposal: Proposal, evidence: Evidence, notes: Notes, keep: Keep) -> Future[bool]:
        """Have a candidate written, unless an earlier run has; the result is whether there is one.

        An error of the proposer is a refusal. If the search ends first, the proposal stays open.

        Args:
            proposal: The proposal, after `take`.
            evidence: The scores and the model, from which the proposer is told.
            notes: What the score function said about pairs, beside their scores.
            keep: Called with the proposal when it has ended, in the thread of the proposer.
        """
        if not proposal.is_over:
            context, brief = contextvars.copy_context(), self._brief(proposal, evidence, notes)
            before = self._before.get(proposal.component)
            begun = self.executor.submit(context.run, self._write, proposal, brief, keep, before)
            self._before[proposal.component] = begun
            return begun
        known: Future[bool] = Future()
        known.set_result(proposal.written is not None)
        return known

    def take(self, proposal: Proposal, table: ScoreTable) -> None:
        """Count a proposal, and make its candidate known if an earlier run has written it."""
        table.pending += self.growth.calls_of(proposal)
        self.meter.add(proposal.usage)
        self._latest[proposal.number] = proposal
        if proposal.written is not None:
            self._adopt(proposal)

    def is_refused(self, proposal: Proposal | None) -> bool:
        """Whether the proposer has failed; False without a proposal."""
        return proposal is not None and self._latest[proposal.number].refused is not None

    def end(self, proposal: Proposal, table: ScoreTable) -> None:
        """Note what became of a proposal, when its trial is told."""
        latest = self._latest[proposal.number]
        table.proposal_usage += latest.usage
        calls = self.growth.calls_of(latest)
        table.pending -= calls
        if not latest.declined:
            table.proposal_calls += calls
        if latest.is_over:
            self.growth.end(latest)

    def _write(self, proposal: Proposal, brief: Brief, keep: Keep, before: Future[bool] | None) -> bool:
        ask = partial(contained, self.growth.proposers[proposal.proposer].propose, brief)
        with metered(Meter(self.meter)) as meter:
            try:
                candidate = self.attempts(partial(within, self.timeout or _TIMEOUT, ask, self.stopped))
                plain = self.candidates.plain(proposal.component, candidate)
                # As it is when it is read again: adopted later, it must be the same.
                written = replace(proposal, written=json.loads(json.dumps(plain, allow_nan=False)))
                # Of two equal candidates, the later one is refused, whatever the timing.
                wait_for([] if before is None else [before], unless=self.stopped)
                self._adopt(written, self._known(proposal))
                proposal = written
            except Stopped:
                pass
            except BaseException as error:  # noqa: BLE001 - no error of a proposer ends a search
                refused = f"{type(error).__name__}: {error}"[:_SHOWN]
                declined = isinstance(error, ProposalDeclinedError)
                proposal = replace(proposal, refused=refused, declined=declined)
        proposal = replace(proposal, usage=proposal.usage + meter.total)
        self._latest[proposal.number] = proposal
        keep(proposal)
        return proposal.written is not None

    def _adopt(self, proposal: Proposal, known: Sequence[Candidate | None] = ()) -> None:
        """Make a written candidate known.

        Raises:
            ProposalRefusedError: There is nothing, or it equals one of the candidates ``known``.
        """
        if proposal.written is None:
            raise ProposalRefusedError("The proposer wrote nothing.")
        name, index = proposal.component, proposal.index
        candidate = self.candidates.adopt(name, index, proposal.written)
        for other, one in enumerate(known):
            if one is not None and _is_same(candidate, one):
                raise ProposalRefusedError(f"It is the same as candidate {other} of {name!r}: {candidate!r}.")
        self.growth.space.write(name, index, candidate)

    def _known(self, proposal: Proposal) -> list[Candidate | None]:
        """The candidates of its component that were there when it began, or were being written."""
        name, space = proposal.component, self.growth.space
        written = {p.index for p in self._latest.values() if p.component == name and p.written is not None}
        initial = space.initial[space.names.index(name)]
        earlier = enumerate(space.components[name][: proposal.index])
        return [text if i < initial or i in written else None for i, text in earlier]

    def _brief(self, proposal: Proposal, evidence: Evidence, notes: Notes) -> Brief:
        space, table = self.growth.space, evidence.table
        visible = visible_examples(table.n_examples, self.seed)
        rows = evidence.best_first(table.rows)
        means, deviations = (values.tolist() for values in evidence.posterior(rows))
        standings = []
        for row, mean, deviation in zip(rows, means, deviations, strict=True):
            scores = {e: s for e, s in table.means(row).items() if e in visible}
            standings.append(Measured(space.params(row), scores, mean, deviation, table.is_full(row)))
        said = {
            (i, e): notes[row, e]
            for i, (row, one) in enumerate(zip(rows, standings, strict=True))
            for e in one.scores
            if (row, e) in notes
        }
        # A candidate without a score may not be written yet: what is known must not depend on timing.
        scored = {(c, index) for row in rows for c, index in enumerate(row)}
        candidates = {
            name: [
                text if i < n or (c, i) in scored else None for i, text in enumerate(space.components[name])
            ]
            for c, (name, n) in enumerate(zip(space.names, space.initial, strict=True))
        }
        told = proposal.number, proposal.component, proposal.index, dict(proposal.parent)
        return Brief(*told, tuple(standings), said, candidates, self.seed)


def _is_same(one: Candidate, other: Candidate) -> bool:
    return isinstance(one, str) == isinstance(other, str) and list(one) == list(other)


@contextmanager
def threads() -> Iterator[Executor]:
    """The threads of proposals, which are closed without waiting for one that hangs."""
    executor = DaemonThreads(THREADS, "mpromptune-proposal")
    try:
        yield executor
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
