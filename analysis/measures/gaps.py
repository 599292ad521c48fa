"""The parts of the gap: limits of the guide's family (covariance, shape), and the encoder's distance from the best member.

    gap = log p(x) - L[q] = (log p(x) - L[q_full]) + (L[q_full] - L[q*]) + (L[q*] - L[q])
                             shape                    covariance            amortization
                             ------------ approximation ------------

q* is the best member of the guide's own family, and q_full the best normal with full covariance, in unconstrained coordinates.
For a diagonal or full normal guide, q* is found by Newton steps (`inference.search.best_normal`). For another family (low rank,
Student t, mixture, flow) that provides the parameters its encoder gives each datum, it is found by natural gradients in these
(`inference.search.best_of_family`). Other guides have no q*. `covariance` is defined for normals only, which are nested.
`shape`, the distance of the posterior from any normal, is known for every guide; a non-normal family can close part of it. L of
all normals is evaluated with common random numbers, as are L[q*] and L[q], so that errors of differences are smaller than those
of the values.

The refit ends short of q* by an estimated delta at most: the amortization gap lies in [L[q*] - L[q], + delta] and the
approximation gap in [lower(log p) - L[q*] - delta, upper(log p) - L[q*]]. This holds near the normal that was found; another
mode may hold a better one. If a larger family comes out worse than a smaller one by more than the errors allow, the refit has
failed: the parts are then NaN, and no negative gap is reported. Cremer, Li and Duvenaud 2018, https://arxiv.org/abs/1801.03558.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pyro.distributions import MultivariateNormal
from torch import Tensor

from elbowroom.inference.mcmc.normals import HALF_LOG_2PI, Normals, Refit
from elbowroom.inference.search.best_normal import refit
from elbowroom.inference.search.best_of_family import FamilyRefit, OfferedFamily, offered, refit_family
from elbowroom.inference.search.noise import antithetic_noise, matched
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system.memory import ARRAY, fitting
from elbowroom.system.stages import stage

Which = Literal["diagonal", "full"] | None

SEED = 2_750_159  # used for nothing else
TESTED = 8  # draws at which the guide must have the normal's density
EXACT = 1e-6  # relative difference of log densities that is tolerated
MAX_DIM = 128  # a full covariance takes d (d + 1) / 2 points
STARTS = 3  # draws of the prior, where no full normal is known
BATCHES = 16  # batches of common quasi-random noise, whose means give the error
DRAWS = 64  # in each batch
APART = 4.5  # standard errors by which a larger family may be worse
NAMES = (
    "elbo_refit",
    "elbo_refit_se",
    "refit_shortfall",
    "elbo_refit_full",
    "elbo_refit_full_se",
    "refit_full_shortfall",
    "amortization",
    "amortization_se",
    "covariance",
    "covariance_se",
)


@stage("refits")
def refitted(log_joint: LogJoint, full: Refit | None = None, until: float = math.inf) -> dict[str, Tensor]:
    """Refit the guide's family and all normals to every datum, and compare the three with common random numbers.

    Args:
        log_joint: the model and guide.
        full: the best normal with full covariance, if it is already known.
        until: value of `time.monotonic()` at which the refit of a family other than diagonal or full normals must end.

    Returns:
        `elbo_refit` (L[q*]), `elbo_refit_full` (L[q_full]), each with `_se` and with the estimated distance from the optimum
        (`refit_shortfall`, `refit_full_shortfall`); `amortization` = L[q*] - L[q] and `covariance` = L[q_full] - L[q*], each
        with `_se`. (N,) each, nats; NaN where undefined, or where a larger family came out worse than a smaller one.
    """
    out = unknown(log_joint.n_obs)
    if log_joint.dim == 0:
        return out
    found, q = guide_normals(log_joint)
    offer = offered(log_joint)
    family = _all_of(found, offer)
    diagonal = None
    if family == "diagonal" or log_joint.dim == 1:  # starts of the full normal found its place; the encoder's is the other one
        also = [] if full is None else [full.q]
        diagonal = refit(log_joint, family="diagonal", starts=0 if also else STARTS, also=also, seed=SEED)
    if log_joint.dim == 1:
        full = diagonal  # the two families are the same
    elif full is None:
        full = _fullest(log_joint, [] if diagonal is None else [diagonal.q])
    elif diagonal is not None and bool((diagonal.elbo > full.elbo + APART * full.elbo_se.hypot(diagonal.elbo_se)).any()):
        full = _fullest(log_joint, [diagonal.q, full.q])
    assert full is not None
    own = refit_family(offer, near=full.q, seed=SEED + 3, until=until) if offer is not None and family is None else None
    best = None
    if own is not None and offer is not None and q is not None:
        best, shortfall = _as_normals(offer, own), own.shortfall
        full = _fullest(log_joint, [full.q, best]) if best is not None else full
    elif family is not None:
        own_normal = diagonal if family == "diagonal" and diagonal is not None else full
        best, shortfall = own_normal.q, own_normal.shortfall
    generator = torch.Generator(device=log_joint.device).manual_seed(SEED + 2)
    # moments are matched over all batches together: batch by batch it would bias fourth moments for all data. The spread of the
    # batches' means, each not matched, then gives an error that is slightly too large
    half = torch.cat([antithetic_noise(DRAWS, log_joint.dim, generator)[: DRAWS // 2] for _ in range(BATCHES)])
    first, second = matched(torch.cat([half, -half])).chunk(2)
    noise = torch.cat([first.unflatten(0, (BATCHES, -1)), second.unflatten(0, (BATCHES, -1))], 1)
    of_full = _values(log_joint, full.q, noise)
    out |= _level("elbo_refit_full", "refit_full_shortfall", full.shortfall, of_full)
    if best is None or q is None:
        return out if own is None else out | _own(own)
    of_best = of_full if best is full.q else _values(log_joint, best, noise)
    out |= _level("elbo_refit", "refit_shortfall", shortfall, of_best)
    for name, larger, smaller in (("covariance", of_full, of_best), ("amortization", of_best, _values(log_joint, q, noise))):
        value, error = _mean(larger - smaller)
        wrong = value < -APART * error - EXACT
        out[name], out[f"{name}_se"] = value.masked_fill(wrong, torch.nan), error.masked_fill(wrong, torch.nan)
    return out


def _fullest(log_joint: LogJoint, also: Sequence[Normals]) -> Refit:
    """Return the best normal with full covariance; the search also starts from the normals of smaller families."""
    return refit(log_joint, family="full", also=also, seed=SEED + 1)


def _all_of(family: Which, offer: OfferedFamily | None) -> Which:
    """Return the family of normals of which the guide can be any member, by its number of parameters; None for neither."""
    if family is None or offer is None:
        return family
    d, width = offer.log_joint.dim, offer.params.shape[-1]
    q = offer.family(offer.params)
    while not isinstance(q, MultivariateNormal) and hasattr(q, "base_dist"):  # transformed to another space
        q = q.base_dist
    if isinstance(q, MultivariateNormal) and width >= d * (d + 3) // 2:
        return "full"
    return "diagonal" if family == "diagonal" and width == 2 * d else None


def _as_normals(offer: OfferedFamily, own: FamilyRefit) -> Normals | None:
    """Return q* as normals, if it is normal."""
    draws = offer.sample(own.params, 64, SEED)
    return _normals(draws, offer.log_prob(draws, own.params), lambda u: offer.log_prob(u, own.params))[1]


def _own(own: FamilyRefit) -> dict[str, Tensor]:
    """Return the columns of a q* that is not normal."""
    lost = ~(own.elbo.isfinite() & own.gain.isfinite())
    wrong = lost | (own.gain < -APART * own.gain_se - EXACT)
    level = {"elbo_refit": own.elbo, "elbo_refit_se": own.elbo_se, "refit_shortfall": own.shortfall}
    parts = {"amortization": own.gain, "amortization_se": own.gain_se}
    return {name: value.masked_fill(lost, torch.nan) for name, value in level.items()} | {
        name: value.masked_fill(wrong, torch.nan) for name, value in parts.items()
    }


def unknown(n_obs: int) -> dict[str, Tensor]:
    """Return the columns of `refitted`, all NaN, where there is no time for a refit."""
    return {name: torch.full((n_obs,), torch.nan, dtype=torch.float64) for name in NAMES}


def _values(log_joint: LogJoint, q: Normals, noise: Tensor) -> Tensor:
    """Return the mean of log p(x, z) - log q(z) at z = loc + root e over each batch of noise e (B, S, d), (B, N).

    The mean of log q over matched noise is exactly minus q's entropy.
    """
    with torch.no_grad():
        parts = [
            log_joint(q.loc + torch.einsum("sj,nij->sni", e, q.root)).double() + 0.5 * e.square().sum(-1, keepdim=True)
            for e in noise.flatten(0, 1).split(fitting(q.loc.numel(), ARRAY))
        ]
    constant = q.log_det + q.loc.shape[-1] * HALF_LOG_2PI
    return torch.cat(parts).unflatten(0, noise.shape[:2]).mean(1) + constant


def _mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean over batches and its standard error, (N,) each; NaN where a value is not finite."""
    return values.mean(0), values.std(0) / len(values) ** 0.5


