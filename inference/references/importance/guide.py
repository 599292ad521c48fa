r"""Importance sampling from the guide, and Pareto-smoothed diagnostics of its weights, for all data at once.

    w_s = p(x, z_s) / q(z_s|x),   z_s ~ q(z|x)
    ELBO            = mean_s log w_s
    log mean_s w_s  has expectation <= log p(x): a probabilistic lower bound, and a good ESTIMATE where the tail index k of
                    the weights is small and the effective sample size is large

k is the shape of the generalised Pareto distribution fitted to the largest weights (Vehtari, Simpson, Gelman, Yao, Gabry 2024,
https://jmlr.org/papers/v25/19-556.html), by the estimator of Zhang and Stephens 2009. The same computation as ArviZ's psislw,
which it is tested against, for all data at once and on any device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from elbowroom.inference.posterior import Evidence, Posterior, in_chains
from elbowroom.inference.references.ais.annealing import surely
from elbowroom.inference.target import discrete
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system.stages import stage

PRIOR_WEIGHT = 10  # observations that the weak prior on k counts for, as in the loo package
MIN_ESS = 400
SEED_STEP = 32_452_843  # between draws for estimates and draws that are kept
FINITE_K = 0.5  # weights with a larger tail index have no variance, hence no standard error


def good_k(n_draws: int) -> float:
    """Return the largest k at which S draws are enough: min(1 - 1 / log10 S, 0.7)."""
    return min(1 - 1 / math.log10(n_draws), 0.7)


def fit_generalized_pareto(excess: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a generalised Pareto distribution to each column (Zhang and Stephens 2009).

    Args:
        excess: exceedances over the threshold, ascending along dim 0, (M, N), positive.

    Returns:
        Shape k and scale sigma, (N,) each. k includes the weak prior that draws it towards 0.5 as 10 observations would.
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
        pareto_k: tail index, (N,); -inf where the largest weights of a datum are all equal, NaN where it cannot be had.
        ess_fraction: 1 / (S sum_s W_s^2) of the normalised raw weights, (N,).
    """

    log_weights: Tensor
    pareto_k: Tensor
    ess_fraction: Tensor


def psis(log_weights: Tensor) -> Smoothed:
    """Pareto-smooth importance log weights per datum.

    Args:
        log_weights: (S, N), unnormalised, S >= 25.

    Returns:
        The smoothed weights, k and the effective sample size as a fraction of S.
    """
    n_draws = log_weights.shape[0]
    tail = int(min(0.2 * n_draws, 3 * math.sqrt(n_draws)))
    shifted = (log_weights - log_weights.max(0).values).T.contiguous()  # (N, S): one datum's weights side by side
    ess_fraction = shifted.exp().sum(1).square() / (n_draws * (2 * shifted).exp().sum(1))

    top, place = shifted.topk(tail + 1, dim=1)  # descending; the last is the threshold
    cutoff = top[:, -1].clamp_min(math.log(torch.finfo(shifted.dtype).tiny))
    excess = (top[:, :-1].exp() - cutoff.exp()[:, None]).T.flip(0)  # ascending, (tail, N)
    # numerically equal weights have no tail: rounding noise must not be fitted
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


def evidence(log_weights: Tensor, pareto_k: Tensor, ess_fraction: Tensor) -> tuple[Evidence, Tensor]:
    """Turn importance weights into evidence: an estimate where they can be trusted, a lower bound elsewhere.

    Args:
        log_weights: (S, N), raw.
        pareto_k: (N,).
        ess_fraction: (N,).

    Returns:
        log mean w with its delta-method standard error sqrt((1 / ESS - 1 / S)), and (N,) True where it may be read as an
        estimate with that error: k < 1/2, beyond which the weights have no variance, and ESS >= 400.
    """
    n_draws = log_weights.shape[0]
    value = torch.logsumexp(log_weights, 0) - math.log(n_draws)
    ess = ess_fraction * n_draws
    error = (1 / ess - 1 / n_draws).clamp_min(0).sqrt()
    trusted = (pareto_k < min(FINITE_K, good_k(n_draws))) & (ess >= MIN_ESS)
    return Evidence("estimate", "importance sampling", value, error), trusted


def halves(log_weights: Tensor) -> dict[str, Tensor]:
    """Return log mean w of the first half of the draws, by which a bound may be chosen, and the bound by the second half.

    The largest of several noisy bounds is none; the one that was largest on other draws is.

    Args:
        log_weights: (S, N), raw.

    Returns:
        bound_first, bound_sure (see `surely`), and bound_all, sure too and by all draws: for where there is nothing to choose;
        (N,) each, in nats.
    """
    first, fresh = log_weights.tensor_split(2)
    return {
        "bound_first": torch.logsumexp(first, 0) - math.log(len(first)),
        "bound_sure": surely(fresh),
        "bound_all": surely(log_weights),
    }


