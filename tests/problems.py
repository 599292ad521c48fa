r"""Posteriors whose answer is known, over which every method is tested. All values in nats and unconstrained coordinates.

A builder draws n data from its own model (another seed is another set of posteriors) and returns the seam's `LogJoint`, with a
guide that is amortized and imperfect, next to the truth. The truth is a closed form, or trapezoid sums over a fixed box of a
density that is written out here a second time, by hand, and never asks `LogJoint`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from conftest import linear_vae, set_guide
from torch import Tensor

from elbowroom.inference.target import LogJoint

F64 = torch.float64
LOG_2PI = math.log(2 * math.pi)
CUT = 40.0  # nats below the peak at which a density is taken to have ended
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
            relative to themselves: their sum, on every other lattice point instead of all.
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

    The box is first narrowed to where the density is within 40 nats of its peak. An equidistant sum of a smooth function that
    has vanished at the border converges exponentially, so that the change from every other point to all of them overstates the
    error of all of them.

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

    scan = {1: 1001, 2: 49}[d]
    peak = low[:, 0]
    for _ in range(3):
        t = low + _lattice(scan, d) * (high - low)
        value = _rows(log_density, back(t)) + jacobian(t)
        peak = value.amax(0)
        near, step = (value > peak - CUT)[..., None], (high - low) / (scan - 1)
        low, high = t.where(near, math.inf).amin(0) - step, t.where(near, -math.inf).amax(0) + step

    unit, even = _lattice(points, d), (torch.arange(points) % 2 == 0).to(F64)
    keep = torch.stack([torch.ones(points**d, dtype=F64), torch.cartesian_prod(*[even] * d).reshape(-1, d).prod(-1)])
    total, centre = torch.zeros(2, n, dtype=F64), back(low + (high - low) / 2)
    k = d + (given is not None)
    first, second = torch.zeros(2, n, k, dtype=F64), torch.zeros(2, n, k, k, dtype=F64)
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


def _by_sign(points: Tensor) -> Tensor:
    """Mode 0 where the first coordinate is positive, 1 where it is negative."""
    return (points[..., 0] < 0).long().where(points.isfinite().all(-1), -1)


def closed_form(mean: Tensor, covariance: Tensor, evidence: Tensor) -> Truth:
    """Return a truth with one mode and no error but rounding."""
    n = len(mean)
    one = torch.ones(n, 1, dtype=F64)
    return Truth(mean, covariance, evidence, 1e-9 * (1 + evidence.abs()), one[:, 0] > 0, one, _one_mode)


def _problem(name: str, pair: LogJoint, log_density: Density, truth: Truth) -> Problem:
    kind = name.rsplit("_d", 1)[0] if name[-1].isdigit() else name
    return Problem(**vars(truth), name=name, kind=kind, log_joint=pair, log_density=log_density)


def _box(n: int, *sides: tuple[float, float]) -> tuple[Tensor, Tensor]:
    low, high = torch.tensor(sides, dtype=F64).T
    return low.expand(n, -1), high.expand(n, -1)


# -- densities by hand, and an encoder -----------------------------------------------------------------------------------------


def _normal(x: Tensor, loc: Tensor | float, scale: Tensor | float) -> Tensor:
    scale = torch.as_tensor(scale, dtype=F64)
    return -0.5 * ((x - loc) / scale).square() - scale.log() - 0.5 * LOG_2PI


def _student(x: Tensor, df: float, scale: float) -> Tensor:
    constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi) - math.log(scale)
    return constant - (df + 1) / 2 * torch.log1p((x / scale).square() / df)


def _random(seed: int, salt: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * seed + salt)


def _randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=F64)


def _draw_student(g: torch.Generator, df: int, *shape: int) -> Tensor:
    return _randn(g, *shape) / (_randn(g, df, *shape).square().sum(0) / df).sqrt()


Simulate = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]  # n -> z (n, d), x (n, D)


def _encoder(simulate: Simulate, seed: int, features: Callable[[Tensor], Tensor] = lambda x: x) -> Callable[..., Any]:
    """Fit x -> (loc, scale) of a diagonal normal by regression on 4,000 simulated pairs: amortized, decent, not exact."""
    g = _random(seed, 77)
    z, x = simulate(4000, g)
    z = z.clamp(-6, 6)
    f = features(x)
    centre, unit = f.mean(0), f.std(0) + 1e-3
    project, shift = _randn(g, f.shape[1], 40) / f.shape[1] ** 0.5, _randn(g, 40)

    def design(x: Tensor) -> Tensor:
        u = (features(x) - centre) / unit
        return torch.cat([torch.ones_like(u[..., :1]), u, torch.tanh(u @ project + shift)], -1)

    A = design(x)
    solve = torch.linalg.solve(A.T @ A + torch.eye(A.shape[1], dtype=F64), A.T)
    to_loc = solve @ z
    residual = z - A @ to_loc
    to_log = solve @ (residual.square() + 1e-6).log()
    spread = residual.std(0)

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        D = design(x)
        scale = (0.5 * (D @ to_log) + 0.635).exp()  # E log chi^2_1 = -1.27
        return D @ to_loc, torch.minimum(torch.maximum(scale, 0.2 * spread), 1.5 * spread)

    return encode


# -- the problems --------------------------------------------------------------------------------------------------------------


def linear_gaussian(d: int, n: int, seed: int) -> Problem:
    """A linear VAE with strongly correlated loadings; the guide is the best diagonal normal."""
    with torch.random.fork_rng():
        vae, x, oracle = linear_vae(d, 2 * d + 2, n=n, seed=seed)
    set_guide(vae, oracle)
    mean, covariance = oracle.posterior(x)

    def log_density(z: Tensor) -> Tensor:
        return _normal(z, 0.0, 1.0).sum(-1) + _normal(x, z @ oracle.W.T + oracle.mu, oracle.psi.sqrt()).sum(-1)

    truth = closed_form(mean, covariance.expand(n, d, d), oracle.log_evidence(x))
    return _problem(f"linear_gaussian_d{d}", LogJoint(vae.model, vae.guide, x), log_density, truth)


def correlated(n: int, seed: int) -> Problem:
    """y = c (z1 - z2) + noise with c^2 = r / (1 - r): the posterior is a normal of correlation r exactly."""
    g = _random(seed, 1)
    r = torch.tensor([0.5, 0.9, 0.95, 0.99], dtype=F64).repeat(n // 4 + 1)[:n]
    c = (r / (1 - r)).sqrt()
    z = _randn(g, n, 2)
    y = c * (z[:, 0] - z[:, 1]) + _randn(g, n)

    def model(y, c):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(c * (z[..., 0] - z[..., 1]), 1.0), obs=y)

    def guide(y, c):
        with pyro.plate("rows", len(y)):
            loc = 0.9 * y * c / (1 + 2 * c.square())
            scale = (1 + c.square()).rsqrt()
            normal = dist.Normal(torch.stack([loc, -loc], -1), torch.stack([scale, scale], -1))
            pyro.sample("z", normal.to_event(1))

    def log_density(z: Tensor) -> Tensor:
        return _normal(z, 0.0, 1.0).sum(-1) + _normal(y, c * (z[..., 0] - z[..., 1]), 1.0)

    loc = y * c / (1 + 2 * c.square())
    covariance = (torch.eye(2, dtype=F64) + r[:, None, None] * torch.eye(2, dtype=F64).flip(0)) / (1 + r[:, None, None])
    evidence = _normal(y, 0.0, (1 + 2 * c.square()).sqrt())
    truth = closed_form(torch.stack([loc, -loc], -1), covariance, evidence)
    return _problem("correlated", LogJoint(model, guide, y, c), log_density, truth)


def mlp(likelihood: str, n: int, seed: int) -> Problem:
    """A two-dimensional latent and a random tanh decoder with 16 hidden units and 12 outputs."""
    g = _random(seed, 2)
    W1, b1, W2, b2 = 0.6 * _randn(g, 2, 16), 0.5 * _randn(g, 16), _randn(g, 16, 12) / 4, 0.3 * _randn(g, 12)
    gain = {"bernoulli": 3.0, "gaussian": 1.5, "poisson": 0.8}[likelihood]

    def decode(z: Tensor) -> Tensor:
        return gain * (torch.tanh(z @ W1 + b1) @ W2 + b2)

    def observation(out: Tensor) -> Any:
        if likelihood == "bernoulli":
            return dist.Bernoulli(logits=out)
        return dist.Normal(out, 0.7) if likelihood == "gaussian" else dist.Poisson((1 + out).exp())

    def simulate(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        z = _randn(g, n, 2)
        out = decode(z)
        if likelihood == "bernoulli":
            return z, (torch.rand(out.shape, generator=g, dtype=F64) < torch.sigmoid(out)).double()
        return z, out + 0.7 * _randn(g, n, 12) if likelihood == "gaussian" else torch.poisson((1 + out).exp(), g)

    encode = _encoder(simulate, seed, (lambda x: torch.log1p(x)) if likelihood == "poisson" else lambda x: x)
    x = simulate(n, g)[1]

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
            pyro.sample("x", observation(decode(z)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(*encode(x)).to_event(1))

    def log_density(z: Tensor) -> Tensor:
        out = decode(z)
        if likelihood == "bernoulli":
            log_likelihood = x * out - torch.nn.functional.softplus(out)
        elif likelihood == "gaussian":
            log_likelihood = _normal(x, out, 0.7)
        else:
            log_likelihood = x * (1 + out) - (1 + out).exp() - torch.lgamma(x + 1)
        return _normal(z, 0.0, 1.0).sum(-1) + log_likelihood.sum(-1)

    truth = quadrature(log_density, _box(n, (-9, 9), (-9, 9)), 121)
    return _problem(f"mlp_{likelihood}", LogJoint(model, guide, x), log_density, truth)


def square(idle: int, n: int, seed: int) -> Problem:
    """y = z_1^2 + noise, z_1 ~ N(0, 2), the guide on the positive root only; `idle` further coordinates keep their prior."""
    g = _random(seed, 3)
    y = (2 * _randn(g, n)).square() + 0.3 * _randn(g, n)
    d = 1 + idle
    prior = torch.tensor([2.0] + [1.0] * idle, dtype=F64)

    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(d, dtype=F64), prior).to_event(1))
            pyro.sample("y", dist.Normal(z[..., 0].square(), 0.3), obs=y)

    def guide(y):
        root = y.clamp_min(0.2).sqrt()[..., None]
        rest = torch.zeros(*y.shape, idle, dtype=F64)
        with pyro.plate("rows", len(y)):
            normal = dist.Normal(torch.cat([root, rest], -1), torch.cat([0.15 / root, rest + 1], -1))
            pyro.sample("z", normal.to_event(1))

    def first(z: Tensor) -> Tensor:
        return _normal(z[..., 0], 0.0, 2.0) + _normal(y, z[..., 0].square(), 0.3)

    truth = quadrature(first, _box(n, (-16, 16)), 12_801)
    covariance = torch.eye(d, dtype=F64).repeat(n, 1, 1)
    covariance[:, 0, 0] = truth.covariance[:, 0, 0]
    half, zero = torch.full((n, 2), 0.5, dtype=F64), torch.zeros(n, d, dtype=F64)
    truth = replace(truth, mean=zero, covariance=covariance, masses=half, mode_of=_by_sign)

    def log_density(z: Tensor) -> Tensor:
        return first(z) + _normal(z[..., 1:], 0.0, 1.0).sum(-1)

    return _problem("square_idle" if idle else "square", LogJoint(model, guide, y), log_density, truth)


PROBLEMS: dict[str, Callable[[int, int], Problem]] = {
    **{f"linear_gaussian_d{d}": partial(linear_gaussian, d) for d in (1, 2, 5, 20)},
    "correlated": correlated,
    **{f"mlp_{likelihood}": partial(mlp, likelihood) for likelihood in ("bernoulli", "gaussian", "poisson")},
    "square": partial(square, 0),
    "square_idle": partial(square, 6),
}
MULTIMODAL = ["square", "square_idle"]
UNIMODAL = [name for name in PROBLEMS if name not in MULTIMODAL]
