"""Guide families: every promise of `Family`, tested on the list of all of them and of their carried forms."""

from __future__ import annotations

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from support.cases.guides import FAMILIES, REAL, SEMI, each, each_real, free_log_prob, params_of, small_vae
from support.cases.vaes import linear_vae
from torch import Tensor

from elbowroom.components import registry
from elbowroom.errors import SpecError
from elbowroom.inference.fit.svi import Step
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.models import spaces
from elbowroom.models.guides.base import AmortizedGuide, Onto, positive_scale
from elbowroom.models.guides.families import LogisticNormal, LogNormal, Mixture, PowerSpherical, StudentT
from elbowroom.models.guides.mixture import MixtureOfNormals
from elbowroom.models.guides.normal import DiagonalNormal, FullRankNormal, LowRankNormal
from elbowroom.models.networks.mlp import Linear

# -- every family: densities, draws, gradients -----------------------------------------------------------------------------


@each
def test_the_density_integrates_to_one(name):
    dim = 3 if FAMILIES[name](3).space in ("simplex", "sphere") else 2
    family = FAMILIES[name](dim).double()
    q = family(params_of(family, 3))
    heavy = "t_" in name
    # u = sinh(v) reaches far into the tails of a t with few points
    v = torch.linspace(-11 if heavy else -5.5, 11 if heavy else 5.5, 801 if heavy else 501, dtype=torch.float64)
    a, b = torch.meshgrid(v, v, indexing="ij")
    u = torch.stack([a, b], -1).reshape(-1, 1, 2).sinh()
    log_area = torch.stack([a, b], -1).reshape(-1, 1, 2).cosh().log().sum(-1) + 2 * (v[1] - v[0]).log()
    if family.space == "real":
        log_q = q.log_prob(u.expand(-1, 3, -1))
    else:  # the carried density is checked against its own base: far out the transform rounds to the edge
        inner = u.clamp(-12, 12)
        log_q = free_log_prob(q, inner.expand(-1, 3, -1), family.space).masked_fill((u != inner).any(-1), -math.inf)
    total = (log_q + log_area).exp().sum(0)
    slack = 5e-3 if heavy and family.space != "real" else 1e-4
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=slack)


@each
def test_draws_agree_with_the_density(name):
    """E_q[p/q] = 1 for another density p with lighter tails, and E of a probability over draws agrees with quadrature."""
    dim = 4
    family = FAMILIES[name](dim).double()
    q = family(params_of(family, 2, size=0.3))
    torch.manual_seed(1)
    with torch.no_grad():
        z = q.rsample(torch.Size([40_000]))
        u = spaces.onto(family.space).inv(z)
        m = u.shape[-1]
        p = dist.Normal(torch.zeros(m, dtype=torch.float64), 0.5).to_event(1)
        weight = (p.log_prob(u) - free_log_prob(q, u, family.space)).exp()
    error = weight.std(0) / len(weight) ** 0.5
    ess = weight.sum(0).square() / weight.square().sum(0)
    assert (ess > 500).all(), f"gate: effective sample size {ess.tolist()}"
    assert ((weight.mean(0) - 1).abs() < 4.5 * error).all()


@each_real
def test_moments_of_draws_agree_with_the_formula(name):
    if name == "markov_gated":
        pytest.skip("it has moments by draws alone")
    family = REAL[name](3).double()
    q = family(params_of(family, 4))
    torch.manual_seed(2)
    with torch.no_grad():
        z = q.rsample(torch.Size([60_000]))
    error = z.std(0) / len(z) ** 0.5
    assert ((z.mean(0) - q.mean).abs() < 4.5 * error).all()
    square = (z - q.mean).square()
    tail = square.std(0) / len(z) ** 0.5
    # df between 4 and 12: the fourth moment of a t exists, if barely, so its own error estimate is loose
    assert ((square.mean(0) - q.variance).abs() < (9 if name.startswith("t_") else 4.5) * tail).all()


