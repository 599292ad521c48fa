r"""The two parts of the gap: the guide's family is too small, and the encoder misses the best member of it.

    gap = log p(x) - L[q] = (log p(x) - L[q*]) + (L[q*] - L[q])
                             approximation        amortization

q* is the best normal of the guide's own family, diagonal or with a full covariance, in unconstrained coordinates; a guide that
is no normal has none. The refit ends a little short of q*, by delta at most as far as it can tell, so that the amortization gap
lies in [L[q*] - L[q], + delta] and the approximation gap in [lower(log p) - L[q*] - delta, upper(log p) - L[q*]]: near the
normal that was found, since another mode may hold a better one.
Cremer, Li and Duvenaud 2018, https://arxiv.org/abs/1801.03558.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from elbowroom.inference.normals import Normals
from elbowroom.inference.refit import refit
from elbowroom.inference.scout import scout
from elbowroom.inference.target import LogJoint

SEED = 2_750_159  # of its own
TESTED = 8  # draws at which the guide must be the normal that it is taken for
EXACT = 1e-6  # relative difference of log densities let pass
MAX_DIM = 128  # d (d + 1) / 2 points tell a full covariance
NAMES = ("elbo_refit", "elbo_refit_se", "refit_shortfall")


def refitted(log_joint: LogJoint) -> dict[str, Tensor]:
    """Return L[q*], its standard error and what the refit may have left, (N,) each, nats; NaN where the guide is no normal."""
    family = guide_family(log_joint)
    if family is None:
        return unknown(log_joint.n_obs)
    best = scout(log_joint).refit if family == "full" else refit(log_joint, family="diagonal", seed=SEED)
    values = (best.elbo, best.elbo_se, best.shortfall)
    lost = ~best.elbo.isfinite()
    return {name: value.double().masked_fill(lost, torch.nan) for name, value in zip(NAMES, values, strict=True)}


def unknown(n_obs: int) -> dict[str, Tensor]:
    """Return the same where there is no time for a refit."""
    return {name: torch.full((n_obs,), torch.nan, dtype=torch.float64) for name in NAMES}


def guide_family(log_joint: LogJoint) -> Literal["diagonal", "full"] | None:
    """Say which family of normals the guide belongs to in unconstrained coordinates; None for anything else.

    A normal's log density is a quadratic, of which central differences are exact: they give the normal that the guide would
    have to be, and draws of the guide tell whether it is.
    """
    if log_joint.dim == 0:
        return None
    with torch.no_grad():
        draws, log_q = (t.double() for t in log_joint.sample_guide(64, SEED))
        centre, step = draws.mean(0), draws.std(0)
        if not (draws.isfinite().all() and log_q.isfinite().all() and (step > 0).all()):
            return None
        moves = torch.diag_embed(step).transpose(0, 1)  # (d, N, d): one coordinate each
        middle = log_joint.log_guide(centre[None]).double()[0]
        up, down = log_joint.log_guide(centre + moves).double(), log_joint.log_guide(centre - moves).double()
        slope = ((up - down) / 2).T / step
        curvature = (up + down - 2 * middle).T / step.square()
        if _is(draws, log_q, centre, slope, torch.diag_embed(curvature)):
            return "diagonal"
        d = log_joint.dim
        if d == 1 or d > MAX_DIM:
            return None
        j, k = torch.triu_indices(d, d, 1, device=draws.device)
        both = log_joint.log_guide(centre + moves[j] + moves[k]).double()
        mixed = (both - up[j] - up[k] + middle).T / (step[:, j] * step[:, k])
        matrix = torch.diag_embed(curvature)
        matrix[:, j, k] = matrix[:, k, j] = mixed
        return "full" if _is(draws, log_q, centre, slope, matrix) else None


def _is(draws: Tensor, log_q: Tensor, centre: Tensor, slope: Tensor, hessian: Tensor) -> bool:
    """Whether the normal with this slope and curvature at `centre` has the guide's log density at its draws."""
    root, failed = torch.linalg.cholesky_ex(-hessian)
    if bool(failed.any()):
        return False
    covariance = torch.cholesky_inverse(root)
    normal = Normals.from_moments(centre + (covariance @ slope[..., None])[..., 0], covariance)
    theirs = log_q[:TESTED]
    return bool((normal.log_prob(draws[:TESTED]) - theirs).abs().le(EXACT * (1 + theirs.abs())).all())
