"""The exact posterior of data: closed forms, or trapezoid sums over a fixed box, with their error and their modes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from elbowroom.inference.target.log_joint import LogJoint

F64 = torch.float64
CUT = {False: 40.0, True: 50.0}  # nats below the peak at which a density has ended: later with tails to be carried
ROUNDING = 1e-11
MAJOR = 0.05  # the mass from which on a mode counts
K_MAX = 4
CHUNK = 2**15  # points x data evaluated at once

Density = Callable[[Tensor], Tensor]  # z (S, N, d) -> (S, N)


@dataclass(frozen=True)
class Truth:
    """The exact posterior of N data, in unconstrained coordinates.

    Attributes:
        mean: (N, d).
        covariance: (N, d, d).
        evidence: log p(x_n), (N,), nats.
        error: (N,), numerical error of the evidence in nats, of the mean in posterior standard deviations and of the variances
            relative to themselves: what changes on every other lattice point, and what the border holds of the variances.
        unimodal: (N,) True where one local maximum alone has a basin of more than 5 % of the mass.
        masses: (N, K), mass of every mode, largest first unless the modes have names (signs); rows sum to 1.
        mode_of: z (S, N, d) -> (S, N), the mode to which a point belongs; -1 for NaN.
    """

    mean: Tensor
    covariance: Tensor
    evidence: Tensor
    error: Tensor
    unimodal: Tensor
    masses: Tensor
    mode_of: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Problem(Truth):
    """A `LogJoint` and the truth about it; `log_density` is log p(x, z) by this module's formula, z (S, N, d) -> (S, N)."""

    name: str
    kind: str
    log_joint: LogJoint
    log_density: Density


def mode_shares(problem: Problem, draws: Tensor) -> Tensor:
    """Return the share of the draws (chain, draw, N, d) in every mode, (N, K), to be compared with `problem.masses`."""
    label = problem.mode_of(draws.flatten(0, 1))
    return torch.stack([(label == k).double().mean(0) for k in range(problem.masses.shape[1])], -1)


# -- the truth by quadrature ---------------------------------------------------------------------------------------------------


def _lattice(points: int, d: int) -> Tensor:
    axis = torch.linspace(0, 1, points, dtype=F64)
    return torch.cartesian_prod(*[axis] * d).reshape(-1, 1, d)


