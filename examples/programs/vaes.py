"""Variational autoencoders of Pyro's examples and of other packages, small, with trained weights."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import transforms
from torch import Tensor, nn

from examples.programs.catalogue import Pair, draws, over_line, over_plane, program, trained

PIXELS = torch.bernoulli(torch.full((6, 8), 0.4), generator=torch.Generator().manual_seed(3))
COUNTS = torch.poisson(torch.full((6, 5), 4.0), generator=torch.Generator().manual_seed(4))
EMPTY = {"generator": torch.Generator().manual_seed(5)}


def network(inputs: int, outputs: int, seed: int = 0) -> nn.Sequential:
    """One hidden layer."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs))


def normal_prior(z: Tensor) -> Tensor:
    """log N(z; 0, I), (..., 1)."""
    return dist.Normal(0.0, 1.0).log_prob(z).sum(-1)[:, None]


def encoder_guide(encoder: nn.Module, width: int = 2) -> Callable[..., None]:
    """Mean field, from a network."""

    def guide(x: Tensor, *rest: Tensor) -> None:
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return guide


@program("VAE of binary pixels", "Pyro, examples/vae")
def vae() -> Pair:
    decoder, guide = network(2, 8), encoder_guide(network(8, 4, 1))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    trained(model, guide, (PIXELS,), 300)
    exact = decoder.double

    def evidence() -> Tensor:
        with torch.no_grad():
            exact()
            found = over_plane(
                lambda z: normal_prior(z) + dist.Bernoulli(logits=decoder(z)[:, None]).log_prob(PIXELS.double()).sum(-1)
            )
            decoder.float()
        return found

    return Pair(model, guide, (PIXELS,), evidence=evidence)


@program("conditional VAE: the rest of an image, given a part", "Pyro, examples/cvae")
def conditional() -> Pair:
    decoder, encoder = network(2 + 4, 4), network(8, 4, 1)

    def model(given: Tensor, rest: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(given)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("rest", dist.Bernoulli(logits=decoder(torch.cat([z, given], -1))).to_event(1), obs=rest)

    def guide(given: Tensor, rest: Tensor) -> None:
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(torch.cat([given, rest], -1)).chunk(2, -1)
        with pyro.plate("data", len(given)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    args = (PIXELS[:, :4], PIXELS[:, 4:])
    trained(model, guide, args, 300)
    return Pair(model, guide, args)


@program("VAE with a normalizing flow as guide", "Pyro, tutorial Normalizing flows")
def flow() -> Pair:
    decoder, encoder = network(2, 8), network(8, 4, 1)
    spline = transforms.spline_coupling(2, hidden_dims=[8])

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        pyro.module("spline", spline)
        loc, log_scale = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            base = dist.Normal(loc, log_scale.exp()).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [spline]))

    trained(model, guide, (PIXELS,), 150)
    return Pair(model, guide, (PIXELS,))


@program("VAE with a mixture prior", "VampPrior and VaDE, Tomczak and Welling 2018, Jiang et al. 2017")
def mixture_prior() -> Pair:
    decoder, guide = network(2, 5), encoder_guide(network(5, 4, 1))
    centres = nn.Parameter(draws(4, 2, seed=6))
    x = draws(6, 5, seed=7)

    def prior() -> dist.MixtureSameFamily:
        return dist.MixtureSameFamily(dist.Categorical(torch.ones(4)), dist.Normal(centres, 0.5).to_event(1))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(decoder(z), 0.7).to_event(1), obs=x)

    trained(model, guide, (x,), 300)

    def evidence() -> Tensor:
        with torch.no_grad():
            return over_plane(
                lambda z: (
                    prior().log_prob(z.float())[:, None].double()
                    + dist.Normal(decoder(z.float())[:, None], 0.7).log_prob(x).sum(-1).double()
                )
            )

    return Pair(model, guide, (x,), evidence=evidence)


def library(x: Tensor) -> Tensor:
    """Counts of a cell."""
    return x.sum(-1, keepdim=True)


@program("scVI: zero-inflated negative binomial, observed library size", "Pyro, examples/scanvi; scvi-tools SCVI")
def scvi() -> Pair:
    decoder, guide = network(2, 10), encoder_guide(network(5, 4, 1))
    inverse = torch.tensor(2.0)

    def counts(z: Tensor, x: Tensor) -> dist.ZeroInflatedNegativeBinomial:
        share, gate = decoder(z).chunk(2, -1)
        mean = library(x) * share.softmax(-1)
        return dist.ZeroInflatedNegativeBinomial(inverse, logits=(mean / inverse).log(), gate_logits=gate - 2.0)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", counts(z, x).to_event(1), obs=x)

    trained(model, guide, (COUNTS,), 300)

    def evidence() -> Tensor:
        with torch.no_grad():
            return over_plane(
                lambda z: normal_prior(z) + counts(z.float()[:, None], COUNTS).log_prob(COUNTS).sum(-1).double(), points=201
            )

    return Pair(model, guide, (COUNTS,), evidence=evidence)


