"""The evidence ladder: which number, what kind of number, and why; bounds that are bounds; words that claim no more."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from support.cases.vaes import linear_vae, mlp_vae, set_guide
from support.problems.catalogue import PROBLEMS
from support.problems.truth import F64

from elbowroom.analysis.audit.auditor import audit_log_joint
from elbowroom.analysis.measures import gaps
from elbowroom.analysis.measures.evidence import AIS_BOUND, LOWER_BOUND, REFIT_BOUND, TWO_SIDED, evidence_of, sandwich
from elbowroom.analysis.measures.gaps import guide_normals, refitted
from elbowroom.analysis.measures.tabulate import VARIABLES
from elbowroom.analysis.verdict.summary import sentences, summary
from elbowroom.inference.posterior import Evidence, Posterior, in_chains
from elbowroom.inference.references.ais.ais import Annealed
from elbowroom.inference.references.closed_form import ClosedForm
from elbowroom.inference.references.importance.guide import amortized
from elbowroom.inference.references.importance.importance import ImportanceSampling
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.models.guides.normal import FullRankNormal

N = 4


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values * (N if len(values) == 1 else 1), dtype=F64)


def posterior(method: str, evidence: Evidence | None, status: str = "uncertified", **stats: torch.Tensor) -> Posterior:
    words = ["exact", "certified", "uncertified", "amortized"]
    assert status in words
    return Posterior(
        method,
        torch.zeros(4, 5, N, 1, dtype=F64),
        {},
        [status] * N,  # type: ignore[list-item]
        [f"{method}: because"] * N,
        evidence=evidence,
        stats=stats,
    )


def guide(trusted: float = 1.0, value: float = -10.0) -> Posterior:
    stats = {"importance_trusted": column(trusted), "bound_first": column(value - 0.2), "bound_sure": column(value - 0.5)}
    evidence = Evidence("estimate", "importance sampling", column(value), column(0.01))
    return posterior("guide", evidence, "amortized", bound_all=column(value - 0.4), **stats)


def grid(value: float, status: str) -> Posterior:
    return posterior("grid", Evidence("exact", "grid", column(value), column(1e-6)), status)


def weights(value: float, status: str, first: float = -11.0, unseen: float = 0.0) -> Posterior:
    evidence = Evidence("estimate", "importance sampling from q*", column(value), column(0.01))
    stats = {"bound_first": column(first), "bound_sure": column(value - 0.5), "mode_unseen": column(unseen)}
    return posterior("importance", evidence, status, **stats)


def annealed(value: float, upper: float | None = None) -> Posterior:
    above = None if upper is None else column(upper)
    stats = {"ais_lower_prior": column(value), "ais_lower_refit": column(value - 0.1), "bound_sure": column(value - 0.3)}
    return posterior("ais", Evidence("bound", "annealed", column(value), column(0.05), above), **stats)


def test_an_exact_value_comes_first() -> None:
    found = evidence_of(guide(), [weights(-9.0, "certified"), grid(-9.5, "exact")])
    assert set(found.method) == {"grid"}
    assert found.is_exact.all()
    np.testing.assert_allclose(found.value, -9.5)
    assert set(found.reason) == {"exact up to its numerical error"}


def test_the_refits_weights_come_before_the_guides() -> None:
    found = evidence_of(guide(), [weights(-10.01, "certified")])
    assert set(found.method) == {"importance sampling from q* estimate"}
    np.testing.assert_allclose(found.upper - found.value, 1.96 * 0.01, rtol=1e-4)
    found = evidence_of(guide(), [weights(-10.01, "uncertified")])
    assert set(found.method) == {"importance sampling estimate"}


@pytest.mark.parametrize(
    ("references", "why"),
    [
        ([grid(-9.0, "uncertified")], "an uncertified exact reference contradicts"),
        ([weights(-10.0, "uncertified", unseen=1.0)], "because"),
        ([annealed(-9.3)], "annealed lower bound lies above"),
        ([posterior("hmc", None, "certified", missed_mass=column(0.5))], "the guide misses a mode"),
    ],
)
def test_what_contradicts_an_estimate_leaves_bounds(references: list[Posterior], why: str) -> None:
    found = evidence_of(guide(), references)
    assert np.isnan(found.value).all()
    assert np.isnan(found.error).all()
    assert all("bound" in method for method in found.method)
    assert all(why in reason for reason in found.reason)
    assert np.isfinite(found.lower).all()


def test_an_estimate_that_annealing_agrees_with_stays() -> None:
    assert np.isfinite(evidence_of(guide(), [annealed(-9.95)]).value).all()
    assert np.isfinite(evidence_of(guide(), [annealed(-30.0)]).value).all()


def test_the_bound_that_was_largest_on_other_draws_is_taken() -> None:
    bad = guide(trusted=0.0)
    assert set(evidence_of(bad, []).method) == {LOWER_BOUND}
    np.testing.assert_allclose(evidence_of(bad, []).lower, -10.4)
    found = evidence_of(bad, [weights(-9.0, "uncertified", first=-20.0), annealed(-9.7)])
    assert set(found.method) == {AIS_BOUND}  # q*'s second half was the larger, its first half was not
    np.testing.assert_allclose(found.lower, -10.0)
    assert np.isnan(found.upper).all()
    found = evidence_of(bad, [weights(-9.0, "uncertified", first=-9.2), annealed(-9.7, upper=-8.0)])
    assert set(found.method) == {REFIT_BOUND + TWO_SIDED}
    np.testing.assert_allclose(found.upper, -8.0)
    assert all("conditional on the certified draws" in reason for reason in found.reason)


@pytest.mark.slow
def test_both_bounds_fail_at_most_once_in_forty() -> None:
    """Linear-Gaussian data, d = 5, ten temperatures only: bounds need no mixing; their width is what mixing buys."""
    problem = PROBLEMS["linear_gaussian_d5"](200, 61)
    log_joint = problem.log_joint
    method = Annealed(temperatures=10, chains=16, leapfrogs=2)
    found = method(log_joint, keep=16, seed=1)
    root = torch.linalg.cholesky(problem.covariance)
    noise = torch.randn(400, 200, 5, generator=torch.Generator().manual_seed(2), dtype=F64)
    draws = problem.mean + (root @ noise[..., None])[..., 0]
    oracle = Posterior("hmc", in_chains(draws), {}, ["certified"] * 200, ["by construction"] * 200)
    with_upper = sandwich(log_joint, [ClosedForm(), method], [oracle, found], seed=3)[1]
    assert with_upper.evidence is not None
    assert with_upper.evidence.upper is not None
    above, below = with_upper.evidence.upper - problem.evidence, found.stats["bound_sure"] - problem.evidence
    limit = 0.025 + 3 * (0.025 * 0.975 / 200) ** 0.5
    assert (below > 0).double().mean() <= limit
    assert (above < 0).double().mean() <= limit
    width = (above - below).median().item()
    print(f"median width {width:.2f} nats, lower {below.median():.2f}, upper {above.median():.2f}")
    assert width < 3
    assert sandwich(log_joint, [ClosedForm(), method], [oracle, with_upper], seed=4)[1] is with_upper


def test_upper_bounds_want_certified_draws_and_no_exact_value() -> None:
    problem = PROBLEMS["linear_gaussian_d2"](6, 63)
    log_joint = problem.log_joint
    method = Annealed(temperatures=5, chains=8, leapfrogs=2)
    found = method(log_joint, keep=16, seed=1)
    exact = ClosedForm()(log_joint, keep=100, seed=2)
    draws = exact.draws.clone()
    status = ["certified", "uncertified", "certified", "uncertified", "certified", "certified"]
    some = Posterior("hmc", draws, {}, status, [""] * 6)  # type: ignore[arg-type]
    upper = sandwich(log_joint, [ClosedForm(), method], [some, found], seed=3)[1].evidence.upper  # type: ignore[union-attr]
    assert upper.isfinite().tolist() == [s == "certified" for s in status]  # type: ignore[union-attr]
    upper = sandwich(log_joint, [ClosedForm(), method], [exact, found], seed=3)[1].evidence.upper  # type: ignore[union-attr]
    assert upper.isnan().all()  # type: ignore[union-attr]


# -- the two parts of the gap -----------------------------------------------------------------------------------------------


def test_families_are_told_apart() -> None:
    for family, name in ((None, "diagonal"), (FullRankNormal, "full")):
        vae, x, oracle = linear_vae(3, 8, n=5, **({} if family is None else {"family": family}))
        set_guide(vae, oracle)
        assert guide_normals(LogJoint(vae.model, vae.guide, x))[0] == name
    assert (
        guide_normals(PROBLEMS["positive"](5, 3).log_joint)[0] == "diagonal"
    )  # log-normal: a normal where it is unconstrained
    assert guide_normals(PROBLEMS["simplex_d2"](5, 3).log_joint)[0] in (None, "diagonal", "full")


def test_the_parts_of_the_gap_of_a_linear_model() -> None:
    """The best diagonal guide, shifted: approximation 1/2 [sum log M_jj - log |M|], amortization the shift's."""
    vae, x, oracle = linear_vae(5, 12, n=60)
    set_guide(vae, oracle)
    with torch.no_grad():
        vae.posterior.encoder.body.bias[:5] += 0.05
    log_joint = LogJoint(vae.model, vae.guide, x)
    table = audit_log_joint(log_joint, references=[ClosedForm(), ImportanceSampling(draws=2000)], draws=4000).table
    precision = torch.linalg.inv(oracle.posterior(x)[1])
    approximation = 0.5 * (precision.diagonal(dim1=-2, dim2=-1).log().sum(-1) - torch.logdet(precision)).mean().item()
    shift = torch.full((5,), 0.05, dtype=F64)
    amortization = 0.5 * (shift @ precision.reshape(-1, 5, 5)[0] @ shift).item()
    assert (abs(table["gap_approximation"] - approximation) < 0.02).all()
    assert (table["gap_approximation_lower"] <= approximation + 1e-6).all()
    assert (table["gap_approximation_upper"] >= approximation - 0.02).all()
    assert (table["gap_amortization_lower"] <= amortization + 1e-6).all()
    assert (table["gap_amortization_upper"] >= amortization - 1e-6).all()
    assert amortization > 0.01
    off = table["gap_total"] - table["gap_approximation"] - table["gap_amortization"]
    assert (abs(off) < 4.5 * table["elbo_se"] + 0.01).all()
    # common random numbers: the two parts that need no reference are known far better than the ELBO
    assert (abs(table["gap_amortization"] - amortization) < 1e-6).all()
    assert (abs(table["gap_covariance"] - approximation) < 1e-3).all()
    assert (abs(table["gap_shape"]) < 1e-3).all()


