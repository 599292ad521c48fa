"""One datum, one kind: every place that speaks of log p(x) says the same, also of references that are not ours."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib import pyplot
from support.cases.vaes import linear_vae, set_guide

from elbowroom.analysis import idata
from elbowroom.analysis.audit.auditor import audit_log_joint
from elbowroom.analysis.measures.evidence_kinds import (
    BOUND,
    CONTRADICTED,
    ESTIMATE,
    EXACT,
    NONE,
    counts,
    kind_of,
    kinds,
    of_guide,
)
from elbowroom.analysis.plots.queries.integration import integration
from elbowroom.analysis.plots.report.audit import gaps
from elbowroom.analysis.plots.style import Absent
from elbowroom.analysis.queries.integration import integrate
from elbowroom.analysis.queries.novelty import judge
from elbowroom.analysis.report.conclusions import conclusions
from elbowroom.analysis.report.key_figures import key_figures, worst_rows
from elbowroom.analysis.verdict import rules
from elbowroom.analysis.verdict.summary import sentences, summary
from elbowroom.analysis.verdict.thresholds import UNTRUSTED
from elbowroom.inference.posterior import Evidence, Posterior, Reference
from elbowroom.inference.references.ais.ais import Annealed
from elbowroom.inference.references.closed_form import ClosedForm
from elbowroom.inference.references.importance.importance import ImportanceSampling
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.models.guides.normal import DiagonalNormal, FullRankNormal
from elbowroom.queries.encode import encoder
from elbowroom.queries.score.conclusions import conclude
from elbowroom.queries.score.score import scorer
from elbowroom.queries.stream import Chunk
from elbowroom.runs.compare import Versus, tabulate

N = 12


class Foreign(Reference):
    """A reference of a user's: the true posterior under another name, and what it likes to say of log p(x)."""

    name = "theirs"

    def __init__(self, kind, by, *, status="certified", off=0.0, error=0.01, upper=None):
        self.kind, self.by, self.status = kind, by, status
        self.off, self.error, self.upper = off, error, upper

    def refusal(self, log_joint):
        return None

    def __call__(self, log_joint, *, keep, seed, until=math.inf) -> Posterior:
        found = ClosedForm()(log_joint, keep=keep, seed=seed)
        value = found.evidence.value + torch.as_tensor(self.off, dtype=torch.float64)
        above = None if self.upper is None else value + self.upper
        evidence = Evidence(self.kind, self.by, value, torch.full_like(value, self.error), above)
        status, reason = [self.status] * len(value), [f"{self.name}: by hand"] * len(value)
        return replace(found, method=self.name, status=status, reason=reason, evidence=evidence, stats={})


class Other(Foreign):
    """Another of theirs."""

    name = "other"


def joint(*, shift=0.0, n=N, family=DiagonalNormal) -> LogJoint:
    """A linear model; a shifted encoder has weights that nobody trusts, a full normal's are trusted."""
    vae, x, oracle = linear_vae(2, 6, n=n, family=family)
    set_guide(vae, oracle)
    with torch.no_grad():
        vae.posterior.encoder.body.bias[:2] += shift
    return LogJoint(vae.model, vae.guide, x)


def audited(*references: Reference, shift=0.0, family=DiagonalNormal) -> xr.Dataset:
    return audit_log_joint(joint(shift=shift, family=family), references=list(references), draws=1000).table


@dataclass
class Said:
    """What each place says of one table."""

    verdict: str
    judgement: list[str]
    per_datum: list[str]
    label: str
    note: str
    cells: list[str]
    may: str
    may_not: str
    caption: str
    compared: str
    known: int


def said(table: xr.Dataset) -> Said:
    figure, drawn = key_figures(table, None, held_out=False)[0], gaps(table)
    versus = Versus(tabulate(["a", "b"], [table, table]))
    caption = drawn.reason if isinstance(drawn, Absent) else drawn.caption
    pyplot.close("all")
    may, may_not = (" ".join(part) for part in conclusions(table))
    return Said(
        " ".join(sentences(table)),
        [one.verdict for one in rules.judge(table)],
        rules.per_datum(table).tolist(),
        figure.label,
        figure.note,
        [row.cells[1] for row in worst_rows(table, N)],
        may,
        may_not,
        caption,
        " ".join(versus.verdict()),
        int(versus.table["known"][0]),
    )


