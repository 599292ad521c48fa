"""Checks of priors, likelihoods and guide families inside a small VAE, assembled from a spec.

Densities integrate or sum to one; draws have the moments of the density; NaN removes only its own factor; the log joint equals
Pyro's trace; single precision agrees with double; a state dict restores the weights; a gradient reaches every parameter.
No component is named here, so that a user's own components get the same checks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from elbowroom.components import compatibility, registry
from elbowroom.inference.objectives.elbo import ELBO
from elbowroom.inference.target.discrete import table
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.inference.target.of_vae import log_joint_of
from elbowroom.models import spaces
from elbowroom.models.columns import Column
from elbowroom.models.likelihoods.base import Likelihood
from elbowroom.models.vae import VAE
from elbowroom.spec import spec
from elbowroom.spec.assembly import Facts, assemble, restore

Expect = Callable[[bool, str], None]

N, WIDTH = 6, 3
SIGMAS = 4.5
TABLE = Facts(
    event_shape=(WIDTH,),
    levels=5,
    columns=(Column("a", "real"), Column("b", "count"), Column("c", "categorical", 4)),
    covariates=("dose", "age"),
)
PRIORS = {
    "real": "normal",
    "positive": "log_normal",
    "simplex": "dirichlet",
    "sphere": "von_mises_fisher",
    "one_hot": "categorical",
    "binary": "bernoulli",
}
"""Space of a guide family -> a prior with this space."""


def vae_with(
    kind: str, name: str, options: Mapping[str, Any], *, latent_dim: int = 2, facts: Facts = TABLE, seed: int = 0
) -> VAE:
    """Assemble a small VAE around one component (a SpecError if it refuses options or facts), in double precision."""
    cls = registry.component(kind, name).cls
    chosen: dict[str, Any] = {"name": name, **options}
    prior: dict[str, Any] = {"name": "normal"}
    family: dict[str, Any] = {"name": "diagonal_normal"}
    if kind == "prior":
        prior, family = (
            chosen,
            {"name": "hierarchical" if len(_sites(cls)) > 1 else compatibility.NATURAL[compatibility.space_of(cls)]},
        )
    if kind == "guide":
        family, prior = chosen, {"name": "hierarchical" if len(_sites(cls)) > 1 else PRIORS[compatibility.space_of(cls)]}
    for block in (prior, family):  # one unconstrained dimension for each level, so that the density is integrated over a plane
        if block["name"] == "hierarchical" and latent_dim == 1 and "top_dim" not in block:
            block["top_dim"] = 1
    if family["name"] == "hierarchical":
        family.pop("top_dim", None)
    loaded = spec.validate(
        {
            "data": "memory",
            "model": {
                "latent_dim": latent_dim,
                "prior": prior,
                "likelihood": chosen if kind == "likelihood" else {"name": "gaussian", "scale": 1.0},
                "decoder": {"name": "mlp", "hidden": [8]},
            },
            "guide": {"family": family, "encoder": {"name": "mlp", "hidden": [8]}},
        },
        allow_python=True,  # the user has allowed the component already, since it was found above
    )
    torch.manual_seed(seed)
    return assemble(loaded.spec, facts).double()


def _sites(cls: type) -> tuple[str, ...]:
    return tuple(getattr(cls, "sites", ("z",)))


def simulated(vae: VAE, facts: Facts = TABLE, n: int = N) -> dict[str, Tensor]:
    """Draw x from the model, covariates from N(0, 1); return the arguments of model and guide."""
    c = len(facts.covariates)
    beside: dict[str, Any] = {"covariates": torch.randn(n, c, dtype=torch.float64)} if c else {}
    with torch.no_grad():
        return {"x": vae.model(**beside, n=n).double(), **beside}


def check_latents(kind: str, name: str, options: Mapping[str, Any], expect: Expect) -> None:
    """Check a prior or a guide family."""
    space = compatibility.space_of(registry.component(kind, name).cls)
    least = 2 if space == "one_hot" else spaces.least(space)
    small = vae_with(kind, name, options, latent_dim=least)
    batch = simulated(small, n=2)
    small.adapt(**batch)
    joint = log_joint_of(small.eval(), batch)
    if joint.dim == 0:
        found = table(joint)
        mass = (found.log_prior if kind == "prior" else found.log_guide).exp().sum(0)
        expect(bool(((mass - 1).abs() < 1e-6).all()), f"probabilities sum to 1, got {mass.tolist()}")
    else:
        _normalised(joint, kind, expect, real=space == "real")
    vae = vae_with(kind, name, options, latent_dim=3)
    batch = simulated(vae)
    vae.adapt(**batch)
    part = vae.prior if kind == "prior" else vae.posterior.family
    expect(part.latent_dim == 3, "states latent_dim")
    check_program(vae, batch, part, expect, gradient=kind)


def _normalised(joint: LogJoint, kind: str, expect: Expect, *, real: bool) -> None:
    """Check that the density integrates to 1 over its unconstrained coordinates, and that draws have its bounded moments."""
    log_stretch: Tensor | float = 0.0
    if joint.dim == 1 and real:  # a very wide range, for heavy tails
        axis = torch.linspace(-30, 30, 24_001, dtype=torch.float64)
        z, cell, log_stretch = axis.sinh()[:, None], float(axis[1] - axis[0]), axis.cosh().log()[:, None]
    elif joint.dim == 1:
        axis = torch.linspace(-80, 80, 24_001, dtype=torch.float64)
        z, cell = axis[:, None], float(axis[1] - axis[0])
    else:
        axis = torch.linspace(-15, 15, 301, dtype=torch.float64)
        z, cell = torch.cartesian_prod(*[axis] * joint.dim), float(axis[1] - axis[0]) ** joint.dim
    points = z[:, None].expand(-1, joint.n_obs, -1)
    with torch.no_grad():
        log_p = (joint.terms(points)[0] if kind == "prior" else joint.log_guide(points)) + log_stretch
    mass = log_p.exp().sum(0) * cell
    expect(bool(((mass - 1).abs() < 2e-3).all()), f"its density integrates to 1, got {[round(m, 5) for m in mass.tolist()]}")
    draws = joint.sample_prior(4000, 3) if kind == "prior" else joint.sample_guide(4000, 3)[0]
    weight = (log_p - torch.logsumexp(log_p, 0)).exp()[..., None]
    for what, f in (("tanh z", torch.tanh), ("cos z", torch.cos)):
        exact = (weight * f(points)).sum(0)
        error = (f(draws).mean(0) - exact).abs() / (f(draws).std(0) / len(draws) ** 0.5 + 1e-9)
        expect(bool((error < SIGMAS).all()), f"draws have the density's mean of {what}, off by {float(error.max()):.1f} SE")


def check_likelihood(name: str, options: Mapping[str, Any], expect: Expect) -> None:
    """Check a likelihood, with and without missing entries in the data."""
    vae = vae_with("likelihood", name, options)
    batch = simulated(vae, n=40)
    vae.adapt(**batch)
    likelihood = vae.likelihood
    z = torch.randn(40, 2, dtype=torch.float64)
    with torch.no_grad():
        p = vae.decode(z, batch["covariates"])
        expect(tuple(p.event_shape) == (WIDTH,), f"event shape {(WIDTH,)}, got {tuple(p.event_shape)}")
        expect(tuple(p.batch_shape) == (40,), f"batch shape (N,), got {tuple(p.batch_shape)}")
        x = p.sample().double()
        expect(bool(p.support.check(x).all()), "samples lie in the distribution's support")
        expect(likelihood.problem(x) is None, f"`problem` accepts its own samples; it says: {likelihood.problem(x)}")
        expect(bool(p.log_prob(x).isfinite().all()), "finite log density of its own samples")
        centre = likelihood.centre(p)
        expect(centre.shape == x.shape and bool(centre.isfinite().all()), "`centre` is finite, (N, *event)")
        seen = likelihood.features(x)
        expect(tuple(seen.shape[1:]) == tuple(likelihood.feature_shape), f"features of shape {likelihood.feature_shape}")
        expect(bool(seen.isfinite().all()), "finite features")
        _moments(likelihood, p, expect)
        _holes(likelihood, p, x, expect)
    _one_entry(name, options, expect)
    check_program(vae, {**batch, "x": x}, likelihood, expect, gradient="likelihood")
    holed = x.clone()
    holed[::2, 0] = torch.nan
    check_program(vae, {**batch, "x": holed}, likelihood, expect, gradient="")


def _moments(likelihood: Likelihood, p: Any, expect: Expect) -> None:
    """Compare the stated mean of each entry, if it exists, with that of draws."""
    try:
        mean, variance = p.mean, p.variance
    except NotImplementedError:
        return
    draws = p.sample((4000,)).double()
    error = (draws.mean(0) - mean).abs() / ((variance / len(draws)).sqrt() + 1e-9)
    known = mean.isfinite() & variance.isfinite()
    # 120 means are compared, and heavy tails converge slowly to normality: hence the wider tolerance
    expect(bool((error[known] < SIGMAS + 1).all()), "draws have the stated mean")


def _holes(likelihood: Likelihood, p: Any, x: Tensor, expect: Expect) -> None:
    """Check that missing entries have no effect; for independent entries, the factors of the others do not change."""

    def log_prob(seen: list[int], value: Tensor = x) -> Tensor:
        missing = torch.ones_like(x, dtype=torch.bool)
        missing[:, seen] = False
        given = torch.where(missing, torch.nan, value)
        found: Tensor = likelihood.incomplete(p, missing).log_prob(given)
        return found

    columns = list(range(WIDTH))
    expect(bool((log_prob([]).abs() < 1e-12).all()), "with nothing observed, log p(x|z) = 0")
    torch.testing.assert_close(log_prob(columns), p.log_prob(x), rtol=1e-9, atol=1e-9)
    if type(likelihood).incomplete is Likelihood.incomplete:
        alone = torch.stack([log_prob([j]) for j in columns]).sum(0)
        close = torch.allclose(alone, p.log_prob(x), rtol=1e-8, atol=1e-8)
        expect(close, "a missing entry leaves out its own factor and no other")


def _one_entry(name: str, options: Mapping[str, Any], expect: Expect) -> None:
    """Check that p(x|z) of a datum with a single entry integrates or sums to 1."""
    for column in TABLE.columns or ():
        facts = Facts(event_shape=(1,), levels=TABLE.levels, columns=(column,))
        vae = vae_with("likelihood", name, options, facts=facts)
        vae.adapt(**simulated(vae, facts, n=20))
        if type(vae.likelihood).incomplete is not Likelihood.incomplete:
            return  # given the total, a single entry is not random
        with torch.no_grad():
            p = vae.decode(torch.randn(1, 2, dtype=torch.float64))
            base: Any = p.support
            while hasattr(base, "base_constraint"):
                base = base.base_constraint
            if p.support.is_discrete:
                x = torch.arange(0.0, 20_000.0, dtype=torch.float64)
                x = x[base.check(x[:, None]).reshape(len(x), -1).all(-1)]
                mass = p.log_prob(x[:, None]).exp().sum()
            else:
                to = biject_to(base)
                u = torch.linspace(-60, 60, 240_001, dtype=torch.float64)
                wide = base is constraints.real  # a wide range, for heavy tails
                x = u.sinh() if wide else to(u)
                stretch = u.cosh().log() if wide else to.log_abs_det_jacobian(u, x)
                density = (p.log_prob(x[:, None]) + stretch).exp()
                mass = density.nan_to_num(nan=0.0).sum() * (u[1] - u[0])
                mass = mass + sum(p.log_prob(x.new_full((1, 1), atom)).exp().sum() for atom in vae.likelihood.atoms)
            expect(abs(float(mass) - 1) < 2e-3, f"p(x|z) of one entry adds up to 1, got {float(mass):.5f}")


def check_program(vae: VAE, batch: Mapping[str, Tensor], part: nn.Module, expect: Expect, *, gradient: str) -> None:
    """Check a component in the model and guide of a VAE, through the log joint.

    Args:
        vae: in double precision.
        batch: arguments of model and guide.
        part: the component.
        expect: called with each check.
        gradient: kind of the component whose parameters a gradient must reach; "" for none.
    """
    batch = {key: value.float().double() for key, value in batch.items()}  # the same numbers in either precision
    joint = log_joint_of(vae.eval(), batch)
    z = joint.probe_points
    values = joint(z)
    _same_as_trace(vae, batch, joint, z[0], values[0], expect)
    single = log_joint_of(copy.deepcopy(vae).float(), {name: value.float() for name, value in batch.items()}, dtype=None)
    close = torch.allclose(single(z.float()).double(), values, rtol=1e-3, atol=2e-2)
    expect(close, "single precision agrees with double")
    expect(joint.separable(), "a row has the same densities alone as among others")
    other = copy.deepcopy(vae)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    restore(other, {name: value.clone() for name, value in vae.state_dict().items()})
    again = log_joint_of(other.eval(), batch)
    same = torch.equal(again(z), values) and torch.equal(again.log_guide(z), joint.log_guide(z))
    expect(same, "its state dict brings back the same densities")
    expect(type(part).__name__ in repr(part), "its text names it")
    if gradient:
        _gradient(vae, batch, part, expect)


def _same_as_trace(vae: VAE, batch: Mapping[str, Tensor], joint: LogJoint, z: Tensor, value: Tensor, expect: Expect) -> None:
    """Check that the log joint, summed over data, equals Pyro's log probability of the trace plus the log Jacobian."""
    beside: dict[str, Any] = dict(batch)
    jacobian = torch.zeros((), dtype=torch.float64)
    sites: dict[str, Tensor] = {}
    for site in joint.sites:
        if site.transform is None:
            return
        u = site.split(z)
        sites[site.name] = site.transform(u)
        jacobian = jacobian + site.transform.log_abs_det_jacobian(u, sites[site.name]).sum()
    totals = []
    with torch.no_grad(), pyro.validation_enabled(False):
        for assignment in joint.program.assignments:
            held = {name: v.expand(joint.n_obs, *v.shape[-1:]) for name, v in assignment.items()}
            model = poutine.condition(vae.model, data={**sites, **held})
            trace = poutine.trace(model).get_trace(**beside)
            trace.compute_log_prob()
            nodes = [node for node in trace.nodes.values() if node["type"] == "sample"]
            totals.append(sum(node["log_prob"] for node in nodes if node["log_prob"].shape == (joint.n_obs,)))
    summed = torch.logsumexp(torch.stack([torch.as_tensor(t) for t in totals]), 0).sum() + jacobian
    expect(bool(torch.allclose(summed, value.sum(), rtol=1e-8, atol=1e-7)), "the log joint equals the trace's")


def _gradient(vae: VAE, batch: Mapping[str, Tensor], part: nn.Module, expect: Expect) -> None:
    """Check that the ELBO has a finite gradient for every parameter that is, over a few draws, not zero everywhere."""
    vae.train()
    named, arguments = list(part.named_parameters()), dict[str, Any](batch)
    total = {name: torch.zeros_like(parameter) for name, parameter in named}
    for _ in range(3):
        vae.zero_grad()
        ELBO()(vae.model, vae.guide, **arguments).loss.backward()
        for name, parameter in named:
            total[name] += torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.abs()
    vae.zero_grad()
    for name, gradient in total.items():
        expect(bool((gradient != 0).any()), f"the gradient reaches {name}")
        expect(bool(gradient.isfinite().all()), f"the gradient for {name} is finite")
    vae.eval()
