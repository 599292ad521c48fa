"""Checks of every component on small facts, for `elbowroom components --check` and the property tests.

They run over all registered components. Those of priors, likelihoods and guides are in `properties`.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from elbowroom.components import registry
from elbowroom.components.slots import build
from elbowroom.conformance import properties
from elbowroom.errors import SpecError
from elbowroom.models.guides.base import AmortizedGuide
from elbowroom.models.guides.normal import DiagonalNormal
from elbowroom.models.likelihoods.continuous import Gaussian
from elbowroom.models.networks.mlp import Linear
from elbowroom.models.priors.standard import Normal
from elbowroom.models.vae import VAE
from elbowroom.spec import document

N, WIDTH, DIM = 6, 3, 2


def problems_of(kind: str, name: str, **options: Any) -> list[str]:
    """Build a component on small facts and return the rules of its kind that it breaks; [] if it breaks none.

    Required options must be given, except for the data set `file`.
    """
    problems: list[str] = []

    def expect(holds: bool, promise: str) -> None:
        if not holds and promise not in problems:
            problems.append(promise)

    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        if (kind, name) == ("data", "file") and not options:
            np.save(Path(folder) / "x.npy", np.arange(12.0).reshape(4, 3))
            options = {"path": "x.npy"}
        try:
            cls = registry.component(kind, name).cls
            chosen = registry.options_model(kind, name).model_validate({"name": name, **options})
            _round_trip(kind, name, chosen, expect)
            if kind == "prior":
                _prior(kind, name, options, expect)
            elif kind == "guide":
                properties.check_latents(kind, name, options, expect)
            elif kind == "likelihood":
                properties.check_likelihood(name, options, expect)
            elif kind == "network":
                _network(chosen, expect)
            else:
                check = {"data": _data, "reference": _reference, "objective": _objective}[kind]
                check(build(kind, chosen, folder=Path(folder)), expect)
            expect(bool(cls.__doc__), "has a docstring")
        except Exception as error:  # any error of a component is a failed check
            problems.append(f"raises {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return problems


Expect = Callable[[bool, str], None]


def _round_trip(kind: str, name: str, chosen: Any, expect: Expect) -> None:
    """Check that the options of a component survive writing to and reading from a spec."""
    written = document.write(chosen.model_dump(mode="json"))
    again = registry.options_model(kind, name).model_validate(document.parse(written, name))
    expect(again == chosen, "its options come back from a spec as they were")


def _prior(kind: str, name: str, options: dict[str, Any], expect: Expect) -> None:
    """Check the shape of z first, on which all later checks depend."""
    chosen = registry.options_model(kind, name).model_validate({"name": name, **options})
    family = DiagonalNormal(DIM)
    guide = AmortizedGuide(Linear((WIDTH,), family.param_dim), family)
    facts: dict[str, Any] = {"latent_dim": DIM, "covariate_dim": 0, "feature_shape": (WIDTH,), "guide": guide}
    prior = build(kind, chosen, **facts)
    with pyro.plate("data", N):
        z = prior()
    expect(tuple(z.shape) == (N, DIM), f"returns z of shape (N, latent_dim), got {tuple(z.shape)}")
    if tuple(z.shape) == (N, DIM):
        properties.check_latents(kind, name, options, expect)


def _data(source: Any, expect: Expect) -> None:
    expect(len(source.split) == 3, "split holds three fractions")
    if source.missing() is not None:  # checks do not download data
        return
    dataset = source.load()
    dataset.check()
    expect(dataset.labels is None or len(dataset.labels) == len(dataset), "one label per datum")
    expect(dataset.fingerprint() == source.load().fingerprint(), "loading twice gives the same data")


STEPS = 6
SHAPES: tuple[tuple[int, ...], ...] = ((WIDTH,), (STEPS, 6), (2, 9, 7))


def _network(chosen: Any, expect: Expect) -> None:
    """Check a network as an encoder and as a decoder of each kind of data that it supports: vectors, images, sequences."""
    roles = 0
    for shape in SHAPES:
        for in_shape, out_shape, latent_dim in ((shape, (4,), 0), ((STEPS,), (2, *shape), STEPS)):
            facts: dict[str, Any] = {
                "in_shape": in_shape,
                "out_dim": math.prod(out_shape),
                "out_shape": out_shape,
                "marks": False,
                "latent_dim": latent_dim,
            }
            try:
                network = build("network", chosen, **facts)
            except SpecError:
                continue
            roles += 1
            _maps(network.double(), in_shape, math.prod(out_shape), expect)
    expect(roles > 0, "takes vectors, images or sequences")


def _maps(network: nn.Module, in_shape: tuple[int, ...], out_dim: int, expect: Expect) -> None:
    x = torch.randn(5, N, *in_shape, dtype=torch.float64)
    network.train()
    _gradient(network, network(x).square().sum(), expect)
    network.eval()
    y = network(x)
    expect(tuple(y.shape) == (5, N, out_dim), f"maps (..., *in_shape) to (..., out_dim), got {tuple(y.shape)}")
    expect(torch.allclose(network(x[0]), y[0], rtol=1e-6, atol=1e-8), "a draw more or less changes no other")
    expect(torch.allclose(network(x[:, :2]), y[:, :2], rtol=1e-6, atol=1e-8), "in eval mode each datum stands alone")
    single = copy.deepcopy(network).float()(x.float()).double()
    expect(torch.allclose(single, y, rtol=1e-3, atol=1e-4), "single precision agrees with double")
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(network.state_dict())
    expect(torch.equal(other(x), y), "its state dict brings back the same map")


def _objective(objective: Any, expect: Expect) -> None:
    """Check an objective: finite, a gradient for every parameter, and N / B times the batch's estimate for N data."""
    discrete = not objective.continuous
    vae = properties.vae_with("prior", "categorical" if discrete else "normal", {}, facts=properties.TABLE)
    batch = properties.simulated(vae)
    vae.adapt(**batch)

    def estimate(size: int) -> Any:
        torch.manual_seed(1)
        return objective(vae.model, vae.guide, **batch, size=size)

    expect(objective.name == str(objective).split("(")[0], "its text starts with its name")
    expect(objective.discrete or bool(objective.needs), "says what it needs")
    one, three = estimate(N), estimate(3 * N)
    close = math.isclose(float(one.loss.detach()), one.objective, rel_tol=1e-4)
    expect(tuple(one.loss.shape) == () and close, "the loss is a scalar, and `objective` is its value")
    expect(math.isfinite(one.objective) and math.isfinite(one.elbo), "a finite estimate")
    expect(math.isclose(three.objective, 3 * one.objective, rel_tol=1e-6), "N data count N / B times the batch")
    expect(math.isclose(three.elbo, 3 * one.elbo, rel_tol=1e-6), "so does the plain ELBO beside it")
    named = list(vae.named_parameters())
    gradients = torch.autograd.grad(one.loss, [p for _, p in named], allow_unused=True)
    for (name, _), gradient in zip(named, gradients, strict=True):
        expect(gradient is not None and bool((gradient != 0).any()), f"the gradient reaches {name}")
        expect(gradient is None or bool(gradient.isfinite().all()), f"the gradient for {name} is finite")


