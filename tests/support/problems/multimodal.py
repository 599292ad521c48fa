"""Posteriors of several modes, of equal and of unequal mass."""

from __future__ import annotations

from dataclasses import replace

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from elbowroom.inference.target.log_joint import LogJoint
from support.problems.densities import as_problem, box, by_sign, normal, randn, source
from support.problems.truth import F64, Problem, quadrature

IDLE = 6  # idle coordinates of `square_idle`


def square(idle: int, n: int, seed: int) -> Problem:
    """y = z_1^2 + noise, z_1 ~ N(0, 2), the guide on the positive root only; `idle` further coordinates keep their prior."""
    g = source(seed, 3)
    y = (2 * randn(g, n)).square() + 0.3 * randn(g, n)
    d = 1 + idle
    name = {0: "square", IDLE: "square_idle"}.get(idle, f"square_d{d}")
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
        return normal(z[..., 0], 0.0, 2.0) + normal(y, z[..., 0].square(), 0.3)

    truth = quadrature(first, box(n, (-16, 16)), 12_801)
    covariance = torch.eye(d, dtype=F64).repeat(n, 1, 1)
    covariance[:, 0, 0] = truth.covariance[:, 0, 0]
    half, zero = torch.full((n, 2), 0.5, dtype=F64), torch.zeros(n, d, dtype=F64)
    truth = replace(truth, mean=zero, covariance=covariance, masses=half, mode_of=by_sign)

    def log_density(z: Tensor) -> Tensor:
        return first(z) + normal(z[..., 1:], 0.0, 1.0).sum(-1)

    return as_problem(name, LogJoint(model, guide, y), log_density, truth)


def bimodal_unequal(d: int, n: int, seed: int) -> Problem:
    """z_1 ~ w N(2, .6) + (1 - w) N(-2, .6), y ~ N(z_1^2 / 2 + z_2, .7): the likelihood cannot tell the sign of z_1.

    The masses of the two modes are w and 1 - w up to what the components overlap; w is 50, 80, 93 or 97 %, on either side, and
    the guide sits on the larger mode. With d = 1 there is no z_2; with d > 2 the rest keep their prior.
    """
    g = source(seed, 9)
    w = torch.tensor([0.5, 0.2, 0.93, 0.03, 0.8, 0.07, 0.97], dtype=F64).repeat(n // 7 + 1)[:n]
    side = torch.where(torch.rand(n, generator=g, dtype=F64) < w, 1.0, -1.0)
    first = 2 * side + 0.6 * randn(g, n)
    y = first.square() / 2 + 0.7 * randn(g, n) + (randn(g, n) if d > 1 else 0.0)
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
        both = torch.stack([w.log() + normal(z[..., 0], 2.0, 0.6), (1 - w).log() + normal(z[..., 0], -2.0, 0.6)])
        return torch.logsumexp(both, 0) + normal(z[..., 1:2], 0.0, 1.0).sum(-1) + normal(y, predicted(z), 0.7)

    def log_density(z: Tensor) -> Tensor:
        return plane(z[..., :2]) + normal(z[..., 2:], 0.0, 1.0).sum(-1)

    sides = ((-9.0, 9.0), (-9.0, 9.0))[: min(d, 2)]
    truth = quadrature(plane, box(n, *sides), {1: 1601, 2: 129}[len(sides)])
    if d > 2:
        covariance = torch.eye(d, dtype=F64).repeat(n, 1, 1)
        covariance[:, :2, :2] = truth.covariance
        truth = replace(truth, mean=torch.nn.functional.pad(truth.mean, (0, d - 2)), covariance=covariance)
    return as_problem(f"bimodal_unequal_d{d}", LogJoint(model, guide, y, w), log_density, truth)
