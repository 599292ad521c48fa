"""The encoder's output set free: amortization and approximation of guides that are no diagonal or full normal."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.distributions import TorchDistribution
from scipy import stats
from support.cases.tables import UNKNOWN, table
from support.cases.vaes import linear_vae, mlp_vae, set_guide
from torch import Tensor, nn

from elbowroom.analysis.audit.auditor import audit_log_joint
from elbowroom.analysis.measures.gaps import refitted
from elbowroom.analysis.plots.report.gaps import parts
from elbowroom.analysis.verdict import rules
from elbowroom.components import registry
from elbowroom.conformance.properties import vae_with
from elbowroom.inference.references.closed_form import ClosedForm
from elbowroom.inference.references.grid.grid import Grid
from elbowroom.inference.search import best_of_family as module
from elbowroom.inference.search.best_of_family import offered, refit_family
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.models import spaces
from elbowroom.models.guides.base import Family
from elbowroom.models.guides.families import Mixture, StudentT
from elbowroom.models.guides.flow import FlowFamily
from elbowroom.models.guides.normal import FullRankNormal, LowRankNormal

F64 = torch.float64
SIGMAS = 4.5


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take fewer steps: these posteriors are simple."""
    monkeypatch.setattr(module, "STEPS", 25)
    monkeypatch.setattr(module, "STAGES", 6)


class Square(nn.Module):
    """A Pyro pair: z ~ N(0, 1), x ~ N(z^2, 0.5^2), two modes; the guide's parameters are a table, not an encoder's."""

    def __init__(self, family: Family, params: Tensor) -> None:
        super().__init__()
        self.family, self.params = family, nn.Parameter(params)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.square(), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.family(self.params))

    def variational_parameters(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], TorchDistribution]]:
        return self.params, self.family


def square(x: Tensor, z: Tensor) -> Tensor:
    """log p(x, z) of `Square` at z (G, 1), (G, N), written out by hand."""
    noise = -0.5 * ((x[:, 0] - z.square()) / 0.5).square() - math.log(0.5)
    return noise - 0.5 * z.square() - math.log(2 * math.pi)


def scores(joint: LogJoint, **options: Any) -> module.FamilyRefit:
    offer = offered(joint)
    assert offer is not None, joint.notes
    found = refit_family(offer, seed=1, **options)
    assert found is not None
    assert (found.gain >= -SIGMAS * found.gain_se - 1e-9).all()
    return found


