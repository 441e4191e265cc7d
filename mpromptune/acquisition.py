"""Which configurations to measure next: batch expected improvement over an enumerated choice set."""

from __future__ import annotations

import torch
from botorch.acquisition import AcquisitionFunction
from botorch.acquisition.logei import qLogExpectedImprovement
from botorch.models import SingleTaskGP
from botorch.optim import optimize_acqf_discrete
from botorch.sampling import SobolQMCNormalSampler
from torch import Tensor

from mpromptune.surrogate import at_average_example, posterior_mean_and_variance, quiet_single_thread

# NOTE: 128 Sobol points agree with the closed form and with brute force to a few percent wherever
# the improvement is not negligible (tests/test_acquisition.py).
_MC_SAMPLES = 128


def propose(
    model: SingleTaskGP,
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
        ``min(q, N) x C`` rows of ``choices``.

    .. [Ament2023] S. Ament et al. Unexpected Improvements to Expected Improvement for Bayesian
        Optimization. NeurIPS 2023.
    .. [Wilson2018] J. Wilson, F. Hutter, M. Deisenroth. Maximizing acquisition functions for
        Bayesian optimization. NeurIPS 2018.
    """
    q = min(q, len(choices))
    generator = torch.Generator().manual_seed(seed)
    # Ties go to the first choice, so the order must favour none.
    shuffled = choices[torch.randperm(len(choices), generator=generator)]
    acqf = expected_improvement(model, best_f, X_pending, seed)
    with quiet_single_thread():
        greedy = _greedy(acqf, shuffled, q)
        rival = _best_random_batch(acqf, shuffled, q, n_batches, generator)
        return greedy if rival is None else _better(acqf, greedy, rival)


def expected_improvement(
    model: SingleTaskGP, best_f: float, X_pending: Tensor | None = None, seed: int = 0
) -> qLogExpectedImprovement:
    """qLogEI at an average example, with base samples fixed by ``seed``."""
    sampler = SobolQMCNormalSampler(torch.Size([_MC_SAMPLES]), seed=seed)
    pending = None if X_pending is None or not len(X_pending) else at_average_example(X_pending)
    return qLogExpectedImprovement(model, best_f=best_f, sampler=sampler, X_pending=pending)


def plug_in_incumbent(model: SingleTaskGP, measured: Tensor) -> float:
    """``best_f``: the highest posterior mean among the ``n x C`` measured configurations.

    Unlike the best value observed it is not the luckiest one, and unlike the noisy EI's sampled
    incumbent it leaves something to gain from measuring a promising configuration again.
    """
    mean, _ = posterior_mean_and_variance(model, measured)
    return float(mean.max())


def _greedy(acqf: AcquisitionFunction, choices: Tensor, q: int) -> Tensor:
    candidates, _ = optimize_acqf_discrete(acqf, q=q, choices=at_average_example(choices))
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
