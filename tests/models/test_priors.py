"""Every prior, by one list: normalised, drawn from its own density, differentiable, saved, loaded, right in the log joint."""

from __future__ import annotations

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import torch
from support.cases.priors import (
    CASES,
    CLOSED,
    CONDITIONAL,
    CONTINUOUS,
    DISCRETE,
    WIDTH,
    Case,
    by_name,
    data_of,
    joint_log_prob,
    unchecked,
    vae_of,
)
from torch import Tensor

from elbowroom.inference.fit.svi import Step
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.models import spaces
from elbowroom.models.guides.base import AmortizedGuide
from elbowroom.models.guides.hierarchical import HierarchicalFamily
from elbowroom.models.guides.normal import DiagonalNormal
from elbowroom.models.networks.mlp import MLP
from elbowroom.models.priors.constrained import Dirichlet, Gamma, LogisticNormal, LogNormal
from elbowroom.models.priors.correlated import AutoregressiveNormal
from elbowroom.models.priors.mixtures import GaussianMixture, Vamp
from elbowroom.models.priors.sparse import Horseshoe
from elbowroom.models.priors.standard import Laplace, Normal, StudentT

C = torch.tensor([[0.5, -1.0]], dtype=torch.float64)


def covariates_of(case: Case, n: int = 1) -> Tensor | None:
    return C.expand(n, -1) if case in CONDITIONAL else None


@pytest.mark.parametrize("case", **by_name([case for case in CONTINUOUS if case.line]))
def test_density_on_a_line_integrates_to_one(case):
    """Trapezoid rule in unconstrained coordinates, where the tails die out."""
    prior = case.prior(case.line)
    q = prior.distribution(covariates_of(case))
    # sinh spreads the points: heavy tails reach far
    t = torch.linspace(-11, 11, 80_001, dtype=torch.float64)
    reach = 1.0 if prior.space == "real" else 0.02  # exp and sigmoid of thousands overflow
    u = reach * t.sinh()[:, None]
    transform = spaces.onto(prior.space)
    z = transform(u)
    log_det = transform.log_abs_det_jacobian(u, z)
    positive = prior.space in ("positive", "simplex")
    inside = (z > 0).all(-1) if positive else torch.ones(len(z), dtype=torch.bool)
    density = torch.where(inside, (q.log_prob(z.clamp_min(1e-300) if positive else z) + log_det).exp(), 0.0)
    total = torch.trapezoid(density * reach * t.cosh(), t)
    assert abs(float(total.detach()) - 1) < 2e-4


@pytest.mark.parametrize("case", **by_name(DISCRETE))
def test_probabilities_sum_to_one(case):
    q = case.prior().distribution()
    values = q.enumerate_support(expand=False)
    assert len(values) == len(torch.unique(values, dim=0)) == (2**case.dim if case.name.startswith("b") else case.dim)
    assert abs(float(q.log_prob(values).exp().sum().detach()) - 1) < 1e-12


@pytest.mark.parametrize("case", **by_name(CONTINUOUS))
def test_density_in_the_plane_integrates_to_one(case):
    """Importance sampling from a Student t in unconstrained coordinates; the tolerance is its own standard error."""
    prior = case.prior()
    p, transform = prior.distribution(covariates_of(case)), spaces.onto(prior.space)
    proposal = dist.StudentT(3.0, torch.zeros(prior.free_dim, dtype=torch.float64), 1.8).to_event(1)
    u = proposal.sample((200_000,))
    z = transform(u)
    weight = (p.log_prob(z) + transform.log_abs_det_jacobian(u, z).reshape(len(u), -1).sum(-1) - proposal.log_prob(u)).exp()
    weight = weight.detach() if prior.space == "simplex" else weight.detach()
    se, ess = float(weight.std()) / len(u) ** 0.5, float(weight.sum() ** 2 / weight.square().sum())
    assert ess > 5_000
    assert abs(float(weight.mean()) - 1) < 4.5 * se < 0.1