# -- exact ------------------------------------------------------------------------------------------------------------------

NAMES = ["quadrature", "grid", "my estimate", "lower bound of none", "importance sampling estimate", "none", "annealed"]


@pytest.mark.parametrize("by", NAMES)
def test_exact_evidence_is_exact_by_whatever_name(by):
    table = audited(Foreign("exact", by, error=1e-6))
    found = said(table)
    assert counts(table) == {EXACT: N}
    assert f"log p(x) is exact, up to the numerical error stated, for {N} of {N} data" in found.verdict
    assert "estimated by" not in found.verdict
    assert "an importance-sampling estimate" not in found.verdict
    assert found.label == "log p(x)"
    assert f"exact for {N} of {N} data (by {by})" in found.note
    assert f"log p(x) is exact for {N} of {N} data" in found.may
    assert "Exact values of log p(x)" not in found.may_not
    assert "is itself an" not in found.caption
    assert (found.known, "only a bound" in found.compared) == (N, False)
    assert not any("bound" in cell for cell in found.cells)
    assert dict(summary(table))["evidence by"] == f"{by} {N}"


# -- estimates --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["bridge sampling", "quadrature", "closed form", "a bound of sorts"])
def test_an_estimate_is_called_by_its_own_name(by):
    table = audited(Foreign("estimate", by))
    found = said(table)
    assert counts(table) == {ESTIMATE: N}
    assert set(table["evidence_reason"].values) == {"theirs certifies it"}
    np.testing.assert_allclose(table["log_evidence_upper"] - table["log_evidence"], 1.96 * 0.01, rtol=1e-4)
    assert f"log p(x) is estimated by {by}, not from the guide." in found.verdict
    assert f"log p(x) is an estimate by {by} for {N} of {N}" in found.verdict
    assert found.label == "estimate of log p(x)"
    assert f"estimated for {N} of {N} data (by {by} estimate)" in found.note
    assert f"log p(x) is estimated for {N} of {N} data" in found.may
    assert f"theirs is an estimate by {by} with the standard error given, accepted because its method says" in found.may_not
    assert f"For {N} data log p(x) is itself an estimate by {by}." in found.caption
    for text in vars(found).values():
        assert "importance-sampling estimate" not in str(text)
        assert "q*" not in str(text)
    assert found.known == N


def test_a_reference_that_shares_our_guides_word_is_not_the_guide():
    """Their method is called as our estimate from the guide's draws is."""
    table = audited(Foreign("estimate", "importance sampling"))
    assert not of_guide(table).any()
    assert "log p(x) is estimated by importance sampling, not from the guide." in said(table).verdict
    alone = audited(family=FullRankNormal)
    assert counts(alone) == {ESTIMATE: N}
    assert of_guide(alone).all()
    assert "from the guide itself" in said(alone).verdict


def test_estimates_of_theirs_and_ours_are_both_named():
    """Theirs has no value for five data; the guide's own weights stand in there."""
    table = audited(
        Foreign("estimate", "bridge sampling", off=torch.where(torch.arange(N) < 5, torch.nan, 0.0)), family=FullRankNormal
    )
    assert counts(table) == {ESTIMATE: N}
    assert int(of_guide(table).sum()) == 5
    assert f"is an estimate by bridge sampling and importance sampling for {N} of {N}" in said(table).verdict


