"""Adapts any Optuna sampler to a search: by name or object, restricted to open configurations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from mpromptune.model.space import PromptSpace, Row
from mpromptune.sampling import unknown_sampler
from mpromptune.sampling.encoding import Encoding, distributions_of, encode_prompts
from mpromptune.sampling.sampler import qEISampler

IsOpen = Callable[[Row], bool]

# NOTE: number of rows considered when a proposal must be replaced in a space too large to enumerate.
_REPLACEMENTS = 2000


def resolve_sampler(
    spec: BaseSampler | str | None, space: PromptSpace, seed: int, n_trials: int = 0
) -> BaseSampler:
    """A sampler by name (any case), or the object itself.

    Args:
        spec: The name or object; None for the default.
        space: The configurations.
        seed: Seed of the sampler.
        n_trials: Number of trials in the study. It changes the seed of Optuna's samplers, which would
            otherwise repeat the draws of an earlier run.

    Raises:
        InvalidArgumentError: The name is unknown.
    """
    if isinstance(spec, BaseSampler):
        return spec
    name = "qei" if spec is None else str(spec).lower()
    if name == "qei":
        return qEISampler(space=space, seed=seed)
    stream = seed % 2**32  # Optuna's samplers accept no other seeds
    if n_trials:
        stream = int(np.random.SeedSequence([abs(seed), n_trials]).generate_state(1)[0])
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=stream, multivariate=True, constant_liar=True)
    if name == "gp":
        return optuna.samplers.GPSampler(seed=stream)
    if name == "random":
        return optuna.samplers.RandomSampler(seed=stream)
    raise unknown_sampler(spec)


def is_qei(spec: BaseSampler | str | None) -> bool:
    """Whether a search with this sampler chooses configurations itself, by the evidence."""
    return isinstance(spec, qEISampler) or str(spec or "qei").lower() == "qei"


def bind(
    sampler: BaseSampler, space: PromptSpace, is_open: IsOpen, seed: int
) -> tuple[BaseSampler, Encoding]:
    """The sampler restricted to open configurations, and the encoding for the model of the search."""
    if not isinstance(sampler, qEISampler):
        return OpenSampler(sampler, space, is_open, seed), encode_prompts(space, None)
    bound = sampler.bound_to(space)
    encoding = bound.prompts()
    assert encoding is not None  # it has a space
    return bound, encoding


class OpenSampler(BaseSampler):
    """Replaces each proposal of another sampler by the nearest open configuration.

    Optuna's samplers may propose combinations that do not exist, or configurations that are fully measured.
    The nearest configuration has the most components in common; ties are broken at random.

    Args:
        inner: The sampler that proposes.
        space: The configurations that exist.
        is_open: Whether a configuration may be measured.
        seed: Breaks ties, together with the trial number.
    """

    def __init__(self, inner: BaseSampler, space: PromptSpace, is_open: IsOpen, seed: int) -> None:
        self._inner = copy.deepcopy(inner)  # samplers remember their study
        self._space = space
        self._is_open = is_open
        self._seed = abs(seed)
        self._distributions = {k: d for k, d in distributions_of(space).items() if not d.single()}

    def reseed_rng(self) -> None:
        self._inner.reseed_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        inner_space = self._inner.infer_relative_search_space(study, trial)
        params = self._inner.sample_relative(study, trial, inner_space)
        for name, distribution in self._distributions.items():
            if name not in params:
                so_far = _as_suggested(study, trial, params, self._distributions)
                params[name] = self._inner.sample_independent(study, so_far, name, distribution)
        row = tuple(int(params.get(name, 0)) for name in self._space.names)
        chosen = self._space.params(self._nearest_open(row, trial.number))
        return {name: chosen[name] for name in self._distributions}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._inner.before_trial(study, _not_enqueued(trial))

    def after_trial(self, study: Study, trial: FrozenTrial, state: Any, values: Any) -> None:
        endless = copy.copy(study)  # exhaustive samplers stop their study, but the plan must end the search
        vars(endless)["stop"] = _nothing
        self._inner.after_trial(endless, trial, state, values)

    def _nearest_open(self, row: Row, number: int) -> Row:
        if self._space.exists(row) and self._is_open(row):
            return row
        rng = np.random.default_rng([self._seed, number])
        sample = self._space.sample(_REPLACEMENTS, rng)
        rows = rng.permutation(sample[[self._is_open(tuple(r)) for r in sample.tolist()]])
        if not len(rows):  # the search notices that the result is not open
            return row if self._space.exists(row) else self._space.first()
        return tuple(rows[(rows == np.array(row)).sum(axis=1).argmax()].tolist())


def _nothing() -> None:
    pass


def _not_enqueued(trial: FrozenTrial) -> FrozenTrial:
    """The trial without its enqueued params, because grid samplers ignore enqueued trials."""
    asked = copy.copy(trial)
    asked.system_attrs = {k: v for k, v in trial.system_attrs.items() if k != "fixed_params"}
    return asked


def _as_suggested(
    study: Study, trial: FrozenTrial, params: dict[str, Any], distributions: dict[str, BaseDistribution]
) -> FrozenTrial:
    """The trial as the inner sampler expects it before its next parameter: with ``params`` suggested."""
    suggested = copy.copy(trial)
    suggested.system_attrs = study._storage.get_trial_system_attrs(trial._trial_id)
    suggested.distributions = {name: distributions[name] for name in params if name in distributions}
    suggested.params = {name: params[name] for name in suggested.distributions}
    return suggested
