"""Guides that draw an auxiliary vector and make the model's sites Deltas of it: autoguides, EasyGuide, and by hand."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import SVI, Trace_ELBO, autoguide
from torch import Tensor

from elbowroom.analysis.audit.auditor import audit
from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.target.log_joint import LogJoint

F64 = torch.float64
N = 6
Y = torch.linspace(-2.0, 2.5, N, dtype=F64)
X = torch.randn(N, 3, dtype=F64, generator=torch.Generator().manual_seed(3)) + 1.0


def conjugate(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(y), dtype=y.dtype), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def three(x: Tensor) -> None:
    """A positive latent and a vector of two, of each datum."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Gamma(torch.tensor(2.0, dtype=x.dtype), 1.0))
        b = pyro.sample("b", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(torch.cat([a[..., None], b], -1), 1.0).to_event(1), obs=x)


def with_global(x: Tensor) -> None:
    pyro.sample("w", dist.LogNormal(torch.tensor(0.0, dtype=x.dtype), 1.0))
    three(x)


LOC = torch.randn(N, 3, dtype=F64, generator=torch.Generator().manual_seed(4))
TRIL = torch.tensor([[0.5, 0.0, 0.0], [0.2, 0.4, 0.0], [-0.1, 0.3, 0.6]], dtype=F64)


class Grouped(EasyGuide):
    def guide(self, x: Tensor) -> None:
        with self.plate("data", len(x)):
            self.group(match="a|b").sample("latents", dist.MultivariateNormal(LOC, scale_tril=TRIL))


def unpacked(x: Tensor) -> None:
    """By hand, in another order, beside a site that is drawn as it is."""
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.MultivariateNormal(LOC, scale_tril=TRIL), infer={"is_auxiliary": True})
        pyro.sample("b", dist.Delta(u[..., :2], event_dim=1))
        pyro.sample("a", dist.Delta(u[..., 2].exp(), log_density=-u[..., 2]))


def without_jacobian(x: Tensor) -> None:
    """A common slip: the Delta lacks its log_density. q(z|x) is the same distribution."""
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.MultivariateNormal(LOC, scale_tril=TRIL), infer={"is_auxiliary": True})
        pyro.sample("b", dist.Delta(u[..., :2], event_dim=1))
        pyro.sample("a", dist.Delta(u[..., 2].exp()))


def scaled(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        u = pyro.sample("u", dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1), infer={"is_auxiliary": True})
        pyro.sample("b", dist.Delta(2 * u[..., :2], event_dim=1))
        pyro.sample("a", dist.Delta(u[..., 2].exp(), log_density=-u[..., 2]))


def started(family: type, model=three, data: Tensor = X):
    """An autoguide in double precision with parameters that are neither equal nor at their start."""
    guide = family(model)
    guide(data)
    guide.double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in guide.parameters():
            value.add_(0.3 * torch.randn(value.shape, dtype=value.dtype, generator=generator))
    return guide


@pytest.mark.parametrize("guide", [Grouped(three), unpacked, without_jacobian], ids=["EasyGuide", "by hand", "no Jacobian"])
def test_the_density_is_that_of_the_auxiliary(guide) -> None:
    """Coordinates (log a, b) of the model are (u_0, u_1, u_2) of EasyGuide, and (u_2, u_0, u_1) by hand."""
    joint = LogJoint(three, guide, X)
    z, log_q = joint.sample_guide(50, 0)
    u = z if isinstance(guide, Grouped) else z[..., [1, 2, 0]]
    torch.testing.assert_close(log_q, dist.MultivariateNormal(LOC, scale_tril=TRIL).log_prob(u))
    assert ((z.mean(0) - (LOC if isinstance(guide, Grouped) else LOC[:, [2, 0, 1]])).abs() < 6 * 0.7 / 50**0.5).all()


@pytest.mark.parametrize("family", [autoguide.AutoNormal, autoguide.AutoDiagonalNormal, autoguide.AutoNormalMessenger])
@pytest.mark.parametrize("model", [three, with_global], ids=["local", "global"])
def test_mean_field_autoguides_are_normal_in_each_coordinate(family, model) -> None:
    guide = started(family, model)
    joint = LogJoint(model, guide, X)
    z, log_q = joint.sample_guide(4000, 0)
    mean, sd = z.mean(0), z.std(0)
    fitted = dist.Normal(mean, sd).log_prob(z).sum(-1)
    assert (fitted - log_q).abs().mean() < 0.1, "by moments of the draws, up to their error"
    assert joint.dim == 3
    if model is with_global:
        expected = guide.median(X)["w"] if hasattr(guide, "median") else joint.program.pinned["w"]
        torch.testing.assert_close(joint.program.pinned["w"], expected.to(joint.program.pinned["w"]))
        assert any("global latent 'w' is held at the guide's median" in note for note in joint.notes)


