"""The posteriors that the benchmarks compare methods on, and what a method is."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks.images import magnified
from elbowroom.inference.fit.loop import batches
from elbowroom.inference.fit.svi import Step
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.models.guides.base import AmortizedGuide
from elbowroom.models.guides.normal import DiagonalNormal
from elbowroom.models.likelihoods.binary import Bernoulli
from elbowroom.models.likelihoods.continuous import Gaussian
from elbowroom.models.likelihoods.counts import Poisson
from elbowroom.models.networks.mlp import MLP
from elbowroom.models.priors.standard import Normal
from elbowroom.models.vae import VAE

PIXELS, DIM, EPOCHS = 64, 2, 100
FIT, DATA, STARTS = 101, 102, 103  # seeds


@dataclass(frozen=True)
class Settings:
    """What a run compares: chains, warm-up and draws per chain, data for Pyro's NUTS, timed repeats, threads."""

    chains: int
    warmup: int
    draws: int
    pyro: int
    repeats: int
    threads: int


@dataclass(frozen=True)
class Run:
    """Draws (chain, draw, N, d), the seconds they took and how many of them came from divergent transitions.

    `gradients` of log p(x, z) per posterior, over all chains and stages, is NaN where nobody counts.
    """

    draws: np.ndarray
    seconds: float
    divergences: int
    note: str = ""
    gradients: float = math.nan


@dataclass(frozen=True)
class Method:
    """One competitor: `run(seed)` samples the first `n_obs` data; compilation has happened before, in `compile_seconds`."""

    name: str
    dtype: str
    n_obs: int
    chains: int
    run: Callable[[int], Run]
    compile_seconds: float = math.nan


@contextmanager
def counted() -> Iterator[list[float]]:
    """Count the gradients of log p(x, z) at single points, over all data, while the context is open: item 0 of the result."""
    found, names = [0.0], ("grad", "parts", "leap")
    true = {name: getattr(LogJoint, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def call(self: LogJoint, z: Tensor, *rest: Any) -> Any:
            before = found[0]
            result = true[name](self, z, *rest)
            if found[0] == before:  # one may call another
                found[0] += z.shape[0] * z.shape[1]
            return result

        return call

    for name in names:
        setattr(LogJoint, name, counting(name))
    try:
        yield found
    finally:
        for name in names:
            setattr(LogJoint, name, true[name])


class Problem:
    """Posteriors that share a decoder: the fitted pair, data x (N, pixels) drawn from it, the decoder's weights in numpy."""

    def __init__(self, vae: VAE, n_obs: int) -> None:
        self.vae, self.n_obs, self.dim = vae, n_obs, vae.posterior.family.latent_dim
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(DATA)
            self.x = vae.decode(torch.randn(n_obs, self.dim)).sample()
        linear = [layer for layer in vae.decoder.modules() if isinstance(layer, torch.nn.Linear)]
        self.weights = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in linear]
        self.likelihood = type(vae.likelihood).__name__.lower()
        self.constants: dict[str, np.ndarray] = {}
        if isinstance(vae.likelihood, Gaussian):
            noise = copy.deepcopy(vae.likelihood).double().noise_scale().detach()
            self.constants = {"loc": vae.likelihood.loc.numpy(), "unit": vae.likelihood.unit.numpy(), "noise": noise.numpy()}
        elif isinstance(vae.likelihood, Poisson):
            self.constants = {"log_mean": vae.likelihood.log_mean.numpy()}
        self.log_joint = self.fresh()

    def fresh(self) -> LogJoint:
        """Return a new log joint, of which nothing is known yet."""
        return LogJoint(self.vae.model, self.vae.guide, self.x)

    def starts(self, chains: int, seed: int) -> Tensor:
        """Return starting points (chains, N, d): half from the guide, half from the prior, in float64."""
        half = (chains + 1) // 2
        from_guide, _ = self.log_joint.sample_guide(half, STARTS + seed)
        return (
            torch.cat([from_guide, self.log_joint.sample_prior(chains - half, STARTS + seed + 1)])
            if chains > half
            else from_guide
        )

    def same(self, who: str, theirs: np.ndarray, ours: np.ndarray, tolerance: float) -> None:
        """Raise unless two evaluations of log p(x, z) agree to a relative tolerance: otherwise nothing is comparable."""
        error = float(np.max(np.abs(theirs - ours) / (1 + np.abs(ours))))
        if not error <= tolerance:
            raise RuntimeError(f"{who}: log p(x, z) differs from ours by a relative {error:.1e} (allowed {tolerance:g})")
        print(f"{who}: log p(x, z) equals ours to a relative {error:.1e}", flush=True)


LIKELIHOODS = {"bernoulli": Bernoulli, "gaussian": Gaussian, "poisson": Poisson}


def fitted(
    hidden: int, epochs: int = EPOCHS, *, dim: int = DIM, block: tuple[int, int] = (1, 1), likelihood: str = "bernoulli"
) -> VAE:
    """Fit the pair to the digits by Adam: batches of 128, learning rate 3e-3.

    The digits are binarized for Bernoulli pixels, counts from 0 to 16 for Poisson, and these in sixteenths for Gaussian ones.

    Args:
        hidden: width of the hidden layers.
        epochs: passes over the digits.
        dim: number of latents d.
        block: rows and columns of pixels that each of the 64 pixels becomes.
        likelihood: name of p(x|z).
    """
    images = load_digits().images
    digits = magnified({"bernoulli": images >= 8, "poisson": images, "gaussian": images / 16}[likelihood], *block)
    x = torch.as_tensor(digits.reshape(len(digits), -1), dtype=torch.float32)
    pixels = x.shape[1]
    with torch.random.fork_rng(), pyro.get_param_store().scope():
        torch.manual_seed(FIT)
        family, options = DiagonalNormal(dim), {"hidden": (hidden,), "activation": "tanh"}
        encoder = AmortizedGuide(MLP((pixels,), family.param_dim, **options), family)
        vae = VAE(Normal(dim), LIKELIHOODS[likelihood]((pixels,)), MLP((dim,), pixels, **options), encoder)
        vae.adapt(x)
        step, order = Step(vae, size=len(x), learning_rate=3e-3), torch.Generator().manual_seed(FIT)
        for _ in range(epochs):
            for index in batches(len(x), 128, order):
                step(x[index])
    return vae.eval()
