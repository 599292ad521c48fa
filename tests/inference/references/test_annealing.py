"""Annealed importance sampling: bounds on both sides of closed forms, a missed mode, and what breaks them."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from types import SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from support.bidirectional import bdmc
from support.cases.vaes import linear_vae
from support.problems.multimodal import square
from torch import Tensor

from elbowroom.inference.mcmc.normals import Normals, StudentT
from elbowroom.inference.posterior import resample
from elbowroom.inference.references.ais import ais, annealing
from elbowroom.inference.references.ais.ais import Annealed
from elbowroom.inference.references.ais.annealing import Ladder, lower, schedule, summarise, tune, upper
from elbowroom.inference.references.ais.paths import Metric, PriorPath, RefitPath
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.models.linear_gaussian import LinearGaussian

F64 = torch.float64


def linear(n: int, dim: int = 5, width: int = 20, noise: float = 0.1**0.5) -> tuple[LogJoint, LinearGaussian, Tensor]:
    vae, x, oracle = linear_vae(dim, width, noise=noise, n=n)
    return LogJoint(vae.model, vae.guide, x), oracle, x


def exact(oracle: LinearGaussian, x: Tensor) -> Normals:
    mean, covariance = oracle.posterior(x)
    return Normals.from_moments(mean, covariance.expand(len(x), -1, -1).contiguous())


def best_diagonal(oracle: LinearGaussian, x: Tensor) -> Normals:
    mean, variance = oracle.best_diagonal(x)
    return Normals(mean, torch.diag_embed(variance.sqrt()).expand(len(x), -1, -1).contiguous())


def mean_and_error(values: Tensor) -> tuple[float, float]:
    return values.mean().item(), values.std().item() / len(values) ** 0.5


# -- the pieces --------------------------------------------------------------------------------------------------------------


def test_the_schedule_is_a_sigmoid_from_zero_to_one() -> None:
    b = schedule(10)
    assert len(b) == 11
    assert (b[0], b[-1]) == (0, 1)
    widths = b.diff()
    assert (widths > 0).all()
    torch.testing.assert_close(widths, widths.flip(0))
    assert widths[5] / widths[0] > 5
    low, high = 1 / (1 + math.exp(4)), 1 / (1 + math.exp(-4))
    assert b[3].item() == pytest.approx((1 / (1 + math.exp(1.6)) - low) / (high - low))


def test_student_t() -> None:
    """Density and gradient against torch and autograd; draws by their covariance nu / (nu - 2) and the share within a scale."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 3, 3, dtype=F64, generator=generator).tril()
    root.diagonal(dim1=-2, dim2=-1).abs_().add_(0.3)
    t = StudentT(torch.randn(4, 3, dtype=F64, generator=generator), root, df=7)
    z = t.sample(5, generator).requires_grad_()
    value, gradient = t.log_prob_grad(z)
    u = torch.linalg.solve_triangular(root, (z - t.loc)[..., None], upper=False)[..., 0]
    log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    # p(u) = integral of N(u; 0, I 7 / c) chi2_7(c) dc, by quadrature
    c = torch.linspace(1e-6, 80, 40_001, dtype=F64)
    chi2 = dist.Chi2(torch.tensor(7.0, dtype=F64)).log_prob(c)
    kernel = -0.5 * u.detach().square().sum(-1)[..., None] * c / 7 + 1.5 * (c / 7 / (2 * math.pi)).log() + chi2
    integral = torch.logsumexp(kernel, -1) + (c[1] - c[0]).log()
    torch.testing.assert_close(value.detach(), integral - log_det, atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient.detach(), torch.autograd.grad(value.sum(), z)[0])
    draws = t.sample(40_000, generator)
    white = torch.linalg.solve_triangular(root, (draws - t.loc).permute(1, 2, 0), upper=False)
    margin = dist.StudentT(torch.tensor(7.0, dtype=F64))
    inside = (white.abs() < 1).double().mean(-1)
    ends = torch.linspace(-1, 1, 2001, dtype=F64)
    expected = torch.trapezoid(margin.log_prob(ends).exp(), ends)
    assert (inside - expected).abs().max() < 4.5 * (0.25 / 40_000) ** 0.5


