"""The space of configurations: components, their candidates, and params <-> index rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import numpy as np

from mpromptune.errors import InvalidArgumentError

Candidate = str | Sequence[str]
Row = tuple[int, ...]
Examples = tuple[int, ...]  # indices of validation examples
FloatArray = np.ndarray[Any, np.dtype[np.float64]]
IndexArray = np.ndarray[Any, np.dtype[np.int64]]

_PREDICTOR = re.compile(r"^(\d+)_predictor_")


class Gain(NamedTuple):
    """A normal distribution of the mean gain of a proposer's children over their parents, in logits."""

    mean: float
    deviation: float


# NOTE: sceptical: two children in three are thought to be worse than their parents. With a mean of 0 and a
# deviation of 0.5, proposers whose children are 0.4 worse cost up to a point more (24 seeds, +-0.6).
UNKNOWN = Gain(-0.2, 0.3)


@dataclass(frozen=True)
class Birth:
    """The origin of a candidate that was proposed during a search.

    Attributes:
        proposer: Name of its proposer.
        parent: The candidate of the same component that it was made from; None if there is none.
        gain: What is known of its proposer from earlier searches.
    """

    proposer: str
    parent: int | None = None
    gain: Gain = UNKNOWN


class IndexSpace:
    """Index rows with one entry per component: all of the product, or only the listed ones.

    A product can grow: `add` appends a candidate to a component.

    Args:
        sizes: Number of candidates of each component.
        groups: Group (predictor) of each component; by default each component is its own group.
        combinations: Index tuples; if given, only these configurations exist.

    Raises:
        InvalidArgumentError: A combination is out of range or of the wrong length.

    Attributes:
        sizes: Number of candidates of each component now.
        initial: Number of candidates of each component at first.
        births: The candidates added to each component, in order.
        closed: Pairs of component and candidate that cannot be used, because nothing is written (yet).
    """

    def __init__(
        self,
        sizes: Sequence[int],
        groups: Sequence[int] | None = None,
        combinations: Iterable[Sequence[int]] | None = None,
    ) -> None:
        self.sizes = self.initial = tuple(sizes)
        self.births: tuple[list[Birth], ...] = tuple([] for _ in self.sizes)
        self.closed: set[tuple[int, int]] = set()
        self.groups = tuple(range(len(self.sizes)) if groups is None else groups)
        self.combinations = None if combinations is None else self._checked(combinations)

    def _checked(self, combinations: Iterable[Sequence[int]]) -> IndexArray:
        rows = np.array([tuple(row) for row in combinations], dtype=np.int64)
        if rows.ndim != 2 or rows.shape[1] != len(self.sizes):
            raise InvalidArgumentError(
                f"combinations must be non-empty tuples of {len(self.sizes)} indices; "
                f"got an array of shape {rows.shape}."
            )
        outside = ((rows < 0) | (rows >= np.array(self.sizes))).any(axis=1)
        if outside.any():
            raise InvalidArgumentError(
                f"combination {tuple(rows[outside][0].tolist())} is out of range; sizes are {self.sizes}."
            )
        return np.unique(rows, axis=0)

    @property
    def added(self) -> dict[tuple[int, int], Birth]:
        """The origins of the candidates added, by component and index."""
        numbered = [enumerate(some, n) for some, n in zip(self.births, self.initial, strict=True)]
        return {(c, index): birth for c, some in enumerate(numbered) for index, birth in some}

    def add(self, component: int, birth: Birth) -> int:
        """Append a candidate to a component of a product; return its index."""
        self.births[component].append(birth)
        self.sizes = tuple(n + len(some) for n, some in zip(self.initial, self.births, strict=True))
        return self.sizes[component] - 1

    @contextmanager
    def expecting(self, births: Iterable[tuple[int, Birth]]) -> Iterator[list[int]]:
        """A context in which the model knows the origins of further candidates, which do not exist.

        Args:
            births: The component and the origin of each.

        Yields:
            Their indices.
        """
        before, indices = list(map(len, self.births)), []
        try:
            for component, birth in births:
                self.births[component].append(birth)
                indices.append(self.initial[component] + len(self.births[component]) - 1)
            yield indices
        finally:
            for known, number in zip(self.births, before, strict=True):
                del known[number:]

    def is_next(self, row: Sequence[int]) -> bool:
        """Whether ``row`` has the candidate that would be added next to one of its components."""
        return any(i == n for i, n in zip(row, self.sizes, strict=True))

    @property
    def size(self) -> int:
        """Number of configurations that exist."""
        return prod(self.sizes) if self.combinations is None else len(self.combinations)

    @cached_property
    def _listed(self) -> frozenset[Row]:
        assert self.combinations is not None
        return frozenset(map(tuple, self.combinations.tolist()))

    def exists(self, row: Sequence[int]) -> bool:
        """Whether the configuration with these indices is part of the space."""
        if self.combinations is not None:
            return tuple(row) in self._listed
        if self.closed and not self.closed.isdisjoint(enumerate(row)):
            return False
        return all(0 <= i < size for i, size in zip(row, self.sizes, strict=True))

    def rows(self) -> IndexArray:
        """All configurations, ``size x num_components``, in lexicographic order."""
        if self.combinations is not None:
            return self.combinations
        return np.indices(self.sizes).reshape(len(self.sizes), -1).T.astype(np.int64)

    def first(self) -> Row:
        """The first configuration in lexicographic order."""
        return (0,) * len(self.sizes) if self.combinations is None else tuple(self.combinations[0].tolist())

    def sample(self, n: int, rng: np.random.Generator) -> IndexArray:
        """At most ``n`` distinct configurations, drawn uniformly without enumerating a product."""
        if self.size <= n:
            return self.rows()
        if self.combinations is not None:
            return self.combinations[rng.choice(self.size, n, replace=False)]
        return np.unique(rng.integers(0, self.sizes, size=(n, len(self.sizes))), axis=0)

    def neighbours(self, row: Sequence[int], component: int | None = None) -> IndexArray:
        """Configurations that differ from ``row`` in one component, or only in ``component`` if it is given.

        With listed configurations, those that differ in the components of one group.
        """
        centre = np.asarray(row, dtype=np.int64)
        if self.combinations is not None:
            differs = self.combinations != centre
            by_group = [differs[:, np.array(self.groups) == g].any(axis=1) for g in set(self.groups)]
            near: IndexArray = self.combinations[np.sum(by_group, axis=0) == 1]
            return near
        moves = []
        for c in range(len(self.sizes)) if component is None else [component]:
            others = np.delete(np.arange(self.sizes[c]), centre[c])
            moves.append(np.tile(centre, (len(others), 1)))
            moves[-1][:, c] = others
        return np.concatenate(moves)


