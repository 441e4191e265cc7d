"""Growth of the space during a search: a candidate that is not written yet is an arm like any other."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mpromptune.engine.proposers import Proposer
from mpromptune.engine.scores import ScoreTable
from mpromptune.model.allocation import best_of
from mpromptune.model.beliefs import Beliefs
from mpromptune.model.space import UNKNOWN, Birth, Candidate, Gain, PromptSpace, Row
from mpromptune.storage.proposals import Proposal

logger = logging.getLogger(__name__)

# NOTE: consecutive refusals after which a proposer is not asked again: a prompt model that is down, or that
# repeats itself, costs no more than these requests.
_REFUSALS = 3
# NOTE: a proposer that has nothing to write for a parent costs nothing, and may have for another one. So that
# a search ends, some of these count as a refusal.
_DECLINED = 0.25
# NOTE: program calls of the budget for each candidate that a component has room for. In the simulations of
# `benchmarks.proposals`, a search writes one for every 100 to 250 calls.
_CALLS_EACH = 20
# NOTE: scores of a predictor's candidates before others are made from them. Children of a parent that only
# seems good are wasted: with one block, useless proposers cost 0.4 points more (three tables, 16 seeds).
_PROVEN = 20
# NOTE: candidates of a predictor that may be without a score. With one, a small budget sees few generations
# (64 % instead of 72 % in the scripted world); with three, useless proposers cost 0.3 points more.
_AT_ONCE = 2


@dataclass(frozen=True)
class Offer:
    """A configuration with a candidate that a proposer would write.

    Attributes:
        parent: The configuration that it is made from.
        component: The component of the new candidate.
        birth: The origin of the new candidate.
        calls: LM requests that writing takes.
    """

    parent: Row
    component: int
    birth: Birth
    calls: int = 0

    def row(self, index: int) -> Row:
        """The configuration with this index for the new candidate."""
        return _with(self.parent, self.component, index)

    def beside(self, row: Row) -> Offer:
        """The same offer, but the candidates of the other components are those of ``row``."""
        return replace(self, parent=_with(row, self.component, self.parent[self.component]))


def _with(row: Row, component: int, index: int) -> Row:
    """The configuration with another candidate of one component."""
    return (*row[:component], index, *row[component + 1 :])


@dataclass
class Growth:
    """Decides by the posterior which proposer is asked next, and adds what it will write to the space.

    Attributes:
        space: The configurations; it grows when a proposer is asked.
        proposers: By name.
        capacity: Most candidates of each component.
        gains: What is known of their mean gains from other searches.
    """

    space: PromptSpace
    proposers: Mapping[str, Proposer]
    capacity: Mapping[str, int]
    gains: Mapping[str, Gain]

    def __post_init__(self) -> None:
        self._writes = {name: frozenset(one.components(self.space)) for name, one in self.proposers.items()}
        self._refusals: dict[str, float] = defaultdict(float)  # of each proposer since its last candidate
        self._refused: set[tuple[int, int]] = set()  # the candidates that will never be written

    @property
    def asked(self) -> int:
        """Number of proposals begun."""
        return sum(map(len, self.space.births))

    def proposal(self, offer: Offer) -> Proposal:
        """The next proposal, for an offer."""
        name = self.space.names[offer.component]
        return Proposal(
            number=self.asked,
            component=name,
            index=self.space.sizes[offer.component],
            proposer=offer.birth.proposer,
            parent=self.space.params(offer.parent),
            descends=offer.birth.parent is not None,
        )

    def calls_of(self, proposal: Proposal) -> int:
        """LM requests that a proposal counts as."""
        return self.proposers[proposal.proposer].calls

    def add(self, proposal: Proposal) -> None:
        """Append the candidate of a proposal to the space, closed to other trials until its first is told."""
        new = _append(self.space, proposal, self.gains[proposal.proposer])
        assert new[1] == proposal.index

    def end(self, proposal: Proposal) -> None:
        """Note what became of a proposal; after several refusals its proposer is not asked again."""
        name, new = proposal.proposer, (self.space.names.index(proposal.component), proposal.index)
        if proposal.refused is None:
            self._refusals[name] = 0
            self.space.closed.discard(new)
            return
        self._refused.add(new)
        before = self._refusals[name]
        self._refusals[name] += _DECLINED if proposal.declined else 1.0
        if before < _REFUSALS <= self._refusals[name]:
            if proposal.declined:
                logger.info("The proposer %r has nothing more to write: %s", name, proposal.refused)
            else:
                message = "The proposer %r has failed several times in a row and is not asked again: %s"
                logger.warning(message, name, proposal.refused)

    @contextmanager
    def offered(
        self, beliefs: Beliefs, table: ScoreTable, rng: np.random.Generator
    ) -> Iterator[Offer | None]:
        """A context in which the model knows the origin of the candidate that is offered, if one is.

        The offer is for one group, drawn at random. Its parent and its proposer are the best ones in
        posterior draws (Thompson sampling). There is none for a group with several candidates that have no
        score: they have to show first what they are worth.
        """
        offer = self._offer(beliefs, table, rng)
        with self._expecting([] if offer is None else [offer]):
            yield offer

    def _offer(self, beliefs: Beliefs, table: ScoreTable, rng: np.random.Generator) -> Offer | None:
        free = self._free_groups(beliefs, table) if self.proposers else []
        if not free:
            return None
        g = free[int(rng.integers(len(free)))]
        components = beliefs.groups[g].components
        if not (parents := _known(table, components)):
            return None
        offers = self._offers(parents[best_of(beliefs, g, parents, rng)], components)
        if not offers:
            return None
        with self._expecting(offers) as rows:
            return offers[best_of(beliefs, g, rows, rng)]

    @contextmanager
    def _expecting(self, offers: Sequence[Offer]) -> Iterator[list[Row]]:
        """A context in which the model knows the origins of these candidates; yields their configurations."""
        with self.space.expecting((offer.component, offer.birth) for offer in offers) as indices:
            yield [offer.row(index) for offer, index in zip(offers, indices, strict=True)]

    def _free_groups(self, beliefs: Beliefs, table: ScoreTable) -> list[int]:
        """The groups with few candidates that have no score."""
        tried = [*table.rows, *filter(table.is_dropped, table.started)]
        scored = {(c, index) for row in tried for c, index in enumerate(row)}
        waiting = [c for c, _ in self.space.added.keys() - self._refused - scored]
        groups = enumerate(group.components for group in beliefs.groups)
        return [g for g, components in groups if sum(c in components for c in waiting) < _AT_ONCE]

    def _offers(self, parent: Row, components: Sequence[int]) -> list[Offer]:
        """What the proposers may write from a parent for these components."""
        found, added = [], self.space.added
        in_flight = Counter(added[new].proposer for new in self.space.closed - self._refused)
        for name, proposer in self.proposers.items():
            if self._refusals[name] + in_flight[name] >= _REFUSALS:  # those in flight may fail too
                continue
            for c in components:
                component = self.space.names[c]
                if component in self._writes[name] and self.space.sizes[c] < self.capacity[component]:
                    birth = Birth(name, parent[c] if proposer.keeps_parent else None, self.gains[name])
                    found.append(Offer(parent, c, birth, proposer.calls))
        return found


def _known(table: ScoreTable, components: Sequence[int]) -> list[Row]:
    """The configurations whose candidates of some components have enough scores, in any configurations."""
    rows = [row for row in table.rows if not table.is_dropped(row)]
    numbers: Counter[Row] = Counter()
    for row in rows:
        numbers[tuple(row[c] for c in components)] += len(table.means(row))
    enough = min(_PROVEN, table.n_examples / 2)
    return [row for row in rows if numbers[tuple(row[c] for c in components)] >= enough]


def _append(space: PromptSpace, proposal: Proposal, gain: Gain = UNKNOWN) -> tuple[int, int]:
    """Append the candidate of a proposal to a space, closed; return its component and its index."""
    component = space.names.index(proposal.component)
    index = space.add(component, Birth(proposal.proposer, proposal.source, gain))
    space.closed.add((component, index))
    return component, index


def regrow(space: PromptSpace, proposals: Sequence[Proposal], text_of: Callable[[Any], Candidate]) -> None:
    """Append the candidates of a study to its space; those that are not written are closed.

    Args:
        space: The space with the initial candidates.
        proposals: All proposals of the study, in order.
        text_of: The text or texts of what was written.
    """
    for proposal in proposals:
        new = _append(space, proposal)
        if proposal.written is not None:
            space.closed.discard(new)
            space.write(proposal.component, new[1], text_of(proposal.written))


def capacity_of(space: PromptSpace, max_calls: int) -> dict[str, int]:
    """Most candidates of each component in a search with this budget."""
    return {n: size + 1 + max_calls // _CALLS_EACH for n, size in zip(space.names, space.sizes, strict=True)}


def most_requests(space: PromptSpace, proposers: Sequence[Proposer], max_calls: int) -> int:
    """Most LM requests of proposals in a search with this budget: there is no room for more candidates."""
    capacity, sizes = capacity_of(space, max_calls), dict(zip(space.names, space.sizes, strict=True))
    dearest: dict[str, int] = {}
    for proposer in proposers:
        for name in proposer.components(space):
            dearest[name] = max(dearest.get(name, 0), proposer.calls)
    return min(max_calls, sum(calls * (capacity[name] - sizes[name]) for name, calls in dearest.items()))
