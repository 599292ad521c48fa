"""Importance sampling from the guide, and Pareto-smoothed diagnostics of its weights, for all data at once.

    w_s = p(x, z_s) / q(z_s|x),   z_s ~ q(z|x)
    ELBO            = mean_s log w_s
    log mean_s w_s  has expectation <= log p(x): a probabilistic lower bound, and a good ESTIMATE where the tail index k of
                    the weights is small and the effective sample size is large

k is the shape of the generalised Pareto distribution fitted to the largest weights (Vehtari, Simpson, Gelman, Yao, Gabry 2024,
https://jmlr.org/papers/v25/19-556.html), by the estimator of Zhang and Stephens 2009. The numbers equal those of ArviZ's
psislw, computed for all data at once and on any device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from elbowroom.inference.mcmc.normals import Normals, StudentT, moments
from elbowroom.inference.posterior import ROUNDED, Evidence, Posterior, in_chains, sure_bound
from elbowroom.inference.references.importance.psis import good_k, psis
from elbowroom.inference.search.seen import remember
from elbowroom.inference.target import discrete
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system.stages import stage

MIN_ESS = 400
SEED_STEP = 32_452_843  # between the seeds of draws for estimates and of draws that are kept
WIDE_DF, WIDER, FEWER = 4, 1.6, 4  # of the Student-t that looks beyond the guide's draws: spread, and share of the draws
HIGHER = 0.1  # nats above the largest weight seen, from which on a weight is one that the draws lack
NOTHING = 1e-6  # share of unseen mass that is left out of account
BIAS = 0.25  # of the standard error: a larger share of unseen mass would spoil the interval
FINITE_K = 0.5  # weights with a larger tail index have no variance, hence no standard error


def evidence(log_weights: Tensor, pareto_k: Tensor, ess_fraction: Tensor) -> tuple[Evidence, Tensor]:
    """Turn raw importance log weights (S, N) into evidence, with a mask of the data where it can be trusted.

    Returns:
        log mean w with its delta-method standard error sqrt((1 / ESS - 1 / S)), and (N,) True where it is an estimate with that
        error: k < 1/2 (above, the weights have no variance) and ESS >= 400.
    """
    n_draws = log_weights.shape[0]
    value = torch.logsumexp(log_weights, 0) - math.log(n_draws)
    ess = ess_fraction * n_draws
    error = (1 / ess - 1 / n_draws).clamp_min(0).sqrt()
    trusted = (pareto_k < min(FINITE_K, good_k(n_draws))) & (ess >= MIN_ESS)
    return Evidence("estimate", "importance sampling", value, error), trusted


def split_bounds(log_weights: Tensor) -> dict[str, Tensor]:
    """Return bounds from the two halves of the draws, (N,) each, in nats, from raw log weights (S, N).

    The largest of several noisy bounds is not a bound; the one that was largest on other draws is. So bound_first, log mean w
    of the first half, is for choosing among bounds, and bound_sure, `sure_bound` of the second half, is reported. bound_all,
    `sure_bound` of all draws, is for use when there is no choice.
    """
    first, fresh = log_weights.tensor_split(2)
    return {
        "bound_first": torch.logsumexp(first, 0) - math.log(len(first)),
        "bound_sure": sure_bound(fresh),
        "bound_all": sure_bound(log_weights),
    }


@stage("guide")
def amortized(log_joint: LogJoint, *, draws: int, keep: int, seed: int) -> Posterior:
    """Draw from the guide and evaluate it by its importance weights, with S = `draws` draws per datum; `keep` of them are kept.

    Returns:
        The guide as a `Posterior`, status `amortized`, with stats elbo, elbo_se (standard error over draws), pareto_k,
        ess_fraction, importance_trusted (1 or 0), rounded_share (the weight of draws that `LogJoint.rounded` tells), tail_share
        (see `beyond`), rate E_q log q/p(z) and distortion -E_q log p(x|z), in nats (NaN where discrete sites are summed out),
        and importance-sampling evidence. If every latent is discrete, sums replace draws, see `_amortized_discrete`.
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
        remember(log_joint, z, log_p)
        log_weights = log_p - log_q
        smoothed = psis(log_weights)
        value, trusted = evidence(log_weights, smoothed.pareto_k, smoothed.ess_fraction)
        share, rounded, words = log_joint.rounded_share(z, log_p, log_q)
        mean, covariance = moments(z)
        tail = beyond(log_joint, log_weights, mean, covariance, seed)
        kept = z[:keep]
        flat = log_joint.constrain(kept)
    n = log_joint.n_obs
    stats = {
        "elbo": log_weights.mean(0),
        "elbo_se": log_weights.std(0) / math.sqrt(draws),
        "pareto_k": smoothed.pareto_k,
        "ess_fraction": smoothed.ess_fraction,
        "importance_trusted": (trusted & (share <= ROUNDED) & (tail <= BIAS * value.error + NOTHING)).to(log_weights.dtype),
        "rounded_share": share,
        "tail_share": tail,
        **split_bounds(log_weights.masked_fill(rounded, -torch.inf)),  # what is left out keeps a lower bound valid
        "rate": rate,
        "distortion": distortion,
        "log_joint_max": log_p.max(0).values,
    }
    return Posterior(
        method="guide",
        draws=in_chains(kept),
        sites={name: in_chains(value) for name, value in flat.items()},
        status=["amortized"] * n,
        reason=[f"draws of q(z|x); a share {s:.2g} {words}" if not s <= ROUNDED else "draws of q(z|x)" for s in share.tolist()],
        mean=mean,
        covariance=covariance,
        evidence=value,
        stats=stats,
        sample_stats={"lp": in_chains(log_p[:keep]), "log_q": in_chains(log_q[:keep])},
    )


