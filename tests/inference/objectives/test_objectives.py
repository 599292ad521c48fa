"""Objectives against closed forms: values, gradients, what is refused, and the errors of others that are not ours."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from support.cases.objectives import ALL, BOUNDS, COPIES, DOUBLE, Chain, Line, Mixture, X, within
from support.cases.vaes import linear_vae, set_guide
from torch import Tensor

from elbowroom.inference.objectives.bounds import IWAE, Beta, DReG, Renyi, StickingTheLanding
from elbowroom.inference.objectives.elbo import ELBO, MeanFieldELBO
from elbowroom.inference.objectives.enumerated import TraceEnum
from elbowroom.inference.objectives.wake_sleep import WakeSleep
from elbowroom.models.guides.normal import FullRankNormal

# with the posterior as the guide


@pytest.mark.parametrize("objective", [*BOUNDS, WakeSleep(), WakeSleep(particles=3)], ids=repr)
def test_with_the_posterior_every_draw_gives_the_evidence(objective):
    vae, x, oracle = linear_vae(2, 4, family=FullRankNormal)
    set_guide(vae, oracle)
    line = Line.exact()
    for model, guide, data, truth in (
        (vae.model, vae.guide, x, oracle.log_evidence(x).sum()),
        (line.model, line.guide, X, line.log_evidence(X).sum()),
    ):
        found = objective(model, guide, data)
        assert found.elbo == pytest.approx(truth.item(), rel=1e-9)
        if not isinstance(objective, WakeSleep):  # its value has log q of dreams in it
            assert found.objective == pytest.approx(-truth.item(), rel=1e-9)
            assert found.loss.item() == pytest.approx(-truth.item(), rel=1e-9)


@pytest.mark.parametrize("objective", [ELBO(), TraceEnum(), Beta(beta=1.0), WakeSleep()], ids=repr)
def test_with_the_posterior_of_a_mixture_every_draw_gives_the_evidence(objective):
    mixture = Mixture().exact()
    log_lik, log_p, _ = mixture.table(X)
    truth = torch.logsumexp(log_lik + log_p, -1).sum().item()
    found = objective(mixture.model, mixture.guide, X)
    assert found.elbo == pytest.approx(truth, rel=1e-9)
    if not isinstance(objective, WakeSleep):
        assert found.objective == pytest.approx(-truth, rel=1e-9)


@pytest.mark.parametrize("objective", [StickingTheLanding(), DReG(particles=3)], ids=repr)
def test_with_the_posterior_the_guides_gradient_has_no_noise(objective):
    line, chain = Line.exact(), Chain()
    for _ in range(5):
        assert line.gradients(objective, X, 1)[0, 1:].abs().max() < 1e-12
        loss = objective(chain.model, chain.guide, X).loss
        for gradient in torch.autograd.grad(loss, chain.leaves):  # two sites: the second's parameters depend on the first
            assert gradient.abs().max() < 1e-12
    plain = {ELBO(): line.gradients(ELBO(), X, 20), IWAE(particles=3): line.gradients(IWAE(particles=3), X, 20)}
    assert all(draws[:, 1:].std(0).min() > 0.01 for draws in plain.values())


# bounds


def test_the_bias_of_iwae_at_rho_3_and_its_order():
    """STATISTICS 6: .0472 / .0057 / .0007 nats at K = 1 / 10 / 100, the best diagonal normal at correlation .3."""
    precision = torch.tensor([[1.0, 0.3], [0.3, 1.0]], **DOUBLE)
    truth, bias = dist.MultivariateNormal(torch.zeros(2, **DOUBLE), precision_matrix=precision), {}

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", truth)
            pyro.factor("x", 0.0 * z.sum(-1))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2, **DOUBLE), 1.0).to_event(1))

    for particles, rows, expected in ((1, 100_000, 0.0472), (10, 40_000, 0.0057), (100, 20_000, 0.0007)):
        x, values = torch.zeros(rows // 20, **DOUBLE), []
        with torch.no_grad():
            values = [IWAE(particles=particles)(model, guide, x).objective / len(x) for _ in range(20)]
        found = torch.tensor(values)
        error = found.std() / 20**0.5
        assert abs(found.mean() - expected) < 4.5 * error + 5e-5
        assert error < 0.004
        bias[particles] = found.mean()
    assert bias[1] > bias[10] > bias[100] > -1e-3


def test_a_bound_of_more_particles_is_tighter_and_below_the_evidence():
    line, truth = Line(), None
    with torch.no_grad():
        truth, many = line.log_evidence(X).sum().item(), X.repeat(COPIES)
        means = [
            torch.tensor([-IWAE(particles=k)(line.model, line.guide, many).objective for _ in range(30)]).mean().item() / COPIES
            for k in (1, 3, 10, 50)
        ]
    assert means == sorted(means)
    assert abs(means[0] - line.elbo(X).item()) < 0.3
    assert truth - 0.1 < means[-1] < truth + 0.02


def test_renyi_meets_elbo_and_iwae():
    line = Line()

    def value(objective):
        torch.manual_seed(3)
        found = objective(line.model, line.guide, X)
        return float(found.objective), line.gradient(found.loss), float(found.elbo)

    for one, other, tolerance in (
        (Renyi(alpha=0.0, particles=6), IWAE(particles=6), 1e-12),
        (Renyi(alpha=1.0 - 1e-5, particles=6), Renyi(alpha=1.0, particles=6), 1e-3),
    ):
        (a, grad_a, elbo_a), (b, grad_b, elbo_b) = value(one), value(other)
        assert a == pytest.approx(b, abs=tolerance)
        assert elbo_a == elbo_b
        assert torch.allclose(grad_a, grad_b, atol=10 * tolerance)
    found = value(Renyi(alpha=1.0, particles=6))
    assert found[0] == -found[2]
    bounds = [value(Renyi(alpha=alpha, particles=6))[0] for alpha in (-1.0, 0.0, 0.5, 1.0, 2.0)]
    assert bounds == sorted(bounds)  # losses: the bound falls as alpha rises


# gradients


@pytest.mark.parametrize("weight", [1.0, 0.4])
@pytest.mark.parametrize("objective", [ELBO(), StickingTheLanding(), MeanFieldELBO(), Beta(beta=1.0)], ids=repr)
def test_gradients_of_the_elbo_are_unbiased(objective, weight):
    line = Line()
    draws = line.gradients(objective, X, 60, kl_weight=weight)
    assert within(draws, -line.gradient(line.elbo(X, weight)))


@pytest.mark.parametrize("weight", [1.0, 0.4])
@pytest.mark.parametrize("objective", [IWAE(particles=4), DReG(particles=4), Renyi(alpha=0.4, particles=4)], ids=repr)
def test_gradients_of_multi_sample_bounds_are_unbiased(objective, weight):
    line = Line()
    order = 1.0 - getattr(objective, "alpha", 0.0)
    noise = torch.randn(4, 100_000 * len(X), generator=torch.Generator().manual_seed(9), **DOUBLE)
    log_w = line.log_w(X.repeat(100_000), noise, weight)
    bound = (torch.logsumexp(order * log_w, 0) - math.log(4)).sum() / order / 100_000
    draws = line.gradients(objective, X, 50, kl_weight=weight)
    # the yardstick's own error is small beside the mean's
    assert within(draws, -line.gradient(bound), 4.6)
    many = X.repeat(COPIES)
    values = torch.tensor([objective(line.model, line.guide, many, kl_weight=weight).objective for _ in range(50)]) / COPIES
    assert within(values, -bound.detach())


@pytest.mark.parametrize("particles", [1, 8])
def test_dreg_has_less_noise_than_iwae(particles):
    line = Line.exact()
    with torch.no_grad():
        line.leaves[1] += 0.02
    noise = [line.gradients(o(particles=particles), X, 40)[:, 1:].std(0) for o in (DReG, IWAE)]
    assert (noise[0] < 0.5 * noise[1]).all()


def test_dreg_on_a_transformed_guide():
    """A log-normal guide: a draw remembers its base value, by which its gradient must not pass."""
    loc, scale = (torch.tensor(v, requires_grad=True, **DOUBLE) for v in (0.2, 0.6))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.full_like(x, 2.0), 1.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(loc.expand(len(x)), scale))

    def gradients(objective, times=50):
        many = X.abs().repeat(COPIES)
        found = [torch.autograd.grad(objective(model, guide, many).loss, [loc, scale]) for _ in range(times)]
        return torch.tensor(found) / COPIES

    for one, other in ((DReG(particles=3), IWAE(particles=3)), (StickingTheLanding(), ELBO())):
        a, b = gradients(one), gradients(other)
        error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 4.5 * error).all()


def test_mean_field_has_the_elbos_mean_and_less_noise_far_from_the_posterior():
    line = Line(a=0.1, b=0.0, r=-1.0)  # far too narrow, and z tells little of x
    with torch.no_grad():
        many = X.repeat(COPIES)
        of = lambda name, o: torch.tensor([getattr(o(line.model, line.guide, many), name) for _ in range(50)]) / COPIES
        values = [of("objective", ELBO()), of("objective", MeanFieldELBO())]
        beside = of("elbo", MeanFieldELBO())
        truth = line.elbo(X)
    assert within(values[0], -truth)
    assert within(values[1], -truth)
    assert within(beside, truth)
    assert values[1].std() < 0.6 * values[0].std()


# discrete latents


@pytest.mark.parametrize("weight", [1.0, 0.3, 0.0])
def test_trace_enum_is_the_sum_by_hand(weight):
    mixture = Mixture()
    found = TraceEnum()(mixture.model, mixture.guide, X, size=12, kl_weight=weight)
    assert found.objective == pytest.approx(-3 * mixture.elbo(X, weight).item(), rel=1e-12)
    assert found.elbo == pytest.approx(3 * mixture.elbo(X).item(), rel=1e-12)
    wanted = torch.autograd.grad(-3 * mixture.elbo(X, weight), mixture.leaves, allow_unused=True)
    got = torch.autograd.grad(found.loss, mixture.leaves, allow_unused=True)
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(torch.zeros(2, **DOUBLE) if a is None else a, torch.zeros(2, **DOUBLE) if b is None else b)


@pytest.mark.parametrize("weight", [1.0, 0.4])
@pytest.mark.parametrize("objective", [ELBO(), Beta(beta=1.0), Beta(beta=2.0)], ids=repr)
def test_the_score_function_gradient_of_a_mixture_is_unbiased(objective, weight):
    mixture = Mixture()
    wanted = torch.autograd.grad(-mixture.elbo(X, weight * getattr(objective, "beta", 1.0)), mixture.leaves)
    many = X.repeat(COPIES)
    draws = [
        torch.cat(torch.autograd.grad(objective(mixture.model, mixture.guide, many, kl_weight=weight).loss, mixture.leaves))
        for _ in range(50)
    ]
    assert within(torch.stack(draws) / COPIES, torch.cat(wanted))


@pytest.mark.parametrize("objective", [IWAE(), Renyi(), DReG(), StickingTheLanding(), MeanFieldELBO()], ids=repr)
def test_what_needs_differentiable_draws_refuses_others(objective):
    mixture = Mixture()
    with pytest.raises(ValueError, match=rf"^{objective.name}: needs a guide whose draws are differentiable"):
        objective(mixture.model, mixture.guide, X)
    assert "trace_enum" in objective.refuses(True, False)
    assert objective.refuses(False, True) is None
    line = Line()
    with pytest.raises(ValueError, match=r"^trace_enum: needs discrete latents"):
        TraceEnum()(line.model, line.guide, X)
    assert TraceEnum.refuses(True, False) is None
    assert ELBO.refuses(True, False) is WakeSleep.refuses(True, False) is Beta.refuses(True, False) is None


# wake-sleep


@pytest.mark.parametrize("make", [Line, Mixture])
def test_wake_and_sleep_do_not_mix(make):
    pair, objective, n = make(), WakeSleep(), 500
    own = {Line: 1, Mixture: 2}[make]
    found = []
    for _ in range(n):
        parts = torch.autograd.grad(objective(pair.model, pair.guide, X).loss, pair.leaves)
        found.append(torch.cat([g.flatten() for g in parts]))
    found = torch.stack(found)
    if make is Line:
        wake = torch.autograd.grad(-pair.elbo(X), pair.leaves[:1])  # q is fixed: the gradient of the ELBO for the model
        a, b, c, r = pair.leaves
        # dreams: E log q(z|x) under p, with E z^2 = 1, E z x = a, E x^2 = a^2 + s2; len(X) of them
        with torch.no_grad():
            zz, zx, xx = 1.0, a.item(), (a**2).item() + pair.s2
        square = zz - 2 * b * zx + b**2 * xx + c**2
        sleep = torch.autograd.grad(len(X) * (r + 0.5 * square / (2 * r).exp()), pair.leaves[1:])
    else:
        wake = torch.autograd.grad(-pair.elbo(X), pair.leaves[:2])
        k = torch.distributions.Categorical(logits=pair.leaves[1].detach()).sample((400_000,))
        dreams = pair.leaves[0].detach()[k] + torch.randn(400_000, **DOUBLE)
        log_q = pair.table(dreams)[2].gather(1, k[:, None]).mean()
        sleep = torch.autograd.grad(-len(X) * log_q, pair.leaves[2:])
    assert len(wake) == own
    assert within(found, torch.cat([g.flatten() for g in (*wake, *sleep)]), 4.6)


def test_dreams_keep_holes_covariates_and_the_callers_data():
    seen = []

    def model(x: Tensor, c: Tensor) -> None:
        from elbowroom.models.likelihoods.missing import Incomplete

        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(c, 1.0))
            p = dist.Normal(z[:, None].expand(-1, 2), 1.0).to_event(1)
            pyro.sample("x", Incomplete(p, x.isnan(), 0.0), obs=x)

    def guide(x: Tensor, c: Tensor) -> None:
        seen.append((x.clone(), c))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.nan_to_num().sum(-1) + c, 1.0))

    x = torch.tensor([[1.0, math.nan], [0.5, 2.0], [math.nan, -1.0]])
    c, before = torch.tensor([10.0, 20.0, 30.0]), x.clone()
    WakeSleep()(model, guide, x, c=c)
    (data, _), (dream, beside) = seen
    assert torch.equal(data.isnan(), dream.isnan())
    assert torch.equal(x.nan_to_num(), before.nan_to_num())
    assert beside is c
    assert ((dream.nan_to_num(nan=0.0) - c[:, None]).abs()[~x.isnan()] < 8).all()

    def hidden(x: Tensor, c: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(c, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.sum(-1))

    with pytest.raises(ValueError, match=r"^wake_sleep: the value of observed site 'x' is none of the arguments"):
        WakeSleep()(hidden, guide, x.nan_to_num(), c)


# weights of the KL part


@pytest.mark.parametrize("weight", [1.0, 0.5, 0.0])
def test_beta_is_its_formula(weight):
    line, objective = Line(), Beta(beta=3.0, free_bits=0.25)
    torch.manual_seed(4)
    found = objective(line.model, line.guide, X, size=8, kl_weight=weight)
    torch.manual_seed(4)
    noise = torch.randn(len(X), **DOUBLE)
    log_lik = line.log_w(X, noise, 0.0)
    kl = (log_lik - line.log_w(X, noise)).mean()
    wanted = -2 * (log_lik.sum() - 3 * weight * 4 * kl.clamp_min(0.25))
    assert found.objective == pytest.approx(wanted.item(), rel=1e-12)
    assert found.elbo == pytest.approx(2 * line.log_w(X, noise).sum().item(), rel=1e-12)
    assert torch.allclose(line.gradient(found.loss), line.gradient(wanted))


def test_free_bits_leave_no_gradient_below_the_floor():
    line = Line()
    torch.manual_seed(4)
    floored = line.gradient(Beta(beta=1.0, free_bits=50.0)(line.model, line.guide, X).loss)
    torch.manual_seed(4)
    bare = line.gradient(ELBO()(line.model, line.guide, X, kl_weight=0.0).loss)
    assert torch.allclose(floored, bare)


@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_the_kl_weight_and_the_plain_elbo_beside(objective):
    """At weight w every objective is that of log p(x|z) + w [log p(z) - log q]: the same draws with a scaled KL."""
    line, k = Line(), getattr(objective, "particles", 1)

    def estimate(weight: float):
        torch.manual_seed(7)
        return objective(line.model, line.guide, X, kl_weight=weight)

    torch.manual_seed(7)
    noise = torch.randn(k * len(X), **DOUBLE).reshape(k, -1)
    for weight in (0.0, 0.3, 1.0):
        found, log_w = estimate(weight), line.log_w(X, noise, weight)
        assert found.elbo == pytest.approx(line.log_w(X, noise).mean(0).sum().item(), rel=1e-10)
        if isinstance(objective, MeanFieldELBO | Beta | WakeSleep):
            continue
        order = 1.0 - getattr(objective, "alpha", 0.0)
        wanted = (torch.logsumexp(order * log_w, 0) - math.log(k)).sum() / order
        assert found.objective == pytest.approx(-wanted.item(), rel=1e-10)
    if isinstance(objective, MeanFieldELBO | WakeSleep):
        # linear in w, for one draw
        low, middle, high = (float(estimate(weight).objective) for weight in (0.0, 0.5, 1.0))
        assert k > 1 or middle == pytest.approx((low + high) / 2, rel=1e-10)
        assert low != high


# errors of others


def test_iwae_is_never_below_the_true_negative_log_likelihood():
    """pythae's IWAE loss was 11.171 where -log p(x) was 11.323: the mean over data of bounds must stay below."""
    vae, x, oracle = linear_vae(2, 6, n=50)
    truth = -oracle.log_evidence(x).sum().item()
    with torch.no_grad():
        for objective in (IWAE(particles=20), DReG(particles=20)):
            losses = torch.tensor([objective(vae.model, vae.guide, x).objective for _ in range(50)])
            assert losses.mean() > truth - 4.5 * losses.std() / 50**0.5
            assert (losses.mean() - truth) / len(x) > 0.01


def test_draws_of_more_weight_pull_more():
    """PyTorch-VAE's softmax had its sign wrong: the gradient must be the weighted mean, with the better draw weighing more."""
    line = Line()
    torch.manual_seed(5)
    found = line.gradient(IWAE(particles=2)(line.model, line.guide, X[:1]).loss)[0]
    torch.manual_seed(5)
    log_w = line.log_w(X[:1], torch.randn(2, **DOUBLE)[:, None])[:, 0]
    each = torch.stack([line.gradient(-value)[0] for value in log_w])
    assert torch.allclose(found, (log_w.detach().softmax(0) * each).sum())
    assert not torch.allclose(found, ((-log_w.detach()).softmax(0) * each).sum(), rtol=1e-3)
