"""The interface of proposers, which write new candidates while a search runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mpromptune.errors import InvalidArgumentError, require_count
from mpromptune.model.space import UNKNOWN, Candidate, Gain, PromptSpace, as_candidate
from mpromptune.storage.findings import Measured

# NOTE: fraction of the validation examples that proposers may see. The others show whether a winner that was
# written from these is good only on them.
_VISIBLE = 0.6


def visible_examples(n_examples: int, seed: int) -> frozenset[int]:
    """The validation examples that proposers may see; the same for the same seed."""
    order = np.random.default_rng([abs(seed), n_examples, 2]).permutation(n_examples)
    return frozenset(order[: round(_VISIBLE * n_examples)].tolist())


@dataclass(frozen=True)
class Brief:
    """What a proposer knows when it is asked: all trials told so far, but only the visible examples.

    Attributes:
        number: Number of the proposal in the search, from 0.
        component: The component that a candidate is wanted for.
        index: The index that the candidate will have.
        parent: Params of the configuration to improve; the candidate takes the place of its own one.
        standings: The measured configurations, highest posterior mean first. Their scores are those of
            visible examples only; posterior means and deviations are of all examples.
        notes: ``(number of a configuration in standings, example)`` to what the score function said about
            this pair beside its score, as JSON. Visible examples only; missing where nothing was said.
        candidates: The candidates of every component so far, by index; None where a proposal failed.
        seed: Seed of the search.
    """

    number: int
    component: str
    index: int
    parent: Mapping[str, int]
    standings: tuple[Measured, ...]
    notes: Mapping[tuple[int, int], Any] = field(default_factory=dict)
    candidates: Mapping[str, Sequence[Candidate | None]] = field(default_factory=dict)
    seed: int = 0

    @property
    def rng(self) -> np.random.Generator:
        """A new generator for the random draws of this proposal."""
        return np.random.default_rng([abs(self.seed), self.number])


class Proposer(Protocol):
    """Writes candidates. It is called in worker threads, several proposals at a time.

    Attributes:
        name: Its name in the study; what its candidates gain is learned under this name.
        calls: LM requests that a proposal usually takes; each is charged like a program call.
        keeps_parent: Whether its candidates resemble the parent's; otherwise they are unrelated to it.
        gain: What is known of its mean gain from other searches, a `mpromptune.model.space.Gain`; optional.
    """

    name: str
    calls: int
    keeps_parent: bool

    def components(self, space: PromptSpace) -> Sequence[str]:
        """The components that it can write candidates for."""

    def propose(self, brief: Brief) -> Any:
        """A new candidate.

        Raises:
            ProposalRefusedError: What was written is not fit to be a candidate.
            ProposalDeclinedError: There is nothing to write for this parent, and no request was made.
        """


def gain_of(proposer: Proposer) -> Gain:
    """What is known of a proposer's mean gain."""
    gain: Gain = getattr(proposer, "gain", UNKNOWN)
    return gain


class ProposerWrapper:
    """Base class of proposers that add something to another one; by itself it is the same.

    Args:
        proposer: Any proposer.
    """

    def __init__(self, proposer: Proposer) -> None:
        self.name, self.calls, self.keeps_parent = proposer.name, proposer.calls, proposer.keeps_parent
        self.gain = gain_of(proposer)
        self.proposer = proposer

    def components(self, space: PromptSpace) -> Sequence[str]:
        """The components that it can write candidates for."""
        return self.proposer.components(space)

    def propose(self, brief: Brief) -> Any:
        """See `Proposer`."""
        return self.proposer.propose(brief)


class Candidates(Protocol):
    """Makes candidates that were written usable for the score function."""

    def plain(self, component: str, candidate: Any) -> Any:
        """A candidate as JSON, as it is saved in the study."""

    def adopt(self, component: str, index: int, written: Any) -> Candidate:
        """Make a candidate known to the score function, before its first call; return its text or texts.

        Args:
            component: Its component.
            index: Its index there.
            written: The result of `plain`, perhaps of an earlier run.
        """


class Texts:
    """Candidates that are texts, or lists of texts; the score function gets them from elsewhere."""

    def plain(self, component: str, candidate: Any) -> Any:
        """The candidate itself.

        Raises:
            InvalidArgumentError: It is neither a text nor a list of texts.
        """
        return as_candidate(candidate)

    def adopt(self, component: str, index: int, written: Any) -> Candidate:
        """The candidate itself."""
        return as_candidate(written)


_PARTS = ("name", "calls", "keeps_parent", "components", "propose")


def check_proposers(proposers: Any) -> None:
    """Require objects with all parts of a `Proposer`, and different names.

    Raises:
        InvalidArgumentError: They are something else.
    """
    if isinstance(proposers, str) or not isinstance(proposers, Sequence):
        raise InvalidArgumentError(
            f"proposers must be a list of objects, such as proposers=[proposer]; got {proposers!r}."
        )
    for proposer in proposers:
        lacking = [part for part in _PARTS if not hasattr(proposer, part)]
        if lacking or isinstance(proposer, type):
            why = f"which lacks {lacking}" if lacking else "a class: pass an object"
            raise InvalidArgumentError(
                f"A proposer must be an object with {', '.join(_PARTS)}; got {proposer!r}, {why}."
            )
        if not isinstance(proposer.name, str) or not proposer.name:
            raise InvalidArgumentError(f"The name of a proposer must be a text; got {proposer.name!r}.")
        require_count(f"calls of the proposer {proposer.name!r}", proposer.calls, least=0)
    names = [proposer.name for proposer in proposers]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise InvalidArgumentError(f"proposers has {twice[0]!r} twice; each needs a name of its own.")


def check_components(proposers: Sequence[Proposer], space: PromptSpace) -> None:
    """Require proposers of which one at least can write for this space.

    Raises:
        InvalidArgumentError: None can, or one names components that the space does not have.
    """
    found = {proposer.name: proposer.components(space) for proposer in proposers}
    for name, components in found.items():
        is_list = isinstance(components, Collection) and not isinstance(components, str)
        if not is_list or any(one not in space.names for one in components):
            raise InvalidArgumentError(
                f"components() of the proposer {name!r} must return a list of some of {[*space.names]}; got "
                f"{components!r}."
            )
    if found and not any(found.values()):
        raise InvalidArgumentError(
            f"The proposers {[*found]} write nothing for the components {[*space.names]}. Demos have "
            "components only if they are optimised: with max_bootstrapped_demos or max_labeled_demos above 0."
        )