class PromptSpace(IndexSpace):
    """A space of prompt configurations: one candidate for every component.

    Args:
        components: Component name to its candidates. A candidate is a text (an instruction) or a
            sequence of texts (a demo set, possibly empty). Names of the form
            ``{i}_predictor_instruction`` and ``{i}_predictor_demos`` group the components of one
            predictor; every other component is a group of its own.
        combinations: Index tuples, one entry per component. If given, only these configurations exist; if
            None, all of the product.

    Raises:
        InvalidArgumentError: A component has no candidate or one of another type, or a combination is out
            of range.

    Example:
        >>> space = PromptSpace({"0_predictor_instruction": ["Answer.", "Think, then answer."]})
        >>> space.params((1,))
        {'0_predictor_instruction': 1}
    """

    def __init__(
        self,
        components: Mapping[str, Sequence[Candidate]],
        combinations: Iterable[Sequence[int]] | None = None,
    ) -> None:
        if not isinstance(components, Mapping) or not all(isinstance(name, str) for name in components):
            raise InvalidArgumentError(f"components must map names to candidates; got {components!r}.")
        self.components = {name: tuple(candidates) for name, candidates in components.items()}
        self.names = tuple(self.components)
        if not self.names:
            raise InvalidArgumentError("A PromptSpace needs at least one component; got none.")
        for candidates in self.components.values():
            for candidate in candidates:
                as_candidate(candidate)
        if texts := [name for name, candidates in components.items() if isinstance(candidates, str)]:
            raise InvalidArgumentError(f"Components {texts} are single texts; pass a list of candidates.")
        if empty := [name for name, candidates in self.components.items() if not candidates]:
            raise InvalidArgumentError(f"Components {empty} have no candidate; pass at least one each.")
        super().__init__(list(map(len, self.components.values())), groups_of(self.names), combinations)

    def __repr__(self) -> str:
        return f"PromptSpace({dict(zip(self.names, self.sizes, strict=True))}, size={self.size})"

    def growing(self) -> PromptSpace:
        """A copy that can grow without changing this space."""
        return PromptSpace(self.components, self.combinations)

    def write(self, component: str, index: int, candidate: Candidate) -> None:
        """Set the text or texts of a candidate that was added."""
        known = list(self.components[component])
        known += [""] * (index + 1 - len(known))
        known[index] = candidate
        self.components[component] = tuple(known)

    def params(self, row: Sequence[int]) -> dict[str, int]:
        """Index row to Optuna params."""
        return {name: int(i) for name, i in zip(self.names, row, strict=True)}

    def row(self, params: Mapping[str, int]) -> Row:
        """Optuna params to index row; the order of params does not matter.

        Raises:
            InvalidArgumentError: A component is missing or the configuration does not exist.
        """
        if missing := [name for name in self.names if name not in params]:
            raise InvalidArgumentError(f"params {dict(params)} lack {missing}.")
        row = tuple(int(params[name]) for name in self.names)
        if not self.exists(row):
            raise InvalidArgumentError(f"Configuration {dict(params)} is not in {self!r}.")
        return row


def as_candidate(value: Any) -> Candidate:
    """The value, if it is a candidate.

    Raises:
        InvalidArgumentError: It is neither a text nor a sequence of texts.
    """
    if isinstance(value, Sequence) and all(isinstance(text, str) for text in value):
        return value
    raise InvalidArgumentError(f"A candidate must be a text or a list of texts; got {value!r}.")


def groups_of(names: Sequence[str]) -> tuple[int, ...]:
    """For each component name, the group (predictor) that it belongs to, numbered from 0."""
    keys = [m.group(1) if (m := _PREDICTOR.match(name)) else f"={name}" for name in names]
    order = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return tuple(order[key] for key in keys)
