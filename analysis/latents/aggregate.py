"""The aggregate posterior q(z) = E_x q(z|x): its information about x, and its distance from the prior.

    I_q(x; z) = E_x KL(q(z|x) || q(z)),        rate = I_q(x; z) + KL(q(z) || p(z))

(Hoffman and Johnson 2016, "ELBO surgery"). q(z) is known only through the data, so that only bounds on I are available (Poole
et al. 2019, https://arxiv.org/abs/1905.06922, sections 2.1 and 2.4): with K data and z_i ~ q(z|x_i)

    lower = mean_i log q(z_i|x_i) / (1/K sum_n q(z_i|x_n)),                 at most log K
    upper = mean_i log q(z_i|x_i) / (1/(K-1) sum_{n != i} q(z_i|x_n)),      leave-one-out; the rate is another upper bound

hold in expectation over data sets, and have standard errors. All values are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from elbowroom.analysis.measures.gaps import guide_normals
from elbowroom.inference.mcmc.normals import HALF_LOG_2PI, Normals
from elbowroom.inference.target.discrete import Table
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system.memory import ARRAY, fitting

MOST = 2000  # largest number of data for the mutual information of a normal guide
FEW = 1000  # the same where the guide must be run for every pair
PAIRS = 2**22  # largest number of pairs for repeated draws
PERMUTATIONS = 999
NAMES = ("information_lower", "information_upper", "aggregate_kl_lower", "aggregate_kl_upper")


def mutual_information(log_joint: LogJoint, *, seed: int = 0) -> dict[str, float]:
    """Bound I_q(x; z) and KL(q(z) || p(z)) for continuous latents.

    Args:
        log_joint: the model and guide.
        seed: random seed of the draws, and of the choice of data where there are more than 2,000 (1,000 for a guide that is not
            normal in unconstrained coordinates).

    Returns:
        `information_lower`, `information_upper`, `aggregate_kl_lower`, `aggregate_kl_upper`, each with `_se`; and
        `information_data`, the number K of data. NaN for fewer than 3 data, or where large data cannot be subset.
    """
    q = guide_normals(log_joint)[1]
    most = FEW if q is None else MOST
    if log_joint.n_obs > most:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(log_joint.n_obs, generator=generator)[:most].sort().values.to(log_joint.device)
        if not log_joint.separable():
            return _unknown()
        log_joint, q = log_joint.subset(rows), None if q is None else q.rows(rows)
    n = log_joint.n_obs
    if n < 3:
        return _unknown()
    repeats = min(8, fitting(n**2, PAIRS)) if q is not None else 1
    with torch.no_grad():
        z, own = log_joint.sample_guide(repeats, seed)
        prior = log_joint.terms(z)[0].double()
        density = _of_normals(q) if q is not None else lambda u: log_joint.log_guide(u[:, None].expand(-1, n, -1))
        columns = [_terms(_pairs(density, z[r], own[r].double()), own[r].double(), prior[r]) for r in range(repeats)]
    return _summary(torch.stack([torch.stack(part) for part in columns]).mean(0), n)


def mutual_information_of_table(found: Table) -> dict[str, float]:
    """Return the same where all latents are discrete, from their exact probabilities."""
    log_q, n = found.log_guide.double(), found.log_guide.shape[1]
    if n < 3:
        return _unknown()
    q, log_p = log_q.exp(), found.log_prior.double()
    mixed = torch.logsumexp(log_q, 1, keepdim=True) - math.log(n)
    others = torch.log(((n * mixed.exp() - q) / (n - 1)).clamp_min(1e-300))
    mean_of = lambda log_ratio: torch.where(q > 0, q * log_ratio, 0.0).sum(0)
    lower, upper, rate = mean_of(log_q - mixed), mean_of(log_q - others), mean_of(log_q - log_p)
    values = torch.stack([lower, upper, rate - upper, rate - lower])
    return _summary(torch.stack([values, values]), n)


def _of_normals(q: Normals) -> Callable[[Tensor], Tensor]:
    """Return z (M, d) -> log density of each normal, (M, N): one matrix product."""
    n, d = q.loc.shape
    eye = torch.eye(d, dtype=q.root.dtype, device=q.root.device).expand(n, d, d)
    inverse = torch.linalg.solve_triangular(q.root, eye, upper=False)
    shift = (inverse @ q.loc[..., None])[..., 0]
    rest = q.log_det + d * HALF_LOG_2PI
    return lambda z: -0.5 * ((z @ inverse.flatten(0, 1).T).unflatten(1, (n, d)) - shift).square().sum(-1) - rest


def _pairs(density: Callable[[Tensor], Tensor], z: Tensor, own: Tensor) -> Tensor:
    """Return log q(z_i | x_n), (K, K), for z (K, d)."""
    n, d = z.shape
    parts = [density(u).double() for u in z.split(fitting(n * max(1, d), ARRAY))]
    pairs = torch.cat(parts)
    pairs.diagonal().copy_(own)
    return pairs


def _terms(pairs: Tensor, own: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Return each datum's term of the four means, (4, K), and its influence on them, as a datum and as a part of q(z)."""
    n = len(pairs)
    mixed = torch.logsumexp(pairs, 1)
    others = pairs.clone()
    others.fill_diagonal_(-torch.inf)
    rest = torch.logsumexp(others, 1)
    lower, upper = own - mixed + math.log(n), own - rest + math.log(n - 1)
    rate = own - prior
    values = torch.stack([lower, upper, rate - upper, rate - lower])
    share, share_of_others = (1 - torch.exp(t - m[:, None]).sum(0) for t, m in ((pairs, mixed), (others, rest)))
    return values, values + torch.stack([share, share_of_others, -share_of_others, -share])


