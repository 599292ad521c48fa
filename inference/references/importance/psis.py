"""Pareto-smoothed importance sampling for many data at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PRIOR_WEIGHT = 10  # weight of the weak prior on k, in observations, as in the loo package


def good_k(n_draws: int) -> float:
    """Return the largest k at which S draws are enough: min(1 - 1 / log10 S, 0.7)."""
    return min(1 - 1 / math.log10(n_draws), 0.7)


def fit_generalized_pareto(excess: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a generalised Pareto distribution to each column of positive, ascending exceedances (M, N) (Zhang and Stephens 2009).

    Returns shape k and scale sigma, (N,) each. A weak prior pulls k towards 0.5, with the weight of 10 observations.
    """
    n = excess.shape[0]
    m_bs = 30 + int(n**0.5)
    grid = 1 - (m_bs / (torch.arange(1, m_bs + 1, dtype=excess.dtype, device=excess.device) - 0.5)).sqrt()
    quartile = excess[int(n / 4 + 0.5) - 1]
    theta = grid[:, None] / (3 * quartile) + 1 / excess[-1]  # (m, N)
    k = torch.stack([torch.log1p(-t * excess).mean(0) for t in theta])
    length = n * (torch.log(-theta / k) - k - 1)
    weights = torch.softmax(length, 0)
    theta_hat = (weights * theta).sum(0)
    k_hat = torch.log1p(-theta_hat * excess).mean(0)
    sigma = -k_hat / theta_hat
    k_hat = (n * k_hat + PRIOR_WEIGHT * 0.5) / (n + PRIOR_WEIGHT)
    return k_hat, sigma


@dataclass(frozen=True)
class Smoothed:
    """Pareto-smoothed importance weights.

    Attributes:
        log_weights: normalised smoothed log weights, (S, N).
        pareto_k: tail index, (N,); -inf where the largest weights of a datum are all equal, NaN where it is undefined.
        ess_fraction: 1 / (S sum_s W_s^2) of the normalised raw weights, (N,).
    """

    log_weights: Tensor
    pareto_k: Tensor
    ess_fraction: Tensor


def psis(log_weights: Tensor) -> Smoothed:
    """Pareto-smooth importance log weights (S, N) per datum; they may be unnormalised, S >= 25."""
    n_draws = log_weights.shape[0]
    tail = int(min(0.2 * n_draws, 3 * math.sqrt(n_draws)))
    shifted = (log_weights - log_weights.max(0).values).T.contiguous()  # (N, S): one datum's weights side by side
    ess_fraction = shifted.exp().sum(1).square() / (n_draws * (2 * shifted).exp().sum(1))

    top, place = shifted.topk(tail + 1, dim=1)  # descending; the last is the threshold
    cutoff = top[:, -1].clamp_min(math.log(torch.finfo(shifted.dtype).tiny))
    excess = (top[:, :-1].exp() - cutoff.exp()[:, None]).T.flip(0)  # ascending, (tail, N)
    # numerically equal weights have no tail; rounding noise must not be fitted
    spread = excess[-1] > 1e-10
    safe = torch.where(spread, excess, torch.linspace(0.1, 1, tail, dtype=excess.dtype, device=excess.device)[:, None])
    k, sigma = fit_generalized_pareto(safe.clamp_min(torch.finfo(excess.dtype).tiny))
    usable = spread & k.isfinite()
    equal = ~spread & log_weights.isfinite().all(0)

    p = (torch.arange(tail, dtype=excess.dtype, device=excess.device)[:, None] + 0.5) / tail
    quantile = torch.where(k.abs() < 1e-12, -sigma * torch.log1p(-p), sigma * torch.expm1(-k * torch.log1p(-p)) / k)
    smooth = torch.log(quantile + cutoff.exp()).clamp_max(0).flip(0).T
    new_tail = torch.where(usable[:, None], smooth, top[:, :-1])
    result = shifted.scatter(1, place[:, :-1], new_tail)
    return Smoothed(
        log_weights=torch.log_softmax(result, 1).T,
        pareto_k=torch.where(usable, k, torch.where(equal, -torch.inf, torch.nan)),
        ess_fraction=ess_fraction,
    )