def test_a_guide_that_is_no_normal_has_no_refit() -> None:
    log_joint = PROBLEMS["mlp_gaussian"](4, 3).log_joint
    assert guide_normals(log_joint)[0] == "diagonal"
    log_joint.log_guide = lambda z: -z.abs().sum(-1)  # type: ignore[method-assign]
    assert guide_normals(log_joint)[0] is None
    found = refitted(log_joint)
    assert found["elbo_refit_full"].isfinite().all()  # how far the posterior is from any normal does not ask about the guide
    assert all(value.isnan().all() for name, value in found.items() if "full" not in name)


def test_families_in_the_wrong_order_are_no_negative_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search for the full normal that went astray: the covariance part is unknown, not below zero."""
    log_joint = PROBLEMS["mlp_gaussian"](4, 3).log_joint
    true_refit = gaps.refit

    def astray(joint: LogJoint, *, family: str, **options: Any) -> Any:
        found = true_refit(joint, family=family, **options)
        return found if family == "diagonal" else replace(found, q=replace(found.q, loc=found.q.loc + 1))

    monkeypatch.setattr(gaps, "refit", astray)
    found = refitted(log_joint)
    assert found["covariance"].isnan().all()
    assert found["amortization"].isfinite().all()


# -- words ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_text_calls_a_bound_a_value() -> None:
    """In names of columns, in the short table and in the verdict of data for which nothing but bounds is known."""
    for name, (_, text) in VARIABLES.items():
        if name.startswith(("bound_", "log_evidence_lower", "log_evidence_upper")):
            assert "bound" in text
        elif re.search(r"log p\(x\)|log_evidence", text):
            assert name.startswith(("log_evidence", "gap_", "refinement", "elbo", "kl_forward"))
    vae, x, oracle = linear_vae(5, 8, noise=0.05)
    set_guide(vae, oracle)
    result = audit_log_joint(LogJoint(vae.model, vae.guide, x), references=[Annealed(temperatures=5)], draws=1000)
    table = result.table
    assert all("bound" in method for method in table["evidence_method"].values)
    assert table["log_evidence"].isnull().all()
    assert table["log_evidence_se"].isnull().all()
    for name in ("gap_total", "gap_approximation", "kl_forward", "kl_forward_se"):
        assert table[name].isnull().all()
    for sentence in re.split(r"[.;] ", re.sub(r"\[Rule: .*?\]", "", result.verdict)):  # a rule is about all audits
        assert "log p(x)" not in sentence or "bound" in sentence
    shown = dict(summary(table))
    assert shown["mean log p(x) [nats], 0 data"] == "not available"
    upper = table.assign(log_evidence_upper=table["log_evidence_lower"] + 1)
    assert "a conditional upper bound for" in sentences(upper)[0]
    assert isinstance(upper, xr.Dataset)


def test_the_reason_stands_in_the_table() -> None:
    vae = mlp_vae(2)
    x = torch.bernoulli(torch.full((6, 12), 0.5), generator=torch.Generator().manual_seed(0))
    table = audit_log_joint(LogJoint(vae.model, vae.guide, x), references=["grid"], draws=1000).table
    assert set(table["evidence_reason"].values) == {"exact up to its numerical error"}
    assert not math.isnan(float(table["missed_mass"].max()))
    assert amortized(LogJoint(vae.model, vae.guide, x), draws=500, keep=100, seed=1).stats["bound_all"].shape == (6,)
