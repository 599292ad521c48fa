"""Programs with normal latents, most of which have a posterior in closed form."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from examples.programs.catalogue import Pair, draws, over_line, over_plane, program, trained

LOADINGS = torch.tensor([[1.0, 0.5], [-0.7, 1.0], [0.3, -0.4], [0.9, 0.2]])


def linear(x: Tensor) -> None:
    """Factor analysis: x = W z + noise."""
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ LOADINGS.T, 0.5).to_event(1), obs=x)


def linear_evidence(x: Tensor) -> Tensor:
    """log N(x; 0, W W' + s^2 I)."""
    w = LOADINGS.double()
    return dist.MultivariateNormal(torch.zeros(4).double(), w @ w.T + 0.25 * torch.eye(4).double()).log_prob(x.double())


@program("factor analysis with its exact posterior as guide", "probabilistic PCA, Tipping and Bishop 1999")
def exact() -> Pair:
    x = draws(8, 4)
    precision = torch.eye(2) + LOADINGS.T @ LOADINGS / 0.25

    def guide(x: Tensor) -> None:
        mean = x @ LOADINGS @ precision.inverse() / 0.25
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.MultivariateNormal(mean, precision_matrix=precision))

    return Pair(linear, guide, (x,), evidence=lambda: linear_evidence(x))


@program("factor analysis, mean-field guide from a linear encoder", "Pyro, tutorial VAE, with a linear decoder")
def mean_field() -> Pair:
    x, encoder = draws(8, 4), nn.Linear(4, 4)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x).chunk(2, -1)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    trained(linear, guide, (x,))
    return Pair(linear, guide, (x,), evidence=lambda: linear_evidence(x))


@program("two coordinates under two names, in a plate of dimension -2", "Pyro, tutorial Tensor shapes")
def two_sites() -> Pair:
    x = draws(6, 3)

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-2):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 0.5))
            with pyro.plate("columns", 3, dim=-1):
                pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        mean = x.mean(-1, keepdim=True)
        with pyro.plate("rows", len(x), dim=-2):
            pyro.sample("a", dist.Normal(0.4 * mean, 0.5))
            pyro.sample("b", dist.Normal(0.4 * mean, 0.5))

    def evidence() -> Tensor:
        cov = (1 + 1 + 2 + 0.25) * torch.ones(3, 3).double() + torch.eye(3).double()
        return dist.MultivariateNormal(torch.zeros(3).double(), cov).log_prob(x.double())

    return Pair(model, guide, (x,), evidence=evidence)


@program("rows with holes, obs_mask", "Pyro, tutorial on missing data")
def holes() -> Pair:
    x = draws(8, 4)
    seen = torch.rand(8, 4, generator=torch.Generator().manual_seed(1)) < 0.7

    def model(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
            with pyro.plate("columns", 4, dim=-1):
                pyro.sample("x", dist.Normal(z * LOADINGS[:, 0], 0.5), obs=x, obs_mask=seen)

    def guide(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-2):
            loc = (x * seen * LOADINGS[:, 0]).sum(-1, keepdim=True)
            pyro.sample("z", dist.Normal(loc / 1.5, 0.4))
            with pyro.plate("columns", 4, dim=-1), poutine.mask(mask=~seen):
                pyro.sample("x_unobserved", dist.Normal(torch.zeros(8, 4), 1.0))

    def seen_alone(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
            with pyro.plate("columns", 4, dim=-1), poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(z * LOADINGS[:, 0], 0.5), obs=x)

    def evidence() -> Tensor:
        def log_p(z: Tensor) -> Tensor:
            each = dist.Normal(z[:, None, None] * LOADINGS[:, 0].double(), 0.5).log_prob(x.double())
            return dist.Normal(0.0, 1.0).log_prob(z)[:, None] + (each * seen).sum(-1)

        return over_line(log_p)

    of_z = poutine.block(guide, hide=["x_unobserved"])
    return Pair(model, guide, (x, seen), evidence=evidence, plain=(seen_alone, of_z, (x, seen)))


@program("a factor in the model as likelihood", "Pyro, pyro.factor")
def by_factor() -> Pair:
    x = draws(6)

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("robust", -2.0 * (1 + (x - z).square()).log())

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(0.6 * x, 0.6))

    def evidence() -> Tensor:
        return over_line(
            lambda z: dist.Normal(0.0, 1.0).log_prob(z)[:, None] - 2.0 * (1 + (x.double() - z[:, None]).square()).log()
        )

    return Pair(model, guide, (x,), evidence=evidence)


