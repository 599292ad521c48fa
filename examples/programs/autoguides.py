"""One model with a positive latent per datum, under every automatic guide of Pyro."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.easyguide import easy_guide
from pyro.infer import autoguide
from torch import Tensor

from examples.programs.catalogue import Pair, draws, over_line, program, trained

TUTORIAL = "Pyro, tutorial SVI with autoguides"
COUNTS = torch.tensor([[0.0, 2.0, 1.0], [4.0, 3.0, 6.0], [1.0, 1.0, 0.0], [9.0, 7.0, 5.0], [2.0, 0.0, 3.0]])


def rates(y: Tensor) -> None:
    """Counts of rows with a rate each, log-normal."""
    with pyro.plate("rows", len(y)):
        rate = pyro.sample("rate", dist.LogNormal(0.5, 1.0))
        pyro.sample("y", dist.Poisson(rate[:, None].expand(-1, 3)).to_event(1), obs=y)


def evidence() -> Tensor:
    """log p(y) by the trapezoidal rule in log rate."""

    def log_p(u: Tensor) -> Tensor:
        like = dist.Poisson(u.exp()[:, None, None]).log_prob(COUNTS.double()).sum(-1)
        return dist.Normal(0.5, 1.0).log_prob(u)[:, None] + like

    return over_line(log_p)


def auto(family: Callable[..., Any], **options: Any) -> Pair:
    """Train an automatic guide."""
    guide = family(rates, **options)
    trained(rates, guide, (COUNTS,))
    return Pair(rates, guide, (COUNTS,), evidence=evidence)


@program("AutoNormal", TUTORIAL)
def auto_normal() -> Pair:
    return auto(autoguide.AutoNormal)


@program("AutoDiagonalNormal", TUTORIAL)
def auto_diagonal() -> Pair:
    return auto(autoguide.AutoDiagonalNormal)


@program("AutoNormalMessenger", "Pyro, module autoguide.effect")
def auto_messenger() -> Pair:
    return auto(autoguide.AutoNormalMessenger)


@program("AutoHierarchicalNormalMessenger", "Pyro, module autoguide.effect")
def auto_hierarchical() -> Pair:
    return auto(autoguide.AutoHierarchicalNormalMessenger)


@program("AutoLaplaceApproximation", TUTORIAL)
def auto_laplace() -> Pair:
    return auto(autoguide.AutoLaplaceApproximation)


@program("AutoGuideList of two AutoNormals", "Pyro, module autoguide")
def auto_list() -> Pair:
    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            rate = pyro.sample("rate", dist.LogNormal(0.5, 1.0))
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Poisson((rate * shift.exp())[:, None].expand(-1, 3)).to_event(1), obs=y)

    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoNormal(poutine.block(model, expose=["rate"])))
    guide.append(autoguide.AutoNormal(poutine.block(model, expose=["shift"])))
    trained(model, guide, (COUNTS,))
    return Pair(model, guide, (COUNTS,))


@program("AutoDelta", TUTORIAL, "is a point mass", auto_laplace)
def auto_delta() -> Pair:
    return auto(autoguide.AutoDelta)


@program("AutoMultivariateNormal", TUTORIAL, "joins all data into one vector", auto_normal)
def auto_multivariate() -> Pair:
    return auto(autoguide.AutoMultivariateNormal)


@program("AutoIAFNormal", TUTORIAL, "joins all data into one vector", auto_normal)
def auto_iaf() -> Pair:
    return auto(autoguide.AutoIAFNormal)


@program("EasyGuide with a normal per group of sites", "Pyro, contrib.easyguide")
def easy() -> Pair:
    @easy_guide(rates)
    def guide(self: Any, y: Tensor) -> None:
        group = self.group(match=".*")
        with self.plate("rows", len(y)):
            loc = pyro.param("loc", torch.zeros(len(y), 1))
            scale = pyro.param("scale", torch.ones(len(y), 1), constraint=dist.constraints.positive)
            group.sample("group", dist.Normal(loc, scale).to_event(1))

    trained(rates, guide, (COUNTS,))
    return Pair(rates, guide, (COUNTS,), evidence=evidence)


@program("a guide unpacked by hand: auxiliary normal, Delta of its exponential", "Pyro forum")
def unpacked() -> Pair:
    def guide(y: Tensor) -> None:
        scale = pyro.param("s", torch.tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("rows", len(y)):
            u = pyro.sample("u", dist.Normal((y.mean(-1) + 0.5).log(), scale), infer={"is_auxiliary": True})
            pyro.sample("rate", dist.Delta(u.exp(), log_density=-u))

    trained(rates, guide, (COUNTS,), 200)
    return Pair(rates, guide, (COUNTS,), evidence=evidence)


@program("one row of parameters per datum", "Pyro, tutorial SVI part II")
def rows() -> Pair:
    def guide(y: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(len(y)))
        scale = pyro.param("scale", torch.ones(len(y)), constraint=dist.constraints.positive)
        with pyro.plate("rows", len(y)):
            pyro.sample("rate", dist.LogNormal(loc, scale))

    trained(rates, guide, (COUNTS,))
    return Pair(rates, guide, (COUNTS,), evidence=evidence)


@program("a reparametrised model: LocScaleReparam", "Pyro, tutorial Reparameterizers")
def reparametrised() -> Pair:
    y = draws(6, 3)

    def plain(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.full((len(y),), 1.0), 2.0))
            pyro.sample("y", dist.Normal(z[:, None].expand(-1, 3), 1.0).to_event(1), obs=y)

    model = poutine.reparam(plain, config={"z": pyro.infer.reparam.LocScaleReparam(0.0)})
    guide = autoguide.AutoNormal(model)
    trained(model, guide, (y,))

    def by_hand() -> Tensor:
        cov = 4.0 * torch.ones(3, 3, dtype=torch.float64) + torch.eye(3, dtype=torch.float64)
        return dist.MultivariateNormal(torch.ones(3, dtype=torch.float64), cov).log_prob(y.double())

    return Pair(model, guide, (y,), evidence=by_hand)


WITH_GLOBALS = partial(draws, 7, 4, seed=3)


def grouped(y: Tensor) -> None:
    """Rows with means around a common one."""
    centre = pyro.sample("centre", dist.Normal(0.0, 3.0))
    spread = pyro.sample("spread", dist.HalfNormal(2.0))
    with pyro.plate("rows", len(y)):
        mean = pyro.sample("mean", dist.Normal(centre, spread))
        pyro.sample("y", dist.Normal(mean[:, None].expand(-1, 4), 1.0).to_event(1), obs=y)


@program("AutoNormal of globals and locals: eight schools with replicates", "Pyro, examples/eight_schools")
def schools() -> Pair:
    y = WITH_GLOBALS()
    guide = autoguide.AutoNormal(grouped)
    trained(grouped, guide, (y,))
    return Pair(grouped, guide, (y,))


@program("AutoLowRankMultivariateNormal of globals and locals", TUTORIAL, "joins all data into one vector", schools)
def low_rank() -> Pair:
    y = WITH_GLOBALS()
    guide = autoguide.AutoLowRankMultivariateNormal(grouped, rank=2)
    trained(grouped, guide, (y,))
    return Pair(grouped, guide, (y,))