def beyond(log_joint: LogJoint, log_weights: Tensor, mean: Tensor, covariance: Tensor, seed: int) -> Tensor:
    """Estimate the share of p(z|x) where the guide's weights exceed all that its draws have seen, (N,).

    A latent on an interval, a half-line or a simplex has exponential tails in unconstrained coordinates. A guide with lighter
    ones never draws there: its largest weights are unseen, k-hat is low, and log mean w is too low by this share. It is
    measured at draws of a wide Student-t, where a support has an edge; 0 elsewhere.
    """
    if not log_joint.has_edges:
        return torch.zeros_like(log_weights[0])
    near = Normals.from_moments(mean, covariance)
    wide = StudentT(near.loc, WIDER * near.root, WIDE_DF)
    z = wide.sample(max(1, len(log_weights) // FEWER), torch.Generator(device=mean.device).manual_seed(seed + SEED_STEP))
    log_p = log_joint(z)
    more = (log_p - log_joint.log_guide(z) > log_weights.amax(0) + HIGHER) & log_p.isfinite()
    mass = torch.logsumexp((log_p - wide.log_prob(z)).masked_fill(~more, -torch.inf), 0) - math.log(len(z))
    return (mass - torch.logsumexp(log_weights, 0) + math.log(len(log_weights))).exp()


def _amortized_discrete(log_joint: LogJoint, *, draws: int, keep: int, seed: int) -> Posterior:
    """Evaluate a guide with only discrete latents, by sums over joint values instead of draws where possible.

        ELBO = sum_c q(c|x) log [p(x, c) / q(c|x)],   KL(q || p) = log p(x) - ELBO
        ESS / S -> 1 / sum_c p(c|x)^2 / q(c|x),       0 where q excludes a value that p allows

    Arguments and result are as in `amortized`, with elbo, rate, distortion and ess_fraction exact (elbo_se 0), and
    `probabilities` q(c|x), (N, A). The weights take A values, so there is no tail to fit: pareto_k is -inf where S draws have
    an effective size of 400 or more, NaN elsewhere. A guide that leaves all discrete sites to be summed out is p(c|x) itself.

    Raises:
        UnsupportedProgram: see `discrete.table`.
    """
    found = discrete.table(log_joint)
    log_q, log_p = found.log_guide, found.log_joint
    q = log_q.exp()

    def expected(term: Tensor) -> Tensor:  # a value that q excludes counts as 0
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
