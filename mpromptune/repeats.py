"""Trials of one configuration that share examples, as the surrogate may see them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from optuna.trial import FrozenTrial

from mpromptune.attributes import EXAMPLES, SCORES
from mpromptune.ledger import Ledger
from mpromptune.space import Row

Placed = tuple[FrozenTrial, Row]


def without_repeats(observed: Sequence[Placed]) -> list[Placed]:
    """Replaces trials of one configuration that share examples by one on all of their examples.

    A second answer to the same question is not a second question. The surrogate takes what is left
    over of a score, when configuration and example are accounted for, as independent between
    trials; most of it belongs to the pair, and comes again with it. So an example counts once, with
    the mean of its scores: exact where the program is deterministic, cautious where it is not.

    Args:
        observed: Completed trials and their configurations; those without scores by example stay as
            they are.

    Returns:
        The same, each pooled trial in the place of its first.
    """
    groups: dict[Row, list[_Group]] = {}
    order: list[_Group] = []
    for trial, row in observed:
        new = _Group([(trial, row)], _examples(trial))
        of_row = groups.setdefault(row, [])
        kin = [group for group in of_row if not group.examples.isdisjoint(new.examples)]
        if kin:
            kin[0].take(*kin[1:], new)
        else:
            of_row.append(new)
            order.append(new)
    return [_pooled(group.trials) for group in order if group.trials]


def _examples(trial: FrozenTrial) -> set[int]:
    return set(trial.user_attrs[EXAMPLES]) if trial.user_attrs.get(SCORES) else set()


@dataclass
class _Group:
    """Trials that share examples, directly or through others."""

    trials: list[Placed]
    examples: set[int]

    def take(self, *others: _Group) -> None:
        for other in others:
            self.trials += other.trials
            self.examples |= other.examples
            other.trials, other.examples = [], set()  # empty from now on: no kin of any trial


def _pooled(group: Sequence[Placed]) -> Placed:
    if len(group) == 1:
        return group[0]
    row, ledger = group[0][1], Ledger()
    for trial, _ in group:
        ledger.add(row, dict(zip(trial.user_attrs[EXAMPLES], trial.user_attrs[SCORES], strict=True)))
    means = ledger.means(row)
    pooled = copy.copy(group[0][0])
    pooled.user_attrs = {**pooled.user_attrs, EXAMPLES: list(means), SCORES: list(means.values())}
    pooled.value = ledger.mean(row)
    return pooled, row
