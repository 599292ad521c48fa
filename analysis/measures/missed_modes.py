"""The check for `mode missed by the guide`: how much of the posterior lies in modes where the guide has almost no mass.

The check uses draws only, for any reference and guide, per datum. A reference draw z_r belongs to a missed mode if

1. log q(z_r|x) is below that of all kept draws of the guide (1,000: less than about 0.1 % of its mass is that low);
2. no straight segment leads to the guide: on each segment to its nearest draws and to its highest ones, log p(x, z) falls more
   than 1 nat below both ends. Excludes a guide that is only too narrow or off centre: from its draws log p only rises;
3. no bent path does either: along the best chain of neighbouring reference draws to those that the guide covers, log p(x, z)
   falls more than 2 + sqrt(d) / 2 nats below both z_r and the guide's median draw. Excludes banana shapes.

The estimand is the share of p(z|x) in such modes; from 200 draws its standard error is sqrt(share (1 - share) / 200).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from elbowroom.analysis.measures.table import MISSED
from elbowroom.inference.mcmc.normals import Normals, whiten
from elbowroom.inference.posterior import Posterior
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system.memory import ARRAY, fitting
from elbowroom.system.stages import stage

DRAWS = 200  # of the reference and of the guide that are used
NEAREST, HIGHEST = 3, 3  # draws of the guide to which each reference draw is connected
NEIGHBOURS = 8  # reference draws to which each is connected
INNER = 9  # points evaluated on a segment
STRAIGHT = 1.0  # nats
BENT = 2.0  # nats, plus sqrt(d) / 2 for the random height of draws on the path


@stage("missed mass")
def missed_mass(log_joint: LogJoint, guide: Posterior, reference: Posterior) -> Tensor:
    """Return the posterior mass in modes that the guide misses, (N,); NaN where the reference is neither exact nor certified.

    `guide` has kept draws with their log density, `sample_stats["log_q"]`; `reference` is a posterior of the same data.
    """
    n, d = log_joint.n_obs, log_joint.dim
    share = torch.full((n,), torch.nan, dtype=torch.float64, device=log_joint.device)
    draws = _spread(reference.draws.flatten(0, 1))
    known = reference.trusted.to(share.device) & draws.isfinite().all(-1).all(0)
    if d == 0 or not bool(known.any()):
        return share
    share[known] = 0.0
    with torch.no_grad():
        lowest = guide.sample_stats["log_q"].flatten(0, 1).amin(0)
        far = log_joint.log_guide(draws.nan_to_num()) < lowest
        rows = (known & (far.double().mean(0) > MISSED)).nonzero()[:, 0]
        if not len(rows):
            return share
        starts = _spread(guide.draws.flatten(0, 1))
        places = reference.draws.flatten(0, 1)
        for some in rows.split(fitting(len(draws) * max(len(draws), d), ARRAY)):
            part, used, at = log_joint.some(some)
            metric = _metric(places[:, used])
            share[some] = _share(part, metric, draws[:, used].nan_to_num(), starts[:, used], far[:, used])[at]
    return share


def _spread(draws: Tensor) -> Tensor:
    if len(draws) <= DRAWS:
        return draws
    return draws[torch.linspace(0, len(draws) - 1, DRAWS, device=draws.device).round().long()]


def _metric(draws: Tensor) -> Normals:
    mean = draws.mean(0).nan_to_num()
    centred = (draws - mean).nan_to_num()
    covariance = torch.einsum("snd,sne->nde", centred, centred) / max(len(draws) - 1, 1)
    return Normals.from_moments(mean, covariance)


def _share(log_joint: LogJoint, metric: Normals, draws: Tensor, starts: Tensor, far: Tensor) -> Tensor:
    """Return the share of the draws (R, N, d) in modes that the guide's draws (G, N, d) miss, (N,)."""
    height, level = _height(log_joint, draws), _height(log_joint, starts)
    u, v = (whiten(metric.root, z - metric.loc).transpose(0, 1) for z in (draws, starts))
    near = torch.cdist(u, v).topk(min(NEAREST, len(starts)), largest=False).indices  # (N, R, k)
    high = level.T.topk(min(HIGHEST, len(starts))).indices[:, None].expand(-1, len(draws), -1)
    to = torch.cat([near, high], -1)
    lowest = _lowest(log_joint, draws, starts, to)
    ends = torch.minimum(height.T[..., None], _pick(level.T, to))
    straight = (ends - lowest <= STRAIGHT).any(-1).T
    apart = far & ~straight  # (R, N)
    some = (apart.double().mean(0) > MISSED).nonzero()[:, 0]
    share = torch.zeros(draws.shape[1], dtype=torch.float64, device=draws.device)
    if not len(some):
        return share
    part, some, _ = log_joint.some(some)
    lost = _unreachable(part, u[some], draws[:, some], height[:, some], level[:, some], apart[:, some])
    share[some] = lost.double().mean(0)
    return share


def _unreachable(log_joint: LogJoint, u: Tensor, draws: Tensor, height: Tensor, level: Tensor, apart: Tensor) -> Tensor:
    """Return which of the draws in `apart` no chain of neighbours connects with the guide, (R, N)."""
    count = len(draws)
    distance = torch.cdist(u, u)
    to = distance.topk(min(NEIGHBOURS + 1, count), largest=False).indices  # itself among them
    lowest = _lowest(log_joint, draws, draws, to)
    lowest = torch.minimum(lowest, torch.minimum(height.T[..., None], _pick(height.T, to)))
    edge = distance.new_full(distance.shape, -math.inf).scatter(2, to, lowest)
    edge = torch.maximum(edge, edge.mT)  # (N, R, R)
    saddle = torch.where(apart, -math.inf, height).T  # the lowest point of the best chain to what the guide covers
    for _ in range(count):
        better = torch.maximum(saddle, torch.minimum(edge, saddle[:, None]).amax(-1))
        if torch.equal(better, saddle):
            break
        saddle = better
    ends = torch.minimum(height.T, level.median(0).values[:, None])
    deep = apart.T & (ends - saddle > BENT + 0.5 * math.sqrt(draws.shape[-1]))
    # draws low on the flanks of such a mode have the same saddle as its top
    same = (saddle[:, :, None] == saddle[:, None]) & deep[:, None]
    return (apart.T & same.any(-1)).T


def _height(log_joint: LogJoint, z: Tensor) -> Tensor:
    return log_joint(z).double().nan_to_num(nan=-torch.inf)


def _pick(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, index.flatten(1)).view_as(index)


def _lowest(log_joint: LogJoint, a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    """Return the lowest log p(x, z) inside the segments from a (R, N, d) to b[index], index (N, R, k): (N, R, k)."""
    n, count, k = index.shape
    lowest = torch.full((n, count, k), math.inf, dtype=torch.float64, device=a.device)
    for j in range(k):
        end = b.gather(0, index[:, :, j].T[..., None].expand(-1, -1, a.shape[-1]))
        for step in range(1, INNER + 1):
            lowest[..., j] = torch.minimum(lowest[..., j], _height(log_joint, a + step / (INNER + 1) * (end - a)).T)
    return lowest