def _summary(both: Tensor, n: int) -> dict[str, float]:
    """Turn terms and influences, (2, 4, K), into means and standard errors."""
    value, error = both[0].mean(1), both[1].std(1) / n**0.5
    found = {"information_data": float(n)}
    for i, name in enumerate(NAMES):
        found[name], found[f"{name}_se"] = value[i].item(), error[i].item()
    return found


def _unknown() -> dict[str, float]:
    return {"information_data": 0.0, **{f"{name}{end}": math.nan for name in NAMES for end in ("", "_se")}}


def energy_test(a: Tensor, b: Tensor, *, permutations: int = PERMUTATIONS, seed: int = 0) -> tuple[float, float, float]:
    """Test whether two samples of equal size come from one distribution.

    E = 2 E|A - B| - E|A - A'| - E|B - B'| >= 0, zero only for equal distributions; coordinates are in units of their pooled
    standard deviation. The p-value is exact, by permutation. (Szekely and Rizzo 2013,
    https://doi.org/10.1016/j.jspi.2013.03.018.)

    Args:
        a: (n, d).
        b: (n, d).
        permutations: number of permutations P; the p-value is at least 1 / (P + 1).
        seed: random seed.

    Returns:
        The p-value; the effect E / (2 E|A - B|), between 0 (equal) and 1 (two points); and the mean effect for equal
        distributions, about 1 / n.

    Raises:
        ValueError: the two samples differ in shape.
    """
    n = len(a)
    if b.shape != a.shape:
        raise ValueError(f"samples differ in shape: {tuple(a.shape)} and {tuple(b.shape)}")
    pooled = torch.cat([a, b]).double()
    distance = _distances(pooled)
    generator = torch.Generator(device=a.device).manual_seed(seed)
    order = torch.rand(permutations, 2 * n, device=a.device, generator=generator).argsort(-1)
    label = torch.zeros(permutations + 1, 2 * n, dtype=torch.float64, device=a.device)
    label[0, :n] = 1
    label[1:].scatter_(1, order[:, :n], 1.0)
    between = ((label @ distance) * (1 - label)).sum(1)
    energy = 4 * between - distance.sum()
    effect = energy / (2 * between).clamp_min(1e-300)
    beyond = int((energy[1:] >= energy[0] - 1e-9 * energy[0].abs()).sum())
    return (1 + beyond) / (1 + permutations), effect[0].item(), effect[1:].mean().item()


def _distances(pooled: Tensor) -> Tensor:
    spread = pooled.std(0)
    scaled = (pooled - pooled.mean(0)) / torch.where(spread > 0, spread, 1.0)
    return torch.cdist(scaled, scaled)
