"""Landmarks: high points of each posterior, found from distant starts, that a grid must contain and resolve.

They come from the local maxima of a coarse grid over the prior, and from climbing from draws of the guide and of the prior. A
guide that covers only one mode would hide the others. A narrow peak at the place where the likelihood is largest, as
contaminated noise makes it, is found by climbing the likelihood alone.

Beside them stands the pool: thousands of draws of guide and prior with their log joint. No grid may deny what they have seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from elbowroom.inference.program.replay import Which
from elbowroom.inference.references.grid.lattice import Box, border, lattice, root_of
from elbowroom.inference.search.modes import MISS, STEPS, ascend, climb, floor_nan
from elbowroom.inference.search.seen import seen
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system.memory import ARRAY, fitting

COARSE = {1: 2001, 2: 161, 3: 41}
COARSE_PER_DATUM = {1: 401, 2: 49, 3: 19}  # used if the coarse grid needs a program evaluation per datum
MAXIMA = 6  # local maxima of the coarse grid, per datum
STARTS: dict[Which, int] = {"guide": 4, "model": 6}  # draws to climb from, per datum
EXPANSIONS = 8
RISING = 1.0  # nats gained in the last steps of a climb that has not reached its top
FAR_STEPS = 120  # of the climb that follows: enough for a peak of a hundred-millionth of the prior's width
UPHILL: dict[Which, int] = {"guide": 2, "model": 2}  # draws to climb the likelihood from
UPHILL_STEPS = 40
RIM = 20.0  # nats below the coarse grid's peak within which its outermost points are kept
OF_GUIDE = {1: 500, 2: 1000, 3: 2000}  # draws in the pool where no pass over the guide has left its own
OF_PRIOR = {1: 250, 2: 500, 3: 1000}  # likewise of the prior, per datum
OF_PRIOR_SHARED = 4000  # of the prior if all data can share them
COARSE_BLOCK = 2**21  # points x data held at once: 16 MB for each of a dozen arrays


@dataclass
class Landmarks:
    """Points z (K, N, d), their log joint (K, N), a first box around each posterior, and points that only bear witness.

    `rim` are the outermost points of the coarse grid, `pool` draws of guide and prior: (S, N, d) and (S, N). `guided` and
    `prior` are the numbers of draws in the pool.
    """

    z: Tensor
    log_p: Tensor
    box: Box
    rim: tuple[Tensor, Tensor]
    pool: tuple[Tensor, Tensor]
    guided: int
    prior: int

    def rows(self, index: Tensor) -> Landmarks:
        """Return the landmarks of some of the data."""
        rim, pool = ((z[:, index], log_p[:, index]) for z, log_p in (self.rim, self.pool))
        return Landmarks(self.z[:, index], self.log_p[:, index], self.box.rows(index), rim, pool, self.guided, self.prior)

    @property
    def smallest(self) -> tuple[float, float]:
        """Shares of the prior and of the guide that the basin of a narrow peak must hold to be missed with p < 1e-3."""
        return 1 - MISS ** (1 / max(self.prior, 1)), 1 - MISS ** (1 / max(self.guided, 1))


def survey(log_joint: LogJoint, seed: int) -> Landmarks:
    """Find landmarks and a first box for every datum."""
    n = log_joint.n_obs
    prior = log_joint.sample_prior(2 + 4000 // n, seed).flatten(0, 1)
    some = prior[torch.linspace(0, len(prior) - 1, min(len(prior), 20_000), device=prior.device).long()]
    low, high = torch.quantile(some, 0.001, dim=0), torch.quantile(some, 0.999, dim=0)
    margin = 0.4 * (high - low) + 1e-6
    scale = ((torch.quantile(some, 0.84, dim=0) - torch.quantile(some, 0.16, dim=0)) / 2).clamp_min(1e-12)
    boxes, maxima, rim = _coarse(log_joint, low - margin, high + margin)
    starts = [maxima, *(log_joint.draw(which, count, seed + 1) for which, count in STARTS.items())]
    z, log_p = _tops(log_joint, torch.cat(starts), scale)
    best = _uphill(log_joint, torch.cat([maxima[:1], *(log_joint.draw(w, c, seed + 2) for w, c in UPHILL.items())]), scale)
    pool, guided, drawn = _pool(log_joint, prior, seed)
    z, log_p = torch.cat([z, best]), torch.cat([log_p, floor_nan(log_joint(best))])
    return Landmarks(z, log_p, boxes, rim, pool, guided, drawn)


def _tops(log_joint: LogJoint, z: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Climb from every start (S, N, d); where the top is not reached, as at a narrow peak far away, go on."""
    z, log_p, gain = ascend(log_joint.grad, z, scale, STEPS)
    rows = (gain > RISING).any(0).nonzero().squeeze(-1)
    for part, used, at in map(log_joint.some, rows.split(fitting(z[:, 0].numel(), ARRAY)) if len(rows) else ()):
        end, top = climb(part, z[:, used], scale, FAR_STEPS)
        z[:, used[at]], log_p[:, used[at]] = end[:, at], top[:, at]
    return z, log_p


def _uphill(log_joint: LogJoint, z: Tensor, scale: Tensor) -> Tensor:
    """Climb the likelihood alone from every start (S, N, d); return the ends."""

    def likelihood(u: Tensor) -> tuple[Tensor, Tensor]:
        _, value, _, gradient = log_joint.parts(u)
        return value, gradient

    return ascend(likelihood, z, scale, UPHILL_STEPS)[0]