@pytest.mark.parametrize("name", ["log_normal", "diagonal onto positive"])
def test_log_normal_moments(name):
    family = FAMILIES[name](2).double()
    params = params_of(family, 4)
    mu, s = params.chunk(2, -1)
    sigma = positive_scale(s)
    with torch.no_grad():
        z = family(params).rsample(torch.Size([100_000]))
    error = z.std(0) / len(z) ** 0.5
    assert ((z.mean(0) - (mu + sigma**2 / 2).exp()).abs() < 6 * error).all()


def test_log_normal_and_logistic_normal_are_carried_normals():
    own, other = LogNormal(3).double(), Onto(DiagonalNormal(3), "positive", 3).double()
    params = params_of(own)
    z = own(params).sample(torch.Size([7]))
    torch.testing.assert_close(own(params).log_prob(z), other(params).log_prob(z))
    own, other = LogisticNormal(4).double(), Onto(DiagonalNormal(3), "simplex", 4).double()
    params = params_of(own)
    mu, s = params.chunk(2, -1)
    torchs = dist.LogisticNormal(mu, DiagonalNormal(3).double()(params).stddev)
    z = own(params).sample(torch.Size([7]))
    torch.testing.assert_close(own(params).log_prob(z), other(params).log_prob(z))
    torch.testing.assert_close(own(params).log_prob(z), torchs.log_prob(z))


@each
def test_draws_lie_in_the_space_with_the_right_shapes(name):
    family = FAMILIES[name](5)
    q = family(params_of(family, 6).float())
    assert (tuple(q.batch_shape), tuple(q.event_shape)) == ((6,), (5,))
    z = q.rsample(torch.Size([50]))
    assert z.shape == (50, 6, 5)
    assert bool(spaces.constraint(family.space).check(z.detach()).all())
    assert bool(q.log_prob(z).isfinite().all())
    wide = q.expand(torch.Size([3, 6]))
    assert wide.rsample().shape == (3, 6, 5)
    torch.testing.assert_close(wide.log_prob(z[:3]), q.log_prob(z[:3]), rtol=1e-4, atol=1e-4)


@each
def test_gradients_reach_every_part_of_the_parameters(name):
    family = FAMILIES[name](3).double()
    params = params_of(family, 4).requires_grad_()
    q = family(params)
    z = q.rsample()
    for value in (q.log_prob(z.detach()).sum(), z.square().sum() + q.log_prob(z).sum()):
        (gradient,) = torch.autograd.grad(value, params, retain_graph=True)
        assert gradient.isfinite().all()
        if name.partition(" ")[0] == "markov":
            gradient = gradient[:, 1:]  # the slope of the first step, which has no z before it
        assert (gradient != 0).any(0).all(), f"no gradient for {(gradient == 0).all(0).nonzero().flatten().tolist()}"


@each
def test_precisions_agree(name):
    family = FAMILIES[name](3)
    params = params_of(family)
    double = copy.deepcopy(family).double()
    z = double(params).sample(torch.Size([6]))
    low = family(params.float()).log_prob(z.float())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), double(params).log_prob(z), rtol=2e-4, atol=2e-3)
    assert double(params).rsample().dtype == torch.float64


@each
def test_densities_under_vmap_over_draws_and_parameters(name):
    family = FAMILIES[name](3).double()
    params = params_of(family)
    z = family(params).sample(torch.Size([4]))
    plain = family(params).log_prob(z)
    over_draws = torch.func.vmap(lambda v: family(params).log_prob(v))(z)
    torch.testing.assert_close(over_draws, plain)
    many = torch.stack([params, params.flip(0)])
    with pyro.validation_enabled(False):
        over_params = torch.func.vmap(lambda p: family(p).log_prob(z[0]))(many)
    torch.testing.assert_close(over_params[1], family(params.flip(0)).log_prob(z[0]))


@each
def test_deepcopy_and_state_dict(name):
    family = FAMILIES[name](3).double()
    params = params_of(family)
    other = copy.deepcopy(family)
    fresh = FAMILIES[name](3).double()
    fresh.load_state_dict(family.state_dict())
    z = family(params).sample()
    for again in (other, fresh):
        assert torch.equal(again(params).log_prob(z), family(params).log_prob(z))


