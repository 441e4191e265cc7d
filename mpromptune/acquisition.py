"""Which configurations to measure next: batch expected improvement over an enumerated choice set."""

from __future__ import annotations

import torch
from botorch.acquisition import AcquisitionFunction
from botorch.acquisition.analytic import LogExpectedImprovement
from botorch.acquisition.logei import qLogExpectedImprovement
from botorch.acquisition.objective import PosteriorTransform
from botorch.models import SingleTaskGP
from botorch.optim import optimize_acqf_discrete
from botorch.posteriors import GPyTorchPosterior, Posterior
from botorch.sampling import SobolQMCNormalSampler
from gpytorch.distributions import MultivariateNormal
from torch import Tensor

from mpromptune.surrogate import at_average_example, posterior_mean_and_variance, quiet_single_thread

# NOTE: 128 Sobol points agree with the closed form and with brute force to a few percent wherever
# the improvement is not negligible (tests/test_acquisition.py).
_MC_SAMPLES = 128
# NOTE: joint values are computed for this many choices, the best by their own expected improvement:
# the time of a proposal then hardly depends on the size of the space.
_SHORTLIST = 128


def propose(
    model: SingleTaskGP,
    choices: Tensor,
    q: int,
    best_f: float,
    X_pending: Tensor | None = None,
    n_batches: int = 0,
    seed: int = 0,
    noise: float | None = None,
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
        noise: Variance of a measurement. With it the improvement is that of the next posterior mean
            (see `NextPosteriorMean`), and a choice may be taken, or be pending, several times.

    Returns:
        ``q x C`` rows of ``choices``; without ``noise`` at most N, all distinct.

    .. [Ament2023] S. Ament et al. Unexpected Improvements to Expected Improvement for Bayesian
        Optimization. NeurIPS 2023.
    .. [Wilson2018] J. Wilson, F. Hutter, M. Deisenroth. Maximizing acquisition functions for
        Bayesian optimization. NeurIPS 2018.
    """
    q = q if noise else min(q, len(choices))
    generator = torch.Generator().manual_seed(seed)
    # Ties go to the first choice, so the order must favour none.
    shuffled = choices[torch.randperm(len(choices), generator=generator)]
    shuffled = _shortlist(model, shuffled, best_f)
    acqf = expected_improvement(model, best_f, X_pending, seed, noise)
    with quiet_single_thread():
        greedy = _greedy(acqf, shuffled, q, unique=noise is None)
        rival = _best_random_batch(acqf, shuffled, q, n_batches, generator)
        return greedy if rival is None else _better(acqf, greedy, rival)


def expected_improvement(
    model: SingleTaskGP,
    best_f: float,
    X_pending: Tensor | None = None,
    seed: int = 0,
    noise: float | None = None,
) -> qLogExpectedImprovement:
    """qLogEI at an average example, with base samples fixed by ``seed``."""
    sampler = SobolQMCNormalSampler(torch.Size([_MC_SAMPLES]), seed=seed)
    pending = None if X_pending is None or not len(X_pending) else at_average_example(X_pending)
    return qLogExpectedImprovement(
        model,
        best_f=best_f,
        sampler=sampler,
        X_pending=pending,
        posterior_transform=None if noise is None else NextPosteriorMean(noise),
    )


class NextPosteriorMean(PosteriorTransform):
    r"""From the posterior of f to that of the posterior mean once all of X has been measured.

    .. math:: \mu' \sim N(\mu, \Sigma (\Sigma + \tau^2 I)^{-1} \Sigma)

    A point may occur several times in X: each is one more measurement of it.

    Args:
        noise: :math:`\tau^2`, variance of one measurement.
    """

    scalarize = True

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, posterior: Posterior, X: Tensor | None = None) -> GPyTorchPosterior:
        """The transformed posterior."""
        assert isinstance(posterior, GPyTorchPosterior)
        mean = posterior.mean.squeeze(-1)
        covariance = posterior.distribution.covariance_matrix
        eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype)
        # A point that occurs twice makes both matrices singular but for this.
        jitter = 1e-6 * covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * eye
        half = torch.linalg.cholesky(covariance + self.noise * eye + jitter)
        root = torch.linalg.solve_triangular(half, covariance, upper=False)
        return GPyTorchPosterior(MultivariateNormal(mean, root.mT @ root + jitter))

    def evaluate(self, Y: Tensor, X: Tensor | None = None) -> Tensor:  # noqa: N803 - BoTorch's name
        """Outcomes as they are."""
        return Y


def log_expected_improvement(model: SingleTaskGP, best_f: float, rows: Tensor) -> Tensor:
    """Log EI of single configurations, ``n x C`` to ``n``, in closed form [Ament2023]_."""
    with torch.no_grad(), quiet_single_thread():
        values: Tensor = LogExpectedImprovement(model, best_f)(at_average_example(rows).unsqueeze(-2))
    return values


def plug_in_incumbent(model: SingleTaskGP, measured: Tensor) -> float:
    """``best_f``: the highest posterior mean among the ``n x C`` measured configurations.

    Unlike the best value observed it is not the luckiest one, and unlike the noisy EI's sampled
    incumbent it leaves something to gain from measuring a promising configuration again.
    """
    mean, _ = posterior_mean_and_variance(model, measured)
    return float(mean.max())


def _shortlist(model: SingleTaskGP, choices: Tensor, best_f: float) -> Tensor:
    """The choices that are worth a joint evaluation, in their order."""
    if len(choices) <= _SHORTLIST:
        return choices
    best = log_expected_improvement(model, best_f, choices).topk(_SHORTLIST).indices
    return choices[best.sort().values]


def _greedy(acqf: AcquisitionFunction, choices: Tensor, q: int, unique: bool) -> Tensor:
    candidates, _ = optimize_acqf_discrete(acqf, q=q, choices=at_average_example(choices), unique=unique)
    return candidates.reshape(q, -1)[:, :-1].to(choices.dtype)


def _best_random_batch(
    acqf: AcquisitionFunction, choices: Tensor, q: int, n_batches: int, generator: torch.Generator
) -> Tensor | None:
    """Best of ``n_batches`` batches, drawn in favour of choices that are good on their own."""
    if n_batches < 1 or q < 2 or len(choices) <= q:
        return None
    with torch.no_grad():
        alone = acqf(at_average_example(choices).unsqueeze(-2))
        odds = torch.softmax((alone - alone.max()) / alone.std().clamp_min(1e-6), dim=0)
        odds = odds.clamp_min(1e-12).expand(n_batches, -1)
        draws = torch.multinomial(odds, q, replacement=False, generator=generator)
        values = acqf(at_average_example(choices[draws]))
    return choices[draws[values.argmax()]]


def _better(acqf: AcquisitionFunction, greedy: Tensor, rival: Tensor) -> Tensor:
    with torch.no_grad():
        values = acqf(at_average_example(torch.stack([greedy, rival])))
    return rival if values[1] > values[0] else greedy
