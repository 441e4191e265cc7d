"""The findings of a search, as plain data."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial

from mpromptune.execution.usage import StepUsage
from mpromptune.model.space import FloatArray, Gain, PromptSpace
from mpromptune.storage.attributes import ANSWERS, NOTE, SETTINGS
from mpromptune.storage.proposals import Proposal

RESULT_VERSION = 1


@dataclass(frozen=True)
class Measured:
    """One configuration at the end of a search.

    Attributes:
        params: Component name to candidate index.
        scores: Validation example to score; the mean if it was scored several times.
        posterior_mean: The surrogate's estimate of its mean score over all examples.
        posterior_std: Standard deviation of that estimate.
        fully: Whether it was measured on every validation example that can be answered; with
            ``schedule="mipro"``, whether it had a full evaluation, by which the winner is chosen.
    """

    params: dict[str, int]
    scores: dict[int, float] = field(repr=False)
    posterior_mean: float
    posterior_std: float
    fully: bool

    @property
    def mean(self) -> float:
        """Mean of the observed scores; NaN if all its examples are excluded."""
        return sum(self.scores.values()) / len(self.scores) if self.scores else math.nan


@dataclass(frozen=True)
class Findings:
    """The data of a `SearchResult`.

    Attributes:
        best_params: The winner.
        best_score: Its mean score over the whole validation set. The model predicts missing scores: with
            ``confirm="auto"`` if measuring them would cost too much, with ``confirm=False`` usually.
        baseline_score: The same for the baseline; NaN if it was never scored.
        calls: Program calls spent.
        n_examples: Size of the validation set.
        configurations: All measured configurations, highest posterior mean first.
        study: The Optuna study; each trial is one configuration on a set of examples.
        usage: Usage of each step, and ``.total``.
        stopped_by: The limit that ended the search before its program calls were spent:
            ``"max_tokens"``, ``"max_cost"`` or ``"max_seconds"``.
        overspent: By how much that limit, or another one, was exceeded in the end, in its unit: tokens as an
            int, dollars and seconds as a float.
        space: The texts of the candidates; None if they are not known.
        distances: Component to the squared distances between its candidates in the model; None if texts were
            not embedded.
        drawn: ``m x 2`` posterior means and standard deviations of random configurations, measured or not;
            of all configurations if there are at most 500.
        best_interval: The 95 % credible interval of ``best_score``; its width is 0 if the winner was measured
            on all examples.
        baseline_interval: The same of ``baseline_score``.
        proposals: The candidates that were written during the search, and those that were refused, in order.
        visible: The examples that proposers may see; empty if all candidates were written before the search.
        gains: The mean gain of each proposer's children over their parents, in logits, with its deviation.
        text_chance: Fraction of random assignments of embeddings to candidates that explain the scores as
            well as the real one (see `statistics.chance_of_likeness`); near 0 if similar texts have similar
            scores. None if texts were not embedded, or too few were measured.
    """

    best_params: dict[str, int]
    best_score: float
    baseline_score: float
    calls: int
    n_examples: int
    configurations: tuple[Measured, ...] = field(repr=False)
    study: Study = field(repr=False)
    usage: StepUsage = field(default_factory=StepUsage)
    stopped_by: str | None = None
    overspent: float = 0.0
    version: int = RESULT_VERSION
    space: PromptSpace | None = field(default=None, repr=False, compare=False)
    distances: dict[str, FloatArray] | None = field(default=None, repr=False, compare=False)
    drawn: FloatArray | None = field(default=None, repr=False, compare=False)
    text_chance: float | None = field(default=None, compare=False)
    best_interval: tuple[float, float] | None = field(default=None, compare=False)
    baseline_interval: tuple[float, float] | None = field(default=None, compare=False)
    proposals: tuple[Proposal, ...] = field(default=(), repr=False)
    visible: frozenset[int] = field(default=frozenset(), repr=False)
    gains: Mapping[str, Gain] = field(default_factory=dict, repr=False, compare=False)

    @property
    def baseline_params(self) -> dict[str, int] | None:
        """The configuration of the baseline, if the study has its settings."""
        baseline = self.study.user_attrs.get(SETTINGS, {}).get("arguments", {}).get("baseline")
        return None if baseline is None else dict(baseline)

    @property
    def visible_score(self) -> float:
        """Mean of the winner's scores on the examples that proposers may see; NaN if there are none."""
        return self._mean(lambda example: example in self.visible)

    @property
    def hidden_score(self) -> float:
        """Mean of the winner's scores on the other examples; NaN if there are none."""
        return self._mean(lambda example: example not in self.visible)

    def _mean(self, wanted: Callable[[int], bool]) -> float:
        best = next((m.scores for m in self.configurations if m.params == self.best_params), {})
        scores = [score for example, score in best.items() if wanted(example)]
        return sum(scores) / len(scores) if scores else math.nan

    def lineage(self, component: str, index: int) -> tuple[Proposal, ...]:
        """The proposals by which a candidate came about, the oldest one first.

        Each improves the candidate of the one before. The first one improves an initial candidate, unless its
        proposer makes candidates of its own. There are none for an initial candidate.
        """
        found = {(one.component, one.index): one for one in self.proposals}
        chain: list[Proposal] = []
        source: int | None = index
        while source is not None and (proposal := found.get((component, source))) is not None:
            chain.insert(0, proposal)
            source = proposal.source
        return tuple(chain)

    def __getstate__(self) -> dict[str, object]:
        """The state for pickling, with a copy of the study in memory.

        A storage has paths, locks and perhaps a password; a sampler holds the user's embedder, which may not
        be picklable. Notes are large, and only a search needs them.
        """
        trials = [_without_notes(trial) for trial in self.study.get_trials(deepcopy=False)]
        return {**self.__dict__, "study": in_memory(self.study, trials)}

    def __deepcopy__(self, memo: dict[int, object]) -> Findings:
        return self  # it is frozen, so copied programs share it


def in_memory(study: Study, trials: Sequence[FrozenTrial]) -> Study:
    """A study in memory with these trials, and the name and attributes of ``study``."""
    sampler = optuna.samplers.RandomSampler()
    copied = optuna.create_study(study_name=study.study_name, direction="maximize", sampler=sampler)
    for key, value in study.user_attrs.items():
        if not key.startswith(ANSWERS):  # answers are only needed in a storage, to continue a run
            copied.set_user_attr(key, value)
    copied.add_trials(trials)
    return copied


def _without_notes(trial: FrozenTrial) -> FrozenTrial:
    copied = copy.copy(trial)
    copied.user_attrs = {key: v for key, v in trial.user_attrs.items() if not key.startswith(f"{NOTE}:")}
    return copied
