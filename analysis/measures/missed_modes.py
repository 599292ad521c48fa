"""The check for `mode missed by the guide`: how much of the posterior lies in modes where the guide has almost no mass.

Per datum, for any certified or exact reference and any guide, a reference draw z_r belongs to a missed mode if

1. log q(z_r|x) is below that of all kept draws of the guide (1,000: less than about 0.1 % of its mass is that low);
2. climbing from z_r ends in another mode than climbing from draws of the guide: on the best way between both tops log p(x, z)
   falls more than 1.5 nats below the lower one. Ways are straight lines between neighbouring tops and points on the ridges
   that lead to them, so a guide that is too narrow, off centre or on one arm of a banana misses no mode. A mode is the guide's
   if at least two of 64 draws of it climb there.

Draws themselves are not compared, only tops: in many dimensions a line between two typical draws rises on its way, however deep
the valley that it crosses, and a draw of the guide's tail lies low enough to hide a valley.

The estimand is the share of p(z|x) in such modes. 64 draws decide whether there is one (a mode of 5 % has no draw among them at
4 % of the data); then 200 draws tell its share, with a standard error of sqrt(share (1 - share) / 200).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from elbowroom.analysis.measures.table import MISSED
from elbowroom.inference.mcmc.normals import Normals, whiten
from elbowroom.inference.posterior import Posterior
from elbowroom.inference.search.modes import climb
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system.memory import ARRAY, fitting
from elbowroom.system.stages import stage

DRAWS = 200  # of the reference and of the guide that are used
SCOUTS, GUIDE = 64, 64  # draws of the reference that look for a missed mode first, and draws of the guide
RIDGE, TOP = 8, 20  # steps of climbing: to a ridge, and on to the top
NEAREST = 3  # tops of the guide to which each point is connected, beside the highest
NEIGHBOURS = 8  # points to which each is connected
INNER = 9  # points evaluated on a segment
VALLEY = 1.5  # nats below the lower of two tops: two modes


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
    share = torch.zeros(draws.shape[1], dtype=torch.float64, device=draws.device)
    unit = draws.std(0).clamp_min(1e-12)
    few = _few(len(draws), SCOUTS)
    some = (far[few] & _apart(log_joint, unit, draws[few], starts)).any(0).nonzero()[:, 0]
    if len(some):
        part, some, _ = log_joint.some(some)
        lost = _lost(part, metric.rows(some), unit[some], draws[:, some], starts[:, some], far[:, some])
        share[some] = lost.double().mean(0)
    return share


def _apart(log_joint: LogJoint, unit: Tensor, draws: Tensor, starts: Tensor) -> Tensor:
    """Return which draws climb to a top from which no straight line leads to where the guide's highest draws climb, (R, N)."""
    high = _height(log_joint, starts).topk(min(NEAREST, len(starts)), dim=0).indices  # (k, N)
    _, covered = _climbed(log_joint, starts.gather(0, high[..., None].expand(-1, -1, starts.shape[-1])), unit)
    _, top = _climbed(log_joint, draws, unit)
    height, level = _height(log_joint, top).T, _height(log_joint, covered).T
    to = torch.arange(len(covered), device=top.device).expand(*height.shape, -1)
    ends = torch.minimum(height[..., None], level[:, None])
    return (ends - _lowest(log_joint, top, covered, to) > VALLEY).all(-1).T


def _lost(log_joint: LogJoint, metric: Normals, unit: Tensor, draws: Tensor, starts: Tensor, far: Tensor) -> Tensor:
    """Return which of the draws stand in modes that no way from the guide's modes reaches, (R, N)."""
    starts = starts[_few(len(starts), GUIDE)]
    ridge, top = _climbed(log_joint, draws, unit)
    _, covered = _climbed(log_joint, starts, unit)
    points = torch.cat([covered, top, ridge])
    guided = slice(0, len(covered))
    height = _height(log_joint, points).T  # (N, P)
    u = whiten(metric.root, points - metric.loc).transpose(0, 1)
    distance = torch.cdist(u, u)
    near = distance.topk(min(NEIGHBOURS + 1, len(points)), largest=False).indices  # itself among them
    ours = distance[:, :, guided].topk(min(NEAREST, len(covered)), largest=False).indices
    highest = height[:, guided].argmax(1)[:, None, None].expand(-1, len(points), 1)
    to = torch.cat([near, ours, highest], -1)
    lowest = torch.minimum(_lowest(log_joint, points, points, to), torch.minimum(height[..., None], _pick(height, to)))
    edge = distance.new_full(distance.shape, -math.inf).scatter_reduce(2, to, lowest.to(distance.dtype), "amax")
    edge = torch.maximum(edge, edge.mT).to(height.dtype)  # (N, P, P): the lowest point between two
    # a mode is the guide's if two of its draws climb to it: one of them may lie past a saddle by chance
    own = height[:, guided]
    joined = edge[:, guided, guided] >= torch.minimum(own[:, :, None], own[:, None]) - VALLEY
    saddle = torch.full_like(height, -math.inf)
    saddle[:, guided] = torch.where(joined.sum(-1) >= min(2, len(covered)), own, -math.inf)
    best = saddle.amax(1, keepdim=True)
    for _ in range(len(points)):  # the lowest point of the best way to a mode of the guide
        better = torch.maximum(saddle, torch.minimum(edge, saddle[:, None]).amax(-1))
        if torch.equal(better, saddle):
            break
        saddle = better
    tops = slice(len(covered), len(covered) + len(top))
    return far & (torch.minimum(height[:, tops], best) - saddle[:, tops] > VALLEY).T


def _few(size: int, count: int) -> Tensor:
    return torch.linspace(0, size - 1, min(size, count)).round().long()


def _climbed(log_joint: LogJoint, z: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Climb from every point: return where the way has come to a ridge, and its end."""
    ridge, _ = climb(log_joint, z, unit, RIDGE)
    return ridge, climb(log_joint, ridge, unit, TOP)[0]


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