def _rows(density: Density, z: Tensor) -> Tensor:
    """Evaluate few points at a time, which stay in the caches."""
    return torch.cat([density(part) for part in z.split(max(1, CHUNK // z.shape[1]))])


def quadrature(
    log_density: Density,
    box: tuple[Tensor, Tensor],
    points: int,
    *,
    sinh: bool = False,
    height: Density | None = None,
    given: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Truth:
    """Integrate exp(log_density) over an equidistant lattice, per datum.

    The box is first narrowed to where the density is within 40 nats of its peak (50 with `sinh`). An equidistant sum of a
    smooth function that has vanished at the border converges exponentially, so that the change from every other point to all
    of them overstates the error of all of them; ten times what the border holds is added, for the mass beyond.

    Args:
        log_density: unnormalised, z (S, N, d) -> (S, N).
        box: lowest and highest coordinates, (N, d) each, in t if `sinh`.
        points: per axis, odd.
        sinh: integrate over t with z = sinh t in every coordinate, which carries power-law tails.
        height: the density whose maxima are the modes; default `log_density`. With `given` it is a profile.
        given: for a normal z_d | z_1..z_{d-1}: its mean and variance, (S, N) each; the integral runs over the others.
    """
    low, high = box
    n, d = low.shape
    back = torch.sinh if sinh else lambda t: t

    def jacobian(t: Tensor) -> Tensor:
        return (t.abs() - math.log(2) + torch.log1p((-2 * t.abs()).exp())).sum(-1) if sinh else t.new_zeros(())

    scan = {1: 1001, 2: 65}[d]
    peak = low[:, 0]
    for _ in range(2):
        t = low + _lattice(scan, d) * (high - low)
        value = _rows(log_density, back(t)) + jacobian(t)
        peak = value.amax(0)
        near, margin = (value > peak - CUT[sinh])[..., None], 2 * (high - low) / (scan - 1)
        low, high = t.where(near, math.inf).amin(0) - margin, t.where(near, -math.inf).amax(0) + margin

    unit, even = _lattice(points, d), (torch.arange(points) % 2 == 0).to(F64)
    keep = torch.stack([torch.ones(points**d, dtype=F64), torch.cartesian_prod(*[even] * d).reshape(-1, d).prod(-1)])
    total, centre = torch.zeros(2, n, dtype=F64), back(low + (high - low) / 2)
    k = d + (given is not None)
    first, second = torch.zeros(2, n, k, dtype=F64), torch.zeros(2, n, k, k, dtype=F64)
    border = torch.zeros(n, k, dtype=F64)  # what the outermost points hold of the second moments
    for rows in torch.arange(points**d).split(max(1, CHUNK // n)):
        t = low + unit[rows] * (high - low)
        z = back(t)
        w = keep[:, rows, None] * (log_density(z) + jacobian(t) - peak).exp()
        u = z - centre
        if given is not None:
            m, v = given(z)
            u = torch.cat([u, m[..., None]], -1)
            second[:, :, d, d] += torch.einsum("bgn,gn->bn", w, v)
        total += w.sum(1)
        edge = ((unit[rows] - 0.5).abs() > 0.5 - 1 / (scan - 1)).any(-1)[:, 0]
        border += torch.einsum("gn,gnj->nj", w[0, edge], u[edge].square())
        first += torch.einsum("bgn,gni->bni", w, u)
        for i in range(k):
            second[:, :, i] += torch.einsum("bgn,gnj->bnj", w, u[..., i, None] * u)
    mean = first / total[..., None]
    covariance = second / total[..., None, None] - mean[..., None] * mean[..., None, :]
    cell = ((high - low) / (points - 1)).log().sum(-1)
    evidence = peak + total.log() + cell + torch.tensor([[0.0], [d * math.log(2)]], dtype=F64)
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    change = (evidence[0] - evidence[1]).abs() + ((mean[0] - mean[1]).abs() / variance[0].sqrt()).amax(-1)
    change = change + ((variance[0] - variance[1]).abs() / variance[0]).amax(-1) + ROUNDING * (1 + evidence[0].abs())
    change = change + 10 * (border / total[0, :, None] / variance[0]).amax(-1)
    mean[..., :d] += centre
    basins = _basins(log_density, height or log_density, low, high, sinh, jacobian)
    return Truth(mean[0], covariance[0], evidence[0], change, *basins)


def _basins(
    log_density: Density, height: Density, low: Tensor, high: Tensor, sinh: bool, jacobian: Density
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Split the box into basins of steepest ascent: which data have one mode, the modes' masses, and where a point belongs."""
    n, d = low.shape
    cells = {1: 1601, 2: 81}[d]
    t = low + _lattice(cells, d) * (high - low)
    z = t.sinh() if sinh else t
    value = _rows(log_density, z)
    climb = (value if height is log_density else _rows(height, z)).T
    mass = torch.softmax(value + jacobian(t), 0).T  # (N, G)
    grid = torch.nn.functional.pad(climb.reshape(n, *[cells] * d), [1, 1] * d, value=-math.inf)
    moves = torch.cartesian_prod(*[torch.arange(3)] * d).reshape(-1, d)  # in this order equal heights lead to the first
    around = []
    for move in moves.tolist():
        part = grid
        for axis, start in enumerate(move, 1):
            part = part.narrow(axis, start, cells)
        around.append(part.reshape(n, -1))
    stride = torch.tensor([cells ** (d - 1 - i) for i in range(d)])
    root = torch.arange(cells**d) + ((moves - 1) @ stride)[torch.stack(around).argmax(0)]
    while not torch.equal(step := root.gather(1, root), root):
        root = step
    top = torch.zeros_like(mass).scatter_add(1, root, mass).topk(K_MAX, 1)
    # a narrow ridge across the lattice has false maxima: the true one is where a climb from there ends
    ends = _climb(lambda u: height(u.sinh() if sinh else u), t.expand(-1, n, d)[top.indices.T, torch.arange(n)])
    same = ((ends[:, None] - ends).abs() < 1e-3 * (high - low)).all(-1)  # (K, K, N)
    mode = same.double().argmax(1).T.where(top.values > 1e-3, 0)  # the first one with this end
    masses, order = torch.zeros(n, K_MAX, dtype=F64).scatter_add(1, mode, top.values).sort(1, descending=True)
    mode = order.argsort(1).gather(1, mode)
    k = max(1, int((masses > 1e-3).sum(1).max()))
    rest = mode[:, :1].expand_as(root)  # basins too small to be counted go with the first
    label = rest.scatter(1, top.indices, mode).gather(1, root)
    masses = torch.zeros(n, k, dtype=F64).scatter_add(1, label, mass)

    def mode_of(points: Tensor) -> Tensor:
        some = points[..., :d].asinh() if sinh else points[..., :d]
        index = ((some - low) / (high - low) * (cells - 1)).round().nan_to_num(0).clamp(0, cells - 1).long()
        found = label.gather(1, (index * stride).sum(-1).T).T
        return found.where(points.isfinite().all(-1), -1)

    return (masses > MAJOR).sum(1) == 1, masses, mode_of


def _climb(height: Density, t: Tensor) -> Tensor:
    """Newton's method uphill from t (S, N, d), with curvatures made positive and steps that only ever rise."""
    size = torch.ones_like(t[..., :1])
    for _ in range(60):
        with torch.enable_grad():
            u = t.detach().requires_grad_()
            value = height(u)
            (slope,) = torch.autograd.grad(value.sum(), u, create_graph=True)
            rows = [torch.autograd.grad(slope[..., i].sum(), u, retain_graph=True)[0] for i in range(t.shape[-1])]
        curvature, axes = torch.linalg.eigh(torch.stack(rows, -2))
        step = axes @ ((axes.mT @ slope.detach()[..., None]) / curvature.abs().clamp_min(1e-9)[..., None])
        new = t + size * step[..., 0]
        better = (height(new) > value.detach())[..., None]
        t, size = new.where(better, t), torch.where(better, (2 * size).clamp_max(1), size / 4)
    return t


def _one_mode(points: Tensor) -> Tensor:
    return torch.zeros(points.shape[:-1], dtype=torch.long).where(points.isfinite().all(-1), -1)


def closed_form(mean: Tensor, covariance: Tensor, evidence: Tensor) -> Truth:
    """Return a truth with one mode and no error but rounding."""
    n = len(mean)
    one = torch.ones(n, 1, dtype=F64)
    return Truth(mean, covariance, evidence, 1e-9 * (1 + evidence.abs()), one[:, 0] > 0, one, _one_mode)
