r"""Posteriors whose answer is known, over which every method is tested. All values in nats and unconstrained coordinates.

A builder draws n data from its own model (another seed is another set of posteriors) and returns the `LogJoint`, with a
guide that is amortized and imperfect, next to the truth. The truth is a closed form, or trapezoid sums over a fixed box of a
density that is written out here a second time, by hand, and never asks `LogJoint`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from elbowroom.inference.target.log_joint import LogJoint
from support.cases.vaes import linear_vae, set_guide
from support.problems.curved import banana, discrete, funnel, heavy_tails, hierarchy
from support.problems.densities import amortized, as_problem, box, normal, randn, source
from support.problems.multimodal import bimodal_unequal, square
from support.problems.truth import F64, Problem, closed_form, quadrature


def linear_gaussian(d: int, n: int, seed: int) -> Problem:
    """A linear VAE with strongly correlated loadings; the guide is the best diagonal normal."""
    with torch.random.fork_rng():
        vae, x, oracle = linear_vae(d, 2 * d + 2, n=n, seed=seed)
    set_guide(vae, oracle)
    mean, covariance = oracle.posterior(x)

    def log_density(z: Tensor) -> Tensor:
        return normal(z, 0.0, 1.0).sum(-1) + normal(x, z @ oracle.W.T + oracle.mu, oracle.psi.sqrt()).sum(-1)

    truth = closed_form(mean, covariance.expand(n, d, d), oracle.log_evidence(x))
    return as_problem(f"linear_gaussian_d{d}", LogJoint(vae.model, vae.guide, x), log_density, truth)


def correlated(n: int, seed: int) -> Problem:
    """y = c (z1 - z2) + noise with c^2 = r / (1 - r): the posterior is a normal of correlation r exactly."""
    g = source(seed, 1)
    r = torch.tensor([0.5, 0.9, 0.95, 0.99], dtype=F64).repeat(n // 4 + 1)[:n]
    c = (r / (1 - r)).sqrt()
    z = randn(g, n, 2)
    y = c * (z[:, 0] - z[:, 1]) + randn(g, n)

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
        return normal(z, 0.0, 1.0).sum(-1) + normal(y, c * (z[..., 0] - z[..., 1]), 1.0)

    loc = y * c / (1 + 2 * c.square())
    covariance = (torch.eye(2, dtype=F64) + r[:, None, None] * torch.eye(2, dtype=F64).flip(0)) / (1 + r[:, None, None])
    evidence = normal(y, 0.0, (1 + 2 * c.square()).sqrt())
    truth = closed_form(torch.stack([loc, -loc], -1), covariance, evidence)
    return as_problem("correlated", LogJoint(model, guide, y, c), log_density, truth)


def mlp(likelihood: str, n: int, seed: int) -> Problem:
    """A two-dimensional latent and a random tanh decoder with 16 hidden units and 12 outputs."""
    g = source(seed, 2)
    W1, b1, W2, b2 = 0.6 * randn(g, 2, 16), 0.5 * randn(g, 16), randn(g, 16, 12) / 4, 0.3 * randn(g, 12)
    gain = {"bernoulli": 3.0, "gaussian": 1.5, "poisson": 0.8}[likelihood]

    def decode(z: Tensor) -> Tensor:
        return gain * (torch.tanh(z @ W1 + b1) @ W2 + b2)

    def observation(out: Tensor) -> Any:
        if likelihood == "bernoulli":
            return dist.Bernoulli(logits=out)
        return dist.Normal(out, 0.7) if likelihood == "gaussian" else dist.Poisson((1 + out).exp())

    def simulate(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        z = randn(g, n, 2)
        out = decode(z)
        if likelihood == "bernoulli":
            return z, (torch.rand(out.shape, generator=g, dtype=F64) < torch.sigmoid(out)).double()
        return z, out + 0.7 * randn(g, n, 12) if likelihood == "gaussian" else torch.poisson((1 + out).exp(), g)

    encode = amortized(simulate, seed, torch.log1p if likelihood == "poisson" else lambda x: x)
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
            log_likelihood = normal(x, out, 0.7)
        else:
            log_likelihood = x * (1 + out) - (1 + out).exp() - torch.lgamma(x + 1)
        return normal(z, 0.0, 1.0).sum(-1) + log_likelihood.sum(-1)

    truth = quadrature(log_density, box(n, (-9, 9), (-9, 9)), 121)
    return as_problem(f"mlp_{likelihood}", LogJoint(model, guide, x), log_density, truth)


def positive(n: int, seed: int) -> Problem:
    """A gamma-Poisson rate, conjugate: z = log rate, E z = digamma(a) - log b, Var z = trigamma(a)."""
    g = source(seed, 4)
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
    return as_problem("positive", LogJoint(model, guide, k), log_density, truth)


def positive_scale(n: int, seed: int) -> Problem:
    """Four observations of a normal of unknown scale, scale ~ Gamma(2, 1): positive and not conjugate."""

    def simulate(n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        scale = -torch.rand(2, n, generator=g, dtype=F64).log().sum(0)
        return scale.log()[:, None], scale[:, None] * randn(g, n, 4)

    encode = amortized(simulate, seed, lambda y: (y.square().mean(-1, keepdim=True) + 1e-4).log())
    y = simulate(n, source(seed, 5))[1]

    def model(y):
        with pyro.plate("rows", len(y)):
            scale = pyro.sample("scale", dist.Gamma(torch.tensor(2.0, dtype=F64), 1.0))
            pyro.sample("y", dist.Normal(torch.zeros(4, dtype=F64), scale[..., None]).to_event(1), obs=y)

    def guide(y):
        loc, scale = encode(y)
        with pyro.plate("rows", len(y)):
            pyro.sample("scale", dist.LogNormal(loc[..., 0], scale[..., 0]))

    def log_density(z: Tensor) -> Tensor:
        return 2 * z[..., 0] - z[..., 0].exp() + normal(y, 0.0, z.exp()).sum(-1)

    truth = quadrature(log_density, box(n, (-25, 6)), 1201)
    return as_problem("positive_scale", LogJoint(model, guide, y), log_density, truth)


def simplex(d: int, n: int, seed: int) -> Problem:
    """Dirichlet-multinomial shares of d + 1 categories in stick-breaking coordinates.

    The sticks b_j = p_j / (p_j + p_{j+1} + ...) of a Dirichlet(a) are independent Beta(a_j, a_{j+1} + ...), and
    z_j = logit b_j + log(d + 1 - j), so that E z_j = digamma(a_j) - digamma(sum of the rest) + log(d + 1 - j).
    """
    g, total = source(seed, 6), 12
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
    return as_problem(f"simplex_d{d}", LogJoint(model, guide, x), log_density, closed_form(mean, covariance, evidence))


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
LARGE: dict[str, Callable[[int, int], Problem]] = {
    **{f"linear_gaussian_d{d}": partial(linear_gaussian, d) for d in (10, 50)},
    **{f"square_d{d}": partial(square, d - 1) for d in (10, 20, 50)},
    **{f"bimodal_unequal_d{d}": partial(bimodal_unequal, d) for d in (10, 20, 50)},
}
"""More latents, for what takes minutes: two modes that differ in sign alone (as switched labels do), and two unequal ones."""
KNOWN = {**PROBLEMS, **LARGE}
MULTIMODAL = ["square", "square_idle", "bimodal_unequal_d1", "bimodal_unequal_d2", "bimodal_unequal_d7"]
UNIMODAL = [name for name in PROBLEMS if name not in MULTIMODAL]
NO_SD_ERROR = ["heavy_tails_d1"]  # no fourth moment: errors of an sd cannot be judged in standard errors
