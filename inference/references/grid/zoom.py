"""Quadrature around narrow peaks in a broad posterior: lattices inside lattices, joined by smooth windows.

    f = f (1 - F_1) + f (F_1 - F_2) + ... + f F_K

F_k is 1 around every peak and falls smoothly to 0 at a radius that shrinks from the scale of the posterior (k = 1) to that of
the peak (k = K), by the same factor at each level and along each axis of the peak. Each term is smooth at the scale of its own
lattice: the broad one never meets the peak, and the finest one holds nothing else. Where the windows of several peaks overlap
they share the term by smooth weights. All sums together are one `Quadrature`, whose points have weights of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elbowroom.inference.references.grid.landmarks import Landmarks
from elbowroom.inference.references.grid.lattice import (
    DEPTH,
    NO_SHIFT,
    Box,
    Density,
    Quadrature,
    chosen,
    lattice,
    quadrature,
    whitened,
)
from elbowroom.inference.references.grid.peaks import Peaks, peaks, surprising
from elbowroom.inference.search.modes import floor_nan
from elbowroom.inference.target.log_joint import LogJoint

SHARP = 4.5  # steepness of a window: it falls like a normal of sd 1 / (sqrt(2) SHARP) radii
EDGE = 0.5 * math.erfc(SHARP)  # what is left of it at the centre and at two radii, where it is cut to exactly 1 and 0
CORE = 7.0  # radius of the last window, in widths of the peak
SHRINK = {1: 2.0, 2: 2.0, 3: 1.6}  # of radii from one level to the next
POINTS = {1: 48, 2: 40, 3: 30}  # per axis of an inner lattice
LEAST_RADIUS, CELLS = 3.0, 6.4  # of the first window: in posterior scales, and in cells of the broad lattice
NARROW = 0.3  # of the posterior scale; a wider peak needs no lattice of its own
TURNS = 10
STARTS = 8  # points to climb from: those that rise most above the lattice around them
EXTENT = 15.0  # widths of a normal that a box holds along each axis
LIGHT = 14.0  # nats below the evidence at which the mass of a peak matters no more
MOST_LEVELS = 40
FACTORS = (1.0, 1.5)  # on the points per axis, one after the other


@dataclass
class Windows:
    """Roots of the windows of every peak and level: z = centre + root u, radius 1 in u; (K, M, N, d, d)."""

    centre: Tensor
    root: Tensor
    valid: Tensor

    def heights(self, level: int, z: Tensor) -> Tensor:
        """Return the window of each peak at a level, at the points z (G, N, d): (M, G, N), in [0, 1]."""
        if level == len(self.root):
            return z.new_zeros(len(self.centre), *z.shape[:-1])
        out = []
        for centre, root, valid in zip(self.centre, self.root[level], self.valid, strict=True):
            u = torch.linalg.solve(root, (z - centre).movedim(0, -1)).movedim(-1, 0)
            height = 0.5 * torch.erfc(SHARP * (u.norm(dim=-1) - 1))
            out.append(torch.where(valid, ((height - EDGE) / (1 - 2 * EDGE)).clamp(0, 1), 0.0))
        return torch.stack(out)


def windows(box: Box, found: Peaks, step: Tensor) -> Windows | None:
    """Return the windows for peaks in boxes whose lattice has the spacing `step` (N, d); None if no peak is narrow."""
    eye = torch.eye(box.root.shape[-1], dtype=box.root.dtype, device=box.root.device)
    inverse = torch.linalg.solve_triangular(box.root, eye, upper=False)
    relative = inverse @ found.root
    value, vector = torch.linalg.eigh(relative @ relative.mT)
    width = value.clamp_min(1e-300).sqrt()  # of the peaks, in posterior scales, (M, N, d)
    valid = found.valid & (width.amin(-1) < NARROW)
    if not bool(valid.any()):
        return None
    first = torch.maximum(step.amax(-1) * CELLS, step.new_tensor(LEAST_RADIUS)).unsqueeze(-1)
    last = torch.minimum(CORE * width, first)
    ratio = torch.where(valid.unsqueeze(-1), first / last, 1.0)
    levels = 1 + math.ceil(math.log(float(ratio.max())) / math.log(SHRINK[len(eye)]))
    if not 1 < levels <= MOST_LEVELS:
        return None
    radius = [first * ratio ** (-k / (levels - 1)) for k in range(levels)]
    return Windows(found.z, torch.stack([(box.root @ vector) * r.unsqueeze(-2) for r in radius]), valid)


def settle_around(density: Density, found: Peaks, box: Box, size: int) -> Box:
    """Whiten by the moments of what lies outside the peaks."""
    rest = found.outside(density)
    for turn in range(TURNS):
        box, cut = whitened(quadrature(rest, box, size))
        if turn > 1 and not bool(cut.any()):
            break
    return box


@dataclass
class Zoomed(Quadrature):
    """The sums over all lattices together; `roots` are the roots of their cells, and `member` says whose a point is, (G,)."""

    roots: Tensor
    member: Tensor

    def draw(self, keep: int, generator: torch.Generator) -> Tensor:
        """Draw points by their weights and jitter them within their cells, (keep, N, d)."""
        index = chosen(self.log_weight, keep, generator)
        points = self.z.gather(0, index.unsqueeze(-1).expand(-1, -1, self.z.shape[-1])).transpose(0, 1)
        jitter = torch.rand(points.shape, dtype=points.dtype, device=points.device, generator=generator) - 0.5
        root = self.roots[self.member[index.T], torch.arange(points.shape[0], device=points.device)[:, None]]
        return (points + (root @ jitter.unsqueeze(-1)).squeeze(-1)).transpose(0, 1)


def zoomed(density: Density, box: Box, around: Windows, size: int, inner: int, shift: Sequence[float]) -> Zoomed:
    """Sum over the broad lattice of `size` points per axis and inner ones of `inner` points, all shifted alike."""
    n, dim = box.centre.shape
    broad = quadrature(density, box, size, shift)
    volume = broad.step.log().sum(-1) + box.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    share = 1 - _union(around.heights(0, broad.z))
    z, log_p, terms = [broad.z], [broad.log_p], [broad.log_p + share.log() + volume]
    roots, member = [box.root * broad.step.unsqueeze(-2)], [torch.zeros(len(broad.z), dtype=torch.long, device=broad.z.device)]
    u = 4 * lattice(inner, dim, box.centre, shift) - 2
    u = u[u.norm(dim=-1) < 2]
    for level in range(len(around.root)):
        for peak in range(len(around.centre)):
            root = around.root[level, peak]
            points = around.centre[peak] + torch.einsum("nde,ge->gnd", root, u)
            mine = around.heights(level, points)
            share = (_union(mine) - _union(around.heights(level + 1, points))).clamp_min(0)
            share = share * mine[peak] / mine.sum(0).clamp_min(1e-300)
            value = density(points)
            volume = dim * math.log(4 / inner) + torch.linalg.slogdet(root).logabsdet
            z.append(points)
            log_p.append(value)
            terms.append(torch.where(share > 0, value + share.log() + volume, -torch.inf))
            member.append(torch.full((len(u),), len(roots), dtype=torch.long, device=u.device))
            roots.append(root * 4 / inner)
    weight = torch.cat(terms)
    total = torch.logsumexp(weight, 0)
    log_weight = torch.where(total.isfinite(), weight - total, torch.full_like(weight, -math.log(len(weight))))
    part = (broad.log_evidence - total).exp()
    mass, beyond = broad.border_mass * part, broad.beyond * part
    whole = box, torch.cat(z), torch.cat(log_p), log_weight, total, mass, beyond, broad.step, shift, size
    return Zoomed(*whole, torch.stack(roots), torch.cat(member))


def _union(heights: Tensor) -> Tensor:
    """Return 1 - prod (1 - w) over the peaks, (G, N)."""
    return 1 - (1 - heights).prod(0)


@dataclass
class Focus:
    """Peaks with lattices of their own: the box of the rest, the windows, and the landmarks with these peaks among them."""

    box: Box
    windows: Windows
    marks: Landmarks
    size: int

    @property
    def factors(self) -> tuple[float, ...]:
        """Factors on the points per axis, one after the other."""
        return FACTORS

    def sums(self, log_joint: LogJoint, factor: float, shift: Sequence[float] = NO_SHIFT) -> Zoomed:
        """Return the sums over all lattices, with `factor` times as many points per axis."""
        inner = POINTS[log_joint.dim]
        return zoomed(log_joint, self.box, self.windows, int(factor * self.size), int(factor * inner), shift)

    @property
    def applies(self) -> Tensor:
        """The data with a narrow peak, (N,)."""
        return self.windows.valid.any(0)

    def resolves(self, z: Tensor) -> Tensor:
        """Return which of the points z (S, N, d) lie in a window, where inner lattices see them, (S, N)."""
        return (self.windows.heights(0, z) > 0.5).any(0)


def focus(log_joint: LogJoint, box: Box, marks: Landmarks, size: int) -> Focus | None:
    """Find narrow peaks among landmarks and pool, and windows around them; None where there are none."""
    first = quadrature(log_joint, box, size)
    known = torch.cat([marks.z, marks.pool[0]]), torch.cat([marks.log_p, marks.pool[1]])
    starts = surprising(first, *known, within=DEPTH, count=STARTS)
    extent = torch.einsum("nde,ne->nd", box.root.abs(), box.high - box.low) / EXTENT
    found = peaks(log_joint, torch.cat([starts, first.z.gather(0, _top(first))]), extent)
    relative = found.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)  # log volume, against that of the box
    relative = relative - box.root.diagonal(dim1=-2, dim2=-1).log().sum(-1) - ((box.high - box.low) / EXTENT).log().sum(-1)
    matters = found.valid & (found.log_mass > first.log_evidence.nan_to_num(-torch.inf, torch.inf, -torch.inf) - LIGHT)
    broadest = torch.where(matters, relative, -torch.inf).amax(0)
    against = torch.where(broadest > -log_joint.dim * math.log(4), broadest, 0.0)
    narrow = found.chosen(matters & (relative < against + math.log(NARROW)))
    if not bool(narrow.valid.any()):
        return None
    rest = settle_around(lambda z: floor_nan(log_joint(z)), narrow, box, size)
    around = windows(rest, narrow, (rest.high - rest.low) / size)
    if around is None:
        return None
    z, log_p = torch.cat([marks.z, narrow.z]), torch.cat([marks.log_p, narrow.log_p])
    return Focus(rest, around, replace(marks, z=z, log_p=log_p), size)


def _top(found: Quadrature) -> Tensor:
    """Return the index of the highest point of a lattice, to gather its z, (1, N, d)."""
    return found.log_p.argmax(0)[None, :, None].expand(1, -1, found.z.shape[-1])