def _level(name: str, short: str, shortfall: Tensor, values: Tensor) -> dict[str, Tensor]:
    elbo, error = _mean(values)
    lost = ~(elbo.isfinite() & shortfall.isfinite())
    columns = {name: elbo, f"{name}_se": error, short: shortfall.double()}
    return {key: value.masked_fill(lost, torch.nan) for key, value in columns.items()}


def guide_normals(log_joint: LogJoint) -> tuple[Which, Normals | None]:
    """Return the family of normals that the guide belongs to in unconstrained coordinates, and its members; else None twice.

    A normal's log density is quadratic, so that central differences are exact. They give the only normal that the guide can be;
    the densities of its draws show whether it is.
    """
    if log_joint.dim == 0:
        return None, None
    with torch.no_grad():
        draws, log_q = log_joint.sample_guide(64, SEED)
    return _normals(draws, log_q, log_joint.log_guide)


def _normals(draws: Tensor, log_q: Tensor, log_density: Callable[[Tensor], Tensor]) -> tuple[Which, Normals | None]:
    """Return the same for draws u (S, N, d) of any density, given their log density (S, N) and the density as a function."""
    with torch.no_grad():
        draws, log_q = draws.double(), log_q.double()
        centre, step = draws.mean(0), draws.std(0)
        if not (draws.isfinite().all() and log_q.isfinite().all() and (step > 0).all()):
            return None, None
        moves = torch.diag_embed(step).transpose(0, 1)  # (d, N, d): one coordinate each
        middle = log_density(centre[None]).double()[0]
        up, down = log_density(centre + moves).double(), log_density(centre - moves).double()
        slope = ((up - down) / 2).T / step
        curvature = (up + down - 2 * middle).T / step.square()
        normal = _fitting(draws, log_q, centre, slope, torch.diag_embed(curvature))
        if normal is not None:
            return "diagonal", normal
        d = draws.shape[-1]
        if d == 1 or d > MAX_DIM:
            return None, None
        j, k = torch.triu_indices(d, d, 1, device=draws.device)
        both = log_density(centre + moves[j] + moves[k]).double()
        mixed = (both - up[j] - up[k] + middle).T / (step[:, j] * step[:, k])
        matrix = torch.diag_embed(curvature)
        matrix[:, j, k] = matrix[:, k, j] = mixed
        normal = _fitting(draws, log_q, centre, slope, matrix)
        return (None, None) if normal is None else ("full", normal)


def _fitting(draws: Tensor, log_q: Tensor, centre: Tensor, slope: Tensor, hessian: Tensor) -> Normals | None:
    """Return the normal with this slope and curvature at `centre` if it has the guide's log density at its draws."""
    root, failed = torch.linalg.cholesky_ex(-hessian)
    if bool(failed.any()):
        return None
    covariance = torch.cholesky_inverse(root)
    normal = Normals.from_moments(centre + (covariance @ slope[..., None])[..., 0], covariance)
    theirs = log_q[:TESTED]
    same = (normal.log_prob(draws[:TESTED]) - theirs).abs().le(EXACT * (1 + theirs.abs()))
    return normal if bool(same.all()) else None
