"""Programs with discrete latents: listed, summed out by elimination, or masking others."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.ops.indexing import Vindex
from torch import Tensor

from examples.programs.catalogue import Pair, draws, over_line, over_plane, program

CENTRES = torch.tensor([-2.0, 0.0, 2.5])
WEIGHTS = torch.tensor([0.2, 0.5, 0.3])


def mixture(x: Tensor) -> None:
    """Three normals."""
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(CENTRES[k], 1.0), obs=x)


def mixture_evidence(x: Tensor) -> Tensor:
    """By the sum over the components."""
    return torch.logsumexp(WEIGHTS.double().log() + dist.Normal(CENTRES.double(), 1.0).log_prob(x.double()[:, None]), -1)


@program("a mixture whose guide gives the responsibilities", "Pyro, tutorial Discrete latent variables")
def responsibilities() -> Pair:
    x = 2 * draws(8)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            logits = WEIGHTS.log() - 0.3 * (x[:, None] - CENTRES).square()
            pyro.sample("k", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})

    return Pair(mixture, guide, (x,), evidence=lambda: mixture_evidence(x))


@program("Gaussian mixture with global centres", "Pyro, tutorial Gaussian mixture model")
def global_centres() -> Pair:
    x = torch.cat([draws(5) - 3, draws(5, seed=1) + 3])

    @config_enumerate
    def model(x: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("components", 2):
            locs = pyro.sample("locs", dist.Normal(torch.tensor([-2.0, 2.0]), 3.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(locs[k], 1.0), obs=x)

    guide = AutoNormal(poutine.block(model, hide=["k"]))
    guide(x)
    return Pair(model, guide, (x,), {"plate": "data"})


@program("a mixture beside a continuous latent", "Pyro, tutorial Discrete latent variables")
def beside() -> Pair:
    x = 2 * draws(6, 3)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal((CENTRES[k] + z)[..., None] + torch.zeros(3), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.3 * x.mean(-1), 0.9))

    def evidence() -> Tensor:
        def log_p(z: Tensor) -> Tensor:
            each = dist.Normal(CENTRES.double()[:, None, None, None] + z[:, None, None], 1.0).log_prob(x.double()).sum(-1)
            return dist.Normal(0.0, 1.0).log_prob(z)[:, None] + torch.logsumexp(WEIGHTS.double().log()[:, None, None] + each, 0)

        return over_line(log_p)

    return Pair(model, guide, (x,), evidence=evidence)


TOPICS = torch.tensor([[0.6, 0.2, 0.1, 0.05, 0.05], [0.05, 0.05, 0.2, 0.3, 0.4]])
WORDS = torch.tensor([[0, 1, 0, 0, 2, 1], [4, 3, 4, 2, 4, 4], [0, 4, 1, 3, 2, 0], [3, 3, 4, 0, 4, 1]])


@program("latent Dirichlet allocation, a topic per word", "Pyro, examples/lda")
def lda() -> Pair:
    def model(words: Tensor) -> None:
        with pyro.plate("documents", len(words), dim=-2):
            share = pyro.sample("share", dist.Beta(0.8, 0.8).expand([1]).to_event(1))
            with pyro.plate("words", words.shape[1], dim=-1):
                topic = pyro.sample("topic", dist.Bernoulli(share.squeeze(-1)), infer={"enumerate": "parallel"})
                pyro.sample("word", dist.Categorical(Vindex(TOPICS)[topic.long(), :]), obs=words)

    def guide(words: Tensor) -> None:
        counts = (words >= 3).float().sum(-1)
        with pyro.plate("documents", len(words), dim=-2):
            a, b = counts[:, None, None] + 0.5, 6.5 - counts[:, None, None]
            pyro.sample("share", dist.Beta(a, b).to_event(1))

    def evidence() -> Tensor:
        def log_p(u: Tensor) -> Tensor:
            share = u.sigmoid()
            words = TOPICS.double()[:, WORDS]
            mixed = share[:, None, None] * words[1] + (1 - share)[:, None, None] * words[0]
            jacobian = share.log() + (1 - share).log()
            return (dist.Beta(0.8, 0.8).log_prob(share) + jacobian)[:, None] + mixed.log().sum(-1)

        return over_line(log_p, -30.0, 30.0)

    return Pair(model, guide, (WORDS,), evidence=evidence)


STAY = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
LEVELS = torch.tensor([-1.0, 1.5])


def forward(x: Tensor, shift: Tensor) -> Tensor:
    """log p(x|shift) of a hidden Markov chain, (..., N), by the forward algorithm; x (N, T), shift (..., N)."""
    emissions = dist.Normal(LEVELS.double()[:, None, None] + shift[..., None, :, None], 1.0)
    log_e = emissions.log_prob(x.double())  # (..., 2, N, T)
    alpha = math.log(0.5) + log_e[..., 0]
    for t in range(1, x.shape[1]):
        moved = alpha[..., :, None, :] + STAY.double().log()[:, :, None]
        alpha = torch.logsumexp(moved, -3) + log_e[..., t]
    return torch.logsumexp(alpha, -2)


def chain(x: Tensor, shift: Tensor | float) -> None:
    """The states and observations of a hidden Markov chain."""
    state = torch.zeros(len(x), dtype=torch.long)
    for t in pyro.markov(range(x.shape[1])):
        probs = torch.full((2,), 0.5) if t == 0 else Vindex(STAY)[state.long(), :]
        state = pyro.sample(f"s_{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
        pyro.sample(f"x_{t}", dist.Normal(LEVELS[state] + shift, 1.0), obs=x[:, t])


@program("hidden Markov chains with a continuous random effect each", "Pyro, examples/mixed_hmm")
def mixed() -> Pair:
    x = draws(5, 15) + 1.0

    def model(x: Tensor) -> None:
        with pyro.plate("animals", len(x)):
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            chain(x, shift)

    def guide(x: Tensor) -> None:
        with pyro.plate("animals", len(x)):
            pyro.sample("shift", dist.Normal(0.8 * x.mean(1), 0.4))

    def evidence() -> Tensor:
        return over_line(lambda z: dist.Normal(0.0, 1.0).log_prob(z)[:, None] + forward(x, z[:, None].expand(-1, len(x))))

    return Pair(model, guide, (x,), evidence=evidence)


@program("short hidden Markov chains, states alone", "Pyro, examples/hmm")
def hmm() -> Pair:
    x = draws(5, 5)

    def model(x: Tensor) -> None:
        with pyro.plate("sequences", len(x)):
            chain(x, 0.0)

    return Pair(model, lambda x: None, (x,), evidence=lambda: forward(x, torch.zeros(len(x)).double()))


@program("capture and recapture: alive or not, seen or not", "Pyro, examples/capture_recapture/cjs")
def recapture() -> Pair:
    seen = torch.tensor([[1.0, 0, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 1]])
    survives, caught = 0.8, 0.6

    @config_enumerate
    def model(seen: Tensor) -> None:
        with pyro.plate("animals", len(seen)):
            alive = torch.ones(len(seen))
            for t in pyro.markov(range(1, seen.shape[1])):
                alive = pyro.sample(f"alive_{t}", dist.Bernoulli(survives * alive))
                pyro.sample(f"seen_{t}", dist.Bernoulli(caught * alive), obs=seen[:, t])

    def evidence() -> Tensor:
        steps = []
        for row in seen:
            here, gone = 1.0, 0.0
            for y in row[1:]:
                here, gone = survives * here, gone + (1 - survives) * here
                here, gone = here * (caught if y else 1 - caught), gone * (0.0 if y else 1.0)
            steps.append(math.log(here + gone))
        return torch.tensor(steps, dtype=torch.float64)

    return Pair(model, lambda seen: None, (seen,), evidence=evidence)


@program("semi-supervised VAE (M2) with the class summed out", "Pyro, examples/vae/ss_vae_M2")
def m2() -> Pair:
    torch.manual_seed(0)
    decoder = torch.nn.Linear(2 + 3, 6)
    x = torch.bernoulli(torch.full((6, 6), 0.5), generator=torch.Generator().manual_seed(1))
    eye = torch.eye(3)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            y = pyro.sample("y", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
            one = eye[y].expand(*torch.broadcast_shapes(y.shape, z.shape[:-1]), 3)
            logits = 2 * decoder(torch.cat([z.expand(*one.shape[:-1], 2), one], -1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 0.9).to_event(1))
            pyro.sample("y", dist.Categorical(torch.ones(len(x), 3)), infer={"enumerate": "parallel"})

    def evidence() -> Tensor:
        weight, bias = decoder.weight.detach().double(), decoder.bias.detach().double()

        def log_p(z: Tensor) -> Tensor:
            each = [
                dist.Bernoulli(logits=2 * (z @ weight[:, :2].T + weight[:, 2 + y] + bias)[:, None]).log_prob(x.double()).sum(-1)
                for y in range(3)
            ]
            return dist.Normal(0.0, 1.0).log_prob(z).sum(-1)[:, None] + torch.stack(each).logsumexp(0) - math.log(3)

        return over_plane(log_p)

    return Pair(model, guide, (x,), evidence=evidence)


@program("a latent behind a gate: present or not", "Pyro, examples/air")
def gate() -> Pair:
    x = 2 * draws(6, seed=5)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            present = pyro.sample("present", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
            with poutine.mask(mask=present.bool()):
                what = pyro.sample("what", dist.Normal(torch.zeros(len(x)), 2.0))
            pyro.sample("x", dist.Normal(what * present, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            present = pyro.sample("present", dist.Bernoulli((0.3 * x.abs()).clamp(0.1, 0.9)), infer={"enumerate": "parallel"})
            with poutine.mask(mask=present.bool()):
                pyro.sample("what", dist.Normal(0.8 * x, 0.9))

    def evidence() -> Tensor:
        there = math.log(0.4) + dist.Normal(0.0, math.sqrt(5.0)).log_prob(x.double())
        return torch.logaddexp(there, math.log(0.6) + dist.Normal(0.0, 1.0).log_prob(x.double()))

    return Pair(model, guide, (x,), evidence=evidence)


@program("zero inflation by a latent", "Pyro forum")
def inflated() -> Pair:
    y = torch.tensor([0.0, 0, 3, 1, 0, 7])

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            off = pyro.sample("off", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Poisson(rate * (1 - off) + 1e-6), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("rate", dist.Gamma(2.0 + y, 2.0 + torch.zeros_like(y)))

    def evidence() -> Tensor:
        def log_p(u: Tensor) -> Tensor:
            on = math.log(0.7) + dist.Poisson(u.exp()[:, None] + 1e-6).log_prob(y.double())
            off = math.log(0.3) + dist.Poisson(torch.tensor(1e-6).double()).log_prob(y.double())
            return (dist.Gamma(2.0, 1.0).log_prob(u.exp()) + u)[:, None] + torch.logaddexp(on, off.expand_as(on))

        return over_line(log_p, -20.0, 5.0)

    return Pair(model, guide, (y,), evidence=evidence)


@program("long hidden Markov chains, states alone", "Pyro, examples/hmm", "too many to enumerate")
def long_hmm() -> Pair:
    x = draws(5, 20)

    def model(x: Tensor) -> None:
        with pyro.plate("sequences", len(x)):
            chain(x, 0.0)

    return Pair(model, lambda x: None, (x,))