def test_pyros_own_elbo_of_autonormal() -> None:
    """Trace_ELBO's estimate, of many particles, has the mean of E log p(x, z) - E log q(z|x) of all data."""
    guide = started(autoguide.AutoNormal)
    joint = LogJoint(three, guide, X)
    z, log_q = joint.sample_guide(20_000, 0)
    mine = (joint(z) - log_q).sum(1)
    losses = [-Trace_ELBO(num_particles=50, vectorize_particles=False).loss(three, guide, X) for _ in range(40)]
    theirs = torch.tensor(losses, dtype=F64)
    error = (mine.var() / len(mine) + theirs.var() / len(theirs)).sqrt()
    assert (mine.mean() - theirs.mean()).abs() < 4 * error


def test_the_gap_of_autonormal_is_that_of_its_parameters() -> None:
    """KL(N(m, s^2) || N(y / 2, 1 / 2)) in closed form; 0 at the exact posterior of the first half of the data."""
    guide = autoguide.AutoNormal(conjugate)
    guide(Y)
    mean, sd = Y / 2, torch.full((N,), math.sqrt(0.5), dtype=F64)
    mean[N // 2 :] += 0.3
    sd[N // 2 :] *= 0.8
    guide.locs.z.data, guide.scales.z = mean, sd
    found = audit(conjugate, guide, Y, diagnose=False)
    expected = torch.distributions.kl_divergence(dist.Normal(mean, sd), dist.Normal(Y / 2, math.sqrt(0.5)))
    off = abs(found.table["gap_total"].values - expected.numpy())
    assert (off < 5 * found.table["elbo_se"].values + 1e-9).all()
    assert off[: N // 2].max() < 1e-9
    evidence = dist.Normal(0.0, math.sqrt(2.0)).log_prob(Y)
    torch.testing.assert_close(torch.tensor(found.table["log_evidence"].values), evidence)


def test_a_laplace_approximation_is_split_by_datum() -> None:
    """Of a normal model it is the posterior: no gap. A vector of all data has a dense covariance, whose blocks are found."""
    guide = autoguide.AutoLaplaceApproximation(conjugate)
    guide(Y)
    with torch.no_grad():
        guide.loc.data = Y / 2
    joint = LogJoint(conjugate, guide, Y)
    z, log_q = joint.sample_guide(100, 0)
    torch.testing.assert_close(log_q, dist.Normal(Y / 2, math.sqrt(0.5)).log_prob(z[..., 0]))
    found = audit(conjugate, guide, Y, diagnose=False)
    assert abs(found.table["gap_total"]).max() < 1e-6


def test_a_laplace_approximation_with_a_global_latent_is_conditional_on_it() -> None:
    """z_n | w, y_n ~ N((y_n + w) / 2, 1 / 2): the global mean couples the data, and nothing else does."""

    def model(y):
        w = pyro.sample("w", dist.Normal(torch.tensor(0.0, dtype=F64), 1.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = autoguide.AutoLaplaceApproximation(model)
    guide(Y)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(600):
        svi.step(Y)
    joint = LogJoint(model, guide, Y)
    w = Y.sum() / (2 + N)  # the posterior mean: N data of variance 2, a prior of variance 1
    torch.testing.assert_close(joint.program.pinned["w"], w, atol=1e-3, rtol=0)
    z, log_q = joint.sample_guide(100, 0)
    expected = dist.Normal((Y + w) / 2, math.sqrt(0.5)).log_prob(z[..., 0])
    torch.testing.assert_close(log_q, expected, atol=5e-3, rtol=0)


def test_what_is_no_coordinate_is_refused_and_so_is_a_mode_that_is_none() -> None:
    with pytest.raises(UnsupportedProgram, match="'u': 2 of its 3 entries per datum are not, as they are, coordinates"):
        LogJoint(three, scaled, X)
    guide = autoguide.AutoStructured(three, conditionals="normal")
    guide(X.float())
    with pytest.raises(UnsupportedProgram, match="guide site '[ab]' is a Delta, and not of the map from entries"):
        LogJoint(three, guide, X.float())


def test_a_factor_in_the_guide_is_ignored_and_said() -> None:
    def guide(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(y / 2, math.sqrt(0.5)))
            pyro.factor("tilt", z)

    found = audit(conjugate, guide, Y, diagnose=False)
    assert abs(found.table["gap_total"]).max() < 1e-6
    assert "guide site 'tilt' is observed (a pyro.factor or obs= in the guide) and ignored" in found.table.attrs["notes"]


def test_a_factor_of_the_model_is_a_likelihood() -> None:
    """A normal density by pyro.factor, with a constant of 1.5 nats: log p(x) has it too."""

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y), dtype=F64), 1.0))
            pyro.factor("likelihood", dist.Normal(z, 1.0).log_prob(y) + 1.5)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(y / 2, math.sqrt(0.5)))

    found = audit(model, guide, Y)
    evidence = dist.Normal(0.0, math.sqrt(2.0)).log_prob(Y) + 1.5
    torch.testing.assert_close(torch.tensor(found.table["log_evidence"].values), evidence)
    assert abs(found.table["gap_total"]).max() < 1e-6


def test_an_easy_guide_that_fails_on_a_part_is_left_as_it_was() -> None:
    """It keeps the plates of a run that fails, of 5 data, and would open them for all 6."""
    joint = LogJoint(three, guide := Grouped(three), X)
    assert not joint.separable()
    assert guide.plates == {}
    assert len(joint.sample_guide(3, 0)[0]) == 3
