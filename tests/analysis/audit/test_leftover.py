"""What takes over under `auto` where the grid refuses, and what an exact value is refuted by."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from elbowroom.analysis.audit import plan
from elbowroom.analysis.audit.auditor import Audit, audit
from elbowroom.analysis.measures.refuted import overlooked, refute
from elbowroom.inference.posterior import Evidence, Posterior
from elbowroom.inference.references.grid.grid import Grid
from elbowroom.inference.references.hmc.hmc import HMC
from elbowroom.inference.references.importance.importance import ImportanceSampling
from elbowroom.inference.target.log_joint import LogJoint

F64 = torch.float64


def linear(y):
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z[..., 0] + 0.1 * z[..., 0] ** 2, 0.5), obs=y)


def guide(y):
    with pyro.plate("rows", len(y)):
        pyro.sample("z", dist.Normal(0.7 * y.unsqueeze(-1), 0.5).to_event(1))


class Fussy(Grid):
    """A grid that refuses the first datum of each block."""

    def __call__(self, *args, **kwargs) -> Posterior:
        found = super().__call__(*args, **kwargs)
        reason = ["grid: refused", *found.reason[1:]]
        return dataclasses.replace(found, status=["uncertified", *found.status[1:]], reason=reason)


@pytest.fixture(scope="module")
def audits() -> tuple[Audit, Audit]:
    y = torch.linspace(-1, 1, 5, dtype=F64)
    plain = audit(linear, guide, y, diagnose=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "Grid", Fussy)
        patch.setattr(plan, "spare", lambda *_: [HMC(), ImportanceSampling()])
        return plain, audit(linear, guide, y, diagnose=False)


def test_nothing_else_runs_where_the_grid_is_exact(audits: tuple[Audit, Audit]) -> None:
    table = audits[0].table
    assert table["reference"].values.tolist() == ["grid"]
    assert (table["status"].values == "exact").all()
    assert "for no others: hmc, importance, ais" in table.attrs["plan"]
    assert "took its place" not in table.attrs.get("notes", "")


def test_other_methods_take_over_the_data_that_the_grid_refuses_and_only_those(audits: tuple[Audit, Audit]) -> None:
    before, after = (a.table for a in audits)
    assert after["reference"].values.tolist() == ["grid", "hmc", "importance"]
    status = after["status"].values
    assert status[0, 0] == "uncertified"
    assert (status[1:, 0] == "exact").all()
    assert (status[1:, 1:] == "not needed").all()
    assert (status[0, 1:] != "not needed").all()
    assert all("not needed here: grid is exact or certified" in reason for reason in after["reason"].values[1:, 1:].flat)
    assert "left 1 of 5 data over, for which hmc, importance took its place" in after.attrs["notes"]
    assert ("hmc: exact or certified", f"{int(status[0, 1] == 'certified')} of 1 left over") in audits[1].lines()
    # the others are as if nothing had been left over; the first has a value within its error
    for name in ("log_evidence", "elbo", "gap_total"):
        np.testing.assert_array_equal(before[name].values[1:], after[name].values[1:])
    assert after["evidence_method"].values[0].endswith("estimate")
    error = abs(float(after["log_evidence"][0] - before["log_evidence"][0]))
    assert error < 4.5 * float(after["log_evidence_se"][0]) + 1e-3


def test_the_plan_says_what_takes_over() -> None:
    found = plan.choose("auto", audit_of())
    assert found.names == ["grid"]
    assert [method.name for method in found.spare] == ["hmc", "importance", "ais"]
    assert "for data that grid does not settle, and for no others: hmc, importance, ais" in str(found)
    assert found.tree()["for_the_rest"] == ["hmc", "importance", "ais"]
    assert not plan.choose(["grid"], audit_of()).spare


def audit_of() -> LogJoint:
    return LogJoint(linear, guide, torch.zeros(3, dtype=F64))


def posterior(value: float, error: float, **rest) -> Posterior:
    evidence = Evidence(rest.pop("kind"), "a method", torch.tensor([value]), torch.tensor([error]))
    return Posterior(rest.pop("method"), torch.zeros(4, 5, 1, 2), {}, [rest.pop("status")], ["why"], evidence=evidence, **rest)


@pytest.mark.parametrize(("ahead", "status"), [(0.5, "uncertified"), (0.02, "exact"), (-0.5, "exact")])
def test_an_estimate_above_an_exact_value_by_more_than_both_errors_refutes_it(ahead: float, status: str) -> None:
    exact = posterior(-3.0, 1e-7, kind="exact", method="grid", status="exact")
    estimate = posterior(-3.0 + ahead, 0.01, kind="estimate", method="importance", status="certified")
    found = refute(exact, [estimate])
    assert list(found.status) == [status]
    assert ("contradicted" in found.reason[0]) == (status == "uncertified")
    loose = dataclasses.replace(estimate, status=["uncertified"])
    assert list(refute(exact, [loose]).status) == ["exact"]


@pytest.mark.parametrize(("highest", "status"), [(9.0, "uncertified"), (2.0, "certified")])
def test_chains_that_never_reached_a_known_peak_certify_nothing(highest: float, status: str) -> None:
    stats = {"unseen": torch.tensor([4.0]), "highest": torch.tensor([highest])}
    grid = posterior(-3.0, 1.0, kind="exact", method="grid", status="uncertified", stats=stats)
    lp = {"lp": torch.zeros(4, 5, 1)}
    chains = posterior(-3.0, 0.1, kind="estimate", method="hmc", status="certified", sample_stats=lp)
    assert list(overlooked(chains, grid).status) == [status]