def _pool(log_joint: LogJoint, prior: Tensor, seed: int) -> tuple[tuple[Tensor, Tensor], int, int]:
    """Return points with their log joint: draws of the guide, by the audit's own pass where there was one, and of the prior."""
    d, held = log_joint.dim, seen(log_joint)
    guided = log_joint.draw("guide", OF_GUIDE[d], seed + 3) if held is None else held.z
    of_guide = log_joint(guided) if held is None else held.log_p
    if log_joint.can_share():
        some = prior[torch.linspace(0, len(prior) - 1, min(len(prior), OF_PRIOR_SHARED), device=prior.device).long()]
        drawn, of_prior = some[:, None].expand(-1, log_joint.n_obs, -1), log_joint.shared(some)
    else:
        drawn = log_joint.draw("model", OF_PRIOR[d], seed + 4)
        of_prior = log_joint(drawn)
    log_p = floor_nan(torch.cat([of_guide, of_prior.to(of_guide.dtype)]))
    return (torch.cat([guided, drawn.to(guided.dtype)]), log_p), len(guided), len(drawn)


def _coarse(log_joint: LogJoint, low: Tensor, high: Tensor) -> tuple[Box, Tensor, tuple[Tensor, Tensor]]:
    """Evaluate one grid over the prior for all data; widen it for data with a posterior that reaches its border."""
    n, d = log_joint.n_obs, log_joint.dim
    size = (COARSE if log_joint.can_share() else COARSE_PER_DATUM)[d]
    box = Box(*(torch.zeros(n, *shape, dtype=low.dtype, device=low.device) for shape in ((d,), (d, d), (d,), (d,))))
    maxima = torch.zeros(MAXIMA, n, d, dtype=low.dtype, device=low.device)
    ways = torch.tensor([w for w in product((-1, 0, 1), repeat=d) if any(w)], dtype=low.dtype, device=low.device)
    ways = ways if d < 3 else ways[ways.abs().sum(-1) == 1]
    rim, of_rim = low.new_zeros(len(ways), n, d), low.new_zeros(len(ways), n)
    rest = torch.arange(n, device=low.device)
    for turn in range(EXPANSIONS):
        cut = []
        z = low + lattice(size, d, low) * (high - low)
        blocks = rest.split(fitting(size**d, COARSE_BLOCK))
        for rows, log_p in zip(blocks, map(floor_nan, log_joint.shared_over(z, blocks)), strict=True):
            box.centre[rows], box.root[rows], half = _extent(z, log_p, (high - low) / size)
            box.low[rows], box.high[rows] = -half, half
            maxima[:, rows] = _local_maxima(z, log_p, size, d)
            rim[:, rows], of_rim[:, rows] = _outermost(z, log_p, ways / (high - low))
            weight = torch.softmax(log_p, 0)[border(size, d, z.device)].sum(0)
            cut.append(rows[~(weight < 1e-4)])
        rest = torch.cat(cut)
        if not len(rest) or turn == EXPANSIONS - 1:
            break
        middle, half_width = (low + high) / 2, (high - low) / 2
        low, high = middle - 2 * half_width, middle + 2 * half_width
    return box, maxima, (rim, of_rim)


def _outermost(z: Tensor, log_p: Tensor, ways: Tensor) -> tuple[Tensor, Tensor]:
    """Return the points farthest along each way (W, d) among those near the peak, (W, N, d), and their log joint, (W, N)."""
    near = log_p > log_p.amax(0) - RIM
    place = torch.stack([torch.where(near, (z @ way).unsqueeze(-1), -torch.inf).argmax(0) for way in ways])
    return z[place], log_p.gather(0, place)


def _extent(z: Tensor, log_p: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return centre, root and half-width (in whitened units) of the region with mass on a coarse grid."""
    weight = torch.softmax(log_p.clamp_min(torch.finfo(log_p.dtype).min / 4), 0)
    mean = torch.einsum("gn,gd->nd", weight, z)
    second = torch.einsum("gn,gd,ge->nde", weight, z, z) - mean.unsqueeze(-1) * mean.unsqueeze(-2)
    root = root_of(second + torch.diag_embed((cell.square() / 4).expand_as(mean)))
    inside = log_p > log_p.max(0).values - 30.0
    spread = torch.stack([torch.where(inside, (z[:, j, None] - mean[:, j]).abs(), 0.0).amax(0) for j in range(z.shape[1])], -1)
    eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    reach = torch.linalg.solve_triangular(root, eye, upper=False).abs()
    return mean, root, (reach @ (spread + cell).unsqueeze(-1)).squeeze(-1).clamp(6.0, 60.0)


def _local_maxima(z: Tensor, log_p: Tensor, size: int, dim: int) -> Tensor:
    """Return the highest local maxima of a coarse grid, (MAXIMA, N, d); the highest is repeated if there are fewer."""
    field = log_p.T.reshape(-1, 1, *[size] * dim)
    field = field.clamp_min(torch.finfo(field.dtype).min / 4)
    pool = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}[dim]
    peaks = torch.where(pool(field, 3, stride=1, padding=1) == field, field, -torch.inf).reshape(len(field), -1)
    value, place = peaks.topk(MAXIMA, dim=1)
    place = torch.where(value.isfinite(), place, place[:, :1])
    return z[place].transpose(0, 1)
