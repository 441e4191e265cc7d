"""Which configurations to measure next: batch expected improvement over an enumerated choice set."""

from __future__ import annotations

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
from mpromptune.model.surrogate import (
    Surrogate,
    joint_posterior,
    posterior_mean_and_variance,
    quiet_single_thread,
)

# NOTE: deviation from the closed form over draws of 64 Sobol points: 6 % a standard deviation below the
# incumbent, 16 % at one and a half; with 128 it is 4 % and 10 %, in twice the time. All choices of a
# proposal have the same points, so most of it cancels between them.
_MC_SAMPLES = 64
# NOTE: joint values are computed for this many choices, the best by their own expected improvement:
# the time of a proposal then hardly depends on the size of the space. With 32, batches of seven with 28
# pending lacked what those leave to learn: regret on GSM8K 2.3 +- 0.6, 0.9 +- 0.3 with 64 (30 seeds).
_SHORTLIST = 64


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

    Choices are added greedily, each conditioned on those before it [Wilson2018]_; then
    ``n_batches`` random joint batches compete with the greedy one.

    Args:
        model: A fitted surrogate.
        choices: ``N x C`` distinct candidate indices, ``N >= 1``.
        q: Number of choices wanted; fewer are returned when ``N < q``.
        best_f: The incumbent, the highest posterior mean among measured configurations.
        X_pending: ``p x C`` configurations that are being measured.
        n_batches: Number of random joint batches.
        seed: Fixes the Monte-Carlo base samples and the random batches.

    Returns:
        ``q x C`` rows of ``choices``, all distinct.

    .. [Ament2023] S. Ament et al. Unexpected Improvements to Expected Improvement for Bayesian
        Optimization. NeurIPS 2023.
    .. [Wilson2018] J. Wilson, F. Hutter, M. Deisenroth. Maximizing acquisition functions for
        Bayesian optimization. NeurIPS 2018.
    """
    q = min(q, len(choices))
    generator = torch.Generator().manual_seed(seed)
    # Ties go to the first choice, so the order must favour none.
    shuffled = choices[torch.randperm(len(choices), generator=generator)]
    shuffled = _shortlist(model, shuffled, best_f)
    pending = shuffled[:0] if X_pending is None else X_pending.to(shuffled)
    with quiet_single_thread():
        table = PosteriorTable.joint(model, torch.cat([shuffled, pending]))
        free, running = table.positions[: len(shuffled)], table.positions[len(shuffled) :]
        acqf = expected_improvement(table, best_f, running, seed)
        greedy = _greedy(acqf, free, q)
        rivals = _random_batches(acqf, free, q, n_batches, generator)
        best = _best(acqf, torch.cat([greedy.unsqueeze(0), rivals]))
    return shuffled[best.squeeze(-1).long()]


def expected_improvement(
    model: Model,
    best_f: float,
    X_pending: Tensor | None = None,
    seed: int = 0,
) -> qLogExpectedImprovement:
    """qLogEI of the points of ``model``, with base samples fixed by ``seed``."""
    sampler = SobolQMCNormalSampler(torch.Size([_MC_SAMPLES]), seed=seed)
    return qLogExpectedImprovement(
        model,
        best_f=best_f,
        sampler=sampler,
        X_pending=None if X_pending is None or not len(X_pending) else X_pending,
    )


class PosteriorTable(Model):
    """The posterior of a few rows at an average example, computed once and looked up by position.

    A greedy batch asks for thousands of small joint posteriors of the same rows.

    Args:
        mean: Of the n rows.
        covariance: ``n x n``; or their n variances, for posteriors of single rows only.
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        super().__init__()
        self._mean = mean
        self._covariance = covariance

    @classmethod
    def joint(cls, model: Surrogate, rows: Tensor) -> PosteriorTable:
        """Of ``n x C`` candidate indices, of which some may be equal."""
        return cls(*joint_posterior(model, rows))

    @property
    def positions(self) -> Tensor:
        """All of them, ``n x 1``: what BoTorch takes for inputs."""
        return torch.arange(len(self._mean), dtype=torch.float64).unsqueeze(-1)

    @property
    def num_outputs(self) -> int:
        """One, as of the surrogate."""
        return 1

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
    ) -> Posterior:
        """Of the rows at ``... x q x 1`` positions."""
        at = X.squeeze(-1).long()
        single = self._covariance.dim() == 1
        pairs = (at.unsqueeze(-1),) if single else (at.unsqueeze(-1), at.unsqueeze(-2))
        # A linear operator is factorised only when it is sampled from, and mended where it is singular.
        covariance = to_linear_operator(self._covariance[pairs])
        posterior = GPyTorchPosterior(MultivariateNormal(self._mean[at], covariance))
        return posterior if posterior_transform is None else posterior_transform(posterior)


@plain_torch()
def log_expected_improvement(model: Surrogate, best_f: float, rows: Tensor) -> Tensor:
    """Log EI of single configurations, ``n x C`` to ``n``, in closed form [Ament2023]_."""
    table = PosteriorTable(*posterior_mean_and_variance(model, rows))
    with torch.no_grad():
        values: Tensor = LogExpectedImprovement(table, best_f)(table.positions.unsqueeze(-2))
    return values


@plain_torch()
def ranked(model: Surrogate, measured: Tensor) -> tuple[Tensor, Tensor]:
    """The ``n x C`` measured configurations and their posterior means, the highest first.

    The first mean is the plug-in incumbent, ``best_f``: unlike the best value observed it is not the
    luckiest one, and unlike the noisy EI's sampled incumbent it leaves something to gain from measuring a
    promising configuration again.
    """
    means, _ = posterior_mean_and_variance(model, measured)
    order = means.argsort(descending=True, stable=True)
    return measured[order], means[order]


def _shortlist(model: Surrogate, choices: Tensor, best_f: float) -> Tensor:
    """The choices that are worth a joint evaluation, in their order."""
    if len(choices) <= _SHORTLIST:
        return choices
    best = log_expected_improvement(model, best_f, choices).topk(_SHORTLIST).indices
    return choices[best.sort().values]


def _greedy(acqf: AcquisitionFunction, choices: Tensor, q: int) -> Tensor:
    candidates, _ = optimize_acqf_discrete(acqf, q=q, choices=choices)
    return candidates.reshape(q, -1)


def _random_batches(
    acqf: AcquisitionFunction, choices: Tensor, q: int, n_batches: int, generator: torch.Generator
) -> Tensor:
    """``n_batches x q x 1`` batches, drawn in favour of choices that are good on their own."""
    if n_batches < 1 or q < 2 or len(choices) <= q:
        return choices.new_empty(0, q, 1)
    with torch.no_grad():
        alone = acqf(choices.unsqueeze(-2))
    odds = torch.softmax((alone - alone.max()) / alone.std().clamp_min(1e-6), dim=0)
    odds = odds.clamp_min(1e-12).expand(n_batches, -1)
    return choices[torch.multinomial(odds, q, replacement=False, generator=generator)]


def _best(acqf: AcquisitionFunction, batches: Tensor) -> Tensor:
    """The batch of the highest value; of equal ones, the first."""
    if len(batches) == 1:
        return batches[0]
    with torch.no_grad():
        return batches[acqf(batches).argmax()]
