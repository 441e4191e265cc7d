"""The operator *demos*: demo sets from others by one random move, without a language model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpromptune.engine.proposers import Brief
from mpromptune.errors import ProposalDeclinedError
from mpromptune.model.space import PromptSpace
from mpromptune.operators.base import Setting, demos_of, posteriors
from mpromptune.operators.effects import Effects
from mpromptune.operators.texts import demo_text, encodable_demo, value_text

# NOTE: moves that are tried before there is no new set: of five moves, one or two may be impossible.
_TRIES = 30
# NOTE: fewest training examples that are drawn as new demos; otherwise as many as there are known demos. What
# was never measured should not win by mere number.
_FEWEST_NEW = 4

DemoTexts = list[str]
Key = tuple[tuple[str, str], ...]


class Demos:
    """Changes the parent's demo set by one move: swap, add, remove, reorder, or recombine with a good set.

    Single demos are chosen by a draw from the posterior of their additive effects (see `Effects`). New ones
    are labelled training examples. A demo with the inputs of a validation example is never used.

    Args:
        setting: The compile.
    """

    name = "demos"
    calls = 0
    keeps_parent = True

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def components(self, space: PromptSpace) -> Sequence[str]:
        """The demo sets of all predictors."""
        return self.setting.components(space, demos_of)

    def propose(self, brief: Brief) -> list[Any]:
        """See `mpromptune.engine.proposers.Proposer`."""
        known = self.setting.known(brief, brief.component)
        sets = {i: [demo for demo in some if not self.setting.is_held_out(demo)] for i, some in known.items()}
        rng, taken = brief.rng, {tuple(map(demo_text, some)) for some in known.values()}
        pool = {demo_text(demo): demo for some in sets.values() for demo in some}
        pool.update(self._new(brief.component, pool, rng))
        inputs = self.setting.signature(brief.component).input_fields
        keys = {text: _key(demo, inputs) for text, demo in pool.items()}
        texts = {i: [*map(demo_text, some)] for i, some in sets.items()}
        parent = texts[brief.parent[brief.component]]
        effects = _effects(brief, texts)
        for _ in range(_TRIES):
            partner = _partner(brief, texts, rng)
            move = Move(parent, partner, effects.draw(pool, rng), keys, self._most(parent), rng)
            made = move()
            if made is not None and tuple(made) not in taken and self._fits(made, parent, pool):
                return [pool[text] for text in made]
        raise ProposalDeclinedError("No demo set was found that is new, allowed and near the parent's.")

    def _most(self, parent: DemoTexts) -> int:
        return max(self.setting.max_bootstrapped_demos, self.setting.max_labeled_demos, len(parent))

    def _fits(self, texts: DemoTexts, parent: DemoTexts, pool: Mapping[str, Any]) -> bool:
        """Whether there are as few demos of each kind as in DSPy's sets, or no more than in the parent."""
        limits = self.setting.max_labeled_demos, self.setting.max_bootstrapped_demos
        new, old = (_kinds([pool[text] for text in some]) for some in (texts, parent))
        return all(n <= max(limit, m) for n, limit, m in zip(new, limits, old, strict=True))

    def _new(self, component: str, known: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Random training examples that can be labelled demos and are not known, by text."""
        if not self.setting.max_labeled_demos:
            return {}
        found: dict[str, Any] = {}
        signature, number = self.setting.signature(component), max(len(known), _FEWEST_NEW)
        for i in rng.permutation(len(self.setting.trainset)):
            if len(found) == number:
                break
            demo = encodable_demo(self.setting.trainset[i])
            # DSPy's adapters leave out demos without any input or any output.
            kinds = signature.input_fields, signature.output_fields
            is_demo = all(any(name in demo for name in fields) for fields in kinds)
            if is_demo and (text := demo_text(demo)) not in known and not self.setting.is_held_out(demo):
                found[text] = demo
        return found


@dataclass
class Move:
    """One random change of a demo set; demos are their texts.

    Attributes:
        parent: The set to change.
        partner: Another good set; empty if there is none.
        values: A draw of the effect of every demo.
        keys: The example that each demo stands for; a set has each only once.
        most: Most demos of a set.
        rng: Draws the move.
    """

    parent: DemoTexts
    partner: DemoTexts
    values: Mapping[str, float]
    keys: Mapping[str, Key]
    most: int
    rng: np.random.Generator

    def __call__(self) -> DemoTexts | None:
        """The changed set; None if the move drawn is not possible."""
        moves: list[Callable[[], DemoTexts | None]]
        moves = [self._swap, self._add, self._remove, self._reorder, self._recombine]
        return moves[self.rng.integers(len(moves))]()

    def _worst(self) -> str:
        return min(self.parent, key=lambda text: self.values[text])

    def _best_beside(self, others: DemoTexts) -> str | None:
        """The best demo that is not in the parent and can stand beside these."""
        used = {self.keys[text] for text in others}
        free = [t for t, key in self.keys.items() if t not in self.parent and key not in used]
        return max(free, key=lambda text: self.values[text], default=None)

    def _swap(self) -> DemoTexts | None:
        if not self.parent:
            return None
        worst = self._worst()
        best = self._best_beside([text for text in self.parent if text != worst])
        return None if best is None else [best if text == worst else text for text in self.parent]

    def _add(self) -> DemoTexts | None:
        best = self._best_beside(self.parent) if len(self.parent) < self.most else None
        if best is None:
            return None
        place = int(self.rng.integers(len(self.parent) + 1))
        return [*self.parent[:place], best, *self.parent[place:]]

    def _remove(self) -> DemoTexts | None:
        if not self.parent:
            return None
        worst = self._worst()
        return [text for text in self.parent if text != worst]

    def _reorder(self) -> DemoTexts | None:
        return [self.parent[i] for i in self.rng.permutation(len(self.parent))]

    def _recombine(self) -> DemoTexts | None:
        """The best demos of both sets, as many as either has; the parent's first."""
        if not self.partner:
            return None
        taken = {self.keys[text] for text in self.parent}
        union = [*self.parent, *(text for text in self.partner if self.keys[text] not in taken)]
        sizes = sorted(min(len(some), self.most) for some in (self.parent, self.partner))
        number = int(self.rng.integers(max(sizes[0], 1), sizes[1] + 1))
        best = sorted(union, key=lambda text: -self.values[text])[:number]
        return [text for text in union if text in best]


def _effects(brief: Brief, texts: Mapping[int, DemoTexts]) -> Effects:
    """The effects of single demos, beside those of the candidates of other components."""
    component = brief.component
    some = [one for one in brief.standings if one.params[component] in texts]
    others = [sorted((c, i) for c, i in one.params.items() if c != component) for one in some]
    parts = [[*texts[one.params[component]], *rest] for one, rest in zip(some, others, strict=True)]
    return Effects(parts, [one.posterior_mean for one in some], [one.posterior_std for one in some])


def _partner(brief: Brief, texts: Mapping[int, DemoTexts], rng: np.random.Generator) -> DemoTexts:
    """Another set that is the best in a draw from the posterior of each; empty if no other is measured."""
    scores = posteriors(brief)
    parent = brief.parent[brief.component]
    drawn = {i: rng.normal(*score) for i, score in scores.items() if i != parent and texts.get(i)}
    return texts[max(drawn, key=lambda i: drawn[i])] if drawn else []


def _key(demo: Any, inputs: Iterable[str]) -> Key:
    """The predictor's inputs in a demo: a set has no two demos with the same."""
    return tuple((name, value_text(demo[name])) for name in inputs if name in demo)


def _kinds(demos: Sequence[Any]) -> tuple[int, int]:
    """Numbers of labelled and of bootstrapped demos."""
    bootstrapped = sum("augmented" in demo for demo in demos)
    return len(demos) - bootstrapped, bootstrapped
