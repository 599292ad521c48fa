"""Who trains in the training benchmark: one VAE, written for PyTorch by hand, for pyro.infer.SVI, for pythae and for Elbowroom.

All have the same layers, from the same weights: tanh networks, an encoder that standardises its input, q(z|x) = N(mu, diag
sigma^2), p(z) = N(0, I), Bernoulli pixels, Adam at 1e-3. All but pythae maximise the same estimate from one draw of z,

    log p(x|z) + log p(z) - log q(z|x),   z = mu + sigma noise,

pythae puts the closed form of KL(q || p) in place of the last two, as its VAE does.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from elbowroom.inference.fit.loop import batches
from elbowroom.inference.fit.plan import Session
from elbowroom.inference.fit.svi import Step, fit
from elbowroom.models.guides.base import AmortizedGuide, positive_scale
from elbowroom.models.guides.normal import DiagonalNormal
from elbowroom.models.likelihoods.binary import Bernoulli
from elbowroom.models.networks.mlp import MLP
from elbowroom.models.priors.standard import Normal
from elbowroom.models.vae import VAE

RATE = 1e-3

OURS = "elbowroom"
EAGER, COMPILED, SVI, PYTHAE = "PyTorch by hand", "PyTorch by hand, torch.compile", "pyro.infer.SVI", "pythae"
PRODUCTS = "its matrix products alone"


def vae_of(x: Tensor, hidden: int, latent_dim: int) -> VAE:
    """Return the VAE that all start from, its encoder's input standardised by x (N, pixels), on the device of x."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        family, pixels = DiagonalNormal(latent_dim), x.shape[1]
        options: dict[str, Any] = {"hidden": (hidden,), "activation": "tanh"}
        encoder = AmortizedGuide(MLP((pixels,), family.param_dim, **options), family)
        vae = VAE(Normal(latent_dim), Bernoulli((pixels,)), MLP((latent_dim,), pixels, **options), encoder).to(x.device)
    vae.adapt(x)
    return vae


