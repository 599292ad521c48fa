"""Latents that a mask takes out, by the data or by a discrete latent: log p(x) equals a sum or a lattice written by hand.

Where no density exists, the program is refused. Each kind of gate is written in several spellings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from elbowroom.analysis.audit.auditor import audit
from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.target.discrete import table
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.inference.target.simulate import simulate

F64 = torch.float64
X = torch.tensor([-2.5, -0.4, 0.3, 1.1, 3.0], dtype=F64)
Gated = Callable[[str, Any, Tensor], Tensor]


def by_poutine(name: str, fn: Any, keep: Tensor) -> Tensor:
    with poutine.mask(mask=keep):
        return pyro.sample(name, fn)


def by_dist(name: str, fn: Any, keep: Tensor) -> Tensor:
    return pyro.sample(name, fn.mask(keep))


def by_event(name: str, fn: Any, keep: Tensor) -> Tensor:
    """A mask inside `.to_event`, as AIR writes it."""
    column = {parameter: getattr(fn, parameter).expand(keep.shape)[..., None] for parameter in fn.arg_constraints}
    return pyro.sample(name, type(fn)(**column).mask(keep[..., None]).to_event(1))[..., 0]


SPELLINGS = [by_poutine, by_dist, by_event]


def evidence(model: Any, guide: Any, *args: Any) -> Tensor:
    """Return log p(x) by importance sampling from the guide, with 40,000 draws."""
    log_joint = LogJoint(model, guide, *args)
    z, log_q = log_joint.sample_guide(40_000, 0)
    return torch.logsumexp(log_joint(z) - log_q, 0) - torch.log(torch.tensor(40_000.0, dtype=F64))


def normal(loc: Any, scale: Any, x: Tensor) -> Tensor:
    return dist.Normal(torch.as_tensor(loc, dtype=F64), torch.as_tensor(scale, dtype=F64)).log_prob(x)


# -- a continuous latent behind a discrete one ------------------------------------------------------------------------------


def pair(gated: Gated, share: float, prior: tuple[float, float], loc: Tensor, scale: float) -> tuple[Any, Any]:
    """x = c z + e, and z is there where c = 1; the guide draws c with a probability of its own."""

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            c = pyro.sample("c", dist.Bernoulli(torch.full((len(x),), share, dtype=F64)))
            z = gated("z", dist.Normal(torch.full((len(x),), prior[0], dtype=F64), prior[1]), c.bool())
            pyro.sample("x", dist.Normal(c * z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            c = pyro.sample("c", dist.Bernoulli(torch.full((len(x),), 0.4, dtype=F64)))
            gated("z", dist.Normal(loc[: len(x)], scale), c.bool())

    return model, guide


@pytest.mark.parametrize("gated", SPELLINGS)
@pytest.mark.parametrize(("share", "prior"), [(0.5, (0.0, 1.0)), (0.2, (3.0, 0.2)), (0.9, (-1.0, 4.0))])
def test_a_latent_behind_a_bernoulli(gated: Gated, share: float, prior: tuple[float, float]) -> None:
    precision = prior[1] ** -2 + 1
    loc = (prior[0] * prior[1] ** -2 + X) / precision + 0.2
    model, guide = pair(gated, share, prior, loc, 1.3 * precision**-0.5)
    with_it = normal(prior[0], (1 + prior[1] ** 2) ** 0.5, X)
    exact = torch.log((1 - share) * normal(0.0, 1.0, X).exp() + share * with_it.exp())
    torch.testing.assert_close(evidence(model, guide, X), exact, atol=0.03, rtol=0.0)


@pytest.mark.parametrize("gated", SPELLINGS)
def test_the_grid_is_exact_and_an_exact_guide_has_no_gap(gated: Gated) -> None:
    there = normal(0.0, 2**0.5, X)
    exact = torch.logsumexp(torch.stack([normal(0.0, 1.0, X), there]), 0) - torch.log(torch.tensor(2.0, dtype=F64))
    probability = (there - exact).exp() / 2

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            c = pyro.sample("c", dist.Bernoulli(probability[: len(x)]))
            gated("z", dist.Normal(x / 2, 0.5**0.5), c.bool())

    model, _ = pair(gated, 0.5, (0.0, 1.0), X, 1.0)
    result = audit(model, guide, X, references=["grid"], diagnose=False)
    torch.testing.assert_close(torch.tensor(result.table["log_evidence"].values), exact, atol=1e-6, rtol=0.0)
    torch.testing.assert_close(torch.tensor(result.table["elbo"].values), exact, atol=1e-6, rtol=0.0)
    assert "'z' is masked where a discrete site says so" in result.table.attrs["notes"]


def test_draws_follow_the_density_that_is_stated() -> None:
    """At draws of the prior q/p has mean one, if the draws, p and q all take the same density where z is masked."""
    model, guide = pair(by_dist, 0.3, (2.0, 0.5), 2.1 + 0.02 * X, 0.45)
    log_joint = LogJoint(model, guide, X)
    z = log_joint.sample_prior(20_000, 1)
    prior, _ = log_joint.terms(z)
    ratio = (log_joint.log_guide(z) - prior).exp()
    error = ratio.std(0) / 20_000**0.5
    assert ((ratio.mean(0) - 1).abs() < 4.5 * error).all()
    other, truth = simulate(log_joint, seed=0)
    assert other(truth[None]).isfinite().all()


def test_a_lattice_of_two_gates_and_a_positive_latent() -> None:
    """Two steps, of which the second is there only after the first: x = z1 c1 + z2 c2 + e, z2 > 0."""

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            c1 = pyro.sample("c1", dist.Bernoulli(torch.full((len(x),), 0.6, dtype=F64)))
            z1 = by_dist("z1", dist.Normal(torch.zeros(len(x), dtype=F64), 1.0), c1.bool())
            c2 = pyro.sample("c2", dist.Bernoulli(0.5 * c1))
            z2 = by_dist("z2", dist.LogNormal(torch.zeros(len(x), dtype=F64), 0.5), c2.bool())
            pyro.sample("x", dist.Normal(z1 * c1 + z2 * c2, 0.7), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            c1 = pyro.sample("c1", dist.Bernoulli(torch.full((len(x),), 0.5, dtype=F64)))
            by_dist("z1", dist.Normal(0.5 * x, 1.0), c1.bool())
            c2 = pyro.sample("c2", dist.Bernoulli(0.5 * c1))
            by_dist("z2", dist.LogNormal(torch.zeros(len(x), dtype=F64), 0.6), c2.bool())

    v = torch.linspace(-6, 6, 4001, dtype=F64)  # of log z2 in units of its deviation
    z2, weight = (0.5 * v).exp(), normal(0.0, 1.0, v).exp() * (v[1] - v[0])
    none, first = normal(0.0, 0.7, X).exp(), normal(0.0, (1 + 0.49) ** 0.5, X).exp()
    both = (normal(z2[:, None], (1 + 0.49) ** 0.5, X[None]).exp() * weight[:, None]).sum(0)
    exact = (0.4 * none + 0.3 * first + 0.3 * both).log()
    torch.testing.assert_close(evidence(model, guide, X), exact, atol=0.03, rtol=0.0)


@pytest.mark.parametrize("gated", SPELLINGS[:2])
def test_a_category_in_an_inner_plate_of_latents(gated: Gated) -> None:
    """k = 0, 1, 2 of the two entries of z are there; the likelihood sees their sum."""
    probabilities = torch.tensor([0.2, 0.5, 0.3], dtype=F64)

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-2):
            k = pyro.sample("k", dist.Categorical(probabilities.expand(len(x), 1, 3)))
            keep = torch.arange(2) < k
            with pyro.plate("parts", 2, dim=-1):
                z = gated("z", dist.Normal(torch.ones(len(x), 2, dtype=F64), 1.0), keep)
            pyro.sample("x", dist.Normal((z * keep).sum(-1, keepdim=True), 1.0), obs=x[:, None])

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-2):
            k = pyro.sample("k", dist.Categorical(torch.full((len(x), 1, 3), 1 / 3, dtype=F64)))
            with pyro.plate("parts", 2, dim=-1):
                gated("z", dist.Normal(torch.full((len(x), 2), 0.8, dtype=F64), 1.1), torch.arange(2) < k)

    exact = sum(probabilities[k] * normal(float(k), (1 + k) ** 0.5, X).exp() for k in range(3)).log()
    torch.testing.assert_close(evidence(model, guide, X), exact, atol=0.03, rtol=0.0)


def test_some_of_the_data_have_the_values_that_all_have() -> None:
    model, guide = pair(by_dist, 0.3, (2.0, 0.5), X, 0.7)
    log_joint = LogJoint(model, guide, X)
    z = log_joint.sample_prior(3, 0)
    rows = torch.tensor([4, 1])
    part, _, at = log_joint.some(rows)
    torch.testing.assert_close(part(z[:, rows] if part is not log_joint else z)[:, at], log_joint(z)[:, rows])
    again = log_joint.converted(torch.float32)
    torch.testing.assert_close(again(z.float()).double(), log_joint(z), atol=1e-4, rtol=1e-4)


# -- masks by the data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", SPELLINGS)
def test_a_mask_by_the_data_leaves_the_latent_out(gated: Gated) -> None:
    there = torch.tensor([True, False, True, False, True])

    def model(x: Tensor, m: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = gated("z", dist.Gamma(torch.full((len(x),), 3.0, dtype=F64), 2.0), m)
            pyro.sample("x", dist.Normal(z * m, 1.0), obs=x)

    def guide(x: Tensor, m: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            gated("z", dist.Gamma(torch.full((len(x),), 2.5, dtype=F64), 1.7), m)

    z = torch.linspace(1e-6, 30, 60_001, dtype=F64)
    weight = dist.Gamma(torch.tensor(3.0, dtype=F64), 2.0).log_prob(z).exp() * (z[1] - z[0])
    with_it = (normal(z[:, None], 1.0, X[None]).exp() * weight[:, None]).sum(0).log()
    exact = torch.where(there, with_it, normal(0.0, 1.0, X))
    torch.testing.assert_close(evidence(model, guide, X, there), exact, atol=0.03, rtol=0.0)
    log_joint = LogJoint(model, guide, X, there)
    assert log_joint.program.active is not None
    assert log_joint.constrain(log_joint.sample_prior(1, 0))["z"][0].flatten()[~there].isnan().all()


@pytest.mark.parametrize("spelling", ["poutine", "dist", "obs_mask", "nan"])
def test_observed_entries_behind_a_mask_are_no_data(spelling: str) -> None:
    """x_n is seen for some data; a discrete latent chooses its mean."""
    seen = torch.tensor([True, False, True, True, False])
    means = torch.tensor([-1.0, 2.0], dtype=F64)

    def observe(fn: Any, x: Tensor, m: Tensor) -> None:
        if spelling == "obs_mask":
            pyro.sample("x", fn, obs=x, obs_mask=m)
        elif spelling == "dist":
            pyro.sample("x", fn.mask(m), obs=x)
        elif spelling == "nan":
            pyro.sample("x", fn.mask(x.isfinite()), obs=x.nan_to_num())
        else:
            with poutine.mask(mask=m):
                pyro.sample("x", fn, obs=x)

    def model(x: Tensor, m: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            k = pyro.sample("k", dist.Bernoulli(torch.full((len(x),), 0.3, dtype=F64)))
            z = pyro.sample("z", dist.Normal(means[k.long()], 1.0))
            observe(dist.Normal(z, 1.0), x, m)

    def guide(x: Tensor, m: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), dtype=F64), 2.0))

    x = torch.where(seen, X, torch.nan) if spelling == "nan" else X
    both = 0.7 * normal(-1.0, 2**0.5, X).exp() + 0.3 * normal(2.0, 2**0.5, X).exp()
    exact = torch.where(seen, both.log(), 0.0)
    torch.testing.assert_close(evidence(model, guide, x, seen), exact, atol=0.03, rtol=0.0)


# -- discrete latents behind discrete ones -----------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", SPELLINGS[:2])
def test_a_discrete_latent_behind_a_discrete_one_counts_once(gated: Gated) -> None:
    """c chooses whether k takes part; its three values must not count as three where it does not."""

    def run(x: Tensor, own: float) -> tuple[Tensor, Tensor]:
        c = pyro.sample("c", dist.Bernoulli(torch.full((len(x),), own, dtype=F64)))
        k = gated("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5], dtype=F64).expand(len(x), 3)), c.bool())
        return c, k

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            c, k = run(x, 0.6)
            pyro.sample("x", dist.Normal(c * (1.0 + k), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            run(x, 0.5)

    exact = 0.4 * normal(0.0, 1.0, X).exp()
    for k, p in enumerate((0.2, 0.3, 0.5)):
        exact = exact + 0.6 * p * normal(1.0 + k, 1.0, X).exp()
    torch.testing.assert_close(table(LogJoint(model, guide, X)).log_evidence, exact.log())


# -- refusals ----------------------------------------------------------------------------------------------------------------


def refused(model: Any, guide: Any, match: str) -> None:
    with pytest.raises(UnsupportedProgram, match=match) as caught:
        LogJoint(model, guide, X)
    assert "\n" not in str(caught.value)


def test_a_guide_that_leaves_the_gate_out_is_refused() -> None:
    model, _ = pair(by_dist, 0.5, (0.0, 1.0), X, 1.0)

    def without_the_mask(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("c", dist.Bernoulli(torch.full((len(x),), 0.5, dtype=F64)))
            pyro.sample("z", dist.Normal(x, 1.0))

    def without_the_gate(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    for guide in (without_the_mask, without_the_gate):
        refused(model, guide, "site 'z' is masked differently in model and guide")


@pytest.mark.parametrize("gated", SPELLINGS)
def test_what_still_depends_on_a_masked_latent_is_refused(gated: Gated) -> None:
    _, guide = pair(gated, 0.5, (0.0, 1.0), X, 1.0)

    def leaks(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            c = pyro.sample("c", dist.Bernoulli(torch.full((len(x),), 0.5, dtype=F64)))
            z = gated("z", dist.Normal(torch.zeros(len(x), dtype=F64), 1.0), c.bool())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    refused(leaks, guide, "model: its log density depends on 'z' where a mask")

    def by_the_data(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = gated("z", dist.Normal(torch.zeros(len(x), dtype=F64), 1.0), x > 0)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def its_guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            gated("z", dist.Normal(x, 1.0), x > 0)

    refused(by_the_data, its_guide, "model: its log density depends on 'z' where a mask")


def test_a_mask_by_a_continuous_latent_is_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(len(x), dtype=F64), 1.0))
            z = by_dist("z", dist.Normal(torch.zeros(len(x), dtype=F64), 1.0), a > 0)
            pyro.sample("x", dist.Normal(a + z * (a > 0), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(len(x), dtype=F64), 1.0))
            by_dist("z", dist.Normal(torch.zeros(len(x), dtype=F64), 1.0), a > 0)

    refused(model, guide, "mask depends on a continuous latent")
