"""The shipped digits spec, fitted and audited as a user would: evidence two ways, the sign of the gap, a richer guide."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import elbowroom as er
from elbowroom.analysis.audit.auditor import Audit, audit_log_joint
from elbowroom.inference.target.log_joint import LogJoint

SPEC = Path(__file__).parents[2] / "experiments" / "digits.yaml"


SOME = 12  # one in twelve of the test split is audited, all of it among the slow tests
every = pytest.mark.parametrize("every", [SOME, pytest.param(1, marks=pytest.mark.slow)])
Audited = Callable[[int], tuple[er.Run, Audit]]


def fitted(out: Path, *changes: str) -> er.Run:
    return er.fit(er.Experiment.load(SPEC, set=["fit.device=cpu", "audit.draws=4000", *changes]), out=out)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Audited:
    """The run, and its audit of one in so many of the test data; each is made once."""
    folder = tmp_path_factory.mktemp("digits")
    run = fitted(folder / "diagonal")
    n = len(np.load(run.path / "split.npz")["test"])
    assert n > 350

    @cache
    def audited(every: int) -> tuple[er.Run, Audit]:
        part = er.Run.load(run.path, set=[f"audit.observations={n // every}", "audit.draws=4000"])
        audit = part.audit(out=folder / f"one in {every}")
        assert audit.table.sizes["obs_id"] == n // every
        return run, audit

    return audited


@every
def test_the_whole_test_split_is_exact_and_no_gap_is_negative(digits: Audited, every: int) -> None:
    _, audit = digits(every)
    table = audit.table
    assert set(table["status"].values.flatten()) == {"exact"}
    assert set(table["evidence_method"].values) == {"grid"}
    assert (table["gap_total"] > -3 * table["elbo_se"]).all()
    assert table["refinement_error"].max() < 1e-3


@every
@pytest.mark.slow
def test_evidence_agrees_with_a_second_shifted_and_refined_grid(digits: Audited, every: int) -> None:
    """A global lattice that knows nothing of the boxes: [-9, 9]^2, spacing 0.018, off the origin by an odd fraction."""
    run, audit = digits(every)
    x = torch.tensor(audit.posteriors["grid"].observed_data["x"].values)
    axis = (torch.arange(1000, dtype=torch.float64) + 0.37) * 0.018 - 9
    log_joint = LogJoint(run.vae.model, run.vae.guide, x)
    total = torch.full((len(x),), -torch.inf, dtype=torch.float64)
    for rows in axis.split(50):
        z = torch.cartesian_prod(rows, axis)
        total = torch.logaddexp(total, torch.logsumexp(log_joint.shared(z), 0))
    assert log_joint.shares
    second = total + 2 * math.log(0.018)
    np.testing.assert_allclose(audit.table["log_evidence"], second, atol=1e-3)


@every
@pytest.mark.slow
def test_evidence_agrees_with_importance_sampling(digits: Audited, every: int) -> None:
    run, audit = digits(every)
    x = torch.tensor(audit.posteriors["grid"].observed_data["x"].values)
    log_joint = LogJoint(run.vae.model, run.vae.guide, x)
    sampled = audit_log_joint(log_joint, references=[], draws=10_000, seed=11).table
    good = ((sampled["pareto_k"] < 0.5) & sampled["log_evidence"].notnull()).values
    assert good.mean() > 0.4
    difference = (audit.table["log_evidence"].values - sampled["log_evidence"].values)[good]
    assert (abs(difference) < 4.5 * sampled["log_evidence_se"].values[good]).all()


@pytest.mark.slow
def test_a_richer_guide_lowers_the_median_gap(digits: Audited, tmp_path: Path) -> None:
    full = fitted(tmp_path / "full_rank", "guide.family=full_rank_normal", "audit.observations=60").audit()
    same = digits(1)[1].table.sel(obs_id=full.table["obs_id"])
    assert full.table["gap_total"].median() < same["gap_total"].median()