# -- the same VAE for others ------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """The VAE in plain PyTorch, its layers those of ours (copied)."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.loc, self.scale = vae.posterior.loc, vae.posterior.scale
        self.latent_dim = vae.posterior.family.latent_dim
        self.encoder, self.decoder = copy.deepcopy((vae.posterior.encoder.body, vae.decoder.body))

    def guide(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu and sigma of q(z|x), (B, d) each."""
        mu, s = self.encoder((x - self.loc) / self.scale).chunk(2, -1)
        return mu, positive_scale(s)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Return the loss of a batch in nats per datum, with the noise (B, d) of its draws."""
        mu, sigma = self.guide(x)
        z = mu + sigma * noise
        reconstruction = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        return (reconstruction + (0.5 * z.square() - 0.5 * noise.square() - sigma.log()).sum()) / len(x)

    def into(self, vae: VAE) -> VAE:
        """Return a copy of ours with these weights."""
        vae = copy.deepcopy(vae)
        vae.posterior.encoder.body.load_state_dict(self.encoder.state_dict())
        vae.decoder.body.load_state_dict(self.decoder.state_dict())
        return vae


class Programs:
    """The VAE as Pyro's own example states it (https://pyro.ai/examples/vae.html)."""

    def __init__(self, plain: Plain) -> None:
        self.plain = plain

    def model(self, x: Tensor) -> None:
        """p(z) p(x|z)."""
        pyro.module("decoder", self.plain.decoder)
        with pyro.plate("data", len(x)):
            zero = x.new_zeros(len(x), self.plain.latent_dim)
            z = pyro.sample("z", dist.Normal(zero, torch.ones_like(zero)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.plain.decoder(z), validate_args=False).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z|x)."""
        pyro.module("encoder", self.plain.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*self.plain.guide(x)).to_event(1))

    def svi(self) -> pyro.infer.SVI:
        """Return what takes the steps."""
        return pyro.infer.SVI(self.model, self.guide, pyro.optim.Adam({"lr": RATE}), pyro.infer.Trace_ELBO())


# -- steps ------------------------------------------------------------------------------------------------------------------

Steps = Callable[[Tensor, int], float]
"""Takes so many steps on a batch; returns the loss before the last, in nats per datum."""


def by_hand(vae: VAE, *, compiled: bool = False) -> Steps:
    """Write the step by hand, with a fused Adam, the loss left on its device until the last step."""
    plain = Plain(vae)
    loss = torch.compile(plain) if compiled else plain
    optimizer = torch.optim.Adam(plain.parameters(), lr=RATE, fused=True)

    def steps(x: Tensor, count: int) -> float:
        value = x.new_zeros(())
        for _ in range(count):
            optimizer.zero_grad()
            # outside of what is compiled, whose random numbers are others
            value = loss(x, torch.randn(len(x), plain.latent_dim, device=x.device))
            value.backward()
            optimizer.step()
        return float(value.detach())

    return steps


def by_svi(vae: VAE) -> Steps:
    """Take the step by pyro.infer.SVI and pyro.optim.Adam."""
    svi = Programs(Plain(vae)).svi()

    def steps(x: Tensor, count: int) -> float:
        value = 0.0
        for _ in range(count):
            value = svi.step(x) / len(x)
        return value

    return steps


def products(vae: VAE) -> Steps:
    """Take no step: only the matrix products of one, forward and backward, which nobody's step can do without."""
    plain = Plain(vae)
    networks = [[layer for layer in body.modules() if isinstance(layer, nn.Linear)] for body in (plain.encoder, plain.decoder)]
    first = networks[0][0]  # nobody asks for the gradient of the data

    def steps(x: Tensor, count: int) -> float:
        layers = [layer for network in networks for layer in network]
        inputs = [x.new_ones(len(x), layer.in_features) for layer in layers]
        outputs = [x.new_ones(len(x), layer.out_features) for layer in layers]
        with torch.no_grad():
            for _ in range(count):
                for layer, a, b in zip(layers, inputs, outputs, strict=True):
                    F.linear(a, layer.weight, layer.bias)
                    _ = b.mT @ a
                    if layer is not first:
                        _ = b @ layer.weight
        return math.nan

    return steps


def compilations() -> list[str]:
    """Return the values of `compile` to compare: none while `Step` does not know the option."""
    return ["never", "always"] if "compile" in inspect.signature(Step).parameters else [""]


def our_name(compile: str) -> str:
    """Return the name of a row of ours."""
    return {"": OURS, "never": f"{OURS}, eager", "always": f"{OURS}, compiled"}[compile]


def options(compile: str) -> dict[str, Any]:
    """Return the keyword of `Step` and `fit`."""
    return {"compile": compile} if compile else {}


def ours(vae: VAE, size: int, compile: str) -> Steps:
    """Take the step as `fit` does: by `Step`, on a GPU a window of steps at a time."""
    step = Step(vae, size=size, learning_rate=RATE, **options(compile))

    def steps(x: Tensor, count: int) -> float:
        step.prepare({"x": x})
        value = math.nan
        for _ in range(count):
            value, _ = step(x)
        return value

    return steps


# -- epochs, loading included -----------------------------------------------------------------------------------------------


Ended = Callable[[float], None]
"""Called at the end of each epoch with its seconds; what it takes itself counts for no epoch."""


class Clock:
    """Times epochs.

    Args:
        device: whose work is waited for.
        ended: called at the end of each epoch.
    """

    def __init__(self, device: torch.device, ended: Ended) -> None:
        self.device, self.ended = device, ended
        self.start = time.perf_counter()

    def __call__(self) -> None:
        """Note an epoch's end, when its work is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.ended(time.perf_counter() - self.start)
        self.start = time.perf_counter()


Fit = Callable[[VAE, Tensor, int, int, int, Ended], VAE]
"""Fits a VAE (left as it is) to x (N, pixels) in batches for some epochs, with a seed; returns ours with what was learned."""


def fit_by_hand(vae: VAE, x: Tensor, batch: int, epochs: int, seed: int, ended: Ended, *, compiled: bool = False) -> VAE:
    """Fit by a loop over a shuffled tensor in memory."""
    torch.compiler.reset()  # every fit compiles for itself
    torch.manual_seed(seed)
    order = torch.Generator(x.device).manual_seed(seed)
    plain = Plain(vae)
    loss = torch.compile(plain) if compiled else plain
    optimizer = torch.optim.Adam(plain.parameters(), lr=RATE, fused=True)
    clock = Clock(x.device, ended)
    for _ in range(epochs):
        total = x.new_zeros(())
        for index in batches(len(x), batch, order):
            optimizer.zero_grad()
            value = loss(x[index], torch.randn(len(index), plain.latent_dim, device=x.device))
            value.backward()
            optimizer.step()
            total += value.detach()
        float(total)
        clock()
    return plain.into(vae)


def fit_by_svi(vae: VAE, x: Tensor, batch: int, epochs: int, seed: int, ended: Ended) -> VAE:
    """Fit by pyro.infer.SVI and a DataLoader, as Pyro's example does."""
    torch.manual_seed(seed)
    plain = Plain(vae)
    with pyro.get_param_store().scope():
        svi = Programs(plain).svi()
        loader = DataLoader(TensorDataset(x.cpu()), batch_size=batch, shuffle=True)
        clock = Clock(x.device, ended)
        for _ in range(epochs):
            total = 0.0
            for (part,) in loader:
                total += svi.step(part.to(x.device))
            clock()
    return plain.into(vae)


def our_fit(vae: VAE, x: Tensor, batch: int, epochs: int, seed: int, ended: Ended, *, compile: str) -> VAE:
    """Fit by `elbowroom.inference.fit.svi.fit`, without validation data and files."""
    torch.compiler.reset()
    vae = copy.deepcopy(vae)
    clock = Clock(x.device, ended)
    session = Session(seed=seed, report=lambda plan, row: clock())
    wanted: dict[str, Any] = {"epochs": epochs, "batch_size": batch, "learning_rate": RATE, "schedule": "constant"}
    fit(vae, x, x[:0], session, **wanted, device=str(x.device), **options(compile))
    return vae


def fit_by_pythae(vae: VAE, x: Tensor, batch: int, epochs: int, seed: int, ended: Ended) -> VAE:
    """Fit pythae's VAE by its BaseTrainer, with its own loader and its settings as they come (no worker, best loss kept)."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE as Theirs
    from pythae.models import VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import TrainingCallback

    plain = Plain(vae)

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            BaseEncoder.__init__(self)
            self.latent_dim, self.body = plain.latent_dim, plain.encoder

        def forward(self, x: Tensor) -> ModelOutput:
            mu, sigma = plain.guide(x)
            return ModelOutput(embedding=mu, log_covariance=2 * sigma.log())

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            BaseDecoder.__init__(self)
            self.body = plain.decoder

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=torch.sigmoid(self.body(z)))

    class Ends(TrainingCallback):
        def on_epoch_end(self, training_config: Any, **kwargs: Any) -> None:
            clock()

    config = VAEConfig(input_dim=(x.shape[1],), latent_dim=plain.latent_dim, reconstruction_loss="bce")
    model = Theirs(config, Encoder(), Decoder())
    data = BaseDataset(x.cpu(), torch.ones(len(x)))
    with tempfile.TemporaryDirectory() as folder, quiet():
        settings = BaseTrainerConfig(
            output_dir=folder,
            num_epochs=epochs,
            per_device_train_batch_size=batch,
            learning_rate=RATE,
            seed=seed,
            no_cuda=x.device.type == "cpu",
        )
        trainer = BaseTrainer(model, data, training_config=settings, callbacks=[Ends()])
        clock = Clock(x.device, ended)
        trainer.train()
    return plain.into(vae)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep a trainer's progress bars and log lines to themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield
    finally:
        logging.disable(before)
