"""Programs with a latent per step of a sequence."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex
from torch import Tensor, nn

from examples.programs.catalogue import Pair, draws, program, trained

T = 5
LENGTHS = torch.tensor([5, 2, 4, 3, 1, 5])
SERIES = draws(6, T, seed=11)


def covariance(steps: int, first: float = 1.0, step: float = 0.5) -> Tensor:
    """Covariance of a random walk: min(s, t) steps."""
    time = torch.arange(steps, dtype=torch.float64)
    return first + step * torch.minimum(time[:, None], time)


def walk_evidence(x: Tensor, lengths: Tensor) -> Tensor:
    """A random walk with noise is normal: each series by its own length."""
    found = []
    for row, length in zip(x.double(), lengths.tolist(), strict=True):
        cov = covariance(length) + 0.25 * torch.eye(length, dtype=torch.float64)
        found.append(dist.MultivariateNormal(torch.zeros(length, dtype=torch.float64), cov).log_prob(row[:length]))
    return torch.stack(found)


def walk(x: Tensor, lengths: Tensor, inside: bool = False) -> None:
    """A local level: z_t ~ N(z_{t-1}, .5), x_t ~ N(z_t, .25), each series as long as it is."""
    with pyro.plate("series", len(x)):
        z = torch.zeros(len(x))
        for t in pyro.markov(range(x.shape[1])):
            keep = t < lengths
            step = dist.Normal(z, 1.0 if t == 0 else 0.5**0.5)
            if inside:
                z = pyro.sample(f"z_{t}", step.mask(keep)) * keep
                pyro.sample(f"x_{t}", dist.Normal(z, 0.5).mask(keep), obs=x[:, t])
            else:
                with poutine.mask(mask=keep):
                    z = pyro.sample(f"z_{t}", step) * keep
                    pyro.sample(f"x_{t}", dist.Normal(z, 0.5), obs=x[:, t])


def of_walk(x: Tensor, lengths: Tensor, inside: bool = False) -> None:
    """Independent normals around the observations."""
    with pyro.plate("series", len(x)):
        for t in pyro.markov(range(x.shape[1])):
            keep = t < lengths
            here = dist.Normal(0.75 * x[:, t], 0.4)
            if inside:
                pyro.sample(f"z_{t}", here.mask(keep))
            else:
                with poutine.mask(mask=keep):
                    pyro.sample(f"z_{t}", here)


@program("local level, series of several lengths by poutine.mask", "Pyro, tutorial on state-space models")
def local_level() -> Pair:
    return Pair(walk, of_walk, (SERIES, LENGTHS), evidence=lambda: walk_evidence(SERIES, LENGTHS))


@program("local level, lengths by dist.mask inside", "Pyro, examples/hmm (masks)")
def local_level_inside() -> Pair:
    args = (SERIES, LENGTHS, True)
    return Pair(walk, of_walk, args, evidence=lambda: walk_evidence(SERIES, LENGTHS))


@program("deep Markov model with a structured guide", "Pyro, examples/dmm")
def deep_markov() -> Pair:
    torch.manual_seed(0)
    move, emit, rnn = nn.Linear(2, 2), nn.Linear(2, 4), nn.GRU(4, 6, batch_first=True)
    combine, head = nn.Linear(2, 6), nn.Linear(6, 4)
    x = torch.bernoulli(torch.full((5, 3, 4), 0.5), generator=torch.Generator().manual_seed(1))

    def model(x: Tensor) -> None:
        pyro.module("move", move)
        pyro.module("emit", emit)
        with pyro.plate("sequences", len(x)):
            z = x.new_zeros(len(x), 2)
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", dist.Normal(move(z).tanh(), 0.7).to_event(1))
                pyro.sample(f"x_{t}", dist.Bernoulli(logits=2 * emit(z)).to_event(1), obs=x[:, t])

    def guide(x: Tensor) -> None:
        for name, part in (("rnn", rnn), ("combine", combine), ("head", head)):
            pyro.module(name, part)
        later = rnn(x.flip(1))[0].flip(1)
        with pyro.plate("sequences", len(x)):
            z = x.new_zeros(len(x), 2)
            for t in pyro.markov(range(x.shape[1])):
                loc, log_scale = head(0.5 * (combine(z).tanh() + later[:, t])).chunk(2, -1)
                z = pyro.sample(f"z_{t}", dist.Normal(loc, (log_scale - 0.5).exp()).to_event(1))

    trained(model, guide, (x,), 150)
    return Pair(model, guide, (x,))


@program("switching linear dynamics: discrete states beside a continuous path", "Pyro, examples on SLDS")
def switching() -> Pair:
    x = draws(4, 14, seed=12)
    stay = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    noise = torch.tensor([0.3, 1.5])

    def model(x: Tensor) -> None:
        with pyro.plate("series", len(x)):
            slope = pyro.sample("slope", dist.Normal(0.0, 0.5))
            state = torch.zeros(len(x), dtype=torch.long)
            for t in pyro.markov(range(x.shape[1])):
                state = pyro.sample(f"s_{t}", dist.Categorical(Vindex(stay)[state, :]), infer={"enumerate": "parallel"})
                pyro.sample(f"x_{t}", dist.Normal(slope * (t / 7 - 1), noise[state]), obs=x[:, t])

    def guide(x: Tensor) -> None:
        time = torch.arange(x.shape[1]) / 7 - 1
        with pyro.plate("series", len(x)):
            pyro.sample("slope", dist.Normal((x * time).sum(1) / (time.square().sum() + 4), 0.3))

    return Pair(model, guide, (x,))


@program("a stochastic volatility per series", "Pyro, tutorial on reparametrisation (stable)")
def volatility() -> Pair:
    x = draws(4, 6, seed=13)

    def model(x: Tensor) -> None:
        with pyro.plate("series", len(x)):
            h = torch.zeros(len(x))
            for t in pyro.markov(range(x.shape[1])):
                h = pyro.sample(f"h_{t}", dist.Normal(0.9 * h, 0.4))
                pyro.sample(f"x_{t}", dist.Normal(0.0, (h / 2).exp()), obs=x[:, t])

    def guide(x: Tensor) -> None:
        with pyro.plate("series", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                pyro.sample(f"h_{t}", dist.Normal(0.1 * (x[:, t].square() - 1), 0.45))

    return Pair(model, guide, (x,))
