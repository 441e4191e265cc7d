"""Chooses the configurations to measure next by batch expected improvement over an enumerated choice set.

The acquisition functions and the greedy batch are BoTorch's. This module adds the choices (all
configurations, or a sample refined by local search), and a table of their posterior that BoTorch looks up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set

import numpy as np
import torch
from botorch.acquisition import AcquisitionFunction
from botorch.acquisition.analytic import LogExpectedImprovement
from botorch.acquisition.logei import qLogExpectedImprovement
from botorch.acquisition.objective import PosteriorTransform
from botorch.models.model import Model
from botorch.optim import optimize_acqf_discrete
from botorch.posteriors import GPyTorchPosterior, Posterior
from botorch.sampling import SobolQMCNormalSampler
from gpytorch.distributions import MultivariateNormal
from linear_operator import to_linear_operator
from torch import Tensor

from mpromptune.model.devices import plain_torch
from mpromptune.model.space import IndexArray, IndexSpace, Row
from mpromptune.model.surrogate import Surrogate, quiet_single_thread

LISTED = 2000  # default number of configurations that a proposal enumerates

Value = Callable[[Tensor], Tensor]  # N x C rows -> N values, higher is better

# NOTE: with 64 Sobol points the deviation from the closed form is 6 % one standard deviation below the
# incumbent and 16 % at one and a half; with 128 it is 4 % and 10 %, in twice the time. All choices of a
# proposal use the same points, so most of the deviation cancels when they are compared.
_MC_SAMPLES = 64
# NOTE: joint values are computed for this many choices, those with the highest expected improvement of their
# own, so the time of a proposal hardly depends on the size of the space. 32 choices were too few for batches
# of seven with 28 pending: regret on GSM8K 2.3 +- 0.6, but 0.9 +- 0.3 with 64 (30 seeds).
_SHORTLIST = 64
# NOTE: starts, steps, and rows kept per step. They bound the work and were not tuned: the leader and two
# rivals, and more steps than a program of a few predictors has components.
_STARTS, _STEPS, _KEPT = 3, 8, 64
# NOTE: largest number of neighbours for a step that evaluates all of them. With more neighbours (where a step
# would cost as much as a proposal), each component in turn takes its own step, in two sweeps; the rows kept
# per step make up as many in total as above, for a program of 8 predictors.
_ALL_AT_ONCE, _SWEEPS, _KEPT_OF_SWEEP = 512, 2, 16


def choice_set(
    space: IndexSpace,
    max_space_size: int,
    measured: Set[Row],
    pending: Set[Row],
    rng: np.random.Generator,
    value: Value | None = None,
    starts: Sequence[Row] = (),
) -> Tensor:
    """The choices for one proposal, ``N x C``: configurations that are neither measured nor pending.

    If there are none, pending configurations that were not measured; if there are none of these, all.

    Args:
        space: The configurations that exist.
        max_space_size: Spaces up to this size are enumerated. In a larger space, the choices are
            ``max_space_size`` random configurations and, with ``value``, the rows found by a coordinate-wise
            local search and the starts themselves, which may be measured again.
        measured: Configurations that have been measured.
        pending: Configurations that are being measured.
        rng: Draws the sample.
        value: Acquisition value of single configurations, for the local search.
        starts: Configurations to start from, best first.
    """
    rows = space.sample(max_space_size, rng)
    if value is not None and space.size > max_space_size:
        found = [local_search(space, start, value) for start in starts[:_STARTS]]
        rows = np.unique(np.concatenate([rows, *found, np.array(starts, dtype=rows.dtype)]), axis=0)
    for taken in ({*measured, *pending}, measured):
        free = rows[[tuple(row) not in taken for row in rows.tolist()]]
        if len(free):
            return torch.from_numpy(free)
    return torch.from_numpy(rows)


def local_search(space: IndexSpace, start: Row, value: Value) -> IndexArray:
    """Climb from ``start`` by changes of one component; return the best rows evaluated.

    Each step takes the best of all neighbours or, if there are many, the best of one component after another.
    """
    by_component = space.combinations is None and sum(space.sizes) > _ALL_AT_ONCE
    sweeps, kept = (_SWEEPS, _KEPT_OF_SWEEP) if by_component else (_STEPS, _KEPT)
    components = range(len(space.sizes)) if by_component else [None]
    current, best = start, float(value(torch.tensor([start]))) if by_component else -np.inf
    met = [np.empty((0, len(start)), dtype=np.int64)]
    for _ in range(sweeps):
        before = best
        for component in components:
            rows = space.neighbours(current, component)
            values = value(torch.from_numpy(rows)).numpy() if len(rows) else np.empty(0)
            order = np.argsort(-values, kind="stable")
            met.append(rows[order[:kept]])
            if len(rows) and values[order[0]] > best:
                current, best = tuple(rows[order[0]].tolist()), float(values[order[0]])
        if best == before:
            break
    return np.concatenate(met)


@plain_torch()
def propose(
    model: Surrogate,
    choices: Tensor,
    q: int,
    best_f: float,
    X_pending: Tensor | None = None,
    n_batches: int = 0,
    seed: int = 0,
) -> Tensor:
    r"""The q choices that together have the highest expected improvement (qLogEI).

    .. math:: qEI(X) = E[\max(\max_i f(x_i) - f^*, 0)]

    Choices are added greedily, each conditioned on the earlier ones [Wilson2018]_; then
    ``n_batches`` random joint batches compete with the greedy one.

    Args:
        model: A fitted surrogate.
        choices: ``N x C`` distinct candidate indices, ``N >= 1``.
        q: Number of choices; fewer are returned if ``N < q``.
        best_f: The incumbent, the highest posterior mean among measured configurations.
        X_pending: ``p x C`` configurations that are being measured.
        n_batches: Number of random joint batches.
        seed: Determines the Monte-Carlo base samples and the random batches.

    Returns:
        ``q x C`` rows of ``choices``, all distinct.

    .. [Ament2023] S. Ament et al. Unexpected Improvements to Expected Improvement for Bayesian
        Optimization. NeurIPS 2023.
    .. [Wilson2018] J. Wilson, F. Hutter, M. Deisenroth. Maximizing acquisition functions for
        Bayesian optimization. NeurIPS 2018.
    """
    q = min(q, len(choices))
    generator = torch.Generator().manual_seed(seed)
    # Ties go to the first choice, so the order must be random.
    choices = choices[torch.randperm(len(choices), generator=generator)]
    if len(choices) > _SHORTLIST:
        alone = log_expected_improvement(model, best_f, choices)
        choices = choices[alone.topk(_SHORTLIST).indices.sort().values]
    pending = choices[:0] if X_pending is None else X_pending.to(choices)
    with quiet_single_thread(), torch.no_grad():
        table = PosteriorTable(*model.joint(torch.cat([choices, pending])))
        free, running = table.positions[: len(choices)], table.positions[len(choices) :]
        acqf = expected_improvement(table, best_f, running, seed)
        greedy = optimize_acqf_discrete(acqf, q=q, choices=free)[0].reshape(1, q, -1)
        batches = torch.cat([greedy, _random_batches(acqf, free, q, n_batches, generator)])
        best = batches[acqf(batches).argmax() if len(batches) > 1 else 0]
    return choices[best.squeeze(-1).long()]


def _random_batches(
    acqf: AcquisitionFunction, choices: Tensor, q: int, n_batches: int, generator: torch.Generator
) -> Tensor:
    """``n_batches x q x 1`` random batches; choices with a high value of their own are more likely."""
    if n_batches < 1 or q < 2 or len(choices) <= q:
        return choices.new_empty(0, q, 1)
    alone = acqf(choices.unsqueeze(-2))
    odds = torch.softmax((alone - alone.max()) / alone.std().clamp_min(1e-6), dim=0)
    odds = odds.clamp_min(1e-12).expand(n_batches, -1)
    return choices[torch.multinomial(odds, q, replacement=False, generator=generator)]


def expected_improvement(
    model: Model, best_f: float, X_pending: Tensor | None = None, seed: int = 0
) -> qLogExpectedImprovement:
    """qLogEI of the points of a BoTorch model, with base samples fixed by ``seed``."""
    sampler = SobolQMCNormalSampler(torch.Size([_MC_SAMPLES]), seed=seed)
    pending = None if X_pending is None or not len(X_pending) else X_pending
    return qLogExpectedImprovement(model, best_f=best_f, sampler=sampler, X_pending=pending)


@plain_torch()
def log_expected_improvement(model: Surrogate, best_f: float, rows: Tensor) -> Tensor:
    """Log EI of single configurations, ``N x C`` to ``N``, in closed form [Ament2023]_."""
    table = PosteriorTable(*model.single(rows))
    with torch.no_grad():
        values: Tensor = LogExpectedImprovement(table, best_f)(table.positions.unsqueeze(-2))
    return values


def ranked(model: Surrogate, measured: Tensor) -> tuple[Tensor, Tensor]:
    """The ``n x C`` measured configurations and their posterior means, highest first.

    The first mean is the plug-in incumbent ``best_f``. Unlike the best observed value it is not biased by
    luck, and unlike the sampled incumbent of noisy EI it gives a positive value to measuring a promising
    configuration again.
    """
    means, _ = model.single(measured)
    order = means.argsort(descending=True, stable=True)
    return measured[order], means[order]


class PosteriorTable(Model):
    """The posterior of some rows, computed once and looked up by position.

    A greedy batch needs thousands of small joint posteriors of the same rows.

    Args:
        mean: Means of the N rows.
        covariance: Covariances ``N x N``; or N variances, for posteriors of single rows only.
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        super().__init__()
        self._mean = mean
        self._covariance = covariance

    @property
    def positions(self) -> Tensor:
        """The positions of all rows, ``N x 1``: the inputs for BoTorch."""
        return torch.arange(len(self._mean), dtype=torch.float64).unsqueeze(-1)

    @property
    def num_outputs(self) -> int:
        """One, as for the surrogate."""
        return 1

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
    ) -> Posterior:
        """The joint posterior of the rows at ``... x q x 1`` positions."""
        at = X.squeeze(-1).long()
        single = self._covariance.dim() == 1
        pairs = (at.unsqueeze(-1),) if single else (at.unsqueeze(-1), at.unsqueeze(-2))
        # A linear operator is factorised only when it is sampled from, and corrected if it is singular.
        covariance = to_linear_operator(self._covariance[pairs])
        posterior = GPyTorchPosterior(MultivariateNormal(self._mean[at], covariance))
        return posterior if posterior_transform is None else posterior_transform(posterior)
