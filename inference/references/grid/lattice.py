"""Lattices in whitened boxes, one box per datum, and sums over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elbowroom.inference.mcmc.normals import moments
from elbowroom.inference.search.modes import floor_nan

DEPTH = 26.0  # log density below the peak at which a box may end
BAND = 0.05  # of the width: what lies so close to the border bounds the mass beyond it
NO_SHIFT = (0.0, 0.0, 0.0)
Density = Callable[[Tensor], Tensor]  # log p(x_n, z_sn), (S, N), at z (S, N, d)


@dataclass
class Box:
    """Boxes z = centre + root t, t in [low, high], one per datum: (N, d), (N, d, d), (N, d), (N, d)."""

    centre: Tensor
    root: Tensor
    low: Tensor
    high: Tensor

    def rows(self, index: Tensor) -> Box:
        """Return the boxes of some of the data."""
        return Box(self.centre[index], self.root[index], self.low[index], self.high[index])

    def coordinates(self, z: Tensor) -> Tensor:
        """Map z (S, N, d) to the boxes' own coordinates t."""
        return torch.linalg.solve_triangular(self.root, (z - self.centre).movedim(0, -1), upper=False).movedim(-1, 0)

    def holds(self, z: Tensor, inset: float) -> Tensor:
        """Return which of the points z (S, N, d) lie inside, at least `inset` from the border, (S, N)."""
        t = self.coordinates(z)
        return ((t >= self.low + inset) & (t <= self.high - inset)).all(-1)

    def including(self, z: Tensor, wanted: Tensor, margin: float) -> Box:
        """Grow the boxes by `margin` around each point z (S, N, d) that is wanted (S, N) and not yet margin / 4 inside."""
        t = self.coordinates(z)
        mask = wanted.unsqueeze(-1)
        low = torch.where(mask, t - margin, torch.inf).amin(0)
        high = torch.where(mask, t + margin, -torch.inf).amax(0)
        inside = (torch.where(mask, t, 0.0) > self.low + margin / 4) & (torch.where(mask, t, 0.0) < self.high - margin / 4)
        settled = (inside | ~mask).all(0)
        return Box(
            self.centre,
            self.root,
            torch.where(settled, self.low, torch.minimum(self.low, low)),
            torch.where(settled, self.high, torch.maximum(self.high, high)),
        )

    def clear_of_the_band(self, z: Tensor, wanted: Tensor) -> Box:
        """Grow the boxes until the points z (S, N, d) that are wanted (S, N) lie two bands inside (see `BAND`)."""
        t, mask = self.coordinates(z), wanted.unsqueeze(-1)
        inset = 2 * BAND * (self.high - self.low)
        low = torch.where(mask, t - inset, torch.inf).amin(0)
        high = torch.where(mask, t + inset, -torch.inf).amax(0)
        return Box(self.centre, self.root, torch.minimum(self.low, low), torch.maximum(self.high, high))


