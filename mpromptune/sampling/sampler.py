"""qEISampler: an Optuna sampler that proposes batches of configurations by their texts."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from copy import copy
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import intersection_search_space
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from mpromptune.errors import UnknownOptionError, require_count, unknown
from mpromptune.execution.pool import in_time
from mpromptune.model.acquisition import LISTED, choice_set, log_expected_improvement, propose, ranked
from mpromptune.model.devices import plain_torch, resolve_device
from mpromptune.model.embedding import CachedEmbedder, Embedder, as_embedder
from mpromptune.model.space import FloatArray, PromptSpace
from mpromptune.model.surrogate import fit
from mpromptune.sampling.encoding import (
    Encoding,
    History,
    distributions_of,
    encode_distributions,
    encode_prompts,
    proposed_params,
)
from mpromptune.storage.attributes import PLAN, PROPOSED

_BATCH_SIZE = 4


class qEISampler(BaseSampler):  # noqa: N801 - the name under which the sampler is known
    """Batch expected improvement over embedded prompts, for any Optuna study.

    Texts are embedded once, and a Gaussian process over the embeddings is fitted to the finished trials of
    the study. Then ``batch_size`` configurations at a time are chosen by batch expected improvement (qLogEI),
    with the running trials as pending points. All state is in the study, and random numbers depend on
    ``(seed, trial number)``: a resumed study continues as if it had not been interrupted, and threads do not
    change the proposals.

    Categorical parameters whose choices are all strings are embedded; other choices are compared by identity;
    numbers are compared by their position in the range. With ``space``, parameters are candidate indices (as
    in DSPy's MIPROv2), and the space has the texts.

    Args:
        max_space_size: Spaces of up to this many configurations are enumerated at every proposal;
            larger ones are sampled and searched locally.
        n_batches: Number of random joint batches that compete with the greedy one.
        batch_size: Number of configurations proposed at once (q). None means that a search chooses it;
            elsewhere it is 4.
        min_cold_start: Number of finished trials before the first model; until then proposals are random.
        space: The texts of index-valued parameters.
        embedder: Model name or path, ``SentenceTransformer``, ``dspy.Embedder``, callable
            ``texts -> (n, d)``, or ``"index"`` to ignore the texts. Default: all-MiniLM-L6-v2.
        independent_sampler: Samples parameters outside the joint search space (default: random).
        seed: The same seed and history give the same proposals. None draws a seed.
        device: Device on which the surrogate is fitted and evaluated, such as ``"cuda"``; by default the CPU.

    Raises:
        InvalidArgumentError: An argument is out of range.
        UnknownOptionError: An argument is unknown (a TypeError).
        ValueError: The study is multi-objective.

    Example:
        >>> study = optuna.create_study(direction="maximize", sampler=qEISampler(seed=0))
        >>> study.optimize(objective, n_trials=40)
    """

    def __init__(
        self,
        max_space_size: int = LISTED,
        n_batches: int = 32,
        batch_size: int | None = _BATCH_SIZE,
        min_cold_start: int = 4,
        *,
        space: PromptSpace | None = None,
        embedder: Any = None,
        independent_sampler: BaseSampler | None = None,
        seed: int | None = None,
        device: str | torch.device | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise _unknown_argument(next(iter(unknown)))
        self.max_space_size = require_count("max_space_size", max_space_size, 1)
        self.n_batches = require_count("n_batches", n_batches, 0)
        self.batch_size = None if batch_size is None else require_count("batch_size", batch_size, 1)
        self.min_cold_start = require_count("min_cold_start", min_cold_start, 1)
        self.seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        self.device = resolve_device(device)
        self.space = space
        self._embedder = resolve_embedder(embedder)
        self._independent_sampler = independent_sampler
        self._prompts: Encoding | None = None
        self._lock = threading.RLock()

    def bound_to(self, space: PromptSpace) -> qEISampler:
        """A copy for the configurations of ``space``."""
        bound = copy(self)
        bound.space, bound._prompts = space, None
        return bound

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def prompts(self) -> Encoding | None:
        """The encoding of ``space``; texts are embedded at the first call."""
        if self._prompts is None and self.space is not None:
            self._prompts = encode_prompts(self.space, self._embedder).on(self.device)
        return self._prompts

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The parameters that all trials share, and those of ``space``."""
        own = _index_distributions(self.space)
        trials = study.get_trials(deepcopy=False)
        if own and all(t.params.keys() <= own.keys() for t in trials):  # faster than Optuna's comparison
            return own
        found = intersection_search_space(trials) or _suggested_by_running(study)
        shared = {k: d for k, d in found.items() if not d.single()}
        return {**shared, **own}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Params of one configuration of the current batch.

        Raises:
            ValueError: The study is multi-objective.
        """
        self._raise_error_if_multi_objective(study)
        if not search_space:
            return {}
        with self._lock:
            params = self._sample(study, trial, search_space)
            study._storage.set_trial_system_attr(trial._trial_id, PROPOSED, params)
        return params

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """The value of one parameter, drawn from ``(seed, trial number, name)``."""
        self._raise_error_if_multi_objective(study)
        sampler = self._independent_sampler
        if sampler is None:
            sampler = RandomSampler(seed=self._seed_for(trial, *param_name.encode("utf-8", "surrogatepass")))
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        """Reseed only the independent sampler, because all other draws depend on the trial number."""
        if self._independent_sampler is not None:
            self._independent_sampler.reseed_rng()

    def check_embedder(self, texts: Sequence[str]) -> None:
        """Embed ``texts`` now, so that a broken embedder fails before anything is paid for."""
        if self._embedder is not None and texts:
            self._embedder(list(texts))

    def _seed_for(self, trial: FrozenTrial, *extra: int) -> int:
        entropy = [abs(self.seed), trial.number, *extra]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def _sample(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        known = sum(t.state.is_finished() for t in others)
        params = _next_of_plan(others, known, list(search_space))
        if params is None:
            encoding = self._encoding(search_space, others)
            rows = self._rows(encoding, encoding.history(study, others), self._seed_for(trial))
            batch = [{k: v for k, v in encoding.params(row).items() if k in search_space} for row in rows]
            params = batch[0]
            late = [t.number for t in others if t.number < trial.number and _is_to_be_proposed(t)]
            plan: dict[str, Any] = {"known": known, "batch": batch, "late": late}
            study._storage.set_trial_system_attr(trial._trial_id, PLAN, plan)
        return params

    def _encoding(self, search_space: dict[str, BaseDistribution], others: list[FrozenTrial]) -> Encoding:
        prompts = self.prompts()
        if prompts is not None and search_space == _index_distributions(self.space):
            return prompts
        observed = [proposed_params(t) for t in others]
        return encode_distributions(search_space, observed, self._embedder, prompts).on(self.device)

    @plain_torch()
    def _rows(self, encoding: Encoding, history: History, seed: int) -> list[list[int]]:
        """The next batch; one random configuration before there is a model."""
        rng = np.random.default_rng(seed)
        choices_of = partial(
            choice_set, encoding.space, self.max_space_size, history.measured, {*history.pending}, rng
        )
        if len(history.train_Y) < self.min_cold_start:
            choices = choices_of()
            return [choices[int(rng.integers(len(choices)))].tolist()]
        model = fit(history.train_X, history.train_Y, encoding.geometries)
        measured, means = ranked(model, torch.tensor(sorted(history.measured), dtype=torch.float64))
        best_f = float(means[0])
        choices = choices_of(partial(log_expected_improvement, model, best_f), measured.long().tolist())
        pending = torch.tensor(history.pending, dtype=torch.float64)
        q = self.batch_size or _BATCH_SIZE
        return propose(model, choices, q, best_f, pending, self.n_batches, seed).long().tolist()


def _unknown_argument(name: str) -> UnknownOptionError:
    valid = [argument for argument in signature(qEISampler).parameters if argument != "unknown"]
    return UnknownOptionError(unknown("argument of qEISampler", name, valid, "help(mpromptune.qEISampler)"))


def resolve_embedder(spec: Any) -> Embedder | None:
    """Like `as_embedder`, with None for ``"index"``; the embedder can be interrupted if it hangs."""
    return None if spec == "index" else partial(_embed_in_time, as_embedder(spec))


def _embed_in_time(embedder: CachedEmbedder, texts: list[str]) -> FloatArray:
    return in_time(partial(embedder, texts))


def _index_distributions(space: PromptSpace | None) -> dict[str, BaseDistribution]:
    return {} if space is None else {k: d for k, d in distributions_of(space).items() if not d.single()}


def _suggested_by_running(study: Study) -> dict[str, BaseDistribution]:
    """The parameters that all running trials share, for a study without complete trials."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    spaces = [t.distributions for t in running if t.distributions]
    if not spaces:
        return {}
    return {k: d for k, d in sorted(spaces[0].items()) if all(s.get(k) == d for s in spaces)}


def _agrees(params: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether ``other`` has these params; compared by representation, since NaN is not equal to itself."""
    return all(name in other and repr(other[name]) == repr(value) for name, value in params.items())


def _is_to_be_proposed(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.RUNNING and not proposed_params(trial)


def _next_of_plan(others: list[FrozenTrial], known: int, names: list[str]) -> dict[str, Any] | None:
    """The next configuration of the newest batch; None if it is used up or trials have finished since."""
    leader = next((t for t in reversed(others) if PLAN in t.system_attrs), None)
    if leader is None or leader.system_attrs[PLAN]["known"] != known:
        return None
    plan = leader.system_attrs[PLAN]
    late = plan.get("late", ())  # with threads, an earlier trial may be proposed after a later one
    handed_out = [proposed_params(t) for t in others if t.number >= leader.number or t.number in late]
    for params in plan["batch"]:
        taken = next((i for i, other in enumerate(handed_out) if _agrees(params, other)), None)
        if taken is not None:
            del handed_out[taken]
        elif set(params) == set(names):
            return dict(params)
    return None
