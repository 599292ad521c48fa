r"""The exact posterior by quadrature on a grid, for up to three latent dimensions.

    log p(x_n) = log sum_g h_n p(x_n, z_ng),   weights W_ng = p(x_n, z_ng) / sum_g p(x_n, z_ng)

1. A coarse grid that all data share finds where each posterior lies; a likelihood that factorises needs one matrix product.
2. A local box per datum, whitened by the moments found so far (z = m + L t, t on a lattice) and as wide as the posterior
   above exp(-30) of its peak, is moved and rescaled until it cuts nothing off.
3. The evidence on the final box is computed on three lattices: one, the same shifted, and a shifted one 1.4 times finer, whose
   value counts. Shifts turn the phase of the aliasing error, so that two lattices cannot agree by chance alone. Data whose
   values differ by more than the tolerance are refined again, up to `max_points`.

For a smooth integrand that vanishes at the border the equidistant rule converges exponentially; kinks (relu) make it
algebraic. A datum whose refinement error, border mass or a probe point speaks against the grid is `uncertified`, with the
reason. Everything runs in the log joint's dtype (float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt
from torch import Tensor

from elbowroom.inference.posterior import Evidence, Posterior, Reference, Status, in_chains
from elbowroom.inference.target import LogJoint

MAX_DIM = 3
DEPTH = 30.0  # log density below the peak at which a box may end
COARSE = {1: 2001, 2: 161, 3: 41}
COARSE_PER_DATUM = {1: 401, 2: 49, 3: 19}  # where the coarse grid costs one program evaluation per datum
LOCAL = {1: 41, 2: 19, 3: 13}
FINAL = {1: 65, 2: 27, 3: 19}
MAX_POINTS = {1: 20_001, 2: 601, 3: 97}
BLOCK = 2**22  # points x data held at once
NO_SHIFT = (0.0, 0.0, 0.0)
BORDER_MASS = 1e-6
PROBES = 8
MAX_TURNS = 10


@dataclass
class _Box:
    """Boxes z = centre + root t, t in [low, high], one per datum."""

    centre: Tensor  # (N, d)
    root: Tensor  # (N, d, d)
    low: Tensor  # (N, d)
    high: Tensor  # (N, d)

    def rows(self, index: Tensor) -> _Box:
        return _Box(self.centre[index], self.root[index], self.low[index], self.high[index])


@dataclass
class _Quadrature:
    """What one lattice says about every datum."""

    z: Tensor  # (G, N, d)
    log_weight: Tensor  # (G, N), normalised
    log_evidence: Tensor  # (N,)
    border_mass: Tensor  # (N,)
    peak: Tensor  # (N,)
    step: Tensor  # (N, d), in t

    def moments(self) -> tuple[Tensor, Tensor]:
        w = self.log_weight.exp()
        mean = torch.einsum("gn,gnd->nd", w, self.z)
        centred = self.z - mean
        return mean, torch.einsum("gn,gnd,gne->nde", w, centred, centred)


def _lattice(n_points: int, dim: int, like: Tensor, shift: Sequence[float] = NO_SHIFT) -> Tensor:
    """Unit-cube lattice (n_points^d, d) of cell centres, moved by `shift` cells along each axis."""
    index = torch.arange(n_points, dtype=like.dtype, device=like.device) + 0.5
    return torch.cartesian_prod(*[(index + s) / n_points for s in shift[:dim]]).reshape(-1, dim)


def _border(n_points: int, dim: int, device: torch.device) -> Tensor:
    """Mask (n_points^d,) of the outermost layer of a lattice."""
    axis = torch.arange(n_points, device=device)
    index = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    return ((index == 0) | (index == n_points - 1)).any(-1)


def _quadrature(log_joint: LogJoint, box: _Box, n_points: int, shift: Sequence[float] = NO_SHIFT) -> _Quadrature:
    dim = box.centre.shape[1]
    unit = _lattice(n_points, dim, box.centre, shift)
    width = box.high - box.low
    t = box.low + unit[:, None] * width
    z = box.centre + torch.einsum("nde,gne->gnd", box.root, t)
    log_p = log_joint(z)
    log_p = torch.where(log_p.isnan(), torch.full_like(log_p, -torch.inf), log_p)
    volume = (width / n_points).log().sum(-1) + box.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    total = torch.logsumexp(log_p, 0)
    log_weight = log_p - total
    border = torch.logsumexp(log_weight[_border(n_points, dim, z.device)], 0).exp()
    return _Quadrature(z, log_weight, total + volume, border, log_p.max(0).values, width / n_points)


def _whitened(quadrature: _Quadrature, n_points: int) -> tuple[_Box, Tensor]:
    """Centre and scale a new box by the moments of a quadrature, wide enough for everything above exp(-DEPTH) of the peak.

    Returns:
        The box, and (N,) True where the old box cut that region off, so that the new one may still be too small.
    """
    mean, covariance = quadrature.moments()
    eye = torch.eye(mean.shape[1], dtype=mean.dtype, device=mean.device)
    scale = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300)
    root = torch.linalg.cholesky(covariance + 1e-9 * scale.unsqueeze(-1) * eye)
    t = torch.linalg.solve_triangular(root, (quadrature.z - mean).movedim(0, -1), upper=False).movedim(-1, 0)
    inside = (quadrature.log_weight > quadrature.log_weight.max(0).values - DEPTH).unsqueeze(-1)
    low = torch.where(inside, t, torch.inf).amin(0)
    high = torch.where(inside, t, -torch.inf).amax(0)
    # one cell beyond the last point above the threshold; half the width where the old box ended before the region did
    dim = mean.shape[1]
    index = torch.cartesian_prod(*[torch.arange(n_points, device=mean.device)] * dim).reshape(-1, 1, dim)
    cut_low = (inside & (index == 0)).any(0)
    cut_high = (inside & (index == n_points - 1)).any(0)
    cell = (quadrature.z.amax(0) - quadrature.z.amin(0)) / (n_points - 1)
    pad = (torch.linalg.inv(root).abs() @ cell.unsqueeze(-1)).squeeze(-1)
    half = (high - low) / 2
    low = (low - torch.where(cut_low, half, pad)).clamp_max(-4.0)
    high = (high + torch.where(cut_high, half, pad)).clamp_min(4.0)
    return _Box(mean, root, low, high), (cut_low | cut_high).any(-1)


class Grid(Reference):
    """The exact posterior by a whitened local grid per datum, d <= 3.

    Args:
        tolerance: largest change of log p(x) under refinement, in nats, at which a datum counts as exact.
        max_points: largest number of points per axis; default 20,001 / 601 / 97 for d = 1 / 2 / 3.
    """

    name: ClassVar[str] = "grid"

    def __init__(self, *, tolerance: Annotated[float, Gt(0)] = 1e-4, max_points: Annotated[int, Gt(8)] | None = None) -> None:
        self.tolerance = tolerance
        self.max_points = max_points

    def refusal(self, log_joint: LogJoint) -> str | None:
        """More than three latent dimensions are too many for a grid; without a continuous latent there is none."""
        if log_joint.dim > MAX_DIM:
            return f"grid needs at most {MAX_DIM} latent dimensions, this model has {log_joint.dim}"
        if log_joint.dim == 0:
            return "grid needs a continuous latent, this model has none"
        return None

    def __call__(self, log_joint: LogJoint, *, keep: int, seed: int) -> Posterior:
        """Return quadrature moments, evidence, and draws (from the weights, jittered within cells, for plots and ArviZ)."""
        with torch.no_grad():
            box = self._locate(log_joint, seed)
            n, d = log_joint.n_obs, log_joint.dim
            device = box.centre.device
            limit = self.max_points or MAX_POINTS[d]
            mean, covariance = torch.empty_like(box.centre), torch.empty_like(box.root)
            evidence, error, border, peak = (torch.full((n,), torch.nan, dtype=mean.dtype, device=device) for _ in range(4))
            draws = torch.empty(keep, n, d, dtype=mean.dtype, device=device)
            generator = torch.Generator(device=device).manual_seed(seed)

            todo, size = torch.arange(n, device=device), FINAL[d]
            while len(todo):
                finer = min(int(1.4 * size) + 1, max(limit, size + 1))
                for rows in todo.split(max(1, BLOCK // finer**d)):
                    part = log_joint if len(rows) == n else log_joint.subset(rows)
                    local = box if len(rows) == n else box.rows(rows)
                    if part is None:  # the arguments cannot be taken apart: evaluate all, keep some
                        part, local, keep_rows = log_joint, box, rows
                    else:
                        keep_rows = torch.arange(len(rows), device=device)
                    first = _quadrature(part, local, size)
                    moved = _quadrature(part, local, size, shift=(0.5, 0.27, 0.13))
                    second = _quadrature(part, local, finer, shift=(0.23, 0.41, 0.09))
                    m, c = second.moments()
                    mean[rows], covariance[rows] = m[keep_rows], c[keep_rows]
                    evidence[rows] = second.log_evidence[keep_rows]
                    change = [(second.log_evidence - other.log_evidence).abs() for other in (first, moved)]
                    error[rows] = torch.maximum(*change)[keep_rows]
                    border[rows] = second.border_mass[keep_rows]
                    peak[rows] = second.peak[keep_rows]
                    draws[:, rows] = _draw(second, local, keep, generator)[:, keep_rows]
                todo = todo[(error[todo] > self.tolerance) | error[todo].isnan()]
                size = int(1.7 * size)
                if size >= limit:
                    break
            beaten = self._probe(log_joint, mean, covariance, seed) - peak
            status, reason = self._judge(error, border, beaten)
            return Posterior(
                method=self.name,
                draws=in_chains(draws),
                sites={name: in_chains(value) for name, value in log_joint.constrain(draws).items()},
                status=status,
                reason=reason,
                mean=mean,
                covariance=covariance,
                evidence=Evidence("exact", "grid", evidence, error + border),
                stats={"refinement_error": error, "border_mass": border},
                sample_stats={"lp": in_chains(log_joint(draws))},
            )

    def _locate(self, log_joint: LogJoint, seed: int) -> _Box:
        """Find each posterior on a shared coarse grid, then whiten until nothing is cut off."""
        n, d = log_joint.n_obs, log_joint.dim
        some = torch.cat([log_joint.sample_prior(2 + 4000 // n, seed), log_joint.sample_guide(2 + 1000 // n, seed)[0]]).flatten(
            0, 1
        )
        low, high = some.amin(0), some.amax(0)
        margin = 0.2 * (high - low) + 1e-6
        low, high = low - margin, high + margin
        log_joint.shared(low[None])  # settles whether one coarse grid can be shared cheaply
        size = (COARSE if log_joint.shares else COARSE_PER_DATUM)[d]
        for _ in range(6):
            unit = _lattice(size, d, low)
            z = low + unit * (high - low)
            log_p = log_joint.shared(z)
            log_p = torch.where(log_p.isnan(), torch.full_like(log_p, -torch.inf), log_p)
            weight = torch.softmax(log_p, 0)
            outside = weight[_border(size, d, z.device)].sum(0)
            if bool((outside < 1e-4).all()):
                break
            middle, half = (low + high) / 2, (high - low) / 2
            low, high = middle - 1.6 * half, middle + 1.6 * half
        cell = (high - low) / size
        mean = torch.einsum("gn,gd->nd", weight, z)
        second = torch.einsum("gn,gd,ge->nde", weight, z, z) - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        eye = torch.eye(d, dtype=z.dtype, device=z.device)
        root = torch.linalg.cholesky(
            second + (cell.square() / 4 + 1e-9 * second.diagonal(dim1=-2, dim2=-1)).unsqueeze(-1) * eye
        )
        # as wide as the region above the threshold on the coarse grid, and one coarse cell more
        reach = torch.linalg.inv(root).abs()
        inside = log_p > log_p.max(0).values - DEPTH
        spread = torch.stack([torch.where(inside, (z[:, j, None] - mean[:, j]).abs(), 0.0).amax(0) for j in range(d)], -1)
        half = ((reach @ (spread + cell).unsqueeze(-1)).squeeze(-1)).clamp(6.0, 60.0)
        box = _Box(mean, root, -half, half)
        for turn in range(MAX_TURNS):
            parts, cut = [], False
            for rows in torch.arange(n, device=z.device).split(max(1, BLOCK // LOCAL[d] ** d)):
                part = log_joint if len(rows) == n else log_joint.subset(rows)
                quadrature = _quadrature(part or log_joint, box.rows(rows) if part else box, LOCAL[d])
                new, still_cut = _whitened(quadrature, LOCAL[d])
                parts.append(new if part else new.rows(rows))
                cut |= bool(still_cut.any())
            box = _Box(*(torch.cat([getattr(p, f) for p in parts]) for f in ("centre", "root", "low", "high")))
            if turn > 0 and not cut:
                break
        return box

    @staticmethod
    def _probe(log_joint: LogJoint, mean: Tensor, covariance: Tensor, seed: int) -> Tensor:
        """Return the highest log joint met by climbing from guide and prior draws, (N,): a peak that the grid must not miss."""
        z = torch.cat([log_joint.sample_guide(PROBES, seed + 1)[0], log_joint.sample_prior(PROBES, seed + 1)])
        best, gradient = log_joint.grad(z)
        whiten = torch.linalg.inv(torch.linalg.cholesky(covariance))
        step = torch.full_like(best, 0.5)
        for _ in range(10):
            move = torch.einsum("nde,sne->snd", covariance, gradient)
            size = torch.einsum("nde,sne->snd", whiten, move).norm(dim=-1)
            trial = z + move * (step / (size / 4).clamp_min(1)).unsqueeze(-1)
            value, new_gradient = log_joint.grad(trial)
            better = value > best
            z = torch.where(better.unsqueeze(-1), trial, z)
            gradient = torch.where(better.unsqueeze(-1), new_gradient, gradient)
            best = torch.where(better, value, best)
            step = torch.where(better, step * 1.3, step * 0.3)
        return best.amax(0)

    def _judge(self, error: Tensor, border: Tensor, beaten: Tensor) -> tuple[list[Status], list[str]]:
        status: list[Status] = []
        reason: list[str] = []
        for e, b, p in zip(error.tolist(), border.tolist(), beaten.tolist(), strict=True):
            if not e <= self.tolerance:
                sentence = f"log p(x) still changes by {e:.2g} nats under refinement (tolerance {self.tolerance:g})"
            elif not b <= BORDER_MASS:
                sentence = f"a share {b:.2g} of the mass lies at the grid's border"
            elif p > 0.5:
                sentence = f"a point outside the grid's peak is {p:.2g} nats higher: the grid missed it"
            else:
                status.append("exact")
                reason.append(f"grid: log p(x) changes by {e:.1g} nats under a shifted, finer grid")
                continue
            status.append("uncertified")
            reason.append(f"grid: {sentence}")
        return status, reason


def _draw(quadrature: _Quadrature, box: _Box, keep: int, generator: torch.Generator) -> Tensor:
    """Draw grid points by their weights and jitter them within their cells, (keep, N, d)."""
    weight = quadrature.log_weight.exp().T
    cumulative = weight.cumsum(1)
    n = len(weight)
    u = torch.rand(n, keep, dtype=weight.dtype, device=weight.device, generator=generator) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, u).clamp_max(weight.shape[1] - 1)
    d = quadrature.z.shape[-1]
    points = quadrature.z.permute(1, 0, 2).gather(1, chosen.unsqueeze(-1).expand(-1, -1, d))
    shape = (n, keep, d)
    jitter = torch.rand(shape, dtype=weight.dtype, device=weight.device, generator=generator) - 0.5
    moved = torch.einsum("nde,nke->nkd", box.root, jitter * quadrature.step.unsqueeze(1))
    return (points + moved).transpose(0, 1)
