"""The sphere: its map, the von Mises-Fisher and power spherical distributions by closed forms, a VAE on the circle by hand."""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.special
import torch
from pyro.distributions import constraints
from scipy.stats import vonmises_fisher
from torch.func import grad, jacrev, vmap

from elbowroom.inference.references.grid.grid import Grid
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.inference.target.of_vae import log_joint_of
from elbowroom.models.guides.base import AmortizedGuide, Onto
from elbowroom.models.guides.families import PowerSpherical as Family
from elbowroom.models.guides.normal import DiagonalNormal
from elbowroom.models.likelihoods.continuous import Gaussian
from elbowroom.models.networks.mlp import MLP, Linear
from elbowroom.models.priors.constrained import VonMisesFisher as Prior
from elbowroom.models.sphere import (
    OntoSphere,
    PowerSpherical,
    VonMisesFisher,
    great_circle,
    log_area,
    log_gamma_ratio,
    log_von_mises_fisher,
    unit,
)
from elbowroom.models.vae import VAE
from elbowroom.spec import spec as specs
from elbowroom.spec.assembly import Facts, assemble

DIMS = [2, 3, 5, 8, 64]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the map ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", DIMS)
def test_the_map_its_inverse_and_the_area_that_it_stretches(d):
    u, to = 2 * normal(100, d - 1), OntoSphere()
    z = to(u)
    assert constraints.sphere.check(z).all()
    torch.testing.assert_close(to.inv(z), u, rtol=1e-12, atol=1e-12)
    J = vmap(jacrev(to))(u)
    area = 0.5 * torch.linalg.slogdet(J.mT @ J).logabsdet
    torch.testing.assert_close(to.log_abs_det_jacobian(u, z), area, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(to.inv(to(u.float())), u.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("d", DIMS)
def test_the_map_is_finite_and_smooth_at_both_poles(d):
    to, length = OntoSphere(), torch.tensor([0.0, 1e-200, 1e-9, 0.2, 25.0], dtype=torch.float64)
    u = unit(normal(5, d - 1)) * length[:, None]
    torch.testing.assert_close(to.inv(to(u)), u, rtol=1e-10, atol=1e-12)
    det = lambda u: to.log_abs_det_jacobian(u, None)
    for f in (grad(det), jacrev(grad(det)), jacrev(to), jacrev(lambda u: to.inv(to(u)))):
        assert vmap(f)(u).isfinite().all()
    last = torch.eye(d, dtype=torch.float64)[-1]
    assert (to.inv(last) == 0).all()
    assert to.inv(-last).isfinite().all()
    assert to.inv(-last.float()).isfinite().all()


@pytest.mark.parametrize("d", DIMS)
def test_the_uniform_distribution_is_nearly_a_standard_normal_below_the_map(d):
    """So that a grid and HMC meet light tails and unit scales; for d = 3 it is one, exactly."""
    u = normal(4000, d - 1)
    off = OntoSphere().log_abs_det_jacobian(u, None) - log_area(d) + (u.square() + math.log(2 * math.pi)).sum(-1) / 2
    assert -0.02 < float(off.mean()) < 0.02
    if d == 3:
        torch.testing.assert_close(off, torch.zeros_like(off), rtol=0, atol=1e-12)


# -- von Mises-Fisher -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [2, 3, 4, 7, 16, 33, 64])
def test_the_normaliser_of_von_mises_fisher_and_its_derivative_against_bessel_functions(d):
    k = torch.tensor([1e-2, 0.3, 1, 5, 20, 80, 300, 1000], dtype=torch.float64, requires_grad=True)
    found = log_von_mises_fisher(k, d)
    n = k.detach().numpy()
    seen = scipy.special.ive(d / 2 - 1, n) > 1e-290
    expected = d / 2 * math.log(2 * math.pi) + np.log(scipy.special.ive(d / 2 - 1, n)) + n - (d / 2 - 1) * np.log(n)
    np.testing.assert_allclose(found.detach().numpy()[seen], expected[seen], rtol=1e-11, atol=1e-11)
    ratio = scipy.special.ive(d / 2, n) / scipy.special.ive(d / 2 - 1, n)
    np.testing.assert_allclose(torch.autograd.grad(found.sum(), k)[0].numpy()[seen], ratio[seen], rtol=1e-11, atol=1e-13)
    zero = torch.zeros((), dtype=torch.float64)
    assert math.isclose(float(log_von_mises_fisher(zero, d)), log_area(d), rel_tol=1e-12)
    torch.testing.assert_close(vmap(lambda k: log_von_mises_fisher(k, d))(k), found)
    single = log_von_mises_fisher(k.detach().float(), d).double()
    torch.testing.assert_close(single, found.detach(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("d", [2, 3, 8])
def test_von_mises_fisher_agrees_with_scipy(d):
    mu = unit(normal(d))
    z = unit(normal(20, d, seed=1))
    np.testing.assert_allclose(
        VonMisesFisher(7.0 * mu).log_prob(z).numpy(), vonmises_fisher(mu.numpy(), 7.0).logpdf(z.numpy()), rtol=1e-10
    )


@pytest.mark.parametrize("k", [0.0, 0.5, 20.0, 900.0])
@pytest.mark.parametrize("d", [2, 3, 8])
def test_draws_of_von_mises_fisher_have_its_mean_and_its_entropy(d, k):
    torch.manual_seed(0)
    p = VonMisesFisher(k * unit(normal(d)))
    z = p.sample(torch.Size([40_000]))
    assert constraints.sphere.check(z).all()
    error = z.std(0) / len(z) ** 0.5
    assert ((z.mean(0) - p.mean).abs() < 4.5 * error).all()
    along = (z @ unit(p.eta)).square()
    t, weight = (part for part in scipy.special.roots_jacobi(200, (d - 3) / 2, (d - 3) / 2))
    share = weight * np.exp(k * (t - 1))
    assert abs(float(along.mean()) - (share @ t**2) / share.sum()) < 4.5 * float(along.std()) / len(z) ** 0.5
    assert not p.has_rsample


# -- power spherical --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0.0, 0.7, 30.0])
@pytest.mark.parametrize("d", [2, 3, 5])
def test_power_spherical_integrates_to_one(d, k):
    """Over the cosine t to mu: |S^(d-2)| int f(t) (1 - t^2)^((d-3)/2) dt, at points turned anywhere across mu."""
    mu = unit(normal(d))
    q = PowerSpherical(mu, torch.tensor(k, dtype=torch.float64))
    t, weight = scipy.special.roots_jacobi(2000, (d - 3) / 2, (d - 3) / 2)
    across = normal(len(t), d, seed=1)
    across = unit(across - (across @ mu)[:, None] * mu)
    t = torch.from_numpy(t)[:, None]
    density = q.log_prob(t * mu + (1 - t.square()).sqrt() * across).exp()
    assert abs(float(density @ torch.from_numpy(weight)) * math.exp(log_area(d - 1)) - 1) < 1e-8  # (1 + t)^0.7 has a kink


@pytest.mark.parametrize("k", [0.01, 3.0, 400.0])
@pytest.mark.parametrize("d", [2, 3, 8])
def test_draws_of_power_spherical_have_its_moments_and_its_entropy(d, k):
    torch.manual_seed(0)
    q = PowerSpherical(unit(normal(d)), torch.tensor(k, dtype=torch.float64))
    z = q.sample(torch.Size([40_000]))
    assert constraints.sphere.check(z).all()
    assert ((z.mean(0) - q.mean).abs() < 4.5 * z.std(0) / len(z) ** 0.5).all()
    square = (z - q.mean).square()
    assert ((square.mean(0) - q.variance).abs() < 4.5 * square.std(0) / len(z) ** 0.5).all()
    surprise = -q.log_prob(z)
    assert abs(float(surprise.mean() - q.entropy())) < 4.5 * float(surprise.std()) / len(z) ** 0.5


def test_the_gradient_through_draws_of_power_spherical_is_that_of_their_moments():
    torch.manual_seed(0)
    raw = normal(3).requires_grad_()
    log_k = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    q = PowerSpherical(unit(raw), log_k.exp())
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    exact = torch.autograd.grad((q.mean * weight).sum(), (raw, log_k), retain_graph=True)
    each = [
        torch.autograd.grad((q.rsample(torch.Size([500])).mean(0) * weight).sum(), (raw, log_k), retain_graph=True)
        for _ in range(60)
    ]
    for part, expected in enumerate(exact):
        found = torch.stack([one[part] for one in each])
        assert ((found.mean(0) - expected).abs() < 4.5 * found.std(0) / len(found) ** 0.5).all()


@pytest.mark.parametrize("d", [2, 3, 8])
def test_kl_from_uniform_by_its_closed_form(d):
    """KL(q || uniform) = log |S^(d-1)| - entropy; zero at concentration 0; by quadrature over the cosine elsewhere."""
    q = PowerSpherical(unit(normal(d)).expand(2, d), torch.tensor([0.0, 12.0], dtype=torch.float64))
    kl = log_area(d) - q.entropy()
    t, weight = scipy.special.roots_jacobi(400, (d - 3) / 2, (d - 3) / 2)
    a, b = 12 + (d - 1) / 2, (d - 1) / 2
    log_norm = (a + b) * math.log(2) + b * math.log(math.pi) + math.lgamma(a) - math.lgamma(a + b)
    log_q = 12 * np.log1p(t) - log_norm
    by_hand = math.exp(log_area(d - 1)) * (weight @ (np.exp(log_q) * (log_q + log_area(d))))
    np.testing.assert_allclose(kl.numpy(), [0, by_hand], atol=1e-10)


def test_a_very_concentrated_power_spherical_is_a_normal_across_mu_in_single_precision_too():
    """log q = -k |z - mu|^2 / 4 + const, where differences of log gamma functions have no digits left."""
    for dtype, slack in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        mu = unit(normal(3)).to(dtype)
        q = PowerSpherical(mu, torch.tensor(1e6, dtype=dtype))
        assert abs(float(q.log_prob(mu)) - (math.log(1e6 + 1) - math.log(4 * math.pi))) < slack


@pytest.mark.parametrize("n", [1, 2, 3, 8, 63])
def test_log_gamma_ratio(n):
    a = torch.tensor([0.5, 0.75, 1, 3, 12, 200], dtype=torch.float64)
    torch.testing.assert_close(log_gamma_ratio(a, n), torch.lgamma(a + n / 2) - torch.lgamma(a), rtol=1e-11, atol=1e-11)


# -- a VAE on the circle, by hand -------------------------------------------------------------------------------------------


def circle(family: torch.nn.Module, concentration: float) -> tuple[VAE, torch.Tensor]:
    torch.manual_seed(0)
    guide = AmortizedGuide(MLP((3,), family.param_dim, hidden=(8,)), family)
    vae = VAE(Prior(2, concentration=concentration), Gaussian((3,), scale=0.4), Linear((2,), 3), guide).double().eval()
    with torch.no_grad():
        return vae, vae.model(n=6)


def by_angle(vae: VAE, x: torch.Tensor, f) -> list[float]:
    """Integrate f(x, z, log p(x, z), log q(z|x)) over the angle by scipy, the decoder and the densities written out."""
    layer, prior = vae.decoder.body, vae.prior
    k, unit_x, loc = float(prior.axis[-1]), vae.likelihood.unit.numpy(), vae.likelihood.loc.numpy()
    sd = vae.likelihood.noise_scale().detach().numpy()
    W, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    out = []
    for i in range(len(x)):
        q = vae.encode(x[i : i + 1])

        def value(angle: float, i: int = i, q=q) -> float:
            z = np.array([math.cos(angle), math.sin(angle)])
            off = (x[i].numpy() - loc - unit_x * (W @ z + b)) / sd
            log_p = -0.5 * off @ off - np.log(sd * np.ones(3)).sum() - 1.5 * math.log(2 * math.pi)
            log_p += k * z[1] - math.log(2 * math.pi * scipy.special.i0(k))
            return f(log_p, float(q.log_prob(torch.from_numpy(z)[None]).detach()))

        out.append(scipy.integrate.quad(value, -math.pi, math.pi, epsabs=1e-11, epsrel=1e-11, limit=400)[0])
    return out


@pytest.mark.parametrize("concentration", [0.0, 2.5])
@pytest.mark.parametrize("family", [Family(2), Onto(DiagonalNormal(1), "sphere", 2)], ids=["power_spherical", "carried"])
def test_the_evidence_and_the_elbo_on_the_circle_agree_with_integrals_over_the_angle(family, concentration):
    vae, x = circle(family, concentration)
    joint = log_joint_of(vae, {"x": x})
    found = Grid(tolerance=1e-6)(joint, keep=100, seed=0)
    assert set(found.status) == {"exact"}, found.reason
    evidence = np.log(by_angle(vae, x, lambda log_p, _: math.exp(log_p)))
    np.testing.assert_allclose(found.evidence.value.numpy(), evidence, atol=1e-6)
    elbo = by_angle(vae, x, lambda log_p, log_q: math.exp(log_q) * (log_p - log_q) if log_q > -700 else 0.0)
    # the same integral below the map, where the program computes it
    u = torch.linspace(-9, 9, 4001, dtype=torch.float64)[:, None, None].expand(-1, len(x), 1)
    with torch.no_grad():
        log_p, log_q = joint(u), joint.log_guide(u)
    inner = ((log_q.exp() * (log_p - log_q)).sum(0) * 18 / 4000).numpy()
    np.testing.assert_allclose(inner, elbo, atol=1e-6)
    assert (inner <= evidence + 1e-9).all()


def test_a_program_with_projected_normals_can_be_audited():
    """A foreign program with sites on a sphere: its evidence against the integral over the angle."""
    x = torch.tensor([[0.3, 0.2], [-1.0, 0.4]], dtype=torch.float64)
    loc = torch.tensor([0.5, -0.2], dtype=torch.float64)

    def model(x):
        import pyro

        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.ProjectedNormal(loc.expand(len(x), 2)))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x):
        import pyro

        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.ProjectedNormal(x))

    found = Grid()(LogJoint(model, guide, x), keep=100, seed=0)
    assert set(found.status) == {"exact"}
    angle = torch.linspace(-math.pi, math.pi, 4001, dtype=torch.float64)[:-1, None]
    z = torch.cat([angle.cos(), angle.sin()], -1)[:, None]
    log_p = dist.ProjectedNormal(loc).log_prob(z) + dist.Normal(z, 0.5).to_event(1).log_prob(x)
    exact = torch.logsumexp(log_p, 0) + math.log(2 * math.pi / 4000)
    torch.testing.assert_close(found.evidence.value, exact, rtol=0, atol=1e-6)


# -- beside -----------------------------------------------------------------------------------------------------------------


def test_the_great_circle_stays_on_the_sphere_in_even_steps():
    a, b = unit(normal(5)), unit(normal(5, seed=1))
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    for end in (b, -a, a):
        z = great_circle(0.3 * a, end, t)
        torch.testing.assert_close(z.norm(dim=-1), torch.ones(9, dtype=torch.float64))
        torch.testing.assert_close(z[0], a)
        torch.testing.assert_close(z[-1], end)
        steps = z.diff(dim=0).norm(dim=-1)
        torch.testing.assert_close(steps, steps[:1].expand(8), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("family", ["power_spherical", "diagonal_normal", "full_rank_normal"])
def test_one_latent_is_refused_in_a_line(family):
    tree = {
        "data": "memory",
        "model": {"latent_dim": 1, "prior": "von_mises_fisher", "likelihood": "gaussian"},
        "guide": {"family": family},
    }
    with pytest.raises(Exception, match=r"latent_dim: .* sphere.* at least 2 coordinates, got 1; use 2 or more") as said:
        assemble(specs.validate(tree).spec, Facts(event_shape=(3,)))
    assert "\n" not in str(said.value)


def test_a_learned_concentration_starts_at_one_and_covariates_turn_the_mean():
    assert abs(float(Prior(3, concentration="learned").double().distribution().concentration.detach()) - 1) < 1e-5
    prior = Prior(3, 2, covariates=True).double()
    c = normal(4, 2)
    torch.testing.assert_close(unit(prior.distribution(c).eta), unit(prior.map(c)))
    torch.testing.assert_close(
        prior.distribution(torch.zeros(1, 2).double()).log_prob(unit(normal(3))).exp(),
        torch.full((1,), 1 / (4 * math.pi), dtype=torch.float64),
    )