def test_the_metric_of_a_linear_gaussian_path_is_its_covariance() -> None:
    """M_b = (1 - b) I + b M, so L_b L_b' = M_b^-1 at every b."""
    _, oracle, x = linear(3)
    metric = Metric.between(torch.ones(3, 5, dtype=F64), exact(oracle, x))
    for b in (0.0, 0.2, 0.9, 1.0):
        root = metric.root(b)
        precision = (1 - b) * torch.eye(5, dtype=F64) + b * oracle.precision
        torch.testing.assert_close(root @ root.mT, torch.linalg.inv(precision).expand(3, -1, -1))


def test_a_metric_without_a_finite_normal_keeps_the_scale() -> None:
    _, oracle, x = linear(3)
    q = exact(oracle, x)
    q.root[1] = torch.nan
    scale = torch.full((3, 5), 2.0, dtype=F64)
    root = Metric.between(scale, q).root(1.0)
    torch.testing.assert_close(root[1] @ root[1].T, 4 * torch.eye(5, dtype=F64))
    torch.testing.assert_close(root[2] @ root[2].T, torch.linalg.inv(oracle.precision))


def test_the_error_is_the_spread_of_the_bound() -> None:
    """sqrt(1/ESS - 1/S) against the spread over 4,000 repeats of log mean of 64 log-normal weights of small variance."""
    log_w = 0.5 * torch.randn(64, 4000, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = summarise(log_w[..., None], log_w, torch.zeros(4000))
    assert found.error.mean().item() == pytest.approx(found.value.std().item(), rel=0.06)
    assert found.value.mean().item() == pytest.approx(0.125, abs=0.005)


def test_equal_and_empty_weights() -> None:
    log_w = torch.zeros(8, 3, dtype=F64)
    log_w[:, 1] = -torch.inf
    log_w[1:, 2] = -torch.inf
    found = summarise(log_w[..., None], log_w, torch.zeros(3))
    torch.testing.assert_close(found.ess, torch.tensor([8.0, 0.0, 1.0], dtype=F64))
    torch.testing.assert_close(found.value, torch.tensor([0.0, -torch.inf, -math.log(8)], dtype=F64))
    assert found.error[1] == torch.inf
    assert found.error[0] < 1e-7


# -- against the closed form -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [0.01, 0.2, 1.0])
def test_log_z_at_every_temperature(b: float) -> None:
    """Chains that stop at b estimate log Z_b, which is known; D = 20, k = 5, s2 = .1, 40 data."""
    log_joint, oracle, x = linear(40)
    path = PriorPath(log_joint, exact(oracle, x))
    plan = tune(path, temperatures=60, leapfrogs=2, seed=1)
    found = lower(path, dataclasses.replace(plan, b=[b * t for t in plan.b]), chains=16, seed=2)
    mean, error = mean_and_error(found.value - oracle.log_evidence(x, temperature=b))
    assert -0.35 < mean < 4.5 * error
    assert error < 0.2


@pytest.mark.slow
def test_ten_temperatures_from_an_inflated_q_star() -> None:
    """T = 10 from 1.3 x the exact normal, a Student-t, and 1.3 x the best diagonal normal, which is worse."""
    log_joint, oracle, x = linear(40)
    truth = oracle.log_evidence(x)
    for path, bias in (
        (RefitPath(log_joint, exact(oracle, x)), 0.03),
        (RefitPath(log_joint, exact(oracle, x), inflation=1.0, df=5), 0.03),
        (RefitPath(log_joint, best_diagonal(oracle, x)), 0.4),
    ):
        found = lower(path, tune(path, temperatures=10, leapfrogs=4, seed=3), chains=16, seed=4)
        mean, error = mean_and_error(found.value - truth)
        assert -bias < mean < 4.5 * error


@pytest.mark.slow
def test_a_thousand_temperatures_from_the_prior() -> None:
    """STATISTICS.md section 6: T = 1000 from the prior within .1 nat; T = 10 from 1.3 q* within .1; both inside their SE."""
    log_joint, oracle, x = linear(40)
    truth = oracle.log_evidence(x)
    q = exact(oracle, x)
    for path, temperatures in ((PriorPath(log_joint, q), 1000), (PriorPath(log_joint), 1000), (RefitPath(log_joint, q), 10)):
        plan = tune(path, temperatures=temperatures, leapfrogs=8, seed=5)
        mean, error = mean_and_error(lower(path, plan, chains=16, seed=6).value - truth)
        assert -0.1 < mean < 3 * error
        generator = torch.Generator().manual_seed(7)
        mean, error = mean_and_error(upper(path, plan, q.sample(16, generator), seed=8).value - truth)
        assert -3 * error < mean < 0.1


def test_reverse_chains_from_exact_draws_are_above() -> None:
    """One exact draw per chain, and one for all chains: above in the mean; with b = 0 at the end the sum is exact at T = 1."""
    log_joint, oracle, x = linear(60)
    truth, q = oracle.log_evidence(x), exact(oracle, x)
    path = PriorPath(log_joint, q)
    plan = tune(path, temperatures=40, leapfrogs=2, seed=1)
    draws = q.sample(16, torch.Generator().manual_seed(2))
    for start in (draws, draws[:1].expand(16, -1, -1)):
        mean, error = mean_and_error(upper(path, plan, start, seed=3).value - truth)
        assert -4.5 * error < mean < 0.6
    one = Ladder([0.0, 1.0], plan.steps, [0, 0], 4)  # no trajectory: -log mean of 1 / p(x|z)
    found = upper(path, one, draws, seed=3)
    torch.testing.assert_close(found.value, math.log(16) - torch.logsumexp(-log_joint.terms(draws)[1], 0))


def test_one_temperature_is_importance_sampling() -> None:
    log_joint, oracle, x = linear(5)
    path = RefitPath(log_joint, exact(oracle, x), inflation=1.0)
    found = lower(path, tune(path, temperatures=1, leapfrogs=1, seed=0), chains=8, seed=1)
    torch.testing.assert_close(found.value, oracle.log_evidence(x))  # q* is the posterior: every weight is p(x)
    torch.testing.assert_close(found.ess, torch.full((5,), 8.0, dtype=F64))


def test_markov_bounds_the_violations() -> None:
    """300 data, far too few temperatures: lower > log p + c for no more than a share exp(-c) of the data, upper likewise."""
    log_joint, oracle, x = linear(300, dim=2, width=6, noise=0.5)
    truth, q = oracle.log_evidence(x), exact(oracle, x)
    path = PriorPath(log_joint)
    plan = tune(path, temperatures=6, leapfrogs=2, seed=1)
    low = lower(path, plan, chains=4, seed=2).value - truth
    high = upper(path, plan, q.sample(4, torch.Generator().manual_seed(4)), seed=3).value - truth
    assert low.std() > 0.3  # coarse enough that a violation is possible
    for c in (0.25, 0.5, 1.0, 2.0):
        allowed = math.exp(-c) + 4.5 * (math.exp(-c) / 300) ** 0.5
        assert (low > c).double().mean() <= allowed
        assert (high < -c).double().mean() <= allowed
    assert low.mean() < -0.05
    assert high.mean() > 0.05


def test_the_best_of_several_runs_is_no_bound_until_it_is_run_again() -> None:
    """E[exp(lower)] = p(x) for one run; the largest of 8 exceeds it, and its own re-run with a new seed does not."""
    log_joint, oracle, x = linear(200, dim=1, width=2, noise=1.0)
    truth = oracle.log_evidence(x)
    path = PriorPath(log_joint)
    plan = tune(path, temperatures=4, leapfrogs=2, seed=1)
    runs = torch.stack([lower(path, plan, chains=4, seed=10 + s).value for s in range(8)])
    fresh = lower(path, plan, chains=4, seed=99).value
    mean, error = mean_and_error((runs - truth).exp().mean(0))
    assert abs(mean - 1) < 4.5 * error
    mean, error = mean_and_error((runs.amax(0) - truth).exp())
    assert mean - 1 > 10 * error
    mean, error = mean_and_error((fresh - truth).exp())
    assert abs(mean - 1) < 4.5 * error


# -- a mode that q* misses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("idle", [pytest.param(0, marks=pytest.mark.slow), 6])
def test_the_prior_finds_the_mode_that_q_star_missed(idle: int) -> None:
    """x = z^2 + noise, q* on the positive root: annealing from it is short of log p(x) by log 2, from the prior it is right."""
    problem = square(idle, 24, seed=3)
    log_joint = problem.log_joint
    far = problem.masses[:, 0].sub(0.5).abs() < 1e-3  # two modes of equal mass
    z, _ = log_joint.sample_guide(2000, 0)
    mean = z.mean(0)
    centred = z - mean
    q = Normals.from_moments(mean, torch.einsum("snd,sne->nde", centred, centred) / 2000)
    found = {}
    for path, temperatures in ((PriorPath(log_joint, q), 160), (RefitPath(log_joint, q), 20)):
        plan = tune(path, temperatures=temperatures, leapfrogs=2, seed=1)
        found[path.name] = lower(path, plan, chains=32, seed=2)
    bias, error = mean_and_error(found["prior"].value - problem.evidence)
    assert abs(bias) < 0.1
    assert bias < 4.5 * error
    separated = far & (z[..., 0].mean(0).abs() > 5 * z[..., 0].std(0))
    assert separated.sum() >= 8
    wrong = (found["refit"].value - problem.evidence)[separated]
    assert abs(wrong.median().item() + math.log(2)) < 0.05


# -- bidirectional Monte Carlo -----------------------------------------------------------------------------------------------


def test_the_sandwich_closes_around_the_exact_evidence() -> None:
    log_joint, oracle, _ = linear(40, dim=2, width=8, noise=0.4)
    widths = []
    for temperatures in (6, 40):
        found = bdmc(log_joint, lambda lj: exact(oracle, lj.data()), seed=5, temperatures=temperatures, leapfrogs=2)
        truth = oracle.log_evidence(found.log_joint.data())
        assert set(found.lower) == {"prior", "refit"}
        for name in found.lower:
            mean, error = mean_and_error(found.lower[name].value - truth)
            assert mean < 4.5 * error
            mean, error = mean_and_error(found.upper[name].value - truth)
            assert mean > -4.5 * error
        widths.append({name: width.mean().item() for name, width in found.width.items()})
    assert widths[0]["prior"] > 0.3
    assert widths[1]["prior"] < 0.3 * widths[0]["prior"]
    assert abs(widths[1]["refit"]) < 0.02


# -- robustness --------------------------------------------------------------------------------------------------------------


def test_a_seed_repeats_and_another_differs() -> None:
    log_joint, oracle, x = linear(7)
    path = RefitPath(log_joint, exact(oracle, x))
    plan = tune(path, temperatures=5, leapfrogs=2, seed=1)
    first, second, third = (lower(path, plan, chains=4, seed=s).value for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert torch.equal(tune(path, temperatures=5, leapfrogs=2, seed=1).steps, plan.steps)


def test_blocks_of_data_and_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of 10 data the bounds stay right, with independent streams; data not reached are NaN."""
    log_joint, oracle, x = linear(30)
    monkeypatch.setitem(annealing.ROWS, "cpu", 80)
    path = RefitPath(log_joint, exact(oracle, x))
    plan = tune(path, temperatures=5, leapfrogs=2, seed=1)
    found = lower(path, plan, chains=8, seed=2)
    mean, error = mean_and_error(found.value - oracle.log_evidence(x))
    assert abs(mean) < 4.5 * error < 0.2
    white = torch.linalg.solve_triangular(path.q_star.root, (found.z - path.q_star.loc).permute(1, 2, 0), upper=False)
    assert not torch.allclose(white[:10], white[10:20], atol=0.1)
    clock = iter([0.0, 0.0, 2.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    late = lower(path, plan, chains=8, seed=2, until=1.0)
    monkeypatch.undo()
    torch.testing.assert_close(late.value[:20], found.value[:20])
    assert late.value[20:].isnan().all()


def test_a_density_that_is_not_finite_costs_its_chain_only() -> None:
    """log p(x|z) is NaN where z > 2 in the first half of the data: those chains have weight 0, all others are untouched."""
    y = torch.linspace(-1, 1, 40, dtype=F64)
    bad = torch.arange(40) < 20

    def build(broken: bool) -> LogJoint:
        def model(y, bad):
            with pyro.plate("rows", len(y)):
                z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
                pyro.sample("y", dist.Normal(z, 0.5), obs=y)
                if broken:
                    pyro.factor("hole", torch.where(bad & (z > 2), torch.nan, 0.0))

        def guide(y, bad):
            with pyro.plate("rows", len(y)):
                pyro.sample("z", dist.Normal(0.8 * y, 0.447))

        return LogJoint(model, guide, y, bad)

    runs = []
    for broken in (False, True):
        path = PriorPath(build(broken))
        plan = Ladder(schedule(20).tolist(), torch.full((1, 40), 0.4, dtype=F64), [0] * 21, 3)
        runs.append(lower(path, plan, chains=64, seed=2))
    whole, holed = runs
    torch.testing.assert_close(holed.value[20:], whole.value[20:])
    assert holed.failed[20:].sum() == 0
    assert holed.failed[:20].sum() > 5  # a 2.3 % tail of 64 x 20 prior draws
    assert holed.value.isfinite().all()
    truth = dist.Normal(torch.zeros((), dtype=F64), math.sqrt(1.25)).log_prob(y)
    mean, error = mean_and_error((holed.value - truth)[:20])
    assert -0.1 < mean < 4.5 * error


# -- the reference -----------------------------------------------------------------------------------------------------------


def known(monkeypatch: pytest.MonkeyPatch, q_star: Normals) -> None:
    """Give the reference this q* in place of a search for it."""
    monkeypatch.setattr(ais, "scout", lambda log_joint: SimpleNamespace(refit=SimpleNamespace(q=q_star)))


def test_the_reference_gives_bounds_moments_and_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    log_joint, oracle, x = linear(30, dim=2, width=6, noise=0.5)
    q = exact(oracle, x)
    known(monkeypatch, q)
    found = Annealed(temperatures=15, chains=32, leapfrogs=2)(log_joint, keep=400, seed=3)
    assert found.method == "ais"
    assert found.evidence is not None
    assert (found.evidence.kind, found.evidence.upper) == ("bound", None)
    mean, error = mean_and_error(found.evidence.value - oracle.log_evidence(x))
    assert -0.05 < mean < 4.5 * error
    assert set(found.status) == {"uncertified"}
    assert not any("a mode" in reason for reason in found.reason)
    assert found.stats["ais_unseen"].max() < 0.01
    assert found.draws.shape == (4, 100, 30, 2)
    assert found.mean is not None
    assert found.covariance is not None
    # 64 weighted particles: standardised errors of the mean of about 1/8
    white = torch.linalg.solve_triangular(q.root, (found.mean - q.loc)[..., None], upper=False)
    assert white.square().mean().sqrt() < 0.2
    assert (found.covariance.diagonal(dim1=-2, dim2=-1).mean(0) / q.covariance[0].diagonal() - 1).abs().max() < 0.25
    torch.testing.assert_close(found.draws.flatten(0, 1).mean(0), found.mean, atol=0.03, rtol=0)
    torch.testing.assert_close(found.sample_stats["lp"].flatten(0, 1), log_joint(found.draws.flatten(0, 1)))
    assert (found.stats["ais_disagreement"].abs() < 4.5).all()
    assert (found.stats["ais_ess"] > 5).all()
    again = Annealed(temperatures=15, chains=32, leapfrogs=2)(log_joint, keep=400, seed=3)
    assert torch.equal(found.draws, again.draws)
    assert torch.equal(found.evidence.value, again.evidence.value)


def test_the_reference_raises_the_alarm_about_a_missed_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = square(0, 24, seed=3)
    log_joint = problem.log_joint
    z, _ = log_joint.sample_guide(2000, 0)
    known(monkeypatch, Normals.from_moments(z.mean(0), torch.diag_embed(z.var(0))))
    found = Annealed(temperatures=40, chains=32, leapfrogs=2)(log_joint, keep=100, seed=3)
    separated = z[..., 0].mean(0).abs() > 5 * z[..., 0].std(0)
    alarmed = torch.tensor(["q* missed a mode" in reason for reason in found.reason])
    assert alarmed[separated].double().mean() > 0.75
    assert "where no chain from q* went" in " ".join(found.reason)
    assert (found.stats["ais_unseen"][separated] - 0.5).abs().mean() < 0.2
    assert found.evidence is not None
    mean, error = mean_and_error((found.evidence.value - problem.evidence)[separated])
    assert -0.35 < mean < 4.5 * error  # from q* alone it would be -log 2
    assert (found.stats["ais_lower_prior"] - found.stats["ais_lower_refit"])[separated].mean() == pytest.approx(0.6, abs=0.2)


def test_the_reference_runs_one_start_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    log_joint, oracle, x = linear(5, dim=2, width=6, noise=0.5)
    known(monkeypatch, exact(oracle, x))
    for start, other in (("prior", "refit"), ("refit", "prior")):
        found = Annealed(temperatures=4, chains=8, leapfrogs=2, start=start)(log_joint, keep=8, seed=3)
        assert found.stats[f"ais_lower_{start}"].isfinite().all()
        assert found.stats[f"ais_lower_{other}"].isnan().all()
        assert found.evidence is not None
        assert not torch.equal(found.evidence.value, found.stats[f"ais_lower_{start}"])  # run again


@pytest.mark.slow
def test_a_budget_and_a_bad_q_star(monkeypatch: pytest.MonkeyPatch) -> None:
    """A datum without a finite q* is annealed from the prior; after the budget has ended data are NaN and say so."""
    log_joint, oracle, x = linear(15, dim=2, width=6, noise=0.5)
    q = exact(oracle, x)
    q.root[3], q.loc[3] = torch.nan, torch.nan
    known(monkeypatch, q)
    monkeypatch.setitem(annealing.ROWS, "cpu", 80)  # blocks of 10 data
    method = Annealed(temperatures=10, chains=8, leapfrogs=2)
    whole = method(log_joint, keep=8, seed=3)
    assert whole.evidence is not None
    assert whole.evidence.value.isfinite().all()
    assert (whole.evidence.value - oracle.log_evidence(x)).abs().mean() < 0.25
    ended = False

    def clock() -> float:
        return 2.0 if ended else 0.0

    anneal = Annealed._anneal

    def once(self: Annealed, *args: Any) -> None:
        nonlocal ended
        anneal(self, *args)
        ended = True

    monkeypatch.setattr(Annealed, "_anneal", once)
    monkeypatch.setattr(ais, "time", SimpleNamespace(monotonic=clock))
    late = method(log_joint, keep=8, seed=3, until=1.0)
    assert late.evidence is not None
    assert torch.equal(late.evidence.value[:10], whole.evidence.value[:10])
    assert late.evidence.value[10:].isnan().all()
    assert late.draws[:, :, 10:].isnan().all()
    assert late.sites["z"][:, :, 10:].isnan().all()
    assert late.sites["z"][:, :, :10].isfinite().all()
    assert all("the budget ended" in reason for reason in late.reason[10:])
    assert not any("the budget ended" in reason for reason in late.reason[:10])


def test_resampling_is_proportional_to_the_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.softmax(torch.randn(16, 5, dtype=F64, generator=generator), 0)
    z = torch.arange(16, dtype=F64)[:, None, None].expand(16, 5, 1)
    counts = torch.stack([(resample(z, weights, 100, generator)[..., 0] == s).sum(0) for s in range(16)])
    assert ((counts - 100 * weights).abs() < 1).all()
    first = torch.stack([resample(z, weights, 4, generator)[0, :, 0] for _ in range(2000)])  # not the smallest each time
    torch.testing.assert_close(first.mean(0), (weights * z[..., 0]).sum(0), atol=4.5 * 5 / 2000**0.5, rtol=0)


def test_the_reference_refuses_without_a_continuous_latent() -> None:
    log_joint, *_ = linear(3)
    assert Annealed().refusal(log_joint) is None
    nothing = copy.copy(log_joint)
    nothing.dim = 0
    assert "continuous latent" in str(Annealed().refusal(nothing))
