"""Posteriors of one mode that are far from normal: bent, funnel-shaped, heavy-tailed, of two sites, of a mixture."""

from __future__ import annotations

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from elbowroom.inference.target.log_joint import LogJoint
from support.problems.densities import amortized, as_problem, box, draw_student, normal, randn, source, student
from support.problems.truth import F64, Problem, closed_form, quadrature


def hierarchy(n: int, seed: int) -> Problem:
    """Two sites: top ~ N(0, 1), low ~ N(2 tanh top, 0.5), a count ~ Poisson(exp low)."""

    def simulate(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        top = randn(g, n)
        low = 2 * torch.tanh(top) + 0.5 * randn(g, n)
        return torch.stack([top, low], -1), torch.poisson(low.exp(), g)[:, None]

    encode = amortized(simulate, seed, torch.log1p, 0.7)
    k = simulate(n, source(seed, 7))[1][:, 0]

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
        prior = normal(top, 0.0, 1.0) + normal(low, 2 * torch.tanh(top), 0.5)
        return prior + k * low - low.exp() - torch.lgamma(k + 1)

    truth = quadrature(log_density, box(n, (-9, 9), (-8, 8)), 129)
    return as_problem("hierarchy", LogJoint(model, guide, k), log_density, truth)


def discrete(n: int, seed: int) -> Problem:
    """A kind c in {0, 1, 2} beside a continuous z ~ N(m_c, s_c), y ~ N(z, 0.8): a mixture of three normals in closed form."""
    g = source(seed, 8)
    pi = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    m, s = torch.tensor([0.0, 1.0, -0.5], dtype=F64), torch.tensor([0.6, 1.0, 1.8], dtype=F64)
    c = torch.multinomial(pi, n, replacement=True, generator=g)
    y = m[c] + s[c] * randn(g, n) + 0.8 * randn(g, n)

    def model(y):
        with pyro.plate("rows", len(y)):
            c = pyro.sample("c", dist.Categorical(pi))
            z = pyro.sample("z", dist.Normal(m[c], s[c]))
            pyro.sample("y", dist.Normal(z, 0.8), obs=y)

    def guide(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(0.6 * y, 0.65))

    def log_density(z: Tensor) -> Tensor:
        return torch.logsumexp(pi.log() + normal(z, m, s), -1) + normal(y, z[..., 0], 0.8)

    each = pi.log() + normal(y[:, None], m, (s.square() + 0.64).sqrt())
    w, v = torch.softmax(each, -1), 1 / (1 / s.square() + 1 / 0.64)
    centre = v * (m / s.square() + y[:, None] / 0.64)
    mean = (w * centre).sum(-1)
    variance = (w * (v + (centre - mean[:, None]).square())).sum(-1)
    exact = closed_form(mean[:, None], variance[:, None, None], torch.logsumexp(each, -1))
    found = quadrature(log_density, box(n, (-20, 20)), 1201)
    truth = replace(exact, unimodal=found.unimodal, masses=found.masses, mode_of=found.mode_of)
    return as_problem("discrete", LogJoint(model, guide, y), log_density, truth)


def banana(n: int, seed: int) -> Problem:
    """z_1 ~ N(0, 1), z_2 ~ N(0, 3); x_1 = z_1 + noise, x_2 = z_2 + z_1^2 + noise: a thin, bent ridge.

    Given z_1 the rest is normal, so that the truth is an integral over z_1 alone.
    """

    def simulate(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        z = randn(g, n, 2) * torch.tensor([1.0, 3.0], dtype=F64)
        return z, torch.stack([z[:, 0], z[:, 1] + z[:, 0].square()], -1) + randn(g, n, 2) * torch.tensor([1.0, 0.3])

    x = simulate(n, source(seed, 10))[1]
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
        prior = normal(z[..., 0], 0.0, 1.0) + normal(z[..., 1], 0.0, 3.0)
        return prior + normal(x[:, 0], z[..., 0], 1.0) + normal(x[:, 1], z[..., 1] + z[..., 0].square(), 0.3)

    def marginal(z: Tensor) -> Tensor:
        first = normal(z[..., 0], 0.0, 1.0) + normal(x[:, 0], z[..., 0], 1.0)
        return first + normal(x[:, 1], z[..., 0].square(), math.sqrt(9.09))

    def given(z: Tensor) -> tuple[Tensor, Tensor]:
        mean = (x[:, 1] - z[..., 0].square()) * 9 / 9.09
        return mean, torch.full_like(mean, 9 * 0.09 / 9.09)

    truth = quadrature(marginal, box(n, (-9, 9)), 801, given=given)  # of constant width: the profile is the marginal
    return as_problem("banana", LogJoint(model, guide, x), log_density, truth)


def funnel(n: int, seed: int) -> Problem:
    """v ~ N(0, 1.5), w|v ~ N(0, exp(v / 2)), y ~ N(w, 1). Given v, w is normal: the truth is an integral over v alone."""

    def simulate(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        v = 1.5 * randn(g, n)
        w = (v / 2).exp() * randn(g, n)
        return torch.stack([v, w], -1), (w + randn(g, n))[:, None]

    def features(y: Tensor) -> Tensor:
        return torch.cat([y.clamp(-8, 8), torch.log1p(y.square()), torch.tanh(y)], -1)

    encode = amortized(simulate, seed, features)
    y = simulate(n, source(seed, 11))[1][:, 0]

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
        return normal(v, 0.0, 1.5) + normal(w, 0.0, (v / 2).exp()) + normal(y, w, 1.0)

    def marginal(z: Tensor) -> Tensor:
        return normal(z[..., 0], 0.0, 1.5) + normal(y, 0.0, (z[..., 0].exp() + 1).sqrt())

    def given(z: Tensor) -> tuple[Tensor, Tensor]:
        share = torch.sigmoid(z[..., 0])  # e^v / (e^v + 1)
        return share * y, share

    def profile(z: Tensor) -> Tensor:
        return log_density(torch.cat([z, given(z)[0][..., None]], -1))

    truth = quadrature(marginal, box(n, (-16, 16)), 1201, given=given, height=profile)
    return as_problem("funnel", LogJoint(model, guide, y), log_density, truth)


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
        z = draw_student(g, df, n, d)
        return z, predicted(z) + randn(g, n, d)

    encode = amortized(simulate, seed)
    y = simulate(n, source(seed, 12))[1]

    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.StudentT(float(df), torch.zeros(d, dtype=F64), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(predicted(z), 1.0).to_event(1), obs=y)

    def guide(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(*encode(y)).to_event(1))

    def log_density(z: Tensor) -> Tensor:
        return student(z, df).sum(-1) + normal(y, predicted(z), 1.0).sum(-1)

    truth = quadrature(log_density, box(n, *[(-20.0, 20.0)] * d), {1: 2001, 2: 161}[d], sinh=True)
    return as_problem(f"heavy_tails_d{d}", LogJoint(model, guide, y), log_density, truth)
