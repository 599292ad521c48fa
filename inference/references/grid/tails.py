"""Heavy tails: a lattice in coordinates that stretch with the distance from the peak.

    z = m + L sinh(s),   f(s) = p(x, m + L sinh(s)) |L| prod_j cosh(s_j)

m is the peak and L the root of its inverse curvature. A tail that falls as a power of the distance falls exponentially in s,
and a smooth f stays smooth: a hundred points per axis hold what an even lattice cannot with a million. On changes of variable
for the trapezoidal rule: Trefethen and Weideman (2014), The exponentially convergent trapezoidal rule, SIAM Review 56.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elbowroom.inference.references.grid.landmarks import Landmarks
from elbowroom.inference.references.grid.lattice import NO_SHIFT, Box, Quadrature, chosen, quadrature
from elbowroom.inference.references.grid.peaks import peaks
from elbowroom.inference.search.modes import floor_nan
from elbowroom.inference.target.log_joint import LogJoint

LOOK, LOOK_STEP = 60, 0.5  # points on each half axis, and their spacing in s, to find where a posterior ends
FALL = 18.0  # nats that f falls before it ends: a tail as 1 / t^2 leaves 1.5e-8 of the mass beyond
FACTORS = {1: (1.0, 3.0, 9.0, 27.0), 2: (1.0, 2.0, 4.0), 3: (1.0, 1.5)}  # on the points per axis, one after the other
POINTS = {1: 181, 2: 73, 3: 51}  # per axis of the first lattice: a spacing of .2, .5 and .7 where tails fall as 1 / t^2


@dataclass
class Stretched(Quadrature):
    """The sums over one lattice in s; `z` are the points, and `s` what was spaced evenly."""

    s: Tensor
    bend: Bend

    def nearby(self, z: Tensor) -> Tensor:
        """Return the highest log joint on the corners of the cell around each point z (S, N, d), (S, N)."""
        return super().nearby(self.bend.coordinates(z))

    def draw(self, keep: int, generator: torch.Generator) -> Tensor:
        """Draw points by their weights and jitter them within their cells in s, (keep, N, d)."""
        index = chosen(self.log_weight, keep, generator).unsqueeze(-1).expand(-1, -1, self.z.shape[-1])
        points = self.s.gather(0, index)
        jitter = torch.rand(points.shape, dtype=points.dtype, device=points.device, generator=generator) - 0.5
        return self.bend.points(points + jitter * self.step)


@dataclass
class Bend:
    """The coordinates s of every datum: peak (N, d), root (N, d, d), the box in s, and the landmarks."""

    centre: Tensor
    root: Tensor
    box: Box
    marks: Landmarks

    @property
    def factors(self) -> tuple[float, ...]:
        """Factors on the points per axis, one after the other."""
        return FACTORS[self.centre.shape[-1]]

    @property
    def applies(self) -> Tensor:
        """Every datum, (N,)."""
        return torch.ones(len(self.centre), dtype=torch.bool, device=self.centre.device)

    def resolves(self, z: Tensor) -> Tensor:
        """Return which of the points z (S, N, d) it resolves, whatever their neighbours say: none."""
        return torch.zeros(z.shape[:-1], dtype=torch.bool, device=z.device)

    def points(self, s: Tensor) -> Tensor:
        """Map s (S, N, d) to z."""
        return self.centre + torch.einsum("nde,sne->snd", self.root, s.sinh())

    def coordinates(self, z: Tensor) -> Tensor:
        """Map z (S, N, d) to s."""
        t = torch.linalg.solve_triangular(self.root, (z - self.centre).movedim(0, -1), upper=False).movedim(-1, 0)
        return t.asinh()

    def sums(self, log_joint: LogJoint, factor: float, shift: Sequence[float] = NO_SHIFT) -> Stretched:
        """Return the sums over a lattice with `factor` times as many points per axis as the first."""
        size = int(factor * POINTS[log_joint.dim])  # whatever the widths: a datum's numbers must not hang on its neighbours
        found = quadrature(lambda s: self.density(log_joint, s), self.box, size, shift)
        own = {**vars(found), "z": self.points(found.z), "log_p": found.log_p - self.stretch(found.z)}
        return Stretched(**own, s=found.z, bend=self)

    def density(self, log_joint: LogJoint, s: Tensor) -> Tensor:
        """Return log f(s), (S, N)."""
        return floor_nan(log_joint(self.points(s))) + self.stretch(s)

    def stretch(self, s: Tensor) -> Tensor:
        """Return the log determinant of dz / ds, (S, N)."""
        log_cosh = s.abs() + torch.log1p(torch.exp(-2 * s.abs())) - math.log(2)
        return log_cosh.sum(-1) + self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def bend(log_joint: LogJoint, box: Box, marks: Landmarks) -> Bend:
    """Return stretching coordinates around the highest landmark of every datum, and the box that holds its mass."""
    n, d = box.centre.shape
    best = marks.log_p.argmax(0)[None, :, None].expand(1, n, d)
    found = peaks(log_joint, marks.z.gather(0, best), box.root.diagonal(dim1=-2, dim2=-1))
    centre, root = found.z[0], found.root[0]
    eye = torch.eye(d, dtype=centre.dtype, device=centre.device).expand_as(root)
    bent = Bend(centre, root, Box(torch.zeros_like(centre), eye, -centre.new_ones(n, d), centre.new_ones(n, d)), marks)
    low, high = _ends(log_joint, bent)
    return replace(bent, box=replace(bent.box, low=low, high=high))


def _ends(log_joint: LogJoint, bent: Bend) -> tuple[Tensor, Tensor]:
    """Return where f has fallen by FALL nats for the first time on each axis, from the peak outwards, both (N, d).

    What lies beyond is left out on purpose: there, many millions of widths away, rounding may make mountains of nothing.
    """
    n, d = bent.centre.shape
    u = torch.arange(1, LOOK + 1, dtype=bent.centre.dtype, device=bent.centre.device) * LOOK_STEP
    ends = []
    for way in (-1.0, 1.0):
        for j in range(d):
            s = torch.zeros(LOOK, n, d, dtype=u.dtype, device=u.device)
            s[..., j] = way * u[:, None]
            f = bent.density(log_joint, s)
            fallen = f < f.cummax(0).values - FALL
            first = torch.where(fallen.any(0), fallen.long().argmax(0), LOOK - 1)
            ends.append(way * u[first])
    return torch.stack(ends[:d], -1), torch.stack(ends[d:], -1)