@program("an annealed ELBO: poutine.scale on the latent", "Pyro, examples/dmm (KL annealing)")
def scaled() -> Pair:
    x = draws(6)

    def model(x: Tensor, scale: float) -> None:
        with pyro.plate("rows", len(x)):
            with poutine.scale(scale=scale):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor, scale: float) -> None:
        with pyro.plate("rows", len(x)), poutine.scale(scale=scale):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    def evidence() -> Tensor:
        return dist.Normal(0.0, math.sqrt(2.0)).log_prob(x.double())

    return Pair(model, guide, (x, 0.3), evidence=evidence, plain=(model, guide, (x, 1.0)))


@program("angles: a von Mises latent", "directional statistics")
def angles() -> Pair:
    y = draws(6, 2, seed=4)

    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            angle = pyro.sample("angle", dist.VonMises(0.0, 1.0))
            place = torch.stack([angle.cos(), angle.sin()], -1)
            pyro.sample("y", dist.Normal(place, 0.7).to_event(1), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            pyro.sample("angle", dist.VonMises(torch.atan2(y[:, 1], y[:, 0]), 2.0))

    def evidence() -> Tensor:
        def log_p(a: Tensor) -> Tensor:
            place = torch.stack([a.cos(), a.sin()], -1)[:, None]
            return dist.VonMises(0.0, 1.0).log_prob(a)[:, None] + dist.Normal(place, 0.7).log_prob(y.double()).sum(-1)

        return over_line(log_p, -math.pi, math.pi)

    return Pair(model, guide, (y,), evidence=evidence)


@program("a banana: the guide's normal meets a curved posterior", "Pyro, tutorial Normalizing flows")
def banana() -> Pair:
    x = draws(6, seed=2)

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 0] + z[..., 1].square() - 1.0, 0.4), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            loc = torch.stack([0.4 * x, torch.zeros_like(x)], -1)
            pyro.sample("z", dist.Normal(loc, torch.tensor([0.7, 0.8])).to_event(1))

    def evidence() -> Tensor:
        return over_plane(
            lambda z: (
                dist.Normal(0.0, 1.0).log_prob(z).sum(-1)[:, None]
                + dist.Normal(z[:, :1] + z[:, 1:].square() - 1.0, 0.4).log_prob(x.double())
            )
        )

    return Pair(model, guide, (x,), evidence=evidence)


@program("rows of a minibatch: plate with subsample=", "Pyro, tutorial SVI part II")
def minibatch() -> Pair:
    x, some = draws(20), torch.tensor([3, 17, 0, 11, 5])

    def model(x: Tensor, rows: Tensor, size: int) -> None:
        with pyro.plate("rows", size, subsample=rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(rows)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x: Tensor, rows: Tensor, size: int) -> None:
        with pyro.plate("rows", size, subsample=rows):
            pyro.sample("z", dist.Normal(x[rows] / 2, 0.8))

    def evidence() -> Tensor:
        return dist.Normal(0.0, math.sqrt(2.0)).log_prob(x[some].double())

    return Pair(model, guide, (x, some, 20), evidence=evidence, plain=(model, guide, (x, some, 5)))


@program(
    "Gaussian process latents: all rows in one kernel", "Pyro, tutorial GP latent variable model", "no data plate|couple|plate"
)
def gplvm() -> Pair:
    y = draws(6, 2)

    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        kernel = (-0.5 * (z[:, None] - z).square()).exp() + 0.1 * torch.eye(len(z))
        with pyro.plate("columns", 2):
            pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(z)), kernel), obs=y.T)

    guide = AutoNormal(model)
    guide(y)
    return Pair(model, guide, (y,))


@program("a coin: one latent for all data", "Pyro, tutorial SVI part I", "no local latent|no latent|plate")
def coin() -> Pair:
    x = torch.tensor([1.0, 1.0, 0.0, 1.0])

    def model(x: Tensor) -> None:
        fairness = pyro.sample("fairness", dist.Beta(10.0, 10.0))
        with pyro.plate("flips", len(x)):
            pyro.sample("x", dist.Bernoulli(fairness), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("fairness", dist.Beta(torch.tensor(12.0), torch.tensor(11.0)))

    return Pair(model, guide, (x,))
