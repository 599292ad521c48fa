"""Narrow peaks: where they stand, how wide they are, and which of a pool of points a lattice has not seen."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from elbowroom.inference.references.grid.lattice import Density, Quadrature, root_of
from elbowroom.inference.search.modes import climb, floor_nan
from elbowroom.inference.target.log_joint import LogJoint

CLIMBS = 40
ROUNDS = 3  # of widths and a Newton step
HALVINGS = 12  # of the logarithm of a width between 1e-10 and 10 scales: it is then right to half a per cent
FALL = 0.5  # nats below the peak at one width
FLOOR = 1e-5  # smallest curvature in units of the widths: rounding makes smaller ones
SAME = 4.0  # peaks within this many widths are one
MOST = 4  # peaks per datum
HOLE = 8.0  # widths around a peak that are left out of the scale of the rest


@dataclass
class Peaks:
    """Peaks (K, N): place (K, N, d), height (K, N), normal root (K, N, d, d), and which of them are meant."""

    z: Tensor
    log_p: Tensor
    root: Tensor
    valid: Tensor

    @property
    def log_mass(self) -> Tensor:
        """Log of the integral of the normal with this height and root, (K, N)."""
        dim = self.z.shape[-1]
        return self.log_p + dim / 2 * math.log(2 * math.pi) + self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def distance(self, z: Tensor) -> Tensor:
        """Return the squared distances of points (S, N, d) to the nearest valid peak in its own widths, (S, N)."""
        best = torch.full(z.shape[:-1], torch.inf, dtype=z.dtype, device=z.device)
        for centre, root, valid in zip(self.z, self.root, self.valid, strict=True):
            t = torch.linalg.solve_triangular(root, (z - centre).movedim(0, -1), upper=False).movedim(-1, 0)
            best = torch.where(valid, torch.minimum(best, t.square().sum(-1)), best)
        return best

    def outside(self, density: Density) -> Density:
        """Return the density without the peaks."""
        return lambda z: density(z).masked_fill(self.distance(z) < HOLE**2, -torch.inf)

    def chosen(self, wanted: Tensor) -> Peaks:
        """Keep the wanted (K, N), the heaviest first, and each once; at most `MOST`."""
        mass = torch.where(wanted & self.log_mass.isfinite(), self.log_mass, -torch.inf)
        valid = mass > -torch.inf
        order = mass.argsort(0, descending=True)

        def sort(x: Tensor) -> Tensor:
            index = order.reshape(*order.shape, *[1] * (x.dim() - 2)).expand(*order.shape, *x.shape[2:])
            return x.gather(0, index)

        found = Peaks(sort(self.z), sort(self.log_p), sort(self.root), sort(valid))
        for k in range(1, len(found.z)):
            before = Peaks(found.z[:k], found.log_p[:k], found.root[:k], found.valid[:k])
            found.valid[k] &= ~(before.distance(found.z[k : k + 1])[0] < SAME**2)
        first = (~found.valid).long().argsort(dim=0, stable=True)[:MOST]
        order = order.gather(0, first)
        return Peaks(sort(self.z), sort(self.log_p), sort(self.root), found.valid.gather(0, first))


def peaks(log_joint: LogJoint, z: Tensor, scale: Tensor) -> Peaks:
    """Climb from every start (K, N, d) to a peak and measure it: widths where log p falls by 1/2, then its curvature."""
    z, log_p = climb(log_joint, z, scale, CLIMBS)
    density: Density = lambda u: floor_nan(log_joint(u))
    unit = scale.expand(z.shape[1:]).expand_as(z)
    root = torch.diag_embed(unit)
    for _ in range(ROUNDS):
        width = _widths(density, z, log_p, unit)
        root, step = _curvature(density, z, log_p, width)
        moved = density(z + step)
        better = moved > log_p
        z, log_p = torch.where(better.unsqueeze(-1), z + step, z), torch.where(better, moved, log_p)
    return Peaks(z, log_p, root, log_p.isfinite())


def _at(density: Density, z: Tensor, moves: Tensor) -> Tensor:
    """Evaluate at z + moves, moves (J, K, N, d): (J, K, N)."""
    points = (z + moves).flatten(0, 1)
    return density(points).reshape(moves.shape[:-1])


def _widths(density: Density, z: Tensor, log_p: Tensor, unit: Tensor) -> Tensor:
    """Return the distance along each axis at which log p has fallen by `FALL`, the mean of both sides, (K, N, d)."""
    d = z.shape[-1]
    eye = torch.eye(d, dtype=z.dtype, device=z.device).reshape(d, *[1] * (z.dim() - 1), d)
    low, high = (unit * 1e-10).log(), (unit * 10).log()
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        moves = eye * middle.exp()
        up, down = _at(density, z, torch.cat([moves, -moves])).chunk(2)
        fallen = log_p - torch.logaddexp(up, down) + math.log(2)
        far = (fallen > FALL).movedim(0, -1)
        low, high = torch.where(far, low, middle), torch.where(far, middle, high)
    return high.exp()


def _curvature(density: Density, z: Tensor, log_p: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Return the root of the inverse curvature, (K, N, d, d), and the Newton step (K, N, d), by differences over `width`."""
    d = z.shape[-1]
    unit = torch.diag_embed(width).movedim(-2, 0)  # (d, K, N, d)
    up, down = _at(density, z, torch.cat([unit, -unit])).chunk(2)
    curve = torch.diag_embed((2 * log_p - up - down).movedim(0, -1))
    for i in range(d):
        for j in range(i):
            a, b = unit[i], unit[j]
            corners = _at(density, z, torch.stack([a + b, -a - b, a - b, b - a]))
            curve[..., i, j] = curve[..., j, i] = -(corners[0] + corners[1] - corners[2] - corners[3]) / 4
    value, vector = torch.linalg.eigh(curve.nan_to_num(0.0, 0.0, 0.0))
    inverse = (vector / value.clamp_min(FLOOR).unsqueeze(-2)) @ vector.mT
    gradient = ((up - down) / 2).movedim(0, -1).nan_to_num(0.0, 0.0, 0.0)
    step = width * (inverse @ gradient.unsqueeze(-1)).squeeze(-1)
    return root_of((width.unsqueeze(-1) * inverse * width.unsqueeze(-2)).flatten(0, 1)).reshape_as(inverse), step


def surprising(found: Quadrature, z: Tensor, log_p: Tensor, within: float, count: int) -> Tensor:
    """Return the points of a pool (S, N, d) that rise most above the lattice around them, (count, N, d).

    Points more than `within` nats below the peak do not count.
    """
    peak = torch.maximum(found.log_p.amax(0), log_p.amax(0))
    rise = torch.where(log_p > peak - within, log_p - found.nearby(z), 0.0).nan_to_num(0.0, torch.inf, 0.0)
    place = rise.topk(min(count, len(rise)), 0).indices
    return z.gather(0, place.unsqueeze(-1).expand(-1, -1, z.shape[-1]))
