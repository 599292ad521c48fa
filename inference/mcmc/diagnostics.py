"""Convergence diagnostics of Markov chains, for all data and dimensions at once.

    R-hat = sqrt(((n - 1) / n W + B / n) / W)            B, W: variance between and within chains of n draws
    ESS   = C n / tau,  tau = -1 + 2 sum_k P_k + rho_2K   P_k = rho_2k + rho_2k+1, Geyer's initial monotone sequence
    MCSE  = sd / sqrt(ESS)

R-hat and bulk ESS use split, rank-normalised draws, R-hat also the folded ones (Vehtari, Gelman, Simpson, Carpenter, Buerkner
2021, https://doi.org/10.1214/20-BA1221). The numbers equal ArviZ's, which loops in Python over every datum and dimension.

Every function takes draws (C, D, *batch) (chain, draw, batch) of any precision and device, computes in float64, and returns one
number per column, shape *batch (`ebfmi`: one per chain and column). Fewer than two dimensions raise ValueError. Columns are
independent, and are taken in chunks, so that memory does not grow with their number. Special cases, as in ArviZ:

    fewer than 4 draws; R-hat of 1 chain            NaN
    a NaN among a column's draws                    NaN for that column
    infinite draws                                  R-hat, bulk and tail ESS are defined (they use ranks), the rest is NaN
    a constant column                               R-hat NaN, ESS the number of (split) draws, MCSE of mean 0, of sd NaN
    constant chains, each at another value          R-hat infinite (up to rounding)

The ESS of antithetic draws may exceed their number S; it is capped at S log10 S, so that an MCSE can only be too large.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from elbowroom.system.memory import fitting

CHUNK = 2**19
"""Draws worked on together: few enough to stay near the processor's cache."""
MIN_DRAWS = 4
TAILS = (0.05, 0.95)
CONSTANT = 1e-15
"""Columns of a smaller range than this count as constant (ArviZ: the decimal resolution of a double)."""


def split(draws: Tensor) -> Tensor:
    """Split every chain of draws (C, D, *batch) into halves, (2 C, D // 2, *batch): all first halves, then all last halves.

    The middle draw of an odd number is left out.
    """
    half = draws.shape[1] // 2
    return torch.cat((draws[:, :half], draws[:, draws.shape[1] - half :]))


def rhat(draws: Tensor) -> Tensor:
    """Return the rank-normalised split R-hat, (*batch): the larger of that of the draws and of their distances from the median.

    It is 1 where the chains agree in location and scale, larger where they do not. It cannot detect a mode that no chain has
    visited.
    """
    return _per_column(draws, _rhat, min_chains=2)


def ess_bulk(draws: Tensor) -> Tensor:
    """Return the effective sample size of the rank-normalised draws, (*batch), for the bulk; needs no finite moments."""
    return _per_column(draws, lambda x: _ess(_rank_normalise(_halves(x))[0]))


def ess_tail(draws: Tensor, prob: tuple[float, float] = TAILS) -> Tensor:
    """Return the smaller effective sample size, (*batch), of the indicators 1{x <= quantile} at two probabilities.

    Args:
        draws: (C, D, *batch).
        prob: the two probabilities. The default is that of the paper; arviz_stats.ess takes (1 - ci_prob, ci_prob).

    Raises:
        ValueError: a probability lies outside [0, 1].
    """
    if not all(0 <= p <= 1 for p in prob):
        raise ValueError(f"prob={prob}: both must lie in [0, 1]")
    return _per_column(draws, lambda x: _ess_tail(x, prob))