def _mixture(loc: Tensor, weights: Tensor, logits: Tensor) -> tuple[Callable[[Tensor], None], Callable[[Tensor], None]]:
    """Return a mixture of normals and its guide; the category is the only latent."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc[kind], 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("kind", dist.Categorical(logits=logits))

    return model, guide


def _reference(reference: Any, expect: Expect) -> None:
    from elbowroom.analysis.audit.requested import UNTIL, heeds_the_clock

    if not heeds_the_clock(reference):
        expect(False, f"`__call__` takes a keyword `until`: {UNTIL}")
        return
    from elbowroom.inference.target.log_joint import LogJoint

    likelihood, family = Gaussian((WIDTH,), scale=0.5), DiagonalNormal(1)
    guide = AmortizedGuide(Linear((WIDTH,), family.param_dim), family)
    vae = VAE(Normal(1), likelihood, Linear((1,), WIDTH), guide).double()
    oracle = vae.linear_gaussian()
    assert oracle is not None
    x = torch.randn(N, WIDTH, dtype=torch.float64)
    log_joint = LogJoint(vae.model, vae.guide, x)
    refusal = reference.refusal(log_joint)
    if refusal is not None:
        _discrete_reference(reference, refusal, expect)
        return
    posterior = _promised(reference, log_joint, 1, expect)
    mean, sd = posterior.moments()
    exact, covariance = oracle.posterior(x)
    off = ((mean - exact) / covariance.diagonal().sqrt()).abs().max()
    expect(float(off.detach()) < 0.3, f"posterior mean within 0.3 sd of the closed form, off by {float(off.detach()):.2f}")
    if posterior.evidence is not None and posterior.evidence.kind == "exact":
        error = (posterior.evidence.value - oracle.log_evidence(x)).abs().max()
        expect(float(error.detach()) < 1e-3, f"evidence within 1e-3 of the closed form, off by {float(error.detach()):.2g}")


def _discrete_reference(reference: Any, refusal: str, expect: Expect) -> None:
    """Check a reference that refuses continuous latents on a mixture of two normals."""
    from elbowroom.inference.target.log_joint import LogJoint

    x = torch.randn(N, dtype=torch.float64)
    loc = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    log_joint = LogJoint(*_mixture(loc, loc.new_tensor([0.3, 0.7]), torch.zeros(2, dtype=torch.float64)), x)
    again = reference.refusal(log_joint)
    expect(again is None, f"takes a linear-Gaussian model with one latent, or a discrete mixture; it says: {refusal}")
    if again is not None:
        return
    posterior = _promised(reference, log_joint, 0, expect)
    expect(tuple(posterior.sites["kind"].shape[2:]) == (N,), "draws of the discrete site, (chain, draw, N)")
    exact = torch.logsumexp(loc.new_tensor([0.3, 0.7]).log() + dist.Normal(loc, 1.0).log_prob(x[:, None]), -1)
    if posterior.evidence is not None and posterior.evidence.kind == "exact":
        error = float((posterior.evidence.value - exact).abs().max())
        expect(error < 1e-3, f"evidence within 1e-3 of the sum over both values, off by {error:.2g}")


def _promised(reference: Any, log_joint: Any, dim: int, expect: Expect) -> Any:
    posterior = reference(log_joint, keep=400, seed=0, until=math.inf)
    expect(posterior.method == type(reference).name, "names itself in its posterior")
    expect(tuple(posterior.draws.shape[2:]) == (N, dim), "draws of shape (chain, draw, N, d)")
    expect(len(posterior.status) == N == len(posterior.reason), "a status and a reason per datum")
    return posterior


def _gradient(module: nn.Module, value: Tensor, expect: Expect, *inputs: Tensor) -> None:
    """Check that `value` has a finite gradient that is not zero everywhere, for every parameter and input."""
    named = [*module.named_parameters(), *((f"input {i}", x) for i, x in enumerate(inputs))]
    if not named:
        return
    gradients = torch.autograd.grad(value, [p for _, p in named], allow_unused=True)
    for (name, _), gradient in zip(named, gradients, strict=True):
        expect(gradient is not None and bool((gradient != 0).any()), f"the gradient reaches {name}")
        expect(gradient is None or bool(gradient.isfinite().all()), f"the gradient for {name} is finite")
