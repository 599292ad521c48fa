r"""Posteriors whose answer is known, over which every method is tested. All values in nats and unconstrained coordinates.

A builder draws n data from its own model (another seed is another set of posteriors) and returns the `LogJoint`, with a
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

from elbowroom.inference.target.log_joint import LogJoint

F64 = torch.float64
LOG_2PI = math.log(2 * math.pi)
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


def _student(x: Tensor, df: float) -> Tensor:
    constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    return constant - (df + 1) / 2 * torch.log1p(x.square() / df)


def _random(seed: int, salt: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * seed + salt)


def _randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=F64)


def _draw_student(g: torch.Generator, df: int, *shape: int) -> Tensor:
    return _randn(g, *shape) / (_randn(g, df, *shape).square().sum(0) / df).sqrt()


Simulate = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]  # n -> z (n, d), x (n, D)


def _encoder(simulate: Simulate, seed: int, features: Density = lambda x: x, width: float = 1.0) -> Callable[..., Any]:
    """Fit x -> (loc, scale) of a diagonal normal by regression on 4,000 simulated pairs: amortized, decent, not exact.

    The scales are those of the marginals times `width`.
    """
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
        scale = width * (0.5 * (D @ to_log) + 0.635).exp()  # E log chi^2_1 = -1.27
        return D @ to_loc, torch.minimum(torch.maximum(scale, 0.1 * spread), 1.5 * spread)

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

    encode = _encoder(simulate, seed, torch.log1p if likelihood == "poisson" else lambda x: x)
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


def positive(n: int, seed: int) -> Problem:
    """A gamma-Poisson rate, conjugate: z = log rate, E z = digamma(a) - log b, Var z = trigamma(a)."""
    g = _random(seed, 4)
    rate = -0.5 * torch.rand(2, n, generator=g, dtype=F64).log().sum(0) / 0.25
    k = torch.poisson(rate, g)

    def model(k):
        with pyro.plate("rows", len(k)):
            pyro.sample("k", dist.Poisson(pyro.sample("rate", dist.Gamma(2.0, 0.5))), obs=k)

    def guide(k):
        with pyro.plate("rows", len(k)):
            pyro.sample("rate", dist.LogNormal((k + 1.5).log() - 0.4, 0.9 * (k + 2).rsqrt()))

    def log_density(z: Tensor) -> Tensor:
        u = z[..., 0]
        return 2 * math.log(0.5) + 2 * u - 0.5 * u.exp() + k * u - u.exp() - torch.lgamma(k + 1)

    a, b = k + 2, math.log(1.5)
    evidence = torch.lgamma(a) - torch.lgamma(k + 1) + 2 * math.log(0.5) - a * b
    truth = closed_form((torch.digamma(a) - b)[:, None], torch.polygamma(1, a)[:, None, None], evidence)
    return _problem("positive", LogJoint(model, guide, k), log_density, truth)


def positive_scale(n: int, seed: int) -> Problem:
    """Four observations of a normal of unknown scale, scale ~ Gamma(2, 1): positive and not conjugate."""

    def simulate(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        scale = -torch.rand(2, n, generator=g, dtype=F64).log().sum(0)
        return scale.log()[:, None], scale[:, None] * _randn(g, n, 4)

    encode = _encoder(simulate, seed, lambda y: (y.square().mean(-1, keepdim=True) + 1e-4).log())
    y = simulate(n, _random(seed, 5))[1]

    def model(y):
        with pyro.plate("rows", len(y)):
            scale = pyro.sample("scale", dist.Gamma(torch.tensor(2.0, dtype=F64), 1.0))
            pyro.sample("y", dist.Normal(torch.zeros(4, dtype=F64), scale[..., None]).to_event(1), obs=y)

    def guide(y):
        loc, scale = encode(y)
        with pyro.plate("rows", len(y)):
            pyro.sample("scale", dist.LogNormal(loc[..., 0], scale[..., 0]))

    def log_density(z: Tensor) -> Tensor:
        return 2 * z[..., 0] - z[..., 0].exp() + _normal(y, 0.0, z.exp()).sum(-1)

    truth = quadrature(log_density, _box(n, (-25, 6)), 1201)
    return _problem("positive_scale", LogJoint(model, guide, y), log_density, truth)


def simplex(d: int, n: int, seed: int) -> Problem:
    """Dirichlet-multinomial shares of d + 1 categories in stick-breaking coordinates.

    The sticks b_j = p_j / (p_j + p_{j+1} + ...) of a Dirichlet(a) are independent Beta(a_j, a_{j+1} + ...), and
    z_j = logit b_j + log(d + 1 - j), so that E z_j = digamma(a_j) - digamma(sum of the rest) + log(d + 1 - j).
    """
    g, total = _random(seed, 6), 12
    alpha = torch.linspace(0.7, 2.0, d + 1, dtype=F64)
    share = torch._standard_gamma(alpha.expand(n, -1), generator=g)
    x = torch.zeros(n, d + 1, dtype=F64)
    x.scatter_add_(1, torch.multinomial(share, total, replacement=True, generator=g), torch.ones(n, total, dtype=F64))

    def model(x):
        with pyro.plate("rows", len(x)):
            p = pyro.sample("p", dist.Dirichlet(alpha))
            pyro.sample("x", dist.Multinomial(total, p), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("p", dist.Dirichlet(1.0 + 0.9 * x))

    offset = torch.arange(d, 0, -1, dtype=F64)
    constant = torch.lgamma(alpha.sum()) - torch.lgamma(alpha).sum() + math.lgamma(total + 1) - torch.lgamma(x + 1).sum(-1)

    def log_density(z: Tensor) -> Tensor:
        stay, go = torch.nn.functional.logsigmoid(z - offset.log()), torch.nn.functional.logsigmoid(offset.log() - z)
        left = torch.cat([torch.zeros_like(go[..., :1]), go.cumsum(-1)], -1)  # log of what the earlier sticks left
        log_p = left + torch.cat([stay, torch.zeros_like(go[..., :1])], -1)
        jacobian = (left[..., :-1] + stay + go).sum(-1)
        return constant + ((alpha + x - 1) * log_p).sum(-1) + jacobian

    a = alpha + x
    rest = a.flip(-1).cumsum(-1).flip(-1)[:, 1:]
    mean = torch.digamma(a[:, :-1]) - torch.digamma(rest) + offset.log()
    covariance = torch.diag_embed(torch.polygamma(1, a[:, :-1]) + torch.polygamma(1, rest))
    evidence = constant + torch.lgamma(a).sum(-1) - torch.lgamma(a.sum(-1))
    return _problem(f"simplex_d{d}", LogJoint(model, guide, x), log_density, closed_form(mean, covariance, evidence))


def hierarchy(n: int, seed: int) -> Problem:
    """Two sites: top ~ N(0, 1), low ~ N(2 tanh top, 0.5), a count ~ Poisson(exp low)."""

    def simulate(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        top = _randn(g, n)
        low = 2 * torch.tanh(top) + 0.5 * _randn(g, n)
        return torch.stack([top, low], -1), torch.poisson(low.exp(), g)[:, None]

    encode = _encoder(simulate, seed, torch.log1p, 0.7)
    k = simulate(n, _random(seed, 7))[1][:, 0]

    def model(k):
        with pyro.plate("rows", len(k)):
            top = pyro.sample("top", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            low = pyro.sample("low", dist.Normal(2 * torch.tanh(top), 0.5))
            pyro.sample("k", dist.Poisson(low.exp()), obs=k)

    def guide(k):
        loc, scale = encode(k[..., None])
        with pyro.plate("rows", len(k)):
            pyro.sample("top", dist.Normal(loc[..., 0], scale[..., 0]))
            pyro.sample("low", dist.Normal(loc[..., 1], scale[..., 1]))

    def log_density(z: Tensor) -> Tensor:
        top, low = z.unbind(-1)
        prior = _normal(top, 0.0, 1.0) + _normal(low, 2 * torch.tanh(top), 0.5)
        return prior + k * low - low.exp() - torch.lgamma(k + 1)

    truth = quadrature(log_density, _box(n, (-9, 9), (-8, 8)), 129)
    return _problem("hierarchy", LogJoint(model, guide, k), log_density, truth)


def discrete(n: int, seed: int) -> Problem:
    """A kind c in {0, 1, 2} beside a continuous z ~ N(m_c, s_c), y ~ N(z, 0.8): a mixture of three normals in closed form."""
    g = _random(seed, 8)
    pi = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    m, s = torch.tensor([0.0, 1.0, -0.5], dtype=F64), torch.tensor([0.6, 1.0, 1.8], dtype=F64)
    c = torch.multinomial(pi, n, replacement=True, generator=g)
    y = m[c] + s[c] * _randn(g, n) + 0.8 * _randn(g, n)

    def model(y):
        with pyro.plate("rows", len(y)):
            c = pyro.sample("c", dist.Categorical(pi))
            z = pyro.sample("z", dist.Normal(m[c], s[c]))
            pyro.sample("y", dist.Normal(z, 0.8), obs=y)

    def guide(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(0.6 * y, 0.65))

    def log_density(z: Tensor) -> Tensor:
        return torch.logsumexp(pi.log() + _normal(z, m, s), -1) + _normal(y, z[..., 0], 0.8)

    each = pi.log() + _normal(y[:, None], m, (s.square() + 0.64).sqrt())
    w, v = torch.softmax(each, -1), 1 / (1 / s.square() + 1 / 0.64)
    centre = v * (m / s.square() + y[:, None] / 0.64)
    mean = (w * centre).sum(-1)
    variance = (w * (v + (centre - mean[:, None]).square())).sum(-1)
    exact = closed_form(mean[:, None], variance[:, None, None], torch.logsumexp(each, -1))
    found = quadrature(log_density, _box(n, (-20, 20)), 1201)
    truth = replace(exact, unimodal=found.unimodal, masses=found.masses, mode_of=found.mode_of)
    return _problem("discrete", LogJoint(model, guide, y), log_density, truth)


def bimodal_unequal(d: int, n: int, seed: int) -> Problem:
    """z_1 ~ w N(2, .6) + (1 - w) N(-2, .6), y ~ N(z_1^2 / 2 + z_2, .7): the likelihood cannot tell the sign of z_1.

    The masses of the two modes are w and 1 - w up to what the components overlap; w is 50, 80, 93 or 97 %, on either side, and
    the guide sits on the larger mode. With d = 1 there is no z_2; with d > 2 the rest keep their prior.
    """
    g = _random(seed, 9)
    w = torch.tensor([0.5, 0.2, 0.93, 0.03, 0.8, 0.07, 0.97], dtype=F64).repeat(n // 7 + 1)[:n]
    side = torch.where(torch.rand(n, generator=g, dtype=F64) < w, 1.0, -1.0)
    first = 2 * side + 0.6 * _randn(g, n)
    y = first.square() / 2 + 0.7 * _randn(g, n) + (_randn(g, n) if d > 1 else 0.0)
    places = torch.zeros(2, d, dtype=F64)
    places[:, 0] = torch.tensor([2.0, -2.0])
    spread = torch.ones(d, dtype=F64)
    spread[0] = 0.6

    def predicted(z: Tensor) -> Tensor:
        return z[..., 0].square() / 2 + (z[..., 1] if d > 1 else 0.0)

    def model(y, w):
        with pyro.plate("rows", len(y)):
            parts = dist.Normal(places.expand(len(y), 2, d), spread).to_event(1)
            weights = dist.Categorical(torch.stack([w, 1 - w], -1))
            z = pyro.sample("z", dist.MixtureSameFamily(weights, parts))
            pyro.sample("y", dist.Normal(predicted(z), 0.7), obs=y)

    def guide(y, w):
        larger = torch.where(w >= 0.5, 1.0, -1.0).to(F64)
        noise = 0.49 if d == 1 else 1.49
        root = (2 * y.clamp_min(0.3)).sqrt()
        pull = root.square() / noise
        fit = (2 / 0.36 + pull * root) / (1 / 0.36 + pull)
        width = (1 / 0.36 + fit.square() / 0.49).rsqrt()
        loc, scale = [larger * fit], [width]
        if d > 1:
            loc, scale = [*loc, (y - fit.square() / 2) / 1.49], [*scale, torch.full_like(y, 0.57)]
        loc += [torch.zeros_like(y)] * (d - 2)
        scale += [torch.ones_like(y)] * (d - 2)
        with pyro.plate("rows", len(y)):
            normal = dist.Normal(torch.stack(loc, -1), torch.stack(scale, -1))
            pyro.sample("z", normal.to_event(1))

    def plane(z: Tensor) -> Tensor:
        both = torch.stack([w.log() + _normal(z[..., 0], 2.0, 0.6), (1 - w).log() + _normal(z[..., 0], -2.0, 0.6)])
        return torch.logsumexp(both, 0) + _normal(z[..., 1:2], 0.0, 1.0).sum(-1) + _normal(y, predicted(z), 0.7)

    def log_density(z: Tensor) -> Tensor:
        return plane(z[..., :2]) + _normal(z[..., 2:], 0.0, 1.0).sum(-1)

    sides = ((-9.0, 9.0), (-9.0, 9.0))[: min(d, 2)]
    truth = quadrature(plane, _box(n, *sides), {1: 1601, 2: 129}[len(sides)])
    if d > 2:
        covariance = torch.eye(d, dtype=F64).repeat(n, 1, 1)
        covariance[:, :2, :2] = truth.covariance
        truth = replace(truth, mean=torch.nn.functional.pad(truth.mean, (0, d - 2)), covariance=covariance)
    return _problem(f"bimodal_unequal_d{d}", LogJoint(model, guide, y, w), log_density, truth)


def banana(n: int, seed: int) -> Problem:
    """z_1 ~ N(0, 1), z_2 ~ N(0, 3); x_1 = z_1 + noise, x_2 = z_2 + z_1^2 + noise: a thin, bent ridge.

    Given z_1 the rest is normal, so that the truth is an integral over z_1 alone.
    """

    def simulate(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        z = _randn(g, n, 2) * torch.tensor([1.0, 3.0], dtype=F64)
        return z, torch.stack([z[:, 0], z[:, 1] + z[:, 0].square()], -1) + _randn(g, n, 2) * torch.tensor([1.0, 0.3])

    x = simulate(n, _random(seed, 10))[1]
    spread = torch.tensor([1.0, 3.0], dtype=F64)
    noise = torch.tensor([1.0, 0.3], dtype=F64)

    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), spread).to_event(1))
            bent = torch.stack([z[..., 0], z[..., 1] + z[..., 0].square()], -1)
            pyro.sample("x", dist.Normal(bent, noise).to_event(1), obs=x)

    def guide(x):  # about the best without correlation: on the ridge, and short
        middle = x[..., 0] / 2
        short = (2 + (4 * middle.square() + 1) / 0.09).rsqrt()
        with pyro.plate("rows", len(x)):
            loc = torch.stack([middle, x[..., 1] - middle.square()], -1)
            pyro.sample("z", dist.Normal(loc, torch.stack([short, 0 * short + 0.3], -1)).to_event(1))

    def log_density(z: Tensor) -> Tensor:
        prior = _normal(z[..., 0], 0.0, 1.0) + _normal(z[..., 1], 0.0, 3.0)
        return prior + _normal(x[:, 0], z[..., 0], 1.0) + _normal(x[:, 1], z[..., 1] + z[..., 0].square(), 0.3)

    def marginal(z: Tensor) -> Tensor:
        first = _normal(z[..., 0], 0.0, 1.0) + _normal(x[:, 0], z[..., 0], 1.0)
        return first + _normal(x[:, 1], z[..., 0].square(), math.sqrt(9.09))

    def given(z: Tensor) -> tuple[Tensor, Tensor]:
        mean = (x[:, 1] - z[..., 0].square()) * 9 / 9.09
        return mean, torch.full_like(mean, 9 * 0.09 / 9.09)

    truth = quadrature(marginal, _box(n, (-9, 9)), 801, given=given)  # of constant width: the profile is the marginal
    return _problem("banana", LogJoint(model, guide, x), log_density, truth)


def funnel(n: int, seed: int) -> Problem:
    """v ~ N(0, 1.5), w|v ~ N(0, exp(v / 2)), y ~ N(w, 1). Given v, w is normal: the truth is an integral over v alone."""

    def simulate(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        v = 1.5 * _randn(g, n)
        w = (v / 2).exp() * _randn(g, n)
        return torch.stack([v, w], -1), (w + _randn(g, n))[:, None]

    def features(y: Tensor) -> Tensor:
        return torch.cat([y.clamp(-8, 8), torch.log1p(y.square()), torch.tanh(y)], -1)

    encode = _encoder(simulate, seed, features)
    y = simulate(n, _random(seed, 11))[1][:, 0]

    def model(y):
        with pyro.plate("rows", len(y)):
            v = pyro.sample("v", dist.Normal(torch.zeros((), dtype=F64), 1.5))
            w = pyro.sample("w", dist.Normal(torch.zeros((), dtype=F64), (v / 2).exp()))
            pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    def guide(y):
        loc, scale = encode(y[..., None])
        with pyro.plate("rows", len(y)):
            pyro.sample("v", dist.Normal(loc[..., 0], scale[..., 0]))
            pyro.sample(
                "w", dist.Normal(y * y.square() / (3 + y.square()), (y.square() + 0.5).sqrt() / (y.square() + 2).sqrt())
            )

    def log_density(z: Tensor) -> Tensor:
        v, w = z.unbind(-1)
        return _normal(v, 0.0, 1.5) + _normal(w, 0.0, (v / 2).exp()) + _normal(y, w, 1.0)

    def marginal(z: Tensor) -> Tensor:
        return _normal(z[..., 0], 0.0, 1.5) + _normal(y, 0.0, (z[..., 0].exp() + 1).sqrt())

    def given(z: Tensor) -> tuple[Tensor, Tensor]:
        share = torch.sigmoid(z[..., 0])  # e^v / (e^v + 1)
        return share * y, share

    def profile(z: Tensor) -> Tensor:
        return log_density(torch.cat([z, given(z)[0][..., None]], -1))

    truth = quadrature(marginal, _box(n, (-16, 16)), 1201, given=given, height=profile)
    return _problem("funnel", LogJoint(model, guide, y), log_density, truth)


def heavy_tails(d: int, n: int, seed: int) -> Problem:
    """z_j ~ Student-t, y ~ N(3 tanh(a_j / 3), 1) with a_j = z_1 + .. + z_j: it levels off, and the prior's tails are left.

    d = 1 has 4 degrees of freedom: the variance exists and the fourth moment does not, so that an estimate of the sd from
    draws has no finite standard error (`NO_SD_ERROR`). d = 2 has 6, where it has one.
    """
    df = {1: 4, 2: 6}[d]
    sums = torch.ones(d, d, dtype=F64).triu()

    def predicted(z: Tensor) -> Tensor:
        return 3 * torch.tanh(z @ sums / 3)

    def simulate(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        z = _draw_student(g, df, n, d)
        return z, predicted(z) + _randn(g, n, d)

    encode = _encoder(simulate, seed)
    y = simulate(n, _random(seed, 12))[1]

    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.StudentT(float(df), torch.zeros(d, dtype=F64), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(predicted(z), 1.0).to_event(1), obs=y)

    def guide(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(*encode(y)).to_event(1))

    def log_density(z: Tensor) -> Tensor:
        return _student(z, df).sum(-1) + _normal(y, predicted(z), 1.0).sum(-1)

    truth = quadrature(log_density, _box(n, *[(-20.0, 20.0)] * d), {1: 2001, 2: 161}[d], sinh=True)
    return _problem(f"heavy_tails_d{d}", LogJoint(model, guide, y), log_density, truth)


PROBLEMS: dict[str, Callable[[int, int], Problem]] = {
    **{f"linear_gaussian_d{d}": partial(linear_gaussian, d) for d in (1, 2, 5, 20)},
    "correlated": correlated,
    **{f"mlp_{likelihood}": partial(mlp, likelihood) for likelihood in ("bernoulli", "gaussian", "poisson")},
    "positive": positive,
    "positive_scale": positive_scale,
    "simplex_d2": partial(simplex, 2),
    "simplex_d5": partial(simplex, 5),
    "hierarchy": hierarchy,
    "discrete": discrete,
    "banana": banana,
    "funnel": funnel,
    "heavy_tails_d1": partial(heavy_tails, 1),
    "heavy_tails_d2": partial(heavy_tails, 2),
    "square": partial(square, 0),
    "square_idle": partial(square, 6),
    "bimodal_unequal_d1": partial(bimodal_unequal, 1),
    "bimodal_unequal_d2": partial(bimodal_unequal, 2),
    "bimodal_unequal_d7": partial(bimodal_unequal, 7),
}
MULTIMODAL = ["square", "square_idle", "bimodal_unequal_d1", "bimodal_unequal_d2", "bimodal_unequal_d7"]
UNIMODAL = [name for name in PROBLEMS if name not in MULTIMODAL]
NO_SD_ERROR = ["heavy_tails_d1"]  # no fourth moment: errors of an sd cannot be judged in standard errors