def by_ranks(draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return `rhat`, `ess_bulk` and `ess_tail`, each (*batch), from half as many sorts as one by one."""
    found = _per_column(draws, _by_ranks, count=3)
    return (found[0] if len(draws) > 1 else torch.full_like(found[0], torch.nan)), found[1], found[2]


def ess_mean(draws: Tensor) -> Tensor:
    """Return the effective sample size for the mean, (*batch): split chains, no ranks.

    For the mean of a function use `ess_mean(f(draws))`, for a probability `ess_mean(indicator)`.
    """
    return _per_column(draws, _ess_mean)


def ess_sd(draws: Tensor) -> Tensor:
    """Return the effective sample size for the standard deviation, (*batch): that of the mean of (x - mean x)^2."""
    return _per_column(draws, lambda x: _ess_mean(_square(x)))


def mcse_mean(draws: Tensor) -> Tensor:
    """Return the Monte Carlo standard error of the mean, sd / sqrt(ess_mean), (*batch), in the units of the draws."""
    return _per_column(draws, lambda x: x.flatten(1).std(1) / _ess_mean(x).sqrt())


def mcse_sd(draws: Tensor) -> Tensor:
    """Return the Monte Carlo standard error of the standard deviation, (*batch), without assuming normality.

        Var sd = (m4 - m2^2) / (4 m2 ess_sd),   m_j the central moments       (Kenney and Keeping 1951, p. 141; delta method)

    As in posterior (R) and in arviz_stats after 0.8.0. Up to 0.8.0 arviz_stats divides by `ess_mean`, which is too large where
    draws are antithetic, as those of HMC often are (https://github.com/arviz-devs/arviz-stats/issues/428).
    """
    return _per_column(draws, _mcse_sd)


def ebfmi(energy: Tensor) -> Tensor:
    """Return the estimated Bayesian fraction of missing information of each chain, sum (E_n - E_n-1)^2 / sum (E_n - mean E)^2.

    Args:
        energy: (C, D, *batch), the Hamiltonian after each draw's momentum was drawn, nats.

    Returns:
        (C, *batch); below about 0.3 the momenta move the energy too little to explore its distribution (Betancourt 2016,
        https://arxiv.org/abs/1604.00695). NaN for fewer than 2 draws and where the energy is constant or not finite.
    """
    _check(energy)
    energy = energy.detach().to(torch.float64)
    centred = energy - energy.mean(1, keepdim=True)
    return energy.diff(dim=1).square().sum(1) / centred.square().sum(1)


def _check(draws: Tensor) -> None:
    if draws.ndim < 2:
        raise ValueError(f"draws of shape {tuple(draws.shape)}: must be (chain, draw, *batch)")


def _per_column(draws: Tensor, function: Callable[[Tensor], Tensor], min_chains: int = 1, count: int | None = None) -> Tensor:
    """Apply a function (B, C, D) -> (B,), or (count, B), to the columns of draws (C, D, *batch), a chunk at a time."""
    _check(draws)
    n_chains, n_draws, *batch = draws.shape
    batch = batch if count is None else [count, *batch]
    if n_chains < min_chains or n_draws < MIN_DRAWS or not draws.numel():
        return torch.full(batch, torch.nan, dtype=torch.float64, device=draws.device)
    columns = draws.detach()[..., None].flatten(2)
    width = fitting(n_chains * n_draws, CHUNK)
    # written in place: small results between large temporaries would stop the allocator from freeing those
    result = torch.empty(*batch[: count is not None], columns.shape[2], dtype=torch.float64, device=draws.device)
    for part, out in zip(columns.split(width, 2), result.split(width, -1), strict=True):
        x = part.permute(2, 0, 1).to(torch.float64).contiguous()
        out.copy_(function(x).masked_fill(x.isnan().flatten(1).any(1), torch.nan))
    return result.reshape(batch)


def _halves(x: Tensor) -> Tensor:
    """Split the chains of columns (B, C, D)."""
    half = x.shape[2] // 2
    return torch.cat((x[..., :half], x[..., x.shape[2] - half :]), 1)


def _argsort(flat: Tensor) -> Tensor:
    """Sort rows; on the CPU, NumPy's vectorised sort of doubles is faster than PyTorch's."""
    return torch.from_numpy(np.argsort(flat.numpy(), axis=1)) if flat.device.type == "cpu" else flat.argsort(1)


def _sort(flat: Tensor) -> Tensor:
    return torch.from_numpy(np.sort(flat.numpy(), axis=1)) if flat.device.type == "cpu" else flat.sort(1).values


def _rank_normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the normal scores of the average ranks (Blom 1958), of the shape of x, and the sorted values, (B, C n).

    The scores of a column that holds a NaN are NaN.
    """
    flat = x.flatten(1)
    size = flat.shape[1]
    order = _argsort(flat)
    ascending = flat.gather(1, order)
    # a tie from place `first` to `last` (from 0) has average rank (first + last) / 2 + 1: a table over first + last
    rank = 1 + torch.arange(2 * size - 1, dtype=x.dtype, device=x.device) / 2
    score = torch.special.ndtri((rank - 3 / 8) / (size + 1 / 4))
    place = torch.arange(size, device=x.device)
    tied = ascending[:, 1:] == ascending[:, :-1]
    if tied.any():
        first = torch.where(torch.nn.functional.pad(tied, (1, 0)), 0, place).cummax(1).values
        last = torch.where(torch.nn.functional.pad(tied, (0, 1)), size, place).flip(1).cummin(1).values.flip(1)
        scores = score[first + last]
    else:
        scores = score[2 * place].expand_as(flat)
    scores = torch.where(ascending[:, -1:].isnan(), torch.nan, scores)
    return torch.empty_like(flat).scatter_(1, order, scores).view_as(x), ascending


def _rhat(x: Tensor) -> Tensor:
    x = _halves(x)
    return _rhat_of(x, *_rank_normalise(x))


def _by_ranks(x: Tensor) -> Tensor:
    halves = _halves(x)
    scores, ascending = _rank_normalise(halves)
    tail = _ess_tail(x, TAILS, ascending if x.shape[2] % 2 == 0 else None)  # the halves lack the middle of an odd number
    return torch.stack([_rhat_of(halves, scores, ascending), _ess(scores), tail])


def _rhat_of(x: Tensor, scores: Tensor, ascending: Tensor) -> Tensor:
    middle = ascending.shape[1] // 2  # the number of draws is even, so there are two middle ones
    median = (ascending[:, middle - 1] + ascending[:, middle]) / 2
    bulk = _classic_rhat(scores)
    tail = _classic_rhat(_rank_normalise((x - median[:, None, None]).abs())[0])
    return torch.where(tail > bulk, tail, bulk)  # the tail is NaN if all draws are equally far from the median


def _classic_rhat(x: Tensor) -> Tensor:
    n = x.shape[2]
    between, within = n * x.mean(2).var(1), x.var(2).mean(1)
    return ((between / within + n - 1) / n).sqrt()


def _quantile(ascending: Tensor, prob: float) -> Tensor:
    """Interpolate a quantile of sorted rows exactly as NumPy does, because draws are compared with it."""
    place = prob * (ascending.shape[1] - 1)
    below = min(math.floor(place), ascending.shape[1] - 2)
    part = place - below
    low, high = ascending[:, below], ascending[:, below + 1]
    return high - (high - low) * (1 - part) if part >= 0.5 else low + (high - low) * part


def _ess_tail(x: Tensor, prob: tuple[float, float], ascending: Tensor | None = None) -> Tensor:
    ascending = _sort(x.flatten(1)) if ascending is None else ascending
    low, high = (_ess_mean((x <= _quantile(ascending, p)[:, None, None]).to(x.dtype)) for p in prob)
    return torch.minimum(low, high)


def _square(x: Tensor) -> Tensor:
    return (x - x.mean((1, 2), keepdim=True)).square()


def _ess_mean(x: Tensor) -> Tensor:
    return _ess(_halves(x))


def _mcse_sd(x: Tensor) -> Tensor:
    square = _square(x)
    variance = square.mean((1, 2))
    error = (square.square().mean((1, 2)) - variance.square()) / _ess_mean(square)
    return (error / variance / 4).sqrt()


def _ess(x: Tensor) -> Tensor:
    """Return the effective sample size of columns (B, C, n), C >= 2, by Geyer's initial monotone sequence (1992)."""
    n_chains, n = x.shape[1:]
    size = n_chains * n
    mean = x.mean(2)
    length = 1 << (2 * n - 1).bit_length()  # padding: no lag wraps around
    spectrum = torch.fft.rfft(x - mean[:, :, None], n=length)
    power = (spectrum.real.square() + spectrum.imag.square()).mean(1)  # averaged over chains before the inverse transform
    covariance = torch.fft.irfft(power, n=length)[:, :n] / n
    within = covariance[:, :1] * n / (n - 1)
    total = covariance[:, :1] + mean.var(1, keepdim=True)

    n_pairs = max(0, (n - 3) // 2) + 1
    rho = 1 - (within - covariance[:, : 2 * n_pairs]) / total
    rho[:, 0] = 1
    even = rho[:, ::2]
    pair = even + rho[:, 1::2]
    stop = ~(pair > 0)
    stop[:, -1] = True
    before = stop.cumsum(1) == 0
    last = before.sum(1, keepdim=True)  # K, the first pair that is not positive
    rest = even.gather(1, last)
    rest = torch.where((rest > 0) | (pair.gather(1, last) >= 0), rest, 0)
    tau = -1 + 2 * torch.where(before, pair.cummin(1).values, 0).sum(1) + rest[:, 0]
    ess = size / tau.clamp_min(1 / math.log10(size))
    ess = torch.where(pair[:, 0].isnan(), torch.nan, ess)
    return torch.where(x.amax((1, 2)) - x.amin((1, 2)) < CONSTANT, float(size), ess)