# -- bounds -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upper", [None, 8.0])
def test_bounds_alone_are_bounds_everywhere(upper):
    reference = Foreign("bound", "a sharp estimate", status="uncertified", upper=upper)
    table = audited(reference, shift=2.0)
    found, truth = said(table), audited(ClosedForm(), shift=2.0)["log_evidence"].values
    assert counts(table) == {BOUND: N}
    assert table["log_evidence"].isnull().all()
    np.testing.assert_allclose(table["log_evidence_lower"], truth - math.log(40))  # which they exceed once in 40
    method = "lower bound by a sharp estimate" + ("" if upper is None else ", conditional upper bound")
    assert set(table["evidence_method"].values) == {method}
    assert all(
        ("; the upper bound, by a sharp estimate, is" in r) == (upper is not None) for r in table["evidence_reason"].values
    )
    assert f"The gap of none of the {N} data is known" in found.verdict
    assert found.judgement == [UNTRUSTED]
    assert set(found.per_datum) == {UNTRUSTED}
    assert found.label == "lower bound on log p(x)"
    assert "log p(x) itself is not known for any of them" in found.note
    assert all("bound" in cell for cell in found.cells)
    assert f"Anything about the gap of {N} data of {N} but its bounds" in found.may_not
    assert "log p(x) is" not in found.may
    assert "log p(x), hence the gap, is known for 0 data" in found.caption
    assert (found.known, "bounds alone rank no models" in found.compared) == (0, True)


def test_an_estimate_that_nobody_trusts_gives_no_bound():
    table = audited(Foreign("estimate", "bridge sampling", status="uncertified"), shift=2.0)
    assert set(table["evidence_method"].values) == {"importance-weighted lower bound"}
    assert set(table["evidence_reason"].values) == {"no value: theirs: by hand"}
    assert counts(table) == {BOUND: N}


def test_the_best_bound_of_theirs_and_ours():
    below = audited(Foreign("bound", "a poor one", status="uncertified", off=-50.0), Annealed(temperatures=5), shift=2.0)
    assert set(below["evidence_method"].values) <= {"annealed lower bound", "importance-weighted lower bound"}
    assert counts(below) == {BOUND: N}


# -- contradictions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("references", "why"),
    [
        (
            [
                Other("exact", "quadrature", status="uncertified", off=1.0),
                Foreign("estimate", "bridge sampling"),
            ],
            "an uncertified exact reference contradicts the estimate",
        ),
        (
            [Other("bound", "nested sampling", status="uncertified", off=3.0), Foreign("estimate", "bridge")],
            "the lower bound by nested sampling lies above the estimate: it missed a mode",
        ),
    ],
)
def test_an_estimate_that_another_reference_contradicts_is_none(references, why):
    table = audited(*references)
    found = said(table)
    assert counts(table) == {BOUND: N}
    assert all(why in reason for reason in table["evidence_reason"].values)
    assert (found.known, found.label) == (0, "lower bound on log p(x)")
    assert f"The gap of none of the {N} data is known" in found.verdict
    assert f"Anything about the gap of {N} data of {N} but its bounds" in found.may_not


@pytest.mark.parametrize(("kind", "word"), [("exact", "exact"), ("estimate", "estimated")])
def test_what_lies_below_the_elbo_is_contradicted_everywhere(kind, word):
    table = audited(Foreign(kind, "quadrature", off=torch.where(torch.arange(N) < 3, -5.0, 0.0)))
    found = said(table)
    assert kinds(table).tolist() == [CONTRADICTED] * 3 + [kind] * (N - 3)
    assert f"The numbers contradict each other: for 3 of {N} data" in found.verdict
    assert f"log p(x) is contradicted by the ELBO for 3 of {N}" in found.verdict
    assert f"for {N - 3} of {N}" in found.verdict
    assert found.judgement[0] == UNTRUSTED
    assert [one == UNTRUSTED for one in found.per_datum] == [True] * 3 + [False] * (N - 3)
    assert f"{word} for {N - 3:,}, contradicted for 3 of {N} data (by quadrature" in found.note
    assert sum("(contradicted)" in cell for cell in found.cells) == 3
    assert f"log p(x) is {word} or contradicted for {N} of {N} data" in found.may
    assert "Anything about the gap of 3 data: there log p(x) is contradicted" in found.may_not
    assert "For 3 data log p(x) is contradicted" in found.caption
    assert f"log p(x) of 3 of {N} data is contradicted in some run" in found.compared


