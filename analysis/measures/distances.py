"""Distances between the guide and a reference posterior, per datum, with their noise floor.

Distances are computed in the log joint's unconstrained coordinates, in units of the reference's standard deviation. The total
variation of discrete sites is computed from their exact probabilities and has no noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elbowroom.inference.mcmc.diagnostics import mcse_mean
from elbowroom.inference.posterior import Posterior
from elbowroom.inference.target import discrete
from elbowroom.inference.target.log_joint import LogJoint

PROJECTIONS = 32


def sliced_wasserstein(a: Tensor, b: Tensor, *, projections: int = PROJECTIONS, seed: int = 0) -> Tensor:
    """Return the sliced 1-Wasserstein distance of two equally large samples, per datum.

    SW_1(a, b) = mean over directions u on the unit sphere of  (1/S) sum_s |<u, a>_(s) - <u, b>_(s)|
    (Bonneel, Rabin, Peyre, Pfister 2015, https://doi.org/10.1007/s10851-014-0506-3).

    Args:
        a: draws, (S, N, d).
        b: draws, (S, N, d).
        projections: number of random directions, the same for every datum; for d = 1 a single one.
        seed: seed of the directions.

    Returns:
        Distances (N,), in the units of the draws.

    Raises:
        ValueError: the two samples differ in shape.
    """
    if a.shape != b.shape:
        raise ValueError(f"samples differ in shape: {tuple(a.shape)} and {tuple(b.shape)}")
    d = a.shape[-1]
    generator = torch.Generator(device=a.device).manual_seed(seed)
    directions = torch.randn(1 if d == 1 else projections, d, dtype=a.dtype, device=a.device, generator=generator)
    directions = directions / directions.norm(dim=1, keepdim=True)
    total = torch.zeros(a.shape[1], dtype=a.dtype, device=a.device)
    for u in directions:
        total += ((a @ u).sort(0).values - (b @ u).sort(0).values).abs().mean(0)
    return total / len(directions)


@dataclass(frozen=True)
class Comparison:
    """The guide compared with a reference, per datum, (N,) each.

    Attributes:
        mean_error: largest |mean_q - mean_ref| / sd_ref over the latents.
        sd_ratio: sd_q / sd_ref of the latent where it is farthest from 1 (by its logarithm).
        sliced_wasserstein: between guide and reference draws, in units of the reference's standard deviation.
        noise_floor: the same distance between two halves of the reference's own draws, of the same size.
        total_variation: (1/2) sum_c |q(c|x) - p_ref(c|x)| over the joint values c of discrete sites, where every latent is
            discrete; NaN elsewhere.
        cross: E_p[log p(x, z) - log q(z|x)] over the reference's draws, nats; minus log p(x) it is KL(p(z|x) || q(z|x)). NaN
            where the reference is neither exact nor certified.
        cross_se: its Monte Carlo standard error.

    Without a continuous latent all but the last three are NaN.
    """

    mean_error: Tensor
    sd_ratio: Tensor
    sliced_wasserstein: Tensor
    noise_floor: Tensor
    total_variation: Tensor
    cross: Tensor
    cross_se: Tensor


def compare(log_joint: LogJoint, guide: Posterior, reference: Posterior, *, seed: int = 0) -> Comparison:
    """Measure the distance of the guide's posterior from a reference's, of the same data; `seed` is of the projections."""
    n, d = guide.draws.shape[2:]
    none = torch.full((n,), torch.nan, dtype=torch.float64, device=guide.draws.device)
    if d == 0:
        q_c, p_c = guide.stats.get("probabilities"), reference.stats.get("probabilities")
        distance = none if q_c is None or p_c is None else 0.5 * (q_c - p_c).abs().sum(-1)
        return Comparison(none, none, none, none, distance, *_cross_discrete(log_joint, reference))
    q_mean, q_sd = guide.moments()
    p_mean, p_sd = reference.moments()
    log_ratio = (q_sd / p_sd).log()
    worst = log_ratio.abs().argmax(-1, keepdim=True)
    q = (guide.draws.flatten(0, 1) - p_mean) / p_sd
    p = (reference.draws.flatten(0, 1) - p_mean) / p_sd
    half = min(len(p) // 2, len(q))
    cross, cross_se = _cross(log_joint, reference)
    return Comparison(
        mean_error=((q_mean - p_mean).abs() / p_sd).amax(-1),
        sd_ratio=log_ratio.gather(-1, worst).squeeze(-1).exp(),
        sliced_wasserstein=sliced_wasserstein(q[:half], p[:half], seed=seed),
        noise_floor=sliced_wasserstein(p[:half], p[half : 2 * half], seed=seed),
        total_variation=none,
        cross=cross,
        cross_se=cross_se,
    )


def _cross(log_joint: LogJoint, reference: Posterior) -> tuple[Tensor, Tensor]:
    """Return E_p[log p(x, z) - log q(z|x)] over a reference's draws and its Monte Carlo error, (N,) each.

    The error of chains uses their effective sample size. For K draws resampled from weights it is var (1 / K + 1 / ESS).
    """
    trusted = reference.trusted.to(reference.draws.device)
    mean = torch.full(trusted.shape, torch.nan, dtype=torch.float64, device=trusted.device)
    if not bool(trusted.any()):
        return mean, mean
    z = reference.draws.flatten(0, 1).nan_to_num()
    with torch.no_grad():
        ratio = (log_joint(z) - log_joint.log_guide(z)).double()
    if "weights_ess" in reference.stats:
        error = ratio.std(0) * (1 / len(ratio) + 1 / reference.stats["weights_ess"]).sqrt()
    elif "ess_bulk_min" in reference.stats:
        error = mcse_mean(ratio.unflatten(0, reference.draws.shape[:2]))
    else:
        error = ratio.std(0) / len(ratio) ** 0.5
    return torch.where(trusted, ratio.mean(0), mean), torch.where(trusted, error, mean)


def _cross_discrete(log_joint: LogJoint, reference: Posterior) -> tuple[Tensor, Tensor]:
    """Return sum_c p(c|x) (log p(x, c) - log q(c|x)) over the joint values c; it has no Monte Carlo error."""
    found = discrete.table(log_joint)
    p = found.log_posterior.exp()
    terms = torch.where(p > 0, p * (found.log_joint - found.log_guide), 0.0)
    trusted = reference.trusted.to(p.device)
    missing = torch.full_like(p[0], torch.nan)
    return torch.where(trusted, terms.sum(0), missing), torch.where(trusted, torch.zeros_like(p[0]), missing)