@each_real
def test_an_encoder_output_of_zero_is_the_standard_distribution(name):
    family = REAL[name](3).double()
    q = family(torch.zeros(2, family.param_dim, dtype=torch.float64))
    z = torch.randn(9, 2, 3, dtype=torch.float64)
    if name.startswith("t_"):
        df = torch.tensor(10.0 if name == "t_learned" else 7.0, dtype=torch.float64)
        standard = dist.MultivariateStudentT(df, torch.zeros(3).double(), torch.eye(3).double())
    else:
        standard = dist.Normal(torch.zeros(3).double(), 1.0).to_event(1)
    torch.testing.assert_close(q.log_prob(z), standard.log_prob(z), rtol=1e-4, atol=1e-4)


def test_zero_is_the_middle_of_the_simplex():
    q = LogisticNormal(4)(torch.zeros(6))
    torch.testing.assert_close(q.transforms[0](torch.zeros(3)), torch.full((4,), 0.25))


# -- nesting ---------------------------------------------------------------------------------------------------------------


def raw(scale: Tensor) -> Tensor:
    """The parameter s of a scale."""
    return (scale - 1e-5).expm1().log() - math.log(math.expm1(1.0))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_full_rank_contains_low_rank_contains_diagonal(rank):
    d = 4
    diagonal, low, full = (f.double() for f in (DiagonalNormal(d), LowRankNormal(d, rank=rank), FullRankNormal(d)))
    z = torch.randn(11, 5, d, dtype=torch.float64)
    params = params_of(diagonal)
    torch.testing.assert_close(
        low(torch.cat([params, torch.zeros(5, rank * d, dtype=torch.float64)], -1)).log_prob(z), diagonal(params).log_prob(z)
    )
    params = params_of(low)
    q = low(params)
    root = torch.linalg.cholesky(q.covariance_matrix)
    as_full = torch.cat([q.mean, raw(root.diagonal(dim1=-2, dim2=-1)), root[..., full.rows, full.columns]], -1)
    torch.testing.assert_close(full(as_full).log_prob(z), q.log_prob(z))


def test_a_t_of_many_degrees_of_freedom_is_nearly_the_full_rank_normal():
    t, normal = StudentT(3, df=1000.0).double(), FullRankNormal(3).double()
    params, z = params_of(t), torch.randn(9, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(t(params).log_prob(z), normal(params).log_prob(z), rtol=5e-2, atol=5e-2)


def test_a_low_rank_normal_much_narrower_than_it_is_long():
    q = LowRankNormal(3, rank=2)
    params = torch.tensor([[0.0] * 3 + [-9.0] * 3 + [30.0, 30.001] * 3])
    value = q(params).log_prob(q(params).sample())
    assert value.isfinite().all()


# -- the mixture's gradient -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_gradient_of_a_mixture_is_unbiased(d, shift):
    """d/dtheta E_q f for f(z) = (sum_j c_j z_j)^2 + a'z, against the closed form, in every parameter."""
    torch.manual_seed(3)
    k, n = 3, 40_000
    leaf = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    start = [0.5 * leaf(k), shift * leaf(k, d), (0.3 * leaf(k, d)).exp()]
    c, a = leaf(d), leaf(d)
    theta = [t.clone().requires_grad_() for t in start]
    weights = theta[0].softmax(-1)
    along = theta[1] @ c
    exact = (weights * (along.square() + (theta[2] * c).square().sum(-1) + theta[1] @ a)).sum()
    wanted = torch.autograd.grad(exact, theta)
    wide = [t.expand(n, *t.shape).clone().requires_grad_() for t in start]
    z = MixtureOfNormals(*wide).rsample()
    found = torch.autograd.grad(((z @ c).square() + z @ a).sum(), wide)
    for one, sample in zip(wanted, found, strict=True):
        error = sample.std(0) / n**0.5
        assert ((sample.mean(0) - one).abs() < 4.5 * error + 1e-9).all()


def test_gradient_of_a_mixture_under_vmap_and_in_both_precisions():
    family = Mixture(2, components=2).double()
    params = params_of(family)
    gradient = torch.func.grad(lambda p: family(p).rsample().square().sum())
    torch.manual_seed(0)
    assert torch.func.vmap(gradient, randomness="different")(params).isfinite().all()
    q = family(params)
    z = q.sample()
    plain = params.clone().requires_grad_()
    (high,) = torch.autograd.grad(family(plain).differentiable(z).square().sum(), plain)
    single = params.float().requires_grad_()
    (low,) = torch.autograd.grad(Mixture(2, components=2)(single).differentiable(z.float()).square().sum(), single)
    torch.testing.assert_close(low.double(), high, rtol=1e-3, atol=1e-4)


def test_gradient_of_coinciding_and_of_distant_components_is_finite():
    for apart in (0.0, 60.0):
        family = Mixture(1, components=2)
        params = torch.zeros(200, family.param_dim)
        params[:, 2] = apart
        params.requires_grad_()
        (gradient,) = torch.autograd.grad(family(params).rsample().sum(), params)
        assert gradient.isfinite().all()


# -- the encoder's side -----------------------------------------------------------------------------------------------------


def test_adapt_with_missing_entries():
    torch.manual_seed(0)
    x = torch.randn(500, 3, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1]) + torch.tensor([5.0, -3.0, 0.0])
    hole = torch.rand(500, 3) < 0.3
    x[hole] = math.nan
    guide = AmortizedGuide(Linear((3,), 4), DiagonalNormal(2)).double()
    guide.adapt(x)
    for j in range(3):
        column = x[~hole[:, j], j]
        torch.testing.assert_close(guide.loc[j], column.mean())
        torch.testing.assert_close(guide.scale[j], column.std())
    mean = guide.loc.expand(500, 3)
    torch.testing.assert_close(guide.params(x), guide.params(torch.where(hole, mean, x)))
    nothing = torch.full((1, 3), math.nan, dtype=torch.float64)
    torch.testing.assert_close(guide.params(nothing), guide.params(mean[:1]))
    empty = x.clone()
    empty[:, 1] = math.nan
    guide.adapt(empty)
    assert guide.loc.isfinite().all()
    assert guide.params(empty).isfinite().all()