def test_where_all_are_contradicted_nothing_is_called_exact():
    table = audited(Foreign("exact", "quadrature", off=-5.0))
    found = said(table)
    assert counts(table) == {CONTRADICTED: N}
    assert found.label == "contradicted log p(x)"
    assert "exact for" not in found.verdict + found.note + found.may
    assert f"contradicted for {N} of {N} data (by quadrature)" in found.note


def test_an_exact_value_beside_an_infinite_gap_is_no_bound():
    table = audited(Foreign("exact", "quadrature", error=1e-6))
    infinite = table.assign(elbo=table["elbo"] * 0 - np.inf, gap_total=table["gap_total"] * 0 + np.inf)
    assert counts(infinite) == {EXACT: N}
    assert not any("bound" in row.cells[1] for row in worst_rows(infinite))
    assert dict(summary(infinite))["gap [nats], largest"] == "not available"


# -- answers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "kind"),
    [
        (Foreign("exact", "importance sampling estimate"), EXACT),
        (Foreign("estimate", "importance sampling"), ESTIMATE),
        (Foreign("bound", "an estimate", status="uncertified"), BOUND),
    ],
)
def test_scored_and_encoded_rows_have_the_same_kinds(reference, kind):
    log_joint = joint(shift=2.0, n=50)
    chunk = Chunk(log_joint, {"x": log_joint.args[0]}, np.arange(50), 0)
    vae = log_joint.model.__self__
    rows = scorer(vae, [reference], draws=200)(chunk)
    assert counts(rows) == {kind: 50}
    judged = judge(rows, rows, None, band=(2.5, 97.5), fdr=0.1)
    attrs = {"calibration_rows": 50, "band": [2.5, 97.5], "fdr": 0.1, "holes": "pattern", "not_simulated": "why"}
    text = " ".join(conclude(rows.merge(judged, combine_attrs="override").assign_attrs(attrs)))
    assert ("50 rows have bounds alone" in text) == (kind == BOUND)
    assert "the encoder's own draws alone" not in text
    if kind != EXACT:  # an answer of `encode` holds no reasons
        assert counts(encoder(vae, [reference], draws=200, keep=40)(chunk)) == {kind: 50}


# -- one datum, and files of before -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "line"),
    [
        (Foreign("exact", "my estimate", error=1e-6), "(my estimate, exact)"),
        (Foreign("estimate", "bridge sampling"), "(bridge sampling, estimate)"),
        (ClosedForm(), "(closed form, exact)"),
        (ImportanceSampling(draws=2000), "(importance sampling from q*, estimate)"),
        (Foreign("bound", "nested sampling", status="uncertified"), "lower bound on log p(x)"),
    ],
)
def test_the_figure_of_one_integral_says_the_kind(reference, line):
    shift = 2.0 if isinstance(reference, Foreign) and reference.kind == "bound" else 0.0
    found = integrate(joint(shift=shift, n=1), samples=50, repeats=2, methods=("encoder",), references=[reference])
    texts = [text.get_text() for axes in integration(found).figure.axes for text in axes.texts]
    pyplot.close("all")
    assert any(line in text for text in texts)


@pytest.mark.parametrize(
    "references", [[ClosedForm()], [ImportanceSampling(draws=2000)], [], [Annealed(temperatures=3, chains=8)]]
)
@pytest.mark.parametrize(
    ("shift", "family"), [(0.0, FullRankNormal), pytest.param(2.0, DiagonalNormal, marks=pytest.mark.slow)]
)
def test_files_without_reasons_have_the_same_kinds(references, shift, family, tmp_path: Path):
    """Audits of before stated methods alone, which were ours."""
    table = audited(*references, shift=shift, family=family)
    idata.write(table.drop_vars("evidence_reason"), tmp_path / "audit.nc")
    older = idata.read_table(tmp_path / "audit.nc")
    assert kinds(older).tolist() == kinds(table).tolist()
    assert of_guide(older).tolist() == of_guide(table).tolist()
    assert vars(said(older)) == vars(said(table))


def test_a_row_that_the_model_cannot_take_is_of_no_kind():
    assert kind_of(np.array([np.nan, np.nan]), np.array(["none", "annealed lower bound"]), np.array(["why", ""])).tolist() == [
        NONE,
        BOUND,
    ]