@program("scVI with a latent library size", "scvi-tools, use_observed_lib_size=False")
def latent_library() -> Pair:
    decoder, encoder = network(2, 5), network(5, 6, 1)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            size = pyro.sample("size", dist.LogNormal(torch.tensor([3.0]), 0.5).to_event(1))
            mean = size * decoder(z).softmax(-1)
            pyro.sample("x", dist.NegativeBinomial(torch.tensor(3.0), logits=(mean / 3.0).log()).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        found = encoder((x + 1).log())
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(found[:, :2], found[:, 2:4].exp()).to_event(1))
            pyro.sample("size", dist.LogNormal(found[:, 4:5] + 3.0, (found[:, 5:] - 1).exp()).to_event(1))

    trained(model, guide, (COUNTS,), 400)
    return Pair(model, guide, (COUNTS,))


@program("LDVAE: a linear decoder of counts", "scvi-tools LinearSCVI")
def linear_counts() -> Pair:
    loadings, guide = nn.Linear(2, 5), encoder_guide(network(5, 4, 1))

    def model(x: Tensor) -> None:
        pyro.module("loadings", loadings)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            mean = library(x) * loadings(z).softmax(-1)
            pyro.sample("x", dist.NegativeBinomial(torch.tensor(2.0), logits=(mean / 2.0).log()).to_event(1), obs=x)

    trained(model, guide, (COUNTS,), 300)
    return Pair(model, guide, (COUNTS,))


@program("ProdLDA: logistic-normal topics", "Pyro, tutorial ProdLDA")
def prodlda() -> Pair:
    topics, encoder = nn.Linear(2, 5, bias=False), network(5, 4, 1)

    def model(x: Tensor) -> None:
        pyro.module("topics", topics)
        with pyro.plate("documents", len(x)):
            logits = pyro.sample("logits", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            words = topics(logits.softmax(-1)).softmax(-1)
            pyro.sample("x", dist.Multinomial(probs=words, validate_args=False).to_event(0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x).chunk(2, -1)
        with pyro.plate("documents", len(x)):
            pyro.sample("logits", dist.Normal(loc, log_scale.exp()).to_event(1))

    x = torch.poisson(torch.full((6, 5), 3.0), generator=torch.Generator().manual_seed(8))
    trained(model, guide, (x,), 300)
    return Pair(model, guide, (x,))


@program("sparse gamma deep exponential family", "Pyro, examples/sparse_gamma_def", certified=False)
def gamma_def() -> Pair:
    torch.manual_seed(2)
    weights = torch.rand(2, 5) + 0.2
    upper = torch.tensor([0.8, 1.2])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Gamma(torch.tensor([0.7]), 0.5).to_event(1))
            z = pyro.sample("z", dist.Gamma(1.0, 1.0 / (top * upper + 0.05)).to_event(1))
            pyro.sample("x", dist.Poisson(z @ weights + 0.01).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        mean = x.mean(-1, keepdim=True)
        with pyro.plate("data", len(x)):
            pyro.sample("top", dist.Gamma(torch.tensor([1.5]), 1.5 / (mean + 0.5)).to_event(1))
            pyro.sample("z", dist.Gamma(torch.tensor([3.0, 3.0]), 3.0 / (0.7 * mean + 0.2)).to_event(1))

    return Pair(model, guide, (COUNTS,))


@program("regression with a heavy-tailed latent per row", "Pyro, tutorial Bayesian regression, made robust")
def robust() -> Pair:
    x, y = draws(8, seed=1), draws(8, seed=2)
    slope = nn.Parameter(torch.tensor(0.5))

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            weight = pyro.sample("weight", dist.Gamma(2.0, 2.0))
            pyro.sample("y", dist.Normal(pyro.param("slope", slope) * x, weight.rsqrt()), obs=y)

    def guide(x: Tensor, y: Tensor) -> None:
        rest = (y - pyro.param("slope", slope) * x).square()
        with pyro.plate("data", len(x)):
            pyro.sample("weight", dist.Gamma(torch.full_like(x, 2.5), 2.0 + 0.5 * rest))

    def evidence() -> Tensor:
        mean = 0.5 * x.double()
        return dist.StudentT(4.0, mean, 1.0).log_prob(y.double())

    return Pair(model, guide, (x, y), evidence=evidence)


@program("censored survival times with a frailty", "Pyro forum")
def survival() -> Pair:
    time = torch.tensor([0.5, 1.2, 2.0, 2.0, 0.1, 1.7])
    died = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0])

    def log_like(frailty: Tensor, time: Tensor, died: Tensor) -> Tensor:
        return died * frailty.log() - frailty * time

    def model(time: Tensor, died: Tensor) -> None:
        with pyro.plate("patients", len(time)):
            frailty = pyro.sample("frailty", dist.Gamma(2.0, 2.0))
            pyro.factor("survival", log_like(frailty, time, died))

    def guide(time: Tensor, died: Tensor) -> None:
        with pyro.plate("patients", len(time)):
            pyro.sample("frailty", dist.LogNormal(((2.0 + died) / (2.0 + time)).log() - 0.15, 0.6))

    def evidence() -> Tensor:
        prior = dist.Gamma(torch.tensor(2.0).double(), 2.0)
        return over_line(lambda u: (prior.log_prob(u.exp()) + u)[:, None] + log_like(u.exp()[:, None], time, died), -15.0, 5.0)

    return Pair(model, guide, (time, died), evidence=evidence)
