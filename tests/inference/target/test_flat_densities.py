"""Densities that do not depend on z, or only by steps: no gradient is a gradient of zero."""

from __future__ import annotations

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from elbowroom.analysis.audit.auditor import audit
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.inference.target.tracing import OneDatum, by_graph

D = 4
ZEROS = torch.zeros(D, dtype=torch.float64)
X = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
STEP = 0.3


def likelihood(kind: str, z: Tensor, x: Tensor) -> dist.TorchDistribution:
    if kind == "dead decoder":
        return dist.Normal(torch.zeros_like(x), 1.0)
    return dist.Bernoulli(torch.where(z.sum(-1) > STEP, 0.95, 0.02).to(z))


def pair(kind: str):
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(ZEROS, 1.0).to_event(1))
            pyro.sample("x", likelihood(kind, z, x), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(ZEROS.expand(len(x), D), 1.1).to_event(1))

    return model, guide


@pytest.mark.parametrize("by", ["handlers", "graph"])
@pytest.mark.parametrize("kind", ["dead decoder", "threshold"])
def test_the_gradient_is_that_of_the_prior_alone(kind: str, by: str) -> None:
    joint = LogJoint(*pair(kind), X)
    z = joint.probe_points
    if by == "graph":
        rows = OneDatum(joint)
        evaluate = {}
        with joint.frozen_weights():
            for what in ("grad", "parts"):
                evaluate[what] = partial(by_graph, joint, rows.graph(what, rows.record(what)).replay)
    else:
        evaluate = {"grad": joint.grad, "parts": joint.parts}
    value, gradient = evaluate["grad"](z)
    prior, log_p, of_prior, of_likelihood = evaluate["parts"](z)
    torch.testing.assert_close(value, prior + log_p)
    torch.testing.assert_close(gradient, -z)
    torch.testing.assert_close(of_prior, -z)
    assert not of_likelihood.any()
    torch.testing.assert_close(log_p, torch.stack([likelihood(kind, u, X).log_prob(X) for u in z]))


def evidence(kind: str) -> Tensor:
    if kind == "dead decoder":
        return dist.Normal(torch.zeros_like(X), 1.0).log_prob(X)
    above = 1 - dist.Normal(0.0, 1.0).cdf(torch.tensor(STEP / math.sqrt(D), dtype=torch.float64))
    one = 0.95 * above + 0.02 * (1 - above)
    return torch.where(X > 0, one.log(), (1 - one).log())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dead decoder", "threshold"])
def test_an_audit_by_default(kind: str) -> None:
    found = audit(*pair(kind), X, diagnose=False, budget=10).table
    assert {"hmc", "importance"} <= set(found["reference"].values)
    error = 4.5 * found["log_evidence_se"].values + 1e-6
    assert (abs(found["log_evidence"].values - evidence(kind).numpy()) < error).all()