def test_adapt_standardises_images_by_one_number():
    x = torch.rand(40, 2, 3) * torch.linspace(0.5, 4, 3)
    x[0, 0, 0] = math.nan
    guide = AmortizedGuide(Linear((2, 3), 4), DiagonalNormal(2))
    guide.adapt(x)
    assert guide.scale.shape == ()
    seen = x[~x.isnan()]
    torch.testing.assert_close(guide.scale, seen.double().std().float())
    filled = torch.where(x.isnan(), guide.loc.expand_as(x), x)
    torch.testing.assert_close(guide.params(x), guide.params(filled))


@pytest.mark.parametrize("covariates", [0, 2])
@pytest.mark.parametrize("marks", [False, True])
def test_marks_and_covariates_reach_the_encoder(marks, covariates):
    torch.manual_seed(0)
    shape = Linear.joined_shape((3,), marks=marks, covariates=covariates)
    guide = AmortizedGuide(Linear(shape, 4), DiagonalNormal(2), marks=marks)
    x = torch.randn(6, 3)
    guide.adapt(x)
    c = torch.randn(6, covariates) if covariates else None
    plain = guide.params(x, c)
    hole = x.clone()
    hole[0, 1] = math.nan
    mean = torch.where(hole.isnan(), guide.loc.expand_as(x), x)
    same = torch.allclose(guide.params(hole, c), guide.params(mean, c))
    assert same != marks
    torch.testing.assert_close(guide.params(hole, c)[1:], plain[1:])
    if c is not None:
        assert not torch.allclose(guide.params(x, c + 1), plain)


# -- end to end -------------------------------------------------------------------------------------------------------------


