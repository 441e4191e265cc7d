"""The order in which configurations are measured on the examples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mpromptune.engine.evidence import Evidence
from mpromptune.engine.plan import Task
from mpromptune.model.space import FloatArray


@dataclass(frozen=True)
class ExampleOrder:
    r"""A random order that puts informative examples early [Efraimidis2006]_.

    This is a weighted sample without replacement: examples are sorted by ``-log(u) / w``, where u is uniform
    and w is the information of one more score of the leader on the example. All configurations share u, so
    that they are compared on the same examples. In additive models each trial draws its own, because many
    configurations are measured only once. With a sampler that ignores examples, each trial draws its own too,
    and there are no weights.

    .. [Efraimidis2006] P. S. Efraimidis, P. G. Spirakis. Weighted random sampling with a reservoir.
        Information Processing Letters 97, 2006.
    """

    task: Task

    def first(self) -> list[int]:
        """The order before the first score."""
        return _sorted(self._shared)

    def next(self, evidence: Evidence, number: int) -> list[int]:
        """The order for the trial of a number."""
        shares, allocates = not evidence.is_additive, self.task.allocates
        keys = self._shared if shares and allocates else self._keys(number, 1)
        if allocates and (information := evidence.information()) is not None:
            keys = keys / information
        return _sorted(keys)

    @cached_property
    def _shared(self) -> FloatArray:
        return self._keys(self.task.n_examples)

    def _keys(self, *seeds: int) -> FloatArray:
        rng = np.random.default_rng([abs(self.task.seed), *seeds])
        keys: FloatArray = -np.log(1.0 - rng.random(self.task.n_examples))
        return keys


def _sorted(keys: FloatArray) -> list[int]:
    return [int(example) for example in np.argsort(keys, kind="stable")]
