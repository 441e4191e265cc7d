"""What a search found out, as plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial

from mpromptune.execution.usage import StepUsage
from mpromptune.model.space import FloatArray, PromptSpace
from mpromptune.storage.attributes import ANSWERS, SETTINGS

RESULT_VERSION = 1


@dataclass(frozen=True)
class Measured:
    """One configuration as it stands at the end of a search.

    Attributes:
        params: Component name to candidate index.
        scores: Validation example to score; of several answers to one example, their mean.
        posterior_mean: The surrogate's estimate of its mean score over all examples.
        posterior_std: Standard deviation of that estimate.
        fully: Whether it was measured on every validation example that can be answered; with
            ``schedule="mipro"``, in a full evaluation, by which the winner is chosen.
    """

    params: dict[str, int]
    scores: dict[int, float] = field(repr=False)
    posterior_mean: float
    posterior_std: float
    fully: bool

    @property
    def mean(self) -> float:
        """Mean of the observed scores; not a number where every example is left out."""
        return sum(self.scores.values()) / len(self.scores) if self.scores else math.nan


@dataclass(frozen=True)
class Findings:
    """What `SearchResult` holds.

    Attributes:
        best_params: The winner.
        best_score: Its mean score over the whole validation set. What it was not measured on is foreseen by
            the model: with ``confirm="auto"`` where measuring it would cost much, with False mostly.
        baseline_score: The same for the baseline; not a number if it was never scored.
        calls: Program calls spent.
        n_examples: Size of the validation set.
        configurations: Every configuration measured, the highest posterior mean first.
        study: The Optuna study, one trial per (configuration, set of examples).
        usage: What each step used, and ``.total``; scores made ahead of the search count for it.
        stopped_by: The limit that ended the search before its program calls were spent:
            ``"max_tokens"``, ``"max_cost"`` or ``"max_seconds"``.
        overspent: By how much that limit was exceeded, in its unit, by what was in flight.
        space: The texts that the indices stand for; None where they are not known.
        distances: Component to the squared distances between its candidates, as the model saw them;
            None where texts were not embedded.
        drawn: ``m x 2`` posterior means and standard deviations of configurations drawn at random,
            measured or not; of all that exist, where those are at most 500.
        best_interval: The 95 % credible interval of ``best_score``; of no width where the winner was measured
            on all examples.
        text_chance: Share of random assignments of embeddings to candidates that explain the scores
            as well as the real one (see `explained.chance_of_likeness`): near 0 where texts that are
            alike score alike. None where texts were not embedded, or too few were measured.
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

    @property
    def baseline_params(self) -> dict[str, int] | None:
        """The configuration that the search compared with, if its study says so."""
        baseline = self.study.user_attrs.get(SETTINGS, {}).get("arguments", {}).get("baseline")
        return None if baseline is None else dict(baseline)

    def __getstate__(self) -> dict[str, object]:
        """With the study in memory, by itself.

        A storage has paths, locks and perhaps a password; a sampler holds the user's embedder, which
        need not be picklable.
        """
        return {**self.__dict__, "study": in_memory(self.study, self.study.get_trials(deepcopy=False))}

    def __deepcopy__(self, memo: dict[int, object]) -> Findings:
        return self  # frozen; a copied program shares it


def in_memory(study: Study, trials: Sequence[FrozenTrial]) -> Study:
    """A study of these trials, with the name and the attributes of another one, in memory."""
    sampler = optuna.samplers.RandomSampler()
    copied = optuna.create_study(study_name=study.study_name, direction="maximize", sampler=sampler)
    for key, value in study.user_attrs.items():
        if not key.startswith(ANSWERS):  # which only a run that goes on needs, from the storage
            copied.set_user_attr(key, value)
    copied.add_trials(trials)
    return copied