@pytest.mark.slow
def test_low_rank_parts_of_a_linear_model() -> None:
    """Posterior N(m, M^-1), d = 4, in two pairs; the best rank-1 normal by descent on the closed-form KL; a mean off by 0.2."""
    vae, x, _ = linear_vae(4, 4, n=10, family=LowRankNormal)
    k = 4
    correlation = torch.full((k, k), 0.3, dtype=F64).fill_diagonal_(1.0)
    correlation[0, 1] = correlation[1, 0] = 0.75
    correlation[2, 3] = correlation[3, 2] = 0.7
    with torch.no_grad():
        M = torch.linalg.inv(0.2 * correlation)
        vae.decoder.body.weight.copy_(0.5 * torch.linalg.cholesky(M - torch.eye(k)).mT)
    oracle = vae.linear_gaussian()
    assert oracle is not None
    assert torch.allclose(oracle.precision, M)
    body, family = vae.posterior.encoder.body, vae.posterior.family

    def kl(params: Tensor) -> Tensor:
        covariance = family(torch.cat([torch.zeros(k, dtype=F64), params])).covariance_matrix
        return 0.5 * (torch.trace(M @ covariance) - torch.logdet(M @ covariance) - k)

    best = torch.tensor([0.0] * k + [0.3, 0.3, 0.2, 0.2], dtype=F64, requires_grad=True)
    search = torch.optim.LBFGS([best], lr=0.5, max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        value = kl(best)
        value.backward()
        return value

    search.step(closure)
    approximation = kl(best.detach()).item()
    assert best.abs().max() < 5  # not at infinity
    gain = torch.linalg.inv(M) @ (oracle.W / oracle.psi[:, None]).T
    with torch.no_grad():
        body.weight.zero_()
        body.weight[:k] = gain
        body.bias.zero_()
        body.bias[:k] = 0.2 - gain @ oracle.mu
    off = torch.full((k,), 0.2, dtype=F64)
    amortization = (0.5 * off @ M @ off + kl(body.bias[k:].detach())).item() - approximation
    assert approximation > 0.1
    assert amortization > 0.3
    found = audit_log_joint(LogJoint(vae.model, vae.guide, x), references=[ClosedForm()], draws=1000)
    parts = found.table
    assert (abs(parts["gap_amortization"] - amortization) < 0.02).all()
    assert (abs(parts["gap_approximation"] - approximation) < 0.02 + SIGMAS * parts["elbo_refit_se"]).all()
    assert (abs(parts["gap_covariance"] - approximation) < 0.02 + SIGMAS * parts["elbo_refit_se"]).all()
    assert (abs(parts["gap_shape"]) < 1e-3).all()
    assert (parts["gap_amortization_lower"] <= amortization + 1e-3).all()
    assert (parts["gap_amortization_upper"] >= amortization - 1e-3).all()
    assert rules.judge(parts)[0].verdict == "encoder falls short"
    set_low_rank(body, best.detach(), gain, oracle.mu)
    with torch.no_grad():
        (judged,) = rules.judge(audit_log_joint(LogJoint(vae.model, vae.guide, x), references=[ClosedForm()], draws=1000).table)
    assert judged.verdict == "family too small"
    assert judged.number == pytest.approx(approximation, abs=0.03)


def set_low_rank(body: nn.Linear, params: Tensor, gain: Tensor, mu: Tensor) -> None:
    """Give a linear encoder these scales and directions for every x, and the posterior's mean."""
    with torch.no_grad():
        body.bias[: len(gain)] = -gain @ mu
        body.bias[len(gain) :] = params


@pytest.mark.slow
def test_the_best_t_for_a_normal_posterior() -> None:
    """KL(t(df, s) || N(0, 1)) = log(2 pi) / 2 + s^2 df / (df - 2) / 2 - h(t) - log s is least at s^2 = (df - 2) / df."""
    df = 8.0
    vae, x, oracle = linear_vae(1, 6, n=30, family=lambda d: StudentT(d, df=df), seed=5)  # type: ignore[arg-type]
    set_guide_of_t(vae, oracle, scale=1.0, shift=0.0)
    least = 0.5 * math.log(2 * math.pi) + 0.5 - stats.t(df).entropy() - 0.5 * math.log((df - 2) / df)
    here = 0.5 * math.log(2 * math.pi) + 0.5 * df / (df - 2) - stats.t(df).entropy()
    parts = refitted(LogJoint(vae.model, vae.guide, x))
    evidence = oracle.log_evidence(x)
    assert (abs(parts["amortization"] - (here - least)) < 0.02 + SIGMAS * parts["amortization_se"]).all()
    assert (abs(evidence - parts["elbo_refit"] - least) < 0.01 + SIGMAS * parts["elbo_refit_se"]).all()
    assert (evidence - parts["elbo_refit"]).mean().item() == pytest.approx(least, abs=0.02)
    assert parts["covariance"].isnan().all()
    assert parts["elbo_refit_full"].sub(evidence).abs().max() < 1e-3
    set_guide_of_t(vae, oracle, scale=math.sqrt((df - 2) / df), shift=0.0)
    parts = refitted(LogJoint(vae.model, vae.guide, x))
    assert (parts["amortization"].abs() <= 0.01 + SIGMAS * parts["amortization_se"]).all()


def set_guide_of_t(vae: Any, oracle: Any, scale: float, shift: float) -> None:
    set_guide(vae, oracle)  # a diagonal normal's parameters: mean and scale
    with torch.no_grad():
        s = scale * oracle.precision.rsqrt().flatten() - 1e-5
        vae.posterior.encoder.body.bias[1:] = s.expm1().log() - math.log(math.expm1(1.0))
        vae.posterior.encoder.body.bias[:1] += shift


def test_a_mixture_with_the_wrong_weights() -> None:
    """Both modes of z^2 seen, with weights 0.9 and 0.1: 0.9 log 1.8 + 0.1 log 0.2 and a little is amortization."""
    x = torch.tensor([[2.0], [3.0], [4.0]], dtype=F64)
    family = Mixture(1, components=2)
    grid = torch.linspace(-6, 6, 4001, dtype=F64)[:, None]
    step = 12 / 4000
    evidence = torch.logsumexp(square(x, grid), 0) + math.log(step)
    invert = lambda scale: (scale - 1e-5).expm1().log() - math.log(math.expm1(1.0))
    mode = (x - 0.125).sqrt()  # of log p(x, z)
    width = (0.5 / (2 * mode)).clamp(0.05)
    params = torch.cat([torch.tensor([[0.9, 0.1]], dtype=F64).log().expand(3, -1), mode, -mode, *[invert(width)] * 2], -1)

    def elbo(params: Tensor) -> Tensor:
        log_q = family(params).log_prob(grid[:, None].expand(-1, 3, -1))
        return (log_q.exp() * (square(x, grid) - log_q)).sum(0) * step

    best = params.clone().requires_grad_()
    search = torch.optim.LBFGS([best], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        loss = -elbo(best).sum()
        loss.backward()
        return loss

    search.step(closure)
    amortization = (elbo(best) - elbo(params)).detach()
    assert (amortization > 0.36).all()
    pair = Square(family, params)
    joint = LogJoint(pair.model, pair.guide, x)
    parts = refitted(joint)
    assert (abs(parts["amortization"] - amortization) < 0.01 + SIGMAS * parts["amortization_se"]).all()
    assert (abs(parts["elbo_refit"] - elbo(best).detach()) < 0.01 + SIGMAS * parts["elbo_refit_se"]).all()
    assert (evidence - elbo(best).detach() < 0.05).all()
    assert (evidence - parts["elbo_refit_full"] > 0.5).all()  # one normal sees one mode: log 2
    audited = audit_log_joint(joint, references=[Grid()], draws=1000).table
    assert [one.verdict for one in rules.judge(audited)] == ["encoder falls short"]


@pytest.mark.slow
def test_a_flow_whose_encoder_is_shifted() -> None:
    """Shared weights stay: set free, the shifted output goes back to where L was highest before, and no further."""
    torch.manual_seed(0)
    family = FlowFamily(1, transforms=1, hidden=(8,), context=3).double()
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.mul_(3)
    before = [parameter.clone() for parameter in family.parameters()]
    x = torch.tensor([[0.3], [1.0]], dtype=F64)
    pair = Square(family, 0.1 * torch.randn(2, 3, dtype=F64))
    first = scores(LogJoint(pair.model, pair.guide, x))
    assert (first.gain > SIGMAS * first.gain_se).any()
    with torch.no_grad():
        pair.params.copy_(first.params + 3)
    second = scores(LogJoint(pair.model, pair.guide, x))
    error = first.shortfall + second.shortfall + SIGMAS * torch.hypot(second.elbo_se, first.elbo_se)
    assert (abs(second.elbo - first.elbo) <= error).all()
    assert (second.gain > SIGMAS * second.gain_se).any()
    assert all(torch.equal(old, new) for old, new in zip(before, family.parameters(), strict=True))


def test_a_guide_at_its_optimum_has_no_amortization_gap() -> None:
    """q = p: every log weight is log p(x), so the gain is 0 without noise, and nothing is short."""
    vae, x, oracle = linear_vae(3, 8, n=20, family=FullRankNormal)
    set_guide(vae, oracle)
    found = scores(LogJoint(vae.model, vae.guide, x))
    assert (found.gain.abs() <= 1e-6).all()
    assert (found.elbo - oracle.log_evidence(x)).abs().max() < 1e-6
    assert (found.shortfall < 1e-3).all()


def test_a_wrong_encoder_is_set_right_whatever_units_the_latents_have() -> None:
    """A full normal for a linear model, whose encoder is hundreds of nats off: L[q*] = log p(x)."""
    vae, x, oracle = linear_vae(3, 10, n=10, family=FullRankNormal)
    found = scores(LogJoint(vae.model, vae.guide, x))
    assert (found.gain > 5).all()
    assert (oracle.log_evidence(x) - found.elbo < 0.02 + found.shortfall).all()


@pytest.mark.parametrize("name", registry.names("guide"))
def test_every_guide_family_offers_its_parameters_or_says_none(name: str) -> None:
    """What is offered has the guide's own density, with the Jacobian: `offered` checks it."""
    vae = vae_with("guide", name, {}).double()
    family = vae.posterior.family
    x, c = torch.zeros(4, 3, dtype=F64), torch.zeros(4, 2, dtype=F64)
    joint = LogJoint(vae.model, vae.guide, x.clamp_min(0), c) if vae.covariate_dim else LogJoint(vae.model, vae.guide, x)
    offers = family.space not in spaces.DISCRETE and family.sites == ("z",)
    assert (offered(joint) is not None) == offers, joint.notes
    assert not [note for note in joint.notes if "not refitted" in note]


def test_what_is_offered_wrongly_is_refused_with_the_reason() -> None:
    x = torch.ones(3, 1, dtype=F64)
    pair = Square(Mixture(1, components=2), torch.randn(3, 6, dtype=F64))
    pair.variational_parameters = lambda x: (pair.params + 1, pair.family)  # type: ignore[method-assign]
    joint = LogJoint(pair.model, pair.guide, x)
    assert offered(joint) is None
    assert "the density by variational_parameters is not the one that the guide draws from" in joint.notes[-1]
    pair.variational_parameters = lambda x: (pair.params[:2], pair.family)  # type: ignore[method-assign]
    joint = LogJoint(pair.model, pair.guide, x)
    assert offered(joint) is None
    assert "not (3, P)" in joint.notes[-1]
    pair.variational_parameters = lambda x: None  # type: ignore[method-assign,assignment,return-value]
    assert offered(LogJoint(pair.model, pair.guide, x)) is None


def test_without_time_there_is_a_reason_and_no_number() -> None:
    vae = mlp_vae(2, 6, family=Mixture).double()
    joint = LogJoint(vae.model, vae.guide, torch.zeros(3, 6, dtype=F64))
    found = refitted(joint, until=time.monotonic())
    assert found["elbo_refit"].isnan().all()
    assert found["elbo_refit_full"].isfinite().all()
    assert joint.notes[-1] == "guide: its family is not refitted, the time for it ended"


# -- words ------------------------------------------------------------------------------------------------------------------


def test_advice_for_families_that_are_no_normals() -> None:
    (found,) = rules.judge(table(gap_shape=0.5).assign(gap_covariance=("obs_id", np.full(40, np.nan))))
    assert found.verdict == "family too small"
    assert "a flow with more layers, a mixture with more components, or another family" in found.advice
    assert "full covariance" not in found.advice
    assert "the best normal is 0.5 nats short of log p(x)" in found.advice


def test_guides_that_were_not_refitted_are_told_why() -> None:
    bare = table(**UNKNOWN, gap_total=[0.5] * 40)
    assert "its family was not refitted" in rules.judge(bare)[0].rests_on
    shaped = bare.assign(elbo_refit_full=("obs_id", np.full(40, -10.1)))
    assert "the guide is no normal" in rules.judge(shaped)[0].rests_on
    discrete = bare.assign(total_variation=(("obs_id", "reference"), np.full((40, 1), 0.1)))
    said = rules.judge(discrete)[0].rests_on
    assert "all latents are discrete" in said
    assert "normal" not in said


def test_the_figure_shows_approximation_whole_where_the_guide_is_no_normal() -> None:
    tables: dict[str, xr.Dataset] = {"test": table(gap_shape=0.5).assign(gap_covariance=("obs_id", np.full(40, np.nan)))}
    shown = parts(tables)
    assert "approximation: a richer family would gain most" in shown.caption  # type: ignore[union-attr]
    assert "amortization, approximation, total" in shown.alt  # type: ignore[union-attr]
    assert "amortization, covariance, shape, total" in parts({"test": table(gap_shape=0.5)}).alt  # type: ignore[union-attr]
