"""What every component promises, tested on small facts: `elbowroom components --check`, and the property tests.

A component that is registered is checked by existing: shapes, support, finite densities, and a gradient that reaches
every parameter.
"""

from __future__ import annotations

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

from elbowroom import components
from elbowroom.models.guides import AmortizedGuide, DiagonalNormal
from elbowroom.models.likelihoods import Gaussian
from elbowroom.models.networks import Linear
from elbowroom.models.priors import Normal
from elbowroom.models.vae import VAE

N, WIDTH, DIM = 6, 3, 2


def problems_of(kind: str, name: str, **options: Any) -> list[str]:
    """Build a component on small facts and return what it does not keep of its kind's protocol; [] when all is well.

    Args:
        kind: its kind.
        name: its name.
        options: its options; required ones must be given, except for the data set `file`.
    """
    problems: list[str] = []

    def expect(holds: bool, promise: str) -> None:
        if not holds:
            problems.append(promise)

    checks: dict[str, Callable[..., None]] = {
        "data": _data,
        "prior": _prior,
        "likelihood": _likelihood,
        "network": _network,
        "guide": _guide,
        "objective": _objective,
        "reference": _reference,
    }
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        if (kind, name) == ("data", "file") and not options:
            np.save(Path(folder) / "x.npy", np.arange(12.0).reshape(4, 3))
            options = {"path": "x.npy"}
        try:
            chosen = components.options_model(kind, name).model_validate({"name": name, **options})
            facts: dict[str, Any] = {
                "folder": Path(folder),
                "latent_dim": DIM,
                "event_shape": (WIDTH,),
                "in_shape": (WIDTH,),
                "out_dim": 4,
            }
            checks[kind](components.build(kind, chosen, **facts), expect)
        except Exception as error:  # whatever a component raises is its failure
            problems.append(f"raises {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return problems


Expect = Callable[[bool, str], None]


def _data(source: Any, expect: Expect) -> None:
    expect(len(source.split) == 3, "split holds three fractions")
    if source.missing() is not None:  # nothing is downloaded for a check
        return
    dataset = source.load()
    dataset.check()
    expect(dataset.labels is None or len(dataset.labels) == len(dataset), "one label per datum")
    expect(dataset.fingerprint() == source.load().fingerprint(), "loading twice gives the same data")


def _prior(prior: Any, expect: Expect) -> None:
    def program() -> Tensor:
        with pyro.plate("data", N):
            return prior()

    trace = pyro.poutine.trace(program).get_trace()
    z = trace.nodes["_RETURN"]["value"]
    expect(tuple(z.shape) == (N, DIM), f"returns z of shape (N, latent_dim), got {tuple(z.shape)}")
    latent = [site for site in trace.nodes.values() if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample"]
    sites = [site for site in latent if site["name"] != "data"]
    expect(bool(sites), "draws a sample site")
    expect(prior.latent_dim == DIM, "states latent_dim")
    for site in sites:
        inside = site["fn"].support.check(site["value"])
        expect(bool(inside.all()), f"site {site['name']!r}: draws lie in its support")
    density = sum(site["fn"].log_prob(site["value"]).sum() for site in sites)
    expect(bool(torch.as_tensor(density).isfinite()), "finite log density")
    _gradient(prior, torch.as_tensor(density), expect)


def _likelihood(likelihood: Any, expect: Expect) -> None:
    params = (0.5 * torch.randn(N, likelihood.param_dim)).requires_grad_()
    p = likelihood(params)
    expect(tuple(p.event_shape) == (WIDTH,), f"event shape {(WIDTH,)}, got {tuple(p.event_shape)}")
    expect(tuple(p.batch_shape) == (N,), f"batch shape {(N,)}, got {tuple(p.batch_shape)}")
    x = p.sample()
    expect(bool(p.support.check(x).all()), "samples lie in the distribution's support")
    expect(likelihood.problem(x) is None, "`problem` accepts its own samples")
    likelihood.adapt(x)
    p = likelihood(params)
    expect(bool(p.log_prob(x).isfinite().all()), "finite log density of its own samples")
    _gradient(likelihood, p.log_prob(x).sum(), expect, params)


def _network(network: Any, expect: Expect) -> None:
    x = torch.randn(5, N, WIDTH)
    y = network(x)
    expect(tuple(y.shape) == (5, N, 4), f"maps (..., *in_shape) to (..., out_dim), got {tuple(y.shape)}")
    torch.testing.assert_close(network(x[0]), y[0], rtol=1e-4, atol=1e-5)
    _gradient(network, y.square().sum(), expect)


def _guide(family: Any, expect: Expect) -> None:
    params = torch.randn(N, family.param_dim).requires_grad_()
    q = family(params)
    expect(tuple(q.event_shape) == (DIM,), f"event shape {(DIM,)}, got {tuple(q.event_shape)}")
    expect(tuple(q.batch_shape) == (N,), f"batch shape {(N,)}, got {tuple(q.batch_shape)}")
    z = q.rsample()
    expect(bool(q.support.check(z.detach()).all()), "draws lie in its support")
    expect(bool(q.log_prob(z).isfinite().all()), "finite log density")
    # a draw's own density need not depend on the location: the draw itself does
    _gradient(family, q.log_prob(z.detach()).sum() + z.square().sum(), expect, params)


def _objective(objective: Any, expect: Expect) -> None:
    x = torch.randn(N, WIDTH)
    likelihood, family = Gaussian((WIDTH,), scale=0.5), DiagonalNormal(DIM)
    guide = AmortizedGuide(Linear((WIDTH,), family.param_dim), family)
    vae = VAE(Normal(DIM), likelihood, Linear((DIM,), WIDTH), guide)
    programs: tuple[Any, Any] = (vae.model, vae.guide)
    modules: nn.Module = vae
    if not objective.continuous:
        modules = nn.ParameterList([torch.zeros(N, 2)])
        programs = _mixture(torch.tensor([-1.0, 1.0]), x.new_tensor([0.3, 0.7]), modules[0])
        x = x[:, 0]
    expect(objective.name == str(objective).split("(")[0], "its text starts with its name")
    expect(objective.discrete or bool(objective.needs), "says what it needs")
    estimate = objective(*programs, x)
    expect(tuple(estimate.loss.shape) == (), "the loss is a scalar")
    expect(math.isfinite(estimate.objective) and math.isfinite(estimate.elbo), "finite objective and ELBO")
    close = math.isclose(float(estimate.loss.detach()), estimate.objective, rel_tol=1e-4)
    expect(close, "`objective` is the value of the loss")
    _gradient(modules, estimate.loss, expect)


def _mixture(loc: Tensor, weights: Tensor, logits: Tensor) -> tuple[Callable[[Tensor], None], Callable[[Tensor], None]]:
    """Return a mixture of normals and its guide, categories as the one latent."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            kind = pyro.sample("kind", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc[kind], 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("kind", dist.Categorical(logits=logits))

    return model, guide


def _reference(reference: Any, expect: Expect) -> None:
    from elbowroom.analysis.planning import UNTIL, heeds_the_clock

    if not heeds_the_clock(reference):
        expect(False, f"`__call__` takes a keyword `until`: {UNTIL}")
        return
    from elbowroom.inference.target import LogJoint

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
    from elbowroom.inference.target import LogJoint

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
    """Run a reference and check the layout of what it returns."""
    posterior = reference(log_joint, keep=400, seed=0, until=math.inf)
    expect(posterior.method == type(reference).name, "names itself in its posterior")
    expect(tuple(posterior.draws.shape[2:]) == (N, dim), "draws of shape (chain, draw, N, d)")
    expect(len(posterior.status) == N == len(posterior.reason), "a status and a reason per datum")
    return posterior


def _gradient(module: nn.Module, value: Tensor, expect: Expect, *inputs: Tensor) -> None:
    """Expect a gradient of `value` for every parameter and input that is finite and not zero everywhere."""
    named = [*module.named_parameters(), *((f"input {i}", x) for i, x in enumerate(inputs))]
    if not named:
        return
    gradients = torch.autograd.grad(value, [p for _, p in named], allow_unused=True)
    for (name, _), gradient in zip(named, gradients, strict=True):
        expect(gradient is not None and bool((gradient != 0).any()), f"the gradient reaches {name}")
        expect(gradient is None or bool(gradient.isfinite().all()), f"the gradient for {name} is finite")