@stage("guide")
def amortized(log_joint: LogJoint, *, draws: int, keep: int, seed: int) -> Posterior:
    """Draw from the guide and measure it by its importance weights.

    Args:
        log_joint: the model and guide.
        draws: number of draws S per datum for the estimates.
        keep: number of draws per datum kept in the result.
        seed: random seed.

    Returns:
        The guide as a `Posterior`, status `amortized`, with stats elbo, elbo_se (standard error over draws), pareto_k,
        ess_fraction, importance_trusted (1 or 0), rate E_q log q/p(z) and distortion -E_q log p(x|z), in nats (NaN where
        discrete sites are summed out), and importance-sampling evidence. Where every latent is discrete, sums take the place of
        draws, see `_amortized_discrete`.
    """
    if log_joint.dim == 0:
        return _amortized_discrete(log_joint, draws=draws, keep=keep, seed=seed)
    with torch.no_grad():
        z, log_q = log_joint.sample_guide(draws, seed)
        if log_joint.program.discrete:
            log_p = log_joint(z)
            rate = distortion = torch.full_like(log_p[0], torch.nan)
        else:
            log_prior, log_likelihood = log_joint.terms(z)
            log_p = log_prior + log_likelihood
            rate, distortion = (log_q - log_prior).mean(0), -log_likelihood.mean(0)
        log_weights = log_p - log_q
        smoothed = psis(log_weights)
        value, trusted = evidence(log_weights, smoothed.pareto_k, smoothed.ess_fraction)
        mean = z.mean(0)
        centred = z - mean
        covariance = torch.einsum("snd,sne->nde", centred, centred) / (draws - 1)
        kept = z[:keep]
        flat = log_joint.constrain(kept)
    n = log_joint.n_obs
    stats = {
        "elbo": log_weights.mean(0),
        "elbo_se": log_weights.std(0) / math.sqrt(draws),
        "pareto_k": smoothed.pareto_k,
        "ess_fraction": smoothed.ess_fraction,
        "importance_trusted": trusted.to(log_weights.dtype),
        **halves(log_weights),
        "rate": rate,
        "distortion": distortion,
        "log_joint_max": log_p.max(0).values,
    }
    return Posterior(
        method="guide",
        draws=in_chains(kept),
        sites={name: in_chains(value) for name, value in flat.items()},
        status=["amortized"] * n,
        reason=["draws of q(z|x)"] * n,
        mean=mean,
        covariance=covariance,
        evidence=value,
        stats=stats,
        sample_stats={"lp": in_chains(log_p[:keep]), "log_q": in_chains(log_q[:keep])},
    )


def _amortized_discrete(log_joint: LogJoint, *, draws: int, keep: int, seed: int) -> Posterior:
    r"""Measure a guide whose latents are all discrete: sums over its joint values where draws are not needed.

        ELBO = sum_c q(c|x) log [p(x, c) / q(c|x)],   KL(q || p) = log p(x) - ELBO
        ESS / S -> 1 / sum_c p(c|x)^2 / q(c|x),       0 where q excludes a value that p allows

    Args:
        log_joint: a model whose latents are all discrete.
        draws: number of draws S per datum for the importance-sampling evidence.
        keep: number of draws per datum kept in the result.
        seed: random seed.

    Returns:
        As `amortized`, with elbo, rate, distortion and ess_fraction exact (elbo_se 0), and `probabilities` q(c|x),
        (N, A). The weights take A values, so there is no tail to fit: pareto_k is -inf where S draws have an effective size
        of 400 or more, NaN elsewhere. A guide that leaves all discrete sites to be summed out is p(c|x) itself.

    Raises:
        UnsupportedProgram: see `discrete.table`.
    """
    found = discrete.table(log_joint)
    log_q, log_p = found.log_guide, found.log_joint
    q = log_q.exp()

    def expected(term: Tensor) -> Tensor:  # a value that q excludes counts nothing, whatever its density
        return torch.where(q > 0, q * term, 0).sum(0)

    twice = torch.where(found.log_posterior == -torch.inf, -torch.inf, 2 * found.log_posterior - log_q)
    ess_fraction = torch.exp(-torch.logsumexp(twice, 0))
    n = log_joint.n_obs
    drawn = discrete.draw(log_q, draws, seed + SEED_STEP)
    pareto_k = torch.where(ess_fraction * draws >= MIN_ESS, -torch.inf, torch.nan)
    value, trusted = evidence((log_p - log_q).gather(0, drawn), pareto_k, ess_fraction)
    index = discrete.draw(log_q, keep, seed)
    return Posterior(
        method="guide",
        draws=index.new_zeros(*in_chains(index).shape, 0, dtype=log_p.dtype),
        sites={name: in_chains(draw) for name, draw in discrete.at(log_joint, index).items()},
        status=["amortized"] * n,
        reason=["draws of q(z|x)" if found.amortized else "the guide leaves the discrete sites to be summed out"] * n,
        evidence=value,
        stats={
            "elbo": expected(log_p - log_q),
            "elbo_se": torch.zeros_like(log_p[0]),
            "pareto_k": pareto_k,
            "ess_fraction": ess_fraction,
            "importance_trusted": trusted.to(log_p.dtype),
            "rate": expected(log_q - found.log_prior),
            "distortion": -expected(found.log_likelihood),
            "log_joint_max": torch.where(q > 0, log_p, -torch.inf).amax(0),
            "probabilities": q.T,
        },
        sample_stats={"lp": in_chains(log_p.gather(0, index)), "log_q": in_chains(log_q.gather(0, index))},
    )