@pytest.mark.parametrize("case", **by_name(CLOSED))
def test_draws_have_the_moments_of_the_density(case):
    """E log p over draws agrees with -entropy by importance sampling, or by the sum over all values; means likewise."""
    prior = case.prior()
    p, c = prior.distribution(covariates_of(case)), covariates_of(case)
    with torch.no_grad():
        draws = p.sample((20_000,)).reshape(20_000, -1)
        if case in DISCRETE:
            values = p.enumerate_support(expand=False)
            w = p.log_prob(values).exp()
            mean, second = w @ values, w @ values.square()
            entropy = -(w @ p.log_prob(values))
            slack = 0.0
        else:
            transform = spaces.onto(prior.space)
            proposal = dist.StudentT(3.0, torch.zeros(prior.free_dim, dtype=torch.float64), 1.8).to_event(1)
            u = proposal.sample((100_000,))
            values = transform(u)
            det = transform.log_abs_det_jacobian(u, values).reshape(len(u), -1).sum(-1)
            w = (p.log_prob(values) + det - proposal.log_prob(u)).softmax(0)
            mean, second = w @ values, w @ values.square()
            entropy = -(w @ p.log_prob(values))
            slack = 4.5 / float(1 / w.square().sum()) ** 0.5
        surprise = -p.log_prob(draws)
        noise = 4.5 / len(draws) ** 0.5
        sd = (second - mean.square()).clamp_min(0).sqrt()
        assert ((draws.mean(0) - mean).abs() <= (noise + slack) * sd + 1e-12).all()
        assert abs(float(surprise.mean() - entropy)) <= (noise + slack) * float(surprise.std()) + 1e-12
    assert c is None or c.shape == (1, 2)