@each
def test_the_seam_takes_it_and_states_its_density(name):
    vae, x = small_vae(name, dim=3)
    log_joint = LogJoint(vae.model, vae.guide, x)
    assert log_joint.mode == "vmap", log_joint.notes
    assert log_joint.batched_draws["guide"], log_joint.notes
    u, stated = log_joint.sample_guide(5, seed=0)
    assert u.shape == (5, len(x), spaces.free_dim(vae.prior.space, 3))
    double, wide = copy.deepcopy(vae).double(), x.double()
    with torch.no_grad():
        mine = free_log_prob(double.encode(wide), u, vae.prior.space)
        z = spaces.onto(vae.prior.space)(u)
        joint = double.decode(z).log_prob(wide) + free_log_prob(double.prior.distribution(), u, vae.prior.space)
    torch.testing.assert_close(stated, mine, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(log_joint(u), joint, rtol=1e-7, atol=1e-7)
    part = log_joint.subset(torch.tensor([1, 3]))
    assert part is not None
    torch.testing.assert_close(part.log_guide(u[:, [1, 3]]), stated[:, [1, 3]], rtol=1e-7, atol=1e-7)


@each
def test_thirty_steps_lower_the_loss_and_move_every_parameter(name):
    vae, x = small_vae(name, n=64)
    vae.adapt(x)
    before = {key: value.clone() for key, value in vae.named_parameters()}
    with pyro.get_param_store().scope():
        step = Step(vae, size=len(x), learning_rate=1e-2)
        losses = [step(x)[0] for _ in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5]), losses
    for key, value in vae.named_parameters():
        assert value.grad is not None, key
        assert (value.grad != 0).any(), key
        assert not torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", [*SEMI, "full", "low_rank", "mixture"])
def test_a_guide_that_is_the_posterior_leaves_no_variance(name):
    """log p(x, z) - log q(z|x) = log p(x) at every z, for each family that holds the posterior."""
    dim = 1 if name in ("semi_diagonal", "mixture") else 2
    vae, x, oracle = linear_vae(dim, 5)
    mean, covariance = oracle.posterior(x)
    root = torch.linalg.cholesky(covariance).expand(len(x), dim, dim)
    family = FAMILIES[name](dim).double()
    s = raw(root.diagonal(dim1=-2, dim2=-1))
    if name in ("semi_low_rank", "low_rank"):  # Cov = S (I + v v') S: solved for two latents by sigma and one direction
        variance = covariance.diagonal(dim1=-2, dim2=-1).expand(len(x), 2)
        off = covariance.expand(len(x), 2, 2)[:, 0, 1]
        rho = off / variance.prod(-1).sqrt()
        v = (rho.abs() / (1 - rho.abs())).sqrt()[:, None] * torch.stack([torch.ones_like(rho), rho.sign()], -1)
        params = torch.cat([mean, raw((variance / (1 + v.square())).sqrt()), v], -1)
    elif name == "mixture":
        k = family.components
        params = torch.cat([torch.randn(len(x), k, dtype=torch.float64), mean.repeat(1, k), s.repeat(1, k)], -1)
    else:
        params = torch.cat([mean, s, root[:, 1:, 0]] if dim == 2 else [mean, s], -1)
    _, _, log_joint = vae._seen(x, None, None)
    with torch.no_grad():
        q = family(family.refined(params, log_joint))
        z = q.rsample(torch.Size([50]))
        weight = log_joint(z) - q.log_prob(z)
    # the fixed noise of a refinement has covariance I in float32 alone, which moves the optimum by as much
    slack = 1e-6 if name in SEMI else 1e-9
    torch.testing.assert_close(weight, oracle.log_evidence(x).expand(50, -1), rtol=0, atol=slack)


# -- the registry -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "options", "says"),
    [
        (LowRankNormal, {"rank": 9}, "rank: 9 directions in 3 latents; use at most 3"),
        (LogisticNormal, {}, "latent_dim: a simplex needs at least 2 parts, got 1"),
        (PowerSpherical, {}, "latent_dim: a point of the sphere has at least 2 coordinates, got 1; use 2 or more"),
    ],
)
def test_options_that_do_not_fit_are_refused(cls, options, says):
    with pytest.raises(ValueError, match=says):
        cls(1 if cls in (LogisticNormal, PowerSpherical) else 3, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("student_t", {"df": 2.0}),
        ("student_t", {"df": "many"}),
        ("mixture", {"components": 1}),
        ("semi_amortized", {"steps": -1}),
    ],
)
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(SpecError):
        registry.component("guide", name).cls(3, **options)