@dataclass
class Quadrature:
    """The sums over one lattice of n_points^d for every datum.

    Attributes:
        box: the boxes that the lattice fills.
        z: the points, (G, N, d).
        log_p: the log joint there, (G, N).
        log_weight: normalised log weights, (G, N).
        log_evidence: log of the sum, (N,).
        border_mass: share of the weights in the outermost layer, (N,).
        beyond: bound on the share beyond the border, (N,), if density falls at least as 1 / distance^2 in the outermost layers.
        step: spacing in t, (N, d).
        shift: shift of the lattice, in cells.
        n_points: points per axis.
    """

    box: Box
    z: Tensor
    log_p: Tensor
    log_weight: Tensor
    log_evidence: Tensor
    border_mass: Tensor
    beyond: Tensor
    step: Tensor
    shift: Sequence[float]
    n_points: int

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return the mean (N, d) and covariance (N, d, d)."""
        return moments(self.z, self.log_weight.exp())

    def nearby(self, z: Tensor) -> Tensor:
        """Return the highest log joint on the corners of the cell around each point z (S, N, d), (S, N)."""
        d = z.shape[-1]
        position = (self.box.coordinates(z) - self.box.low) / self.step - 0.5 - z.new_tensor(self.shift[:d])
        base = position.nan_to_num(0.0, 0.0, 0.0).clamp(-1, self.n_points).floor().long()
        best = torch.full(z.shape[:2], -torch.inf, dtype=z.dtype, device=z.device)
        for corner in torch.cartesian_prod(*[torch.arange(2, device=z.device)] * d).reshape(-1, d):
            index = (base + corner).clamp(0, self.n_points - 1)
            flat = index[..., 0]
            for j in range(1, d):
                flat = flat * self.n_points + index[..., j]
            best = torch.maximum(best, self.log_p.gather(0, flat))
        return best

    def draw(self, keep: int, generator: torch.Generator) -> Tensor:
        """Draw points by their weights and jitter them within their cells, (keep, N, d)."""
        index = chosen(self.log_weight, keep, generator)
        points = self.z.gather(0, index.unsqueeze(-1).expand(-1, -1, self.z.shape[-1])).transpose(0, 1)
        jitter = torch.rand(points.shape, dtype=points.dtype, device=points.device, generator=generator) - 0.5
        moved = torch.einsum("nde,nke->nkd", self.box.root, jitter * self.step.unsqueeze(1))
        return (points + moved).transpose(0, 1)


def lattice(n_points: int, dim: int, like: Tensor, shift: Sequence[float] = NO_SHIFT) -> Tensor:
    """Return the cell centres of a unit-cube lattice, (n_points^d, d), moved by `shift` cells along each axis."""
    index = torch.arange(n_points, dtype=like.dtype, device=like.device) + 0.5
    return torch.cartesian_prod(*[(index + s) / n_points for s in shift[:dim]]).reshape(-1, dim)


def border(n_points: int, dim: int, device: torch.device, layers: int = 1) -> Tensor:
    """Return a mask of the outermost layers of a lattice, (n_points^d,)."""
    index = torch.cartesian_prod(*[torch.arange(n_points, device=device)] * dim).reshape(-1, dim)
    return ((index < layers) | (index >= n_points - layers)).any(-1)


def root_of(covariance: Tensor) -> Tensor:
    """Return a Cholesky factor that always exists: of the matrix, else of its diagonal, with a smallest positive scale."""
    tiny = torch.finfo(covariance.dtype).tiny ** 0.5
    variance = covariance.diagonal(dim1=-2, dim2=-1).nan_to_num(1.0, 1.0, 1.0).clamp_min(tiny)
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    root, info = torch.linalg.cholesky_ex(covariance.nan_to_num(0.0, 0.0, 0.0) + 1e-9 * torch.diag_embed(variance))
    fallback = variance.sqrt().unsqueeze(-1) * eye
    good = (info == 0) & root.isfinite().all(-1).all(-1) & (root.diagonal(dim1=-2, dim2=-1) > 0).all(-1)
    return torch.where(good[:, None, None], root, fallback)


def quadrature(log_joint: Density, box: Box, n_points: int, shift: Sequence[float] = NO_SHIFT) -> Quadrature:
    """Sum the joint over one lattice in every datum's box."""
    dim = box.centre.shape[1]
    unit = lattice(n_points, dim, box.centre, shift)
    width = box.high - box.low
    z = box.centre + torch.einsum("nde,gne->gnd", box.root, box.low + unit[:, None] * width)
    log_p = floor_nan(log_joint(z))
    volume = (width / n_points).log().sum(-1) + box.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    total = torch.logsumexp(log_p, 0)
    # a datum without any mass gets equal weights; its evidence is -inf
    log_weight = torch.where(total.isfinite(), log_p - total, torch.full_like(log_p, -math.log(len(log_p))))
    mass = log_weight[border(n_points, dim, z.device)].logsumexp(0).exp()
    layers = max(1, int(BAND * n_points))  # a single layer may lie between two teeth
    beyond = log_weight[border(n_points, dim, z.device, layers)].logsumexp(0).exp() * n_points / (2 * layers)
    return Quadrature(box, z, log_p, log_weight, total + volume, mass, beyond, width / n_points, shift, n_points)


def whitened(found: Quadrature) -> tuple[Box, Tensor]:
    """Centre and scale new boxes by the moments of a quadrature, wide enough for everything above exp(-DEPTH) of the peak.

    Returns:
        The boxes, and (N,) True where the old box cut that region off, so that the new one may still be too small.
    """
    mean, covariance = found.moments()
    dim, n_points = mean.shape[1], found.n_points
    box = Box(mean, root_of(covariance), mean, mean)
    t = box.coordinates(found.z)
    inside = (found.log_weight > found.log_weight.max(0).values - DEPTH).unsqueeze(-1)
    low = torch.where(inside, t, torch.inf).amin(0)
    high = torch.where(inside, t, -torch.inf).amax(0)
    # pad by one cell beyond the last point above the threshold, or by half the width where the old box cut the region off
    index = torch.cartesian_prod(*[torch.arange(n_points, device=mean.device)] * dim).reshape(-1, 1, dim)
    cut_low = (inside & (index == 0)).any(0)
    cut_high = (inside & (index == n_points - 1)).any(0)
    cell = (found.z.amax(0) - found.z.amin(0)) / (n_points - 1)
    inverse = torch.linalg.solve_triangular(box.root, torch.eye(dim, dtype=mean.dtype, device=mean.device), upper=False)
    pad = (inverse.abs() @ cell.unsqueeze(-1)).squeeze(-1)
    half = (high - low) / 2
    low = (low - torch.where(cut_low, half, pad)).clamp_max(-4.0)
    high = (high + torch.where(cut_high, half, pad)).clamp_min(4.0)
    return Box(mean, box.root, low, high), (cut_low | cut_high).any(-1)


def chosen(log_weight: Tensor, keep: int, generator: torch.Generator) -> Tensor:
    """Choose points by their weights (G, N): indices (keep, N)."""
    cumulative = log_weight.exp().T.cumsum(1)
    u = torch.rand(len(cumulative), keep, dtype=cumulative.dtype, device=cumulative.device, generator=generator)
    return torch.searchsorted(cumulative, u * cumulative[:, -1:]).clamp_max(cumulative.shape[1] - 1).T