@pytest.mark.parametrize("case", **by_name(CASES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_program_draws_inside_its_support_in_both_precisions(case, dtype):
    vae = vae_of(case).to(dtype)
    prior = vae.prior
    c = None if case not in CONDITIONAL else C.to(dtype).expand(500, -1)
    with pyro.plate("data", 500):
        z = prior(c)
    assert z.shape == (500, prior.latent_dim)
    assert z.dtype == dtype
    assert spaces.constraint(prior.space).check(z).float().mean() == 1
    if case in CLOSED:
        assert prior.distribution(c).log_prob(z).dtype == dtype
        assert prior.distribution(c).log_prob(z).isfinite().all()
        wide = vae.double().prior.distribution(None if c is None else c.double()).log_prob(z.double())
        assert torch.allclose(prior.distribution(None if c is None else c.double()).log_prob(z.double()), wide)


@pytest.mark.parametrize("case", **by_name(CLOSED))
def test_values_outside_the_support_are_known(case):
    prior = case.prior()
    bad = {
        "positive": [-1.0, 1.0],
        "simplex": [0.6, 0.6, 0.6],
        "sphere": [0.6] * prior.latent_dim,
        "one_hot": [1.0, 1.0, 0.0],
        "binary": [0.5, 1.0, 0.0],
    }
    if prior.space != "real":
        outside = torch.tensor(bad[prior.space], dtype=torch.float64)
        assert not prior.distribution(covariates_of(case)).support.check(outside).all()


@pytest.mark.parametrize("case", **by_name(CASES))
def test_gradient_reaches_every_parameter(case):
    vae = vae_of(case)
    with pyro.plate("data", 30):
        values = {}
        for name, site in pyro.poutine.trace(vae.prior).get_trace(covariates_of(case, 30)).nodes.items():
            if name in vae.prior.sites:
                values[name] = site["value"].detach()
    density = joint_log_prob(vae.prior, values, covariates_of(case, 30))
    assert density.requires_grad == bool(list(vae.prior.parameters()))
    if density.requires_grad:
        density.square().sum().backward()
    for name, parameter in vae.prior.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name
    encoder = [p.grad is not None and bool((p.grad != 0).any()) for p in vae.posterior.encoder.parameters()]
    assert all(encoder) if case.name == "vamp" else not any(encoder)


@pytest.mark.parametrize("case", **by_name(CASES))
def test_copies_and_loaded_states_give_the_same_density(case):
    vae = vae_of(case)
    vae.adapt(**data_of(case, 20))
    c = covariates_of(case, 7)
    with pyro.plate("data", 7):
        trace = pyro.poutine.trace(vae.prior).get_trace(c)
    values = {name: trace.nodes[name]["value"].detach() for name in vae.prior.sites}
    expected = joint_log_prob(vae.prior, values, c)
    twin = copy.deepcopy(vae)
    assert torch.equal(joint_log_prob(twin.prior, values, c), expected)
    torch.manual_seed(99)
    fresh = vae_of(case)
    other = data_of(case, 30)
    other["x"] = other["x"] * 2 + 3
    fresh.adapt(**other)  # a run that is loaded or resumed is adapted first
    assert set(fresh.state_dict()) == set(vae.state_dict())
    fresh.load_state_dict(vae.state_dict())
    assert torch.equal(joint_log_prob(fresh.prior, values, c), expected)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(joint_log_prob(vae.prior, values, c), expected)  # the copy shares no storage


@pytest.mark.parametrize("case", **by_name(CLOSED))
def test_vmap_and_broadcasting_over_draws_equal_one_draw_at_a_time(case):
    prior = case.prior()
    c = covariates_of(case, 4)
    with torch.no_grad(), unchecked():
        p = prior.distribution(c)
        z = p.expand((4,)).sample((6,))
        one = torch.stack([prior.distribution(c).log_prob(u) for u in z])
        assert torch.allclose(torch.func.vmap(lambda u: prior.distribution(c).log_prob(u))(z), one, atol=1e-12)
        assert torch.allclose(p.log_prob(z), one, atol=1e-12)
        points = z[:, :1]  # the same points for every datum
        each = torch.stack([p.log_prob(points[:, 0].expand(6, -1)[g].expand(4, -1)) for g in range(6)])
        assert torch.allclose(p.log_prob(points).expand(6, 4), each, atol=1e-12)


@pytest.mark.parametrize("case", **by_name([case for case in CONDITIONAL if not case.name.startswith("von_mises")]))
def test_given_covariates_the_density_is_moved_by_a_linear_map(case):
    prior = case.prior()
    c = torch.randn(5, 2, dtype=torch.float64)
    z = torch.randn(5, 2, dtype=torch.float64)
    shift = c @ prior.map.weight.T
    base = copy.deepcopy(prior)
    base.covariates = False
    found = prior.distribution(c).log_prob(z)
    assert torch.allclose(found, base.distribution().log_prob(z - shift))
    assert found.std() > 0
    assert not torch.allclose(found, prior.distribution(c.roll(1, 0)).log_prob(z))
    with pytest.raises(ValueError, match="needs the covariates"):
        prior.distribution()


@pytest.mark.parametrize("prior", [Normal, Laplace, StudentT, GaussianMixture])
def test_covariates_that_are_not_there_are_refused(prior):
    with pytest.raises(ValueError, match="covariates: needs data with covariates"):
        prior(2, 0, covariates=True)


def test_an_autoregression_is_stationary_and_its_precision_banded():
    """The covariance against the Yule-Walker equations, solved for the partial autocorrelations it was made of."""
    prior = AutoregressiveNormal(6, order=2).double()
    with torch.no_grad():
        prior.raw.copy_(torch.tensor([0.7, -0.4]))
    r = prior.distribution().covariance_matrix.detach()
    for lag in range(6):  # Toeplitz, unit variances
        torch.testing.assert_close(r.diagonal(lag), r[0, lag].expand(6 - lag))
    assert abs(float(r[0, 0]) - 1) < 1e-12
    a = torch.linalg.solve(r[:2, :2], r[0, 1:3])
    torch.testing.assert_close(r[0, 1], torch.tanh(prior.raw[0]).detach())
    torch.testing.assert_close(a[1], torch.tanh(prior.raw[1]).detach())
    torch.testing.assert_close(torch.linalg.inv(r).triu(3), torch.zeros_like(r), atol=1e-12, rtol=0)


@pytest.mark.parametrize("correlation", ["banded", "low_rank"])
def test_one_coordinate_has_nothing_to_be_correlated_with(correlation):
    prior = AutoregressiveNormal(1, correlation=correlation)
    z = torch.linspace(-3.0, 3.0, 7)[:, None]
    torch.testing.assert_close(prior.distribution().log_prob(z), torch.distributions.Normal(0.0, 1.0).log_prob(z)[:, 0])


def test_a_horseshoe_of_many_nodes_has_the_closed_form_of_the_plain_one():
    """p(z) = exp(u) E1(u) / sqrt(2 pi^3), u = z^2 / 2, where the slab is far away (Carvalho et al. 2010)."""
    p = Horseshoe(1, slab=1e6, nodes=20_000).double()
    z = torch.tensor([0.05, 0.3, 1.0, 3.0, 8.0], dtype=torch.float64)
    u = z.square() / 2
    expected = u + torch.as_tensor(scipy.special.exp1(u.numpy())).log() - 0.5 * math.log(2 * math.pi**3)
    torch.testing.assert_close(p.distribution().log_prob(z[:, None]), expected, rtol=2e-3, atol=2e-3)


def test_formulas():
    z = torch.tensor([0.3, -1.2], dtype=torch.float64)
    positive, simplex = z.exp(), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    value = lambda prior, at: float(prior.double().distribution().log_prob(at))
    assert math.isclose(value(Normal(2), z), float(-0.5 * z.square().sum() - math.log(2 * math.pi)))
    assert math.isclose(value(Laplace(2), z), float(-z.abs().sum() - 2 * math.log(2)))
    t = 2 * (math.lgamma(2) - math.lgamma(1.5) - 0.5 * math.log(3 * math.pi)) - 2 * float((z.square() / 3).log1p().sum())
    assert math.isclose(value(StudentT(2, df=3.0), z), t)
    assert math.isclose(value(LogNormal(2), positive), value(Normal(2), z) - float(z.sum()))
    assert math.isclose(value(Gamma(2, concentration=3.0), positive), float((2 * z - positive).sum()) - 2 * math.log(2))
    assert math.isclose(value(Dirichlet(3), simplex), math.log(2))
    torchs = torch.distributions.LogisticNormal(torch.zeros(2).double(), torch.ones(2).double()).log_prob(simplex)
    assert math.isclose(value(LogisticNormal(3), simplex), float(torchs))


@pytest.mark.parametrize("prior", [Dirichlet, LogisticNormal])
def test_a_simplex_needs_two_components(prior):
    with pytest.raises(ValueError, match="at least 2 components"):
        prior(1)


# end to end


@pytest.mark.parametrize("case", **by_name(CASES))
def test_the_seam_gives_prior_times_likelihood_with_jacobian(case):
    vae, data = vae_of(case), data_of(case, 6)
    vae.adapt(**data)
    log_joint = LogJoint(vae.model, vae.guide, **data)
    assert log_joint.mode == "vmap", log_joint.notes
    if case in DISCRETE:
        return  # see test_discrete.py
    z = 0.7 * torch.randn(5, 6, log_joint.dim, dtype=torch.float64)
    c = None if case not in CONDITIONAL else vae._standard(data["covariates"])
    top = log_joint.dim - vae.prior.free_dim
    transform = spaces.onto(vae.prior.space)
    for s in range(5):
        u = z[s, :, top:]
        value = transform(u)
        values = {"z": value, "z_top": z[s, :, :top]} if top else {"z": value}
        expected = joint_log_prob(vae.prior, values, c) + vae.decode(value, data.get("covariates")).log_prob(data["x"])
        expected = expected + transform.log_abs_det_jacobian(u, value).reshape(6, -1).sum(-1)
        assert torch.allclose(log_joint(z)[s], expected, atol=1e-9)
    draws = log_joint.sample_prior(50, 0)
    assert draws.isfinite().all()
    assert log_joint.log_guide(draws).isfinite().all()


@pytest.mark.parametrize("case", **by_name(CASES))
def test_twenty_steps_lower_the_loss(case):
    vae, data = vae_of(case), data_of(case, 64)
    vae.adapt(**data)
    step = Step(vae, size=64, learning_rate=2e-2)
    losses = [step(**data)[0] for _ in range(20)]
    assert sum(losses[-4:]) < sum(losses[:4])
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).any(), name


# the VampPrior's own


def vamp(components: int = 3, guide: AmortizedGuide | None = None) -> tuple[Vamp, AmortizedGuide]:
    guide = guide or AmortizedGuide(MLP((WIDTH,), 4, hidden=(8,)), DiagonalNormal(2))
    return Vamp(2, 0, (WIDTH,), guide, components=components), guide


def test_vamp_is_the_mixture_of_the_guides_posteriors():
    prior, guide = vamp()
    z = torch.randn(5, 2)
    each = torch.stack([guide(prior.pseudo_inputs[k : k + 1]).log_prob(z) for k in range(3)])
    assert torch.allclose(prior.distribution().log_prob(z), each.logsumexp(0) - math.log(3), atol=1e-5)


def test_vamp_starts_at_training_rows_once():
    prior, guide = vamp()
    x = 5 + 3 * torch.randn(9, WIDTH)
    x[0, 1] = torch.nan
    guide.adapt(x)
    prior.adapt(x)
    filled = torch.where(x.isnan(), x.nanmean(0), x)
    assert torch.allclose(prior.pseudo_inputs, filled[[0, 4, 8]], atol=1e-5)
    with torch.no_grad():
        prior.inputs.add_(1)
    trained = prior.inputs.clone()
    prior.adapt(x + 100)
    assert torch.equal(prior.inputs, trained)
    loaded, _ = vamp()
    loaded.load_state_dict(prior.state_dict())
    loaded.adapt(x + 100)
    assert torch.equal(loaded.inputs, trained)
    adapted_first, _ = vamp()
    adapted_first.adapt(x - 7)
    adapted_first.load_state_dict(prior.state_dict())
    assert torch.equal(adapted_first.inputs, trained)


def test_vamp_with_more_components_than_data_has_no_equal_ones():
    prior, _ = vamp(components=8)
    before = torch.get_rng_state()
    prior.adapt(torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0)))
    assert len(torch.unique(prior.inputs.detach(), dim=0)) == 8
    assert torch.equal(torch.get_rng_state(), before)


