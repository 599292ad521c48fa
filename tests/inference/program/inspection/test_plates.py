"""The data plate is found where one plate holds what is observed; crossed effects are audited given each other."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from elbowroom.analysis.audit.auditor import audit
from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.target.log_joint import LogJoint

F64 = torch.float64
ROWS, ITEMS = 5, 4
ABILITY = torch.linspace(-1.0, 1.5, ROWS, dtype=F64)
EASE = torch.tensor([0.4, -0.2, 1.0, -0.7], dtype=F64)
ANSWERS = ABILITY[:, None] + EASE + 0.1 * torch.arange(ROWS * ITEMS, dtype=F64).reshape(ROWS, ITEMS).sin()


def crossed(y: Tensor) -> None:
    """A normal item response model: y_ij ~ N(ability_i + ease_j, 1)."""
    subjects, items = pyro.plate("subjects", len(y), dim=-2), pyro.plate("items", y.shape[1], dim=-1)
    with subjects:
        ability = pyro.sample("ability", dist.Normal(torch.zeros(1, dtype=F64), 1.0))
    with items:
        ease = pyro.sample("ease", dist.Normal(torch.tensor(0.0, dtype=F64), 1.0))
    with subjects, items:
        pyro.sample("y", dist.Normal(ability + ease, 1.0), obs=y)


def crossed_guide(y: Tensor) -> None:
    with pyro.plate("subjects", len(y), dim=-2):
        pyro.sample("ability", dist.Normal(ABILITY[:, None], 0.5))
    with pyro.plate("items", y.shape[1], dim=-1):
        pyro.sample("ease", dist.Normal(EASE, 0.5))


def test_a_crossed_model_is_audited_one_side_given_the_other() -> None:
    """Given the ease at its median, ability_i | y ~ N(sum_j (y_ij - ease_j) / (J + 1), 1 / (J + 1)); and the converse."""
    with pytest.raises(UnsupportedProgram, match=r"hold=\['subjects'\], then hold=\['items'\]") as refused:
        LogJoint(crossed, crossed_guide, ANSWERS)
    assert "could be any of ['items', 'subjects']" in str(refused.value)
    for hold, name, residual in (("items", "ability", ANSWERS - EASE), ("subjects", "ease", (ANSWERS - ABILITY[:, None]).T)):
        found = audit(crossed, crossed_guide, ANSWERS, hold=[hold], diagnose=False)
        count = residual.shape[1]
        covariance = torch.eye(count, dtype=F64) + 1
        evidence = dist.MultivariateNormal(torch.zeros(count, dtype=F64), covariance).log_prob(residual)
        torch.testing.assert_close(torch.tensor(found.table["log_evidence"].values), evidence, atol=1e-6, rtol=1e-6)
        mean = found.posteriors["grid"].posterior[name].mean(("chain", "draw")).values.reshape(-1)
        exact = residual.sum(1) / (count + 1)
        assert abs(torch.tensor(mean) - exact).max() < 5 * math.sqrt(1 / (count + 1)) / 1000**0.5
        assert "is held at the guide's median" in found.table.attrs["notes"]


def test_a_name_of_no_plate_is_told_with_the_nearest() -> None:
    with pytest.raises(UnsupportedProgram, match="hold='item': the model has no such plate; .*did you mean 'items'"):
        LogJoint(crossed, crossed_guide, ANSWERS, hold=["item"])
    with pytest.raises(UnsupportedProgram, match="this is the data plate"):
        LogJoint(crossed, crossed_guide, ANSWERS, plate="items", hold=["items"])
    with pytest.raises(UnsupportedProgram, match="every latent lies in these plates"):
        LogJoint(crossed, crossed_guide, ANSWERS, hold=["items", "subjects"])


LOCS = torch.tensor([-2.0, 0.5, 3.0], dtype=F64)
POINTS = torch.tensor([-2.2, -1.0, 0.4, 2.0, 3.3], dtype=F64)


def mixture(x: Tensor) -> None:
    """Pyro's tutorial on mixtures: locations in one plate, assignments and values in the other."""
    with pyro.plate("components", 3):
        locs = pyro.sample("locs", dist.Normal(torch.tensor(0.0, dtype=F64), 10.0))
    with pyro.plate("data", len(x)):
        which = pyro.sample("which", dist.Categorical(torch.ones(3, dtype=F64) / 3))
        pyro.sample("x", dist.Normal(locs[which], 0.7), obs=x)


def mixture_guide(x: Tensor) -> None:
    with pyro.plate("components", 3):
        pyro.sample("locs", dist.Normal(LOCS, 0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("which", dist.Categorical(torch.ones(3, dtype=F64) / 3))


def test_the_plate_that_holds_what_is_observed_is_the_datas() -> None:
    """The components lie in a plate of their own, and are held at the guide's median: log p(x) is that of the mixture."""
    found = audit(mixture, mixture_guide, POINTS, diagnose=False)
    evidence = torch.logsumexp(dist.Normal(LOCS, 0.7).log_prob(POINTS[:, None]), 1) - math.log(3)
    torch.testing.assert_close(torch.tensor(found.table["log_evidence"].values), evidence)
    assert "the data plate is 'data'" in found.table.attrs["notes"]
    assert "'locs' lie outside it and are held" in found.table.attrs["notes"]
    assert found.table.attrs["held"] == "locs"
