"""The Laplace approximation: exact where posteriors are normal, and a proposal that certifies where they nearly are."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from support.problems.catalogue import PROBLEMS, UNIMODAL
from torch import Tensor

from elbowroom.inference.references.closed_form import ClosedForm
from elbowroom.inference.references.importance.importance import ImportanceSampling
from elbowroom.inference.references.importance.laplace import laplace
from elbowroom.inference.target.log_joint import LogJoint


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_a_normal_posterior_is_found_exactly_from_afar(shift: float) -> None:
    """z ~ N(0, I), x = A z + noise, and a guide that starts `shift` away with a wrong scale."""
    a = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / 3
    x = torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(12), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ a.T, 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(len(x), 12) + shift, 0.3).to_event(1))

    found = laplace(LogJoint(model, guide, x), seed=0)
    covariance = torch.linalg.inv(torch.eye(12, dtype=x.dtype) + a.T @ a / 0.25)
    assert torch.allclose(found.loc, x @ a @ covariance / 0.25, atol=1e-5)
    assert torch.allclose(found.covariance, covariance.expand(6, -1, -1), atol=1e-5)


def test_it_agrees_with_the_closed_form_of_a_vae() -> None:
    log_joint = PROBLEMS["linear_gaussian_d2"](5, 51).log_joint
    exact = ClosedForm()(log_joint, keep=100, seed=0)
    found = laplace(log_joint, seed=0)
    assert torch.allclose(found.loc, exact.mean.to(found.loc), atol=1e-4)
    assert torch.allclose(found.covariance, exact.covariance.to(found.loc), atol=1e-4)


@pytest.mark.parametrize("name", [name for name in UNIMODAL if PROBLEMS[name](2, 1).log_joint.dim])
def test_what_it_certifies_is_right(name: str) -> None:
    problem = PROBLEMS[name](8, 5)
    found = ImportanceSampling(draws=4_000, start="laplace", runs=32)(problem.log_joint, keep=100, seed=5)
    ok = found.trusted
    off = (found.evidence.value.double() - problem.evidence).abs()[ok]
    assert (off < 4.5 * found.evidence.error.double()[ok] + 1e-3).all()