def test_vamp_does_not_own_the_guide():
    vae = vae_of(next(case for case in CASES if case.name == "vamp"))
    assert [name for name, _ in vae.prior.named_parameters()] == ["inputs"]
    twin = copy.deepcopy(vae)
    assert twin.prior.guide is twin.posterior
    assert twin.posterior is not vae.posterior


@pytest.mark.parametrize("beside", [0, 1, 2])
@pytest.mark.parametrize("marks", [False, True])
def test_vamp_reads_marks_covariates_and_exposure(marks, beside):
    """Of two numbers beside x, one covariate and a log exposure."""
    shape = MLP.joined_shape((WIDTH,), marks=marks, covariates=beside)
    guide = AmortizedGuide(MLP(shape, 4, hidden=(8,)), DiagonalNormal(2), marks=marks)
    prior = Vamp(2, min(beside, 1), (WIDTH,), guide, components=3)
    assert prior.distribution().log_prob(torch.randn(7, 2)).shape == (7,)
    assert (prior.beside is None) == (beside == 0)


def test_vamp_refuses_a_guide_without_a_density():
    family = HierarchicalFamily(2, 1)
    with pytest.raises(ValueError, match="vamp: it mixes densities"):
        Vamp(2, 0, (WIDTH,), AmortizedGuide(MLP((WIDTH,), family.param_dim), family))
    with pytest.raises(ValueError, match="does not fit features"):
        Vamp(2, 0, (WIDTH,), AmortizedGuide(MLP((WIDTH + 5,), 4), DiagonalNormal(2)))
